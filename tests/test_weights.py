"""Weights in every published format of XCiT, by every entry; and downloads from real servers."""
import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from conftest import ROOT, seeded_images, seeded_model, tiny, write_folders
from processes import finish, free_port, start
from servers import downloads, serve

import datasets
import main
import weights
import xcit_zoo
from loaders.source import Source
from loaders.transforms import ToNormalizedTensor
from run import checkpoints, output
from utils import InputError

NAME, CLASSES = 'xcit_nano_12_p16', 3
PUBLISHED = xcit_zoo.ZOO[f'{NAME}.fb_in1k']


# ---------------------------------------------------------------------------------------------------------------------
# Formats: functions from a model to the content of a file

class DinoHead(torch.nn.Module):
    """Module with the names of DINO's projection head."""

    def __init__(self):
        super().__init__()
        self.mlp = torch.nn.Sequential(torch.nn.Linear(128, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
        self.last_layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 16, bias=False))


class MultiCrop(torch.nn.Module):
    """Wrapper of DINO's networks."""

    def __init__(self, backbone: torch.nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, DinoHead()


@contextlib.contextmanager
def process_group():
    """Join a group of one process, which DistributedDataParallel needs."""
    torch.distributed.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{free_port()}', rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def distributed(model: torch.nn.Module) -> torch.nn.Module:
    return torch.nn.parallel.DistributedDataParallel(model)


def compiled_blocks(model: torch.nn.Module) -> torch.nn.Module:
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block)
    return model


def in_timm_naming(model: torch.nn.Module) -> dict:
    return xcit_zoo.to_timm_names(model.state_dict())


FORMATS = {
    'original': lambda model: {'model': model.state_dict()},
    'namespace': lambda model: {'model': model.state_dict(), 'args': argparse.Namespace(lr=1.), 'epoch': 3},
    'bare': lambda model: model.state_dict(),
    'timm': in_timm_naming,
    'timm training': lambda model: {'arch': 'x', 'state_dict': in_timm_naming(model), 'epoch': 1},
    'distributed': lambda model: {'model': distributed(model).state_dict()},
    'compiled': lambda model: {'model': torch.compile(model).state_dict()},
    'compiled blocks': lambda model: compiled_blocks(model).state_dict(),
    'distributed, then compiled': lambda model: torch.compile(distributed(model)).state_dict(),
    'compiled, then distributed': lambda model: distributed(torch.compile(model)).state_dict(),
}


def assert_expected_keys(content: dict, *parts: str):
    """Assert that the wrappers have put `parts` into the names."""
    names = [name for value in (content, *content.values()) if isinstance(value, dict) for name in value]
    assert all(any(part in name for name in names) for part in parts)


def write(content: dict, path: Path) -> Path:
    if path.suffix == '.safetensors':
        safetensors.torch.save_file({key: value.clone() for key, value in content.items()}, path)
    else:
        torch.save(content, path)
    return path


@pytest.fixture(scope='module')
def model():
    return seeded_model(NAME, num_classes=CLASSES).eval()


@pytest.fixture(scope='module')
def files(tmp_path_factory) -> dict:
    """A file of each format; bare state dicts as .safetensors too."""
    folder = tmp_path_factory.mktemp('formats')
    paths = {}
    for name, content_of in FORMATS.items():
        with process_group():
            content = content_of(seeded_model(NAME, num_classes=CLASSES))
        paths[name] = write(content, folder / f'{name}.pth')
        if all(isinstance(value, torch.Tensor) for value in content.values()):
            paths[f'{name}, safetensors'] = write(content, folder / f'{name}.safetensors')
    return paths


ALL = [*FORMATS, *(f'{name}, safetensors' for name in FORMATS
                   if name not in ('original', 'namespace', 'timm training', 'distributed', 'compiled'))]


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(seeded_images(2, 3, 48, 32))


