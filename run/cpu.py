"""CPU settings: cores of this process, other load on them, and the C library's allocator."""
import ctypes
import os

import torch

from run.output import log


def usable_workers(wanted: int) -> int:
    return min(wanted, usable_cores())


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def log_busy_cores():
    """Warn if other programs use the cores: torch's threads wait by spinning, and can be ten times slower then."""
    try:
        load = os.getloadavg()[0]
    except OSError:
        return
    cores = usable_cores()
    free = max(0., cores - load)
    if load > free and torch.get_num_threads() > 1 and 'OMP_NUM_THREADS' not in os.environ:
        log(f'Other programs are using this machine: load {load:.1f}, {cores} cores, {torch.get_num_threads()} threads '
            f'of this program; if the program is slow, set OMP_NUM_THREADS={max(1, int(free))} in front of the command')


def keep_freed_memory():
    """Make glibc keep the memory that a training process on a CPU frees.

    By default, each step may return its activations to the system and request zeroed pages again, in up to a fifth of
    its time. Inference needs little memory per step; glibc's default is better there.
    """
    set_malloc(mmap_threshold=2 ** 30, trim_threshold=2 ** 31 - 1)


def set_malloc(*, mmap_threshold: int, trim_threshold: int):
    """Set glibc's thresholds in bytes: for allocations by mmap, and for freed memory that is kept (see mallopt(3))."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
    mallopt(M_MMAP_THRESHOLD, mmap_threshold) or mallopt(M_MMAP_THRESHOLD, 2 ** 25)  # the limit of old versions
    mallopt(M_TRIM_THRESHOLD, trim_threshold)
