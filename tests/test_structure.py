"""Where things are: what the repository promises about its own files."""
import ast
from pathlib import Path

import pytest
from conftest import ROOT

FOLDERS = ('run', 'loaders', 'reports', 'slurm', 'tools', 'dino')
FILES = [*ROOT.glob('*.py'), *(path for folder in FOLDERS for path in ROOT.glob(f'{folder}/*.py'))]
MODULES = {'.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__'): path for path in FILES}


def imports(path: Path) -> set:
    """Modules of this repository that a file imports anywhere, inside functions too; not itself."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            submodules = {f'{node.module}.{alias.name}' for alias in node.names} & MODULES.keys()
            names |= submodules or {node.module}
    return {name for name in names & MODULES.keys() if MODULES[name] != path}


def test_no_import_circle():
    """Nowhere, so that every file can be read and imported alone."""
    left = {name: imports(path) for name, path in MODULES.items()}
    assert sum(map(len, left.values())) > 50
    while free := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}


@pytest.mark.parametrize('folder', ['run', 'loaders', 'reports'])
def test_run_machinery_knows_no_task(folder):
    """What surrounds a training step imports no program, and run/ and reports/ no data and no model either."""
    allowed = {'run': {'utils', 'run'}, 'loaders': {'utils', 'run', 'loaders', 'datasets', 'samplers'},
               'reports': {'utils', 'run', 'reports'}}[folder]
    assert {name.split('.')[0] for path in ROOT.glob(f'{folder}/*.py') for name in imports(path)} <= allowed


def names_used(path: Path) -> set:
    """What a file imports, and the attributes that it asks for, by their full names."""
    tree, names, known = ast.parse(path.read_text()), set(), {}
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
def test_what_belongs_in_one_place(word, home):
    """Calls of torch.distributed; the difference between a stream and another loader."""
    users = [str(path.relative_to(ROOT)) for path in FILES if any(word in name for name in names_used(path))]
    assert users
    assert [user for user in users if not user.startswith(home)] == []


def test_second_training_is_short():
    """What a task needs beside its own model, losses and data fits into 40 lines."""
    assert len((ROOT / 'tests' / 'rotation_training.py').read_text().splitlines()) <= 40