def loaded(source, **kwargs) -> torch.nn.Module:
    """Build a fresh model with weights as main.py loads them."""
    model = timm.create_model(NAME, num_classes=CLASSES)
    weights.load(model, weights.read(str(source), '--pretrained', NAME, **kwargs))
    return model


def test_files_have_their_formats(files):
    """Every format exists, and the names contain the wrappers' prefixes."""
    assert set(files) == set(ALL)
    for name, part in (('distributed', 'module.'), ('compiled', '_orig_mod.'), ('compiled blocks', '0._orig_mod.'),
                       ('distributed, then compiled', '_orig_mod.module.'), ('timm', 'attn.q.weight'),
                       ('compiled, then distributed', 'module._orig_mod.'), ('timm', 'pos_embed.')):
        assert_expected_keys(torch.load(files[name]), part)


@pytest.mark.parametrize('name', ALL)
def test_format_is_read(files, model, name):
    """weights.read restores the model's logits bitwise."""
    assert torch.equal(logits(loaded(files[name])), logits(model))


@pytest.mark.parametrize('name', ALL)
def test_format_is_read_by_timm(files, model, name):
    """timm.create_model with the file in its pretrained_cfg restores the logits bitwise."""
    own = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(
        file=str(files[name]), num_classes=CLASSES), num_classes=CLASSES)
    assert torch.equal(logits(own), logits(model))


@pytest.mark.parametrize('name', ALL)
def test_format_is_read_by_create_model(files, model, name):
    """weights.create_model restores the logits bitwise, with the file's number of classes."""
    assert torch.equal(logits(weights.create_model(NAME, files[name])), logits(model))


@pytest.mark.parametrize('name', ['original', 'timm, safetensors', 'compiled, then distributed', 'namespace'])
def test_format_is_evaluated(files, model, name, tmp_path):
    """main.py --eval --pretrained computes the loss of these weights."""
    data = write_folders(tmp_path, classes=('a', 'b', 'c'), per_class=2)
    stats = main.main(tiny(data, '--eval', '--pretrained', str(files[name])))
    dataset, _ = datasets.load(Source('FOLDER', str(data)), is_train=False)
    dataset = dataset.with_transform(ToNormalizedTensor())
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(
            model(torch.stack([image for image, _ in dataset])), torch.tensor([target for _, target in dataset]))
    assert stats['loss'] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize('name', ['xcit_nano_12_p16', 'xcit_tiny_12_p16'])
