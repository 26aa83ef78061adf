"""Command lines: paths, flags back into words, and two spellings of each flag."""
import argparse
import re
from pathlib import Path

import pytest
from conftest import tiniest

import run_with_submitit
from dino import knn, linear, train
from main import get_args_parser, main
from run import commandline
from tools import (
    benchmark,
    convert_checkpoint,
    eval_zoo,
    export,
    extract_features,
    predict,
    visualize_attention,
    visualize_features,
)
from utils import InputError

PARSERS = {module.__name__: module.get_args_parser for module in (
    run_with_submitit, benchmark, convert_checkpoint, eval_zoo, export, extract_features, predict, visualize_attention,
    visualize_features, train, knn, linear)}
PARSERS['main'] = get_args_parser


def actions(parser: argparse.ArgumentParser):
    """Yield the flags of a parser and of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from actions(command)
        else:
            yield action


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
