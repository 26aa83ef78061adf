"""timm's data readers behind --data-set."""
import io
import json
import math
import pickle
import signal
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import small_dino
import torch
from conftest import ROOT, TINY, seeded_model, tiniest, write_folders
from processes import finish, run, start
from resuming import assert_same_run, interrupt, log_lines

from dino import knn
from loaders import streams
from main import main, parse_args
from utils import InputError


@pytest.fixture(scope='module')
def folders(tmp_path_factory) -> Path:
    """32 training and 16 validation pictures of 2 classes, in class folders; `validation` as Hugging Face calls it."""
    root = write_folders(tmp_path_factory.mktemp('data'), per_class=16)
    (root / 'val').rename(root / 'validation')
    return root


@pytest.fixture(scope='module')
def shards(folders, tmp_path_factory) -> Path:
    """Shards: the pictures in 4 tar files of training and 2 of validation, with their description."""
    root = tmp_path_factory.mktemp('shards')
    splits = {}
    for split, count in (('train', 4), ('validation', 2)):
        files = sorted((folders / split).rglob('*.png'))
        names = [f'{split}-{i}.tar' for i in range(count)]
        for i, name in enumerate(names):
            with tarfile.open(root / name, 'w') as tar:
                for file in files[i::count]:
                    label = str(['cat', 'dog'].index(file.parent.name)).encode()
                    for suffix, content in (('png', file.read_bytes()), ('cls', label)):
                        entry = tarfile.TarInfo(f'{file.parent.name}{file.stem}.{suffix}')
                        entry.size = len(content)
                        tar.addfile(entry, io.BytesIO(content))
        splits[split] = {'name': split, 'num_samples': len(files), 'filenames': names,
                         'shard_lengths': [len(files[i::count]) for i in range(count)]}
    (root / '_info.json').write_text(json.dumps({'splits': splits}))
    return root


SMALL = [*TINY, '--model', 'xcit_test']


def wds(root: Path, *more: str) -> list:
    return [*SMALL, '--data-set', 'wds/', '--data-path', str(root), '--num-classes', '2', *more]


def hfds(folders: Path, *more) -> list:
    """Return a command for another process, in which Hugging Face's package replaces datasets.py."""
    return [ROOT / 'main.py', *SMALL, '--data-set', f'hfds/{folders}', *more]