def test_naming_is_that_of_timms_own_model(name, tmp_path):
    """Weights of timm's class have equal logits in ours."""
    theirs = timm.create_model(f'{name}_224', num_classes=CLASSES)
    theirs.load_state_dict(xcit_zoo.to_timm_names(seeded_model(name, num_classes=CLASSES).state_dict()))
    assert type(theirs).__module__ == 'timm.models.xcit'
    path = write(theirs.state_dict(), tmp_path / 'timm.safetensors')
    torch.testing.assert_close(logits(weights.create_model(name, path)), logits(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(('format_name', 'words'), [
    ('original', "weights under 'model'\n"), ('timm', "weights alone\ntimm's names\n"),
    ('namespace', "weights under 'model', epoch 3\n"),
    ('compiled, then distributed', 'weights alone\nnames without _orig_mod. and module.\n')])
def test_source_is_logged(files, capsys, monkeypatch, format_name, words):
    """One short line has the source and its content, and with --verbose a second line has the details."""
    loaded(files[format_name])
    assert capsys.readouterr().out == f'--pretrained {files[format_name]}: {words.splitlines()[0]}\n'
    monkeypatch.setattr(output.Output, 'verbose', True)
    loaded(files[format_name])
    assert capsys.readouterr().out == f'--pretrained {files[format_name]}: {words}'


# ----- DINO

@pytest.fixture(scope='module')
def dino(tmp_path_factory) -> Path:
    """A checkpoint of a DINO run, whose student differs from its teacher."""
    student, teacher = MultiCrop(timm.create_model(NAME, num_classes=0)), MultiCrop(seeded_model(NAME, num_classes=0))
    with process_group():
        content = {'student': distributed(student).state_dict(), 'teacher': teacher.state_dict(),
                   'optimizer': {'state': {}}, 'epoch': 5, 'args': argparse.Namespace(arch='xcit')}
    assert_expected_keys(content, 'module.backbone.blocks.', 'backbone.blocks.', 'head.mlp.0.weight')
    return write(content, tmp_path_factory.mktemp('dino') / 'checkpoint.pth')


def test_dino_training_gives_the_teachers_backbone(dino):
    """Every entry loads the teacher's backbone, without the projection head."""
    expected = logits(seeded_model(NAME, num_classes=0))
    backbone = timm.create_model(NAME, num_classes=0)
    weights.load(backbone, weights.read(str(dino), '--pretrained', NAME))
    overlay = dict(file=str(dino), num_classes=0)
    by_timm = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0)
    for own in (backbone, by_timm, weights.create_model(NAME, dino)):
        assert torch.equal(logits(own), expected)


def test_wrapped_teacher_is_read(tmp_path):
    """A teacher under DistributedDataParallel is read, as with BatchNorm in the head."""
    with process_group():
        content = {'teacher': distributed(MultiCrop(seeded_model(NAME, num_classes=0))).state_dict()}
    path = write(content, tmp_path / 'wrapped.pth')
    assert torch.equal(logits(weights.create_model(NAME, path)), logits(seeded_model(NAME, num_classes=0)))


def test_dino_backbone_gets_a_fresh_head(dino, tmp_path, capsys):
    """A run starts from the backbone, and logs that there was no head; evaluation refuses."""
    data = write_folders(tmp_path / 'data')
    assert main.main(tiny(data, '--epochs', '1', '--pretrained', str(dino)))['epoch'] == 0
    assert 'the weights have no head: all but the head is loaded' in capsys.readouterr().out
    with pytest.raises(InputError, match='the weights have no head'):
        main.main(tiny(data, '--eval', '--pretrained', str(dino)))


def test_what_is_beside_a_backbone_is_an_error(tmp_path):
    """A file with a detector's neck is refused as weights of a detector."""
    content = {f'backbone.{key}': value for key, value in seeded_model(NAME, num_classes=0).state_dict().items()}
    path = write({'state_dict': {**content, 'neck.conv.weight': torch.zeros(1)}}, tmp_path / 'detector.pth')
    with pytest.raises(InputError, match=r'the weights of a detector or a segmenter \(neck\)'):
        weights.create_model(NAME, path)


# ----- runs of main.py

@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Path:
    """The checkpoint of a run whose EMA differs from its weights."""
    data = write_folders(tmp_path_factory.mktemp('data'), classes=('a', 'b', 'c'), per_class=4)
    run = tmp_path_factory.mktemp('run')
    main.main(tiny(data, '--epochs', '1', '--output-dir', str(run)))
    state = torch.load(run / 'checkpoint.pth', weights_only=True)
    assert not torch.equal(state['model']['head.weight'], state['model_ema']['head.weight'])
    return run / 'checkpoint.pth'


@pytest.mark.parametrize(('entry', 'use_ema'), [('model', False), ('model_ema', True)])
def test_training_checkpoint_is_read(trained, entry, use_ema):
    """The weights are read, and the EMA with use_ema."""
    expected = timm.create_model(NAME, num_classes=CLASSES)
    expected.load_state_dict(torch.load(trained, weights_only=True)[entry])
    assert torch.equal(logits(loaded(trained, use_ema=use_ema)), logits(expected))


def test_timm_loads_the_ema_of_a_run(trained):
    """timm's own loader prefers the EMA of a checkpoint."""
    expected = loaded(trained, use_ema=True)
    overlay = dict(file=str(trained), num_classes=CLASSES)
    own = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=CLASSES)
    assert torch.equal(logits(own), logits(expected))


