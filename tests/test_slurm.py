"""Jobs of run_with_submitit.py, with a real SLURM of two nodes on this machine and without SLURM."""
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import submitit
import torch
from conftest import tiny, write_folders

import run_with_submitit
from run_with_submitit import main
from slurm.cluster import ENDED, job_exit_code, job_state, query
from slurm.following import has_succeeded
from slurm.job import NotRequeued, Task
from slurm.submission import outside_any_job
from utils import InputError

ROOT = Path(__file__).parent.parent
DAEMONS = ('munged', 'slurmctld', 'slurmd')


def free_ports(count: int) -> int:
    """Return the first of several consecutive free ports."""
    while True:
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            first = probe.getsockname()[1]
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(('', port))
            return first
        except OSError:
            continue


@pytest.fixture(scope='session')
def slurm_conf():
    """Path of the slurm.conf of a cluster of two nodes with 4 CPUs and 2 fake GPUs each, without accounting."""
    missing = [name for name in DAEMONS if not shutil.which(name, path=f'{os.environ["PATH"]}:/usr/sbin:/sbin')]
    if missing:
        message = f'{", ".join(missing)} not found: apt-get install slurm-wlm munge'
        pytest.fail(message) if os.environ.get('REQUIRE_SLURM') == '1' else pytest.skip(message)
    base = Path(tempfile.mkdtemp(prefix='slurm-', dir='/tmp'))  # short, as start-slurm.sh needs it
    try:
        subprocess.run([ROOT / 'tests/slurm/start-slurm.sh', base, str(free_ports(3))], check=True)
        yield base / 'slurm.conf'
    finally:
        subprocess.run([ROOT / 'tests/slurm/stop-slurm.sh', base], check=True)
        shutil.rmtree(base)


@pytest.fixture
def cluster(slurm_conf, monkeypatch):
    """Environment in which SLURM's commands find the cluster."""
    monkeypatch.setenv('SLURM_CONF', str(slurm_conf))


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    return write_folders(tmp_path_factory.mktemp('data'))


def job_flags(data: Path, base: Path, *more: str) -> list:
    """Return the flags of a tiny run with one CPU process on each of two nodes, and its folder in `base`."""
    return [*tiny(data), '--ngpus', '0', '--timeout', '5', '--job-dir', f'{base}/%j', *more]


def submit(capsys, flags: list):
    """Submit without waiting; return the job's id and folder."""
    assert main(flags) == 0
    printed = capsys.readouterr().out
    return re.match(r'Job (\d+) ', printed)[1], Path(re.search(r'logs: +(.*)/', printed)[1])


def wait_for(condition, seconds: float = 90):
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f'not within {seconds} s'
        time.sleep(.1)
    return result


def end_of(job_id: str) -> str:
    """Wait for the end of a job; return its state."""
    wait_for(lambda: job_state(job_id)[0] in ENDED, 300)
    return job_state(job_id)[0]


def log_of(folder: Path, rank: int = 0) -> str:
    return next(folder.glob(f'*_{rank}_log.out')).read_text()


def epochs_of(output_dir: Path) -> list:
    return [json.loads(line)['epoch'] for line in (output_dir / 'log.txt').read_text().splitlines()]


def stops_of(log: str) -> list:
    """Return the positions of a job's stops; check that the job resumed there."""
    stopped = re.findall(r'stopped at (epoch \d+, step \d+)', log)
    assert re.findall(r'resumes at (epoch \d+, step \d+)', log) == stopped
    return stopped


def restarts_of(job_id: str) -> int:
    return int(re.search(r'Restarts=(\d+)', query('scontrol', 'show', 'job', job_id)[1])[1])


def processes(**variables: str):
    """Yield the ids of main.py's processes with these environment variables."""
    for entry in Path('/proc').iterdir():
        try:
            command = (entry / 'cmdline').read_bytes().decode().split('\0')
            environment = (entry / 'environ').read_bytes().decode(errors='replace').split('\0')
        except (OSError, ValueError):  # not a process, another user's, or ended
            continue
        if str(ROOT / 'main.py') in command and {f'{k}={v}' for k, v in variables.items()} <= set(environment):
            yield int(entry.name)


def job_processes(job_id: str, **variables: str):
    """Yield the ids of main.py's processes in a job of the tests' cluster; ids of other clusters' jobs may be equal."""
    return processes(SLURM_CONF=os.environ['SLURM_CONF'], SLURM_JOB_ID=job_id, **variables)


