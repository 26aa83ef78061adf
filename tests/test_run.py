"""What surrounds a training step does the same for every task: main.py, DINO, and a training of 40 lines.

To have a new task tested, add it to PROGRAMS.
"""
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Callable, NamedTuple

import pytest
import torch
from conftest import REFERENCE, ROOT, tiniest, write_folders
from processes import finish, run, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
from loaders.batches import Rounds
from run import folder, parts, signals
from run.position import Epochs, Iterations
from utils import InputError, Interrupted, RunStopped

STEPS = 4  # of a round


class Kind(NamedTuple):
    """A task.

    Attributes:
        flags: words for a short run on the folders of `data`.
        length: words that make it so many rounds long.
        weights: the part of a checkpoint that is trained.
        best: name of the file of the best round.
        scalar: what TensorBoard calls the loss.
        place: of a round in TensorBoard.
        images: tags of TensorBoard's pictures.
    """
    flags: Callable[[Path], list]
    length: Callable[[int], list]
    weights: str = 'model'
    best: str = 'best_model.pth'
    scalar: str = 'train/loss'
    place: Callable[[int], int] = int
    images: tuple = ()


PROGRAMS = {
    'main': Kind(lambda data: tiniest(data, '--drop-path', '.3', '--drop', '.1', '--no-repeated-aug'),
                 lambda rounds: ['--epochs', str(rounds)], images=('train/images',)),
    'tests.rotation_training': Kind(
        lambda data: ['--device', 'cpu', '--num-workers', '0', '--batch-size', '4', '--data-path', str(data / 'train')],
        lambda rounds: ['--iterations', str(rounds * STEPS), '--every', str(STEPS)], scalar='loss',
        place=lambda i: (i + 1) * STEPS),
    'tests.small_dino': Kind(
        lambda data: ['--device', 'cpu', '--num-workers', '0', '--batch-size', '4', '--data-path', str(data),
                      '--arch', 'xcit_test', '--drop-path-rate', '.3', '--out-dim', '16', '--warmup-epochs', '1',
                      '--global-crops-size', '32', '--local-crops-size', '16', '--local-crops-number', '1',
                      '--knn-every', '1', '--knn-data-path', str(data), '--nb-knn', '3'],
        lambda rounds: ['--epochs', str(rounds)], weights='student', best='best_checkpoint.pth'),
}


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    """16 training images of two classes."""
    return write_folders(tmp_path_factory.mktemp('data'))


class Program:
    """A training as users start it: `flags` on the command line, or in this process."""

    def __init__(self, module: str, data: Path):
        self.module, self.kind = module, PROGRAMS[module]
        self.flags = [*self.kind.flags(data), *self.kind.length(3)]

    def __call__(self, run: Path, *more: str):
        return importlib.import_module(self.module).main([*self.flags, '--output-dir', str(run), *more])

    def command(self, run: Path, *more: str) -> list:
        code = f'from run.commandline import run_program; import {self.module} as program; run_program(program.main)'
        return ['-c', code, *self.flags, '--output-dir', str(run), *more]


@pytest.fixture(scope='module', params=PROGRAMS)
def program(request, data) -> Program:
    return Program(request.param, data)


