"""Features of labelled images: made by a frozen model, kept in files, and read from files of tools.extract_features."""
import dataclasses
import json
import zipfile
from pathlib import Path
from typing import Callable, List, Optional

import numpy as np
import safetensors
import safetensors.numpy
import torch
from torch.utils.data import Dataset, Subset

import datasets
from loaders import pictures, readers
from run import processes
from run.progress import DevicePrefetch, Progress, with_stops
from utils import InputError, abridge, first_line, replaced, whole_file

SUFFIXES = ('.npz', '.safetensors')


@dataclasses.dataclass
class Features:
    """Of the images of a data set, in its order.

    Args:
        features: (n, C), float32, as the model gives them.
        labels: (n,), int64.
        classes: what the classes 0, 1, ... are called.
    """
    features: torch.Tensor
    labels: torch.Tensor
    classes: List[str]

    def __len__(self) -> int:
        return len(self.labels)


# ---------------------------------------------------------------------------------------------------------------------
# Made by a model

def build_dataset(args, *, is_train: bool, most: Optional[int] = None) -> Dataset:
    """A split of --data-set as evaluation shows it.

    Args:
        most: images; None: all.

    Raises:
        InputError: the data are not there, or not what the data set's name says.
    """
    if is_train and readers.prefix_of(args.data_set):  # in training they have another order each time
        args, is_train = replaced(args, val_split=args.train_split), False
    dataset, _ = datasets.load_dataset(args, is_train)
    args = replaced(args, resize=datasets.decide_resize(args, dataset))
    datasets.probe_images(dataset, same_size=not datasets.resizes_for_evaluation(args))
    dataset.transform = datasets.build_eval_transform(args)
    if most is None or most >= len(dataset) or readers.is_stream(args.data_set):
        return dataset
    part = Subset(dataset, pictures.evenly_spread(range(len(dataset)), most))
    part.classes = dataset.classes
    return part


@torch.inference_mode()
def extract(function: Callable[[torch.Tensor], torch.Tensor], loader, *, device: torch.device,
            amp_dtype: Optional[torch.dtype], header: str, classes: List[str],
            after_batch: Optional[Callable[[], None]] = None) -> Features:
    """The features of all images, on every process.

    Args:
        function: images (B, 3, img_h, img_w) -> features (B, C).
        loader: of loaders.batches, for evaluation.
        amp_dtype: autocast type; None: full precision.
        header: what is running, for progress.
        after_batch: called after each batch, equally often on all processes.
    """
    rows, labels = [torch.zeros(0, 0)], [torch.zeros(0, 1, dtype=torch.int64)]
    progress = Progress(DevicePrefetch(loader, device), header, device)
    for images, targets in with_stops(progress, loader, after_batch):
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            rows.append(function(images).float().cpu())
        labels.append(targets.cpu()[:, None])
    found = [processes.gather_rows(torch.cat(parts[1:] or parts), in_turn=loader.counts_batches)
             for parts in (rows, labels)]
    loader.images_evaluated(len(found[0]))
    return Features(found[0], found[1][:, 0], classes)


# ---------------------------------------------------------------------------------------------------------------------
# In files

def read(path: str, flag: str) -> Features:
    """Features in a file that tools.extract_features, or --features-dir, has written.

    Raises:
        InputError: not there, damaged, or without features and labels.
    """
    source = f'{flag} {path}'
    if Path(path).suffix not in SUFFIXES:
        raise InputError(f'{source}: must end in {" or ".join(SUFFIXES)}, as files of tools.extract_features do')
    try:
        arrays, names = (read_npz if Path(path).suffix == '.npz' else read_safetensors)(Path(path))
    except FileNotFoundError:
        raise InputError(f'{source}: no such file') from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, safetensors.SafetensorError) as error:
        raise InputError(f'{source}: damaged, or no file of features ({first_line(error)})') from None
    if 'features' not in arrays:
        raise InputError(f'{source}: has no features; it has: {abridge(list(arrays)) or "nothing"}')
    if 'labels' not in arrays:
        raise InputError(f'{source}: has no labels, which tools.extract_features writes of one folder of class folders')
    features, labels = torch.from_numpy(arrays['features']).float(), torch.from_numpy(arrays['labels']).long()
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise InputError(f'{source}: features {tuple(features.shape)} and labels {tuple(labels.shape)} don\'t belong '
                         f'together')
    if not bool(features.isfinite().all()):
        raise InputError(f'{source}: some features are not finite')
    classes = names.get('classes') or [str(i) for i in range(int(labels.max()) + 1)]
    if int(labels.min()) < 0 or int(labels.max()) >= len(classes):
        raise InputError(f'{source}: labels are from {int(labels.min())} to {int(labels.max())}, of {len(classes)} '
                         f'classes')
    return Features(features, labels, classes)


def read_npz(path: Path) -> tuple:
    with np.load(path, allow_pickle=False) as file:
        return ({name: file[name] for name in ('features', 'labels') if name in file},
                {'classes': file['classes'].tolist()} if 'classes' in file else {})


def read_safetensors(path: Path) -> tuple:
    with safetensors.safe_open(path, 'np') as file:
        metadata = file.metadata() or {}
    arrays = safetensors.numpy.load_file(path)
    return arrays, {'classes': json.loads(metadata['classes'])} if 'classes' in metadata else {}


def write(path: Path, found: Features):
    with whole_file(path) as unfinished:
        np.savez(unfinished, features=found.features.numpy(), labels=found.labels.numpy(),
                 classes=np.array(found.classes))


def in_common(train: Features, test: Features, *, where: str) -> Features:
    """The test features with the labels that the training features have for their classes.

    Raises:
        InputError: a class of theirs is none of training, or their widths differ; `where` they are from.
    """
    if train.features.shape[1] != test.features.shape[1]:
        raise InputError(f'{where}: has features of {test.features.shape[1]} numbers, and those for training have '
                         f'{train.features.shape[1]}')
    numbers = {name: i for i, name in enumerate(train.classes)}
    there = [test.classes[i] for i in test.labels.unique().tolist()]
    lacking = [name for name in there if name not in numbers]
    if lacking:
        raise InputError(f'{where}: has {len(lacking)} classes that the training images lack: {abridge(lacking)}')
    renumbered = torch.tensor([numbers.get(name, -1) for name in test.classes])
    return Features(test.features, renumbered[test.labels], train.classes)
