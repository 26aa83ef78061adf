"""Launchers, exit codes of programs, and runs without TensorBoard."""
import errno
import json
import os
import subprocess
import sys
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
    """Return (rank, world size, local rank, address), or None."""
    process = launch.find_launch(world_size=1, dist_url='env://')
    return process and (process.rank, process.world_size, process.local_rank, process.address)


@pytest.fixture
def environment(monkeypatch):
    """Function that sets variables in an environment without those of any launcher."""
    for name in (*os.environ,):
        if name.startswith(('SLURM', 'OMPI', 'PMI', 'MPI', 'MASTER', 'RANK', 'WORLD', 'LOCAL')):
            monkeypatch.delenv(name)

    def set_all(variables: str):
        for assignment in variables.split():
            monkeypatch.setenv(*assignment.split('='))

    return set_all


# ----- launchers

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
    (OMPI + '4', (3, 4, 3, '127.0.0.1')),
    (OMPI + '2 SLURM_JOB_NODELIST=n[5-6]', (3, 4, 3, 'n5')),
    # mpirun in a job: mpirun starts one helper per node by srun
    (OMPI + '4 SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2', (3, 4, 3, '127.0.0.1')),
    ('PMI_RANK=1 PMI_SIZE=2 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2', (1, 2, 1, '127.0.0.1')),
    ('RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=here MASTER_PORT=1 ' + STEP, (0, 2, 0, 'here')),  # torchrun in srun
])
def test_ranks_are_recognised(environment, variables, expected):
    """Ranks and first host are found for each launcher; RANK and MASTER_ADDR take precedence."""
    environment(variables)
    assert find() == expected
    assert launch.environment_rank() == expected[0]


@pytest.mark.parametrize('variables', [
    'SLURM_JOB_ID=7 SLURM_PROCID=0 SLURM_NTASKS=8 SLURM_LOCALID=0 SLURM_JOB_NODELIST=n[1-2]',  # a batch script
    'SLURM_JOB_ID=7 SLURM_NTASKS=8',  # a shell of salloc
    'SLURM_JOB_ID=7 SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_STEP_NUM_TASKS=1',  # srun -n 1
    # a batch script, submitted by a process of another job
    'SLURM_JOB_ID=8 SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_STEP_NUM_TASKS=4',
    'OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=1', 'PMI_RANK=0 PMI_SIZE=1', 'MASTER_ADDR=here MASTER_PORT=1', '',
])
def test_one_process_stays_alone(environment, variables):
    """A single process stays alone in spite of a launcher's variables."""
    environment(variables)
    assert find() is None
    assert launch.environment_rank() == 0


def test_shell_of_srun_is_one_process(environment, monkeypatch):
    """A process in a shell of `srun --pty` runs alone, unlike processes of a further srun, which have no terminal."""
    environment(STEP.replace('PROCID=3', 'PROCID=0') + 'SLURM_PTY_PORT=4711 PMI_RANK=0 PMI_SIZE=4')
    monkeypatch.setattr(launch, 'has_terminal', lambda: True)
    assert find() is None
    monkeypatch.setattr(launch, 'has_terminal', lambda: False)
    assert find() == (0, 4, 1, '127.0.0.1')


@pytest.mark.parametrize(('variables', 'message'), [
    ('OMPI_COMM_WORLD_RANK=2 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=0 OMPI_COMM_WORLD_LOCAL_SIZE=2',
     'Open MPI has started 4 processes on several hosts: set MASTER_ADDR to the first host .* torchrun'),
    ('PMI_RANK=1 PMI_SIZE=4 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2', 'mpirun has started 4 processes .* MASTER_ADDR'),
    (OMPI.replace('RANK=3', 'RANK=4', 1) + '4', 'OMPI_COMM_WORLD_RANK=4 in the environment: must be .* <= 3'),
    (STEP + 'MASTER_PORT=x', 'MASTER_PORT=x in the environment'),
])
def test_unknown_or_invalid_meeting_points_are_refused(environment, variables, message):
    """An unknown first host or an invalid variable is an error with the remedy."""
    environment(variables)
    with pytest.raises(InputError, match=message):
        find()


