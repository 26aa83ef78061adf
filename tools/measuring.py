"""Time and memory of steps, measured against each other in one run, and their tables."""
import contextlib
import ctypes
import functools
import math
import platform
import re
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Dict, List, Optional

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import xcit_linear
import xcit_zoo
from run import cpu
from run.output import log

PRECISIONS = {'fp32': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != 'fp32')


def timm_twin(name: str, **options) -> torch.nn.Module:
    """Build timm's implementation of an XCiT, with the random weights that ours has for the same seed."""
    weights = timm.create_model(name, **options).state_dict()
    twin = timm.create_model(f'{name}_224', **options)
    twin.load_state_dict(xcit_zoo.to_timm_names(weights))
    return twin


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or 'allocate memory' in str(error)


@contextlib.contextmanager
def out_of_memory_suppressed():
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise


def synchronize(device: torch.device):
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)


def seconds(step: Callable, device: torch.device, repeats: int = 1) -> Optional[float]:
    """Measure the mean seconds of a step; None: out of memory."""
    with out_of_memory_suppressed():
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        synchronize(device)
        return (time.perf_counter() - start) / repeats
    return None


def take_turns(steps: Dict[str, Callable], device: torch.device, rounds: int) -> Dict[str, Optional[float]]:
    """Measure the median seconds of each step over rounds in which all steps take turns; None: out of memory.

    A step of less than 20 ms is repeated within its turn.
    """
    times, repeats = {}, {}
    for name, step in steps.items():
        duration = seconds(step, device) and seconds(step, device)  # twice, because the first step may compile
        repeats[name] = duration and max(1, math.ceil(.02 / duration))
        times[name] = [] if duration else [None]
    for _ in range(rounds):
        for name, step in steps.items():
            if None not in times[name]:
                times[name].append(seconds(step, device, repeats[name]))
    return {name: None if None in durations else statistics.median(durations) for name, durations in times.items()}


def peak_memory(step: Callable, device: torch.device) -> Optional[float]:
    """Measure the peak memory of a step, in MB, beyond the memory in use before it; None: out of memory, or unknown."""
    if device.type != 'cpu':
        return _peak_memory(step, device)
    # In a thread, because glibc gives threads another heap. The main thread's heap has holes that earlier models and
    # steps left: tensors in these holes would not be returned to the system when they are freed.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_peak_memory, step, device).result()


def _peak_memory(step: Callable, device: torch.device) -> Optional[float]:
    try:
        # Resetting the peak is forbidden in some containers; other C libraries lack malloc_trim
        with out_of_memory_suppressed(), contextlib.suppress(OSError, AttributeError):
            if device.type == 'cuda':
                step()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
                step()
                return (torch.cuda.max_memory_allocated(device) - before) / 2 ** 20
            if device.type == 'cpu' and platform.system() == 'Linux':
                cpu.set_malloc(mmap_threshold=2 ** 17, trim_threshold=2 ** 17)  # freed memory does not count
                step()
                ctypes.CDLL(None).malloc_trim(0)
                Path('/proc/self/clear_refs').write_text('5')  # resets the peak
                before = process_memory('VmRSS')
                step()
                return (process_memory('VmHWM') - before) / 2 ** 10
    finally:
        cpu.set_malloc(mmap_threshold=2 ** 25, trim_threshold=2 ** 26)  # final values of glibc's own rule
    return None


def process_memory(name: str) -> int:
    """Return a value of /proc/self/status in kB, see proc(5)."""
    return int(re.search(rf'{name}:\s+(\d+)', Path('/proc/self/status').read_text())[1])


def matrix_peak(device: torch.device, precision: str) -> Optional[float]:
    """Measure floating-point operations per second of a large matrix product; None: out of memory."""
    n = 2048 if device.type == 'cpu' else 8192
    with out_of_memory_suppressed():
        a = torch.randn(n, n, device=device, dtype=PRECISIONS[precision])
        steps = {'product': lambda: a @ a}
        if device.type == 'cpu' and precision == 'fp32':
            steps['linear'] = lambda: xcit_linear.linear(a, a, a[0])  # by another library on some CPUs
        times = take_turns(steps, device, 7)
        return 2 * n ** 3 / min(times.values()) if all(times.values()) else None
    return None


def operations(step: Callable) -> Optional[int]:
    """Count floating-point operations of a step's products and convolutions; None: out of memory."""
    def product(self_shape, a_shape, b_shape, **_) -> int:
        return 2 * math.prod(a_shape) * b_shape[-1]

    in_place = {torch.ops.aten.addmm_: product, torch.ops.aten.baddbmm_: product}  # torch does not count these
    with out_of_memory_suppressed(), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        step()
        return counter.get_total_flops()
    return None


def fails_for_memory(error: RuntimeError) -> Callable:
    """Return a step that raises the error, if memory did not suffice to build the step; raise other errors."""
    if not is_out_of_memory(error):
        raise error
    message = str(error)  # the error itself would keep all that was built

    def step():
        raise torch.OutOfMemoryError(message)

    return step


def least_of(values: Dict[tuple, Optional[float]]) -> Dict[str, Optional[float]]:
    """Return the minimum per name over (name, variant) keys; None: no value."""
    names = dict.fromkeys(name for name, _ in values)
    return {name: min((v for (n, _), v in values.items() if n == name and v), default=None) for name in names}


def shown(value: Optional[float], digits: int = 1, unit: str = '', *, none: str = 'out of memory') -> str:
    return none if value is None else f'{value:.{digits}f}{unit}'


or_dash = functools.partial(shown, none='-')


def ratio(ours: Optional[float], theirs: Optional[float]) -> str:
    return '-' if ours is None or theirs is None else f'{theirs / ours:.2f}'


def table(header: List[str], rows: List[list]):
    """Print a Markdown table."""
    for row in (header, ['---'] * len(header), *rows):
        log(f'| {" | ".join(map(str, row))} |')