# ----- the command line

def test_dry_run_prints_the_script_and_submits_nothing(tmp_path, monkeypatch, capsys):
    """--dry-run translates each flag into an option of sbatch, makes no folder and needs no SLURM."""
    monkeypatch.setenv('PATH', str(tmp_path))
    job_dir = tmp_path / 'runs' / '%j'
    assert main(['--dry-run', '--nodes', '3', '--ngpus', '4', '--cpus-per-task', '6', '--mem-gb', '1.5',
                 '--timeout', '90', '--partition', 'p', '--use-volta32', '--account', 'a', '--qos', 'q',
                 '--comment', 'it\'s due', '--exclude', 'n1,n2', '--setup', 'module load cuda', '--setup',
                 'ulimit -c 0', '--job-dir', str(job_dir)]) == 0
    script = capsys.readouterr().out
    for option in ('nodes=3', 'ntasks-per-node=4', 'gpus-per-node=4', 'cpus-per-task=6', 'mem=1536M', 'time=90',
                   'partition=p', 'constraint=volta32gb', 'account=a', 'qos=q', 'comment=\'it\'"\'"\'s due\'',
                   'exclude=n1,n2', 'signal=USR2@120', 'requeue', 'open-mode=append',
                   f'output={job_dir}/%j_0_log.out'):
        assert f'#SBATCH --{option}\n' in script
    setup, command = script.split('# setup\n')[1].split('# command\n')
    assert setup.splitlines()[:3] == ['module load cuda', 'ulimit -c 0', 'export PYTHONSAFEPATH=1 '
                                      f'PYTHONPATH={ROOT}${{PYTHONPATH:+:$PYTHONPATH}}']
    assert '--cpus-per-task=6' in command
    assert not job_dir.parent.exists()


