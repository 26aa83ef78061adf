"""How this process was started: which rank it is among how many, and where they meet.

torchrun says it in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. SLURM's srun and the launchers of MPI
have variables of their own.
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
from typing import Callable, Optional

from utils import InputError

PORTS = range(15000, 32000)  # below those that systems give to outgoing connections
# What is the same for all processes of one start, and differs between two
START_IDS = ('PMIX_NAMESPACE', 'OMPI_MCA_ess_base_jobid', 'PMI_JOBID', 'MPIRUN_ID', 'FLUX_JOB_ID', 'PALS_APID')
JOB_IDS = ('SLURM_JOB_ID', 'PBS_JOBID', 'LSB_JOBID')  # the same for all starts of a job


@dataclasses.dataclass(frozen=True)
class Launch:
    """One process among those that were started together.

    Args:
        launcher: what started them, in words.
        rank: of this process.
        world_size: how many they are.
        local_rank: the number of this process on its host; None: not known.
        address: host of the one that the others connect to; '': not known, or not needed.
        port: of that host; 0: not needed.
    """
    launcher: str
    rank: int
    world_size: int
    local_rank: Optional[int]
    address: str
    port: int


@dataclasses.dataclass(frozen=True)
class Variables:
    """Those by which a launcher tells a process what it is, and whether they speak of this process."""
    launcher: str
    rank: str
    size: str
    local_rank: str
    local_size: str
    apply: Callable[[], bool] = lambda: True


def in_slurm_step() -> bool:
    """Whether srun has started this very process, or a script that it is part of.

    The variables are also those of a batch script that asks for several tasks, which is one process all the same; of
    the shell of `salloc` or `srun --pty`; of a job that was submitted by such a process. SLURM's own MPI support sets
    those of PMI as well, to the same numbers.
    """
    sizes = set(values_of(('SLURM_NTASKS', 'SLURM_STEP_NUM_TASKS', 'PMI_SIZE')))
    return 'SLURM_STEP_ID' in os.environ and len(sizes) == 1 and not in_slurm_shell()


def in_slurm_shell() -> bool:
    """Whether this is typed into a shell of `srun --pty`; what srun starts from there has no terminal."""
    return 'SLURM_PTY_PORT' in os.environ and has_terminal()


def has_terminal() -> bool:
    """Whether the process can be reached from a terminal, wherever its output goes."""
    try:
        os.close(os.open('/dev/tty', os.O_RDWR))
    except OSError:
        return False
    return True


# The first that is there counts: inside a SLURM job, mpirun's processes have SLURM's variables too.
LAUNCHERS = (
    Variables('Open MPI', *(f'OMPI_COMM_WORLD_{name}' for name in ('RANK', 'SIZE', 'LOCAL_RANK', 'LOCAL_SIZE'))),
    Variables('MVAPICH', *(f'MV2_COMM_WORLD_{name}' for name in ('RANK', 'SIZE', 'LOCAL_RANK', 'LOCAL_SIZE'))),
    Variables('mpirun', 'PMI_RANK', 'PMI_SIZE', 'MPI_LOCALRANKID', 'MPI_LOCALNRANKS',  # MPICH, Intel
              lambda: 'MPI_LOCALRANKID' in os.environ),
    Variables('srun', 'SLURM_PROCID', 'SLURM_STEP_NUM_TASKS', 'SLURM_LOCALID', '',
              lambda: in_slurm_step() and 'SLURM_STEP_NUM_TASKS' in os.environ),
    Variables('srun', 'SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID', '', in_slurm_step),
    Variables('PMI', 'PMI_RANK', 'PMI_SIZE', 'PMI_LOCAL_RANK', 'PMI_LOCAL_SIZE', lambda: not in_slurm_shell()),
    Variables('PMIx', 'PMIX_RANK', 'WORLD_SIZE', 'PMIX_LOCAL_RANK', 'PMIX_LOCAL_SIZE',
              lambda: not in_slurm_shell() and 'SLURM_STEP_ID' not in os.environ),
)


def launcher_variables() -> Optional[Variables]:
    """Those of the launcher that has started this process, if it is none that sets RANK."""
    return next((variables for variables in LAUNCHERS if variables.rank in os.environ and variables.apply()), None)


def find_launch(*, world_size: int, dist_url: str) -> Optional[Launch]:
    """What the environment says; None: this process is alone.

    Args:
        world_size: the number of processes, where the environment doesn't say it.
        dist_url: where they meet; `env://`: the environment says it.

    Raises:
        InputError: the environment is set in part, or to what can't be.
    """
    variables = None if 'RANK' in os.environ else launcher_variables()
    if variables is None:
        return from_torch_variables(world_size, dist_url)
    if variables.size not in os.environ and world_size == 1:
        raise InputError(f'{variables.rank} is set, but {variables.size} is not: start the processes with torchrun, or '
                         f'set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each')
    size = integer_from_environment(variables.size, low=1, default=world_size)
    if size == 1:
        return from_torch_variables(world_size, dist_url)
    if world_size not in (1, size):
        raise InputError(f'--world-size {world_size}: {variables.launcher} has started {size} processes')
    address = '' if dist_url != 'env://' else os.environ.get('MASTER_ADDR') or first_host(variables, size)
    if not address and dist_url == 'env://':
        raise InputError(f'{variables.launcher} has started {size} processes and doesn\'t say where they meet: set '
                         f'MASTER_ADDR to the first host for all of them, or start them with torchrun')
    local_rank = 'LOCAL_RANK' if 'LOCAL_RANK' in os.environ else variables.local_rank
    port = integer_from_environment('MASTER_PORT', low=1, high=65535, default=port_of(variables)) if address else 0
    return Launch(variables.launcher, integer_from_environment(variables.rank, high=size - 1), size,
                  integer_from_environment(local_rank) if local_rank in os.environ else None, address, port)


def from_torch_variables(world_size: int, dist_url: str) -> Optional[Launch]:
    by_environment = dist_url == 'env://'
    needed = ['RANK'] + ['WORLD_SIZE'] * (world_size == 1) + ['MASTER_ADDR', 'MASTER_PORT'] * by_environment
    given = [name for name in ('RANK', 'WORLD_SIZE') if name in os.environ]
    missing = [name for name in needed if name not in os.environ]
    if not given and world_size == 1:
        return None
    if missing:
        raise InputError(f'{", ".join(given) or f"--world-size {world_size}"} is set, but {", ".join(missing)} is not: '
                         f'start the processes with torchrun, or set all of them')
    world_size = integer_from_environment('WORLD_SIZE', low=1, default=world_size)
    number = integer_from_environment('RANK', high=world_size - 1)
    local_number = integer_from_environment('LOCAL_RANK', default=0)
    port = integer_from_environment('MASTER_PORT', low=1, high=65535) if by_environment else 0
    return Launch('torchrun', number, world_size, local_number, os.environ['MASTER_ADDR'] if by_environment else '',
                  port)


def rank() -> int:
    """Of this process, as far as the environment says it: for messages before the processes have met."""
    variables = launcher_variables()
    value = os.environ.get('RANK' if variables is None or 'RANK' in os.environ else variables.rank, '')
    return int(value) if value.isdecimal() else 0


def is_watched_with_rank_0() -> bool:
    """Whether the torchrun that waits for this process waits for rank 0, too.

    Its exit code is then that of rank 0, if that one fails; it reports each process that fails in seven lines.
    """
    return 'TORCHELASTIC_RUN_ID' in os.environ and os.environ.get('GROUP_RANK') == '0'


def tell_torchrun(words: str):
    """Have torchrun's report of a process that failed, which ends with the cause, say why."""
    path = os.environ.get('TORCHELASTIC_ERROR_FILE')
    if path:
        message = {'message': words, 'extraInfo': {'timestamp': str(int(time.time()))}}
        with contextlib.suppress(OSError):  # the words are on stderr, too
            Path(path).write_text(json.dumps({'message': message}))


