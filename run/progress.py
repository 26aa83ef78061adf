"""Progress of a loop, its batches on the device, and the table of rounds."""
import datetime
import math
import resource
import sys
import time

import torch
from tqdm import tqdm

from run.output import log, shows_bar
from run.processes import get_world_size


class Progress:
    """Iteration over a loader with its progress: a tqdm bar on a terminal, otherwise a line every 20 seconds.

    Args:
        loader: yields batches of tensors, nested in any way; has a length.
        device: device whose peak memory is shown.
        first_step: steps that an earlier process did.
    """
    INTERVAL_S = 20.  # between two lines
    last_line = -math.inf  # time of the last line of any loop; -inf: the first step of a program prints a line

    def __init__(self, loader, header: str, device: torch.device, *, first_step: int = 0):
        self.loader, self.header, self.device = loader, header, device
        self.first_step, self.steps = first_step, first_step + len(loader)
        self.values, self.images, self.data_time = {}, 0, 0.

    def __iter__(self):
        if self.device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(self.device)
        bar = tqdm(total=self.steps, initial=self.first_step, desc=self.header, leave=False, disable=not shows_bar())
        self.start = requested = time.perf_counter()
        with bar:
            for step, batch in enumerate(self.loader, start=self.first_step + 1):
                self.data_time += time.perf_counter() - requested
                yield batch
                self.images += count_images(batch) * get_world_size()
                bar.set_postfix(self.values, refresh=False)
                bar.update()
                requested = time.perf_counter()
                if not shows_bar() and requested - Progress.last_line >= self.INTERVAL_S:
                    Progress.last_line = requested
                    log(self.line(step))
        self.seconds = time.perf_counter() - self.start

    def line(self, step: int) -> str:
        seconds, done = time.perf_counter() - self.start, step - self.first_step
        eta = datetime.timedelta(seconds=int(seconds / done * (self.steps - step)))
        shown = '  '.join(f'{name} {value}' for name, value in self.values.items())
        return (f'{self.header} [{step:{len(str(self.steps))}}/{self.steps}]  eta {eta}  {shown}  '
                f'{self.images / seconds:.0f} images/s  data {self.data_time / done:.4f} s  '
                f'max mem {peak_memory(self.device):.0f} MB')

    def stats(self) -> dict:
        """Return images per second, seconds of waiting for a batch and peak memory, after the loop."""
        return {'images_per_s': self.images / max(self.seconds, 1e-9),
                'data_s': self.data_time / max(len(self.loader), 1), 'memory_mb': peak_memory(self.device)}


class Table:
    """Table that is printed row by row, with a header every 40 rows; a column is as wide as its name, at least 8."""
    def __init__(self):
        self.columns, self.rows = None, 0

    def add(self, row: dict):
        """Print a row: texts by column."""
        widths = [max(len(column), 8) for column in row]
        if [*row] != self.columns or self.rows % 40 == 0:
            self.columns, self.rows = [*row], 0
            log('  '.join(f'{column:>{width}}' for column, width in zip(row, widths)))
        self.rows += 1
        log('  '.join(f'{text:>{width}}' for text, width in zip(row.values(), widths)))


class DevicePrefetch:
    """Iteration over a loader's batches on a device; a GPU gets each batch, if pinned, during work on another batch."""

    def __init__(self, loader, device: torch.device):
        self.loader, self.device = loader, device

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        if self.device.type != 'cuda':
            for batch in self.loader:
                yield map_leaves(batch, torch.Tensor, lambda tensor: tensor.to(self.device))
            return
        stream = torch.cuda.Stream(self.device)
        prefetched = None
        for batch in self.loader:
            with torch.cuda.stream(stream):
                copied = map_leaves(batch, torch.Tensor, lambda tensor: tensor.to(self.device, non_blocking=True))
                event = stream.record_event()
            if prefetched is not None:
                yield self.release(*prefetched)
            prefetched = copied, event
        if prefetched is not None:
            yield self.release(*prefetched)

    def release(self, batch, event: 'torch.cuda.Event'):
        """Make later work wait for the copy, and keep the memory until this work is done."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(event)
        map_leaves(batch, torch.Tensor, lambda tensor: tensor.record_stream(stream))
        return batch


def map_leaves(batch, kind: type, change):
    """Apply `change` to each object of a kind in nested lists, tuples and dicts."""
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
    """Return the length of a batch's first tensor, or of a list of dicts or tensors (3, img_h, img_w): its images."""
    if isinstance(batch, torch.Tensor):
        return len(batch)
    if isinstance(batch, dict):
        return next(filter(None, map(count_images, batch.values())), 0)
    if isinstance(batch, (list, tuple)) and len(batch):
        is_per_image = isinstance(batch[0], dict) or (isinstance(batch[0], torch.Tensor) and batch[0].ndim == 3)
        return len(batch) if is_per_image else count_images(batch[0])
    return 0


def peak_memory(device: torch.device) -> float:
    """Return the peak memory in MB (2**20 bytes): of the tensors on a GPU, else of the whole process."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    if device.type == 'mps':
        return torch.mps.driver_allocated_memory() / 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == 'darwin' else 2 ** 10)