@pytest.fixture(scope='module')
def weights(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp('weights') / 'weights.pth'
    torch.save({'model': seeded_model('xcit_test', num_classes=2).state_dict()}, path)
    return str(path)


@pytest.fixture(scope='module')
def expected(folders, weights, tmp_path_factory) -> dict:
    """Metrics of the validation folder without a reader."""
    root = tmp_path_factory.mktemp('renamed')
    (root / 'val').symlink_to(folders / 'validation')
    return main(tiniest(root, '--eval', '--pretrained', weights))


# ----- webdataset

def test_stream_trains(shards, tmp_path):
    """Two epochs of 8 batches train to a finite loss; the classes of the checkpoint are numbers."""
    stats = main(wds(shards, '--output-dir', str(tmp_path)))
    assert math.isfinite(stats['train_loss'])
    assert torch.load(tmp_path / 'checkpoint.pth', weights_only=True)['classes'] == ['0', '1']


def test_stream_without_labels(shards, tmp_path):
    """DINO trains on a stream, with k-NN on its labels, which only k-NN uses."""
    small_dino.main(['--arch', 'xcit_test', '--data-set', 'wds/', '--data-path', str(shards), '--num-classes', '2',
                     '--knn-every', '1', '--nb-knn', '3', '--global-crops-size', '32', '--local-crops-number', '0',
                     '--out-dim', '16', '--epochs', '2', '--warmup-epochs', '1', '--batch-size', '4', '--num-workers',
                     '0', '--device', 'cpu', '--output-dir', str(tmp_path / 'run')])
    lines = log_lines(tmp_path / 'run')
    assert [math.isfinite(line['train_loss']) for line in lines] == [True, True]
    measured = knn.main(['--pretrained', str(tmp_path / 'run' / 'checkpoint.pth'), '--data-set', 'wds/', '--data-path',
                      str(shards), '--num-classes', '2', '--nb-knn', '3', '--device', 'cpu', '--num-workers', '0'])
    assert measured['images'] == {'train': 32, 'val': 16}
    assert measured['results']['3']['top1'] == lines[-1]['knn_top1']


def test_stream_evaluation_is_exact(shards, weights, expected):
    """A stream has the accuracy and loss of the folders."""
    stats = main(wds(shards, '--eval', '--pretrained', weights))
    assert (stats['images'], stats['acc1']) == (16, expected['acc1'])
    assert stats['loss'] == pytest.approx(expected['loss'], abs=1e-6)


@pytest.mark.parametrize('workers', ['0', '2'])
def test_stream_evaluation_is_exact_for_two_processes(shards, weights, expected, tmp_path, workers):
    """Two processes together have the accuracy and loss of the folders."""
    run([ROOT / 'main.py', *wds(shards, '--eval', '--pretrained', weights, '--num-workers', workers, '--output-dir',
                                str(tmp_path))], 2)
    stats = json.loads((tmp_path / 'eval.json').read_text())
    assert (stats['images'], stats['acc1']) == (16, expected['acc1'])
    assert stats['loss'] == pytest.approx(expected['loss'], abs=1e-6)


@pytest.mark.parametrize('world', [1, 2])
def test_stream_has_a_report_without_files(shards, weights, tmp_path, world):
    """The predictions have each image once, by its number in the order of the processes."""
    run([ROOT / 'main.py', *wds(shards, '--eval', '--pretrained', weights, '--output-dir', str(tmp_path))], world)
    lines = (tmp_path / 'report' / 'predictions.csv').read_text().splitlines()[1:]
    assert [line.split(',')[0] for line in lines] == [str(i) for i in range(16)]
    assert sorted(line.split(',')[1] for line in lines) == ['0'] * 8 + ['1'] * 8


def test_stream_trains_with_two_processes(shards, tmp_path):
    """Both processes make the same number of steps, and the log has both epochs."""
    run([ROOT / 'main.py', *wds(shards, '--output-dir', str(tmp_path))], 2)
    assert len(log_lines(tmp_path)) == 2


def test_too_few_shards(shards):
    """Processes without a file of their own are refused."""
    results = finish(start([ROOT / 'main.py', *wds(shards, '--train-split', 'train-{0..0}.tar|32')], 2))
    assert [code for code, _, _ in results] == [2, 2]
    assert "its 1 file can't be shared by 2 processes" in results[0][2]


def test_unreadable_image_in_a_stream(shards, weights, tmp_path):
    """timm leaves out an unreadable image; the evaluation refuses the smaller number."""
    for file in shards.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = (tmp_path / 'validation-0.tar').read_bytes()
    place = content.index(b'\x89PNG')
    (tmp_path / 'validation-0.tar').write_bytes(content[:place] + b'junk' * 4 + content[place + 16:])
    with pytest.raises(InputError, match='only 15 of the 16 images of the data set could be evaluated'):
        main(wds(tmp_path, '--eval', '--pretrained', weights))


def test_stream_without_readable_images(shards, tmp_path):
    """A run on files without readable images ends in one line."""
    (tmp_path / '_info.json').write_bytes((shards / '_info.json').read_bytes())
    for file in shards.glob('*.tar'):
        (tmp_path / file.name).write_bytes(file.read_bytes().replace(b'.png', b'.txt'))
    with pytest.raises(InputError, match=r'no batch of readable samples|of the 16 images|can.t read its split'):
        main(wds(tmp_path))


@pytest.mark.parametrize(('old', 'new', 'found'), [('.png', '.jpeg', '.jpeg, .cls'), ('.cls', '.txt', '.png, .txt')])
def test_shards_that_timm_cannot_read(shards, tmp_path, old, new, found):
    """Shards in which timm would search endlessly are refused."""
    other = tmp_path / 'shards'
    other.mkdir()
    for file in shards.iterdir():
        if file.suffix == '.tar':
            with tarfile.open(file) as tar, tarfile.open(other / file.name, 'w') as out:
                for entry in tar.getmembers():
                    data = tar.extractfile(entry)
                    entry.name = entry.name.replace(old, new)
                    out.addfile(entry, data)
        else:
            (other / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match=f'the first sample has {found}'):
        main(wds(other))


def test_missing_shard(shards, tmp_path):
    """A missing file of the description is refused with its name."""
    for file in shards.iterdir():
        if file.name != 'train-2.tar':
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match=r'1 of 4 files are missing: .*train-2\.tar'):
        main(wds(tmp_path))


