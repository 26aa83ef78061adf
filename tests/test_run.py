"""The behaviour of runs that is the same for every task: main.py, DINO, and a program of 40 lines.

To test a new task, add it to PROGRAMS.
"""
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Callable, NamedTuple

import pytest
import torch
from conftest import REFERENCE, ROOT, tiniest, write_folders
from processes import finish, run, start
from resuming import assert_same_run, interrupt, interrupt_within_round, is_same, log_lines, state
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
from dino import linear, train
from run import folder
from utils import InputError, Interrupted, RunStopped

STEPS = 4  # of a round
ROUNDS = 3


class Kind(NamedTuple):
    """A task.

    Attributes:
        flags: flags of a short run on the folders of `data`.
        length: flags for a number of rounds.
        weights: key of the trained weights in a checkpoint.
        scalar: TensorBoard's name of the loss.
        place: step of a round in TensorBoard.
        images: tags of TensorBoard's pictures.
    """
    flags: Callable[[Path], list]
    length: Callable[[int], list]
    weights: str = 'model'
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
        lambda rounds: ['--epochs', str(rounds)], weights='student'),
    'tests.small_segmenter': Kind(
        lambda data: ['--device', 'cpu', '--num-workers', '0', '--batch-size', '4', '--data-set', 'SAMPLE',
                      '--crop-size', '64', '--short', '96', '--long', '384', '--no-report', '--drop-path', '.3'],
        lambda rounds: ['--iterations', str(rounds * STEPS), '--every', str(STEPS)], place=lambda i: (i + 1) * STEPS),
}


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    """16 training images of two classes."""
    return write_folders(tmp_path_factory.mktemp('data'))


class Program:
    """A training program, on a command line or in this process."""

    def __init__(self, module: str, data: Path):
        self.module, self.kind = module, PROGRAMS[module]
        self.flags = [*self.kind.flags(data), *self.kind.length(ROUNDS)]

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


def contents(run: Path) -> dict:
    return {path: path.read_bytes() for path in run.rglob('*') if path.is_file() and path.name != '.lock'}


# ----- signals and kills

@pytest.mark.parametrize(('signum', 'check'), [(signal.SIGTERM, 1), (signal.SIGINT, STEPS)])
def test_run_resumes_at_the_step_of_a_signal(program, whole, tmp_path, monkeypatch, signum, check):
    """A signal stores the run and prints how to resume; the resumed run is bitwise the uninterrupted one."""
    error = interrupt(lambda: program(tmp_path / 'run'), signum, check, monkeypatch)
    assert error.exit_code == 128 + signum
    assert f'{signal.Signals(signum).name}: stopped at ' in str(error)
    assert f'stored in {tmp_path}/run, to resume: --resume auto' in str(error)
    program(tmp_path / 'run', '--resume', 'auto')
    assert_same_run(tmp_path / 'run', whole, rounds=ROUNDS)


def test_stop_after_epochs(program, whole, tmp_path):
    """--stop-after-epochs 1 stops after each round as a signal does; the last round ends the run."""
    for attempt in range(2):
        with pytest.raises(Interrupted, match=r'--stop-after-epochs 1: stopped at .*--resume auto') as caught:
            program(tmp_path / 'run', '--stop-after-epochs', '1', '--resume', 'auto')
        assert caught.value.exit_code == 128 + signal.SIGTERM
        assert len(log_lines(tmp_path / 'run')) == attempt + 1
    program(tmp_path / 'run', '--stop-after-epochs', '1', '--resume', 'auto')
    assert_same_run(tmp_path / 'run', whole, rounds=ROUNDS)


def newest(run: Path) -> float:
    return max((path.stat().st_mtime for path in run.glob('checkpoint*')), default=0.)


@pytest.mark.parametrize(('world', 'kills'), [
    (1, 1), (2, 1), pytest.param(1, 20, marks=pytest.mark.slow), pytest.param(2, 20, marks=pytest.mark.slow)])
