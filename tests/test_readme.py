"""What the README says is true of the code."""
import re
import shlex

import pytest
import timm
from conftest import ROOT

import datasets
import run_with_submitit
import xcit
from main import get_args_parser

README = (ROOT / 'README.md').read_text()


def commands(program: str = 'main.py') -> list:
    """The words after the program of every command in a code block, lines joined."""
    blocks = re.findall(r'```(?:bash|sh|console)\n(.*?)```', README, re.DOTALL)
    lines = '\n'.join(blocks).replace('\\\n', ' ').splitlines()
    return [line.split(program, 1)[1].strip() for line in lines if program in line]


def table(header: str) -> list:
    """The rows, as lists of cells, of the table whose first header cell is `header`."""
    lines = README.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f'| {header} |'))
    rows = []
    for line in lines[start + 2:]:
        if not line.startswith('|'):
            break
        rows.append([cell.strip() for cell in line.strip('|').split('|')])
    return rows


def test_there_are_commands():
    """The extraction finds the quick start, the evaluation and the training."""
    assert len(commands()) >= 6


@pytest.mark.parametrize('command', commands())
def test_command_parses(command):
    """Every command of the README is accepted, with a model that exists."""
    args = get_args_parser().parse_args(shlex.split(command, comments=True))
    assert timm.is_model(args.model)


@pytest.mark.parametrize('command', commands('run_with_submitit.py'))
def test_slurm_command_parses(command):
    """So is every command of the SLURM wrapper."""
    args = run_with_submitit.get_args_parser().parse_args(shlex.split(command))
    assert timm.is_model(args.model)


def test_model_table_is_the_codes():
    """Size, width, depth, heads, parameters of both patch sizes."""
    rows = table('model')
    assert [row[0].strip('`') for row in rows] == [f'xcit_{size}' for size in xcit.SIZES]
    for row, (size, config) in zip(rows, xcit.SIZES.items()):
        assert [int(cell) for cell in row[1:4]] == [config['embed_dim'], config['depth'], config['num_heads']]
        for cell, patch in zip(row[4:6], xcit.PATCH_SIZES):
            model = timm.create_model(f'xcit_{size}_p{patch}')
            assert float(cell.removesuffix(' M')) == round(sum(p.numel() for p in model.parameters()) / 1e6, 1)


def test_every_data_set_is_described():
    """The data set table has each choice of --data-set."""
    assert {row[0].strip('`') for row in table('`--data-set`')} == set(datasets.BUILDERS)


def test_every_difference_is_listed():
    """The topic of each `# differs: TOPIC - ...` in the code has a place in the README's list."""
    section = README.split('## Differences from the original', 1)[1].split('\n## ', 1)[0].lower()
    topics = [topic for path in ROOT.glob('*.py')
              for topic in re.findall(r'# differs: ([^-\n]*) - ', path.read_text())]
    assert len(topics) == sum(path.read_text().count('# differs:') for path in ROOT.glob('*.py')) > 5
    assert [topic for topic in topics if topic.lower() not in section] == []
