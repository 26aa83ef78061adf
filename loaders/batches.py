"""Loaders of batches: for training, from any position of a run; and for evaluation, each image once.

All loaders have these methods (`Rounds` has the first two):
    len(loader)                 remaining batches of the epoch; an estimate for the evaluation of a stream
    set_position(epoch, step)   makes the next iteration start after `step` batches of this epoch
    counts_batches              True if every process can predict the number of batches of the others
    shares_images               for evaluation: True if the processes share the images, False if each has all of them
    images_evaluated(count)     number of different images behind `count` results of all processes; raises InputError
                                if images were lost
    first_images(count)         images (count, 3, img_h, img_w) of the position, for a preview; None if not possible
    first_indices(count)        indices of these images in the data set; empty if not possible
"""
import dataclasses
import itertools
from typing import Callable, Iterator, List, Optional, Union

import torch
from torch.utils.data import DataLoader, Dataset

import samplers
from loaders import readers, streams
from loaders.samples import EvaluationSamples, SeededSamples, collate
from loaders.workers import Loader
from run.cpu import usable_workers
from run.output import log
from run.position import Iterations
from run.processes import get_rank, get_world_size
from run.settings import Loading
from utils import InputError, counted


class Batches:
    """Batches of samples that have indices; in training, `loader` has a `samplers.TrainingSampler`."""
    counts_batches = True

    def __init__(self, loader: DataLoader, *, shares_images: bool = True):
        self.loader, self.shares_images = loader, shares_images

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        return iter(self.loader)

    def set_position(self, epoch: int, step: int):
        self.loader.sampler.set_epoch(epoch, first=step * self.loader.batch_size)

    def images_evaluated(self, count: int) -> int:
        return count if self.shares_images else count // get_world_size()

    def first_images(self, count: int) -> Optional[torch.Tensor]:
        return torch.stack([self.loader.dataset[key][0] for key in self.first_keys(count)])

    def first_indices(self, count: int) -> List[int]:
        return [index for index, _ in self.first_keys(count)]

    def first_keys(self, count: int) -> Iterator:
        """Yield keys of `loaders.samples.SeededSamples`."""
        return itertools.islice(self.loader.sampler, min(count, self.loader.batch_size))


class Rounds:
    """Rounds of a run that is counted in iterations: the batches between two evaluations."""

    def __init__(self, loader: Union[Batches, streams.StreamLoader], position: Iterations):
        self.loader = loader
        self.per_round = position.every * position.accum_iter
        self.total = position.iterations * position.accum_iter
        loader.set_position(0, 0)
        self.per_epoch = len(loader)
        self.batches, self.next = None, 0  # an iterator that continues from round to round, and its next batch
        self.set_position(0, 0)

    def __len__(self) -> int:
        return max(0, min(self.total, (self.number + 1) * self.per_round) - self.first)

    def set_position(self, number: int, step: int):
        self.number, self.first = number, number * self.per_round + step

    def __iter__(self) -> Iterator:
        if self.batches is None or self.next != self.first:
            self.batches, self.next = self.batches_from(self.first), self.first
        for batch in itertools.islice(self.batches, len(self)):
            self.next += 1
            yield batch

    def batches_from(self, first: int) -> Iterator:
        epoch, step = divmod(first, self.per_epoch)
        while True:
            self.loader.set_position(epoch, step)
            yield from self.loader
            epoch, step = epoch + 1, 0  # an epoch may end within a round


def build_loader(dataset: Dataset, loading: Loading, *, persistent: bool = True, **kwargs) -> DataLoader:
    """Build torch's loader; `kwargs` are its own options."""
    workers = loading.num_workers
    # If `import datasets` means Hugging Face's package, a new process would not find datasets.py.
    context = 'fork' if workers and readers.means_hugging_face_datasets() else None
    return Loader(dataset, num_workers=workers, persistent_workers=persistent and workers > 0,
                  multiprocessing_context=context, pin_memory=loading.pin_memory and loading.device.type == 'cuda',
                  **kwargs)