def test_port_is_that_of_the_start(environment, monkeypatch):
    """All processes of a SLURM step use one port, the next step uses another; MASTER_PORT takes precedence."""
    def port(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return launch.find_launch(world_size=1, dist_url='env://').port

    environment(STEP)
    assert port() == port(SLURM_PROCID='0', SLURM_LOCALID='0') != port(SLURM_STEP_ID='1')
    assert port(MASTER_PORT='2345') == 2345


def test_mpirun_trains_together(data, tmp_path):
    """Two processes with Open MPI's variables train one model, and only rank 0 prints."""
    def variables(rank, world, port):
        return {'OMPI_COMM_WORLD_RANK': str(rank), 'OMPI_COMM_WORLD_LOCAL_RANK': str(rank),
                'OMPI_COMM_WORLD_SIZE': str(world), 'OMPI_COMM_WORLD_LOCAL_SIZE': str(world),
                'PMIX_NAMESPACE': f'test.{port}'}

    command = [ROOT / 'main.py', *tiniest(data), '--epochs', '1', '--output-dir', tmp_path / 'run']
    (first, out, err), (second, out_1, _) = finish(start(command, 2, variables))
    assert (first, second) == (0, 0), err
    assert out.startswith('2 processes started by Open MPI work together\n')
    assert out_1 == ''
    assert json.loads((tmp_path / 'run' / 'args.json').read_text())['derived']['processes'] == 2


# ----- the end of a program

def ended(code: str, *argv: str) -> tuple:
    """Return (exit code, stdout, stderr) of `run_program(program)` after code that defines `program`."""
    (result,) = finish(start(['-c', f'{code}\nfrom run.commandline import run_program\nrun_program(program)', *argv],
                             1, lambda *_: {}))
    return result


def test_ctrl_c_in_a_program_is_not_an_error():
    """Ctrl-C ends a program with one line, without the word error, and exit code 130."""
    assert ended('def program(): raise KeyboardInterrupt') == (130, '', '-c: interrupted\n')


def test_reason_of_a_failed_run_is_one_line():
    """A run that can't continue ends with one line on stderr and exit code 1."""
    code = 'from utils import RunStopped\ndef program(): raise RunStopped("the disk is full")'
    assert ended(code) == (1, '', '-c: error: the disk is full\n')


def test_a_stop_signal_is_not_an_error():
    """A run that a signal stopped ends with one line, without the word error, and exit code 128 + N."""
    code = 'from utils import Interrupted\ndef program(): raise Interrupted(15, "SIGTERM: stopped at epoch 3, step 4")'
    assert ended(code) == (143, '', '-c: SIGTERM: stopped at epoch 3, step 4\n')


def cut_off(command: list, last: str) -> tuple:
    """Return exit code and stderr of a program after its stdout was closed at a line that starts with `last`."""
    process = subprocess.Popen(list(map(str, [sys.executable, *command])), cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True,
                               env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': ''})
    while not process.stdout.readline().startswith(last):
        pass
    process.stdout.close()
    err = process.stderr.read()
    return process.wait(timeout=60), err


def test_training_into_head_is_stored(data, tmp_path):
    """`main.py | head` ends silently with exit code 141, and the run resumes at its last step."""
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
    """A tool whose reader closes the pipe ends silently with exit code 141, also if its output was buffered."""
    code = ('import time, run.commandline\ndef program():\n    print("word", flush=True)\n    time.sleep(.3)\n'
            f'    {end}\nrun.commandline.run_program(program)')
    assert cut_off([*flags, '-c', code], 'word') == (141, '')


def test_another_pipe_that_breaks_is_an_error():
    """A broken pipe between processes is an error, unlike a closed stdout."""
    status, _, err = ended('def program(): raise BrokenPipeError("of a worker")')
    assert status == 1
    assert 'BrokenPipeError: of a worker' in err


# ----- runs without TensorBoard

def missing(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    return 'import of torch.utils.tensorboard halted'


def broken(monkeypatch):
    def fail(*_, **__):
        raise TypeError('Descriptors cannot be created directly')

    monkeypatch.setattr('torch.utils.tensorboard.SummaryWriter', fail)
    return 'Descriptors cannot be created directly'


def full(monkeypatch):
    """Fill the disk from the second event on, which TensorBoard's own thread writes."""
    writes, write = [], RecordWriter.write

    def fail(self, data):
        writes.append(data)
        if len(writes) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    monkeypatch.setattr(RecordWriter, 'write', fail)
    return 'No space left on device'


@pytest.mark.parametrize('fault', [missing, broken, full])
def test_run_continues_without_tensorboard(data, tmp_path, monkeypatch, capfd, fault):
    """A failure of TensorBoard is logged once with its reason; log and checkpoints are complete."""
    reason = fault(monkeypatch)
    main(tiniest(data, '--output-dir', str(tmp_path)))
    out, err = capfd.readouterr()
    message, = [line for line in out.splitlines() if 'TensorBoard' in line]
    assert message.startswith(f'{tmp_path}/tb: no more files for TensorBoard ({reason}')
    assert 'Traceback' not in err
    assert [json.loads(line)['epoch'] for line in (tmp_path / 'log.txt').read_text().splitlines()] == [0, 1]
    assert torch.load(tmp_path / 'checkpoint.pth', weights_only=True)['epoch'] == 1


# ----- programs started as files

PROGRAMS = [path for folder in ('dino', 'segmentation', 'tools') for path in sorted(ROOT.glob(f'{folder}/*.py'))
            if "__name__ == '__main__'" in path.read_text()]
AS_FILE = '''
import runpy, sys
root, *files = sys.argv[1:]
for file in files:
    sys.path[0] = file.rpartition('/')[0]  # as Python does for `python FILE`
    runpy.run_path(file)
    assert sys.path[0] == root, file
'''


def outside(command: list, folder: Path) -> subprocess.CompletedProcess:
    """Run a command in a folder, without the repository among the places of modules."""
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    return subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True,
                          timeout=120)


def test_every_program_starts_as_a_file(tmp_path):
    """`python dino/train.py` and the like find their modules, from any folder, and not those of their own folder."""
    assert len(PROGRAMS) > 10
    result = outside([sys.executable, '-c', AS_FILE, ROOT, *PROGRAMS], tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize('launcher', [[sys.executable], [sys.executable, '-m', 'torch.distributed.run',
                                                         '--standalone', '--nproc_per_node', '2']])
def test_training_runs_as_a_file(data, tmp_path, launcher):
    """`python dino/train.py` and `torchrun dino/train.py` train, with loading workers, which import the file again."""
    result = outside([*launcher, ROOT / 'dino' / 'train.py', '--arch', 'xcit_nano_12_p16', '--data-path', data,
                      '--epochs', '1', '--warmup-epochs', '0', '--batch-size', '4', '--out-dim', '16', '--device',
                      'cpu', '--global-crops-size', '32', '--local-crops-number', '0', '--num-workers', '1',
                      '--output-dir', 'run'], tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / 'run' / 'backbone.pth').exists()
