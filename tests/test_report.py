"""Reports of runs: metrics by hand, files, and the occasions of a report."""
import csv
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, tiniest, tiny, write_folders
from matplotlib import font_manager
from PIL import Image
from processes import run

from classification import evaluation
from classification import report as report_of_classifiers
from main import main
from reports import drawings, lettering, page, predictions, tables
from run import parts
from tools import report
from utils import InputError, UnreadableImage, read_csv, write_csv

FILES = {'report.html', 'report.md', 'summary.json', 'predictions.csv', 'per_class.csv', 'confusion.csv',
         'confusion.png', 'curves.png', 'mistakes.png'}


class Alone:
    """A loader, as far as `gather` uses it."""
    shares_images = counts_batches = True


def predicted(truth: list, labels: list, classes: int) -> predictions.Predictions:
    """Return predictions with these most probable classes."""
    result = predictions.Predictions()
    logits = torch.nn.functional.one_hot(torch.tensor(labels), classes) * 3.
    for part in (slice(0, 3), slice(3, None)):
        result(logits[part], torch.tensor(truth)[part])
    result.gather(Alone)
    return result


def rows_of(path: Path) -> list:
    with open(path, newline='', encoding='utf-8-sig') as file:
        return list(csv.DictReader(file))


# ----- metrics