@pytest.mark.parametrize(('flags', 'pieces'), [
    (['--model', 'xcit_smal_12_p16'], ['--model xcit_smal_12_p16', 'similar: xcit_small_12_p16']),
    (['--opt', 'adamwww', '--ngpus', '0'], ['--opt adamwww']),
    (['--no-such-flag'], ['--no-such-flag']),
    (['--nodes', '0'], ['--nodes', 'an integer >= 1']),
    (['--ngpus', '-1'], ['--ngpus', 'an integer >= 0']),
    (['--mem-gb', '0'], ['--mem-gb', 'a number > 0']),
    (['--timeout', '1.5'], ['--timeout', 'an integer >= 1']),
    (['--cluster', 'pbs'], ['--cluster', 'auto', 'slurm', 'local']),
    (['--ngpus', '8', '--device', 'cpu'], ['--device cpu', '--ngpus 8']),
    (['--ngpus', '0', '--device', 'cuda'], ['--device cuda', '--ngpus 0']),
    (['--ngpus', '0', '--amp', 'fp16'], ['--amp fp16', 'cuda']),
    (['--ngpus', '8', '--tasks-per-node', '4'], ['--tasks-per-node 4', '--ngpus 8']),
    (['--use-volta32', '--constraint', 'a100'], ['--use-volta32', 'a100']),
    (['--job-dir', 'runs/%u'], ['--job-dir runs/%u', '%j']),
    (['--output-dir', 'runs/%u'], ['--output-dir runs/%u', '%j']),
    (['--job-dir', __file__ + '/%j', '--ngpus', '0', '--cluster', 'local'], ['--job-dir', 'is not a writable']),
    (['--dry-run', '--cluster', 'local'], ['--dry-run', '--cluster local']),
    (['--cluster', 'local', '--nodes', '1000'], ['--nodes 1000 --ngpus 8', '--ngpus 0']),
])
def test_bad_flags_are_refused_before_submission(flags, pieces, tmp_path, monkeypatch):
    """The error is one line with the flag, its value and the allowed values, for flags of main.py and of the job."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        main(flags)
    assert '\n' not in str(caught.value)
    for piece in pieces:
        assert piece in str(caught.value)
    assert not list(tmp_path.glob('runs/*'))


def test_program_prints_one_line_and_exits_with_2(tmp_path):
    """A bad flag causes no traceback and no output on stdout."""
    result = subprocess.run([sys.executable, ROOT / 'run_with_submitit.py', '--model', 'resnet', '--dry-run'],
                            cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, '')
    assert re.fullmatch(r'run_with_submitit.py: error: --model resnet: no such model.*\n', result.stderr)


def test_help_names_the_flags_of_both(capsys):
    """--help lists flags of main.py and of the job, and the requirement for --job-dir."""
    with pytest.raises(SystemExit):
        main(['--help'])
    text = ' '.join(capsys.readouterr().out.split())
    assert '--drop-path FRACTION' in text
    assert '--max-restarts N' in text
    assert 'must be on a file system that all nodes share; %j is the job\'s id (default: ./runs/%j)' in text


@pytest.mark.parametrize('command', [
    # from its README
    '--partition P --nodes 2 --ngpus 8 --model xcit_small_12_p16 --batch-size 64 --drop-path 0.05 --job_dir {} '
    '--epochs 400',
    # all other flags of its program
    '--ngpus 8 --nodes 2 --timeout 2800 --job_dir {} --partition learnfair --use_volta32 --comment icml'])
def test_commands_of_the_original(command, tmp_path, capsys):
    """Command lines of the original work unchanged."""
    assert main(['--dry-run', *command.format(tmp_path / 'jobs').split()]) == 0
    script = capsys.readouterr().out
    assert '--nodes=2' in script
    assert '--gpus-per-node=8' in script
    assert ('--constraint=volta32gb' in script) == ('volta32' in command)


def test_program_can_be_another(tmp_path, data, capsys):
    """--program MODULE runs another program, and its flags are checked."""
    flags = ['--program', 'tests.rotation_training', '--dry-run', '--ngpus', '0', '--job-dir', str(tmp_path / 'jobs'),
             '--data_path', str(data / 'train')]
    assert main([*flags, '--iterations', '7']) == 0
    script = capsys.readouterr().out
    assert 'job-name=tests.rotation_training\n' in script
    assert f'python -u -m tests.rotation_training --data_path {data}/train --iterations 7 --device cpu' in script
    with pytest.raises(InputError, match='--iterations'):
        main([*flags, '--iterations', '0'])


@pytest.mark.parametrize(('program', 'message'), [
    ('dino.trian', 'no such module'), ('../x', 'no such module'),
    ('utils', 'must have the functions parse_args and main')])
def test_unknown_program(program, message):
    """Names of missing modules and of modules that are not programs are refused before submission."""
    with pytest.raises(InputError, match=f'--program {program}: {message}'):
        main(['--program', program, '--dry-run'])


def test_help_shows_both(capsys):
    """--help exits with 0 and lists flags of the job and of the program."""
    with pytest.raises(SystemExit) as ended:
        main(['--help'])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert '--partition NAME' in out
    assert '--warmup-epochs N' in out


def test_gpu_flags_do_not_need_a_gpu_here(capsys):
    """GPU flags are accepted on a machine without GPU."""
    assert main(['--ngpus', '8', '--device', 'cuda', '--amp', 'fp16', '--dry-run']) == 0


def test_original_command_line_of_dino_is_accepted(tmp_path, capsys):
    """DINO's original command line is accepted, fp16 included."""
    assert main(['--program', 'dino.train', '--dry-run', '--ngpus', '8', '--nodes', '2', '--use_fp16', 'true',
                 '--arch', 'xcit_small_12_p16', '--data_path', str(tmp_path), '--job-dir', str(tmp_path / 'jobs')]) == 0
    assert '-m dino.train --use_fp16 true --arch xcit_small_12_p16' in capsys.readouterr().out


def test_paths_of_a_job_are_absolute(tmp_path, monkeypatch, capsys):
    """Relative paths of the program, in a file of --config too, are absolute in the script; names of weights stay."""
    monkeypatch.chdir(write_folders(tmp_path / 'a b').parent)
    (tmp_path / 'c.yaml').write_text('data-path: a b\nfeatures-dir: kept\n')
    torch.save({'model': {}}, tmp_path / 'w.pth')
    common = ['--dry-run', '--ngpus', '0', '--data-set', 'FOLDER']
    assert main([*common, '--data_path=a b', '--pretrained', 'w.pth', '--model', 'xcit_nano_12_p16']) == 0
    line = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert {f'--data_path={tmp_path}/a b', f'{tmp_path}/w.pth', f'{tmp_path}/runs/%j'} <= set(line)
    assert main([*common, '--data-path', 'a b', '--model', 'xcit_nano_12_p16', '--pretrained', 'fb_dist_in1k']) == 0
    assert {f'{tmp_path}/a b', 'fb_dist_in1k'} <= set(shlex.split(capsys.readouterr().out.splitlines()[-1]))
    assert main([*common, '--program', 'dino.linear', '--config', 'c.yaml', '--pretrained', 'w.pth']) == 0
    assert {f'{tmp_path}/c.yaml', f'{tmp_path}/a b', f'{tmp_path}/kept'} <= set(
        shlex.split(capsys.readouterr().out.splitlines()[-1]))


