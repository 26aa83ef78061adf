"""Several real processes on this machine, connected by gloo."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiniest, tiny, write_folders
from processes import finish, free_port, run, start

from main import main
from utils import InputError

WORKER = Path(__file__).parent / 'distributed_worker.py'


# ----- parts of a run, in one start of the processes for each number of them

@pytest.fixture(scope='module')
def facts() -> dict:
    """Results of distributed_worker.py with 1, 2 and 3 processes: a list over ranks for each."""
    return {world: [json.loads(out.splitlines()[-1]) for out in run([WORKER], world)] for world in (1, 2, 3)}


@pytest.mark.parametrize('world', [2, 3])
@pytest.mark.parametrize('size', range(1, 18))
def test_evaluation_is_exact(facts, world, size):
    """Accuracies and loss of 1 to 17 images equal those of one process, also with fewer images than processes."""
    expected = facts[1][0]['evaluation'][str(size)]
    for results in facts[world]:
        assert results['evaluation'][str(size)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize('key', ['gradient', 'accumulated'])
def test_gradients_are_those_of_the_joined_batch(facts, key):
    """Two processes with three images each have the gradients of one with six (BatchNorm in eval mode)."""
    expected = torch.tensor(facts[1][0][key])
    for results in facts[2]:
        torch.testing.assert_close(torch.tensor(results[key]), expected, rtol=1e-4, atol=1e-6)


def test_gradient_norm_is_equal_on_all_processes(facts):
    """The logged norm is that of the common gradient."""
    first, second = (results['grad_norm'] for results in facts[2])
    assert first == second == pytest.approx(facts[1][0]['grad_norm'], rel=1e-4)


def test_passes_without_update_are_not_synchronised(facts):
    """The processes exchange gradients only in the second of two passes that make one step."""
    assert facts[2][0]['exchanges'] == 1


def test_all_processes_agree_on_a_signal(facts):
    """All processes return a signal to the last process after the same step."""
    assert [results['agreed'] for results in facts[3]] == [15, 15, 15]


@pytest.mark.parametrize('option', ['compiled', 'checkpointed'])
def test_compile_and_checkpointing_work(facts, option):
    """One step of the compiled and of the checkpointed model under DistributedDataParallel is finite and common."""
    first, second = (results[option] for results in facts[2])
    assert first == second
    assert first == pytest.approx(facts[2][0]['plain'], rel=1e-3)


# ----- the program

@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    return write_folders(tmp_path_factory.mktemp('data'), per_class=9)


def test_two_processes_train(data, tmp_path):
    """One process writes; the logged evaluation is that of the stored model, evaluated by one process."""
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


@pytest.mark.slow
def test_older_launcher(data, tmp_path):
    """torch.distributed.launch starts a run as torchrun does (test_survival.py)."""
    command = [sys.executable, '-m', 'torch.distributed.launch', '--nproc_per_node=2', '--use_env',
               f'--master_port={free_port()}', ROOT / 'main.py', *tiny(data, '--epochs', '1'), '--output-dir', tmp_path]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / 'checkpoint.pth').exists()


def test_every_process_ends_when_one_fails(data, tmp_path):
    """An error of one process ends all processes soon, and is printed by that process."""
    script = tmp_path / 'fail.py'
    script.write_text('import os, sys, main\nfrom loaders import samples\n'
                      'if os.environ["RANK"] == "1":\n'
                      '    def fail(*args): raise OSError("the disk of rank 1 is gone")\n'
                      '    samples.SeededSamples.__getitem__ = fail\n'
                      'main.main(sys.argv[1:])\n')
    results = finish(start([script, *tiniest(data, '--dist-timeout', '0.5')], 2), timeout=60)
    assert all(code != 0 for code, _, _ in results)
    assert 'OSError: the disk of rank 1 is gone' in results[1][2]


@pytest.mark.parametrize(('name', 'value'), [('RANK', 'x'), ('RANK', '2'), ('RANK', '-1'), ('MASTER_PORT', 'abc')])
def test_invalid_environment(data, monkeypatch, name, value):
    """A variable that is not a number, or out of range, is refused in one line with its name."""
    for key, given in {'RANK': '0', 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '29999',
                       name: value}.items():
        monkeypatch.setenv(key, given)
    with pytest.raises(InputError, match=f'^{name}={value} in the environment: must be an integer'):
        main(tiniest(data))


def test_half_set_environment(data, monkeypatch):
    """RANK without the other variables is refused in one line with their names."""
    monkeypatch.setenv('RANK', '0')
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    with pytest.raises(InputError, match='RANK is set, but WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not'):
        main(tiniest(data))


# ----- refusals

@pytest.mark.parametrize(('mistake', 'words'), [
    (['--opt', 'nope'], '--opt nope: timm has no such optimizer'),  # before the processes connect
    (['--accum-iter', '1000'], '--accum-iter 1000: an epoch has 1 batch'),  # afterwards
], ids=['flags', 'data'])
def test_refusal_is_printed_once(data, mistake, words):
    """The main process prints the refusal; all processes end with its exit code."""
    results = finish(start([ROOT / 'main.py', *tiniest(data, *mistake)], 3))
    assert [code for code, _, _ in results] == [2, 2, 2]
    assert [err for _, _, err in results] == [f'main.py: error: {words}\n', '', '']


def test_refusals_that_differ_are_all_printed():
    """Each process with another reason prints it, with its rank."""
    script = ('import os, sys\nfrom run.commandline import run_program\nfrom utils import InputError\n'
              'def main(): raise InputError("of " + os.environ["RANK"])\nrun_program(main)')
    results = finish(start(['-c', script], 2))
    assert [err for _, _, err in results] == ['-c: error: of 0\n', '-c: error (rank 1): of 1\n']


def test_refusal_under_torchrun(data):
    """The refusal is the first line, and the last but one of torchrun's report, which has no other failure."""
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
