"""tools.eval_zoo on a small ImageNet: some of its class folders, and weights under the published file names."""
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, seeded_model, write_image

import main as classification
import xcit
import xcit_zoo
from dino import knn
from loaders import pictures
from run.folder import DirectoryLock
from tools import eval_zoo
from tools.eval_zoo import COLUMNS, deviation, main
from utils import InputError, RunStopped

NAME = 'xcit_nano_12_p16'
TAGS = ('fb_in1k', 'fb_dist_in1k')
LABELLED = ['fb_in1k', 'fb_dist_in1k', 'fb_dist_in1k_384']
WORDNET = ('n01440764', 'n02123045', 'n02504458')  # classes 0, 281, 386


@pytest.fixture(scope='module')
def imagenet(tmp_path_factory) -> Path:
    """Folder with val/, 2 images of each of 3 classes."""
    root = tmp_path_factory.mktemp('imagenet')
    for label, name in enumerate(WORDNET):
        for i in range(2):
            write_image(root / 'val' / name / f'{i}.JPEG', size=(70, 60), seed=10 * label + i)
    return root


def file_of(folder: Path, tag: str) -> Path:
    return folder / Path(xcit_zoo.ZOO[f'{NAME}.{tag}'].url).name


@pytest.fixture(scope='module')
def published(tmp_path_factory) -> Path:
    """Folder with the three files of the smallest model."""
    folder = tmp_path_factory.mktemp('published')
    for tag in LABELLED:
        model = seeded_model(NAME)
        model.head.bias.data[281] += 100 * (tag == 'fb_dist_in1k')  # always predicts the cat
        torch.save({'model': model.state_dict()}, file_of(folder, tag))
    return folder


def flags(imagenet: Path, published: Path, output_dir: Path, *, tags=TAGS) -> list:
    return ['--data-path', str(imagenet), '--checkpoints', str(published), '--models', NAME, '--tags', *tags,
            '--output-dir', str(output_dir), '--device', 'cpu', '--num-workers', '0', '--batch-size', '4']


def read(output_dir: Path) -> list:
    with open(output_dir / 'zoo.csv', newline='', encoding='utf-8-sig') as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def measured(imagenet, published, tmp_path_factory) -> Path:
    """Output for both 224-pixel checkpoints; must not be changed."""
    output_dir = tmp_path_factory.mktemp('out') / 'zoo'
    main(flags(imagenet, published, output_dir))
    return output_dir


@pytest.fixture
def earlier(measured, tmp_path) -> Path:
    """Copy of `measured`."""
    output_dir = tmp_path / 'zoo'
    output_dir.mkdir()
    for name in ('zoo.csv', 'zoo.md'):
        (output_dir / name).write_bytes((measured / name).read_bytes())
    return output_dir


# ----- measurements

def test_42_checkpoints_are_evaluated():
    """All classifiers are entries, three of each model, and DINO's four backbones, each in two ways."""
    assert len(eval_zoo.CLASSIFIERS) == 42
    assert {published.model for published in eval_zoo.CLASSIFIERS} == set(xcit.MODELS)
    assert eval_zoo.TAGS == [*LABELLED, 'fb_dino', 'fb_dino_linear']
    assert {name: entry.top1 for name, entry in eval_zoo.ENTRIES.items() if 'dino' in name} == {
        'xcit_small_12_p16.fb_dino': 76., 'xcit_small_12_p16.fb_dino_linear': 77.8,
        'xcit_small_12_p8.fb_dino': 77.1, 'xcit_small_12_p8.fb_dino_linear': 79.2,
        'xcit_medium_24_p16.fb_dino': 76.4, 'xcit_medium_24_p16.fb_dino_linear': 78.8,
        'xcit_medium_24_p8.fb_dino': 77.9, 'xcit_medium_24_p8.fb_dino_linear': 80.3}


def test_accuracies_are_those_of_main(measured, imagenet, published):
    """Each row equals the result of main.py --eval."""
    rows = read(measured)
    assert [row['tag'] for row in rows] == list(TAGS)
    for row, tag in zip(rows, TAGS):
        stats = classification.main([
            '--eval', '--model', NAME, '--data-path', str(imagenet), '--full-crop', '--pretrained',
            str(file_of(published, tag)), '--device', 'cpu', '--num-workers', '0', '--batch-size', '4'])
        assert float(row['loss']) == pytest.approx(stats['loss'])
        assert (float(row['top1']), float(row['top5'])) == (stats['acc1'], stats['acc5'])


