"""How processes that were started together find out that they were, and how a program starts and ends."""
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiniest, tiny, write_folders
from processes import finish, start
from tensorboard.summary.writer.record_writer import RecordWriter

from main import main
from run import launch
from utils import InputError


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    return write_folders(tmp_path_factory.mktemp('data'))


def find() -> tuple:
    """(rank, world size, local rank, address), or None."""
    found = launch.find_launch(world_size=1, dist_url='env://')
    return found and (found.rank, found.world_size, found.local_rank, found.address)


@pytest.fixture
def environment(monkeypatch):
    """Sets variables in an environment that has none of any launcher."""
    for name in (*os.environ,):
        if name.startswith(('SLURM', 'OMPI', 'PMI', 'MV2', 'MPI', 'MASTER', 'RANK', 'WORLD', 'LOCAL')):
            monkeypatch.delenv(name)

    def set_all(variables: str):
        for name, value in (word.split('=') for word in variables.split()):
            monkeypatch.setenv(name, value)

    return set_all


# ----- which processes there are

STEP = 'SLURM_JOB_ID=7 SLURM_STEP_ID=0 SLURM_PROCID=3 SLURM_NTASKS=4 SLURM_STEP_NUM_TASKS=4 SLURM_LOCALID=1 '
OMPI = 'OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=3 OMPI_COMM_WORLD_LOCAL_SIZE='


@pytest.mark.parametrize(('variables', 'expected'), [
    (STEP + 'SLURM_STEP_NODELIST=node1 SLURM_STEP_NUM_NODES=1', (3, 4, 1, '127.0.0.1')),
    (STEP + 'SLURM_STEP_NODELIST=node[01-03,07] SLURM_JOB_NODELIST=a[1-9]', (3, 4, 1, 'node01')),
    (STEP + 'SLURM_STEP_NODELIST=b2,a[1-2]', (3, 4, 1, 'b2')),
    (STEP + 'SLURM_STEP_NODELIST=rack[2-3]n[04,6-9]-ib', (3, 4, 1, 'rack2n04-ib')),
    (STEP + 'SLURM_STEP_NODELIST=n[1-2] MASTER_ADDR=10.0.0.1', (3, 4, 1, '10.0.0.1')),
    (STEP + 'PMI_RANK=3 PMI_SIZE=4 PMIX_RANK=3', (3, 4, 1, '127.0.0.1')),
    (STEP.replace('SLURM_NTASKS=4', ''), (3, 4, 1, '127.0.0.1')),
    (STEP.replace('SLURM_STEP_NUM_TASKS=4', ''), (3, 4, 1, '127.0.0.1')),
    (OMPI + '4', (3, 4, 3, '127.0.0.1')),
    (OMPI + '2 SLURM_JOB_NODELIST=n[5-6]', (3, 4, 3, 'n5')),
    # mpirun in a job, which starts its helpers by srun, one a node
    (OMPI + '4 SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2', (3, 4, 3, '127.0.0.1')),
    ('PMI_RANK=1 PMI_SIZE=2 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2', (1, 2, 1, '127.0.0.1')),
    ('PMI_RANK=1 PMI_SIZE=2 MPI_LOCALRANKID=1', (1, 2, 1, '127.0.0.1')),
    ('PMI_RANK=1 PMI_SIZE=2 MASTER_ADDR=here', (1, 2, None, 'here')),
    ('PMI_RANK=1 PMI_SIZE=2 PMI_LOCAL_RANK=1 PMI_LOCAL_SIZE=2', (1, 2, 1, '127.0.0.1')),
    ('MV2_COMM_WORLD_RANK=1 MV2_COMM_WORLD_SIZE=2 MV2_COMM_WORLD_LOCAL_RANK=1', (1, 2, 1, '127.0.0.1')),
    ('PMIX_RANK=1 WORLD_SIZE=2 MASTER_ADDR=here', (1, 2, None, 'here')),
    ('RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=here MASTER_PORT=1 ' + STEP, (0, 2, 0, 'here')),  # torchrun in srun
])
def test_ranks_are_recognised(environment, variables, expected):
    """Of each launcher, with the first host where they are on several; MASTER_ADDR and RANK come first."""
    environment(variables)
    assert find() == expected
    assert launch.rank() == expected[0]


