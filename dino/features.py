"""Features of labelled images: extracted by a frozen model, stored in files, and read from files."""
import dataclasses
import json
from pathlib import Path
from typing import Callable, Iterable, Iterator, List, Optional, Tuple
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import DistributedSampler

import datasets
from engine import EvaluationBatches
from loaders import pictures, readers
from loaders.batches import build_eval_loader
from loaders.samples import Part, PictureSet, inspect
from loaders.source import Source
from loaders.transforms import View
from run import processes
from run.settings import Loading
from utils import InputError, abridge, counted, first_line, utf8_name, whole_file

SUFFIXES = ('.npz', '.safetensors')
ARRAYS = ('features', 'labels')  # in a file


@dataclasses.dataclass
class Features:
    """Features of the images of a data set, in the order of the data set.

    Args:
        features: (n, C), float32.
        labels: (n,), int64.
        classes: names of the classes 0, 1, ...
        made_of: weights and images behind the features, in plain values; None: unknown.
    """
    features: torch.Tensor
    labels: torch.Tensor
    classes: List[str]
    made_of: Optional[dict] = None

    def __len__(self) -> int:
        return len(self.labels)


# ---------------------------------------------------------------------------------------------------------------------
# Extracted by a model

@dataclasses.dataclass(frozen=True)
class Images:
    """Labelled images of a data set, and the view of them that a model needs."""
    source: Source
    view: View


def build_dataset(images: Images, *, is_train: bool, most: Optional[int] = None) -> PictureSet:
    """Build a split with the evaluation transform; `most`: maximum number of images, evenly spread (None: all)."""
    source = images.source
    if is_train and readers.prefix_of(source.name):  # for training, the order would vary
        source, is_train = dataclasses.replace(source, val_split=source.train_split), False
    dataset, _ = datasets.load_classes(source, is_train)
    view = datasets.decide_resize(source, dataset, images.view)
    inspect(None, dataset, same_size=not view.resizes)
    if most is not None and not readers.is_stream(source.name) and most < len(dataset):
        dataset = Part(dataset, pictures.evenly_spread(range(len(dataset)), most))
    return dataset.with_transform(view.transform())


def build_datasets(images: Images, *, most: Optional[int] = None) -> List[PictureSet]:
    """Build both splits, training first, see `build_dataset`."""
    train, test = (build_dataset(images, is_train=is_train, most=most) for is_train in (True, False))
    refuse_missing(test.classes, train.classes, where=f'{images.source.flag}: val')
    return [train, test]


def refuse_missing(names: Iterable[str], known: Iterable[str], *, where: str):
    """Raise InputError, which begins with `where`, if the training images (classes `known`) lack some classes."""
    known = set(known)
    if missing := [name for name in names if name not in known]:
        raise InputError(f'{where}: has {counted(len(missing), "class")} that the training images lack: '
                         f'{abridge(missing)}')


@torch.inference_mode()
def extract(function: Callable[[torch.Tensor], torch.Tensor], dataset: PictureSet, loading: Loading, *,
            amp_dtype: Optional[torch.dtype], header: str, after_batch: Optional[Callable[[], None]] = None
            ) -> Features:
    """Compute the features of all images of `build_dataset`, and gather the features on every process.

    Args:
        function: function from images (B, 3, img_h, img_w) to features (B, C).
        amp_dtype, header, after_batch: see engine.EvaluationBatches.
    """
    loader = build_eval_loader(dataset, loading)
    rows, labels = [torch.zeros(0, 0)], [torch.zeros(0, 1, dtype=torch.int64)]  # for a process without batches
    batches = EvaluationBatches(loader, loading.device, header=header, amp_dtype=amp_dtype, after_batch=after_batch)
    for images, targets in batches:
        rows.append(function(images).float().cpu())
        labels.append(targets.cpu()[:, None])
    gathered = [processes.gather_rows(torch.cat(parts[1:] or parts), in_turn=loader.counts_batches)
                for parts in (rows, labels)]
    batches.images(len(gathered[0]))
    return Features(gathered[0], gathered[1][:, 0], dataset.class_names())


# ---------------------------------------------------------------------------------------------------------------------
# In files

def read(path: str, flag: str) -> Features:
    """Read features from a file of tools.extract_features or --features-dir; `flag` gave the path, for errors."""
    source = f'{flag} {path}'
    if Path(path).suffix not in SUFFIXES:
        raise InputError(f'{source}: must end in {" or ".join(SUFFIXES)}, as files of tools.extract_features do')
    try:
        arrays, names = (read_npz if Path(path).suffix == '.npz' else read_safetensors)(path)
        if 'labels' in arrays:
            arrays['labels'], names['classes'] = numbered(arrays['labels'], names.get('classes'), source)
        arrays = {name: torch.from_numpy(array) for name, array in arrays.items()}
    except FileNotFoundError:
        raise InputError(f'{source}: no such file') from None
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError, EOFError, BadZipFile, SafetensorError) as error:
        problem = ('contains Python objects; words are read if they are text: labels=numpy.array(labels, dtype=str)'
                   if 'allow_pickle' in str(error) else f'damaged, or not a file of features ({first_line(error)})')
        raise InputError(f'{source}: {problem}') from None
    if 'features' not in arrays:
        raise InputError(f'{source}: has no features; its arrays: {abridge(list(arrays)) or "nothing"}')
    if 'labels' not in arrays:
        raise InputError(f'{source}: has no labels; tools.extract_features writes them for one folder of class folders')
    rows, labels = arrays['features'].float(), arrays['labels'].long()
    if rows.ndim != 2 or labels.shape != rows.shape[:1] or not len(labels):
        raise InputError(f'{source}: features {tuple(rows.shape)} and labels {tuple(labels.shape)} do not match')
    if not torch.equal(labels.to(arrays['labels'].dtype), arrays['labels']):
        raise InputError(f'{source}: some labels are not whole numbers')
    if not bool(rows.isfinite().all()):
        raise InputError(f'{source}: some features are not finite')
    classes = names.get('classes') or [str(i) for i in range(int(labels.max()) + 1)]
    if int(labels.min()) < 0 or int(labels.max()) >= len(classes):
        raise InputError(f'{source}: labels are from {int(labels.min())} to {int(labels.max())}, but there are '
                         f'{counted(len(classes), "class")}')
    return Features(rows, labels, classes, names.get('made_of'))