def build_stream_loader(dataset: streams.Stream, loading: Loading, **kwargs) -> streams.StreamLoader:
    """Build the loader of a stream; raise InputError if there is less than one file per process."""
    world, workers = get_world_size(), usable_workers(loading.num_workers)
    if dataset.num_files is not None:
        if dataset.is_train and dataset.num_files < world:
            raise InputError(f'--data-set {dataset.name}: its {counted(dataset.num_files, "file")} can\'t be shared '
                             f'by {world} processes')
        workers = min(workers, dataset.num_files // world if dataset.is_train else dataset.num_files)
    dataset.source.set_loader_cfg(num_workers=workers)
    loader = build_loader(dataset, dataclasses.replace(loading, num_workers=workers), persistent=not dataset.is_train,
                          drop_last=dataset.is_train, generator=torch.Generator(), **kwargs)
    return streams.StreamLoader(loader, world)


def build_sampler(dataset: Dataset, *, seed: int, repeated_aug: bool) -> samplers.TrainingSampler:
    return samplers.TrainingSampler(dataset, repeated_aug=repeated_aug, seed=seed, num_replicas=get_world_size(),
                                    rank=get_rank())


def images_of_epoch(dataset: Dataset, *, repeated_aug: bool = False) -> int:
    """Return the number of images per process in an epoch, including a last batch that is not full."""
    if isinstance(dataset, streams.Stream):
        return len(dataset) // get_world_size()
    return len(build_sampler(dataset, seed=0, repeated_aug=repeated_aug))


def build_train_loader(dataset: Dataset, loading: Loading, *, collate_fn: Callable = collate, drop_last: bool = True,
                       repeated_aug: bool = False) -> Union[Batches, streams.StreamLoader]:
    """Build the loader of a training run's batches for this process.

    Args:
        drop_last: leave out the last images of an epoch if they do not fill a batch; a stream always does.
        repeated_aug: three versions of each image, and a third of the images per epoch.

    Raises:
        InputError: an epoch has less than one batch, or less than one optimizer step.
    """
    images = images_of_epoch(dataset, repeated_aug=repeated_aug)
    if isinstance(dataset, streams.Stream):
        if repeated_aug:
            log(f'{dataset.name} is a stream: no repeated augmentation')
        loader = build_stream_loader(dataset, loading, batch_size=loading.batch_size, collate_fn=collate_fn)
    else:
        if repeated_aug and len(dataset) < samplers.GROUP:
            log(f'Repeated augmentation: {counted(len(dataset), "image")} are less than a group of {samplers.GROUP}; '
                f'an epoch has {images} samples')
        loader = Batches(build_loader(
            SeededSamples(dataset, most_bad=loading.skip_bad_images), loading,
            sampler=build_sampler(dataset, seed=loading.seed, repeated_aug=repeated_aug),
            batch_size=loading.batch_size, drop_last=drop_last, collate_fn=collate_fn))
    if not len(loader):
        raise InputError(f'--batch-size {loading.batch_size}: an epoch has {counted(images, "image")} per process, '
                         f'less than one batch')
    if loading.accum_iter > len(loader):
        raise InputError(f'--accum-iter {loading.accum_iter}: an epoch has {counted(len(loader), "batch")}')
    return loader


def build_eval_loader(dataset: Dataset, loading: Loading, *, collate_fn: Callable = collate, shares_images: bool = True
                      ) -> Union[Batches, streams.StreamLoader]:
    """Build a loader of each image once, in batches of 1.5 times the batch size.

    Args:
        shares_images: the processes share the images, as they always do for a stream; False: each has all images.
    """
    options = dict(batch_size=int(1.5 * loading.batch_size), collate_fn=collate_fn)
    if isinstance(dataset, streams.Stream):
        return build_stream_loader(dataset, loading, **options)
    replicas, rank = (get_world_size(), get_rank()) if shares_images else (1, 0)
    indices = samplers.evaluation_indices(dataset, num_replicas=replicas, rank=rank)
    return Batches(build_loader(EvaluationSamples(dataset), loading, sampler=indices, **options),
                   shares_images=shares_images)
