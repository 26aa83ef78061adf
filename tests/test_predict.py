"""Command python -m tools.predict."""
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, seeded_model, tiny, write_folders, write_image

from main import main as train
from tools.predict import main
from utils import InputError, RunStopped


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp('data'), classes=('cat', 'dog', 'fox'), size=(70, 50))


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory):
    """A checkpoint of a short run at 48 pixels with --full-crop."""
    run = tmp_path_factory.mktemp('run')
    train(tiny(data, '--input-size', '48', '--full-crop', '--epochs', '1', '--output-dir', str(run)))
    return run / 'checkpoint.pth'


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    """Weights of 1000 classes under the name of the authors' file."""
    path = tmp_path_factory.mktemp('weights') / 'xcit_nano_12_p16_224.pth'
    torch.save({'model': seeded_model('xcit_nano_12_p16').state_dict()}, path)
    return path


def predict(*words) -> list:
    return main([*map(str, words), '--num-workers', '0', '--device', 'cpu'])


def test_classes_of_a_training(data, trained):
    """Model, resolution, crop and class names come from the checkpoint."""
    results = predict(data / 'val', '--pretrained', trained)
    assert len(results) == 12
    assert {p['class'] for p in results[0]} == {'cat', 'dog', 'fox'}
    assert sum(p['probability'] for p in results[0]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize('size', ['48', '32'])
def test_agrees_with_evaluation(data, trained, size, tmp_path):
    """Accuracy is that of main.py --eval, also for small images, which are not resized."""
    flags = ['--model', 'xcit_nano_12_p16', '--input-size', size, *(['--no-full-crop'] if size == '32' else [])]
    small = write_folders(tmp_path / 'small', classes=('cat', 'dog', 'fox'), size=(40, 30)) if size == '32' else data
    results = predict(small / 'val', '--pretrained', trained, *flags)
    right = sum(result[0]['class'] == ('cat', 'dog', 'fox')[i // 4] for i, result in enumerate(results))
    stats = train(tiny(small, '--eval', '--resume', str(trained), '--full-crop', *flags))
    assert 100 * right / 12 == pytest.approx(stats['acc1'])


def test_names_of_imagenet(data, published, capsys):
    """Weights of 1000 unnamed classes have ImageNet's class names; the model follows from a published file name."""
    predict(data / 'val' / 'cat' / '0.png', '--pretrained', published, '--topk', '1000')
    out, err = capsys.readouterr()
    assert 'tench, Tinca tinca' in out
    assert "'model'" in err
    assert len(out.splitlines()) == 1001


def test_topk_beyond_the_classes(data, trained):
    """A larger --topk than the number of classes gives all classes."""
    assert [len(result) for result in predict(data / 'val' / 'cat', '--pretrained', trained, '--topk', '99')] == [3] * 4


def test_json_is_all_that_is_printed(data, trained):
    """Under --json, each line of stdout is an object; the rest goes to stderr."""
    done = subprocess.run([sys.executable, '-m', 'tools.predict', data / 'val' / 'dog', '--pretrained', trained,
                           '--json', '--device', 'cpu', '--num-workers', '1'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line['path'] for line in lines] == [str(data / 'val' / 'dog' / f'{i}.png') for i in range(4)]
    assert set(lines[0]['predictions'][0]) == {'class', 'index', 'probability'}


def test_unreadable_picture_among_others(tmp_path, trained, capsys):
    """An unreadable picture is named at the end, the others are predicted, and the exit code is 1."""
    write_image(tmp_path / 'a.png')
    (tmp_path / 'b.png').write_bytes(b'no picture')
    write_image(tmp_path / 'c.png')
    with pytest.raises(RunStopped, match=r'unreadable image .*b\.png.*\(1 of 3 could not be read\)') as caught:
        predict(tmp_path, '--pretrained', trained)
    assert caught.value.exit_code == 1
    assert [line for line in capsys.readouterr().out.splitlines() if line.endswith('.png')] == [
        str(tmp_path / name) for name in ('a.png', 'c.png')]


@pytest.mark.parametrize(('words', 'message'), [
    (['no/such.png', '--pretrained', 'W'], r'no/such\.png: no such file'),
    (['EMPTY', '--pretrained', 'W'], 'no images in this folder'),
    (['IMAGE', '--pretrained', 'no/such.pth'], r'--pretrained no/such\.pth: no such file'),
    (['IMAGE', '--pretrained', 'fb_in1k'], r'--pretrained fb_in1k: no such file'),
    (['IMAGE', '--pretrained', 'W', '--model', 'xcit_nano'], r'--model xcit_nano: no such model; similar: xcit_nano'),
    (['IMAGE', '--pretrained', 'W', '--model', 'xcit_nano_12_p8'],
     'checkpoint is xcit_nano_12_p16, --model is xcit_nano_12_p8'),
    (['IMAGE', '--pretrained', 'BACKBONE', '--model', 'xcit_nano_12_p16'], 'has no head to predict classes with'),
    (['IMAGE', '--pretrained', 'BACKBONE'], 'has no head to predict classes with'),
    (['IMAGE', '--pretrained', 'OTHER'], '--model: needed, because'),
    (['IMAGE', '--pretrained', 'W', '--use-ema', '--amp', 'fp16'], '--amp fp16: needs cuda'),
    (['IMAGE', '--pretrained', 'W', '--topk', '0'], "'0' is not allowed"),
])
def test_bad_input(tmp_path, data, trained, words, message):
    """Missing pictures, unusable weights and invalid flags are refused with flag and value."""
    (tmp_path / 'empty').mkdir()
    torch.save(seeded_model('xcit_nano_12_p16', num_classes=0).state_dict(), tmp_path / 'backbone.pth')
    torch.save({'conv.weight': torch.zeros(3, 4, 1, 1), 'fc.bias': torch.zeros(3)}, tmp_path / 'other.pth')
    places = {'EMPTY': tmp_path / 'empty', 'IMAGE': data / 'val' / 'cat' / '0.png', 'W': trained,
              'OTHER': tmp_path / 'other.pth', 'BACKBONE': tmp_path / 'backbone.pth'}
    with pytest.raises(InputError, match=message):
        predict(*(places.get(word, word) for word in words))
