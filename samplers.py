"""In which order a process sees the training images, and which images it evaluates."""
import itertools
from typing import Iterator, Sized, Tuple

from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DistributedSampler, Sampler

from utils import derive_seed

REPEATS = 3  # copies of each image under repeated augmentation
GROUP = 256  # an epoch of repeated augmentation is a whole number of groups of so many images


class TrainingSampler(Sampler):
    """Yields, for this process and epoch, pairs (index of the image, seed of its augmentation).

    Both are functions of (seed, epoch, position) alone. Call `set_epoch` before each epoch, with the number of samples
    to leave out where an earlier run had them.

    Args:
        dataset: only its length matters.
        repeated_aug: each image three times, spread over the processes, and a third of the images an epoch.
        seed: of the order and of the augmentation; with 0 the order is the original's.
        num_replicas: number of processes.
        rank: this process.

    Source: original main.py, and samplers.py, RASampler (Hoffer et al. 2020, Berman et al. 2019).
    """

    def __init__(self, dataset: Sized, *, repeated_aug: bool, seed: int, num_replicas: int, rank: int):
        if repeated_aug:
            # faithful: an epoch has floor(len // 256 * 256 / processes) samples (original samplers.py, RASampler)
            # differs: repeated augmentation - fewer than 256 images are a partial group; the original's epoch is empty
            self.order = RepeatAugSampler(
                dataset, num_replicas, rank, shuffle=True, num_repeats=REPEATS,
                selected_round=GROUP if len(dataset) >= GROUP else 0)
        else:
            self.order = DistributedSampler(dataset, num_replicas, rank, shuffle=True)
        self.seed, self.num_replicas, self.rank = seed, num_replicas, rank
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first: int = 0):
        self.epoch, self.first = epoch, first
        self.order.set_epoch(self.seed + epoch)

    def __len__(self) -> int:
        return max(0, len(self.order) - self.first)

    def __iter__(self) -> Iterator[Tuple[int, int]]:
        for i, index in itertools.islice(enumerate(self.order), self.first, None):
            position = i * self.num_replicas + self.rank
            yield index, derive_seed(self.seed, self.epoch, position)


def evaluation_indices(dataset: Sized, *, num_replicas: int, rank: int) -> range:
    """This process's share of the images, each in exactly one share."""
    # differs: evaluation by several processes - the original repeats images to make shares equal, and counts them twice
    return range(rank, len(dataset), num_replicas)