def test_one_class_everywhere_is_a_third_right(measured):
    """A model that always predicts the cat is right for 33.333 % of these images."""
    assert float(read(measured)[1]['top1']) == pytest.approx(100 / 3)


def test_resolution_is_the_published_one(imagenet, published, tmp_path):
    """Weights for 384 pixels are evaluated at 384 pixels, crop 1.0."""
    row, = main(flags(imagenet, published, tmp_path / 'zoo', tags=['fb_dist_in1k_384']))
    assert (row['resolution'], row['crop'], row['published_top1']) == ('384', '1.0', '75.4')
    assert 'images at 384 pixels, crop 1\n' in (tmp_path / 'zoo' / 'zoo.log').read_text()


def test_row_contains_its_origin(measured, imagenet, published):
    """A row contains number and folder of the images, origin of the weights, device and dtype."""
    row = read(measured)[0]
    assert tuple(row) == COLUMNS
    assert (row['images'], row['data_path']) == ('6', str(imagenet.resolve()))
    assert row['weights'] == str(file_of(published, 'fb_in1k'))
    assert (row['device'], row['dtype'], row['error']) == ('cpu', 'torch.float32', '')
    assert float(row['images_per_s']) > 0


def test_tags_work_without_a_folder(imagenet, published, tmp_path, monkeypatch):
    """Without --checkpoints, files are read from torch.hub's cache of downloads."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    cache = tmp_path / 'torch' / 'hub' / 'checkpoints'
    cache.parent.mkdir(parents=True)
    cache.symlink_to(published)
    argv = flags(imagenet, published, tmp_path / 'zoo', tags=['fb_dist_in1k'])
    argv[argv.index('--checkpoints'):argv.index('--models')] = []
    row, = main(argv)
    assert float(row['top1']) == pytest.approx(100 / 3)
    assert row['weights'] == xcit_zoo.ZOO[f'{NAME}.fb_dist_in1k'].url


def test_backbones_of_dino_are_measured_in_both_ways(imagenet, tmp_path, monkeypatch):
    """Rows of backbones equal the results of dino.knn and dino.linear."""
    monkeypatch.setattr(eval_zoo, 'NEIGHBOURS', 3)
    name, root = 'xcit_small_12_p16', tmp_path / 'imagenet'
    root.mkdir()
    (root / 'val').symlink_to(imagenet / 'val')
    for label, folder in enumerate(WORDNET):
        for i in range(1):
            write_image(root / 'train' / folder / f'{i}.JPEG', size=(70, 60), seed=100 * label + i)
    folder = tmp_path / 'published'
    folder.mkdir()
    torch.save(seeded_model(name, num_classes=0).state_dict(), folder / 'xcit_small_12_cp16_dino.pth')
    bias = torch.zeros(1000)
    bias[281] = 1000.  # always predicts the cat
    torch.save({'state_dict': {'module.linear.weight': torch.zeros(1000, 384), 'module.linear.bias': bias}},
               folder / 'dino_xcit_small_12_p16_linearweights.pth')
    argv = flags(root, folder, tmp_path / 'zoo', tags=['fb_dino', 'fb_dino_linear'])
    argv[argv.index(NAME)] = name
    by_knn, by_linear = main(argv)
    assert [by_knn[name] for name in ('tag', 'published_top1', 'crop', 'error')] == ['fb_dino', '76.0', '0.875', '']
    results = knn.main(['--arch', name, '--pretrained', str(folder / 'xcit_small_12_cp16_dino.pth'), '--data-path',
                      str(root), '--nb-knn', '3', '--device', 'cpu', '--num-workers', '0'])
    assert float(by_knn['top1']) == results['results']['3']['top1']
    assert (by_linear['tag'], by_linear['published_top1']) == ('fb_dino_linear', '77.8')
    assert float(by_linear['top1']) == pytest.approx(100 / 3)


# ----- the tables

@pytest.mark.parametrize(('top1', 'expected'), [
    ('69.9', '+0.000'), ('70.0', '+0.100'), ('70.001', '+0.101 !'), ('69.8', '-0.100'), ('69.76', '-0.140 !')])
def test_deviations_of_either_sign_are_flagged(top1, expected):
    """A deviation above 0.1 percent of either sign is marked."""
    assert deviation({'top1': top1, 'published_top1': '69.9'}) == expected


def test_markdown_has_a_row_for_each(measured):
    """zoo.md has a row with published and measured accuracy, deviation and speed, and names the images."""
    lines = (measured / 'zoo.md').read_text().splitlines()
    cells = [cell.strip() for cell in lines[3].strip('|').split('|')]
    assert cells[:7] == ['`xcit_nano_12_p16`', '`fb_dist_in1k`', '224', '72.2', '33.333', '-38.867 !', '33.333']
    assert len({line.count('|') for line in lines[:4]}) == 1
    assert 'Measured on 6 images' in lines[5]


def test_program_prints_each_result_and_the_table(imagenet, published, tmp_path):
    """The program prints each result, and the table at its end."""
    result = subprocess.run([sys.executable, '-m', 'tools.eval_zoo', *flags(imagenet, published, tmp_path / 'zoo')],
                            cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, '')
    assert '6 images, not the 50000 of the published accuracies' in result.stdout
    assert '[2/2] xcit_nano_12_p16.fb_dist_in1k: published 72.2, top-1 33.333 (-38.867 !), top-5' in result.stdout
    assert (tmp_path / 'zoo' / 'zoo.md').read_text() in result.stdout
    assert 'Namespace' not in result.stdout


# ----- further calls

def test_measured_rows_are_not_measured_again(earlier, imagenet, published):
    """A second call only adds the missing rows, in the zoo's order."""
    before = read(earlier)
    rows = main(flags(imagenet, published, earlier, tags=LABELLED))
    assert read(earlier)[:2] == before == rows[:2]
    assert [row['tag'] for row in rows] == LABELLED


