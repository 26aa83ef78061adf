"""README and docs: their commands run, and their tables, links and limits match the code."""
import importlib
import itertools
import json
import math
import re
import shlex
import shutil

import pytest
import timm
import torch
from conftest import ROOT, seeded_model, tiny

import datasets
import run_with_submitit
import xcit
import xcit_zoo
from loaders import readers
from main import get_args_parser, main

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
README = '\n'.join(page.read_text() for page in PAGES)


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
def test_command_parses(command, tmp_path):
    """Every command of the README is accepted, with a model that exists."""
    args = get_args_parser().parse_args(words_of(command, tmp_path))
    assert timm.is_model(args.model)


def words_of(command: str, folder) -> list:
    """Return the words of a command, with an existing file for --config."""
    words = shlex.split(command, comments=True)
    if '--config' in words:
        file = folder / 'config.json'
        file.write_text(json.dumps({'args': {'batch_size': 4}}))
        words[words.index('--config') + 1] = str(file)
    return words


TOOLS = sorted(path.stem for path in (ROOT / 'tools').glob('*.py') if 'def get_args_parser' in path.read_text())


@pytest.mark.parametrize('tool', TOOLS)
def test_tool_command_parses(tool):
    """Every tool has a command in the docs, and each of its commands is accepted."""
    tool_commands = commands(f'-m tools.{tool}')
    assert tool_commands
    for command in tool_commands:
        importlib.import_module(f'tools.{tool}').get_args_parser().parse_args(shlex.split(command))


@pytest.mark.parametrize('program', ['train', 'knn', 'linear'])
def test_dino_command_parses(program):
    """Every program of DINO has a command in the docs, and each of its commands is accepted."""
    program_commands = commands(f'-m dino.{program}')
    assert program_commands
    for command in program_commands:
        args = importlib.import_module(f'dino.{program}').get_args_parser().parse_args(shlex.split(command))
        name = args.arch if program == 'train' else args.model
        assert name is None or timm.is_model(name)


@pytest.mark.parametrize('block', re.findall(r'```python\n(.*?)```', README, re.DOTALL))
def test_python_runs(block):
    """Every piece of Python runs, with random weights for published ones."""
    block = block.replace('pretrained=True', 'pretrained=False').replace("pretrained='fb_in1k'", 'pretrained=False')
    exec(block.replace('/path/to/this/repository', str(ROOT)), {})


@pytest.mark.parametrize('command', commands('run_with_submitit.py'))
def test_slurm_command_parses(command):
    """Every command of the SLURM wrapper is accepted by the wrapper and by its program."""
    job, words = run_with_submitit.get_args_parser().parse_known_args(shlex.split(command))
    args = importlib.import_module(job.program).get_args_parser().parse_args(words)
    assert timm.is_model(args.model if job.program == 'main' else args.arch)


def test_model_table_is_the_codes():
    """The model table has the code's width, depth, heads, and parameters of both patch sizes."""
    rows = table('model')
    assert [row[0].strip('`') for row in rows] == [f'xcit_{size}' for size in xcit.SIZES]
    for row, (size, config) in zip(rows, xcit.SIZES.items()):
        assert [int(cell) for cell in row[1:4]] == [config['embed_dim'], config['depth'], config['num_heads']]
        for cell, patch in zip(row[4:6], xcit.STEM_CONVOLUTIONS):
            model = timm.create_model(f'xcit_{size}_p{patch}')
            assert float(cell.removesuffix(' M')) == round(sum(p.numel() for p in model.parameters()) / 1e6, 1)


def test_zoo_table_is_the_codes():
    """Each published checkpoint's accuracy is in the row of its model and the column of its tag."""
    header = next(line for line in README.splitlines() if line.startswith('| model | `fb_in1k` |'))
    tags = [cell.strip(' `') for cell in header.strip('|').split('|')][1:]
    start = README.index(header)
    rows = README[start:README.index('\n\n', start)].splitlines()[2:]
    expected = []
    for model in xcit.MODELS:
        entries = [xcit_zoo.ZOO.get(f'{model}.{tag}') for tag in tags]
        cells = ['' if entry is None else f'{entry.knn} / {entry.top1}' if entry.knn else f'{entry.top1}'
                 for entry in entries]
        expected.append('| ' + ' | '.join([f'`{model}`', *cells]) + ' |')
    assert rows == expected
    assert sorted(tags) == sorted({entry.tag for entry in xcit_zoo.ZOO.values()})


