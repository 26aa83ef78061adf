"""Data sets that give one sample after another, and loaders of them."""
import itertools
import numbers
from typing import Callable, Iterator, List, Optional

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from loaders import pictures
from run.processes import get_rank, get_world_size, notice, usable_workers
from utils import InputError, derive_seed, seed_everything


class Stream(IterableDataset):
    """A reader of timm that gives one sample after another, in an order of its own.

    Args:
        source: timm's data set.
        seed: with the epoch, the process and the position it decides the augmentation.
        is_train: each process gets other samples by timm's rules, some of them twice; else all of them exactly once.
        files: of the split, if each can be read by one process only.
        upright: turn pictures as their EXIF orientation says.
        labelled: whether the classes matter.
    """

    def __init__(self, source: IterableDataset, *, seed: int, is_train: bool, files: Optional[int], upright: bool,
                 labelled: bool = True):
        self.upright, self.labelled = upright, labelled
        self.source, self.seed, self.is_train, self.files = source, seed, is_train, files
        self.transform = None
        self.classes = names_of(source)
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # known to loading processes that are running
        if not is_train:  # every process reads all of it, and keeps its share: timm's own division repeats samples
            source.reader.dist_rank, source.reader.dist_num_replicas = 0, 1

    def __len__(self) -> int:
        """Samples of all processes together, as the data set's description says."""
        return self.source.reader.num_samples

    def __iter__(self) -> Iterator[tuple]:
        worker = get_worker_info()
        rank, world = get_rank(), get_world_size()
        for position, (image, target) in enumerate(self.source):
            if not self.is_train and position % world != rank:
                continue
            if self.is_train:
                seed_everything(self.seed, int(self.epoch), rank, worker.id if worker else 0, position)
            image = pictures.finish(image, f'sample {position} of the stream', upright=self.upright)
            yield self.transform(image), check_label(target, len(self.classes)) if self.labelled else 0


class StreamLoader:
    """Batches of a stream; in training, equally many on every process. Its methods are those of loaders.batches.

    Args:
        loader: of a `Stream`; in training its processes start anew each epoch, so that their seeds are the epoch's.
        steps: batches of an epoch in training; in evaluation, about as many as there will be.
    """

    counts_batches = False  # in evaluation, the processes may have different numbers
    shares_images = True

    def __init__(self, loader: DataLoader, steps: int):
        self.loader, self.steps, self.first = loader, steps, 0

    def set_position(self, epoch: int, step: int):
        self.first = step
        dataset, reader = self.loader.dataset, self.loader.dataset.source.reader
        dataset.epoch.fill_(epoch)
        dataset.source.set_epoch(epoch)
        seed = derive_seed(dataset.seed, epoch, get_rank()) % 2 ** 62
        self.loader.generator.manual_seed(seed)  # of timm's shuffling, which else ran on, or were the same each epoch
        reader.worker_seed, reader.ds = seed, None  # without loading processes
        if 0 < step < self.steps:
            notice('A stream can\'t be entered in its middle: the rest of this epoch has about the same images')

    def __len__(self) -> int:
        return self.steps - self.first

    def images_evaluated(self, count: int) -> int:
        """timm's readers leave unreadable images out: an evaluation may not lose any."""
        if count != len(self.loader.dataset):
            raise InputError(f'{count} images of {len(self.loader.dataset)} that the data set should have could be '
                             f'evaluated')
        return count

    def first_images(self, count: int) -> None:
        """None: the stream could not go back to its beginning."""

    def __iter__(self) -> Iterator:
        if not self.loader.dataset.is_train:
            return iter(self.loader)
        return itertools.islice(self.passes(), len(self))

    def passes(self) -> Iterator:
        """Batches of one pass after another; raises InputError where a pass has none."""
        while True:
            batches = 0
            for batch in self.loader:
                batches += 1
                yield batch
            if not batches:
                raise InputError('--data-set: no batch of readable samples comes from the stream')


def build_loader(dataset: Stream, args, *, batch_size: int, build: Callable[..., DataLoader]) -> StreamLoader:
    """A loader of a stream.

    Args:
        build: makes a DataLoader of a data set; takes the number of loading processes and DataLoader's options.

    Raises:
        InputError: there is less than a file for each process.
    """
    world, workers = get_world_size(), usable_workers(args.num_workers)
    if dataset.files is not None:
        if dataset.is_train and dataset.files < world:
            raise InputError(f'--data-set {args.data_set}: its {dataset.files} files can\'t be shared by {world} '
                             f'processes')
        workers = min(workers, dataset.files // world if dataset.is_train else dataset.files)
    steps = len(dataset) // (batch_size * world)
    dataset.source.set_loader_cfg(num_workers=workers)
    loader = build(dataset, workers=workers, persistent=not dataset.is_train, batch_size=batch_size,
                   drop_last=dataset.is_train, generator=torch.Generator())
    return StreamLoader(loader, steps if dataset.is_train else -(-len(dataset) // (batch_size * world)))


def check_label(label, num_classes: int) -> int:
    """A class index, or InputError."""
    if not isinstance(label, numbers.Integral) or not 0 <= label < num_classes:
        raise InputError(f'an image has the label {label!r}: must be a number from 0 to {num_classes - 1}')
    return int(label)


def names_of(source) -> List[str]:
    """The classes' names in the order of their indices, if the data set knows them."""
    names = getattr(source, 'classes', None) or getattr(source, 'all_categories', None)  # torchvision's; iNaturalist's
    if names:  # ImageNet's are tuples of synonyms
        return [name if isinstance(name, str) else ', '.join(name) for name in names]
    index = getattr(getattr(source, 'reader', None), 'class_to_idx', None) or {}
    return [str(name) for name in sorted(index, key=index.get)]