def test_kill_at_random_moments(program, tmp_path, world, kills):
    """A run that is killed by kill -9 and restarted until it is done ends bitwise like an undisturbed run."""
    chance, hits = random.Random(kills), 0
    undisturbed, killed, rounds = tmp_path / 'undisturbed', tmp_path / 'killed', 5 * kills
    flags = [*program.kind.length(rounds), '--save-every', '1', '--resume', 'auto',
             '--num-workers', '1' if program.module == 'main' and world == 1 else '0']
    run(program.command(undisturbed, *flags), world)
    for attempt in range(kills):
        before, start_time = newest(killed), time.monotonic()
        processes = start(program.command(killed, *flags), world)
        # Most kills should hit the training, some the start: every fifth delay does not wait for a checkpoint.
        while (attempt % 5 != 4 and newest(killed) == before and all(p.poll() is None for p in processes)
               and time.monotonic() < start_time + 60):
            time.sleep(.01)
        time.sleep(chance.uniform(0, .3))
        for process in processes:
            process.send_signal(signal.SIGKILL)
        hits += all(code == -signal.SIGKILL for code, _, _ in finish(processes))
    run(program.command(killed, *flags), world)
    assert hits >= kills / 2
    assert_same_run(killed, undisturbed, rounds=rounds)
    events = EventAccumulator(str(killed / 'tb'), size_guidance={'scalars': 0, 'images': 0}).Reload()
    assert [event.step for event in events.Scalars(program.kind.scalar)] == [*map(program.kind.place, range(rounds))]
    assert events.Tags()['images'] == [*program.kind.images]
    assert [len(events.Images(tag)) for tag in program.kind.images] == [1] * len(program.kind.images)


def test_two_processes_stop_together(program, tmp_path):
    """A signal to one of two processes stops both, stored, each with a line; exit code 143."""
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
def test_damaged_checkpoint_is_replaced_by_the_previous_one(program, whole, tmp_path, capsys, damage):
    """--resume auto resumes from the previous checkpoint, logs why, and reaches bitwise the same state."""
    run = shutil.copytree(whole, tmp_path / 'run')
    path = run / 'checkpoint.pth'
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content if damage == 'flip' else content[:-1000])
    if damage == 'delete':  # as a crash between the two renames leaves the folder
        path.unlink()
    program(run, '--resume', 'auto')
    out = capsys.readouterr().out
    assert f'{run}/checkpoint_previous.pth: resumes at ' in out
    assert damage == 'delete' or f'{path}: damaged, truncated' in out
    assert (run / 'checkpoint_damaged.pth').exists() == (damage != 'delete')
    assert_same_run(run, whole, rounds=ROUNDS)


def test_damaged_checkpoints_are_not_a_fresh_start(program, tmp_path):
    """With both checkpoints damaged --resume auto refuses, and changes nothing."""
    for name in ('checkpoint.pth', 'checkpoint_previous.pth'):
        (tmp_path / name).write_bytes(b'damaged')
    before = contents(tmp_path)
    with pytest.raises(InputError, match='damaged, truncated'):
        program(tmp_path, '--resume', 'auto')
    assert contents(tmp_path) == before


def test_diverged_run_keeps_its_last_checkpoint(program, whole, tmp_path, monkeypatch):
    """A loss that is not finite ends the run in one line with the step; the checkpoint is unchanged."""
    run = shutil.copytree(whole, tmp_path / 'run')
    shutil.copy(run / 'checkpoint_previous.pth', run / 'checkpoint.pth')
    before = (run / 'checkpoint.pth').read_bytes()
    monkeypatch.setattr(torch.nn.functional, 'layer_norm', lambda x, *rest: x * float('nan'))
    with pytest.raises(RunStopped, match=r'loss is nan at .*step 0: run stopped'):
        program(run, '--resume', 'auto')
    assert (run / 'checkpoint.pth').read_bytes() == before


# ----- refusals