def test_missing_ema(files):
    """--use-ema on weights without an EMA is refused with the content of the file."""
    with pytest.raises(InputError, match='has no EMA'):
        weights.read(str(files['original']), '--pretrained', use_ema=True)


# ----- unexpected and missing weights

def damage(tensors: dict, kind: str) -> dict:
    tensors = dict(tensors)
    if kind == 'missing keys: blocks.3.mlp.fc1.weight':
        del tensors['blocks.3.mlp.fc1.weight']
    elif kind == 'unexpected keys: blocks.12.gamma1':
        tensors['blocks.12.gamma1'] = torch.ones(128)
    elif kind == 'other shapes: norm.weight (64,), model has (128,)':
        tensors['norm.weight'] = torch.ones(64)
    elif kind == 'unexpected keys: cls_attn_blocks.0.attn.k.weight':
        tensors = xcit_zoo.to_timm_names(tensors)
        del tensors['cls_attn_blocks.0.attn.q.weight']
    return tensors


@pytest.mark.parametrize('kind', [
    'missing keys: blocks.3.mlp.fc1.weight', 'unexpected keys: blocks.12.gamma1',
    'other shapes: norm.weight (64,), model has (128,)', 'unexpected keys: cls_attn_blocks.0.attn.k.weight'])
def test_leftovers_are_listed(model, tmp_path, kind):
    """Every entry refuses weights that do not match, and lists them."""
    path = write({'model': damage(model.state_dict(), kind)}, tmp_path / 'odd.pth')
    for entry in (lambda: loaded(path), lambda: weights.create_model(NAME, path),
                  lambda: weights.create_model(NAME, path, num_classes=7)):
        with pytest.raises(InputError) as caught:
            entry()
        assert kind in str(caught.value)
        assert '\n' not in str(caught.value)


@pytest.mark.parametrize('num_classes', [CLASSES, 7])
def test_leftovers_are_listed_to_timm(model, tmp_path, num_classes):
    """timm's entry lists them too, also for a head of other classes, where timm alone would not."""
    tensors = damage(model.state_dict(), 'missing keys: blocks.3.mlp.fc1.weight')
    path = write(tensors, tmp_path / 'odd.pth')
    overlay = dict(file=str(path), num_classes=CLASSES)
    with pytest.raises(ValueError, match=r'missing keys: blocks\.3\.mlp\.fc1\.weight'):
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes)


def test_another_models_weights_are_refused(tmp_path):
    """Tiny's weights for nano are refused with both names."""
    path = write(timm.create_model('xcit_tiny_24_p16', num_classes=CLASSES).state_dict(), tmp_path / 'tiny.pth')
    message = f'--pretrained {path}: checkpoint is xcit_tiny_24_p16, --model is {NAME}'
    with pytest.raises(InputError, match=f'^{re.escape(message)}$'):
        loaded(path)


@pytest.mark.parametrize('content', [
    {'model': {}}, {}, {'epoch': 3}, {'model': {'a': 1}}, {'model': {0: torch.ones(1)}}, {'model': [1, 2]}])
def test_files_without_weights_are_refused(tmp_path, content):
    """A file without tensors by name is refused as a file without weights."""
    torch.save(content, tmp_path / 'empty.pth')
    with pytest.raises(InputError, match='no weights'):
        weights.read(str(tmp_path / 'empty.pth'), '--pretrained')


def test_head_of_other_classes_is_left_out(files, model):
    """All but the head is loaded; the fresh head has the requested number of classes."""
    own = weights.create_model(NAME, files['timm'], num_classes=7)
    assert own.head.weight.shape == (7, 128)
    assert torch.equal(own.norm.weight, model.norm.weight)


# ---------------------------------------------------------------------------------------------------------------------
# Downloads

