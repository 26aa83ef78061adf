"""README and docs: their commands and Python run, and their tables, links and limits match the code."""
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
from conftest import ROOT, seeded_images, seeded_model, tiny, write_folders

import datasets
import run_with_submitit
import weights
import xcit
import xcit_zoo
from dense import backbone
from dino import train as dino_train
from loaders import readers
from main import get_args_parser, main
from segmentation import models
from tools import convert_checkpoint

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
TEXT = '\n'.join(page.read_text() for page in PAGES)
WEIGHTS = (ROOT / 'docs' / 'weights.md').read_text()


def commands(program: str = 'main.py') -> list:
    """The words after the program of every command in a code block, lines joined."""
    blocks = re.findall(r'```(?:bash|sh|console)\n(.*?)```', TEXT, re.DOTALL)
    lines = '\n'.join(blocks).replace('\\\n', ' ').splitlines()
    return [line.split(program, 1)[1].strip() for line in lines if program in line]


def table(header: str, text: str = TEXT) -> list:
    """The rows, as lists of cells, of the table in `text` whose first header cells are `header`."""
    lines = text.splitlines()
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
    """Every command of README and docs is accepted, with a model that exists."""
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


def parsed(module: str) -> list:
    """Return the flags of each command of a program in the docs."""
    parser = importlib.import_module(module).get_args_parser()
    return [parser.parse_args(shlex.split(command)) for command in commands(f'-m {module}')]


TOOLS = sorted(path.stem for path in (ROOT / 'tools').glob('*.py') if 'def get_args_parser' in path.read_text())


@pytest.mark.parametrize('tool', TOOLS)
def test_tool_command_parses(tool):
    """Every tool has a command in the docs, and each of its commands is accepted."""
    assert parsed(f'tools.{tool}')


@pytest.mark.parametrize('program', ['main', 'predict', 'evaluate'])
def test_segmentation_command_parses(program):
    """Every program of segmentation has a command in the docs, and each of its commands is accepted."""
    all_args = parsed(f'segmentation.{program}')
    assert all_args
    for args in all_args:
        if getattr(args, 'model', None):
            backbone.parse(args.model, models.HEADS)


@pytest.mark.parametrize('program', ['train', 'knn', 'linear'])
def test_dino_command_parses(program):
    """Every program of DINO has a command in the docs, and each of its commands is accepted."""
    all_args = parsed(f'dino.{program}')
    assert all_args
    for args in all_args:
        name = args.arch if program == 'train' else args.model
        assert name is None or timm.is_model(name)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Working folder with runs/mine of `main.py`, runs/dino of `dino.train`, and the latter's weights for timm."""
    folder = tmp_path_factory.mktemp('work')
    dino = folder / 'runs' / 'dino'
    data = write_folders(folder / 'pictures')
    main(tiny(data, '--epochs', '1', '--no-report', '--output-dir', str(folder / 'runs' / 'mine')))
    dino_train.main(['--arch', 'xcit_nano_12_p16', '--data-path', str(data), '--epochs', '1', '--warmup-epochs', '0',
                     '--global-crops-size', '32', '--local-crops-number', '0', '--out-dim', '16', '--batch-size', '4',
                     '--device', 'cpu', '--num-workers', '0', '--saveckp-freq', '0', '--output-dir', str(dino)])
    (dino / 'timm').mkdir()
    convert_checkpoint.main([str(dino / 'checkpoint.pth'), str(dino / 'timm' / 'model.safetensors'), '--to', 'timm'])
    return folder


STEM = 'patch_embed.proj.0.0.weight'  # a weight with the same name in timm's models


def stems(namespace: dict) -> dict:
    """Return the first weights of the models in a namespace, by the models' names."""
    return {name: value for name, model in namespace.items() if isinstance(model, torch.nn.Module)
            for key, value in model.state_dict().items() if key.endswith(STEM)}