@pytest.mark.parametrize(('flags', 'message'), [
    (['--data-path', 'nowhere'], '--data-path nowhere: no such directory'),
    (['--program', 'dino.train', '--data-path', '.', '--knn-every', '1', '--knn-data-path', 'no'],
     '--knn-data-path no: no such'),
    (['--program', 'dino.linear', '--train-features', 'a.npz', '--val-features', 'b.npz'],
     '--train-features a.npz: no such')])
@pytest.mark.parametrize('job', [['--dry-run'], ['--cluster', 'local']], ids=' '.join)
def test_missing_data_are_refused_before_submission(job, flags, message, tmp_path, monkeypatch):
    """Data that do not exist are refused, in a dry run and before a job; nothing is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        main([*job, '--ngpus', '0', *flags])
    assert not list(tmp_path.iterdir())


def test_missing_default_of_the_data_is_warned_about(capsys):
    """The default of --data-path, the original's cluster, is not refused but warned about, beside the script."""
    assert main(['--dry-run', '--ngpus', '0']) == 0
    assert '--data-path /datasets01/imagenet_full_size/061417/: no such directory (the default)' in \
        capsys.readouterr().err


def test_another_runs_directory_is_refused(tmp_path):
    """An --output-dir with a checkpoint is refused without --resume auto: a requeued job would resume from it."""
    (tmp_path / 'checkpoint.pth').touch()
    with pytest.raises(InputError, match=r'contains the checkpoint of another run; .* --resume auto'):
        main(['--dry-run', '--output-dir', str(tmp_path)])
    assert main(['--dry-run', '--output-dir', str(tmp_path), '--resume', 'auto']) == 0


# ----- jobs that complete

@pytest.fixture(scope='module')
def finished(slurm_conf, data, tmp_path_factory):
    """Exit code, output and folder of a run on two nodes with --wait."""
    base = tmp_path_factory.mktemp('runs')
    command = [sys.executable, ROOT / 'run_with_submitit.py', *job_flags(data, base, '--epochs', '1', '--wait')]
    result = subprocess.run(command, cwd=base, env={**os.environ, 'SLURM_CONF': str(slurm_conf)}, text=True,
                            stdout=subprocess.PIPE)
    return result.returncode, result.stdout, base


def test_two_nodes_train_to_the_end(finished):
    """With --wait the log is printed, the exit code is 0, and the processes of both nodes train one model in %j."""
    code, printed, base = finished
    job_id = re.match(r'Job (\d+) ', printed)[1]
    assert code == 0
    assert re.search(r'^ +0 +\d\.\d{4} ', printed, re.MULTILINE)  # the epoch's line of the table
    assert printed.endswith(f'Job {job_id}: COMPLETED\n')
    assert epochs_of(base / job_id) == [0]
    assert json.loads((base / job_id / 'args.json').read_text())['derived']['processes'] == 2
    assert [re.search(r' node=(\d)\(2\)', log_of(base / job_id, rank))[1] for rank in (0, 1)] == ['0', '1']


def test_nothing_is_left_beside_the_jobs_directory(finished):
    """Neither rendezvous nor submission leaves files outside the job's folder."""
    _, printed, base = finished
    job_id = re.match(r'Job (\d+) ', printed)[1]
    assert [path.name for path in base.iterdir()] == [job_id]
    names = {path.name for path in (base / job_id).iterdir() if path.name.startswith(job_id)}
    assert names == {f'{job_id}_{name}' for name in ('submission.sh', 'submitted.pkl', '0_log.out', '1_log.out',
                                                     '0_result.pkl', '1_result.pkl')}


def test_dry_run_prints_what_is_submitted(finished, data, capsys):
    """--dry-run prints the submitted script, line by line."""
    _, _, base = finished
    assert main(job_flags(data, base, '--dry-run')) == 0
    script, command = capsys.readouterr().out.split('\n# Each process runs: ')
    assert script.strip() == next(base.glob('*/*_submission.sh')).read_text().strip()
    assert command.startswith(f'python -u {ROOT / "main.py"} --model')


