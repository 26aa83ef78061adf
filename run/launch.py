"""Rank of this process, world size and address of rank 0, from a launcher's environment variables.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; srun and mpirun set other variables.
"""
import contextlib
import dataclasses
import json
import os
import re
import sys
import time
import zlib
from pathlib import Path
from typing import Optional, Tuple

from utils import InputError, counted, name_bytes

PORTS = range(15000, 32000)  # below the range of systems for outgoing connections
JOB_IDS = ('SLURM_JOB_ID', 'PBS_JOBID', 'LSB_JOBID')


@dataclasses.dataclass(frozen=True)
class Launch:
    """Place of this process among the processes of one start.

    Args:
        launcher: name of the launcher, for messages.
        local_rank: rank among the processes of this host.
        address, port: host of rank 0, and a port there; '' and 0: not needed.
    """
    launcher: str
    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int


@dataclasses.dataclass(frozen=True)
class Variables:
    """Names of a launcher's environment variables.

    Args:
        start_ids: variables with the same value for all processes of one start, and another value for the next start.
    """
    launcher: str
    rank: str
    size: str
    local_rank: str
    local_size: str = ''
    start_ids: Tuple[str, ...] = ()


# srun comes last: inside a SLURM job, the processes of mpirun inherit SLURM's variables
LAUNCHERS = (
    Variables('Open MPI', *(f'OMPI_COMM_WORLD_{name}' for name in ('RANK', 'SIZE', 'LOCAL_RANK', 'LOCAL_SIZE')),
              start_ids=('PMIX_NAMESPACE', 'OMPI_MCA_ess_base_jobid')),
    Variables('mpirun', 'PMI_RANK', 'PMI_SIZE', 'MPI_LOCALRANKID', 'MPI_LOCALNRANKS',  # MPICH, Intel MPI
              start_ids=('PMI_JOBID',)),
    Variables('srun', 'SLURM_PROCID', 'SLURM_STEP_NUM_TASKS', 'SLURM_LOCALID', '', ('SLURM_JOB_ID', 'SLURM_STEP_ID')))


def find_launcher() -> Optional[Variables]:
    """Return the variables of the launcher that started this process; None for torchrun and for a single process."""
    for variables in LAUNCHERS:
        if {variables.rank, variables.size, variables.local_rank} <= os.environ.keys():
            return variables if variables.launcher != 'srun' or in_slurm_step() else None
    return None


def in_slurm_step() -> bool:
    """Return whether srun started this process, or a script that contains this process.

    SLURM sets the same variables for single processes: a batch script that requests several tasks, a shell of `salloc`
    or `srun --pty`, and a job submitted from one of these. In such a shell, processes of srun have no terminal.
    """
    sizes = set(environment_values(('SLURM_NTASKS', 'SLURM_STEP_NUM_TASKS')))
    in_shell = 'SLURM_PTY_PORT' in os.environ and has_terminal()
    return 'SLURM_STEP_ID' in os.environ and len(sizes) == 1 and not in_shell


def has_terminal() -> bool:
    """Return whether the process has a controlling terminal, even if its output is redirected."""
    with contextlib.suppress(OSError):
        os.close(os.open('/dev/tty', os.O_RDWR))
        return True
    return False


def find_launch(*, world_size: int, dist_url: str) -> Optional[Launch]:
    """Return the place of this process among the processes of one start; None for a single process.

    Args:
        world_size: number of processes, if the environment does not contain the number.
        dist_url: rendezvous address; `env://`: MASTER_ADDR and MASTER_PORT, or the host of rank 0.

    Raises:
        InputError: a variable is missing or invalid.
    """
    variables = None if 'RANK' in os.environ else find_launcher()
    size = integer_from_environment(variables.size, low=1) if variables else 1
    if size == 1:
        return from_torch_variables(world_size, dist_url)
    if world_size not in (1, size):
        raise InputError(f'--world-size {world_size}: {variables.launcher} has started {counted(size, "process")}')
    address, port = '', 0
    if dist_url == 'env://':
        address = os.environ.get('MASTER_ADDR') or first_host(variables, size)
        if not address:
            raise InputError(f'{variables.launcher} has started {counted(size, "process")} on several hosts: set '
                             f'MASTER_ADDR to the first host for all processes, or start the processes with torchrun')
        port = integer_from_environment('MASTER_PORT', low=1, high=65535, default=choose_port(variables))
    return Launch(variables.launcher, integer_from_environment(variables.rank, high=size - 1), size,
                  integer_from_environment('LOCAL_RANK' if 'LOCAL_RANK' in os.environ else variables.local_rank),
                  address, port)


