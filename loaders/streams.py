"""Streams: data sets that yield one sample after another, and loaders of their batches."""
import itertools
import numbers
from typing import Iterator, List, Optional

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from loaders import pictures
from loaders.samples import PictureSet
from run.output import log
from run.processes import get_rank, get_world_size
from utils import InputError, counted, derive_seed, seed_everything


class Stream(PictureSet, IterableDataset):
    """A reader of timm that yields one sample after another, in its own order.

    Args:
        name: name of the data set, as in --data-set.
        is_train: timm divides the samples between processes, with some twice; False: each sample exactly once.
        num_files: number of files of the split, if each can be read by one process only.
        labelled: False: every sample has class 0.
    """

    def __init__(self, source: IterableDataset, name: str, classes: List[str], *, seed: int, is_train: bool,
                 num_files: Optional[int], upright: bool, labelled: bool):
        self.source, self.name, self.classes, self.seed, self.is_train = source, name, classes, seed, is_train
        self.num_files, self.upright, self.labelled = num_files, upright, labelled
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # shared with running workers
        if not is_train:  # every process reads all samples and keeps its share: timm's own division repeats samples
            source.reader.dist_rank, source.reader.dist_num_replicas = 0, 1

    def __len__(self) -> int:
        """Return the number of samples of all processes, according to the data set's description."""
        return self.source.reader.num_samples

    def __iter__(self) -> Iterator[tuple]:
        worker = get_worker_info()
        rank, world = get_rank(), get_world_size()
        pictures.prepare_pillow()
        for position, (image, target) in enumerate(self.source):
            if not self.is_train and position % world != rank:
                continue
            if self.is_train:
                seed_everything(self.seed, int(self.epoch), rank, worker.id if worker else 0, position)
            image = pictures.finish(image, f'sample {position} of the stream', upright=self.upright)
            yield self.transformed(image), check_label(target, len(self.classes)) if self.labelled else 0


class StreamLoader:
    """Batches of a stream, equally many on every process in training; see loaders.batches for the methods."""
    counts_batches = False  # in evaluation, the processes may have different numbers
    shares_images = True

    def __init__(self, loader: DataLoader, world_size: int):
        self.loader, self.first = loader, 0
        steps, rest = divmod(len(loader.dataset), loader.batch_size * world_size)
        self.steps = steps if loader.dataset.is_train else steps + (rest > 0)

    def set_position(self, epoch: int, step: int):
        self.first = step
        dataset, reader = self.loader.dataset, self.loader.dataset.source.reader
        dataset.epoch.fill_(epoch)
        dataset.source.set_epoch(epoch)
        # Without a seed timm's shuffling would repeat, or depend on earlier epochs.
        seed = derive_seed(dataset.seed, epoch, get_rank()) % 2 ** 62
        self.loader.generator.manual_seed(seed)
        reader.worker_seed, reader.ds = seed, None  # without workers
        if 0 < step < self.steps:
            log('A stream has no random access: the rest of this epoch has about the same images')

    def __len__(self) -> int:
        return self.steps - self.first

    def images_evaluated(self, count: int) -> int:
        """Return `count`; raise InputError if timm's readers left out unreadable images."""
        if count != len(self.loader.dataset):
            raise InputError(f'only {count} of the {counted(len(self.loader.dataset), "image")} of the data set could '
                             f'be evaluated')
        return count

    def first_images(self, count: int) -> None:
        """Return None: a stream can't go back to its beginning."""

    def first_indices(self, count: int) -> list:
        return []

    def __iter__(self) -> Iterator:
        return itertools.islice(self.passes(), len(self)) if self.loader.dataset.is_train else iter(self.loader)

    def passes(self) -> Iterator:
        """Yield the batches of one pass after another; raise InputError for a pass without batches."""
        while True:
            batch = None
            for batch in self.loader:
                yield batch
            if batch is None:
                raise InputError('--data-set: the stream yields no batch of readable samples')


def check_label(label, num_classes: int) -> int:
    """Return a class index; raise InputError if it is invalid."""
    if not isinstance(label, numbers.Integral) or not 0 <= label < num_classes:
        raise InputError(f'an image has the label {label!r}: must be a number from 0 to {num_classes - 1}')
    return int(label)