def test_processes_of_a_job_import_no_torch():
    """A job's own processes load the pickled task without torch, which each of them would load beside its rank."""
    code = f'import pickle, sys; task = pickle.loads({pickle.dumps(Task("main", [], "", 1, True, {}, ""))!r}); ' \
           'assert task.program == "main"; assert "torch" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


# ----- without the wrapper

def test_srun_starts_ranks_and_a_batch_script_one_process(cluster, data, tmp_path):
    """`srun python main.py` on two nodes is one run of two processes; without srun, one process runs alone."""
    script, train = tmp_path / 'job.sh', [sys.executable, ROOT / 'main.py', *tiny(data, '--epochs', '1')]
    script.write_text('#!/bin/bash\nset -e\nexport OMP_NUM_THREADS=1\n' + ''.join(
        f'{shlex.join(map(str, [*prefix, *train, "--output-dir", tmp_path / name]))}\n'
        for name, prefix in (('alone', []), ('ranks', ['srun']))))
    job_id = subprocess.run(['sbatch', '--parsable', '-N2', '-n2', '-o', tmp_path / 'log', script], check=True,
                            capture_output=True, text=True).stdout.strip()
    assert end_of(job_id) == 'COMPLETED', (tmp_path / 'log').read_text()
    derived = {name: json.loads((tmp_path / name / 'args.json').read_text())['derived'] for name in ('alone', 'ranks')}
    assert (derived['alone']['processes'], derived['ranks']['processes']) == (1, 2)
    assert '2 processes started by srun work together' in (tmp_path / 'log').read_text()


# ----- time limit and preemption

def assert_resumed_at_each_stop(job_id: str, folder: Path, epochs: int):
    """Check that each restart resumed at the step of the stop, each epoch ran once, and no failure was reported."""
    assert end_of(job_id) == 'COMPLETED', log_of(folder)
    assert len(stops_of(log_of(folder))) == restarts_of(job_id) > 0
    assert epochs_of(folder) == list(range(epochs))
    assert not list(folder.glob('*_failure.json'))


def test_time_limit_requeues_the_job(cluster, data, tmp_path, capsys):
    """At the signal before the limit all ranks stop; the same job restarts and resumes at that step."""
    job_id, folder = submit(capsys, job_flags(data, tmp_path, '--epochs', '5'))
    wait_for((folder / 'checkpoint.pth').exists)
    subprocess.run(['scancel', '--signal=USR2', job_id], check=True)  # as SLURM does before the time limit
    assert_resumed_at_each_stop(job_id, folder, 5)


@pytest.mark.slow
def test_sigterm_requeues_the_job(cluster, data, tmp_path, capsys):
    """SIGTERM, some clusters' only signal before preemption, requeues the job."""
    job_id, folder = submit(capsys, job_flags(data, tmp_path, '--epochs', '5'))
    wait_for((folder / 'checkpoint.pth').exists)
    subprocess.run(['scancel', '--signal=TERM', job_id], check=True)
    assert_resumed_at_each_stop(job_id, folder, 5)


@pytest.mark.slow
def test_real_time_limit_requeues_the_job(cluster, data, tmp_path, capsys):
    """A job with a limit of one minute is requeued and completes."""
    job_id, folder = submit(capsys, job_flags(data, tmp_path, '--epochs', '200', '--timeout', '1', '--nodes', '1'))
    wait_for(lambda: restarts_of(job_id), 120)
    assert_resumed_at_each_stop(job_id, folder, 200)


def test_preemption_requeues_the_job(cluster, data, tmp_path, capsys):
    """A job of a higher partition preempts the run, which stops, waits and resumes at the step of the stop."""
    job_id, folder = submit(capsys, job_flags(data, tmp_path, '--epochs', '5', '--nodes', '1'))
    wait_for((folder / 'checkpoint.pth').exists)
    urgent = subprocess.run(['sbatch', '--parsable', '-p', 'urgent', '-N2', '-n2', '-c4', '-o', '/dev/null', '--wrap',
                             'true'], check=True, capture_output=True, text=True).stdout.strip()
    assert end_of(urgent) == 'COMPLETED'
    assert job_state(job_id)[0] != 'COMPLETED'
    assert_resumed_at_each_stop(job_id, folder, 5)


