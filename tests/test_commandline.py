"""Command lines: paths, flags back into words, two spellings of each flag, and an example of each program."""
import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest
import timm
from conftest import ROOT, tiniest

import run_with_submitit
from main import main
from run import commandline
from utils import InputError, counted

FOLDERS = ('.', 'dino', 'segmentation', 'tools')
PROGRAMS = {'.'.join(path.relative_to(ROOT).with_suffix('').parts): path for folder in FOLDERS
            for path in sorted(ROOT.glob(f'{folder}/*.py')) if "__name__ == '__main__'" in path.read_text()}
PARSERS = {name: importlib.import_module(name).get_args_parser for name in PROGRAMS}


def commands(parser: argparse.ArgumentParser) -> list:
    """Return a parser and those of its commands."""
    choices = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [parser, *(command for choice in choices for command in choice.values())]


def actions(parser: argparse.ArgumentParser):
    """Yield the flags of a parser and of its commands."""
    for command in commands(parser):
        yield from (action for action in command._actions if not isinstance(action, argparse._SubParsersAction))


@pytest.mark.parametrize('program', PARSERS)
def test_help_ends_with_an_example(program):
    """The help of every program and command ends with a command that its own parser accepts, with models that exist."""
    for parser in commands(PARSERS[program]()):
        assert parser.example
        command = shlex.split(parser.format_help().rsplit('\nexample:\n', 1)[1].replace('\\\n', ''))
        shown = 'python ' * (not parser.prog.startswith('python')) + parser.prog
        assert ' '.join(command).startswith(f'{shown} ')
        words = command[len(shown.split()):]
        if program == 'run_with_submitit':
            words = parser.parse_known_args(words)[1]
            parser = PARSERS['main']()
        args = vars(parser.parse_args(words))
        assert all(timm.is_model(args[flag]) for flag in ('model', 'arch') if args.get(flag))


@pytest.mark.parametrize('program', PARSERS)
def test_every_path_is_expanded(program):
    """Every flag of a program whose value is a file or folder expands `~` and variables."""
    words = re.compile(r'\b(DIR|FILE|PATH|IN|OUT|DATA|IMAGE|PICTURE|FOLDER)\b')
    paths = [action for action in actions(PARSERS[program]()) if words.search(str(action.metavar))]
    assert paths
    assert [action.dest for action in paths if action.type not in (commandline.PATH, commandline.PATH_OBJECT)] == []


