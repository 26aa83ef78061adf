"""Structure of the repository: imports in one direction, values instead of flags, short files, plain words."""
import ast
import re
from pathlib import Path
from typing import Iterator

import pytest
from conftest import ROOT

FOLDERS = ('run', 'loaders', 'reports', 'tools', 'dino', 'inference', 'classification', 'slurm', 'dense',
           'segmentation')
FILES = [*ROOT.glob('*.py'), *(path for folder in FOLDERS for path in ROOT.glob(f'{folder}/*.py'))]
MODULES = {'.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__'): path for path in FILES}
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in FILES}
PROGRAMS = ('main', 'run_with_submitit', 'dino.train', 'dino.knn', 'dino.linear', 'segmentation.main',
            'segmentation.predict', 'segmentation.evaluate')
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def imports(path: Path) -> set:
    """Return the modules of this repository that a file imports anywhere, inside functions too; not itself."""
    names = set()
    for node in ast.walk(TREES[path.relative_to(ROOT).as_posix()]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            submodules = {f'{node.module}.{alias.name}' for alias in node.names} & MODULES.keys()
            names |= submodules or {node.module}
    return {name for name in names & MODULES.keys() if MODULES[name] != path}


def in_circles(needed: dict) -> dict:
    """Return the nodes that lie on a circle, or lead into one."""
    remaining = dict(needed)
    while free := [name for name, others in remaining.items() if not others & remaining.keys()]:
        for name in free:
            del remaining[name]
    return remaining


def place(file: str, node: ast.AST) -> str:
    return f'{file}:{node.lineno}'


# ----- imports

def test_no_import_circle_of_files():
    """Every file can be read and imported alone."""
    needed = {name: imports(path) for name, path in MODULES.items()}
    assert sum(map(len, needed.values())) > 50
    assert in_circles(needed) == {}


def test_no_import_circle_of_folders():
    """Folders, and the files beside them, import each other in one direction."""
    needed = {}
    for name, path in MODULES.items():
        folder = name.partition('.')[0]
        needed.setdefault(folder, set()).update({other.partition('.')[0] for other in imports(path)} - {folder})
    assert in_circles(needed) == {}


@pytest.mark.parametrize(('folder', 'allowed'), [
    ('run', {'utils', 'run'}), ('loaders', {'utils', 'run', 'loaders', 'samplers'}),
    ('reports', {'utils', 'run', 'reports'}), ('slurm', {'utils', 'run', 'slurm'})])
def test_rooms_import_no_task(folder, allowed):
    """The rooms that tasks share import no program, no model, and (but for loaders/) no data."""
    offenders = {f'{path.name} imports {name}' for path in ROOT.glob(f'{folder}/*.py') for name in imports(path)
                 if name.partition('.')[0] not in allowed}
    assert offenders == set()


def test_tools_import_no_program_and_are_not_imported():
    """Programs and tools share rooms, not each other; a tool may use another tool's helpers, not its program."""
    programs = {*PROGRAMS, *(name for name, path in MODULES.items()
                             if name.startswith('tools.') and "__name__ == '__main__'" in path.read_text())}
    offenders = {f'{name} imports {other}' for name, path in MODULES.items() for other in imports(path)
                 if (name.startswith('tools.') and other in programs)
                 or (not name.startswith('tools') and other.startswith('tools'))}
    assert offenders == set()


def names_used(tree: ast.Module) -> set:
    """Return the imports and attributes of a file by their full names."""
    names, known = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            before = f'{node.module}.' if isinstance(node, ast.ImportFrom) else ''
            names |= {before + alias.name for alias in node.names}
            known.update({alias.asname or alias.name: before + alias.name for alias in node.names})
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)):
            first, dot, rest = ast.unparse(node).partition('.')
            names.add(known.get(first, first) + dot + rest)
    return names


@pytest.mark.parametrize(('word', 'home'), [('torch.distributed', 'run/processes.py'), ('StreamLoader', 'loaders')])
def test_names_with_one_home(word, home):
    """Only one file calls torch.distributed; only loaders/ distinguishes streams from other loaders."""
    users = [file for file, tree in TREES.items() if any(word in name for name in names_used(tree))]
    assert users
    assert [user for user in users if not user.startswith(home)] == []


# ----- tasks and flags

TASK_WORDS = re.compile(r'dino|knn|k-nn|linear\.pth|test_acc1|(?<![a-z])ema(?![a-z])|teacher|segment|detect', re.I)