def test_no_more_restarts_than_asked_for(cluster, data, tmp_path, capsys):
    """--max-restarts 0: at the limit the job stores its state, prints the resume command and fails with 140."""
    job_id, folder = submit(capsys, job_flags(data, tmp_path, '--epochs', '400', '--max-restarts', '0', '--nodes', '1'))
    wait_for((folder / 'checkpoint.pth').exists)
    subprocess.run(['scancel', '--signal=USR2', job_id], check=True)
    assert end_of(job_id) == 'FAILED'
    assert job_exit_code(job_id) == 128 + signal.SIGUSR2
    assert 'timed-out too many times' in log_of(folder)
    assert f'--output-dir {folder} --resume auto' in log_of(folder).splitlines()[-1]
    assert 'stored in' in log_of(folder)


def test_a_cluster_that_does_not_requeue(cluster, data, tmp_path, capsys):
    """Nodes without scontrol: at the time limit the state is stored, and the log ends with the resume command."""
    (tmp_path / 'bin').mkdir()
    for name in ('bash', 'srun', 'env'):
        (tmp_path / 'bin' / name).symlink_to(shutil.which(name))
    flags = job_flags(data, tmp_path, '--epochs', '400', '--nodes', '1', '--setup', f'PATH={tmp_path}/bin')
    job_id, folder = submit(capsys, flags)
    wait_for((folder / 'checkpoint.pth').exists)
    subprocess.run(['scancel', '--signal=USR2', job_id], check=True)
    assert end_of(job_id) == 'FAILED'
    assert job_exit_code(job_id) == 128 + signal.SIGUSR2
    assert 'stored in' in log_of(folder)
    *_, last = log_of(folder).splitlines()
    assert last == f'To resume: {shlex.join(["python", run_with_submitit.__file__, *flags])} ' \
                   f'--output-dir {folder} --resume auto'


@pytest.mark.parametrize('error', [
    FileNotFoundError(2, 'No such file or directory', 'scontrol'), subprocess.CalledProcessError(1, ['scontrol']),
    subprocess.TimeoutExpired(['scontrol'], 60)], ids=lambda error: type(error).__name__)
def test_requeues_that_fail(error, monkeypatch):
    """NotRequeued is raised without scontrol, if the cluster forbids requeues, and after a timeout."""
    def requeue(*_):
        raise error

    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        Task('main', [], '', 1, True, {}, '').catch_signals(local=False)
        with pytest.raises(NotRequeued, match='scontrol'):
            signal.raise_signal(signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)


# ----- jobs that fail

def when(condition, action) -> threading.Thread:
    """Start a thread that calls `action` with the result of `condition` as soon as it is true."""
    thread = threading.Thread(target=lambda: action(wait_for(condition)))
    thread.start()
    return thread


def test_task_of_an_earlier_version_keeps_its_timeout():
    """A pickled task whose timeout has its former name is restored with the timeout."""
    state = dict(vars(Task('main', [], '', 30, True, {}, '')))
    state['patience_s'] = state.pop('stop_timeout_s')
    task = Task.__new__(Task)
    task.__setstate__(state)
    assert task.stop_timeout_s == 30


def test_a_killed_rank_ends_the_job_with_its_code(cluster, data, tmp_path, capsys):
    """After SIGKILL of rank 1, with rank 0 stopped, --wait returns 137 within 20 s, and no process remains."""
    killed = []

    def kill(checkpoints):
        job_id = checkpoints[0].parent.name
        for rank, signum in (('0', signal.SIGSTOP), ('1', signal.SIGKILL)):
            os.kill(next(job_processes(job_id, RANK=rank)), signum)
        killed.append(time.monotonic())

    thread = when(lambda: list(tmp_path.glob('*/checkpoint.pth')), kill)
    assert main(job_flags(data, tmp_path, '--epochs', '400', '--wait')) == 128 + signal.SIGKILL
    thread.join()
    assert time.monotonic() - killed[0] < 20
    printed = capsys.readouterr().out
    job_id = re.match(r'Job (\d+) ', printed)[1]
    assert f'Job {job_id}: FAILED\n' in printed
    assert 'Rank 1: main.py ended with exit code 137\n' in printed.split(': FAILED\n')[1]
    assert not list(job_processes(job_id))