def test_number_of_evaluation_images_is_needed(shards):
    """An unknown number of evaluation images is refused before the first epoch."""
    with pytest.raises(InputError, match='unknown number of images'):
        main(wds(shards, '--val-split', 'validation-{0..0}.tar', '--train-split', 'train-{0..3}.tar|32'))


@pytest.mark.parametrize('workers', ['0', '2'])
def test_stream_resumes_after_an_epoch(shards, tmp_path, monkeypatch, workers):
    """A run that was stopped at the end of an epoch ends bitwise like an uninterrupted one."""
    flags = wds(shards, '--num-workers', workers)
    main([*flags, '--output-dir', str(tmp_path / 'whole')])
    interrupt(lambda: main([*flags, '--output-dir', str(tmp_path / 'stopped')]), signal.SIGTERM, 8, monkeypatch)
    main([*flags, '--resume', 'auto', '--output-dir', str(tmp_path / 'stopped')])
    assert_same_run(tmp_path / 'stopped', tmp_path / 'whole', rounds=2)


# ----- Hugging Face

def test_hfds_trains(folders, tmp_path):
    """A run with loading workers stores the class names."""
    run(hfds(folders, '--num-workers', '2', '--output-dir', tmp_path, '--epochs', '1', '--data-path', tmp_path), 1)
    assert torch.load(tmp_path / 'checkpoint.pth', weights_only=True)['classes'] == ['cat', 'dog']


def test_hfds_evaluation_is_exact(folders, weights, expected, tmp_path):
    """Two processes count each picture once."""
    run(hfds(folders, '--eval', '--pretrained', weights, '--output-dir', tmp_path, '--data-path', tmp_path), 2)
    stats = json.loads((tmp_path / 'eval.json').read_text())
    assert (stats['images'], stats['acc1']) == (16, expected['acc1'])
    assert stats['loss'] == pytest.approx(expected['loss'], abs=1e-6)


def test_hfds_with_other_columns(folders, tmp_path):
    """Columns of images and classes are found by their type, not by their name."""
    script = tmp_path / 'write.py'
    script.write_text('import sys, datasets\n'
                      'data = datasets.load_dataset(sys.argv[1], cache_dir=sys.argv[2])\n'
                      'data = data.rename_columns({"image": "img", "label": "fine"})\n'
                      'for split in data: data[split].to_parquet(f"{sys.argv[3]}/{split}-00000-of-00001.parquet")\n')
    (tmp_path / 'renamed').mkdir()
    subprocess.run([sys.executable, script, folders, tmp_path / 'cache', tmp_path / 'renamed'], check=True,
                   cwd=tmp_path)
    run(hfds(tmp_path / 'renamed', '--epochs', '1', '--output-dir', tmp_path / 'run', '--data-path', tmp_path), 1)
    assert torch.load(tmp_path / 'run' / 'checkpoint.pth', weights_only=True)['classes'] == ['cat', 'dog']


def test_hfds_unreadable_image(tmp_path, weights):
    """An unreadable image ends the run in one line, in a worker too."""
    broken = write_folders(tmp_path / 'data')
    (broken / 'val').rename(broken / 'validation')
    (broken / 'validation' / 'cat' / '1.png').write_bytes(b'no picture')
    (code, _, err), = finish(start(hfds(broken, '--eval', '--pretrained', weights, '--num-workers', '1', '--data-path',
                                        tmp_path), 1))
    assert code == 2
    assert 'unreadable image number 1' in err.splitlines()[-1]


# ----- torchvision

def test_torch_reader(tmp_path):
    """torch/cifar10 reads torchvision's files, whose evaluation split has several names."""
    folder = tmp_path / 'cifar-10-batches-py'
    folder.mkdir()
    for name in [f'data_batch_{i}' for i in range(1, 6)] + ['test_batch']:
        content = {'data': np.zeros((4, 3072), np.uint8), 'labels': [0, 1, 2, 9]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / 'batches.meta').write_bytes(pickle.dumps({'label_names': list('abcdefghij')}))
    code = ('import sys, torchvision, main\nfrom run import commandline\n'
            'torchvision.datasets.CIFAR10._check_integrity = lambda self: True\n'  # its checksums are the real files'
            'torchvision.datasets.cifar.check_integrity = lambda *_: True\n'
            'commandline.run_program(lambda: main.main(sys.argv[1:]))')
    script = tmp_path / 'train.py'
    script.write_text(code)
    run([script, *SMALL, '--data-set', 'torch/cifar10', '--data-path', tmp_path, '--epochs', '1', '--output-dir',
         tmp_path / 'run'], 1)
    assert torch.load(tmp_path / 'run' / 'checkpoint.pth', weights_only=True)['classes'] == list('abcdefghij')