@pytest.mark.parametrize('variables', [
    'SLURM_JOB_ID=7 SLURM_PROCID=0 SLURM_NTASKS=8 SLURM_LOCALID=0 SLURM_JOB_NODELIST=n[1-2]',  # a batch script
    'SLURM_JOB_ID=7 SLURM_NTASKS=8',  # the shell of salloc
    'SLURM_JOB_ID=7 SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_STEP_NUM_TASKS=1',  # srun -n 1
    # a batch script that a process of another job has submitted
    'SLURM_JOB_ID=8 SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_STEP_NUM_TASKS=4',
    'OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=1', 'PMI_RANK=0 PMI_SIZE=1', 'MASTER_ADDR=here MASTER_PORT=1', '',
])
def test_one_process_stays_alone(environment, variables):
    """Where the variables of a launcher are there, but one process is all it has started."""
    environment(variables)
    assert find() is None
    assert launch.rank() == 0


def test_shell_of_srun_is_one_process(environment, monkeypatch):
    """What is typed there has a terminal; what srun starts from there has none."""
    environment(STEP.replace('PROCID=3', 'PROCID=0') + 'SLURM_PTY_PORT=4711 PMI_RANK=0 PMI_SIZE=4')
    monkeypatch.setattr(launch, 'has_terminal', lambda: True)
    assert find() is None
    monkeypatch.setattr(launch, 'has_terminal', lambda: False)
    assert find() == (0, 4, 1, '127.0.0.1')


@pytest.mark.parametrize(('variables', 'message'), [
    ('OMPI_COMM_WORLD_RANK=2 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=0 OMPI_COMM_WORLD_LOCAL_SIZE=2',
     'Open MPI has started 4 processes .* set MASTER_ADDR to the first host .* torchrun'),
    ('PMI_RANK=1 PMI_SIZE=2', 'has started 2 processes .* MASTER_ADDR'),
    ('PMIX_RANK=1', 'PMIX_RANK is set, but WORLD_SIZE is not: start the processes with torchrun'),
    ('OMPI_COMM_WORLD_RANK=4 OMPI_COMM_WORLD_SIZE=4 MASTER_ADDR=here', 'OMPI_COMM_WORLD_RANK=4 in the environment'),
    (STEP + 'MASTER_PORT=x', 'MASTER_PORT=x in the environment'),
])
def test_processes_that_cannot_meet_are_refused(environment, variables, message):
    """In one sentence that says how to start."""
    environment(variables)
    with pytest.raises(InputError, match=message):
        find()


