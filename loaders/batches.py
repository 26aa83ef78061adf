"""Loaders of batches: of a training, in any position of it; and of an evaluation, each image once.

What all of them have (of a training in rounds, `Rounds` has the first two):
    len(loader)                 batches that are left of the epoch; of an evaluation by a stream, about
    set_position(epoch, step)   the next iteration gives what follows `step` batches of this epoch
    counts_batches              whether every process knows how many batches each other has
    shares_images               of an evaluation: whether the processes share the images, or each has all of them
    images_evaluated(count)     how many different images `count` results of all processes are of; raises InputError
                                where some are lost
    first_images(count)         images (count, 3, img_h, img_w) of the position, to be looked at; None where that is not
                                possible
"""
import functools
import itertools
from typing import Callable, Iterator, Optional, Union

import torch
from torch.utils.data import DataLoader, Dataset

import datasets
import samplers
from loaders import readers, streams
from loaders.workers import Loader
from run.position import Iterations
from run.processes import get_rank, get_world_size, notice
from utils import InputError


class Batches:
    """Batches of samples that have numbers.

    Args:
        loader: in training, with a sampler that has `set_epoch(epoch, first)` as `samplers.TrainingSampler` does.
        shares_images: in evaluation, whether the processes share the images, or each has all of them.
    """
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
        keys = itertools.islice(self.loader.sampler, min(count, self.loader.batch_size))
        return torch.stack([self.loader.dataset[key][0] for key in keys])


class Rounds:
    """Batches of a training that is counted in iterations: as many as there are from one evaluation to the next.

    It goes through the data again and again, whose epochs need not end where a round does.

    Args:
        loader: of an epoch.
        position: what the training is counted by.
    """

    def __init__(self, loader: Union[Batches, streams.StreamLoader], position: Iterations):
        self.loader = loader
        self.per_round = position.every * position.accum_iter
        self.total = position.iterations * position.accum_iter
        loader.set_position(0, 0)
        self.per_epoch = len(loader)
        self.batches, self.at = None, 0  # an iterator that goes on from one round to the next, and where it is
        self.set_position(0, 0)

    def __len__(self) -> int:
        return max(0, min(self.total, (self.number + 1) * self.per_round) - self.first)

    def set_position(self, number: int, step: int):
        self.number, self.first = number, number * self.per_round + step

    def __iter__(self) -> Iterator:
        left = len(self)
        if self.batches is None or self.at != self.first:
            self.batches, self.at = self.from_first_on(), self.first
        for batch in itertools.islice(self.batches, left):
            self.at += 1
            yield batch

    def from_first_on(self) -> Iterator:
        epoch, step = divmod(self.first, self.per_epoch)
        while True:
            self.loader.set_position(epoch, step)
            yield from self.loader
            epoch, step = epoch + 1, 0


# ---------------------------------------------------------------------------------------------------------------------
# Builders

def build_loader(dataset: Dataset, args, device: torch.device, *, workers: Optional[int] = None,
                 persistent: bool = True, **kwargs) -> DataLoader:
    """torch's loader with the flags of run.flags.add_loader_flags; `kwargs` are its own."""
    workers = args.num_workers if workers is None else workers
    # Where `import datasets` means Hugging Face's package, a fresh process would not find datasets.py.
    context = 'fork' if workers and readers.means_hugging_face_datasets() else None
    return Loader(dataset, num_workers=workers, persistent_workers=persistent and workers > 0,
                  multiprocessing_context=context, pin_memory=args.pin_mem and device.type == 'cuda', **kwargs)


def build_sampler(dataset: Dataset, args) -> samplers.TrainingSampler:
    return samplers.TrainingSampler(dataset, repeated_aug=getattr(args, 'repeated_aug', False), seed=args.seed,
                                    num_replicas=get_world_size(), rank=get_rank())


def images_of_epoch(dataset: Dataset, args) -> int:
    """Images that each process gets in an epoch of training, before some of them fill no batch."""
    return len(dataset) // get_world_size() if isinstance(dataset, streams.Stream) else len(
        build_sampler(dataset, args))


def build_train_loader(dataset: Dataset, args, device: torch.device, *, collate_fn: Callable = datasets.collate,
                       drop_last: bool = True) -> Union[Batches, streams.StreamLoader]:
    """Batches of `--batch-size` for this process.

    Args:
        drop_last: leave out the last images of an epoch if they fill no batch; of a stream they always are.

    Raises:
        InputError: an epoch has less than a batch, or less than a step of the optimizer.
    """
    repeated_aug, images = getattr(args, 'repeated_aug', False), images_of_epoch(dataset, args)
    if isinstance(dataset, streams.Stream):
        if repeated_aug:
            notice(f'--data-set {args.data_set} is a stream: no repeated augmentation')
        loader = streams.build_loader(dataset, args, batch_size=args.batch_size, build=functools.partial(
            build_loader, args=args, device=device, collate_fn=collate_fn))
    else:
        sampler = build_sampler(dataset, args)
        if repeated_aug and len(dataset) < samplers.GROUP:
            notice(f'Repeated augmentation: {len(dataset)} images are less than a group of {samplers.GROUP}; '
                   f'an epoch has {images} samples')
        loader = Batches(build_loader(
            datasets.SeededSamples(dataset, most_bad=args.skip_bad_images), args, device, sampler=sampler,
            batch_size=args.batch_size, drop_last=drop_last, collate_fn=collate_fn))
    if not len(loader):
        raise InputError(f'--batch-size {args.batch_size}: an epoch has {images} images for each process, less than '
                         f'one batch')
    if args.accum_iter > len(loader):
        raise InputError(f'--accum-iter {args.accum_iter}: an epoch has {len(loader)} batches')
    return loader


def build_eval_loader(dataset: Dataset, args, device: torch.device, *, collate_fn: Callable = datasets.collate
                      ) -> Union[Batches, streams.StreamLoader]:
    """Batches of 1.5 times `--batch-size`, each image for one process (--no-dist-eval: for each process)."""
    batch_size = int(1.5 * args.batch_size)
    if isinstance(dataset, streams.Stream):
        return streams.build_loader(dataset, args, batch_size=batch_size, build=functools.partial(
            build_loader, args=args, device=device, collate_fn=collate_fn))
    replicas, rank = (get_world_size(), get_rank()) if args.dist_eval else (1, 0)
    share = samplers.evaluation_indices(dataset, num_replicas=replicas, rank=rank)
    return Batches(build_loader(datasets.EvaluationSamples(dataset), args, device, sampler=share, batch_size=batch_size,
                                collate_fn=collate_fn), shares_images=args.dist_eval)