def test_metrics_by_hand(tmp_path):
    """Precision, recall, F1 and support of each class are right, and 0 for a class without images or predictions."""
    result = predicted([0, 0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 0, 0], classes=4)
    tables.write(tmp_path / 'report', result, ['a', 'b', 'c', 'd'], None)
    rows = [list(row.values()) for row in rows_of(tmp_path / 'report' / 'per_class.csv')]
    assert rows == [['a', '0.6000', '0.7500', '0.6667', '4'], ['b', '0.5000', '0.5000', '0.5000', '2'],
                    ['c', '0.0000', '0.0000', '0.0000', '1'], ['d', '0.0000', '0.0000', '0.0000', '0']]
    names, counts = tables.read_confusion(tmp_path / 'report' / 'confusion.csv')
    assert names == ['a', 'b', 'c', 'd']
    assert counts.tolist() == [[3, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert tables.most_confused(counts, 2) == [(0, 1, 1), (1, 0, 1)]


def test_predictions_of_each_image(tmp_path):
    """A row has file, class, and the most probable classes; names with commas and quotes stay whole."""
    result = predicted([0, 1], [1, 1], classes=3)
    predictions.write(tmp_path / 'p.csv', result, ['a, b', 'c "d"', 'e'], ['x/1.png', 'x/2.png'])
    first, second = rows_of(tmp_path / 'p.csv')
    p = float(torch.tensor([0., 3., 0.]).softmax(0)[1])
    assert (first['file'], first['truth'], first['class_1']) == ('x/1.png', 'a, b', 'c "d"')
    assert float(first['probability_1']) == pytest.approx(p, abs=1e-6)
    assert second['file'] == 'x/2.png'
    assert set(first) == {'file', 'truth', *(f'{kind}_{i}' for kind in ('class', 'probability') for i in (1, 2, 3))}


@pytest.mark.parametrize('name', ['Größe, 中', 'a "b"', ' a  b ', '1\r\n2'])
def test_tables_are_read_back(tmp_path, name):
    """A table begins with the byte order mark that spreadsheets need, and names are read as they were written."""
    write_csv(tmp_path / 'a.csv', [['file'], [name]])
    assert (tmp_path / 'a.csv').read_bytes().startswith(b'\xef\xbb\xbffile')
    assert read_csv(tmp_path / 'a.csv') == [['file'], [name]]


def test_names_that_are_not_utf8_are_escaped(tmp_path):
    """A byte that is not UTF-8 is an escape in the table, which every program reads."""
    write_csv(tmp_path / 'a.csv', [['file'], [os.fsdecode(b'K\xe4fer/\xe7.png')], ['\ud800']])
    assert read_csv(tmp_path / 'a.csv')[1:] == [[r'K\xe4fer/\xe7.png'], [r'\ud800']]


@pytest.mark.parametrize(('hits', 'count', 'expected'), [
    (8, 10, (.490, .943)), (0, 10, (0., .278)), (10, 10, (.722, 1.)), (0, 0, (0., 1.))])
def test_wilsons_interval(hits, count, expected):
    """The confidence interval is that of the tables, also for no and for all hits."""
    assert tables.wilson(hits, count) == pytest.approx(expected, abs=5e-4)


def test_accuracies_have_their_intervals():
    """Top-5 counts a class among the five most probable; intervals are in percent."""
    result = predicted([0, 1, 2, 3], [0, 1, 0, 0], classes=7)
    values = report_of_classifiers.accuracy_of(result)
    expected = 100 * np.mean([truth in top for truth, top in zip(result.truth, result.top)])
    assert (values['images'], values['top1'], values['top5']) == (4, 50., expected)
    assert values['top1_interval'] == pytest.approx([15.0, 85.0], abs=.1)


# ----- names

@pytest.mark.parametrize(('name', 'shown'), [
    ('a b', 'a b'), ('a  b', 'a␣␣b'), (' a', '␣a'), ('a ', 'a␣'), ('a\tb', r'a\tb'), ('a\xa0b', r'a\xa0b'),
    ('é中', 'é中'), ('', '""'), ('\udce4', r'\xe4'), ('a\u200bb', r'a\u200bb')])
def test_spaces_can_be_seen(name, shown):
    """Spaces at the ends, repeated spaces, and invisible characters are marked."""
    assert lettering.visible(name) == shown


def test_names_that_look_alike_have_numbers():
    """Two spellings of one word, and a name with a mark of its own, can be distinguished."""
    assert lettering.distinct(['e\u0301', 'b', 'é', ' b', '␣b']) == [
        'e\u0301 (#0)', 'b', 'é (#2)', '␣b (#3)', '␣b (#4)']


def test_abridged_names_stay_different():
    """Names that differ in the middle are cut elsewhere, or not at all."""
    names = [f'{"a" * 30}{i}{"b" * 30}' for i in (1, 2, 12)] + ['short', 'c' * 99]
    short = lettering.all_abridged(names, 20)
    assert len(set(short)) == 5
    assert max(map(len, short)) == 20
    assert ['1' in short[0], '2' in short[1], '12' in short[2]] == [True] * 3


def test_letters_without_a_font_are_escaped(monkeypatch):
    """A letter is drawn if any font has it, and is an escape if none has."""
    assert lettering.drawable('é') == 'é'
    assert lettering.drawable('中') == ('中' if lettering.font_with('中') else r'\u4e2d')
    monkeypatch.setattr(lettering, 'font_with', lambda character: None)
    assert lettering.drawable('中') == r'\u4e2d'


def test_text_is_drawn_by_several_fonts(monkeypatch):
    """Each part of a text is drawn in the font that has its letters."""
    monkeypatch.setattr(lettering, 'font_with', lambda letter: 'DejaVu Serif' if letter == 'x' else 'DejaVu Sans')
    monkeypatch.setattr(lettering, 'font_files', lambda: {
        name: font_manager.findfont(name) for name in ('DejaVu Sans', 'DejaVu Serif')})
    lettering.font_of.cache_clear()
    assert [(part, font.getname()[0]) for part, font in lettering.pieces('aaxa', 12)] == [
        ('aa', 'DejaVu Sans'), ('x', 'DejaVu Serif'), ('a', 'DejaVu Sans')]
    page = Image.new('L', (100, 30), 'white')
    lettering.write(page, 0, 0, 'aaxa', 12, 0)
    assert page.getbbox() is not None
    lettering.font_of.cache_clear()


# ----- pictures and page

@pytest.mark.parametrize('count', [2, 37, 1000])
def test_confusion_of_any_number_of_classes(tmp_path, count):
    """The matrix has a row per class, or the most confused of many classes, in cells of more than 50 pixels."""
    rng = np.random.default_rng(0)
    result = predicted(*rng.integers(0, count, (2, 3000)).tolist(), classes=count)
    tables.write(tmp_path, result, [f'class $_{i}' for i in range(count)], None)
    drawings.draw_confusion(tmp_path)
    rows = min(count, drawings.NUM_CONFUSED if count > drawings.MOST_CLASSES else count)
    assert 50 * rows < min(Image.open(tmp_path / 'confusion.png').size) < 3000


def test_most_confused_classes_keep_their_pictures():
    """A part of a matrix has the most confused pairs, and all other predictions in the last column."""
    counts = np.array([[5, 0, 1, 0], [0, 9, 0, 0], [0, 2, 3, 4], [1, 0, 0, 7]])
    chosen = tables.most_confused_classes(counts, 2)
    assert chosen == [2, 3]
    assert tables.part_of(counts, chosen).tolist() == [[3, 4, 2], [0, 7, 1]]


def test_page_is_one_file(tmp_path):
    """Any sections give a page with pictures inside, escaped texts, and no section without content."""
    Image.new('RGB', (3, 2), 'red').save(tmp_path / 'map.png')
    page.write(tmp_path, 'A <b>', [
        page.Section('Masks', 'IoU & more', facts={'mIoU': '<1'}, picture='map.png'),
        page.Section('Boxes', header=('class', 'AP'), rows=[('a|b*', '0.5')] * 60,
                     tiles=[page.Tile(Image.new('RGB', (3, 2)), ['é中 <i>', '\udce4'])]),
        page.Section('Nothing', picture='none.png')])
    text = (tmp_path / 'report.html').read_text(encoding='utf-8')
    assert set(re.findall('src="([^;]*)', text)) == {'data:image/png', 'data:image/jpeg'}
    words = ('A &lt;b&gt;', 'IoU &amp; more', '&lt;1', 'é中 &lt;i&gt;', r'\xe4')
    assert [word for word in words if word not in text] == []
    assert ('Nothing' in text, text.count('<td>a|b*</td>'), 'http' in text) == (False, 60, False)
    text = (tmp_path / 'report.md').read_text(encoding='utf-8')
    words = ('A &lt;b', '![Masks](map.png)', r'| a\|b\* | 0.5 |', 'first 50 of 60')
    assert [word for word in words if word not in text] == []
    assert 'Nothing' not in text


# ----- of a run

@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    return write_folders(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('run') / 'run'
    main(tiny(data, '--epochs', '2', '--output-dir', str(folder)))
    return folder


def test_training_makes_a_report(trained, data):
    """The report is that of the best epoch and the better of model and EMA, as in best_model.pth."""
    assert {file.name for file in (trained / 'report').iterdir()} >= FILES - {'mistakes.png'}
    rows = rows_of(trained / 'report' / 'predictions.csv')
    assert [row['file'] for row in rows] == sorted(map(str, (data / 'val').rglob('*.png')))
    log = [json.loads(line) for line in (trained / 'log.txt').read_text().splitlines()]
    accuracy = torch.load(trained / 'best_model.pth', weights_only=True)['accuracy']
    best = max(line[key] for line in log for key in ('test_acc1', 'test_ema_acc1'))
    assert 100 * np.mean([row['truth'] == row['class_1'] for row in rows]) == pytest.approx(best)
    line = log[int(accuracy['best_epoch'])]
    assert line['test_ema_acc1' if accuracy['better_is_average'] else 'test_acc1'] == best
    text = (trained / 'report' / 'report.html').read_text(encoding='utf-8')
    weights = f'{"EMA" if accuracy["better_is_average"] else "model"} of epoch {accuracy["best_epoch"]:.0f}'
    assert [word for word in (weights, str(data), 'xcit_nano_12_p16', '8 at 32 pixels', f'{best:.2f} % (95 % confid',
                              'Classes', 'Confusion') if word not in text] == []


def test_last_lines_name_the_best_model(data, tmp_path, capsys):
    """The last lines name the model or the EMA, and commands that use the file."""
    main(tiny(data, '--epochs', '1', '--output-dir', str(tmp_path / 'run'), '--model-ema-decay', '.5'))
    out = capsys.readouterr().out
    accuracy = torch.load(tmp_path / 'run' / 'best_model.pth', weights_only=True)['accuracy']
    assert ('Best: epoch 0, the EMA' in out) == bool(accuracy['better_is_average'])
    assert f'python main.py --eval --resume {tmp_path}/run/best_model.pth --data-set FOLDER --data-path {data}\n' in out
    assert f'python -m tools.predict PICTURE.jpg --pretrained {tmp_path}/run/best_model.pth' in out


def test_better_ema_is_named(data, tmp_path, monkeypatch, capsys):
    """An EMA that is better than the model is named and marked as the best."""
    monkeypatch.setattr(evaluation, 'evaluate_with_ema', lambda *args, **kwargs: (
        {'test_acc1': 50., 'test_acc5': 100., 'test_loss': 1., 'test_ema_acc1': 75.}, {}))
    main(tiniest(data, '--epochs', '1', '--output-dir', str(tmp_path)))
    out = capsys.readouterr().out
    assert 'Best: epoch 0, the EMA, Acc@1 75.000' in out
    assert '--use-ema' not in out
    assert torch.load(tmp_path / 'best_model.pth', weights_only=True)['accuracy']['better_is_average'] == 1


def test_no_report(data, tmp_path):
    """--no-report writes none."""
    main(tiniest(data, '--epochs', '1', '--no-report', '--output-dir', str(tmp_path)))
    assert not (tmp_path / 'report').exists()


def test_evaluation_makes_a_report(data, trained, tmp_path):
    """An evaluation has a report without curves."""
    stats = main(tiny(data, '--eval', '--resume', str(trained / 'best_model.pth'), '--output-dir', str(tmp_path)))
    rows = rows_of(tmp_path / 'report' / 'predictions.csv')
    assert 100 * np.mean([row['truth'] == row['class_1'] for row in rows]) == pytest.approx(stats['acc1'])
    assert not (tmp_path / 'report' / 'curves.png').exists()


@pytest.mark.parametrize('flags', [[], ['--no-dist-eval']], ids=['shared', 'each'])
def test_two_processes_have_the_same_report(data, trained, tmp_path, flags):
    """Each image is listed once, in order."""
    argv = tiny(data, '--eval', '--resume', str(trained / 'best_model.pth'), '--batch-size', '2', *flags)
    main([*argv, '--output-dir', str(tmp_path / 'one')])
    run([ROOT / 'main.py', *argv, '--output-dir', str(tmp_path / 'two')], 2)
    rows, rows_of_two = (rows_of(tmp_path / name / 'report' / 'predictions.csv') for name in ('one', 'two'))
    assert [(row['file'], row['truth'], row['class_1']) for row in rows] == [
        (row['file'], row['truth'], row['class_1']) for row in rows_of_two]


def test_without_matplotlib(data, tmp_path, monkeypatch, capsys):
    """Without matplotlib a line before the training names the missing pictures, and the page has the rest."""
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    lettering.font_files.cache_clear()
    main(tiniest(data, '--epochs', '1', '--output-dir', str(tmp_path)))
    lettering.font_files.cache_clear()
    before, _, after = capsys.readouterr().out.partition('Training time')
    assert 'without confusion.png and curves.png, which need matplotlib (pip install matplotlib; ' in before
    assert 'which need matplotlib' in after
    assert 'top-1' in (tmp_path / 'report' / 'report.html').read_text()
    assert (tmp_path / 'report' / 'per_class.csv').exists()
    assert not (tmp_path / 'report' / 'curves.png').exists()


def test_most_confident_mistakes(tmp_path):
    """The wrong predictions are shown, the most probable first, with texts below; unreadable pictures are grey."""
    def picture(index: int) -> Image.Image:
        if index == 3:
            raise UnreadableImage('gone')
        return Image.new('RGB', (30, 20 + 20 * index), 'red')

    result = predicted([0, 1, 1, 0], [0, 0, 0, 1], classes=2)
    result.probability[:, 0] = [.9, .6, .8, .7]
    predictions.write(tmp_path / 'predictions.csv', result, ['a' * 99, 'ß and 猫'], [f'x/{i} .png' for i in range(4)])
    rows = predictions.read(tmp_path / 'predictions.csv')
    wrong = drawings.mistakes(rows)
    assert wrong == [2, 3, 1]
    tiles = [drawings.tile(picture, index, rows[index]) for index in wrong]
    assert tiles[0].lines == ['2 .png', 'is ß and 猫', f'80 % {"a" * 99}']
    assert [tile.picture.getpixel((9, 9)) for tile in tiles] == [(255, 0, 0), (211, 211, 211), (255, 0, 0)]
    drawings.draw_tiles(tiles, tmp_path / 'mistakes.png')
    assert Image.open(tmp_path / 'mistakes.png').width == drawings.COLUMNS * (drawings.SIDE + 8) - 8


def test_report_without_mistakes(tmp_path):
    """Without mistakes there is no sheet, also none of earlier predictions."""
    (tmp_path / 'mistakes.png').touch()
    drawings.draw(tmp_path, tmp_path / 'log.txt', [], curves={})
    assert not (tmp_path / 'mistakes.png').exists()


def test_best_epoch():
    """The best epoch is that of the run: the last with the highest value, of the first key; NaN is never best."""
    lines = [{'epoch': 0, 'a': 3.}, {'epoch': 1, 'a': float('nan'), 'b': 2.}, {'epoch': 2, 'a': 3., 'b': 3.}]
    assert drawings.best_point(lines, ('a', 'b'), unit='epoch') == (2, 'a', 3.)
    metrics = parts.Metrics()
    for line in lines:
        metrics.update_best({key: line.get(key, math.nan) for key in 'ab'}, epoch=line['epoch'])
    assert metrics['best_epoch'] == 2.
    assert drawings.best_point(lines, ('c',), unit='epoch') is None


def test_best_epoch_is_marked(tmp_path):
    """The curves have a line at the best epoch."""
    (tmp_path / 'log.txt').write_text(''.join(json.dumps({'epoch': i, 'a': i % 3}) + '\n' for i in range(5)))
    for name, best in (('without', ()), ('with', ('a',))):
        drawings.draw_curves(tmp_path / 'log.txt', tmp_path / f'{name}.png', curves={'a': {'a': 'a'}}, unit='epoch',
                             best=best)
    assert (tmp_path / 'with.png').read_bytes() != (tmp_path / 'without.png').read_bytes()


def test_curves_of_any_keys_and_unit(tmp_path):
    """The caller gives the panels, their curves and the unit; each panel has about a square on the page."""
    lines = [{'iteration': i, 'loss_masks': 1 / (1 + i), 'mIoU': i} for i in range(5)]
    (tmp_path / 'log.txt').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    drawings.draw(tmp_path, tmp_path / 'log.txt', [], unit='iteration',
                  curves={'loss': {'loss_masks': 'masks'}, 'IoU': {'mIoU': 'model', 'ema_mIoU': 'EMA'}})
    width, height = Image.open(tmp_path / 'curves.png').size
    assert width / height == pytest.approx(2 * 13 / 3 / 4, rel=.02)


# ----- later

def test_report_of_a_run_without_one(trained, tmp_path):
    """best_model.pth is evaluated on the run's own data, and missing pictures are drawn again."""
    folder = shutil.copytree(trained, tmp_path / 'run')
    shutil.rmtree(folder / 'report')
    report.main([str(folder), '--device', 'cpu', '--num-workers', '0'])
    assert {file.name for file in (folder / 'report').iterdir()} >= FILES - {'mistakes.png'}
    (folder / 'report' / 'curves.png').unlink()
    report.main([str(folder), '--device', 'cpu', '--num-workers', '0'])
    assert (folder / 'report' / 'curves.png').exists()


def test_report_on_other_pictures(trained, tmp_path):
    """--data-path evaluates other pictures."""
    folder = shutil.copytree(trained, tmp_path / 'run')
    other = write_folders(tmp_path / 'other', per_class=4)
    report.main([str(folder), '--data-path', str(other), '--device', 'cpu', '--num-workers', '0'])
    assert len(rows_of(folder / 'report' / 'predictions.csv')) == 4
    assert json.loads((folder / 'eval.json').read_text())['images'] == 4


@pytest.mark.parametrize(('make', 'message'), [
    (lambda folder: None, 'no such folder'), (lambda folder: folder.mkdir(), 'has no args.json and no eval.json'),
    (lambda folder: (folder.mkdir(), (folder / 'args.json').write_text('{}')), 'args.json: can.t be read'),
    (lambda folder: (folder.mkdir(), (folder / 'args.json').write_text('{"args": {"model": "xcit_nano_12_p16"}}')),
     'has neither best_model.pth nor checkpoint.pth'),
    (lambda folder: (folder.mkdir(), (folder / 'args.json').write_text('{"args": {"pretrained": "w.pth"}}')),
     'its flags lack model, data_set, data_path, input_size')],
    ids=['missing', 'empty', 'damaged', 'no weights', 'another program'])
def test_folder_without_a_run(tmp_path, make, message):
    """A folder that is not a run of main.py is refused."""
    make(tmp_path / 'run')
    with pytest.raises(InputError, match=message):
        report.main([str(tmp_path / 'run')])
