"""Names of files, folders and classes that are not UTF-8, and reports that can't be written."""
import csv
import errno
import io
import json
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import tiniest, write_folders
from PIL import Image
from small_dino import main as train_dino

from dino import features
from loaders.pictures import load_rgb
from main import main
from run import checkpoints, output, parts
from run.commandline import run_program
from tools import extract_features, predict, report
from utils import InputError, UnreadableImage, decodable

NAME = os.fsdecode(b'K\xe4fer')  # in Latin-1, as in old archives


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    """A data set whose folder, second class and pictures have names that are not UTF-8."""
    folder = tmp_path_factory.mktemp('names')
    try:
        root = write_folders(folder / NAME, classes=('cat', NAME), per_class=4)
    except OSError:
        pytest.skip('a file system of UTF-8 names')
    for path in root.rglob('*.png'):
        path.rename(path.with_name(f'{NAME}{path.name}'))
    return root


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('runs') / NAME
    main(tiniest(data, '--epochs', '1', '--output-dir', str(folder)))
    return folder


def test_report_of_any_names(data, trained):
    r"""A training writes its whole report, as UTF-8, in which a byte that is not UTF-8 is written as `\xe4`."""
    text = (trained / 'report' / 'predictions.csv').read_bytes().decode('utf-8-sig')
    rows = list(csv.DictReader(io.StringIO(text)))
    assert {row['truth'] for row in rows} == {'cat', r'K\xe4fer'}
    assert {Path(row['file']).name for row in rows} == {r'K\xe4fer0.png', r'K\xe4fer1.png'}
    names = ('confusion.csv', 'per_class.csv', 'confusion.png', 'curves.png')
    assert all((trained / 'report' / name).exists() for name in names)


def test_checkpoint_keeps_the_names(data, trained):
    """A checkpoint, args.json and a run that is resumed have the names as the system has them."""
    assert torch.load(trained / 'checkpoint.pth', weights_only=True)['classes'] == sorted(['cat', NAME])
    assert json.loads((trained / 'args.json').read_text())['args']['data_path'] == str(data)


def test_resume_and_later_report(data, trained, tmp_path, capsys):
    """A run whose report can't be written ends with an error line, and tools.report writes the report later."""
    folder = shutil.copytree(trained, tmp_path / NAME)
    shutil.rmtree(folder / 'report')
    (folder / 'report').write_text('in the way')
    main(tiniest(data, '--output-dir', str(folder), '--resume', 'auto'))
    out = capsys.readouterr().out
    assert 'Error: FileExistsError: ' in out
    assert f'; the program continues without the report in {decodable(folder)}\n' in out
    assert torch.load(folder / 'checkpoint.pth', weights_only=True)['epoch'] == 1
    (folder / 'report').unlink()
    report.main([str(folder), '--device', 'cpu', '--num-workers', '0'])
    assert (folder / 'report' / 'confusion.png').exists()


def test_predictions_name_the_file(data, trained, capsys):
    """The path in a line of JSON opens the picture; the printed path is readable."""
    flags = [str(data / 'val'), '--pretrained', str(trained / 'checkpoint.pth'), '--device', 'cpu', '--num-workers',
             '0']
    predict.main([*flags, '--json'])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 4
    assert all(os.path.isfile(line['path']) for line in lines)
    predict.main(flags)
    assert r'K\xe4fer0.png' in capsys.readouterr().out


def test_weights_in_safetensors(tmp_path):
    """A .safetensors file in a folder of any name is written and read, with its description."""
    path = tmp_path / NAME / 'm.safetensors'
    path.parent.mkdir()
    checkpoints.save_weights({'weight': torch.ones(2)}, {'args': {'model': 'x'}}, path)
    content = checkpoints.load_checkpoint(path, '--pretrained')
    assert torch.equal(content['model']['weight'], torch.ones(2))
    assert content['args'] == {'model': 'x'}


@pytest.mark.parametrize('suffix', features.SUFFIXES)
def test_features_keep_the_names(tmp_path, suffix):
    """A file of features has paths and classes as the system has them."""
    path = tmp_path / f'{NAME}{suffix}'
    extract_features.write(path, {'features': np.ones((2, 3), np.float32), 'labels': np.arange(2)},
                           {'paths': [f'{NAME}.png'] * 2, 'classes': ['cat', NAME]}, {'model': 'm'})
    assert features.read(str(path), '--train-features').classes == ['cat', NAME]


def test_dino_of_any_names(data, tmp_path, monkeypatch, capsys):
    """DINO trains on pictures of any names, and goes on if a drawing can't be written."""
    folder = tmp_path / 'run'
    monkeypatch.setattr(Image.Image, 'save', mock.Mock(side_effect=OSError(errno.ENOSPC, 'No space left on device')))
    train_dino(['--arch', 'xcit_test', '--patch-size', '16', '--out-dim', '16', '--global-crops-size', '32',
                '--local-crops-number', '0', '--batch-size', '4', '--epochs', '1', '--warmup-epochs', '0', '--device',
                'cpu', '--num-workers', '0', '--data-path', str(data), '--output-dir', str(folder),
                '--pictures-every', '1'])
    assert (f'Error: {folder}/dino_pictures/epoch0000.png can\'t be written (No space left on device); the program '
            f'continues without this drawing\n') in capsys.readouterr().out
    images = torch.load(folder / 'checkpoint.pth', weights_only=True)['data']
    assert images == parts.Images(8, sorted(map(str, (data / 'train').rglob('*.png')))).state_dict()


def test_line_breaks_in_names(tmp_path, capsys):
    """A line of output about a name with line breaks stays one line."""
    path = tmp_path / 'a\nb\u2028c.png'
    path.write_bytes(b'')
    with pytest.raises(UnreadableImage, match=r'/a\\nb\\u2028c\.png: an empty file$'):
        load_rgb(path)
    predict.print_prediction(path, [{'class': 'c\nd', 'index': 0, 'probability': 1.}], as_json=False)
    assert capsys.readouterr().out.splitlines() == [rf'{tmp_path}/a\nb\u2028c.png', r'  100.00 %  c\nd']


@pytest.mark.parametrize(('encoding', 'expected'), [
    ('utf-8', 'é中 K\\xe4fer\n'), ('ascii', '\\xe9\\u4e2d K\\xe4fer\n')])
def test_lines_for_any_stream(encoding, expected):
    """Letters that the encoding of a stream lacks are printed as escapes."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    output.write_line(f'é中 {NAME}', stream=stream)
    assert stream.buffer.getvalue().decode(encoding) == expected


def test_errors_name_the_file(monkeypatch):
    """The reason for a program's end is printed for a name of any bytes."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding='utf-8')
    monkeypatch.setattr(sys, 'stderr', stream)

    def fail():
        raise InputError(f'unreadable image {NAME}.png')

    with pytest.raises(SystemExit):
        run_program(fail)
    assert stream.buffer.getvalue().decode().endswith(': error: unreadable image K\\xe4fer.png\n')
