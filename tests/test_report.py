"""Reports of runs: metrics by hand, files, and the occasions of a report."""
import csv
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, tiniest, tiny, write_folders
from PIL import Image
from processes import run

from classification import evaluation
from main import main
from reports import drawings, predictions, tables
from tools import report
from utils import InputError, read_csv, write_csv

FILES = {'predictions.csv', 'per_class.csv', 'confusion.csv', 'confusion.png', 'curves.png', 'mistakes.png'}


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


def test_thousand_classes_show_pairs(tmp_path):
    """The picture of the 30 most confused pairs stays small."""
    rng = np.random.default_rng(0)
    result = predicted(rng.integers(0, 1000, 4000).tolist(), rng.integers(0, 1000, 4000).tolist(), classes=1000)
    tables.write(tmp_path, result, [f'class {i}' for i in range(1000)], None)
    drawings.draw_confusion(tmp_path)
    assert max(Image.open(tmp_path / 'confusion.png').size) < 2000


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


def test_last_lines_name_the_best_model(data, tmp_path, capsys):
    """The last lines name the model or the EMA, and commands that use it."""
    main(tiny(data, '--epochs', '1', '--output-dir', str(tmp_path / 'run'), '--model-ema-decay', '.5'))
    out = capsys.readouterr().out
    accuracy = torch.load(tmp_path / 'run' / 'best_model.pth', weights_only=True)['accuracy']
    assert ('Best: epoch 0, the EMA' in out) == bool(accuracy['better_is_average'])
    assert out.count(' --use-ema') == (2 if accuracy['better_is_average'] else 0)
    assert f'python -m tools.predict PICTURE.jpg --pretrained {tmp_path}/run/best_model.pth' in out


def test_better_ema_is_named(data, tmp_path, monkeypatch, capsys):
    """An EMA that is better than the model is named and marked as the best."""
    monkeypatch.setattr(evaluation, 'evaluate_with_ema', lambda *args, **kwargs: (
        {'test_acc1': 50., 'test_acc5': 100., 'test_loss': 1., 'test_ema_acc1': 75.}, {}))
    main(tiniest(data, '--epochs', '1', '--output-dir', str(tmp_path)))
    out = capsys.readouterr().out
    assert 'Best: epoch 0, the EMA, Acc@1 75.000' in out
    assert out.count(' --use-ema') == 2
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
    """Without matplotlib the tables are written, and a line names the missing pictures."""
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    main(tiniest(data, '--epochs', '1', '--output-dir', str(tmp_path)))
    assert 'without confusion.png and curves.png, which need matplotlib (pip install matplotlib; ' in (
        capsys.readouterr().out)
    assert (tmp_path / 'report' / 'per_class.csv').exists()
    assert not (tmp_path / 'report' / 'curves.png').exists()


def test_sheet_of_mistakes(tmp_path):
    """The sheet has the wrong predictions, the most probable first; without mistakes there is no sheet."""
    drawn = []

    def picture(index: int) -> Image.Image:
        drawn.append(index)
        return Image.new('RGB', (30, 20 + 20 * index), 'red')

    result = predicted([0, 1, 1, 0], [0, 0, 0, 1], classes=2)
    result.probability[:, 0] = [.9, .6, .8, .7]
    predictions.write(tmp_path / 'predictions.csv', result, ['a' * 99, 'ß and 猫'], None)
    drawings.draw_mistakes(tmp_path, picture)
    assert drawn == [2, 3, 1]
    assert Image.open(tmp_path / 'mistakes.png').size[0] == drawings.COLUMNS * (drawings.SIDE + 8)
    predictions.write(tmp_path / 'predictions.csv', predicted([0], [0], classes=2), ['a', 'b'], None)
    drawings.draw_mistakes(tmp_path, picture)
    assert not (tmp_path / 'mistakes.png').exists()


def test_curves_of_any_keys_and_unit(tmp_path):
    """The caller gives the panels, their curves and the unit; each panel has about a square on the page."""
    lines = [{'iteration': i, 'loss_masks': 1 / (1 + i), 'mIoU': i} for i in range(5)]
    (tmp_path / 'log.txt').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    drawings.draw(tmp_path, tmp_path / 'log.txt', None, unit='iteration',
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
