"""Loading processes: how what they load reaches the main process, and what happens where one can't go on."""
import contextlib
import os
from typing import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from run import signals
from run.processes import notice, usable_workers
from run.progress import map_leaves
from utils import InputError, RunStopped

SHARED_MEMORY = '/dev/shm'  # where Linux has it; containers often have 64 MB of it
AHEAD = 3  # batches of each process that are under way: torch's two, and the one that is worked on
LEAST = 2 ** 20  # bytes that their locks and small things may take
PLENTY = 2 ** 33  # bytes that are enough for any batches
STREAMED = 4 * 3 * 224 ** 2  # bytes of a sample that can't be looked at beforehand


class Loader(DataLoader):
    """torch's DataLoader, for any size of shared memory.

    Where batches do not fit into it they go through pipes, which takes longer. A loading process that can't go on ends
    the run: else the main process might wait for ever for what was lost.

    Args:
        num_workers: wanted; not more than there are cores.
        collate_fn: makes a batch of samples.
        kwargs: DataLoader's own.

    Raises:
        RunStopped: while it is iterated over, if a loading process was killed, or has no shared memory left.
    """

    def __init__(self, dataset, *, num_workers: int, collate_fn: Callable, batch_size: int, **kwargs):
        workers, left = usable_workers(num_workers), shared_memory_left()
        if workers and left < LEAST:
            notice(f'{SHARED_MEMORY} has {left // 2 ** 10} KB left, too little for loading processes: --num-workers 0')
            workers, kwargs = 0, {**kwargs, 'persistent_workers': False, 'multiprocessing_context': None}
        needed = 0
        if workers and left < PLENTY:
            needed = workers * AHEAD * batch_size * local_processes() * sample_size(dataset, kwargs.get('sampler'))
        self.through_pipes = needed > left
        if self.through_pipes:
            notice(f'Loading needs {needed // 2 ** 20} MB of shared memory, and {SHARED_MEMORY} has {left // 2 ** 20}: '
                   f'batches go through pipes, which is slower (in a container: docker run --shm-size=8g)')
        if workers:
            collate_fn = HandOver(collate_fn, through_pipes=self.through_pipes)
        super().__init__(dataset, num_workers=workers, batch_size=batch_size, collate_fn=collate_fn,
                         worker_init_fn=signals.WorkerSignals(), **kwargs)

    def __iter__(self) -> Iterator:
        try:
            with signals.held():  # until the loading processes leave signals to this one
                batches = super().__iter__()
            for batch in batches:
                yield map_leaves(batch, np.ndarray, torch.from_numpy) if self.through_pipes else batch
        except RuntimeError as error:
            words = str(error)
            if 'shared memory' in words:
                raise RunStopped(f'{SHARED_MEMORY} is full: the loading processes can\'t hand over their batches '
                                 f'(--num-workers 0 does without it)') from None
            if words.startswith('DataLoader worker'):
                raise RunStopped(f'a loading process has died ({words.splitlines()[0]}); if memory is short, try fewer '
                                 f'(--num-workers)') from None
            raise


class HandOver:
    """A `collate_fn` of a loading process whose batches leave it at once, so that a failure to is raised there.

    Where torch itself moves tensors to shared memory, it does so in a thread whose errors nobody hears of.

    Args:
        through_pipes: hand over the bytes themselves.
    """

    def __init__(self, collate_fn: Callable, *, through_pipes: bool):
        self.collate_fn, self.through_pipes = collate_fn, through_pipes

    def __call__(self, samples: list):
        if not self.through_pipes:
            return map_leaves(self.collate_fn(samples), torch.Tensor, torch.Tensor.share_memory_)
        with as_in_main_process():
            return map_leaves(self.collate_fn(samples), torch.Tensor, torch.Tensor.numpy)


@contextlib.contextmanager
def as_in_main_process():
    """A context in which torch's default_collate stacks to memory that is not shared."""
    asked, torch.utils.data.get_worker_info = torch.utils.data.get_worker_info, lambda: None
    try:
        yield
    finally:
        torch.utils.data.get_worker_info = asked


def shared_memory_left() -> int:
    """Bytes; PLENTY where there is no such place to look at."""
    try:
        state = os.statvfs(SHARED_MEMORY)
    except (OSError, AttributeError):  # not Linux
        return PLENTY
    return state.f_bavail * state.f_frsize


def local_processes() -> int:
    """Processes of this run on this machine, as torchrun says."""
    given = os.environ.get('LOCAL_WORLD_SIZE', '1')
    return int(given) if given.isdecimal() else 1


def sample_size(dataset, sampler) -> int:
    """Bytes of the tensors of a sample, the first that can be read."""
    if isinstance(dataset, IterableDataset):
        return STREAMED
    for key in sampler or range(len(dataset)):
        try:
            size = bytes_of(dataset[key])
        except InputError:  # an unreadable image, which is reported where it is needed
            continue
        if size:
            return size
    return STREAMED


def bytes_of(sample) -> int:
    """Of all tensors in it."""
    sizes = []
    map_leaves(sample, torch.Tensor, lambda tensor: sizes.append(tensor.nbytes))
    return sum(sizes)