@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """torch.hub's folder of checkpoints, empty."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    return tmp_path / 'torch' / 'hub' / 'checkpoints'


@pytest.fixture(scope='module')
def thousand(tmp_path_factory) -> Path:
    """Weights for 1000 classes, as published."""
    folder = tmp_path_factory.mktemp('published')
    return write({'model': seeded_model(NAME).state_dict()}, folder / 'published.pth')


def published_at(url: str, monkeypatch, **changes):
    """Move the first tag of the model to `url`."""
    monkeypatch.setitem(xcit_zoo.ZOO, f'{NAME}.fb_in1k', dataclasses.replace(PUBLISHED, url=url, **changes))


def kept(cache: Path) -> list:
    """Return the files of the cache without the locks."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != '.lock')


def test_tag_is_downloaded_and_kept(cache, thousand, monkeypatch):
    """A tag is downloaded from the authors' URL once, and read from the cache the second time."""
    with serve({'nano.pth': thousand}) as server:
        published_at(f'{server.url}/nano.pth', monkeypatch)
        for _ in range(2):
            own = weights.create_model(NAME, 'fb_in1k')
        assert downloads(server) == ['/nano.pth']
    assert kept(cache) == ['nano.pth']
    assert torch.equal(logits(own), logits(seeded_model(NAME)))


def test_tag_is_found_in_torch_hubs_cache(cache, thousand):
    """A file under the published name is read without a network."""
    cache.mkdir(parents=True)
    (cache / 'xcit_nano_12_p16_224.pth').write_bytes(thousand.read_bytes())
    assert torch.equal(logits(weights.create_model(NAME, True)), logits(seeded_model(NAME)))


def test_interrupted_download_starts_anew(cache, thousand, monkeypatch):
    """A download that is cut is an error and leaves nothing; the second one succeeds."""
    with serve({'nano.pth': thousand}, cut=1) as server:
        url = f'{server.url}/nano.pth'
        with pytest.raises(checkpoints.DownloadError, match=r'nano\.pth: the downloaded file: damaged, truncated'):
            weights.read(url, '--pretrained', NAME)
        assert kept(cache) == []
        assert weights.read(url, '--pretrained', NAME).tensors
        assert kept(cache) == ['nano.pth']


def test_interrupted_safetensors_starts_anew(cache, files):
    """A .safetensors file that is cut is an error and leaves nothing; the second download succeeds."""
    with serve({'x.safetensors': files['bare, safetensors']}, cut=1) as server:
        with pytest.raises(checkpoints.DownloadError, match='damaged, truncated'):
            weights.read(f'{server.url}/x.safetensors', '--pretrained')
        assert kept(cache) == []
        assert weights.read(f'{server.url}/x.safetensors', '--pretrained').tensors


def test_leftovers_of_a_killed_download_go(cache, thousand):
    """A download removes half-written files of killed processes, and no other files."""
    cache.mkdir(parents=True)
    for name in ('new-nano.pth.0123.partial', 'other.pth'):
        (cache / name).write_bytes(b'half')
    with serve({'nano.pth': thousand}) as server:
        weights.read(f'{server.url}/nano.pth', '--pretrained')
    assert kept(cache) == ['nano.pth', 'other.pth']


@pytest.mark.parametrize('right', [True, False])
def test_hash_in_the_name_is_checked(cache, thousand, right):
    """HASH in name-HASH.pth must be the first digits of the file's SHA-256."""
    digest = hashlib.sha256(thousand.read_bytes()).hexdigest()[:8] if right else '00000000'
    with serve({f'nano-{digest}.pth': thousand}) as server:
        url = f'{server.url}/nano-{digest}.pth'
        if right:
            assert weights.read(url, '--pretrained').tensors
        else:
            with pytest.raises(checkpoints.DownloadError, match='invalid hash value'):
                weights.read(url, '--pretrained')
    assert kept(cache) == [f'nano-{digest}.pth'] * right


def test_missing_file_is_an_error(cache):
    """A missing file is an error with the URL."""
    with serve({}) as server, pytest.raises(checkpoints.DownloadError, match=r'gone\.pth: can\'t be .*404'):
        weights.read(f'{server.url}/gone.pth', '--pretrained')
    assert kept(cache) == []


