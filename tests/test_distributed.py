"""Several real processes on this machine, talking by gloo."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiniest, tiny, write_folders
from processes import finish, free_port, run, start

from main import get_args_parser, main
from run import processes
from utils import InputError

WORKER = Path(__file__).parent / 'distributed_worker.py'


# ----- pieces, in one start of the processes for each number of them

@pytest.fixture(scope='module')
def facts() -> dict:
    """What distributed_worker.py finds with 1, 2 and 3 processes: a list over ranks for each."""
    return {world: [json.loads(out.splitlines()[-1]) for out in run([WORKER], world)] for world in (1, 2, 3)}


@pytest.mark.parametrize('world', [2, 3])
@pytest.mark.parametrize('size', range(1, 18))
def test_evaluation_is_exact(facts, world, size):
    """Accuracies and loss of 1 to 17 images equal one process's, also with fewer images than processes."""
    expected = facts[1][0]['evaluation'][str(size)]
    for found in facts[world]:
        assert found['evaluation'][str(size)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize('key', ['gradient', 'accumulated'])
def test_gradients_are_those_of_the_joined_batch(facts, key):
    """Two processes with three images each step as one with six, also in several passes (BatchNorm in eval mode)."""
    expected = torch.tensor(facts[1][0][key])
    for found in facts[2]:
        torch.testing.assert_close(torch.tensor(found[key]), expected, rtol=1e-4, atol=1e-6)


def test_gradient_norm_is_equal_on_all_processes(facts):
    """What is logged is the norm of the common gradient."""
    first, second = (found['grad_norm'] for found in facts[2])
    assert first == second == pytest.approx(facts[1][0]['grad_norm'], rel=1e-4)


def test_passes_without_update_are_not_synchronised(facts):
    """Of two passes that make one step, the processes exchange gradients in the second alone."""
    assert facts[2][0]['exchanges'] == 1


def test_all_processes_agree_on_a_signal(facts):
    """A signal to the last process is known to all after the same step."""
    assert [found['agreed'] for found in facts[3]] == [15, 15, 15]


@pytest.mark.parametrize('option', ['compiled', 'checkpointed'])
def test_compile_and_checkpointing_work(facts, option):
    """One step of the compiled and of the checkpointed model under DistributedDataParallel is finite and common."""
    first, second = (found[option] for found in facts[2])
    assert first == second
    assert first == pytest.approx(facts[2][0]['plain'], rel=1e-3)


# ----- the program

@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    return write_folders(tmp_path_factory.mktemp('data'), per_class=9)


def test_two_processes_train(data, tmp_path):
    """One of them writes; the logged evaluation is that of the stored model, evaluated by one process."""
    out, silent = run([ROOT / 'main.py', *tiniest(data), '--output-dir', tmp_path / 'run'], 2)
    assert 'BatchNorm is not synchronised' in out
    assert silent == ''
    last = [json.loads(line) for line in (tmp_path / 'run' / 'log.txt').read_text().splitlines()][-1]
    assert last['epoch'] == 1
    alone, = run([ROOT / 'main.py', *tiniest(data), '--eval', '--resume', tmp_path / 'run' / 'checkpoint.pth',
                  '--output-dir', tmp_path / 'eval'], 1)
    stats = json.loads((tmp_path / 'eval' / 'eval.json').read_text())
    assert (stats['acc1'], stats['acc5']) == (last['test_acc1'], last['test_acc5'])
    assert stats['loss'] == pytest.approx(last['test_loss'], abs=1e-6)


@pytest.mark.parametrize('launcher', [
    ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2'],
    pytest.param(['-m', 'torch.distributed.launch', '--nproc_per_node=2', '--use_env',
                  f'--master_port={free_port()}'], marks=pytest.mark.slow),  # torch's older one
], ids=['torchrun', 'launch'])
def test_launchers(data, tmp_path, launcher):
    """Both of torch's launchers start a training."""
    command = [sys.executable, *launcher, ROOT / 'main.py', *tiny(data, '--epochs', '1'), '--output-dir', tmp_path]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / 'checkpoint.pth').exists()


def test_every_process_ends_when_one_fails(data, tmp_path):
    """An image that only one process reads stops all of them soon; the one that failed says why."""
    broken = write_folders(tmp_path / 'data', per_class=9)
    script = tmp_path / 'fail.py'
    script.write_text('import os, sys, datasets, main\n'
                      'if os.environ["RANK"] == "1":\n'
                      '    def fail(*args): raise OSError("the disk of rank 1 is gone")\n'
                      '    datasets.SeededSamples.__getitem__ = fail\n'
                      'main.main(sys.argv[1:])\n')
    results = finish(start([script, *tiniest(broken, '--dist-timeout', '0.5')], 2), timeout=60)
    assert all(code != 0 for code, _, _ in results)
    assert 'OSError: the disk of rank 1 is gone' in results[1][2]