def tiny_version(command: str, data, weights, run) -> list:
    """A README command with its data, weights and folders replaced, and on a model and images that take seconds."""
    words = words_of(command, run.parent)
    if '--real-labels' in words:  # for ImageNet's own pictures
        del words[words.index('--real-labels'):words.index('--real-labels') + 2]
    if '--val-fraction' in words:
        shutil.rmtree(data / 'val')
    for flag in ('--pretrained', '--finetune', '--teacher-path'):
        if flag in words:
            words[words.index(flag) + 1] = str(weights)
    if '--resume' in words and words[words.index('--resume') + 1] != 'auto':
        words[words.index('--resume') + 1] = str(weights)
    size = {'--batch-size': '4', '--epochs': '1', '--accum-iter': '2', '--teacher-model': 'xcit_nano_12_p16'}
    return [*words, *itertools.chain(*((flag, value) for flag, value in size.items() if flag in words)),
            *tiny(data, '--epochs', '1', '--output-dir', str(run))]


@pytest.mark.parametrize('command', sorted(set(commands())))
def test_command_runs(command, tmp_path, folders):
    """Every command of the README runs to its end, with all its options, on tiny data in place of its own."""
    weights = tmp_path / 'weights.pth'
    torch.save({'model': seeded_model('xcit_nano_12_p16', num_classes=2).state_dict()}, weights)
    stats = main(tiny_version(command, folders, weights, tmp_path / 'run'))
    assert math.isfinite(stats['loss' if '--eval' in command else 'train_loss'])


def test_every_data_set_is_described():
    """The data set table has each choice of --data-set."""
    names = [*datasets.BUILDERS, *(f'{prefix}/NAME' for prefix in readers.PACKAGES)]
    assert {row[0].strip('`') for row in table('`--data-set`')} == set(names)


def test_every_difference_is_listed():
    """The topic of each `# differs: TOPIC - ...` in the code has a place in the list of differences."""
    listed = (ROOT / 'docs' / 'differences.md').read_text().lower()
    files = [path for path in ROOT.glob('**/*.py') if not {'tests', '.venv'} & set(path.relative_to(ROOT).parts)]
    code = [path.read_text() for path in files]
    topics = [topic for text in code for topic in re.findall(r'# differs: ([^-\n]*) - ', text)]
    assert len(topics) == sum(text.count('# differs:') for text in code) > 5
    assert [topic for topic in topics if topic.lower() not in listed] == []


def test_readme_is_read_to_its_end():
    """README.md has at most 200 lines."""
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 200


@pytest.mark.parametrize('page', [*PAGES, ROOT / 'CONTRIBUTING.md', ROOT / 'RESULTS.md'], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Every link leads to a file of the repository and, with an anchor, to one of the file's headings."""
    for target in re.findall(r'\]\(([^)\s]+)\)', page.read_text()):
        name, _, anchor = target.partition('#')
        if '://' in target:
            continue
        file = page.parent / name if name else page
        assert file.exists(), target
        headings = re.findall(r'^#+ (.*)$', file.read_text(), re.MULTILINE) if anchor else []
        slugs = [re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings]
        assert not anchor or anchor in slugs, target


def test_the_map_names_files_that_are_there():
    """CONTRIBUTING has every file of run/, loaders/ and the top level, and no other."""
    text = (ROOT / 'CONTRIBUTING.md').read_text()
    files = [*ROOT.glob('*.py'), *ROOT.glob('run/[a-z]*.py'), *ROOT.glob('loaders/[a-z]*.py')]
    assert [file.name for file in files if f'{file.name}`' not in text] == []


def test_the_top_level_is_small():
    """The top level has at most 17 Python files."""
    assert len(list(ROOT.glob('*.py'))) <= 17
