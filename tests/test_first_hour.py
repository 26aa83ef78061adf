"""What a new user meets: paths, flags from a file, a folder without `val`, the first lines and the table."""
import argparse
import json
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import tiniest, tiny, write_folders, write_image

import run_with_submitit
import xcit
from loaders import split
from main import get_args_parser, main, parse_args
from run import commandline, progress
from tools import (
    benchmark,
    convert_checkpoint,
    eval_zoo,
    export,
    extract_features,
    predict,
    visualize_attention,
)
from utils import InputError, RunStopped, UnreadableImage

PARSERS = {module.__name__: module.get_args_parser for module in (
    run_with_submitit, benchmark, convert_checkpoint, eval_zoo, export, extract_features, predict, visualize_attention)}
PARSERS['main'] = get_args_parser


# ----- paths

def actions(parser: argparse.ArgumentParser):
    """A parser's flags, and those of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from actions(command)
        else:
            yield action


@pytest.mark.parametrize('program', PARSERS)
def test_every_path_is_expanded(program):
    """A flag whose value is a file or folder, in any program."""
    words = re.compile(r'\b(DIR|FILE|PATH|IN|OUT|DATA|IMAGE|PICTURE|FOLDER)\b')
    paths = [action for action in actions(PARSERS[program]()) if words.search(str(action.metavar))]
    assert paths
    assert [action.dest for action in paths if action.type not in (commandline.PATH, commandline.PATH_OBJECT)] == []


def test_home_and_variables(monkeypatch):
    """`~`, `~/x` and variables are replaced; addresses, and what has none of them, stay."""
    monkeypatch.setenv('HOME', '/home/me')
    monkeypatch.setenv('SCRATCH', '~/scratch')
    for text, path in {'~': '/home/me', '~/a': '/home/me/a', '$HOME/a': '/home/me/a',
                       '${SCRATCH}/b': '/home/me/scratch/b', 'a~b/~': 'a~b/~', '': '', 'auto': 'auto',
                       'https://x/~a/$b': 'https://x/~a/$b', 'hf-hub:a/b@$c': 'hf-hub:a/b@$c',
                       'runs/%j': 'runs/%j'}.items():
        assert commandline.PATH(text) == path
    assert commandline.PATH_OBJECT('~/a') == Path('/home/me/a')


@pytest.mark.parametrize(('path', 'problem'), [
    ('$NOT_SET_ANYWHERE/x', r'\$NOT_SET_ANYWHERE is not set'), ('a/${NOT_SET_ANYWHERE}', 'is not set'),
    ('~nobody_of_this_name/x', 'no such user')])
def test_path_that_means_nothing(path, problem, tmp_path, monkeypatch):
    """No folder of that name is made."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f'--output-dir: .* is not a path: .*{problem}'):
        main(['--data-set', 'SAMPLE', '--device', 'cpu', '--output-dir', path])
    assert list(tmp_path.iterdir()) == []


def test_output_in_the_home_folder(folders, tmp_path, monkeypatch):
    """`--output-dir=~/run`, which the shell leaves as it is, makes no folder named `~`."""
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    (tmp_path / 'home').mkdir()
    monkeypatch.chdir(tmp_path)
    main(tiniest(folders, '--epochs', '1', '--output-dir=~/run'))
    assert (tmp_path / 'home' / 'run' / 'best_model.pth').exists()
    assert not (tmp_path / '~').exists()


# ----- flags from a file

def test_config_file(tmp_path):
    """YAML under the command line's flags: numbers, lists, switches, off, and keys in either spelling."""
    (tmp_path / 'c.yaml').write_text('batch-size: 8\nopt_betas: [0.8, 0.9]\nlr: 1e-3\nrepeated_aug: false\namp: off\n'
                                     'model: xcit_nano_12_p8\nfull-crop: true\nclip-grad:\n')
    args = parse_args(['--device', 'cpu', '--batch-size', '16', '--config', str(tmp_path / 'c.yaml')])
    assert (args.batch_size, args.opt_betas, args.lr, args.repeated_aug, args.amp, args.model, args.full_crop,
            args.clip_grad) == (16, [.8, .9], 1e-3, False, 'off', 'xcit_nano_12_p8', True, None)


def test_config_of_an_earlier_run(folders, tmp_path):
    """Its args.json gives the same training, of fine-tuning too."""
    torch.save(xcit.xcit_nano_12_p16(num_classes=2).state_dict(), tmp_path / 'w.pth')
    flags = tiny(folders, '--epochs', '1', '--finetune', str(tmp_path / 'w.pth'))
    first = main([*flags, '--output-dir', str(tmp_path / 'a')])
    again = main(['--config', str(tmp_path / 'a' / 'args.json'), '--output-dir', str(tmp_path / 'b')])
    assert first['train_loss'] == again['train_loss']
    runs = [json.loads((tmp_path / name / 'args.json').read_text())['args'] for name in 'ab']
    assert {key for key in runs[0] if runs[0][key] != runs[1][key]} == {'output_dir', 'config'}