@pytest.fixture(scope='module')
def whole(program, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run; not to be changed."""
    run = tmp_path_factory.mktemp('whole') / 'run'
    program(run)
    return run


def state(run: Path, name: str = 'checkpoint.pth') -> dict:
    return torch.load(run / name, weights_only=True)


def same(own, expected) -> bool:
    """Bitwise, in nested dicts and lists of tensors and plain values."""
    if isinstance(own, torch.Tensor):
        return torch.equal(own, expected)
    if isinstance(own, dict):
        return own.keys() == expected.keys() and all(same(own[key], expected[key]) for key in own)
    if isinstance(own, list):
        return len(own) == len(expected) and all(map(same, own, expected))
    return own == expected


UNTESTED = ('checkpoint_previous.pth', 'checkpoint_damaged.pth')  # whose place depends on where a run was stopped


def assert_same_run(run: Path, other: Path):
    """Bitwise the same parts in the same place, and the same curves."""
    for name in sorted(path.name for path in other.glob('*.pth') if path.name not in UNTESTED):
        own, expected = state(run, name), state(other, name)
        assert set(own) == set(expected)
        assert [key for key in own if key != 'args' and not same(own[key], expected[key])] == []
    own, expected = (list(map(json.loads, (path / 'log.txt').read_text().splitlines())) for path in (run, other))
    assert len(own) == len(expected) >= 3
    for line, expected_line in zip(own, expected):
        assert line.keys() == expected_line.keys()
        for key in set(line) - {key for key in line if key.endswith(('images_per_s', 'data_s', 'memory_mb'))}:
            assert line[key] == pytest.approx(expected_line[key], rel=1e-12), key


def interrupt(program: Program, run: Path, signum: int, look: int, monkeypatch) -> Interrupted:
    """Run in this process, and send it a signal just before it looks for one for the `look`-th time."""
    looks, agreed = iter(range(1, 1000)), signals.StopRequest.agreed

    def agreed_after_signal(self):
        if next(looks) == look:
            os.kill(os.getpid(), signum)
        return agreed(self)

    monkeypatch.setattr(signals.StopRequest, 'agreed', agreed_after_signal)
    with pytest.raises(Interrupted) as caught:
        program(run)
    monkeypatch.undo()
    return caught.value


# ----- signals and kills

@pytest.mark.parametrize(('signum', 'look'), [(signal.SIGTERM, 1), (signal.SIGINT, STEPS)])
def test_signal_is_survived_to_the_step(program, whole, tmp_path, monkeypatch, signum, look):
    """Stored where the signal came, with the way to go on, which gives bitwise the uninterrupted run."""
    error = interrupt(program, tmp_path / 'run', signum, look, monkeypatch)
    assert error.exit_code == 128 + signum
    assert f'{signal.Signals(signum).name}: stopped at ' in str(error)
    assert f'stored in {tmp_path}/run, to go on: --resume auto' in str(error)
    program(tmp_path / 'run', '--resume', 'auto')
    assert_same_run(tmp_path / 'run', whole)


def test_stop_after_epochs(program, whole, tmp_path):
    """--stop-after-epochs 1 leaves after each round as if a signal had asked; the last one ends the run."""
    for attempt in range(2):
        with pytest.raises(Interrupted, match=r'--stop-after-epochs 1: stopped at .*--resume auto') as caught:
            program(tmp_path / 'run', '--stop-after-epochs', '1', '--resume', 'auto')
        assert caught.value.exit_code == 128 + signal.SIGTERM
        assert len((tmp_path / 'run' / 'log.txt').read_text().splitlines()) == attempt + 1
    program(tmp_path / 'run', '--stop-after-epochs', '1', '--resume', 'auto')
    assert_same_run(tmp_path / 'run', whole)


def newest(run: Path) -> float:
    return max((path.stat().st_mtime for path in run.glob('checkpoint*')), default=0.)


@pytest.mark.parametrize(('world', 'kills'), [
    (1, 2), (2, 1), pytest.param(1, 20, marks=pytest.mark.slow), pytest.param(2, 20, marks=pytest.mark.slow)])
def test_kill_at_random_moments(program, tmp_path, world, kills):
    """Restarted until it is done, a training killed by kill -9 ends with bitwise the state of an undisturbed one."""
    chance, hit = random.Random(kills), 0
    undisturbed, killed, rounds = tmp_path / 'undisturbed', tmp_path / 'killed', 5 * kills
    flags = [*program.kind.length(rounds), '--save-every', '1', '--resume', 'auto',
             '--num-workers', '1' if program.module == 'main' and world == 1 else '0']
    run(program.command(undisturbed, *flags), world)
    for attempt in range(kills):
        before, began = newest(killed), time.monotonic()
        processes = start(program.command(killed, *flags), world)
        # Most kills should hit the training, some the start: the delay counts from the first sign of life, or not.
        while (attempt % 5 != 4 and newest(killed) == before and all(p.poll() is None for p in processes)
               and time.monotonic() < began + 60):
            time.sleep(.01)
        time.sleep(chance.uniform(0, .3))
        for process in processes:
            process.send_signal(signal.SIGKILL)
        hit += all(code == -signal.SIGKILL for code, _, _ in finish(processes))
    run(program.command(killed, *flags), world)
    assert hit >= kills / 2
    assert_same_run(killed, undisturbed)
    events = EventAccumulator(str(killed / 'tb'), size_guidance={'scalars': 0, 'images': 0}).Reload()
    assert [event.step for event in events.Scalars(program.kind.scalar)] == [*map(program.kind.place, range(rounds))]
    assert events.Tags()['images'] == [*program.kind.images]
    assert [len(events.Images(tag)) for tag in program.kind.images] == [1] * len(program.kind.images)


def test_two_processes_stop_together(program, tmp_path, data):
    """A signal to one of two processes stops both, stored, each saying so; exit code 143."""
    stopped = tmp_path / 'run'
    processes = start(program.command(stopped, *program.kind.length(1000)), 2)
    deadline = time.monotonic() + 60
    while not (stopped / 'checkpoint.pth').exists() and time.monotonic() < deadline:
        time.sleep(.05)
    processes[1].send_signal(signal.SIGTERM)
    results = finish(processes)
    assert [code for code, _, _ in results] == [128 + signal.SIGTERM] * 2, results
    assert all('SIGTERM: stopped at ' in err and 'Traceback' not in err for _, _, err in results)


# ----- damage

@pytest.mark.parametrize('damage', ['flip', 'truncate', 'delete'])
def test_damaged_checkpoint_gives_way_to_the_one_before(program, whole, tmp_path, capsys, damage):
    """--resume auto takes the previous one, says which and why, and reaches bitwise the same state."""
    run = shutil.copytree(whole, tmp_path / 'run')
    path = run / 'checkpoint.pth'
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content if damage == 'flip' else content[:-1000])
    if damage == 'delete':  # as a crash between the two renames leaves it
        path.unlink()
    program(run, '--resume', 'auto')
    out = capsys.readouterr().out
    assert f'{run}/checkpoint_previous.pth: goes on at ' in out
    assert damage == 'delete' or f'{path}: damaged, truncated' in out
    assert (run / 'checkpoint_damaged.pth').exists() == (damage != 'delete')
    assert_same_run(run, whole)


def test_nothing_intact_is_no_fresh_start(program, tmp_path):
    """With both checkpoints damaged --resume auto refuses, and changes nothing."""
    for name in ('checkpoint.pth', 'checkpoint_previous.pth'):
        (tmp_path / name).write_bytes(b'damaged')
    with pytest.raises(InputError, match='damaged, truncated'):
        program(tmp_path, '--resume', 'auto')
    assert {path.name for path in tmp_path.iterdir()} == {'.lock', 'checkpoint.pth', 'checkpoint_previous.pth'}


def test_diverged_training_leaves_its_last_checkpoint(program, whole, tmp_path, monkeypatch):
    """A loss that is not finite ends the run in one line that says where; what is stored stays."""
    run = shutil.copytree(whole, tmp_path / 'run')
    shutil.copy(run / 'checkpoint_previous.pth', run / 'checkpoint.pth')
    before = (run / 'checkpoint.pth').read_bytes()
    monkeypatch.setattr(torch.nn.functional, 'layer_norm', lambda x, *rest: x * float('nan'))
    with pytest.raises(RunStopped, match=r'loss is nan at .*step 0: training stopped'):
        program(run, '--resume', 'auto')
    assert (run / 'checkpoint.pth').read_bytes() == before


# ----- what is refused

def test_second_run_in_a_folder_is_refused(program, tmp_path):
    """As long as a run writes there; the holder is named, and its files are left alone."""
    with (folder.DirectoryLock(tmp_path),
          pytest.raises(InputError, match=f'another run is writing there \\(process {os.getpid()} on ')):
        program(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['.lock']


def test_another_number_of_images_a_step_is_refused(program, whole, tmp_path):
    """A resume with another batch size ends in one line, and changes nothing."""
    run = shutil.copytree(whole, tmp_path / 'run')
    before = {path: path.read_bytes() for path in run.rglob('*') if path.is_file() and path.name != '.lock'}
    with pytest.raises(InputError, match=r'was trained with 4 images a step \(.*\), not 2'):
        program(run, '--resume', 'auto', '--batch-size', '2')
    assert {path: path.read_bytes() for path in before} == before


def test_same_images_in_another_way_go_on(program, whole, tmp_path, monkeypatch):
    """Two batches of two are a step as one of four is: the run goes on in the middle of a round."""
    interrupt(program, tmp_path / 'run', signal.SIGTERM, 2, monkeypatch)
    program(tmp_path / 'run', '--resume', 'auto', '--batch-size', '2', '--accum-iter', '2')
    own, expected = ((run / 'log.txt').read_text().count('\n') for run in (tmp_path / 'run', whole))
    assert own == expected == 3


def test_checkpoint_that_lacks_a_part_is_refused(program, whole, tmp_path):
    """Weights alone are no training to go on with; the message says what to do with them."""
    torch.save({program.kind.weights: state(whole)[program.kind.weights]}, tmp_path / 'bare.pth')
    with pytest.raises(InputError, match=r'has no .*optimizer and no .* to go on with; to start from its weights'):
        program(tmp_path / 'run', '--resume', str(tmp_path / 'bare.pth'))
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(('change', 'message'), [
    ({'weights': {'weight': torch.ones(1)}}, "not this model's|its (model|weights) (is|are) of another"),
    ({'optimizer': {'state': {}, 'param_groups': []}}, 'its optimizer is'),
    ({'optimizer': None}, 'has no optimizer to go on with')], ids=['weights', 'optimizer', 'none'])
def test_checkpoint_of_another_training_is_refused(program, whole, tmp_path, change, message):
    """In one line, and no folder is left."""
    change = {program.kind.weights if part == 'weights' else part: value for part, value in change.items()}
    torch.save({**state(whole), **change}, tmp_path / 'other.pth')
    with pytest.raises(InputError, match=message) as caught:
        program(tmp_path / 'run', '--resume', str(tmp_path / 'other.pth'))
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('mistake', [
    ['--data-path', '/nowhere'], ['--accum-iter', '1000'], ['--resume', '/nowhere/checkpoint.pth'], ['--no-such-flag'],
    ['--device', 'cuda:99'], ['--amp', 'fp16'], ['--stop-after-epochs', '-1'], ['--seed', 'x']], ids=' '.join)
def test_nothing_is_written_after_bad_input(program, tmp_path, mistake):
    """One line that names the flag, and no folder."""
    with pytest.raises(InputError) as caught:
        program(tmp_path / 'run', *mistake)
    assert mistake[0] in str(caught.value)
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'run').exists()


def test_second_training_is_a_program():
    """`python -m` runs it; a mistake is one line and exit code 2."""
    result = subprocess.run([sys.executable, '-m', 'tests.rotation_training', '--no-such-flag'], cwd=ROOT,
                            capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, '')
    assert result.stderr == 'rotation_training.py: error: unrecognized arguments: --no-such-flag\n'


def test_finished_run_is_left_alone(program, whole, tmp_path, capsys):
    """--resume auto after the last round says that nothing is left to do, and writes nothing."""
    run = shutil.copytree(whole, tmp_path / 'run')
    before = {path: path.read_bytes() for path in run.rglob('*') if path.is_file() and path.name != '.lock'}
    program(run, '--resume', 'auto')
    assert 'nothing is left to do' in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before


# ----- what a run counts by

class Flags:
    iterations, every, accum_iter = 10, 4, 3


def test_iterations_keep_their_place():
    """Rounds of 4, 4 and 2; a place within a round comes back, also where only the evaluation is left to do."""
    position = Iterations(Flags)
    assert list(position.rounds_left()) == [0, 1, 2]
    position.step = 6
    assert position.state_dict() == {'iteration': 2, 'rounds': 0}
    position.finish(0)
    position.step = 3
    other = Iterations(Flags)
    other.load_state_dict(position.state_dict())
    assert (other.done, other.step, other.count()) == (0, 3, 5)
    position.step = 12
    other.load_state_dict(position.state_dict())
    assert (other.done, other.step, other.count()) == (0, 12, 8)
    position.finish(2)
    other.load_state_dict(position.state_dict())
    assert (position.count(), list(other.rounds_left())) == (10, [])


def test_rounds_go_through_the_data_once():
    """Rounds of 4, 4 and 2 of epochs with 5 batches: a round goes on where the last one ended, without a restart."""
    class Loader:
        def __init__(self):
            self.starts = []

        def set_position(self, epoch, step):
            self.epoch, self.step = epoch, step

        def __len__(self):
            return 5 - self.step

        def __iter__(self):
            self.starts.append((self.epoch, self.step))
            yield from ((self.epoch, i) for i in range(self.step, 5))

    loader = Loader()
    rounds = Rounds(loader, Iterations(Namespace(iterations=10, every=4, accum_iter=1)))
    found = []
    for number in range(3):
        rounds.set_position(number, 0)
        found.append(list(rounds))
    assert found == [[(0, 0), (0, 1), (0, 2), (0, 3)], [(0, 4), (1, 0), (1, 1), (1, 2)], [(1, 3), (1, 4)]]
    assert loader.starts == [(0, 0), (1, 0)]
    rounds.set_position(1, 2)
    assert (len(rounds), list(rounds)) == (2, [(1, 1), (1, 2)])


def test_a_run_of_one_kind_is_not_gone_on_with_by_the_other():
    """Epochs and iterations are told apart by what a checkpoint says."""
    assert not set(Epochs.required) & set(Iterations(Flags).state_dict())


@pytest.mark.parametrize(('larger', 'noted'), [(True, [True, False, True, True, False]),
                                               (False, [True, True, False, False, False])])
def test_best_metric(larger, noted):
    """Larger or smaller is better. An equal value counts as best; NaN never does."""
    metrics = parts.Metrics()
    assert [metrics.note_best('x', value, larger=larger) for value in (2., 1., 3., 3., float('nan'))] == noted
    assert metrics == {'x': 3. if larger else 1.}


# ----- a checkpoint of before

def test_older_checkpoint_goes_on_to_the_step(data, tmp_path):
    """What main.py wrote in November 2026, before there was run/: the same keys, the same end.

    The file and its end come from commit d90d2f5, stopped by SIGTERM at epoch 1, step 2, and gone on there.
    """
    shutil.copy(REFERENCE / 'checkpoint_2026_11.pth', tmp_path / 'checkpoint.pth')
    before = state(tmp_path)
    main.main([*Program('main', data).flags, '--output-dir', str(tmp_path), '--resume', 'auto'])
    after, expected = state(tmp_path), state(REFERENCE, 'checkpoint_2026_11_end.pth')
    assert before.keys() == after.keys()
    after['accuracy'] = {key: after['accuracy'][key] for key in expected['accuracy']}  # there are more now
    for key in expected:
        torch.testing.assert_close(after[key], expected[key], rtol=1e-4, atol=1e-5)
