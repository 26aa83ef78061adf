"""Samplers: the order of training images, and the division of evaluation images between processes."""
import itertools
from typing import Iterator, Sized, Tuple

from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DistributedSampler, Sampler

from utils import derive_seed

REPEATS = 3  # copies of each image under repeated augmentation
GROUP = 256  # images; an epoch of repeated augmentation is a whole number of groups


class TrainingSampler(Sampler):
    """Sampler of pairs (index of an image, seed of its augmentation), each a function of (seed, epoch, position).

    Args:
        dataset: data set, of which only the length matters.
        repeated_aug: three versions of each image, distributed over the processes; a third of the images per epoch.
        seed: seed of the order and of the augmentation; 0: the original's order.
        num_replicas: number of processes.

    Source: original main.py, and samplers.py, RASampler (Hoffer et al. 2020, Berman et al. 2019).
    """

    def __init__(self, dataset: Sized, *, repeated_aug: bool, seed: int, num_replicas: int, rank: int):
        if repeated_aug:
            # faithful: an epoch has floor(len // 256 * 256 / processes) samples (original samplers.py, RASampler)
            # differs: repeated augmentation - fewer than 256 images are a partial group; the original's epoch is empty
            self.order = RepeatAugSampler(dataset, num_replicas, rank, shuffle=True, num_repeats=REPEATS,
                                          selected_round=GROUP if len(dataset) >= GROUP else 0)
        else:
            self.order = DistributedSampler(dataset, num_replicas, rank, shuffle=True)
        self.seed, self.num_replicas, self.rank = seed, num_replicas, rank
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first: int = 0):
        """Set the epoch, before each epoch; `first`: number of its samples that an earlier process used."""
        self.epoch, self.first = epoch, first
        self.order.set_epoch(self.seed + epoch)

    def __len__(self) -> int:
        return max(0, len(self.order) - self.first)

    def __iter__(self) -> Iterator[Tuple[int, int]]:
        for i, index in itertools.islice(enumerate(self.order), self.first, None):
            yield index, derive_seed(self.seed, self.epoch, i * self.num_replicas + self.rank)


def evaluation_indices(dataset: Sized, *, num_replicas: int, rank: int) -> range:
    """Return the indices of this process's images; each image is evaluated by exactly one process."""
    # differs: evaluation by several processes - the original repeats images to make shares equal, and counts them twice
    return range(rank, len(dataset), num_replicas)