def test_second_run_in_a_folder_is_refused(program, tmp_path):
    """A folder that another run writes to is refused with the name of its process, and left alone."""
    with (folder.DirectoryLock(tmp_path),
          pytest.raises(InputError, match=f'another run is writing there \\(process {os.getpid()} on ')):
        program(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['.lock']


def test_another_number_of_images_per_step_is_refused(program, whole, tmp_path):
    """A resume with another batch size ends in one line, and changes nothing."""
    run = shutil.copytree(whole, tmp_path / 'run')
    before = contents(run)
    with pytest.raises(InputError, match=r'was trained with 4 images a step \(.*\), not 2'):
        program(run, '--resume', 'auto', '--batch-size', '2')
    assert contents(run) == before


def test_other_batches_within_an_epoch_are_refused(program, tmp_path, monkeypatch):
    """A resume within an epoch with as many images per step in other batches is refused; iterations continue."""
    interrupt_within_round(lambda: program(tmp_path / 'run'), 2, monkeypatch)
    if 'step' in state(tmp_path / 'run'):
        with pytest.raises(InputError, match=r'stored within an epoch, with 4 images a batch and --accum-iter 1, not 2'
                                             r' and 2; resume with these values, or from the end of an epoch$'):
            program(tmp_path / 'run', '--resume', 'auto', '--batch-size', '2', '--accum-iter', '2')
    else:
        program(tmp_path / 'run', '--resume', 'auto', '--batch-size', '2', '--accum-iter', '2')
        assert len(log_lines(tmp_path / 'run')) == ROUNDS


def test_other_batches_of_as_many_images_continue_a_run(program, whole, tmp_path):
    """A resume at the end of a round with as many images per step in other batches is allowed."""
    with pytest.raises(Interrupted):
        program(tmp_path / 'run', '--stop-after-epochs', '1')
    program(tmp_path / 'run', '--resume', 'auto', '--batch-size', '2', '--accum-iter', '2')
    assert len(log_lines(tmp_path / 'run')) == len(log_lines(whole)) == ROUNDS


def test_checkpoint_that_lacks_a_part_is_refused(program, whole, tmp_path):
    """Bare weights can't be resumed; the message contains the flag that accepts them."""
    torch.save({program.kind.weights: state(whole)[program.kind.weights]}, tmp_path / 'bare.pth')
    with pytest.raises(InputError, match=r'has no .*optimizer and no .* to resume with; to start from its weights'):
        program(tmp_path / 'run', '--resume', str(tmp_path / 'bare.pth'))
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(('change', 'message'), [
    ({'weights': {'weight': torch.ones(1)}}, 'the weights do not match this|its model does not match this run'),
    ({'optimizer': {'state': {}, 'param_groups': []}}, 'optimizer does not match '),
    ({'optimizer': None}, 'has no optimizer to resume with')], ids=['weights', 'optimizer', 'none'])
def test_checkpoint_of_another_run_is_refused(program, whole, tmp_path, change, message):
    """A checkpoint with foreign parts ends in one line, and no folder is left."""
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
    """Bad input ends in one line with the flag, and no folder."""
    with pytest.raises(InputError) as caught:
        program(tmp_path / 'run', *mistake)
    assert mistake[0] in str(caught.value)
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'run').exists()


def test_second_training_is_a_program():
    """rotation_training.py runs as a script; a mistake is one line and exit code 2."""
    result, = finish(start([ROOT / 'tests' / 'rotation_training.py', '--no-such-flag'], 1))
    assert result == (2, '', 'rotation_training.py: error: --no-such-flag: no such flag\n')


# ----- finished and older runs

def test_finished_run_is_left_alone(program, whole, tmp_path, capsys):
    """--resume auto after the last round logs that nothing is left to do, and writes nothing."""
    run = shutil.copytree(whole, tmp_path / 'run')
    before = contents(run)
    program(run, '--resume', 'auto')
    assert 'nothing is left to do' in capsys.readouterr().out
    assert contents(run) == before


