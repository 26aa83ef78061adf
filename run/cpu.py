"""CPU settings: cores of this process, other load on them, and the C library's allocator."""
import ctypes
import os
import time
from pathlib import Path
from typing import List, Optional, Tuple

import torch

from run.output import log

WAIT_S = .3  # time to measure the load


def usable_workers(wanted: int) -> int:
    return min(wanted, usable_cores())


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def set_threads(given: Optional[int] = None, *, only_warns: bool = False):
    """Set torch's threads to the number of --threads; if unset, and without OMP_NUM_THREADS, to the free cores at most.

    Torch's threads wait by spinning: on cores that other programs use, several can be ten times slower than one.

    Args:
        only_warns: log the load without a change, for measurements.
    """
    if given is not None:
        torch.set_num_threads(given)
    threads = torch.get_num_threads()
    if given is not None or threads == 1 or 'OMP_NUM_THREADS' in os.environ:
        return
    cores, load = allowed_cores(), load_of_others()
    free = max(1, round(cores - load))
    if free >= threads:
        return
    used = f'Other programs use {load:.1f} of {cores:g} cores'
    if only_warns:
        log(f'Warning: {used}: times are too long; {threads} threads')
        return
    torch.set_num_threads(free)
    log(f'{used}: {free} instead of {threads} threads; --threads or OMP_NUM_THREADS sets another number')


def load_of_others() -> float:
    """Return the number of cores that other programs use: the load of the last minute, but not more than now.

    The load alone would count programs that have ended, e.g. an earlier run, and the present alone a short moment.
    """
    try:
        load = os.getloadavg()[0]
    except OSError:
        return 0.
    busy = busy_cores() if load >= .5 else None
    return load if busy is None else min(load, busy)


def busy_cores() -> Optional[float]:
    """Measure for how many of its cores' time this waiting process sees them busy; None: not known on this system."""
    try:
        before = core_times()
        time.sleep(WAIT_S)
        return sum((now[0] - then[0]) / max(now[1] - then[1], 1) for then, now in zip(before, core_times()))
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def core_times() -> List[Tuple[int, int]]:
    """Return the busy and the whole time of each core of this process, in ticks, from /proc/stat."""
    names = {f'cpu{core}' for core in os.sched_getaffinity(0)}
    with open('/proc/stat') as file:
        rows = [line.split() for line in file if line.split(' ', 1)[0] in names]
    times = [[int(value) for value in row[1:9]] for row in rows]  # user, nice, system, idle, iowait, ...
    return [(sum(row) - row[3] - row[4], sum(row)) for row in times]


def allowed_cores() -> float:
    """Return the number of cores of this process, or less if its container (cgroup) limits its time."""
    try:
        quota, period = Path('/sys/fs/cgroup/cpu.max').read_text().split()
        return min(usable_cores(), int(quota) / int(period))
    except (OSError, ValueError):  # no container, no limit ("max"), or another system
        return usable_cores()


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