def from_torch_variables(world_size: int, dist_url: str) -> Optional[Launch]:
    """Return the place of this process by torchrun's variables; None without these variables and --world-size."""
    by_environment = dist_url == 'env://'
    given = [name for name in ('RANK', 'WORLD_SIZE') if name in os.environ]
    if not given and world_size == 1:
        return None
    required = ['RANK'] + ['WORLD_SIZE'] * (world_size == 1) + ['MASTER_ADDR', 'MASTER_PORT'] * by_environment
    missing = [name for name in required if name not in os.environ]
    if missing:
        raise InputError(f'{", ".join(given) or f"--world-size {world_size}"} is set, but {", ".join(missing)} is not: '
                         f'start the processes with torchrun, or set all of these variables')
    world_size = integer_from_environment('WORLD_SIZE', low=1, default=world_size)
    rank = integer_from_environment('RANK', high=world_size - 1)
    local_rank = integer_from_environment('LOCAL_RANK', default=0)
    port = integer_from_environment('MASTER_PORT', low=1, high=65535) if by_environment else 0
    return Launch('torchrun', rank, world_size, local_rank, os.environ['MASTER_ADDR'] if by_environment else '', port)


def environment_rank() -> int:
    """Return the rank of this process by the environment alone, for messages before the processes are connected."""
    variables = None if 'RANK' in os.environ else find_launcher()
    value = os.environ.get(variables.rank if variables else 'RANK', '')
    return int(value) if value.isdecimal() else 0


def is_watched_with_rank_0() -> bool:
    """Return whether this process's torchrun also started rank 0; it exits with the code of rank 0 if rank 0 fails."""
    return 'TORCHELASTIC_RUN_ID' in os.environ and os.environ.get('GROUP_RANK') == '0'


def report_to_torchrun(reason: str):
    """Store the reason of a failure in the file that torchrun reads for its report of failed processes."""
    if path := os.environ.get('TORCHELASTIC_ERROR_FILE'):
        message = {'message': reason, 'extraInfo': {'timestamp': str(int(time.time()))}}
        with contextlib.suppress(OSError):  # stderr has the reason, too
            Path(path).write_text(json.dumps({'message': message}))


def first_host(variables: Variables, size: int) -> str:
    """Return the host of rank 0; '' if unknown."""
    if variables.launcher == 'srun':
        nodes = [*environment_values(('SLURM_STEP_NODELIST', 'SLURM_JOB_NODELIST', 'SLURM_NODELIST')), ''][0]
        count = [*environment_values(('SLURM_STEP_NUM_NODES', 'SLURM_NNODES')), '1'][0]
        is_one_host = count == '1' and not re.search(r',|\d-\d+[^[\]]*\]', nodes)  # no list, no range like [1-2]
    else:
        nodes = os.environ.get('SLURM_JOB_NODELIST', '')
        is_one_host = os.environ.get(variables.local_size) == str(size)
    return '127.0.0.1' if is_one_host else first_node(nodes)


def first_node(nodes: str) -> str:
    """Return the first name of a node list of SLURM, e.g. node01 of `node[01-03,07],other`."""
    return re.sub(r'\[(\d+)[^\]]*\]', r'\1', re.match(r'(?:[^,\[]|\[[^\]]*\])*', nodes)[0])


def choose_port(variables: Variables) -> int:
    """Return a port that is equal for all processes of a start, and unlikely for another start on the same host."""
    ids = environment_values(variables.start_ids) or [*environment_values(JOB_IDS), os.getcwd(), *sys.argv]
    return PORTS[zlib.crc32(name_bytes('\0'.join(ids))) % len(PORTS)]


def environment_values(names: tuple) -> list:
    """Return the values of the variables that are set."""
    return [os.environ[name] for name in names if name in os.environ]


def integer_from_environment(name: str, *, low: int = 0, high: Optional[int] = None, default: Optional[int] = None
                             ) -> int:
    """Return an environment variable as an integer in [low, high]; else raise InputError."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal() or int(value) < low or (high is not None and int(value) > high):
        raise InputError(f'{name}={value} in the environment: must be an integer >= {low}'
                         + ('' if high is None else f' and <= {high}'))
    return int(value)