@pytest.mark.parametrize(('name', 'text', 'message'), [
    ('c.yaml', 'batchsize: 8', r'c\.yaml: there is no flag --batchsize; similar: .*--batch-size'),
    ('c.json', '{"batch_size": ', 'is not valid JSON'), ('c.yaml', 'a: [', 'is not valid YAML'),
    ('c.yaml', '- 1', 'must hold flags and their values'), ('c.yaml', 'batch-size: many', "'many' is not allowed"),
    ('c.yaml', 'batch-size: [1, 2]', 'must be one value'), ('c.yaml', 'model-ema: maybe', 'must be true or false'),
    ('c.yaml', 'eval: 1', 'must be true or false'), ('c.yaml', 'amp: true', 'invalid choice'),
    (None, '', 'No such file')])
def test_config_that_cannot_be_used(tmp_path, name, text, message):
    """One line that names the file, or the flag and its value."""
    path = tmp_path / (name or 'nowhere.yaml')
    if name:
        path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        parse_args(['--device', 'cpu', '--config', str(path)])
    assert '\n' not in str(caught.value)


def test_config_of_a_job(tmp_path, capsys):
    """run_with_submitit.py reads the flags that it shares with the program, and hands the file on."""
    (tmp_path / 'c.yaml').write_text(f'data-set: SAMPLE\nnum-workers: 3\noutput-dir: {tmp_path}/run\n')
    run_with_submitit.main(['--dry-run', '--ngpus', '0', '--nodes', '1', '--config', str(tmp_path / 'c.yaml')])
    out = capsys.readouterr().out
    assert f'--config {tmp_path}/c.yaml' in out
    assert f'--output-dir {tmp_path}/run' in out
    assert '#SBATCH --cpus-per-task=3' in out


# ----- a folder without `val`

def write_class_folders(root: Path, per_class: int) -> Path:
    for name in ('cat', 'dog'):
        for i in range(per_class):
            write_image(root / name / f'{i}.png', seed=i)
    return root


NAMES = [f'{name}/{i}.jpg' for name in ('a', 'b') for i in range(500)]


def test_split_is_of_each_class_and_seeded():
    """About the fraction of each, another with another seed, and nothing on both sides."""
    one, other = (split.Split(NAMES, fraction=.2, seed=seed) for seed in (0, 1))
    assert one.val | one.train == set(NAMES)
    assert not one.val & one.train
    for name in ('a', 'b'):
        assert 75 < sum(image.startswith(name) for image in one.val) < 125
    assert one.val != other.val
    assert one.val == split.Split(reversed(NAMES), fraction=.2, seed=0).val


def test_pictures_keep_their_side():
    """Where others come, in whatever class, and where some go."""
    few = split.Split(NAMES[::2], fraction=.2, seed=0)
    assert few.val <= split.Split(NAMES, fraction=.2, seed=0).val


@pytest.mark.parametrize('fraction', [.001, .999])
def test_split_leaves_each_side_a_picture(fraction):
    """Of each class with two; a single one is for training."""
    for count in (2, 3, 10):
        divided = split.Split([f'a/{i}' for i in range(count)], fraction=fraction, seed=0)
        assert divided.val
        assert divided.train
    assert split.Split(['a/0'], fraction=.999, seed=0).val == set()


@pytest.mark.parametrize('folder', ['train', '.'])
def test_folder_without_val(tmp_path, folder, monkeypatch):
    """Trains, keeps its split when pictures come and the training goes on, and is evaluated on it without the flag."""
    data, run = tmp_path / 'data', tmp_path / 'run'
    write_class_folders(data / folder, 10)
    flags = tiniest(data, '--val-fraction', '.3', '--output-dir', str(run), '--epochs', '1')
    stats = main(flags)
    stored = json.loads((run / 'split.json').read_text())
    assert stored['val_fraction'] == .3
    assert len(stored['train']) + len(stored['val']) == 20
    stored['val'], stored['train'] = stored['val'][1:], [*stored['train'], stored['val'][0]]
    (run / 'split.json').write_text(json.dumps(stored))
    main([*flags, '--epochs', '2', '--resume', 'auto'])
    assert json.loads((run / 'split.json').read_text()) == {**stored, 'train': sorted(stored['train'])}
    evaluated = main(tiniest(data, '--eval', '--resume', str(run / 'best_model.pth')))
    assert evaluated['images'] == len(stored['val'])
    assert stats['test_acc1'] >= 0