def test_resume_auto_reads_a_file_once(program, whole, tmp_path, monkeypatch):
    """The checkpoint that --resume auto examines is the one that is resumed, without another look at the file."""
    files, load = [], torch.load

    def counted(file, *args, **kwargs):
        files.append(Path(file.name).name)
        return load(file, *args, **kwargs)

    run = shutil.copytree(whole, tmp_path / 'run')
    monkeypatch.setattr(torch, 'load', counted)
    program(run, '--resume', 'auto')
    assert files == ['checkpoint.pth']


def test_files_of_an_earlier_run_of_another_task_are_set_aside(program, whole, tmp_path):
    """A new run in a folder moves what the folder's args.json lists, also files that its own task does not write."""
    run = shutil.copytree(whole, tmp_path / 'run')
    described = json.loads((run / 'args.json').read_text())
    described['files'] += ['sheet-*.png', 'other.pth']
    (run / 'args.json').write_text(json.dumps(described))
    for name in ('sheet-1.png', 'other.pth', 'notes.txt'):
        (run / name).write_text(name)
    before = (run / 'checkpoint.pth').read_bytes()
    with pytest.raises(Interrupted):
        program(run, '--stop-after-epochs', '1')
    aside = {path.name for path in (run / 'previous-1').iterdir()}
    assert {'checkpoint.pth', 'args.json', 'log.txt', 'tb', 'sheet-1.png', 'other.pth'} <= aside
    assert (run / 'previous-1' / 'checkpoint.pth').read_bytes() == before
    assert (run / 'notes.txt').exists()
    assert len(log_lines(run)) == 1


@pytest.mark.parametrize(('module', 'name'), [
    ('main', '2026_11'), ('main', 'main'), ('tests.small_dino', 'dino')], ids=lambda value: value.split('.')[-1])
def test_older_checkpoint_is_resumed_to_the_same_end(data, tmp_path, module, name):
    """Checkpoints of earlier versions, stopped by SIGTERM within an epoch, end as those versions ended them.

    2026_11 is of commit d90d2f5, before there was run/; `main` and `dino` are of commit d02d497.
    """
    shutil.copy(REFERENCE / f'checkpoint_{name}.pth', tmp_path / 'checkpoint.pth')
    before = state(tmp_path)
    Program(module, data)(tmp_path, '--resume', 'auto')
    after, expected = state(tmp_path), state(REFERENCE, f'checkpoint_{name}_end.pth')
    assert before.keys() == after.keys()
    if 'accuracy' in expected:
        after['accuracy'] = {key: after['accuracy'][key] for key in expected['accuracy']}  # there are more now
    assert [key for key in expected if key != 'args' and not is_same(after[key], expected[key], rtol=1e-4)] == []


@pytest.mark.parametrize('name', ['log.txt', 'tb', 'args.json', 'checkpoint.pth'])
def test_files_of_the_user_are_refused(program, tmp_path, name):
    """A new run is refused in a folder with a file of the user's own that it would write, and the file is unchanged."""
    (tmp_path / name).write_text('[1, 2]')
    for resume in ([], ['--resume', 'auto'] * (name != 'checkpoint.pth')):
        with pytest.raises(InputError, match=f'--output-dir .*: contains {name}, which no earlier run has written'):
            program(tmp_path, *resume)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: '[1, 2]'}


def test_report_beside_an_evaluation_without_one(tmp_path):
    """A user's own report/ does not belong to an evaluation that only wrote eval.json; odd lists are ignored."""
    (tmp_path / 'report').mkdir()
    (tmp_path / 'eval.json').write_text('{"args": {}}')
    (tmp_path / 'args.json').write_text('{"args": {}, "files": ["", 3, "checkpoint.pth", "args.json"]}')
    assert [file.name for file in folder.files_of_earlier_run(tmp_path)] == ['args.json', 'eval.json']
    (tmp_path / 'report' / 'summary.json').touch()
    (tmp_path / 'args.json').write_text('{"args": {}, "files": null}')
    assert tmp_path / 'report' in folder.files_of_earlier_run(tmp_path)