def test_nothing_is_left_to_do(earlier, imagenet, published):
    """A call without missing rows does not change the table."""
    before = (earlier / 'zoo.csv').read_text()
    main(flags(imagenet, published, earlier))
    assert (earlier / 'zoo.csv').read_text() == before


def test_other_weights_are_measured(earlier, imagenet, tmp_path):
    """Rows of another folder of checkpoints are measured again."""
    (tmp_path / 'empty').mkdir()
    with pytest.raises(RunStopped, match='checkpoints could not be evaluated'):
        main(flags(imagenet, tmp_path / 'empty', earlier))


@pytest.mark.parametrize('cut', [1, 5, 40, 150])
def test_half_a_line_is_measured_again(earlier, imagenet, published, cut, capsys):
    """A row that is cut short is measured again."""
    text = (earlier / 'zoo.csv').read_text().rstrip('\n')
    (earlier / 'zoo.csv').write_text(text[:-cut])
    rows = main(flags(imagenet, published, earlier))
    assert [float(row['top1']) for row in read(earlier)] == [float(row['top1']) for row in rows]
    assert float(rows[1]['top1']) == pytest.approx(100 / 3)
    assert 'zoo.csv: 1 damaged row is left out' in capsys.readouterr().out


def test_killed_program_continues(imagenet, published, tmp_path):
    """After kill -9 during the second checkpoint, a further call only measures the second."""
    output_dir = tmp_path / 'zoo'
    argv = flags(imagenet, published, output_dir)
    process = subprocess.Popen([sys.executable, '-m', 'tools.eval_zoo', *argv], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (output_dir / 'zoo.csv').exists() and process.poll() is None:
        time.sleep(.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = read(output_dir)
    assert len(first) == 1
    assert main(argv)[0] == first[0]
    assert [row['tag'] for row in read(output_dir)] == list(TAGS)


def test_other_images_are_not_mixed_in(earlier, imagenet, published, tmp_path):
    """A table of other images is an error, and is not changed."""
    before = (earlier / 'zoo.csv').read_bytes()
    other = tmp_path / 'other'
    for name in WORDNET:
        write_image(other / 'val' / name / '0.JPEG', size=(70, 60))
    with pytest.raises(InputError, match=r'6 images of .*, not 3 of .*; choose another --output-dir'):
        main(flags(other, published, earlier, tags=LABELLED))
    assert (earlier / 'zoo.csv').read_bytes() == before


def test_two_runs_do_not_share_a_table(earlier, imagenet, published):
    """A second program with the same --output-dir is refused."""
    with DirectoryLock(earlier), pytest.raises(InputError, match='another run is writing there'):
        main(flags(imagenet, published, earlier))


# ----- bad checkpoints

@pytest.fixture
def some_bad(published, tmp_path) -> Path:
    """Folder with a truncated file, an intact one, and a missing one."""
    folder = tmp_path / 'some'
    folder.mkdir()
    file_of(folder, 'fb_in1k').write_bytes(file_of(published, 'fb_in1k').read_bytes()[:100000])
    os.link(file_of(published, 'fb_dist_in1k'), file_of(folder, 'fb_dist_in1k'))
    return folder


def test_bad_checkpoints_do_not_stop_the_others(imagenet, some_bad, tmp_path):
    """Unusable checkpoints are listed at the end and in both tables; the others are measured; the exit code is 1."""
    with pytest.raises(RunStopped, match=r'2 of 3 checkpoints could not be evaluated: .*fb_in1k, .*_384') as caught:
        main(flags(imagenet, some_bad, tmp_path / 'zoo', tags=LABELLED))
    assert caught.value.exit_code == 1
    rows = read(tmp_path / 'zoo')
    assert ['damaged' in rows[0]['error'], rows[1]['error'], 'no such file' in rows[2]['error']] == [True, '', True]
    assert [row['top1'] for row in rows if row['error']] == ['', '']
    text = (tmp_path / 'zoo' / 'zoo.md').read_text()
    assert text.count('| not measured |') == 2
    assert '- not measured: `xcit_nano_12_p16.fb_dist_in1k_384`: --pretrained' in text


def test_bad_checkpoints_are_tried_again(imagenet, some_bad, published, tmp_path):
    """A second call measures checkpoints that are repaired."""
    argv = flags(imagenet, some_bad, tmp_path / 'zoo')
    with pytest.raises(RunStopped):
        main(argv)
    file_of(some_bad, 'fb_in1k').unlink()
    os.link(file_of(published, 'fb_in1k'), file_of(some_bad, 'fb_in1k'))
    assert [row['error'] for row in main(argv)] == ['', '']


def test_another_models_file_is_an_error(imagenet, tmp_path):
    """Weights of another model than in the file's name are an error of their row."""
    torch.save(seeded_model('xcit_nano_12_p8').state_dict(), file_of(tmp_path, 'fb_in1k'))
    with pytest.raises(RunStopped):
        main(flags(imagenet, tmp_path, tmp_path / 'zoo', tags=['fb_in1k']))
    assert 'checkpoint is xcit_nano_12_p8, --model is xcit_nano_12_p16' in read(tmp_path / 'zoo')[0]['error']


# ----- bad input

@pytest.mark.parametrize(('change', 'message'), [
    (['--data-path', '/none'], '--data-path /none: no such directory'),
    (['--checkpoints', '/none'], '--checkpoints /none: no such directory'),
    (['--models', 'xcit_small'], 'xcit_small_12_p16'),
    (['--tags', 'fb_swag'], "'fb_in1k', 'fb_dist_in1k', 'fb_dist_in1k_384'"),
    (['--tags', 'fb_dino'], f'--models {NAME}: have none of the tags fb_dino'),
    (['--device', 'tpu'], '--device tpu'),
    (['--amp', 'fp16'], '--amp fp16: needs cuda'),
    (['--batch-size', '0'], '--batch-size'),
    (['--tag', 'fb_in1k'], '--tag'),
], ids=lambda value: ' '.join(value) if isinstance(value, list) else '')
def test_bad_arguments_are_refused(imagenet, published, tmp_path, change, message):
    """An invalid flag is one line, and nothing is written."""
    with pytest.raises(InputError) as caught:
        main([*flags(imagenet, published, tmp_path / 'zoo'), *change])
    assert message in str(caught.value)
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'zoo').exists()


@pytest.mark.parametrize('probed', [1000, 1])
def test_unreadable_image_stops_the_program(published, tmp_path, monkeypatch, probed):
    """An unreadable image ends the program, and is not an error of a checkpoint."""
    monkeypatch.setattr(pictures, 'NUM_PROBED', probed)
    folder = tmp_path / 'imagenet' / 'val' / WORDNET[0]
    write_image(folder / '0.JPEG')
    (folder / '1.JPEG').write_bytes(b'no image')
    with pytest.raises(InputError, match=r'unreadable image .*1\.JPEG'):
        main(flags(tmp_path / 'imagenet', published, tmp_path / 'zoo'))
    assert not (tmp_path / 'zoo' / 'zoo.csv').exists()


@pytest.mark.parametrize('content', ['a,b\n1,2\n', '\n', 'nonsense'])
def test_other_tables_are_not_overwritten(imagenet, published, tmp_path, content):
    """A zoo.csv of another program is an error."""
    (tmp_path / 'zoo').mkdir()
    (tmp_path / 'zoo' / 'zoo.csv').write_text(content)
    with pytest.raises(InputError, match='not a table of this program'):
        main(flags(imagenet, published, tmp_path / 'zoo'))
    assert (tmp_path / 'zoo' / 'zoo.csv').read_text() == content