def read_npz(path: str) -> Tuple[dict, dict]:
    """Return features and labels, and classes and `made_of`, as far as the file contains them."""
    with np.load(path, allow_pickle=False) as file:
        names = {name: decoded(file[name]).tolist() for name in ('classes', 'made_of') if name in file}
        if 'made_of' in names:
            names['made_of'] = json.loads(names['made_of'])
        if 'classes' in names:
            names['classes'] = [str(name) for name in names['classes']]
        return {name: file[name] for name in ARRAYS if name in file}, names


def decoded(array: np.ndarray) -> np.ndarray:
    return np.char.decode(array, 'utf-8', 'replace') if array.dtype.kind == 'S' else array


def numbered(labels: np.ndarray, classes: Optional[List[str]], source: str) -> Tuple[np.ndarray, Optional[List[str]]]:
    """Return labels as class indices, and the class names; the classes of words without `classes` are in sorted order.

    Raises:
        InputError: a word is not among `classes`; the message begins with `source`.
    """
    words = decoded(labels)
    if words.dtype.kind != 'U':
        return labels, classes
    classes = classes or np.unique(words).tolist()
    if missing := sorted(set(words.ravel().tolist()) - set(classes)):
        raise InputError(f'{source}: labels that are not among its classes: {abridge(missing)}')
    indices = {name: i for i, name in enumerate(classes)}
    return np.array([indices[word] for word in words.ravel().tolist()], np.int64).reshape(words.shape), classes


def read_safetensors(path: str) -> Tuple[dict, dict]:
    with utf8_name(path) as name, safe_open(name, 'np') as file:
        metadata = file.metadata() or {}
        arrays = {name: file.get_tensor(name) for name in ARRAYS if name in file.keys()}
    return arrays, {name: json.loads(metadata[name]) for name in ('classes', 'made_of') if name in metadata}


def write(path: Path, features: Features):
    with whole_file(path) as unfinished:
        np.savez(unfinished, features=features.features.numpy(), labels=features.labels.numpy(),
                 classes=np.array(features.classes), made_of=json.dumps(features.made_of))


def in_common(train: Features, test: Features, *, where: str, where_train: str = 'the training set') -> Features:
    """Return the test features with labels that are indices of the training features' classes.

    Raises:
        InputError: the training features lack a class or have another width, and the message begins with `where`; or
            they have one class only, and the message begins with `where_train`.
    """
    datasets.refuse_one_class([train.classes[i] for i in train.labels.unique().tolist()], where=where_train)
    width, train_width = test.features.shape[1], train.features.shape[1]
    if width != train_width:
        raise InputError(f'{where}: features have the width {width}, but features for training have {train_width}')
    return with_labels_of(train.classes, test, where=where)


def with_labels_of(classes: List[str], test: Features, *, where: str) -> Features:
    """Return features with labels that are indices of the training images' classes; see `in_common`."""
    if list(test.classes) == list(classes):
        return test
    indices = {name: i for i, name in enumerate(classes)}
    if len(indices) < len(classes) or len(set(test.classes)) < len(test.classes):
        raise InputError(f'{where}: classes differ from the classes of the training images, and some have equal names')
    refuse_missing([test.classes[i] for i in test.labels.unique().tolist()], classes, where=where)
    relabelled = torch.tensor([indices.get(name, -1) for name in test.classes])
    return dataclasses.replace(test, labels=relabelled[test.labels], classes=list(classes))


# ---------------------------------------------------------------------------------------------------------------------
# For training

class Batches:
    """Loader, as of loaders.batches, of this process's features and labels, in a new order in each epoch."""
    counts_batches = True

    def __init__(self, features: Features, batch_size: int, *, seed: int):
        self.features, self.batch_size, self.first = features, batch_size, 0
        self.sampler = DistributedSampler(features, processes.get_world_size(), processes.get_rank(), seed=seed)

    def set_position(self, epoch: int, step: int):
        self.sampler.set_epoch(epoch)
        self.first = step * self.batch_size

    def __len__(self) -> int:
        return -(-max(0, len(self.sampler) - self.first) // self.batch_size)

    def __iter__(self) -> Iterator[List[torch.Tensor]]:
        for rows in torch.tensor(list(self.sampler)[self.first:]).split(self.batch_size):
            yield [self.features.features[rows], self.features.labels[rows]]
