"""Session of a program: its device, its seed, and its processes."""
import contextlib
from typing import Iterator, Optional

import torch

from run import cpu, devices, processes
from run.launch import find_launch
from run.output import log
from utils import Interrupted, counted, seed_everything


@contextlib.contextmanager
def joined(device: str = 'auto', *, seed: int = 0, deterministic: bool = False, world_size: int = 1,
           dist_url: str = 'env://', timeout_minutes: float = 10., trains: bool = False,
           threads: Optional[int] = None) -> Iterator[torch.device]:
    """Join the other processes within a context, if a launcher (torchrun, srun, mpirun) started several.

    Args:
        device: `auto`, or the name of a device.
        seed: seed of all random generators.
        deterministic: refuse operations whose result varies from run to run.
        world_size: number of processes, for environments without this number.
        dist_url: address of the rendezvous; `env://`: MASTER_ADDR and MASTER_PORT, or the host of rank 0.
        timeout_minutes: timeout of a process that waits for the others.
        threads: number of threads on a CPU; None: OMP_NUM_THREADS, or at most the cores that other programs leave.
        trains: make the CPU's allocator keep the memory that training frees.

    Yields:
        This process's own device.

    Raises:
        InputError: the device does not exist, or variables of the launcher are missing or invalid.
        RunStopped: the processes can't connect.
    """
    devices.set_deterministic(deterministic)
    seed_everything(seed)
    own_device = devices.choose_device(device)
    launch = find_launch(world_size=world_size, dist_url=dist_url)
    if launch is not None:
        own_device = processes.init_distributed(launch, own_device, dist_url=dist_url, timeout_minutes=timeout_minutes)
        if launch.launcher != 'torchrun':
            log(f'{counted(launch.world_size, "process")} started by {launch.launcher} work together')
    if own_device.type == 'cpu':
        if trains:
            cpu.keep_freed_memory()
        cpu.set_threads(threads)
    try:
        yield own_device
    except Interrupted:
        processes.end_distributed()
        raise  # after other errors the processes differ: destroying the process group could block
    processes.end_distributed()