def test_home_and_variables(monkeypatch):
    """`~`, `~/x` and variables are replaced; addresses and other texts stay unchanged."""
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
def test_invalid_path(path, problem, tmp_path, monkeypatch):
    """A path with an unset variable or an unknown user is refused, and no folder is made."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f'--output-dir: .* is not a path: .*{problem}'):
        main(['--data-set', 'SAMPLE', '--device', 'cpu', '--output-dir', path])
    assert list(tmp_path.iterdir()) == []


def test_output_in_the_home_folder(folders, tmp_path, monkeypatch):
    """`--output-dir=~/run`, which the shell does not expand, makes no folder named `~`."""
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    (tmp_path / 'home').mkdir()
    monkeypatch.chdir(tmp_path)
    main(tiniest(folders, '--epochs', '1', '--output-dir=~/run'))
    assert (tmp_path / 'home' / 'run' / 'best_model.pth').exists()
    assert not (tmp_path / '~').exists()


def test_words_are_parsed_to_the_flags_that_they_come_from():
    """`words_of` is the inverse of parsing: numbers, texts, switches, lists, negative values; None and '' are unset."""
    parser = commandline.Parser()
    for name, options in {'count': dict(type=int), 'lr': dict(type=float), 'data-path': {}, 'amp': {},
                          'output-dir': dict(default=''), 'mean': dict(type=float, nargs=3), 'low': dict(type=float),
                          'repeated-aug': dict(action=argparse.BooleanOptionalAction, default=True),
                          'full-crop': dict(action=argparse.BooleanOptionalAction, default=False)}.items():
        parser.add_argument(f'--{name}', **options)
    flags = dict(count=0, lr=1e-5, data_path='a b/--c', output_dir='', mean=[.1, .2, .3], low=-1e-3, amp=None,
                 repeated_aug=False, full_crop=True)
    words = commandline.words_of(flags)
    assert vars(parser.parse_args(words)) == flags
    assert not {'--output-dir', '--amp'} & set(words)


def test_values_that_look_like_flags_are_parsed():
    """`words_of` joins a value with a dash in front to its flag."""
    parser = commandline.Parser()
    parser.add_argument('--name')
    assert parser.parse_args(commandline.words_of({'name': '--x'})).name == '--x'


@pytest.mark.parametrize(('program', 'argv', 'message'), [
    ('main', ['--pretraned', 'x.pth'], '--pretraned: no such flag (did you mean --pretrained?)'),
    ('main', ['--batch_sise=4'], '--batch_sise: no such flag (did you mean --batch-size?)'),
    ('main', ['--warmup', '3', '-lr', '1'], '--warmup: no such flag (did you mean --warmup-lr or --warmup-epochs?); '
     '-lr: no such flag (did you mean --lr?)'),
    ('main', ['\u2013epochs', '3'], '\u2013epochs: no such flag (did you mean --epochs?)'),
    ('main', ['--quux'], '--quux: no such flag'),
    ('tools.export', ['--pretraned', 'x.pth'], '--pretraned: no such flag (did you mean --pretrained?)'),
    ('tools.benchmark', ['speed', '--modle', 'x'], '--modle: no such flag (did you mean --model?)'),
    ('run_with_submitit', ['--partion', 'gpu'], '--partion: no such flag (did you mean --partition?)'),
    ('dino.train', ['--data_pat', 'x'], '--data_pat: no such flag (did you mean --data-path?)')])
def test_mistyped_flag(program, argv, message):
    """A mistyped flag is refused with a similar flag, before required flags; in commands, too."""
    with pytest.raises(InputError) as caught:
        PARSERS[program]().parse_args(argv)
    assert str(caught.value) == message


def test_values_are_no_mistyped_flags():
    """Negative numbers, values after = and words after -- are accepted."""
    parser = commandline.Parser()
    parser.add_argument('--low', type=float)
    parser.add_argument('--name')
    parser.add_argument('words', nargs='*')
    args = parser.parse_args(['--low', '-3', '--name=--x', 'a-b', '-', '--', '--epochs'])
    assert (args.low, args.name, args.words) == (-3., '--x', ['a-b', '-', '--epochs'])


@pytest.mark.parametrize(('flag', 'known'), [('--partion', '--partition'), ('--epocs', '--epochs')])
def test_mistyped_flag_of_a_job(flag, known):
    """run_with_submitit.py suggests flags of the job and of its program."""
    with pytest.raises(InputError, match=f'{flag}: no such flag .did you mean {known}'):
        run_with_submitit.parse_args(['--ngpus', '0', '--data-set', 'SAMPLE', flag, '3'])


# ----- details, and words in the singular

@pytest.mark.parametrize('program', PARSERS)
def test_every_program_has_verbose(program, monkeypatch):
    """--verbose of every program and command sets the output, and is no flag of a run."""
    for parser in commands(PARSERS[program]()):
        if parser.add_help:  # the wrapper passes the flag to its program
            monkeypatch.setattr(commandline.Output, 'verbose', False)
            action = parser._option_string_actions['--verbose']
            action(parser, argparse.Namespace(), [], '--verbose')
            assert commandline.Output.verbose
            assert action.dest == argparse.SUPPRESS


def test_verbose_prints_the_traceback(monkeypatch, capsys):
    """An error is one line, with --verbose after its traceback."""
    def fail():
        raise InputError('--x 1: must be 2')

    assert commandline.exit_code_of(fail) == 2
    assert 'Traceback' not in capsys.readouterr().err
    monkeypatch.setattr(commandline.Output, 'verbose', True)
    assert commandline.exit_code_of(fail) == 2
    err = capsys.readouterr().err
    assert err.startswith('Traceback')
    assert err.endswith(': error: --x 1: must be 2\n')


@pytest.mark.parametrize(('words', 'expected'), [
    ((1, 'file'), '1 file'), ((2, 'file'), '2 files'), ((0, 'class'), '0 classes'), ((1, 'class'), '1 class'),
    ((3, 'batch'), '3 batches'), ((1, 'other tensor', 'are'), '1 other tensor is'),
    ((2, 'file', 'are'), '2 files are')])
def test_counted(words, expected):
    """A number and its noun and verb agree."""
    assert counted(*words) == expected