def test_without_a_server_the_error_says_where_the_file_goes(cache, thousand, monkeypatch):
    """A file at the path in the message is read."""
    url = f'http://127.0.0.1:{free_port()}/nano.pth'
    published_at(url, monkeypatch, hf_hub_id=None)
    with pytest.raises(checkpoints.DownloadError) as caught:
        weights.read('fb_in1k', '--pretrained', NAME)
    path = Path(str(caught.value).rsplit(' put the file at ', 1)[1])
    assert path == cache / 'nano.pth'
    path.write_bytes(thousand.read_bytes())
    assert weights.read('fb_in1k', '--pretrained', NAME).tensors


@pytest.mark.parametrize('url', ['http://127.0.0.1:port/x.pth', 'http://[::/x.pth', 'http:///x.pth'])
def test_malformed_url_is_an_error(cache, url):
    """A malformed URL is refused in one line."""
    with pytest.raises(InputError):
        weights.read(url, '--pretrained')


def test_damaged_file_in_the_cache_is_downloaded_anew(cache, thousand, capsys):
    """Checksums find flipped bytes, and a message is printed."""
    cache.mkdir(parents=True)
    content = bytearray(thousand.read_bytes())
    content[len(content) // 2] ^= 255
    (cache / 'nano.pth').write_bytes(content)
    with serve({'nano.pth': thousand}) as server:
        assert weights.read(f'{server.url}/nano.pth', '--pretrained').tensors
        assert downloads(server) == ['/nano.pth']
    assert 'downloading the file again' in capsys.readouterr().err
    assert (cache / 'nano.pth').read_bytes() == thousand.read_bytes()


def test_same_name_at_another_url_is_another_file(cache, thousand, files):
    """Two URLs of files named model.pth give their own weights."""
    with serve({'a/model.pth': thousand, 'b/model.pth': files['original']}) as server:
        sizes = [len(weights.read(f'{server.url}/{folder}/model.pth', '--pretrained').tensors['head.bias'])
                 for folder in 'abba']
    assert sizes == [1000, CLASSES, CLASSES, 1000]


def test_file_put_into_the_cache_by_hand_is_read(cache, thousand, files):
    """A file of a user is read, whatever was downloaded under its name before."""
    with serve({'a/model.pth': thousand}) as server:
        weights.read(f'{server.url}/a/model.pth', '--pretrained')
    os.replace(write(torch.load(files['original']), cache / 'mine'), cache / 'model.pth')
    tensors = weights.read(f'http://127.0.0.1:{free_port()}/model.pth', '--pretrained').tensors
    assert len(tensors['head.bias']) == CLASSES


def test_cache_that_cannot_be_written_is_read(cache, thousand):
    """A cache without write access is read; a new download is refused."""
    for name in ('nano.pth', 'other.pth'):
        (cache / f'{name}.lock').mkdir(parents=True)  # as if it could not be opened
    (cache / 'nano.pth').write_bytes(thousand.read_bytes())
    assert weights.read('http://127.0.0.1:9/nano.pth', '--pretrained').tensors
    with pytest.raises(InputError, match="checkpoints can't be written to"):
        weights.read('http://127.0.0.1:9/other.pth', '--pretrained')


def test_two_processes_download_once(cache, thousand):
    """The second process waits for the first one, and reads its file."""
    script = 'import sys, weights; print(len(weights.read(sys.argv[1], "--pretrained").tensors))'
    with serve({'nano.pth': thousand}) as server:
        command = ['-c', script, f'{server.url}/nano.pth']
        results = finish([*start(command, 1), *start(command, 1)])
        assert downloads(server) == ['/nano.pth']
    assert results == [(0, f'{len(torch.load(thousand)["model"])}\n', '')] * 2


# ----- the Hugging Face hub, in a process of its own because its library reads the address on import

READER = '''
import dataclasses, json, sys
import weights, xcit_zoo
from utils import InputError
for line in sys.stdin:
    name, url, source = json.loads(line)
    xcit_zoo.ZOO[name + '.fb_in1k'] = dataclasses.replace(xcit_zoo.ZOO[name + '.fb_in1k'], url=url)
    try:
        given = weights.read(source, '--pretrained', name)
        answer = [given.description, given.tensors['head.bias'].double().sum().item()]
    except InputError as error:
        answer = str(error)
    print(json.dumps(answer), flush=True)
'''
NOWHERE = 'http://127.0.0.1:9/nano.pth'
HUB_FILE = f'{PUBLISHED.hf_hub_id}/resolve/main/model.safetensors'


class Reader:
    """Process that reads weights, with a hub at `port` and caches in `folder`."""

    def __init__(self, folder: Path):
        self.port, self.folder = free_port(), folder
        env = {**os.environ, 'HF_ENDPOINT': f'http://127.0.0.1:{self.port}', 'HF_HOME': str(folder / 'hf'),
               'HF_HUB_OFFLINE': '0', 'HF_HUB_DISABLE_XET': '1', 'TORCH_HOME': str(folder / 'torch'),
               'PYTHONPATH': str(ROOT)}
        self.process = subprocess.Popen([sys.executable, '-c', READER], env=env, cwd=folder, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def read(self, source: str = 'fb_in1k', *, url: str = NOWHERE):
        """Return [description, sum of a tensor], or the error, of `source` with the authors' file at `url`."""
        self.process.stdin.write(json.dumps([NAME, url, source]) + '\n')
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def damage_cache(self):
        blob = next((self.folder / 'hf').rglob('model.safetensors')).resolve()
        blob.write_bytes(blob.read_bytes()[:1000])


@pytest.fixture(scope='module')
def reader_process(tmp_path_factory):
    reader = Reader(tmp_path_factory.mktemp('reader'))
    yield reader
    reader.process.communicate(timeout=60)  # closes its input


@pytest.fixture
def reader(reader_process) -> Reader:
    """The process with empty caches."""
    for folder in ('hf', 'torch'):
        shutil.rmtree(reader_process.folder / folder, ignore_errors=True)
    return reader_process


@pytest.fixture(scope='module')
def hub_file(tmp_path_factory) -> Path:
    """timm's copy of the published weights."""
    path = tmp_path_factory.mktemp('hub') / 'model.safetensors'
    return write(xcit_zoo.to_timm_names(seeded_model(NAME).state_dict()), path)


@pytest.fixture(scope='module')
def expected() -> list:
    return ["weights alone", seeded_model(NAME).head.bias.double().sum().item()]


def test_tag_comes_from_the_hub_when_the_url_fails(reader, hub_file, expected):
    """A tag is read from the hub, and the next time from the hub's cache without a network."""
    with serve({HUB_FILE: hub_file}, port=reader.port) as server:
        assert reader.read() == expected
        assert downloads(server) == [f'/{HUB_FILE}']
    assert reader.read() == expected


def test_damaged_file_in_the_hubs_cache_is_replaced_by_the_hub(reader, hub_file, expected):
    """A damaged file is downloaded from the hub again if the authors' URL fails."""
    with serve({HUB_FILE: hub_file}, port=reader.port) as server:
        reader.read()
        reader.damage_cache()
        assert reader.read() == expected
        assert downloads(server) == [f'/{HUB_FILE}'] * 2


def test_damaged_file_in_the_hubs_cache_is_replaced_by_the_authors(reader, hub_file, thousand, expected):
    """A damaged file is downloaded from the authors if the hub can't be reached."""
    with serve({HUB_FILE: hub_file}, port=reader.port):
        reader.read()
    reader.damage_cache()
    with serve({'nano.pth': thousand}) as server:
        assert reader.read(url=f'{server.url}/nano.pth') == ["weights under 'model'", expected[1]]


def test_hub_name_is_read(reader, hub_file, expected):
    """hf-hub:OWNER/NAME is read from the hub."""
    with serve({HUB_FILE: hub_file}, port=reader.port):
        assert reader.read(f'hf-hub:{PUBLISHED.hf_hub_id}') == expected


def test_missing_hub_name(reader):
    """A missing name is refused in one line."""
    with serve({}, port=reader.port):
        error = reader.read('hf-hub:no/such')
    assert error.startswith("--pretrained hf-hub:no/such: can't be read from the Hugging Face hub")
    assert '\n' not in error


def test_neither_home_can_be_reached(reader):
    """Without a network, the error has the authors' file and its place in the cache, within seconds."""
    start = time.monotonic()
    error = reader.read()
    assert NOWHERE in error
    assert error.endswith(f'put the file at {reader.folder}/torch/hub/checkpoints/nano.pth')
    assert time.monotonic() - start < 10


class Payload:
    """Object whose unpickling creates a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_python_code_on_the_hub_is_not_executed(reader, tmp_path):
    """A repository with only a pickle of other objects is refused."""
    torch.save({'model': Payload(tmp_path / 'executed')}, tmp_path / 'pytorch_model.bin')
    with serve({'evil/model/resolve/main/pytorch_model.bin': tmp_path / 'pytorch_model.bin'}, port=reader.port):
        error = reader.read('hf-hub:evil/model')
    assert "can't be read" in error
    assert not (tmp_path / 'executed').exists()


# ----- names and models

def test_full_name_is_a_tag(tmp_path, monkeypatch):
    """MODEL.TAG is the file of TAG with this model, and with no other model."""
    assert weights.published('', PUBLISHED.model + '.fb_in1k') is weights.published(PUBLISHED.model, 'fb_in1k')
    assert weights.published('xcit_large_24_p8', PUBLISHED.model + '.fb_in1k') is None
    with pytest.raises(InputError, match=r"needs its model's name in front: xcit_nano_12_p16\.fb_in1k"):
        weights.check_exists('fb_in1k', '--pretrained', '')


def test_address_of_a_file_is_read_anew(tmp_path):
    """file:// is not cached: the current content is read."""
    for value in (1., 2.):
        torch.save({'weight': torch.full((2,), value)}, tmp_path / 'w.pth')
        given = weights.read(f'file://{tmp_path}/w.pth', '--pretrained')
        assert given.tensors['weight'].tolist() == [value, value]


def test_timms_own_model(tmp_path, folders):
    """A run of timm's XCiT, whose weights have other names, can be evaluated, resumed and be a teacher."""
    flags = tiny(folders, '--model', 'xcit_nano_12_p16_224', '--epochs', '1', '--output-dir', str(tmp_path))
    main.main(flags)
    best = str(tmp_path / 'best_model.pth')
    assert main.main([*flags, '--eval', '--resume', best])['images'] == 8
    main.main([*flags, '--epochs', '2', '--resume', 'auto'])
    assert torch.load(tmp_path / 'checkpoint.pth', weights_only=True)['epoch'] == 1
    stats = main.main(tiny(folders, '--epochs', '1', '--distillation-type', 'hard', '--teacher-model',
                      'xcit_nano_12_p16_224', '--teacher-path', best))
    assert stats['train_loss'] > 0


def test_checkpoint_of_timms_program(tmp_path, folders):
    """The model's name in a checkpoint of timm's train.py is used, its unset size is not."""
    from tools.predict import main as predict
    model = seeded_model('xcit_nano_12_p16', num_classes=2)
    args = argparse.Namespace(model='xcit_nano_12_p16_224', input_size=None, img_size=None)
    content = {'state_dict': xcit_zoo.to_timm_names(model.state_dict()), 'args': args, 'epoch': 3}
    torch.save(content, tmp_path / 'timm.pth')
    results = predict([str(folders / 'val'), '--pretrained', str(tmp_path / 'timm.pth'), '--num-workers', '0',
                       '--device', 'cpu'])
    assert len(results) == 8