def first_host(variables: Variables, size: int) -> str:
    """Where rank 0 is; '': not known."""
    if variables.launcher == 'srun':
        nodes, = values_of(('SLURM_STEP_NODELIST', 'SLURM_JOB_NODELIST', 'SLURM_NODELIST'))[:1] or ['']
        count, = values_of(('SLURM_STEP_NUM_NODES', 'SLURM_NNODES'))[:1] or ['1']
        return first_of_nodes(nodes) if count != '1' or is_several(nodes) else '127.0.0.1'
    if variables.local_size in os.environ:
        all_here = os.environ[variables.local_size] == str(size)
    else:  # on another host these two differ, and that process refuses
        all_here = os.environ.get(variables.local_rank) == os.environ[variables.rank]
    if all_here:
        return '127.0.0.1'
    return first_of_nodes(os.environ.get('SLURM_JOB_NODELIST', ''))


def is_several(nodes: str) -> bool:
    """Whether SLURM's list names more than one node."""
    return bool(re.search(r',|\d-\d+[^[\]]*\]', nodes))


def first_of_nodes(nodes: str) -> str:
    """The first name of SLURM's list, e.g. node01 of `node[01-03,07],other`."""
    first = re.match(r'(?:[^,\[]|\[[^\]]*\])*', nodes)[0]
    return re.sub(r'\[(\d+)[^\]]*\]', r'\1', first)


def port_of(variables: Variables) -> int:
    """A port that the processes agree on without a word, and that others on their host hardly have."""
    own = ('SLURM_JOB_ID', 'SLURM_STEP_ID') if variables.launcher == 'srun' else START_IDS
    words = values_of(own) or [*values_of(JOB_IDS), os.getcwd(), *sys.argv]
    return PORTS[zlib.crc32('\0'.join(words).encode()) % len(PORTS)]


def values_of(names: tuple) -> list:
    return [os.environ[name] for name in names if name in os.environ]


def integer_from_environment(name: str, *, low: int = 0, high: Optional[int] = None, default: Optional[int] = None
                             ) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal() or int(value) < low or (high is not None and int(value) > high):
        raise InputError(f'{name}={value} in the environment: must be an integer from {low} on'
                         + ('' if high is None else f' to {high}'))
    return int(value)