@pytest.mark.parametrize(('flags', 'message'), [
    (['--val-fraction', '.2'], '--val-fraction 0.2: .* has a val/ folder of its own'),
    (['--val-fraction', '1'], 'not allowed'), (['--val-fraction', '0'], 'not allowed'),
    (['--val-fraction', '.2', '--data-set', 'SAMPLE'], '--val-fraction 0.2: is for --data-set FOLDER, not SAMPLE')])
def test_val_fraction_that_cannot_be(folders, flags, message):
    """A folder with `val` has no need of it, and other sets have their own."""
    with pytest.raises(InputError, match=message):
        main(tiniest(folders, *flags))


def test_folder_without_val_names_the_remedy(tmp_path):
    """The refusal says which flag makes one."""
    write_class_folders(tmp_path / 'train', 4)
    with pytest.raises(InputError, match=r'no val/ or test/ folder there.*--val-fraction'):
        main(tiniest(tmp_path))


def test_damaged_split(tmp_path):
    """One line, not another split."""
    (tmp_path / 'split.json').write_text('{"train": 3}')
    with pytest.raises(InputError, match=r'split\.json: is not a split of pictures'):
        split.read(tmp_path)


# ----- small data

@pytest.mark.parametrize(('flags', 'batch'), [([], 16), (['--mixup', '0', '--cutmix', '0'], 16)])
def test_batch_is_lowered_to_the_pictures(folders, tmp_path, capsys, flags, batch):
    """With a notice; the learning rate, the log and the checkpoint know it."""
    main(tiniest(folders, '--batch-size', '64', '--epochs', '1', '--output-dir', str(tmp_path), *flags))
    assert f'--batch-size 64: an epoch has 16 images for each process; goes on with a batch of {batch}\n' in (
        capsys.readouterr().out)
    assert torch.load(tmp_path / 'checkpoint.pth', weights_only=True)['batch'] == batch
    assert json.loads((tmp_path / 'args.json').read_text())['args']['batch_size'] == batch


def test_odd_number_of_pictures_under_mixup(tmp_path, capsys):
    """Pairs need an even batch."""
    write_folders(tmp_path / 'data', per_class=5)
    (tmp_path / 'data' / 'train' / 'cat' / '0.png').unlink()
    main(tiniest(tmp_path / 'data', '--batch-size', '64', '--epochs', '1', '--no-repeated-aug'))
    assert 'goes on with a batch of 8' in capsys.readouterr().out


# ----- the first lines

def first_lines(capsys, folders, *flags) -> str:
    main(tiniest(folders, '--epochs', '1', *flags))
    return capsys.readouterr().out


def test_pace_is_told(capsys, folders):
    """The real rate, steps and warm-up steps, and the pictures that fill no batch."""
    out = first_lines(capsys, folders, '--batch-size', '6', '--lr', '.1', '--warmup-epochs', '3', '--epochs', '5',
                      '--stop-after-epochs', '0', '--accum-iter', '2')
    assert 'Learning rate 0.00234 at its peak: --lr 0.1 x 12 images a step / 512\n' in out
    assert 'An epoch has 1 steps, the warm-up 3; 4 of 16 pictures of an epoch fill no batch and are left out\n' in out
    assert 'Warning' not in out


def test_rate_that_hardly_learns(capsys, folders):
    """The flag, and the value to give."""
    out = first_lines(capsys, folders, '--lr', '4e-4', '--batch-size', '8')
    assert ('Warning: --lr 0.0004 has become 6.25e-06, since a step has 8 images and not 512; '
            'for a rate of 0.0004, give --lr 0.0256\n') in out


def test_warmup_as_long_as_the_training(capsys, folders):
    """The rate would never reach its peak."""
    out = first_lines(capsys, folders, '--warmup-epochs', '1')
    assert 'Warning: --warmup-epochs 1 is as long as the training (--epochs 1)' in out


def test_flags_are_not_dumped(capsys, folders):
    """They are in args.json; the first lines can be read."""
    out = first_lines(capsys, folders)
    assert 'Namespace' not in out
    assert max(map(len, out.splitlines())) < 250


# ----- progress

