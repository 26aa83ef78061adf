"""Loading workers: transport of batches to the main process, and the end of a run whose worker can't continue."""
import contextlib
import os
from typing import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from run import signals
from run.cpu import usable_workers
from run.output import log
from run.progress import map_leaves
from run.settings import MostPixels
from utils import InputError, RunStopped

SHARED_MEMORY = '/dev/shm'  # on Linux; containers often have 64 MB of it
AHEAD = 3  # batches per worker that exist at a time: two prefetched by torch, and the current batch
LEAST = 2 ** 20  # bytes for the workers' locks and other small objects
PLENTY = 2 ** 33  # bytes that suffice for any batches
STREAMED = 4 * 3 * 224 ** 2  # assumed bytes of a sample that can't be loaded in advance


class Loader(DataLoader):
    """torch's DataLoader for any size of shared memory.

    Batches that do not fit into shared memory go through pipes, which is slower. A worker that can't continue ends the
    run; otherwise the main process could wait endlessly for a lost batch.

    Raises:
        RunStopped: during iteration, a worker was killed, or there is no shared memory left.
    """

    def __init__(self, dataset, *, num_workers: int, collate_fn: Callable, batch_size: int, **kwargs):
        workers, available = usable_workers(num_workers), available_shared_memory()
        if workers and available < LEAST:
            log(f'{SHARED_MEMORY} has {available // 2 ** 10} KB left, too little for loading workers: --num-workers 0')
            workers, kwargs = 0, {**kwargs, 'persistent_workers': False, 'multiprocessing_context': None}
        needed = 0
        if workers and available < PLENTY:
            needed = workers * AHEAD * batch_size * local_processes() * sample_size(dataset, kwargs.get('sampler'))
        self.through_pipes = needed > available
        if self.through_pipes:
            log(f'Loading needs {needed // 2 ** 20} MB of shared memory, and {SHARED_MEMORY} has '
                f'{available // 2 ** 20}: batches go through pipes, which is slower (in a container: docker run '
                f'--shm-size=8g)')
        if workers:
            collate_fn = HandOver(collate_fn, through_pipes=self.through_pipes)
        super().__init__(dataset, num_workers=workers, batch_size=batch_size, collate_fn=collate_fn,
                         worker_init_fn=WorkerStart(), **kwargs)

    def __iter__(self) -> Iterator:
        try:
            with signals.held():  # until the workers ignore signals
                batches = super().__iter__()
            for batch in batches:
                yield map_leaves(batch, np.ndarray, torch.from_numpy) if self.through_pipes else batch
        except RuntimeError as error:
            message = str(error)
            if 'shared memory' in message:
                raise RunStopped(f'{SHARED_MEMORY} is full: the loading workers can\'t pass on their batches '
                                 f'(--num-workers 0 needs no shared memory)') from None
            if message.startswith('DataLoader worker'):
                raise RunStopped(f'a loading worker has died ({message.splitlines()[0]}); if memory is short, use '
                                 f'fewer (--num-workers)') from None
            raise


class WorkerStart:
    """`worker_init_fn`: prepares a worker, which may be a new process, as the main process is prepared."""

    def __init__(self):
        self.prepare_signals, self.most_pixels = signals.WorkerSignals(), MostPixels.value

    def __call__(self, worker_id: int):
        self.prepare_signals(worker_id)
        MostPixels.value = self.most_pixels


class HandOver:
    """A worker's `collate_fn` that also moves the batch to shared memory, or prepares the batch for a pipe."""

    def __init__(self, collate_fn: Callable, *, through_pipes: bool):
        self.collate_fn, self.through_pipes = collate_fn, through_pipes

    def __call__(self, samples: list):
        if not self.through_pipes:  # torch itself would use shared memory in a thread, whose errors are lost
            return map_leaves(self.collate_fn(samples), torch.Tensor, torch.Tensor.share_memory_)
        # Without worker info, torch's default_collate stacks to memory that is not shared.
        get_worker_info, torch.utils.data.get_worker_info = torch.utils.data.get_worker_info, lambda: None
        try:
            return map_leaves(self.collate_fn(samples), torch.Tensor, torch.Tensor.numpy)
        finally:
            torch.utils.data.get_worker_info = get_worker_info


def available_shared_memory() -> int:
    """Return the free bytes of shared memory; PLENTY on systems without SHARED_MEMORY."""
    try:
        state = os.statvfs(SHARED_MEMORY)
    except OSError:  # macOS
        return PLENTY
    return state.f_bavail * state.f_frsize


def local_processes() -> int:
    """Return the number of this run's processes on this machine, according to torchrun."""
    count = os.environ.get('LOCAL_WORLD_SIZE', '1')
    return int(count) if count.isdecimal() else 1


def sample_size(dataset, sampler) -> int:
    """Return the bytes of the tensors of the first readable sample."""
    sizes = []  # of the sample's tensors
    for key in () if isinstance(dataset, IterableDataset) else sampler or range(len(dataset)):
        with contextlib.suppress(InputError):  # an unreadable image, which is reported when its batch is loaded
            map_leaves(dataset[key], torch.Tensor, lambda tensor: sizes.append(tensor.nbytes))
        if any(sizes):
            return sum(sizes)
    return STREAMED