# ----- mistakes

@pytest.mark.parametrize(('flags', 'message'), [
    (['--data-set', 'hf/food101'], r'--data-set hf/food101: must be one of IMNET, .*hfds/NAME'),
    (['--data-set', 'SAMPLE', '--num-classes', '10'], '--num-classes 10: only works with timm.s readers, not SAMPLE'),
    (['--data-set', 'torch/nothing', '--data-path', '.'], r'torch/nothing: timm can\'t read its split train'),
    (['--data-set', 'torch/cifar10', '--data-path', 'no/such'], 'no such directory'),
    (['--data-set', 'torch/image_folder', '--data-path', 'FOLDERS', '--val-split', 'tset'],
     'no folder of the split tset'),
    (['--data-set', 'wds/', '--data-path', 'SHARDS'], 'has no class names: add --num-classes'),
    (['--data-set', 'wds/', '--data-path', 'SHARDS', '--num-classes', '2', '--val-split', 'test'], 'its split test'),
    (['--data-set', 'wds/', '--data-path', 'SHARDS', '--num-classes', '2', '--accum-iter', '9'],
     'an epoch has 8 batches'),
    (['--data-set', 'wds/', '--data-path', 'SHARDS', '--num-classes', '1'], 'a classifier needs two'),
])
def test_mistakes(shards, folders, flags, message):
    """The refusal contains what is allowed."""
    places = {'SHARDS': str(shards), 'FOLDERS': str(folders)}
    with pytest.raises(InputError, match=message):
        main([*SMALL, *(places.get(word, word) for word in flags)])


@pytest.mark.parametrize('label', [2, -1, 'cat', None, .5])
def test_label_outside_the_classes(label):
    """Two classes have the labels 0 and 1; others are refused."""
    assert [streams.check_label(good, 2) for good in (0, 1)] == [0, 1]
    with pytest.raises(InputError, match='must be a number from 0 to 1'):
        streams.check_label(label, 2)


def test_torch_split_that_does_not_exist(tmp_path):
    """A missing split is refused, which timm would replace by the evaluation's."""
    raw = tmp_path / 'FashionMNIST' / 'raw'
    raw.mkdir(parents=True)
    for name, count in (('train', 8), ('t10k', 4)):
        (raw / f'{name}-images-idx3-ubyte').write_bytes(struct.pack('>4I', 2051, count, 28, 28) + bytes(count * 784))
        (raw / f'{name}-labels-idx1-ubyte').write_bytes(struct.pack('>2I', 2049, count) + bytes(range(count)))
    with pytest.raises(InputError, match='no split trian: must be one of train, '):
        main([*SMALL, '--data-set', 'torch/fashion_mnist', '--data-path', str(tmp_path), '--train-split', 'trian'])


@pytest.mark.parametrize(('data_set', 'package', 'installed'), [
    ('wds/', 'webdataset', '-r requirements-readers.txt'), ('hfds/x', 'datasets', '-r requirements-readers.txt'),
    ('tfds/x', 'tensorflow_datasets', 'tensorflow tensorflow-datasets')])
def test_missing_package(tmp_path, data_set, package, installed):
    """A missing package is refused with the command that installs it."""
    code = (f'import sys, importlib.abc\n'
            f'class Block(importlib.abc.MetaPathFinder):\n'
            f'    def find_spec(self, name, path, target=None):\n'
            f'        if name == {package!r} and "main" in sys.modules: raise ModuleNotFoundError(name)\n'
            f'import main\nfrom run import commandline\n'
            f'sys.meta_path.insert(0, Block())\n'
            f'commandline.run_program(lambda: main.main(sys.argv[1:]))')
    (code, _, err), = finish(start(['-c', code, *SMALL, '--data-set', data_set, '--data-path', tmp_path,
                                    '--num-classes', '2'], 1))
    assert code == 2, err
    assert f'needs the package {package}; pip install {installed}' in err


def test_built_in_sets_are_accepted():
    """A name without a slash is a built-in data set."""
    assert parse_args(['--data-set', 'SAMPLE']).data_set == 'SAMPLE'
