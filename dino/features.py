"""Features of labelled images: made by a frozen model, kept in files, and read from files of tools.extract_features."""
import dataclasses
import json
import zipfile
from pathlib import Path
from typing import Callable, Iterator, List, Optional

import numpy as np
import safetensors
import torch
from torch.utils.data import Dataset, DistributedSampler, Subset

import datasets
from loaders import pictures, readers
from loaders.batches import build_eval_loader
from run import flags, processes
from run.progress import DevicePrefetch, Progress, with_stops
from utils import InputError, abridge, first_line, replaced, whole_file

SUFFIXES = ('.npz', '.safetensors')
ARRAYS = ('features', 'labels')  # in a file


@dataclasses.dataclass
class Features:
    """Of the images of a data set, in its order.

    Args:
        features: (n, C), float32, as the model gives them.
        labels: (n,), int64.
        classes: what the classes 0, 1, ... are called.
        made_of: which weights and images they are of, in plain values; None: not known.
    """
    features: torch.Tensor
    labels: torch.Tensor
    classes: List[str]
    made_of: Optional[dict] = None

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
    part.classes, part.standard = dataset.classes, getattr(dataset, 'standard', None)
    return part


def check_common(train: Dataset, test: Dataset):
    """Refuse test images of a class that the training images lack.

    Raises:
        InputError: names such classes.
    """
    known = set(train.classes)
    refuse_lacking([name for name in test.classes if name not in known], where='--data-path: val')


def refuse_lacking(names: List[str], *, where: str):
    if names:
        raise InputError(f'{where}: has {len(names)} classes that the training images lack: {abridge(names)}')


@torch.inference_mode()
def extract(args, function: Callable[[torch.Tensor], torch.Tensor], dataset: Dataset, device: torch.device, *,
            header: str, after_batch: Optional[Callable[[], None]] = None) -> Features:
    """The features of all images, on every process.

    Args:
        args: flags of a loader, and --amp.
        function: images (B, 3, img_h, img_w) -> features (B, C).
        dataset: of `build_dataset`.
        header: what is running, for progress.
        after_batch: called after each batch, equally often on all processes.
    """
    loader, amp_dtype = build_eval_loader(dataset, args, device), flags.amp_dtype(args, device)
    rows, labels = [torch.zeros(0, 0)], [torch.zeros(0, 1, dtype=torch.int64)]
    progress = Progress(DevicePrefetch(loader, device), header, device)
    for images, targets in with_stops(progress, loader, after_batch):
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            rows.append(function(images).float().cpu())
        labels.append(targets.cpu()[:, None])
    found = [processes.gather_rows(torch.cat(parts[1:] or parts), in_turn=loader.counts_batches)
             for parts in (rows, labels)]
    loader.images_evaluated(len(found[0]))
    return Features(found[0], found[1][:, 0], datasets.class_names(dataset))


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
        arrays = {name: torch.from_numpy(array) for name, array in arrays.items()}
    except FileNotFoundError:
        raise InputError(f'{source}: no such file') from None
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile,
            safetensors.SafetensorError) as error:
        raise InputError(f'{source}: damaged, or no file of features ({first_line(error)})') from None
    if 'features' not in arrays:
        raise InputError(f'{source}: has no features; it has: {abridge(list(arrays)) or "nothing"}')
    if 'labels' not in arrays:
        raise InputError(f'{source}: has no labels, which tools.extract_features writes of one folder of class folders')
    features, labels = arrays['features'].float(), arrays['labels'].long()
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise InputError(f'{source}: features {tuple(features.shape)} and labels {tuple(labels.shape)} don\'t belong '
                         f'together')
    if not bool(features.isfinite().all()):
        raise InputError(f'{source}: some features are not finite')
    classes = names.get('classes') or [str(i) for i in range(int(labels.max()) + 1)]
    if int(labels.min()) < 0 or int(labels.max()) >= len(classes):
        raise InputError(f'{source}: labels are from {int(labels.min())} to {int(labels.max())}, of {len(classes)} '
                         f'classes')
    return Features(features, labels, classes, names.get('made_of'))


def read_npz(path: Path) -> tuple:
    with np.load(path, allow_pickle=False) as file:
        return ({name: file[name] for name in ARRAYS if name in file},
                {**({'classes': file['classes'].tolist()} if 'classes' in file else {}),
                 **({'made_of': json.loads(str(file['made_of']))} if 'made_of' in file else {})})


def read_safetensors(path: Path) -> tuple:
    with safetensors.safe_open(path, 'np') as file:
        metadata = file.metadata() or {}
        arrays = {name: file.get_tensor(name) for name in ARRAYS if name in file.keys()}
    return arrays, {name: json.loads(metadata[name]) for name in ('classes', 'made_of') if name in metadata}


def write(path: Path, found: Features):
    with whole_file(path) as unfinished:
        np.savez(unfinished, features=found.features.numpy(), labels=found.labels.numpy(),
                 classes=np.array(found.classes), made_of=json.dumps(found.made_of))


def in_common(train: Features, test: Features, *, where: str) -> Features:
    """The test features with the labels that the training features have for their classes.

    Raises:
        InputError: a class of theirs is none of training, or their widths differ; `where` they are from.
    """
    if train.features.shape[1] != test.features.shape[1]:
        raise InputError(f'{where}: has features of {test.features.shape[1]} numbers, and those for training have '
                         f'{train.features.shape[1]}')
    return with_numbers_of(train.classes, test, where=where)


def with_numbers_of(classes: List[str], test: Features, *, where: str) -> Features:
    """Features whose labels are places in `classes`.

    Raises:
        InputError: a class of theirs is none of those; `where` they are from.
    """
    if list(test.classes) == list(classes):
        return test
    numbers = {name: i for i, name in enumerate(classes)}
    if len(numbers) < len(classes) or len(set(test.classes)) < len(test.classes):
        raise InputError(f'{where}: its classes are not those of the training images, and some have the same name')
    refuse_lacking([name for i, name in enumerate(test.classes) if name not in numbers and bool(
        (test.labels == i).any())], where=where)
    renumbered = torch.tensor([numbers.get(name, -1) for name in test.classes])
    return dataclasses.replace(test, labels=renumbered[test.labels], classes=list(classes))


# ---------------------------------------------------------------------------------------------------------------------
# In training

class Batches:
    """Batches of features and labels for this process, in another order in each epoch: a loader of loaders.batches.

    Args:
        batch_size: of each process.
        seed: of the order.
    """
    counts_batches = True

    def __init__(self, found: Features, batch_size: int, *, seed: int):
        self.found, self.batch_size, self.first = found, batch_size, 0
        self.sampler = DistributedSampler(found, processes.get_world_size(), processes.get_rank(), seed=seed)

    def set_position(self, epoch: int, step: int):
        self.sampler.set_epoch(epoch)
        self.first = step * self.batch_size

    def __len__(self) -> int:
        return -(-max(0, len(self.sampler) - self.first) // self.batch_size)

    def __iter__(self) -> Iterator[List[torch.Tensor]]:
        for rows in torch.tensor(list(self.sampler)[self.first:]).split(self.batch_size):
            yield [self.found.features[rows], self.found.labels[rows]]