def test_cancelling_ends_the_wait(cluster, data, tmp_path, capsys):
    """--wait returns an error code after scancel."""
    thread = when(lambda: query('squeue', '-h', '-t', 'RUNNING', '-o', '%A')[1],
                  lambda job_id: subprocess.run(['scancel', job_id], check=True))
    assert main(job_flags(data, tmp_path, '--nodes', '1', '--wait')) != 0
    thread.join()
    assert ': CANCELLED\n' in capsys.readouterr().out


def test_mistakes_that_only_the_job_can_see_fail_it(cluster, tmp_path, capsys):
    """A job without its data fails with exit code 2 and main.py's error in the log."""
    (tmp_path / 'empty').mkdir()
    flags = job_flags(tmp_path / 'empty', tmp_path, '--ngpus', '1', '--nodes', '1', '--device', 'auto', '--wait')
    assert main(flags) == 2
    printed = capsys.readouterr().out
    assert 'main.py: error: ' in printed
    assert printed.endswith('Exit code 2\n')
    script = next(tmp_path.glob('*/*_submission.sh')).read_text()
    assert '#SBATCH --gpus-per-node=1\n' in script


# ----- requests that the cluster can't meet

@pytest.mark.parametrize(('flags', 'reason'), [
    (['--ngpus', '3', '--device', 'auto'], 'Requested node configuration is not available'),
    (['--partition', 'nope'], 'Invalid partition name specified'),
    (['--constraint', 'volta32gb'], 'Invalid feature specification'),
    (['--mem-gb', '1000'], 'Memory specification can not be satisfied'),
    (['--exclude', '127.0.0.[1-2]'], 'Requested node configuration is not available'),
])
def test_rejected_requests(cluster, data, tmp_path, capsys, flags, reason):
    """The error contains SLURM's reason, stderr lists the cluster's resources, and no file remains."""
    with pytest.raises(InputError, match=f'SLURM rejected the job: .*{reason}'):
        main(job_flags(data, tmp_path, *flags))
    assert re.search(r'normal\* .* 2 +4 +4000 gpu:2 ', capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('flags', [
    ['--nodes', '3'], ['--partition', 'single'], ['--partition', 'brief', '--timeout', '60'],
])
def test_a_job_that_would_never_start_is_cancelled(cluster, data, tmp_path, capsys, flags):
    """A job that SLURM accepts but never starts is cancelled with SLURM's reason, and no file remains."""
    with pytest.raises(InputError, match=r'would never start job \d+ \(reason: Partition\w+\)') as caught:
        main(job_flags(data, tmp_path, *flags))
    job_id = re.search(r'job (\d+)', str(caught.value))[1]
    assert job_state(job_id)[0] == 'CANCELLED'
    assert 'normal*' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def busy(cluster):
    """Cluster whose CPUs are all allocated to another job."""
    blocker = subprocess.run(['sbatch', '--parsable', '-N2', '-n2', '-c4', '-o', '/dev/null', '--wrap', 'sleep 60'],
                             check=True, capture_output=True, text=True).stdout.strip()
    yield
    subprocess.run(['scancel', blocker], check=True)


def test_a_job_that_waits_for_resources_stays_pending(busy, data, tmp_path, capsys):
    """A job that waits for another job's resources is not cancelled, and the printed commands follow and stop it."""
    assert main(job_flags(data, tmp_path)) == 0
    printed = capsys.readouterr().out
    job_id = re.match(r'Job (\d+) ', printed)[1]
    assert job_state(job_id)[0] == 'PENDING'
    assert f'follow:  tail -n +1 -F {tmp_path}/{job_id}/{job_id}_0_log.out\n' in printed
    stop = re.search(r'stop: +(.*)', printed)[1]
    subprocess.run(stop, shell=True, check=True)
    assert end_of(job_id) == 'CANCELLED'


def test_a_job_submitted_by_a_job_inherits_nothing(monkeypatch):
    """A job's own variables, e.g. its restart count, are hidden from a job that it submits; other variables stay."""
    monkeypatch.setenv('SLURM_RESTART_COUNT', '3')
    monkeypatch.setenv('SLURM_CONF', '/somewhere/slurm.conf')
    monkeypatch.setenv('SBATCH_ACCOUNT', 'ours')
    with outside_any_job():
        assert os.environ['SBATCH_ACCOUNT'] == 'ours'
    monkeypatch.setenv('SLURM_JOB_ID', '1')
    with outside_any_job():
        assert [name for name in os.environ if name.startswith('SLURM')] == ['SLURM_CONF']


# ----- without a cluster

@pytest.fixture
def no_slurm(tmp_path, monkeypatch):
    """Environment with a PATH that contains a shell, but not SLURM."""
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin' / 'bash').symlink_to(shutil.which('bash'))
    monkeypatch.setenv('PATH', str(tmp_path / 'bin'))
    monkeypatch.delenv('SLURM_CONF', raising=False)


def test_without_slurm_the_job_runs_on_this_machine(no_slurm, data, tmp_path, capsys):
    """Without SLURM this machine runs the lines of --setup and the processes of all nodes, and --wait returns 0."""
    flags = job_flags(data, tmp_path / 'runs', '--epochs', '1', '--setup', 'echo "set up in $PWD"', '--wait')
    assert main(flags) == 0
    printed = capsys.readouterr().out
    assert printed.startswith('No SLURM cluster available (sinfo is not installed): the job runs on this machine\n')
    assert f'set up in {os.getcwd()}\n' in printed
    folder, = (tmp_path / 'runs').iterdir()
    assert folder.name.startswith('local-')
    assert json.loads((folder / 'args.json').read_text())['derived']['processes'] == 2
    assert epochs_of(folder) == [0]


def test_a_local_job_fails_with_its_code_on_any_system(no_slurm, data, tmp_path, capsys):
    """Without os.waitid and os.pidfd_open, as on macOS, a job fails with the exit code of the run."""
    (tmp_path / 'sitecustomize.py').write_text('import os\ndel os.waitid, os.pidfd_open\n')
    (tmp_path / 'empty').mkdir()
    flags = job_flags(tmp_path / 'empty', tmp_path / 'runs', '--nodes', '1', '--wait', '--setup',
                      f'export PYTHONPATH={tmp_path}:$PYTHONPATH')
    assert main(flags) == 2
    printed = capsys.readouterr().out
    assert ': FAILED\n' in printed
    assert printed.endswith('Exit code 2\n')


def test_only_a_result_without_error_is_a_success(tmp_path):
    """A process without result or with a stored error has not succeeded."""
    task = submitit.LocalJob(tmp_path, '7')
    assert not has_succeeded(task)
    for outcome in ('error', 'success'):
        task.paths.result_pickle.write_bytes(pickle.dumps((outcome, 0)))
        assert has_succeeded(task) == (outcome == 'success')


@pytest.mark.slow
def test_time_limit_restarts_a_local_job(no_slurm, data, tmp_path, capsys):
    """After a minute the processes of a local job stop and restart in the same folder; each epoch runs once."""
    flags = job_flags(data, tmp_path / 'runs', '--epochs', '200', '--nodes', '1', '--timeout', '1', '--wait')
    assert main(flags) == 0
    printed = capsys.readouterr().out
    assert stops_of(printed)
    folder, = (tmp_path / 'runs').iterdir()
    assert epochs_of(folder) == list(range(200))


def test_ctrl_c_stops_a_local_job_in_order(data, tmp_path):
    """After Ctrl-C the run stores its state, and --wait returns SIGTERM's code after the end of all processes."""
    command = [sys.executable, ROOT / 'run_with_submitit.py', '--cluster', 'local',
               *job_flags(data, tmp_path, '--epochs', '400', '--nodes', '1', '--wait')]
    waiting = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(lambda: list(tmp_path.glob('*/checkpoint.pth')))
    os.killpg(waiting.pid, signal.SIGINT)  # as a terminal does
    printed, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 128 + signal.SIGTERM
    assert 'stored in' in printed
    assert not list(processes(SUBMITIT_LOCAL_JOB_ID=re.match(r'Job (\d+) ', printed)[1]))


def test_installed_commands_without_a_cluster_are_not_slurm(slurm_conf, tmp_path, monkeypatch, capsys):
    """An unreachable controller selects this machine with --cluster auto, and is an error with --cluster slurm."""
    conf = slurm_conf.read_text()
    (tmp_path / 'slurm.conf').write_text(re.sub(r'SlurmctldPort=\d+', 'SlurmctldPort=9\nMessageTimeout=1', conf))
    monkeypatch.setenv('SLURM_CONF', str(tmp_path / 'slurm.conf'))
    assert run_with_submitit.choose_cluster('auto') == 'local'
    assert 'Unable to contact slurm controller' in capsys.readouterr().out
    with pytest.raises(InputError, match=r'--cluster slurm: no cluster available .*Unable to contact'):
        run_with_submitit.choose_cluster('slurm')
