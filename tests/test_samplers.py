"""The order of training samples and the shares of evaluation."""
import zlib

import numpy as np
import pytest
from torch.utils.data import DistributedSampler

from samplers import TrainingSampler, evaluation_indices


def sampler(length: int, *, repeated_aug: bool = True, seed: int = 0, world: int = 1, rank: int = 0, epoch: int = 0):
    result = TrainingSampler(range(length), repeated_aug=repeated_aug, seed=seed, num_replicas=world, rank=rank)
    result.set_epoch(epoch)
    return result


def indices(*args, **kwargs) -> list:
    return [index for index, _ in sampler(*args, **kwargs)]


@pytest.mark.parametrize('case', range(5))
def test_repeated_augmentation_equals_the_originals(case, reference):
    """Length, first indices and checksum of all indices, for 1, 3, 4 and 8 processes."""
    expected = reference['ra_sampler'][case]
    own = indices(expected['dataset_len'], world=expected['num_replicas'], rank=expected['rank'],
                  epoch=expected['epoch'])
    assert len(own) == expected['length']
    assert own[:12] == expected['first']
    assert zlib.crc32(np.asarray(own, np.int64).tobytes()) == expected['crc32']


def test_order_without_repetition_is_torchs():
    """The order is that of DistributedSampler with seed 0, reshuffled every epoch, as in the original."""
    theirs = DistributedSampler(range(10), num_replicas=2, rank=1, shuffle=True, seed=0)
    theirs.set_epoch(3)
    assert indices(10, repeated_aug=False, world=2, rank=1, epoch=3) == list(theirs)


@pytest.mark.parametrize('length', [1, 7, 255])
def test_fewer_images_than_a_group_make_an_epoch(length):
    """An epoch has as many samples as images, while the original's is empty."""
    assert len(indices(length)) == len(sampler(length)) == length


def test_epochs_differ():
    """Each epoch has another third of the data, also for one process."""
    assert indices(300, epoch=0) != indices(300, epoch=1)


def test_every_sample_has_its_own_seed():
    """The copies of an image, and the same position on another process or in another epoch, differ."""
    seeds = [seed for world_rank in range(2) for epoch in range(2)
             for _, seed in sampler(300, world=2, rank=world_rank, epoch=epoch)]
    assert len(set(seeds)) == len(seeds) == 512


def test_samples_depend_on_the_seed():
    """--seed changes order and augmentation."""
    own, other = (dict(sampler(300, repeated_aug=False, seed=seed)) for seed in (0, 1))
    assert list(own) != list(other)
    assert own != other


def test_samples_do_not_depend_on_history():
    """A sampler that ran other epochs before gives the same pairs as a fresh one."""
    used = sampler(300, epoch=0)
    list(used)
    used.set_epoch(2)
    assert list(used) == list(sampler(300, epoch=2))


@pytest.mark.parametrize('world', [1, 2, 3, 5])
def test_evaluation_shares_hold_each_image_once(world):
    """Together the processes' shares are the data set, without repetition, also with fewer images than processes."""
    for length in range(1, 10):
        shares = [evaluation_indices(range(length), num_replicas=world, rank=rank) for rank in range(world)]
        assert sorted(i for share in shares for i in share) == list(range(length))