def test_epochs_are_a_table(capsys, folders):
    """A header once, and a line for each epoch whose columns stand under it."""
    main(tiniest(folders, '--epochs', '3', '--test-freq', '2'))
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r' +(epoch|\d) ', line)]
    assert len(lines) == 4
    header, *rows = lines
    assert header.split()[:4] == ['epoch', 'loss', 'lr', 'Acc@1']
    assert {len(line) for line in lines} == {len(header)}
    assert [row.split()[0] for row in rows] == ['0', '1', '2']
    assert [row.split()[3] == '-' for row in rows] == [False, True, False]


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    now = [1000.]
    monkeypatch.setattr(progress.time, 'perf_counter', lambda: now[0])
    monkeypatch.setattr(progress.Progress, 'last_line', -float('inf'))
    return now


def test_lines_come_by_time(clock, capsys):
    """At the first step, with a time left, then every 20 seconds whatever a step takes; not again for each loop."""
    for header in ('Epoch 0', 'Epoch 1'):
        for _ in progress.Progress([torch.zeros(2, 3)] * 30, header, torch.device('cpu')):
            clock[0] += 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('Epoch 0 [ 1/30]  eta 0:01:27  ')
    steps = [int(re.search(r'\[ *(\d+)/', line)[1]) for line in lines]
    assert steps == [1, 8, 15, 22, 29, 6, 13, 20, 27]


@pytest.mark.parametrize(('columns', 'bar'), [(80, True), (0, False)])
def test_terminal_without_columns_gets_lines(monkeypatch, columns, bar):
    """As some programs make them."""
    monkeypatch.setattr(progress.sys.stderr, 'isatty', lambda: True, raising=False)
    monkeypatch.setattr(progress.sys.stderr, 'fileno', lambda: 2, raising=False)
    monkeypatch.setattr(os, 'get_terminal_size', lambda fd: os.terminal_size((columns, 24)))
    assert progress.shows_bar() is bar


# ----- what is not lost

def test_bad_evaluation_picture_loses_no_epoch(folders, tmp_path, monkeypatch):
    """The round is stored before it is tested; once the picture is well, it is tested, and nothing trained again."""
    flags = tiniest(folders, '--epochs', '2', '--save-every', '0')
    whole, run = tmp_path / 'whole', tmp_path / 'run'
    main([*flags, '--output-dir', str(whole)])
    picture = folders / 'val' / 'cat' / '0.png'
    good = picture.read_bytes()
    monkeypatch.setattr('datasets.probe_images', lambda *args, **kwargs: picture.write_bytes(b''))
    with pytest.raises(UnreadableImage, match=r'cat/0\.png: .*--skip-bad-images is for training pictures alone'):
        main([*flags, '--output-dir', str(run)])
    stored = torch.load(run / 'checkpoint.pth', weights_only=True)
    assert (stored['epoch'], stored['step']) == (-1, 4)
    monkeypatch.setattr('datasets.probe_images', lambda *args, **kwargs: picture.write_bytes(good))
    main([*flags, '--output-dir', str(run), '--resume', 'auto'])
    first, second = (torch.load(path / 'checkpoint.pth', weights_only=True) for path in (whole, run))
    for key, value in first['model'].items():
        torch.testing.assert_close(value, second['model'][key], rtol=0, atol=0)
    logs = [[json.loads(line) for line in (path / 'log.txt').read_text().splitlines()] for path in (whole, run)]
    for one, other in zip(*logs):
        assert one['train_loss'] == pytest.approx(other['train_loss'])
        assert one['test_acc1'] == other['test_acc1']


def test_bad_training_picture_names_the_flag(folders):
    """That replaces it by another."""
    (folders / 'train' / 'cat' / '0.png').write_bytes(b'')
    with pytest.raises(UnreadableImage, match=r'cat/0\.png: .*--skip-bad-images N replaces up to N'):
        main(tiniest(folders))


def test_predict_goes_on_past_what_is_missing(folders, tmp_path, capsys):
    """Missing paths and empty folders are named on stderr, the exit code is 1, and the others are predicted."""
    main(tiny(folders, '--epochs', '1', '--output-dir', str(tmp_path / 'run')))
    capsys.readouterr()
    (tmp_path / 'empty').mkdir()
    picture = folders / 'val' / 'cat' / '0.png'
    with pytest.raises(RunStopped, match=r'\(2 of 3 could not be read\)') as caught:
        predict.main(['no/such.png', str(picture), str(tmp_path / 'empty'), '--pretrained',
                      str(tmp_path / 'run' / 'best_model.pth'), '--device', 'cpu', '--num-workers', '0'])
    out, err = capsys.readouterr()
    assert str(picture) in out
    assert 'no/such.png: no such file' in err
    assert 'no images in this folder' in str(caught.value)
    with pytest.raises(InputError, match='no such file'):
        predict.main(['no/such.png', 'nor/this.png', '--pretrained', str(tmp_path / 'run' / 'best_model.pth')])