@pytest.mark.parametrize(('name', 'value'), [('RANK', 'x'), ('RANK', '2'), ('RANK', '-1'), ('MASTER_PORT', 'abc')])
def test_impossible_environment(data, monkeypatch, name, value):
    """A variable that is no number, or out of range: it is named, in one line."""
    for key, given in {'RANK': '0', 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '29999',
                       name: value}.items():
        monkeypatch.setenv(key, given)
    with pytest.raises(InputError, match=f'^{name}={value} in the environment: must be an integer'):
        main(tiniest(data))


def test_half_set_environment(data, monkeypatch):
    """RANK without the other variables: they are named."""
    monkeypatch.setenv('RANK', '0')
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    with pytest.raises(InputError, match='RANK is set, but WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not'):
        main(tiniest(data))


# ----- refusals

@pytest.mark.parametrize(('mistake', 'words'), [
    (['--opt', 'nope'], '--opt nope: timm has no such optimizer'),  # before the processes meet
    (['--accum-iter', '1000'], '--accum-iter 1000: an epoch has 1 batches'),  # after it
], ids=['flags', 'data'])
def test_refusal_is_said_once(data, mistake, words):
    """By the main process; all end with its exit code."""
    results = finish(start([ROOT / 'main.py', *tiniest(data, *mistake)], 3))
    assert [code for code, _, _ in results] == [2, 2, 2]
    assert [err for _, _, err in results] == [f'main.py: error: {words}\n', '', '']


def test_refusals_that_differ_are_all_said(data):
    """Each process that has words of its own says them, with its rank."""
    script = ('import os, sys\nfrom run.commandline import run_program\nfrom utils import InputError\n'
              'def main(): raise InputError("of " + os.environ["RANK"])\nrun_program(main)')
    results = finish(start(['-c', script], 2))
    assert [err for _, _, err in results] == ['-c: error: of 0\n', '-c: error (rank 1): of 1\n']


def test_refusal_under_torchrun(data):
    """The first line, and again the last but one of torchrun's report, which has no other failure to report."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', ROOT / 'main.py',
               *tiny(data, '--opt', 'nope')]
    result = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert result.returncode == 1
    lines, words = result.stdout.splitlines(), 'main.py: error: --opt nope: timm has no such optimizer'
    assert lines[0] == words
    assert lines[-2] == f'  traceback : {words}'
    assert '<NO_OTHER_FAILURES>' in result.stdout
    assert result.stdout.count('--opt nope') == 2


# ----- cores

def busy_notice(capsys, *argv: str) -> str:
    with processes.joined(get_args_parser().parse_args(['--device', 'cpu', *argv]), trains=False):
        return capsys.readouterr().out


@pytest.fixture
def two_threads_on_four_cores(monkeypatch):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {0, 1, 2, 3})


@pytest.mark.parametrize(('load', 'remedy'), [(8., 'OMP_NUM_THREADS=1 '), (2.5, 'OMP_NUM_THREADS=1 ')])
def test_busy_cores_are_noticed(two_threads_on_four_cores, monkeypatch, capsys, load, remedy):
    """With the remedy, where the load is higher than the number of cores that it leaves free."""
    monkeypatch.setattr(os, 'getloadavg', lambda: (load, 0., 0.))
    said = busy_notice(capsys)
    assert f'its load is {load}' in said
    assert remedy in said


@pytest.mark.parametrize('case', ['half of them free', 'set', 'one thread', 'no load'])
def test_busy_cores_that_need_no_notice(two_threads_on_four_cores, monkeypatch, capsys, case):
    """Where there is room, the number of threads was chosen or is one, or the system knows no load."""
    monkeypatch.setattr(os, 'getloadavg', lambda: (2. if case == 'half of them free' else 8., 0., 0.))
    if case == 'set':
        monkeypatch.setenv('OMP_NUM_THREADS', '2')
    elif case == 'one thread':
        monkeypatch.setattr(torch, 'get_num_threads', lambda: 1)
    elif case == 'no load':
        monkeypatch.delattr(os, 'getloadavg')
    assert busy_notice(capsys) == ''