def texts_and_names(tree: ast.Module) -> Iterator[tuple]:
    """Yield (node, text) for the names and string constants of a file, docstrings included, but for `Source:` lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node, re.sub(r'^ *Source: .*$', '', node.value, flags=re.MULTILINE)
        for field in ('id', 'attr', 'arg', 'name'):
            if isinstance(getattr(node, field, None), str):
                yield node, getattr(node, field)


@pytest.mark.parametrize('folder', ['run', 'reports'])
def test_rooms_name_no_task(folder):
    """run/ and reports/ get names of tasks, their files and metrics from the caller."""
    offenders = {f'{place(file, node)} {TASK_WORDS.search(text)[0]}' for file, tree in TREES.items()
                 if file.startswith(f'{folder}/') for node, text in texts_and_names(tree)
                 if hasattr(node, 'lineno') and TASK_WORDS.search(text)}
    assert offenders == set()


def takes_args(file: str, tree: ast.Module) -> Iterator[str]:
    """Yield the functions with a parameter `args`, which is not `*args`."""
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS):
            parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            if any(parameter.arg == 'args' for parameter in parameters):
                yield f'{place(file, node)} {node.name}'


BELOW_PROGRAMS = ('engine', 'losses', 'samplers', 'weights', 'xcit', 'xca', 'hubconf', 'utils', 'loaders/', 'reports/',
                  'slurm/', 'run/')
MAY_TAKE_ARGS = {
    'run/flags.py': None, 'run/config.py': None, 'run/commandline.py': {'parse_known_args', 'parse_args'},
    'run/training.py': {'__init__'}, 'inference/flags.py': None, 'run/logs.py': {'excepthook'}}  # of threading


def test_rooms_below_the_programs_take_values():
    """Functions below the programs have named values as parameters, not the flags of a program."""
    offenders = []
    for file, tree in TREES.items():
        is_below = file.startswith(BELOW_PROGRAMS) or (file.startswith('inference/'))
        allowed = MAY_TAKE_ARGS.get(file, set())
        if is_below and allowed is not None:
            offenders += [line for line in takes_args(file, tree) if line.rpartition(' ')[2] not in allowed]
    assert offenders == []


def test_flags_are_neither_faked_nor_guessed():
    """No `getattr(args, ...)`; Namespaces are only made by the parser."""
    offenders = []
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or file in ('run/flags.py', 'run/commandline.py'):
                continue
            function, arguments = ast.unparse(node.func), list(map(ast.unparse, node.args))
            if function in ('argparse.Namespace', 'Namespace') or (function == 'getattr' and arguments[0] == 'args'):
                offenders.append(f'{place(file, node)} {ast.unparse(node)[:60]}')
    assert offenders == []


# ----- length

MOST_LINES = {'main.py': 450, 'datasets.py': 450, 'run_with_submitit.py': 300}


def test_files_are_short():
    """A file has at most 420 lines, with the exceptions of MOST_LINES."""
    lengths = {file: len((ROOT / file).read_text().splitlines()) for file in TREES}
    assert {file: length for file, length in lengths.items() if length > MOST_LINES.get(file, 420)} == {}


def test_second_training_is_short():
    """The code of a task beside its own model, losses and data fits into 40 lines."""
    assert len((ROOT / 'tests' / 'rotation_training.py').read_text().splitlines()) <= 40


# ----- words

BAD_BEGINNING = re.compile(r'(What|Which|Where|How|Of|Those|That|So|The same|Likewise|As|Whether)\b')


def test_docstrings_begin_with_a_verb_or_a_noun():
    """A docstring does not begin as an answer to its name; every test has a docstring."""
    offenders = []
    tests = {f'tests/{path.name}': ast.parse(path.read_text()) for path in ROOT.glob('tests/*.py')}
    for file, tree in {**TREES, **tests}.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)):
                docstring = (ast.get_docstring(node) or '').strip()
                is_test = getattr(node, 'name', '').startswith('test_')
                if BAD_BEGINNING.match(docstring) or (is_test and not docstring):
                    offenders.append(f'{file}:{getattr(node, "lineno", 1)} {docstring[:60]}')
    assert offenders == []


def beginning(node: ast.AST) -> str:
    """Return the constant text at the beginning of an expression, '' if there is none."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return beginning(node.values[0])
    return beginning(node.left) if isinstance(node, ast.BinOp) else ''


def test_help_texts_begin_with_a_noun():
    """A help text can be read without the name of its flag."""
    offenders = []
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == 'help':
                text = beginning(node.value).strip()
                if BAD_BEGINNING.match(text[:1].upper() + text[1:]):
                    offenders.append(f'{file}:{node.value.lineno} {text[:60]}')
    assert offenders == []


def test_things_do_not_speak():
    """No function is named say, tell or notice."""
    offenders = [f'{place(file, node)} {node.name}' for file, tree in TREES.items() for node in ast.walk(tree)
                 if isinstance(node, FUNCTIONS) and re.match(r'_?(say|tell|notice)(_|s?$)', node.name)]
    assert offenders == []