@pytest.mark.parametrize(('parse', 'argv', 'own', 'refused'), [
    (main.parse_args, [], 'report', True), (main.parse_args, ['--eval'], 'report', True),
    (main.parse_args, ['--eval'], 'log.txt', False), (train.parse_args, [], 'report', False),
    (train.parse_args, [], 'backbone.pth', True), (train.parse_args, ['--preview-crops', 'x'], 'log.txt', False),
    (linear.parse_args, ['--train-features', 'a', '--val-features', 'b'], 'linear.pth', True)])
def test_each_program_refuses_what_it_would_write(parse, argv, own, refused, tmp_path, monkeypatch):
    """In the current folder, a program refuses files that it would write, before any work, and no others."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / own).touch()
    with pytest.raises(InputError, match=f'contains {own}') if refused else contextlib.nullcontext():
        parse(['--device', 'cpu', '--output-dir', '.', *argv])


def test_only_files_of_runs_are_set_aside(tmp_path):
    """Files that args.json or eval.json account for are moved, of earlier versions too; a user's report/ stays."""
    for args, moved in (({'files': ['checkpoint.pth', 'log.txt', 'args.json']}, {'checkpoint.pth', 'args.json'}),
                        ({'files': ['split.json']}, {'checkpoint.pth', 'args.json', 'split.json', 'report'})):
        for name in ('checkpoint.pth', 'split.json', 'report'):
            (tmp_path / name).touch()
        (tmp_path / 'args.json').write_text(json.dumps({'args': {}, **args}))
        folder.set_aside(tmp_path, ['checkpoint.pth'])
        aside = max(tmp_path.glob('previous-*'))
        assert {path.name for path in aside.iterdir()} == moved
    (tmp_path / 'eval.json').write_text('{"args": {}}')
    folder.set_aside(tmp_path, ['checkpoint.pth'])
    assert [path.name for path in (tmp_path / 'previous-3').iterdir()] == ['eval.json']


def test_lock_of_another_program_is_unchanged(tmp_path):
    """A .lock that no run has written is refused, and keeps its content."""
    (tmp_path / '.lock').write_text('mine')
    with pytest.raises(InputError, match='no file of a run'):
        folder.DirectoryLock(tmp_path)
    assert (tmp_path / '.lock').read_text() == 'mine'


def points(run: Path, *folder: str) -> dict:
    """Return the steps of each scalar and picture that TensorBoard shows of a run, in the order of their files."""
    events = EventAccumulator(str(run.joinpath('tb', *folder)), size_guidance={'scalars': 0, 'images': 0}).Reload()
    return {**{tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()['scalars']},
            **{tag: [event.step for event in events.Images(tag)] for tag in events.Tags()['images']}}


def test_points_within_epochs(program, tmp_path, monkeypatch, ordered_events):
    """--log-every adds points of loss and rate, counted in steps over all rounds; a resume repeats and loses none."""
    flags = ['--log-every', '2', '--output-dir', str(tmp_path)]
    interrupt_within_round(lambda: program(tmp_path, *flags), 3, monkeypatch)
    program(tmp_path, *flags, '--resume', 'auto')
    shown = points(tmp_path, 'steps')
    assert shown['steps/loss'] == shown['steps/lr'] == shown['steps/grad_norm'] == [*range(2, ROUNDS * STEPS + 1, 2)]
    assert points(tmp_path)[program.kind.scalar] == [*map(program.kind.place, range(ROUNDS))]


def test_training_time_counts_the_whole_run(program, tmp_path, monkeypatch, capsys):
    """The last line has the time of all processes of a run."""
    with pytest.raises(Interrupted):
        program(tmp_path, '--stop-after-epochs', '1')
    content = state(tmp_path)
    assert 0 < content['seconds'] < 60
    torch.save({**content, 'seconds': 7200.}, tmp_path / 'checkpoint.pth')
    program(tmp_path, '--resume', 'auto')
    assert 'Training time 2:00:0' in capsys.readouterr().out