@pytest.mark.parametrize('block', re.findall(r'```python\n(.*?)```', TEXT, re.DOTALL))
def test_python_runs(block, runs, monkeypatch):
    """Every piece of Python runs, with random weights for published ones; the weights of a run reach every model."""
    monkeypatch.chdir(runs)
    run = next((file for file in ('runs/dino/checkpoint.pth', 'runs/mine/best_model.pth') if file[:9] in block), None)
    if not run:
        block = block.replace('pretrained=True', 'pretrained=False').replace("pretrained='fb_in1k'", 'pretrained=False')
    namespace: dict = {}
    exec(block.replace('/path/to/this/repository', str(ROOT)), namespace)
    if run:
        given = weights.read(run, 'the run').tensors[STEM]
        assert stems(namespace)
        assert [name for name, stem in stems(namespace).items() if not torch.equal(stem, given)] == []


def test_timm_has_the_outputs(runs, monkeypatch):
    """Every way of docs/weights.md into timm gives the features of the run's checkpoint."""
    monkeypatch.chdir(runs)
    images = seeded_images(2, 3, 32, 48)
    section = WEIGHTS[WEIGHTS.index('## Weights in timm'):WEIGHTS.index('## A backbone for a decoder')]
    count = 0
    for block in re.findall(r'```python\n(.*?)```', section, re.DOTALL):
        namespace: dict = {}
        exec(block, namespace)
        run = 'runs/dino/checkpoint.pth' if 'runs/dino' in block else 'runs/mine/best_model.pth'
        expected = weights.create_model('xcit_nano_12_p16', run, num_classes=0).eval()(images)
        for model in namespace.values():
            if hasattr(model, 'reset_classifier'):
                model.eval().reset_classifier(0)
                torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
                count += 1
    assert count == 6


@pytest.mark.parametrize('command', commands('run_with_submitit.py'))
def test_slurm_command_parses(command):
    """Every command of the SLURM wrapper is accepted by the wrapper and by its program."""
    job, words = run_with_submitit.get_args_parser().parse_known_args(shlex.split(command))
    args = importlib.import_module(job.program).get_args_parser().parse_args(words)
    assert timm.is_model(args.model if job.program == 'main' else args.arch)


def test_model_table_is_the_codes():
    """The model table has the code's width, depth, heads, and parameters of both patch sizes."""
    rows = table('model | C', WEIGHTS)
    assert [row[0].strip('`') for row in rows] == [f'xcit_{size}' for size in xcit.SIZES]
    for row, (size, config) in zip(rows, xcit.SIZES.items()):
        assert [int(cell) for cell in row[1:4]] == [config['embed_dim'], config['depth'], config['num_heads']]
        for cell, patch in zip(row[4:6], xcit.STEM_CONVOLUTIONS):
            with torch.device('meta'):  # no initial weights, which take seconds
                model = timm.create_model(f'xcit_{size}_p{patch}')
            assert float(cell.removesuffix(' M')) == round(sum(p.numel() for p in model.parameters()) / 1e6, 1)


def test_zoo_table_is_the_codes():
    """Each published checkpoint's accuracy is in the row of its model and the column of its tag."""
    header = next(line for line in WEIGHTS.splitlines() if line.startswith('| model | `fb_in1k` |'))
    tags = [cell.strip(' `') for cell in header.strip('|').split('|')][1:]
    start = WEIGHTS.index(header)
    rows = WEIGHTS[start:WEIGHTS.index('\n\n', start)].splitlines()[2:]
    expected = []
    for model in xcit.MODELS:
        entries = [xcit_zoo.ZOO.get(f'{model}.{tag}') for tag in tags]
        cells = ['' if entry is None else f'{entry.knn} / {entry.top1}' if entry.knn else f'{entry.top1}'
                 for entry in entries]
        expected.append('| ' + ' | '.join([f'`{model}`', *cells]) + ' |')
    assert rows == expected
    assert sorted(tags) == sorted({entry.tag for entry in xcit_zoo.ZOO.values()})


