"""How far a loop is, and its batches on the device."""
import datetime
import math
import sys
import time
from typing import Callable, Iterable, Iterator, Optional

import torch
from tqdm import tqdm

from run.processes import get_world_size, max_over_processes, notice, shows_bar


class Progress:
    """Iterate over a loader and show how far it is: a tqdm bar on a terminal, a line now and then elsewhere.

    Args:
        loader: yields batches of tensors, nested in any way; has a length.
        header: what is running.
        device: for peak memory.
        first_step: steps that an earlier process did.

    After the loop, `stats()` gives images a second, data time and peak memory.
    """
    INTERVAL_S = 20.  # between two lines
    last_line = -math.inf  # when any of them printed one; the first step of a program does

    def __init__(self, loader, header: str, device: torch.device, *, first_step: int = 0):
        self.loader, self.header, self.device = loader, header, device
        self.first_step, self.steps = first_step, first_step + len(loader)
        self.values = {}
        self.images = 0
        self.data_time = 0.

    def __iter__(self):
        if self.device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(self.device)
        bar = tqdm(total=self.steps, initial=self.first_step, desc=self.header, leave=False, disable=not shows_bar())
        self.start = asked = time.perf_counter()
        with bar:
            for step, batch in enumerate(self.loader, start=self.first_step + 1):
                self.data_time += time.perf_counter() - asked
                yield batch
                self.images += count_images(batch) * get_world_size()
                bar.set_postfix(self.values, refresh=False)
                bar.update()
                asked = time.perf_counter()
                if not shows_bar() and asked - Progress.last_line >= self.INTERVAL_S:
                    Progress.last_line = asked
                    notice(self.line(step))
        self.seconds = time.perf_counter() - self.start

    def line(self, step: int) -> str:
        seconds, done = time.perf_counter() - self.start, step - self.first_step
        eta = datetime.timedelta(seconds=int(seconds / done * (self.steps - step)))
        shown = '  '.join(f'{name} {value}' for name, value in self.values.items())
        return (f'{self.header} [{step:{len(str(self.steps))}}/{self.steps}]  eta {eta}  {shown}  '
                f'{self.images / seconds:.0f} images/s  data {self.data_time / done:.4f} s  '
                f'max mem {peak_memory(self.device):.0f} MB')

    def stats(self) -> dict:
        return {'images_per_s': self.images / max(self.seconds, 1e-9),
                'data_s': self.data_time / max(len(self.loader), 1), 'memory_mb': peak_memory(self.device)}


def with_stops(batches: Iterable, loader, after_batch: Optional[Callable[[], None]]) -> Iterator:
    """The batches of an evaluation, with a call of `after_batch` after each, equally often on all processes.

    Args:
        batches: those of `loader`, of loaders.batches.
        after_batch: None: nothing; nothing either where the processes can't know how often it would be.
    """
    called = after_batch is not None and loader.counts_batches
    most = max_over_processes(len(loader))
    for batch in batches:
        yield batch
        if called:
            after_batch()
    for _ in range(most - len(loader) if called else 0):
        after_batch()


class Table:
    """Lines with columns under a header, printed one by one; a column is as wide as its name, or `WIDTH`."""
    WIDTH = 8
    EVERY = 40  # lines between two headers

    def __init__(self):
        self.names, self.lines = None, 0

    def add(self, row: dict):
        """Print a line of texts, by the names of their columns."""
        widths = [max(len(name), self.WIDTH) for name in row]
        if [*row] != self.names or self.lines % self.EVERY == 0:
            self.names, self.lines = [*row], 0
            notice('  '.join(f'{name:>{width}}' for name, width in zip(row, widths)))
        self.lines += 1
        notice('  '.join(f'{text:>{width}}' for text, width in zip(row.values(), widths)))


class DevicePrefetch:
    """Iterate over a loader's batches on a device; to a GPU each is copied while the one before is worked on.

    Args:
        loader: yields tensors in lists, tuples and dicts, nested in any way, and anything else beside them; in pinned
            memory for the copy to be asynchronous.
        device: where they go.
    """

    def __init__(self, loader, device: torch.device):
        self.loader, self.device = loader, device

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        if self.device.type != 'cuda':
            for batch in self.loader:
                yield map_tensors(batch, lambda tensor: tensor.to(self.device))
            return
        stream = torch.cuda.Stream(self.device)
        ahead = None
        for batch in self.loader:
            with torch.cuda.stream(stream):
                copied = map_tensors(batch, lambda tensor: tensor.to(self.device, non_blocking=True))
                done = stream.record_event()
            if ahead is not None:
                yield self.take(*ahead)
            ahead = copied, done
        if ahead is not None:
            yield self.take(*ahead)

    def take(self, batch, done: 'torch.cuda.Event'):
        """Let the work that comes now wait for the copy, and the memory be kept until that work is done."""
        now = torch.cuda.current_stream(self.device)
        now.wait_event(done)
        map_tensors(batch, lambda tensor: tensor.record_stream(now))
        return batch


def map_tensors(batch, change):
    """The same lists, tuples and dicts with `change` applied to each tensor in them."""
    return map_leaves(batch, torch.Tensor, change)


def map_leaves(batch, kind: type, change):
    """The same lists, tuples and dicts with `change` applied to each object of a kind in them."""
    if isinstance(batch, kind):
        return change(batch)
    if isinstance(batch, dict):
        return {key: map_leaves(value, kind, change) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, '_fields'):  # a named tuple
        return type(batch)(*(map_leaves(value, kind, change) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(map_leaves(value, kind, change) for value in batch)
    return batch


def count_images(batch) -> int:
    """How many images a batch has.

    As many as the first tensor in it has rows; one for each dict of a list, and for each (3, img_h, img_w).
    """
    if isinstance(batch, torch.Tensor):
        return len(batch)
    if isinstance(batch, dict):
        return next(filter(None, map(count_images, batch.values())), 0)
    if isinstance(batch, (list, tuple)) and len(batch):
        one_each = isinstance(batch[0], dict) or (isinstance(batch[0], torch.Tensor) and batch[0].ndim == 3)
        return len(batch) if one_each else count_images(batch[0])
    return 0


def peak_memory(device: torch.device) -> float:
    """Peak memory in MB (2**20 bytes): of the tensors on a GPU, else of the whole process."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    if device.type == 'mps':
        return torch.mps.driver_allocated_memory() / 2 ** 20
    if sys.platform == 'win32':
        return 0.  # not told there
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == 'darwin' else 2 ** 10)
