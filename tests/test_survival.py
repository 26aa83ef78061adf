"""Interruptions and damage beyond test_run.py: evaluations, workers, launchers, full disks, bad images."""
import json
import math
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
from resuming import assert_same_run, full_disk, interrupt, state

import utils
from loaders import pictures, samples
from main import main
from run import checkpoints, signals
from run.training import Run
from utils import InputError, RunStopped, UnreadableImage

STEPS = 4  # of an epoch of the runs below


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    return write_folders(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def flags(data) -> list:
    """A run of 3 epochs with all randomness that there is."""
    return tiniest(data, '--epochs', '3', '--drop-path', '.3', '--drop', '.1', '--no-repeated-aug')


@pytest.fixture(scope='module')
def whole(flags, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    run = tmp_path_factory.mktemp('runs') / 'whole'
    main([*flags, '--output-dir', str(run)])
    return run


# ----- signals

def test_run_resumes_after_a_signal_in_its_evaluation(flags, whole, tmp_path, monkeypatch):
    """The state is stored before the evaluation; a resume repeats the evaluation and continues bitwise."""
    run = tmp_path / 'run'
    interrupt(lambda: main([*flags, '--output-dir', str(run)]), signal.SIGUSR1, STEPS + 2, monkeypatch)
    assert (state(run)['epoch'], state(run)['step']) == (-1, STEPS)
    main([*flags, '--output-dir', str(run), '--resume', 'auto'])
    assert_same_run(run, whole, rounds=3)


def test_signal_between_accumulated_batches_waits_for_the_step(flags, tmp_path, monkeypatch):
    """Under --accum-iter 3 the first check for signals is after the third batch."""
    flags = [*flags, '--accum-iter', '3', '--output-dir', str(tmp_path)]
    interrupt(lambda: main(flags), signal.SIGTERM, 1, monkeypatch)
    assert state(tmp_path)['step'] == 3


@pytest.mark.parametrize('signum', signals.StopRequest.SIGNALS)
def test_signal_is_recorded_until_the_handlers_are_restored(signum):
    """A StopRequest records each of its signals, and restores the program's own handlers."""
    before = [signal.getsignal(other) for other in signals.StopRequest.SIGNALS]
    with signals.StopRequest() as stop:
        os.kill(os.getpid(), signum)
        assert stop.agreed() == signum
    assert [signal.getsignal(other) for other in signals.StopRequest.SIGNALS] == before


def test_second_interrupt_does_not_wait():
    """Ctrl-C twice is KeyboardInterrupt at once."""
    with pytest.raises(KeyboardInterrupt), signals.StopRequest():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_resuming_reads_no_image_twice(flags, tmp_path, monkeypatch):
    """After a stop at step 3 only the fourth batch of the epoch is loaded, besides TensorBoard's picture of four."""
    interrupt(lambda: main([*flags, '--output-dir', str(tmp_path)]), signal.SIGTERM, 3, monkeypatch)
    keys, getitem = [], samples.SeededSamples.__getitem__

    def recorded(self, key):
        keys.append(key)
        return getitem(self, key)

    monkeypatch.setattr(samples.SeededSamples, '__getitem__', recorded)
    main([*flags, '--epochs', '1', '--output-dir', str(tmp_path), '--resume', 'auto'])
    assert len(keys) == 4 + 4


def test_group_signal_with_workers(data, tmp_path):
    """SIGTERM to the whole process group, loading workers included: stored, one line, exit code 143."""
    flags = tiny(data, '--epochs', '50', '--num-workers', '2', '--output-dir', str(tmp_path / 'run'))
    process = subprocess.Popen([sys.executable, ROOT / 'main.py', *flags], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(tmp_path / 'run' / 'checkpoint.pth', process)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert err.splitlines()[-1].startswith('main.py: SIGTERM: stopped at epoch ')
    assert 'Traceback' not in err
    assert state(tmp_path / 'run')['epoch'] < 49


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120):
    deadline = time.monotonic() + seconds
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(.05)
    assert path.exists()


# ----- checkpoints within epochs

def test_save_every(flags, tmp_path, monkeypatch):
    """--save-every 3 stores after every third step of an epoch, and at its end before and after the evaluation."""
    saved = []
    save = checkpoints.save_checkpoint

    def recorded(content, path, **kwargs):
        if path.name == 'checkpoint.pth':
            saved.append((content['epoch'], content['step']))
        save(content, path, **kwargs)

    monkeypatch.setattr(checkpoints, 'save_checkpoint', recorded)
    main([*flags, '--epochs', '2', '--save-every', '3', '--output-dir', str(tmp_path)])
    assert saved == [(-1, 3), (-1, 4), (0, 0), (0, 3), (0, 4), (1, 0)]


# ----- several processes

SIGNALS_RANK_1 = (
    'import os, signal, sys, main\n'
    'from run import commandline, signals\n'
    'agreed, checks = signals.StopRequest.agreed, []\n'
    'def check(self):\n'
    '    checks.append(0)\n'
    '    if os.environ["RANK"] == "1" and len(checks) == int(os.environ["CHECK"]):\n'
    '        os.kill(os.getpid(), signal.SIGTERM)\n'
    '    return agreed(self)\n'
    'signals.StopRequest.agreed = check\n'
    'commandline.run_program(lambda: main.main(sys.argv[1:]))\n')


def test_two_processes_stop_twice_in_evaluation(data, tmp_path, monkeypatch):
    """A signal to one of two processes stops both, stored, also in an evaluation that was stopped before."""
    script = tmp_path / 'signals_rank_1.py'
    script.write_text(SIGNALS_RANK_1)
    command = [script, *tiniest(data, '--no-repeated-aug', '--batch-size', '2', '--epochs', '1', '--resume', 'auto',
                             '--output-dir', tmp_path / 'run')]
    for check in STEPS + 1, 1:
        monkeypatch.setenv('CHECK', str(check))
        results = finish(start(command, 2))
        assert [code for code, _, _ in results] == [128 + signal.SIGTERM] * 2, results
        assert (state(tmp_path / 'run')['epoch'], state(tmp_path / 'run')['step']) == (-1, STEPS)


def test_number_of_processes_may_change_within_an_epoch(data, tmp_path, monkeypatch):
    """An epoch that two processes begin and one process finishes has about the same mean loss."""
    script = tmp_path / 'signals_rank_1.py'
    script.write_text(SIGNALS_RANK_1)
    flags = tiniest(data, '--no-repeated-aug', '--epochs', '1', '--model-ema-decay', '0', '--lr', '1e-12',
                 '--warmup-lr', '0', '--min-lr', '0')
    stats = main([*flags, '--output-dir', str(tmp_path / 'alone')])
    monkeypatch.setenv('CHECK', str(STEPS // 2))
    finish(start([script, *flags, '--batch-size', '2', '--output-dir', tmp_path / 'run'], 2))
    assert state(tmp_path / 'run')['step'] == STEPS // 2
    resumed = main([*flags, '--output-dir', str(tmp_path / 'run'), '--resume', 'auto'])
    assert resumed['train_loss'] == pytest.approx(stats['train_loss'], rel=.1)
    assert resumed['train_grad_norm'] == pytest.approx(stats['train_grad_norm'], rel=.5)


OWN_FOLDER = (
    'import os, sys, main\n'
    'from run import commandline, signals\n'
    'os.chdir(sys.argv[1 + int(os.environ["RANK"])])\n'
    'commandline.run_program(lambda: main.main(sys.argv[3:]))\n')


@pytest.mark.parametrize('epochs', ['12', '1'], ids=['different', 'missing'])
def test_processes_with_different_checkpoints_are_refused(data, tmp_path, epochs):
    """With an output folder that is not shared, a resumed run ends at once instead of training on two states."""
    folders = [tmp_path / 'node0', tmp_path / 'node1']
    script = tmp_path / 'own_folder.py'
    script.write_text(OWN_FOLDER)
    for node in folders:
        node.mkdir()
    for node, count in zip(folders, epochs):
        main(tiniest(data, '--epochs', count, '--output-dir', str(node / 'run')))
    results = finish(start([script, *folders, *tiniest(data, '--epochs', '3', '--batch-size', '2', '--output-dir',
                                                      'run', '--resume', 'auto')], 2))
    assert [code for code, _, _ in results] == [2, 2], results
    assert 'must be on a file system that all nodes share' in results[0][2]


def torchrun(*command) -> list:
    return [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', *map(str, command)]


def environment() -> dict:
    return {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), str(ROOT / 'tests')]), 'OMP_NUM_THREADS': '1'}


def test_torchrun_passes_sigterm_on(data, tmp_path):
    """SIGTERM to torchrun stores the run of its processes."""
    launcher = subprocess.Popen(torchrun(ROOT / 'main.py', *tiny(data, '--epochs', '50', '--batch-size', '2'),
                                         '--output-dir', tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True, env=environment())
    wait_for(tmp_path / 'checkpoint.pth', launcher)
    launcher.send_signal(signal.SIGTERM)
    out, _ = launcher.communicate(timeout=60)
    assert 'main.py: SIGTERM: stopped at epoch ' in out
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT / 'main.py') not in out


@pytest.mark.slow
def test_elastic_restart_resumes(data, tmp_path):
    """torchrun --max-restarts starts the group again after a rank died, and --resume auto resumes the run."""
    script = tmp_path / 'dies_once.py'
    script.write_text(
        'import os, sys, main, small_model\n'
        'from run import commandline, signals\n'
        'agreed, checks = signals.StopRequest.agreed, []\n'
        'def die_once(self):\n'
        '    checks.append(0)\n'
        '    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1" and len(checks) == 3:\n'
        '        os.kill(os.getpid(), 9)\n'
        '    return agreed(self)\n'
        'signals.StopRequest.agreed = die_once\n'
        'main.main(sys.argv[1:])\n')
    result = subprocess.run(torchrun('--max-restarts=1', script, *tiniest(data, '--epochs', '1', '--save-every', '1'),
                                     '--batch-size', '2', '--resume', 'auto', '--output-dir', tmp_path / 'run'),
                            capture_output=True, text=True, timeout=120, env=environment())
    assert result.returncode == 0, result.stderr
    assert 'resumes at epoch 0, step 2' in result.stdout
    assert state(tmp_path / 'run')['epoch'] == 0


# ----- damage and full disks

def test_damage_is_detected(tmp_path):
    """A flipped bit anywhere in a checkpoint is refused, or changes nothing that is read."""
    path = tmp_path / 'checkpoint.pth'
    content = {'model': {'weight': torch.arange(100.), 'bias': torch.ones(3)}, 'epoch': 3, 'args': {'lr': .1}}
    checkpoints.save_checkpoint(content, path)
    intact = path.read_bytes()
    refused = 0
    for position in range(0, len(intact), 5):
        damaged = bytearray(intact)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            torch.testing.assert_close(checkpoints.load_checkpoint(path, '--resume'), content, rtol=0, atol=0)
        except InputError:
            refused += 1
    assert refused > len(intact) / 5 / 2


@pytest.mark.parametrize('length', [0, 1, .1, .5, .9, .999])
def test_truncation_is_detected(tmp_path, length):
    """A truncated checkpoint is refused in one line."""
    path = tmp_path / 'checkpoint.pth'
    checkpoints.save_checkpoint({'model': {'weight': torch.arange(1000.)}}, path)
    content = path.read_bytes()
    path.write_bytes(content[:length if length in (0, 1) else int(length * len(content))])
    with pytest.raises(InputError, match='damaged, truncated') as caught:
        checkpoints.load_checkpoint(path, '--resume')
    assert '\n' not in str(caught.value)


def test_file_system_without_links_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    """The previous checkpoint is renamed if hard links fail, so that a store needs no third file."""
    def no_links(*_):
        raise OSError('no links')

    monkeypatch.setattr(os, 'link', no_links)
    monkeypatch.setattr(checkpoints.shutil, 'copyfile', no_links)
    path, previous = tmp_path / 'checkpoint.pth', tmp_path / 'checkpoint_previous.pth'
    for number in range(2):
        checkpoints.save_checkpoint({'epoch': number}, path, keep=previous)
    assert [torch.load(file)['epoch'] for file in (path, previous)] == [1, 0]


def test_full_disk_leaves_the_last_checkpoint(flags, whole, tmp_path):
    """A checkpoint that can't be written ends the run in one line; the files before it are intact."""
    run = tmp_path / 'run'
    main([*flags, '--epochs', '1', '--output-dir', str(run)])
    before = {name: (run / name).read_bytes() for name in ('checkpoint.pth', 'best_model.pth')}
    with full_disk(2 ** 17), pytest.raises(RunStopped, match="can't be written"):
        main([*flags, '--output-dir', str(run), '--resume', 'auto'])
    assert {name: (run / name).read_bytes() for name in before} == before
    assert not list(run.glob('*.tmp'))
    main([*flags, '--output-dir', str(run), '--resume', 'auto'])
    assert_same_run(run, whole, rounds=3)


def test_full_disk_under_save_every(flags, tmp_path):
    """A checkpoint that the background thread can't write ends the run at the next checkpoint."""
    with full_disk(2 ** 17), pytest.raises(RunStopped, match=r"checkpoint\.pth can't be written"):
        main([*flags, '--save-every', '1', '--output-dir', str(tmp_path)])
    assert not (tmp_path / 'log.txt').exists()


def test_stored_state_is_that_of_its_step(flags, tmp_path, monkeypatch):
    """A state that is written in the background does not change with the following steps."""
    write, stored = Run.write_in_background, []

    def slowly(self, content, keep):
        time.sleep(.5)  # some steps
        stored.append(content)
        write(self, content, keep)

    monkeypatch.setattr(Run, 'write_in_background', slowly)
    main([*flags, '--epochs', '1', '--save-every', '1', '--output-dir', str(tmp_path / 'a')])
    monkeypatch.setattr(Run, 'write_in_background', write)
    interrupt(lambda: main([*flags, '--output-dir', str(tmp_path / 'b')]), signal.SIGTERM, 2, monkeypatch)
    for key in ('step', 'model', 'model_ema', 'optimizer'):
        torch.testing.assert_close(stored[1][key], state(tmp_path / 'b')[key], rtol=0, atol=0)


def test_full_disk_leaves_other_files(tmp_path):
    """A file that can't be replaced is unchanged, and the error ends a run in one line."""
    path = tmp_path / 'args.json'
    utils.write_json(path, {'before': 1})
    with full_disk(1000), pytest.raises(RunStopped, match=r"args\.json can't be written"):
        utils.write_json(path, {'after': 'x' * 10000})
    assert json.loads(path.read_text()) == {'before': 1}
    assert [p.name for p in tmp_path.iterdir()] == ['args.json']


# ----- bad images

def test_bad_image_is_only_skipped_in_training(tmp_path, monkeypatch):
    """--skip-bad-images replaces an unreadable training image; an unreadable evaluation image ends the run."""
    broken = write_folders(tmp_path / 'data')
    (broken / 'train' / 'cat' / '1.png').write_bytes(b'')
    argv = [*tiniest(broken, '--epochs', '1', '--no-repeated-aug'), '--skip-bad-images', '1']
    assert math.isfinite(main(argv)['train_loss'])
    (broken / 'val' / 'cat' / '1.png').write_bytes(b'')
    for probed in 1000, 1:  # found before the training, and in the evaluation
        monkeypatch.setattr(pictures, 'NUM_PROBED', probed)
        with pytest.raises(UnreadableImage, match=r'val/cat/1\.png: .*--skip-bad-images only applies to training'):
            main(argv)
