"""The report of a run: its figures by hand, its files, and when it is made."""
import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, tiniest, tiny, write_folders
from PIL import Image
from processes import run

from main import main
from reports import drawings, predictions, tables
from tools import report
from utils import InputError

FILES = {'predictions.csv', 'per_class.csv', 'confusion.csv', 'confusion.png', 'curves.png', 'mistakes.png'}


class Alone:
    """What `gather` asks of a loader."""
    shares_images = counts_batches = True


def predicted(truth: list, taken_for: list, classes: int) -> predictions.Predictions:
    """Predictions whose most probable class is given."""
    found = predictions.Predictions()
    logits = torch.nn.functional.one_hot(torch.tensor(taken_for), classes) * 3.
    for part in (slice(0, 3), slice(3, None)):
        found(logits[part], torch.tensor(truth)[part])
    found.gather(Alone)
    return found


def rows_of(path: Path) -> list:
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


# ----- figures

def test_figures_by_hand(tmp_path):
    """Precision, recall, F1 and support of each class; 0 for one that is not there or never predicted."""
    found = predicted([0, 0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 0, 0], classes=4)
    tables.write(tmp_path / 'report', found, ['a', 'b', 'c', 'd'], None)
    rows = [list(row.values()) for row in rows_of(tmp_path / 'report' / 'per_class.csv')]
    assert rows == [['a', '0.6000', '0.7500', '0.6667', '4'], ['b', '0.5000', '0.5000', '0.5000', '2'],
                    ['c', '0.0000', '0.0000', '0.0000', '1'], ['d', '0.0000', '0.0000', '0.0000', '0']]
    names, counts = tables.read_confusion(tmp_path / 'report' / 'confusion.csv')
    assert names == ['a', 'b', 'c', 'd']
    assert counts.tolist() == [[3, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert tables.most_confused(counts, 2) == [(0, 1, 1), (1, 0, 1)]


def test_predictions_of_each_image(tmp_path):
    """File, truth, and the most probable classes with their probabilities; names with commas and quotes stay whole."""
    found = predicted([0, 1], [1, 1], classes=3)
    predictions.write(tmp_path / 'p.csv', found, ['a, b', 'c "d"', 'e'], ['x/1.png', 'x/2.png'])
    first, second = rows_of(tmp_path / 'p.csv')
    p = float(torch.tensor([0., 3., 0.]).softmax(0)[1])
    assert (first['file'], first['truth'], first['class_1']) == ('x/1.png', 'a, b', 'c "d"')
    assert float(first['probability_1']) == pytest.approx(p, abs=1e-6)
    assert second['file'] == 'x/2.png'
    assert set(first) == {'file', 'truth', *(f'{kind}_{i}' for kind in ('class', 'probability') for i in (1, 2, 3))}


def test_thousand_classes_show_pairs(tmp_path):
    """The picture of the 30 most confused pairs stays small."""
    rng = np.random.default_rng(0)
    found = predicted(rng.integers(0, 1000, 4000).tolist(), rng.integers(0, 1000, 4000).tolist(), classes=1000)
    tables.write(tmp_path, found, [f'class {i}' for i in range(1000)], None)
    drawings.draw_confusion(tmp_path)
    assert max(Image.open(tmp_path / 'confusion.png').size) < 2000


# ----- a run's

@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    return write_folders(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('run') / 'run'
    main(tiny(data, '--epochs', '2', '--output-dir', str(folder)))
    return folder


def test_training_makes_a_report(trained, data):
    """Of the best epoch and the better of model and average, as best_model.pth says."""
    assert {file.name for file in (trained / 'report').iterdir()} >= FILES - {'mistakes.png'}
    rows = rows_of(trained / 'report' / 'predictions.csv')
    assert [row['file'] for row in rows] == sorted(map(str, (data / 'val').rglob('*.png')))
    log = [json.loads(line) for line in (trained / 'log.txt').read_text().splitlines()]
    accuracy = torch.load(trained / 'best_model.pth', weights_only=True)['accuracy']
    best = max(line[key] for line in log for key in ('test_acc1', 'test_ema_acc1'))
    assert 100 * np.mean([row['truth'] == row['class_1'] for row in rows]) == pytest.approx(best)
    line = log[int(accuracy['best_epoch'])]
    assert line['test_ema_acc1' if accuracy['better_is_average'] else 'test_acc1'] == best


def test_last_lines_say_what_is_best(data, tmp_path, capsys):
    """Model or average, and commands that take it: evaluation gives that accuracy, and predict runs."""
    main(tiny(data, '--epochs', '1', '--output-dir', str(tmp_path / 'run'), '--model-ema-decay', '.5'))
    out = capsys.readouterr().out
    accuracy = torch.load(tmp_path / 'run' / 'best_model.pth', weights_only=True)['accuracy']
    assert ('Best: epoch 0, the moving average' in out) == bool(accuracy['better_is_average'])
    assert out.count(' --use-ema') == (2 if accuracy['better_is_average'] else 0)
    assert f'python -m tools.predict PICTURE.jpg --pretrained {tmp_path}/run/best_model.pth' in out


def test_better_average_is_named(data, tmp_path, monkeypatch, capsys):
    """And taken for the report, where it is better."""
    import main as program
    monkeypatch.setattr(program, 'test', lambda *args, **kwargs: (
        {'test_acc1': 50., 'test_acc5': 100., 'test_loss': 1., 'test_ema_acc1': 75.}, {}))
    main(tiniest(data, '--epochs', '1', '--output-dir', str(tmp_path)))
    out = capsys.readouterr().out
    assert 'Best: epoch 0, the moving average, Acc@1 75.000' in out
    assert out.count(' --use-ema') == 2
    assert torch.load(tmp_path / 'best_model.pth', weights_only=True)['accuracy']['better_is_average'] == 1


def test_no_report(data, tmp_path):
    """Where it is not wanted, or nothing is written."""
    main(tiniest(data, '--epochs', '1', '--no-report', '--output-dir', str(tmp_path)))
    assert not (tmp_path / 'report').exists()


def test_evaluation_makes_a_report(data, trained, tmp_path):
    """Of what was evaluated; without curves, which a training has."""
    stats = main(tiny(data, '--eval', '--resume', str(trained / 'best_model.pth'), '--output-dir', str(tmp_path)))
    rows = rows_of(tmp_path / 'report' / 'predictions.csv')
    assert 100 * np.mean([row['truth'] == row['class_1'] for row in rows]) == pytest.approx(stats['acc1'])
    assert not (tmp_path / 'report' / 'curves.png').exists()


@pytest.mark.parametrize('flags', [[], ['--no-dist-eval']], ids=['shared', 'each'])
def test_two_processes_have_the_same_report(data, trained, tmp_path, flags):
    """Each image once, in order."""
    words = tiny(data, '--eval', '--resume', str(trained / 'best_model.pth'), '--batch-size', '2', *flags)
    main([*words, '--output-dir', str(tmp_path / 'one')])
    run([ROOT / 'main.py', *words, '--output-dir', str(tmp_path / 'two')], 2)
    one, two = (rows_of(tmp_path / name / 'report' / 'predictions.csv') for name in ('one', 'two'))
    assert [(row['file'], row['truth'], row['class_1']) for row in one] == [
        (row['file'], row['truth'], row['class_1']) for row in two]


def test_without_matplotlib(data, tmp_path, monkeypatch, capsys):
    """The tables and the sheet are made all the same, and a line says what is missing."""
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    main(tiniest(data, '--epochs', '1', '--output-dir', str(tmp_path)))
    assert 'without confusion.png and curves.png, which need matplotlib (pip install matplotlib; ' in (
        capsys.readouterr().out)
    assert (tmp_path / 'report' / 'per_class.csv').exists()
    assert not (tmp_path / 'report' / 'curves.png').exists()


def test_sheet_of_mistakes(tmp_path):
    """The wrong ones alone, the surest first; none where all is right."""
    asked = []

    def picture(index: int) -> Image.Image:
        asked.append(index)
        return Image.new('RGB', (30, 20 + 20 * index), 'red')

    found = predicted([0, 1, 1, 0], [0, 0, 0, 1], classes=2)
    found.probability[:, 0] = [.9, .6, .8, .7]
    predictions.write(tmp_path / 'predictions.csv', found, ['a' * 99, 'ß and 猫'], None)
    drawings.draw_mistakes(tmp_path, picture)
    assert asked == [2, 3, 1]
    assert Image.open(tmp_path / 'mistakes.png').size[0] == drawings.COLUMNS * (drawings.SIDE + 8)
    predictions.write(tmp_path / 'predictions.csv', predicted([0], [0], classes=2), ['a', 'b'], None)
    drawings.draw_mistakes(tmp_path, picture)
    assert not (tmp_path / 'mistakes.png').exists()


# ----- later

def test_report_of_a_run_without_one(trained, tmp_path):
    """best_model.pth is evaluated on the run's own data, and all is drawn."""
    folder = shutil.copytree(trained, tmp_path / 'run')
    shutil.rmtree(folder / 'report')
    report.main([str(folder), '--device', 'cpu', '--num-workers', '0'])
    assert {file.name for file in (folder / 'report').iterdir()} >= FILES - {'mistakes.png'}
    (folder / 'report' / 'curves.png').unlink()
    report.main([str(folder), '--device', 'cpu', '--num-workers', '0'])
    assert (folder / 'report' / 'curves.png').exists()


def test_report_on_other_pictures(trained, tmp_path):
    """--data-path evaluates them."""
    folder = shutil.copytree(trained, tmp_path / 'run')
    other = write_folders(tmp_path / 'other', per_class=4)
    report.main([str(folder), '--data-path', str(other), '--device', 'cpu', '--num-workers', '0'])
    assert len(rows_of(folder / 'report' / 'predictions.csv')) == 4


@pytest.mark.parametrize(('make', 'message'), [
    (lambda folder: None, 'no such folder'), (lambda folder: folder.mkdir(), 'has no args.json and no eval.json'),
    (lambda folder: (folder.mkdir(), (folder / 'args.json').write_text('{}')), 'args.json: can.t be read'),
    (lambda folder: (folder.mkdir(), (folder / 'args.json').write_text('{"args": {"model": "xcit_nano_12_p16"}}')),
     'has neither best_model.pth nor checkpoint.pth')], ids=['missing', 'empty', 'damaged', 'no weights'])
def test_folder_without_a_run(tmp_path, make, message):
    """One line."""
    make(tmp_path / 'run')
    with pytest.raises(InputError, match=message):
        report.main([str(tmp_path / 'run')])
