"""Runs that are stopped, killed or find damage, and go on as if nothing had been."""
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiniest, tiny, write_folders
from processes import finish, start

import datasets
import utils
from main import main
from run import checkpoints, signals
from run.training import Run
from utils import InputError, RunStopped

STEPS = 4  # of an epoch of the runs below


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    return write_folders(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def flags(data) -> list:
    """A run of 3 epochs with everything random that there is."""
    return tiniest(data, '--epochs', '3', '--drop-path', '.3', '--drop', '.1', '--no-repeated-aug')


@pytest.fixture(scope='module')
def whole(flags, tmp_path_factory) -> Path:
    """The directory of the uninterrupted run."""
    run = tmp_path_factory.mktemp('runs') / 'whole'
    main([*flags, '--output-dir', str(run)])
    return run


def state(run: Path, name: str = 'checkpoint.pth') -> dict:
    return torch.load(run / name, weights_only=True)


def log_lines(run: Path) -> list:
    return [json.loads(line) for line in (run / 'log.txt').read_text().splitlines()]


def assert_same_run(run: Path, other: Path):
    """Bitwise the same weights, average, optimizer and accuracies, and the same curves."""
    for name in ('checkpoint.pth', 'best_model.pth'):
        own, expected = state(run, name), state(other, name)
        for key in ('model', 'model_ema', 'optimizer', 'accuracy', 'epoch', 'step'):
            torch.testing.assert_close(own[key], expected[key], rtol=0, atol=0)
    for own, expected in zip(log_lines(run), log_lines(other), strict=True):
        for key in ('epoch', 'train_lr', 'test_acc1', 'test_loss', 'test_ema_acc1'):
            assert own[key] == expected[key], key
        assert own['train_loss'] == pytest.approx(expected['train_loss'], rel=1e-12)


def interrupt_main(argv: list, signum: int, look: int, monkeypatch) -> utils.Interrupted:
    """Run in this process, and send it a signal just before it looks for one for the `look`-th time."""
    looks = iter(range(1, 1000))
    agreed = signals.StopRequest.agreed

    def agreed_after_signal(self):
        if next(looks) == look:
            os.kill(os.getpid(), signum)
        return agreed(self)

    monkeypatch.setattr(signals.StopRequest, 'agreed', agreed_after_signal)
    with pytest.raises(utils.Interrupted) as caught:
        main(argv)
    monkeypatch.undo()
    return caught.value


# ----- signals

@pytest.mark.parametrize(('signum', 'look', 'epoch', 'step'), [
    (signal.SIGUSR1, STEPS + 2, -1, STEPS),  # in the evaluation
    (signal.SIGUSR2, STEPS + 4 + 3, 0, 3),  # in the second epoch
], ids=lambda value: getattr(value, 'name', None))
def test_signal_is_survived_to_the_step(flags, whole, tmp_path, monkeypatch, signum, look, epoch, step):
    """The state is stored where the signal came; going on gives bitwise the uninterrupted run."""
    run = tmp_path / 'run'
    error = interrupt_main([*flags, '--output-dir', str(run)], signum, look, monkeypatch)
    assert error.exit_code == 128 + signum
    assert (state(run)['epoch'], state(run)['step']) == (epoch, step)
    main([*flags, '--output-dir', str(run), '--resume', 'auto'])
    assert_same_run(run, whole)


def test_signal_between_accumulated_batches_waits_for_the_step(flags, tmp_path, monkeypatch):
    """Under --accum-iter 3 the first look is after the third batch."""
    interrupt_main([*flags, '--accum-iter', '3', '--output-dir', str(tmp_path)], signal.SIGTERM, 1, monkeypatch)
    assert state(tmp_path)['step'] == 3


def test_handlers_are_put_back(flags, tmp_path, monkeypatch):
    """A program that calls main() keeps its own handlers."""
    before = [signal.getsignal(signum) for signum in signals.StopRequest.SIGNALS]
    interrupt_main([*flags, '--output-dir', str(tmp_path)], signal.SIGTERM, 1, monkeypatch)
    assert [signal.getsignal(signum) for signum in signals.StopRequest.SIGNALS] == before


def test_second_interrupt_does_not_wait():
    """Ctrl-C twice is KeyboardInterrupt at once."""
    with pytest.raises(KeyboardInterrupt), signals.StopRequest():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_resuming_reads_no_image_twice(flags, tmp_path, monkeypatch):
    """After a stop at step 3 only the fourth batch of the epoch is loaded, besides TensorBoard's picture of four."""
    interrupt_main([*flags, '--output-dir', str(tmp_path)], signal.SIGTERM, 3, monkeypatch)
    keys, getitem = [], datasets.SeededSamples.__getitem__

    def noted(self, key):
        keys.append(key)
        return getitem(self, key)

    monkeypatch.setattr(datasets.SeededSamples, '__getitem__', noted)
    main([*flags, '--epochs', '1', '--output-dir', str(tmp_path), '--resume', 'auto'])
    assert len(keys) == 4 + 4


def test_group_signal_with_workers(data, tmp_path):
    """SIGTERM to the whole process group, loading processes included: stored, one line, exit code 143."""
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
    """Every 3 updates within an epoch, besides those at its end: before and after the evaluation."""
    saved = []
    save = checkpoints.save_checkpoint

    def noted(content, path, **kwargs):
        if path.name == 'checkpoint.pth':
            saved.append((content['epoch'], content['step']))
        save(content, path, **kwargs)

    monkeypatch.setattr(checkpoints, 'save_checkpoint', noted)
    main([*flags, '--epochs', '2', '--save-every', '3', '--output-dir', str(tmp_path)])
    assert saved == [(-1, 3), (-1, 4), (0, 0), (0, 3), (0, 4), (1, 0)]


# ----- several processes

SIGNALS_RANK_1 = (
    'import os, signal, sys, main\n'
    'from run import commandline, signals\n'
    'agreed, looks = signals.StopRequest.agreed, []\n'
    'def look(self):\n'
    '    looks.append(0)\n'
    '    if os.environ["RANK"] == "1" and len(looks) == int(os.environ["LOOK"]):\n'
    '        os.kill(os.getpid(), signal.SIGTERM)\n'
    '    return agreed(self)\n'
    'signals.StopRequest.agreed = look\n'
    'commandline.run_program(lambda: main.main(sys.argv[1:]))\n')


def test_two_processes_stop_twice_in_evaluation(data, tmp_path, monkeypatch):
    """A signal to one of two processes stops both, stored, also in an evaluation that had been stopped before."""
    script = tmp_path / 'signals_rank_1.py'
    script.write_text(SIGNALS_RANK_1)
    command = [script, *tiniest(data, '--no-repeated-aug', '--batch-size', '2', '--epochs', '1', '--resume', 'auto',
                             '--output-dir', tmp_path / 'run')]
    for look in STEPS + 1, 1:
        monkeypatch.setenv('LOOK', str(look))
        results = finish(start(command, 2))
        assert [code for code, _, _ in results] == [128 + signal.SIGTERM] * 2, results
        assert (state(tmp_path / 'run')['epoch'], state(tmp_path / 'run')['step']) == (-1, STEPS)


def test_number_of_processes_may_change_within_an_epoch(data, tmp_path, monkeypatch):
    """Stopped in the middle of an epoch of two processes and finished by one: its mean loss is about the same."""
    script = tmp_path / 'signals_rank_1.py'
    script.write_text(SIGNALS_RANK_1)
    flags = tiniest(data, '--no-repeated-aug', '--epochs', '1', '--model-ema-decay', '0', '--lr', '1e-12',
                 '--warmup-lr', '0', '--min-lr', '0')
    stats = main([*flags, '--output-dir', str(tmp_path / 'alone')])
    monkeypatch.setenv('LOOK', str(STEPS // 2))
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


def test_processes_that_see_different_checkpoints_refuse(data, tmp_path):
    """With an output directory that is not shared, a resumed run ends at once instead of training on two states."""
    folders = [tmp_path / 'node0', tmp_path / 'node1']
    script = tmp_path / 'own_folder.py'
    script.write_text(OWN_FOLDER)
    for node, epochs in zip(folders, '12'):
        node.mkdir()
        main(tiniest(data, '--epochs', epochs, '--output-dir', str(node / 'run')))
    results = finish(start([script, *folders, *tiniest(data, '--epochs', '3', '--batch-size', '2', '--output-dir',
                                                      'run', '--resume', 'auto')], 2))
    assert [code for code, _, _ in results] == [2, 2], results
    assert 'must be on a file system that all nodes share' in results[0][2]


def test_process_that_sees_no_checkpoint_refuses(data, tmp_path):
    """So do processes of which only the first finds a checkpoint."""
    folders = [tmp_path / 'node0', tmp_path / 'node1']
    script = tmp_path / 'own_folder.py'
    script.write_text(OWN_FOLDER)
    for node in folders:
        node.mkdir()
    main(tiniest(data, '--epochs', '1', '--output-dir', str(folders[0] / 'run')))
    results = finish(start([script, *folders, *tiniest(data, '--epochs', '3', '--batch-size', '2', '--output-dir',
                                                      'run', '--resume', 'auto')], 2))
    assert [code for code, _, _ in results] == [2, 2], results
    assert 'must be on a file system that all nodes share' in results[0][2]


def test_torchrun_passes_sigterm_on(data, tmp_path):
    """SIGTERM to torchrun: the state is stored, however long the launcher's other processes are gone."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', ROOT / 'main.py',
               *tiny(data, '--epochs', '50', '--num-workers', '2', '--batch-size', '2'), '--output-dir', tmp_path]
    launcher = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'})
    wait_for(tmp_path / 'checkpoint.pth', launcher)
    launcher.send_signal(signal.SIGTERM)
    out, _ = launcher.communicate(timeout=60)
    assert 'main.py: SIGTERM: stopped at epoch ' in out
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT / 'main.py') not in out
    assert (tmp_path / 'checkpoint.pth').exists()


def test_elastic_restart_goes_on(data, tmp_path):
    """torchrun --max-restarts starts the group again after a rank died, and --resume auto goes on."""
    script = tmp_path / 'dies_once.py'
    script.write_text(
        'import os, sys, main\n'
        'from run import commandline, signals\n'
        'agreed, looks = signals.StopRequest.agreed, []\n'
        'def die_once(self):\n'
        '    looks.append(0)\n'
        '    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1" and len(looks) == 3:\n'
        '        os.kill(os.getpid(), 9)\n'
        '    return agreed(self)\n'
        'signals.StopRequest.agreed = die_once\n'
        'main.main(sys.argv[1:])\n')
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--max-restarts=1',
               script, *tiny(data, '--epochs', '1', '--save-every', '1', '--batch-size', '2'), '--resume', 'auto',
               '--output-dir', tmp_path / 'run']
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120,
                            env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'})
    assert result.returncode == 0, result.stderr
    assert 'goes on at epoch 0, step 2' in result.stdout
    assert state(tmp_path / 'run')['epoch'] == 0


# ----- damage

def test_no_damage_goes_unnoticed(tmp_path):
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
def test_truncation_is_noticed(tmp_path, length):
    """A checkpoint that was cut short is refused in one line."""
    path = tmp_path / 'checkpoint.pth'
    checkpoints.save_checkpoint({'model': {'weight': torch.arange(1000.)}}, path)
    content = path.read_bytes()
    path.write_bytes(content[:length if length in (0, 1) else int(length * len(content))])
    with pytest.raises(InputError, match='damaged, truncated'):
        checkpoints.load_checkpoint(path, '--resume')


def test_full_disk_leaves_the_last_checkpoint(flags, whole, tmp_path):
    """A checkpoint that can't be written ends the run in one line; the files before it are intact."""
    run = tmp_path / 'run'
    main([*flags, '--epochs', '1', '--output-dir', str(run)])
    before = {name: (run / name).read_bytes() for name in ('checkpoint.pth', 'best_model.pth')}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 17, hard))
    try:
        with pytest.raises(RunStopped, match="can't be written"):
            main([*flags, '--output-dir', str(run), '--resume', 'auto'])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {name: (run / name).read_bytes() for name in before} == before
    assert not list(run.glob('*.tmp'))
    main([*flags, '--output-dir', str(run), '--resume', 'auto'])
    assert_same_run(run, whole)


def test_full_disk_under_save_every(flags, tmp_path):
    """A checkpoint that is written beside the training and can't be ends the run too, at the next one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 17, hard))
    try:
        with pytest.raises(RunStopped, match=r"checkpoint\.pth can't be written"):
            main([*flags, '--save-every', '1', '--output-dir', str(tmp_path)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / 'log.txt').exists()


def test_stored_state_is_that_of_its_step(flags, tmp_path, monkeypatch):
    """What is written beside the training does not see the steps that follow."""
    write, stored = Run.write, []

    def slowly(self, content, keep):
        time.sleep(.5)  # some steps
        stored.append(content)
        write(self, content, keep)

    monkeypatch.setattr(Run, 'write', slowly)
    main([*flags, '--epochs', '1', '--save-every', '1', '--output-dir', str(tmp_path / 'a')])
    monkeypatch.setattr(Run, 'write', write)
    interrupt_main([*flags, '--output-dir', str(tmp_path / 'b')], signal.SIGTERM, 2, monkeypatch)
    for key in ('step', 'model', 'model_ema', 'optimizer'):
        torch.testing.assert_close(stored[1][key], state(tmp_path / 'b')[key], rtol=0, atol=0)


def test_full_disk_leaves_other_files(tmp_path):
    """A file that can't be replaced stays as it was, and the error is the one that ends a run in one line."""
    path = tmp_path / 'args.json'
    utils.write_json(path, {'before': 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(RunStopped, match=r"args\.json can't be written"):
            utils.write_json(path, {'after': 'x' * 10000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert json.loads(path.read_text()) == {'before': 1}
    assert [p.name for p in tmp_path.iterdir()] == ['args.json']


# ----- bad images

def test_bad_image_is_skipped_in_training_only(tmp_path, flags):
    """--skip-bad-images trains past an unreadable image; evaluation stops at one all the same."""
    broken = write_folders(tmp_path / 'data')
    (broken / 'train' / 'cat' / '1.png').write_bytes(b'')
    argv = [*tiniest(broken, '--epochs', '1', '--no-repeated-aug'), '--skip-bad-images', '1']
    assert math.isfinite(main(argv)['train_loss'])
    (broken / 'val' / 'cat' / '1.png').write_bytes(b'')
    with pytest.raises(datasets.UnreadableImage, match=r'val/cat/1\.png'):
        main(argv)
