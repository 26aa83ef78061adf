"""Time and memory of steps, measured against each other in one run, and how they are shown."""
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

import torch
from torch.utils.flop_counter import FlopCounterMode

import xcit_linear
from run import processes
from run.processes import notice

PRECISIONS = {'fp32': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or 'allocate memory' in str(error)


def synchronize(device: torch.device):
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)


def seconds(step: Callable, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def take_turns(steps: Dict[str, Callable], device: torch.device, rounds: int) -> Dict[str, Optional[float]]:
    """Median seconds of each step over rounds in which all take their turn; None: out of memory.

    A step that is shorter than 20 ms is repeated within its turn.
    """
    times: Dict[str, List[float]] = {}
    repeats = {}
    for name, step in steps.items():
        try:
            for _ in range(2):  # the first may compile
                once = seconds(step, device)
            repeats[name] = max(1, math.ceil(.02 / once))
            times[name] = []
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
    for _ in range(rounds):
        for name in list(times):
            def turn(step=steps[name], repeat=repeats[name]):
                for _ in range(repeat):
                    step()

            try:
                times[name].append(seconds(turn, device) / repeats[name])
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                del times[name]
    return {name: statistics.median(times[name]) if name in times else None for name in steps}


def peak_memory(step: Callable, device: torch.device) -> Optional[float]:
    """MB that a step needs at its peak beyond what is in use before it; None: out of memory, or can't be known here."""
    if device.type != 'cpu':
        return _peak_memory(step, device)
    # In a thread, to which glibc gives another heap. That of the main thread has holes, which models and steps before
    # have left: tensors would come to lie there, and the system not get them back when they are freed.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_peak_memory, step, device).result()


def _peak_memory(step: Callable, device: torch.device) -> Optional[float]:
    try:
        if device.type == 'cuda':
            step()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            step()
            return (torch.cuda.max_memory_allocated(device) - before) / 2 ** 20
        if device.type == 'cpu' and platform.system() == 'Linux':
            processes.set_malloc(mmap_threshold=2 ** 17, trim_threshold=2 ** 17)  # memory that is freed does not count
            step()
            ctypes.CDLL(None).malloc_trim(0)
            Path('/proc/self/clear_refs').write_text('5')  # the peak starts again from here
            before = process_memory('VmRSS')
            step()
            return (process_memory('VmHWM') - before) / 2 ** 10
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    except (OSError, AttributeError):  # containers may forbid it; other C libraries have no malloc_trim
        pass
    finally:
        processes.set_malloc(mmap_threshold=2 ** 25, trim_threshold=2 ** 26)  # where glibc's own rule ends up
    return None


def process_memory(name: str) -> int:
    """A figure of this process in kB, see proc(5)."""
    return int(re.search(rf'{name}:\s+(\d+)', Path('/proc/self/status').read_text())[1])


def matrix_peak(device: torch.device, precision: str) -> Optional[float]:
    """Floating-point operations a second of a large product of matrices; None: out of memory."""
    n = 2048 if device.type == 'cpu' else 8192

    def product():
        return a @ a

    try:
        a = torch.randn(n, n, device=device, dtype=PRECISIONS[precision])
    except RuntimeError as error:
        product = fails_for_memory(error)
    steps = {'product': product}
    if device.type == 'cpu' and precision == 'fp32':
        steps['linear'] = lambda: xcit_linear.linear(a, a, a[0])  # which may have another library
    times = take_turns(steps, device, 7)
    return 2 * n ** 3 / min(times.values()) if all(times.values()) else None


def operations(step: Callable) -> Optional[int]:
    """Floating-point operations of a step's products and convolutions, as it runs; None: out of memory."""
    def product(self_shape, a_shape, b_shape, **_) -> int:
        return 2 * math.prod(a_shape) * b_shape[-1]

    in_place = {torch.ops.aten.addmm_: product, torch.ops.aten.baddbmm_: product}  # torch leaves these out
    try:
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            step()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    return counter.get_total_flops()


def fails_for_memory(error: RuntimeError) -> Callable:
    """A step in place of one that memory does not suffice to build; other errors are raised again."""
    if not is_out_of_memory(error):
        raise error
    message = str(error)  # the error itself holds what was built until then

    def step():
        raise torch.OutOfMemoryError(message)

    return step


def least_of(values: Dict[tuple, Optional[float]]) -> Dict[str, Optional[float]]:
    """The least value of those with the same first half of the key; None: there is none."""
    names = dict.fromkeys(name for name, _ in values)
    return {name: min((v for (n, _), v in values.items() if n == name and v), default=None) for name in names}


# ---------------------------------------------------------------------------------------------------------------------
# Shown

def shown(value: Optional[float], digits: int = 1, unit: str = '', *, none: str = 'out of memory') -> str:
    return none if value is None else f'{value:.{digits}f}{unit}'


known = functools.partial(shown, none='-')


def ratio(ours: Optional[float], theirs: Optional[float]) -> str:
    return '-' if ours is None or theirs is None else f'{theirs / ours:.2f}'


def table(header: List[str], rows: List[list]):
    """Print a Markdown table."""
    for row in (header, ['---'] * len(header), *rows):
        notice(f'| {" | ".join(map(str, row))} |')