def test_port_is_that_of_the_start(environment, monkeypatch):
    """The same for all processes of a step, another one for the next step; MASTER_PORT comes first."""
    def port(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return launch.find_launch(world_size=1, dist_url='env://').port

    environment(STEP)
    assert port() == port(SLURM_PROCID='0', SLURM_LOCALID='0') != port(SLURM_STEP_ID='1')
    assert port(MASTER_PORT='2345') == 2345


def test_mpirun_trains_together(data, tmp_path):
    """Two processes that know Open MPI's variables alone: one training, one that speaks."""
    def variables(rank, world, port):
        number, size = str(rank), str(world)
        return {'OMPI_COMM_WORLD_RANK': number, 'OMPI_COMM_WORLD_SIZE': size, 'OMPI_COMM_WORLD_LOCAL_RANK': number,
                'OMPI_COMM_WORLD_LOCAL_SIZE': size, 'PMIX_NAMESPACE': f'test.{port}', 'PMIX_RANK': number}

    command = [ROOT / 'main.py', *tiniest(data), '--epochs', '1', '--output-dir', tmp_path / 'run']
    (first, out, err), (second, silent, _) = finish(start(command, 2, variables))
    assert (first, second) == (0, 0), err
    assert out.startswith('Open MPI has started 2 processes, which work together\n')
    assert silent == ''
    assert json.loads((tmp_path / 'run' / 'args.json').read_text())['derived']['processes'] == 2


# ----- how a program starts and ends

PROGRAMS = [['main.py'], ['run_with_submitit.py', '--dry-run'], ['-m', 'tools.predict', '--help']]


@pytest.mark.parametrize('program', PROGRAMS, ids=' '.join)
def test_ctrl_c_while_the_libraries_are_loaded(program):
    """One line, and exit code 130; not a traceback of imports."""
    process = subprocess.Popen([sys.executable, *program], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    time.sleep(.7)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    name = program[0] if program[0] != '-m' else 'predict.py'
    assert (process.returncode, err) == (128 + signal.SIGINT, f'{name}: interrupted\n')


def test_import_leaves_ctrl_c_alone():
    """In a program of somebody else, which imports one of these, it stays Python's."""
    code = 'import signal, main; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler'
    (status, _, err), = finish(start(['-c', code], 1))
    assert (status, err) == (0, '')


def ended(code: str, *argv: str) -> tuple:
    """(exit code, stdout, stderr) of `run_program(program)` after some lines of code that define `program`."""
    (result,) = finish(start(['-c', f'{code}\nfrom run.commandline import run_program\nrun_program(program)', *argv],
                             1, lambda *_: {}))
    return result


def test_ctrl_c_in_a_program_is_no_error():
    """It is answered in one line without the word, and with exit code 130."""
    assert ended('def program(): raise KeyboardInterrupt') == (130, '', '-c: interrupted\n')


def test_a_stop_is_no_error():
    """Nor is a signal that a run was stopped by, with its state stored."""
    code = 'from utils import Interrupted\ndef program(): raise Interrupted(15, "SIGTERM: stopped at epoch 3, step 4")'
    assert ended(code) == (143, '', '-c: SIGTERM: stopped at epoch 3, step 4\n')


def cut_off(command: list, last: str) -> tuple:
    """Exit code and stderr of a program whose output is read up to a line that starts with `last`."""
    process = subprocess.Popen(list(map(str, [sys.executable, *command])), cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True,
                               env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': ''})
    while not process.stdout.readline().startswith(last):
        pass
    process.stdout.close()
    err = process.stderr.read()
    return process.wait(timeout=60), err


def test_training_into_head_is_stored(data, tmp_path):
    """`main.py | head`: exit code 141 and not a word, and the run goes on from the step at which it was."""
    run = tmp_path / 'run'
    command = tiny(data, '--epochs', '50', '--output-dir', str(run))
    assert cut_off(['main.py', *command], 'Epoch 0 ') == (141, '')
    stored = torch.load(run / 'checkpoint.pth', weights_only=True)
    assert stored['step'] > 0
    assert stored['epoch'] < 49
    main([*command, '--epochs', str(stored['epoch'] + 2), '--resume', 'auto'])


@pytest.mark.parametrize(('flags', 'end'), [([], 'print("more")'), (['-u'], 'for _ in range(9): print("more")')],
                         ids=['buffered', 'unbuffered'])
def test_tool_into_head(flags, end):
    """The same for what prints without looking, also if Python only writes it as the program ends."""
    code = ('import time, run.commandline\ndef program():\n    print("word", flush=True)\n    time.sleep(.3)\n'
            f'    {end}\nrun.commandline.run_program(program)')
    assert cut_off([*flags, '-c', code], 'word') == (141, '')


def test_another_pipe_that_breaks_is_an_error():
    """A pipe between processes says something of the program, not of who reads its output."""
    status, _, err = ended('def program(): raise BrokenPipeError("of a worker")')
    assert status == 1
    assert 'BrokenPipeError: of a worker' in err


# ----- TensorBoard, without which a run goes on

def missing(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    return 'import of torch.utils.tensorboard halted'


def broken(monkeypatch):
    def fail(*_, **__):
        raise TypeError('Descriptors cannot be created directly')

    monkeypatch.setattr('torch.utils.tensorboard.SummaryWriter', fail)
    return 'Descriptors cannot be created directly'


def full(monkeypatch):
    """Its disk is, from the second event on: what the writer's own thread meets."""
    writes, write = [], RecordWriter.write

    def fail(self, data):
        writes.append(data)
        if len(writes) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    monkeypatch.setattr(RecordWriter, 'write', fail)
    return 'No space left on device'


@pytest.mark.parametrize('fault', [missing, broken, full])
def test_training_goes_on_without_tensorboard(data, tmp_path, monkeypatch, capfd, fault):
    """One notice with the reason; log and checkpoints are as ever."""
    reason = fault(monkeypatch)
    main(tiniest(data, '--output-dir', str(tmp_path)))
    out, err = capfd.readouterr()
    notice, = [line for line in out.splitlines() if 'TensorBoard' in line]
    assert notice.startswith(f'{tmp_path}/tb: there will be no more files for TensorBoard ({reason}')
    assert 'Traceback' not in err
    assert [json.loads(line)['epoch'] for line in (tmp_path / 'log.txt').read_text().splitlines()] == [0, 1]
    assert torch.load(tmp_path / 'checkpoint.pth', weights_only=True)['epoch'] == 1