def tiny_version(command: str, data, weights, run) -> list:
    """A command with its data, weights and folders replaced, and on a model and images that take seconds."""
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
    """Every command of README and docs runs to its end, with all its options, on tiny data in place of its own."""
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


def test_readme_is_short():
    """README.md has at most 130 lines and begins with its picture; its first commands install, train and predict."""
    text = (ROOT / 'README.md').read_text()
    assert len(text.splitlines()) <= 130
    assert re.match(r'# .*\n\n!\[.*\]\(docs/attention\.png\)\n', text)


@pytest.mark.parametrize('start', [
    'pip install -r requirements.txt && python main.py', 'pip install -r requirements.txt -r requirements-dev.txt'])
def test_readme_has_the_commands_of_ci(start):
    """`.ci/run` finds its two commands, each once, by the beginning of a line."""
    assert start in (ROOT / '.ci' / 'run').read_text()
    assert sum(line.startswith(start) for line in (ROOT / 'README.md').read_text().splitlines()) == 1


def test_results_of_the_readme_are_measured():
    """Every figure of README's results is in RESULTS.md."""
    figures = {figure for _, *cells in table('measured') for figure in re.findall(r'\d[\d.]*\d', ' '.join(cells))}
    measured = set(re.findall(r'\d[\d.]*\d', (ROOT / 'RESULTS.md').read_text()))
    assert len(figures) > 8
    assert figures - measured == set()


def test_index_of_the_docs():
    """README links to the index of the docs, which has every page."""
    index = ROOT / 'docs' / 'README.md'
    assert '(docs/README.md)' in (ROOT / 'README.md').read_text()
    linked = re.findall(r'^\| \[[^]]+\]\((\S+)\) \| .+ \|$', index.read_text(), re.MULTILINE)
    assert sorted(linked) == sorted(page.name for page in PAGES if page.parent == index.parent and page != index)


def test_every_file_of_requirements_is_described():
    """The page of the installation has every file with further packages, and no other."""
    files = {path.name for path in ROOT.glob('requirements-*.txt')}
    assert {row[0].strip('`') for row in table('file | for')} == files


@pytest.mark.parametrize('page', [
    *PAGES, *(ROOT / name for name in ('CONTRIBUTING.md', 'RESULTS.md', 'sample_data/README.md'))],
    ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Every link leads to a file of the repository and, with an anchor, to one of the file's headings."""
    for target in re.findall(r'\]\(([^)\s]+)\)', without_code(page)):
        name, _, anchor = target.partition('#')
        if '://' in target:
            continue
        file = page.parent / name if name else page
        assert file.exists(), target
        headings = re.findall(r'^#+ (.*)$', without_code(file), re.MULTILINE) if anchor else []
        slugs = [re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings]
        assert not anchor or anchor in slugs, target


def without_code(page) -> str:
    """Return the text of a page without its code blocks, where `#` begins no heading."""
    return re.sub(r'```.*?```', '', page.read_text(), flags=re.DOTALL)


def test_pages_that_programs_name():
    """Every page that a program names exists."""
    named = {name for path in ROOT.glob('**/*.py') if not {'tests', '.venv'} & set(path.relative_to(ROOT).parts)
             for name in re.findall(r'\bdocs/\w[\w-]*\.md', path.read_text())}
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_map_names_files_that_are_there():
    """CONTRIBUTING has every file of run/, loaders/ and the top level, and no other."""
    text = (ROOT / 'CONTRIBUTING.md').read_text()
    files = [*ROOT.glob('*.py'), *ROOT.glob('run/[a-z]*.py'), *ROOT.glob('loaders/[a-z]*.py')]
    assert [file.name for file in files if f'{file.name}`' not in text] == []


def test_the_top_level_is_small():
    """The top level has at most 17 Python files."""
    assert len(list(ROOT.glob('*.py'))) <= 17
