"""Checkpoints that other programs wrote: what stands around the weights, and files that are something else."""
import argparse
import collections
import datetime
import decimal
import io
import json
import pathlib
import pickle
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import seeded_images, seeded_model, tiny, write_folders

import weights
from main import main
from run import checkpoints, harmless
from run.descriptions import names_of, side_of, trained_with
from tools import common, convert_checkpoint, export, extract_features, predict
from utils import InputError

NAME, CLASSES = 'xcit_nano_12_p16', 2


@pytest.fixture(scope='module')
def model():
    return seeded_model(NAME, num_classes=CLASSES).eval()


@pytest.fixture(scope='module')
def state(model) -> dict:
    return model.state_dict()


def saved(content, folder: Path, name: str = 'w.pth', **options) -> str:
    torch.save(content, folder / name, **options)
    return str(folder / name)


@torch.no_grad()
def logits(network) -> torch.Tensor:
    return network.eval()(seeded_images(1, 3, 48, 32))


# ----- what stands beside the weights

BESIDE = {
    'NumPy scalar': np.float64(1.5), 'NumPy integer': np.int64(3), 'NumPy bool': np.bool_(True), 'array': np.arange(6.),
    'array of texts': np.array(['a', 'bc']), 'structured': np.zeros(2, [('a', 'i4'), ('b', 'f8')]),
    'random state': np.random.RandomState(0).get_state(), 'path': pathlib.Path('/a/b'),
    'path of Windows': pathlib.PureWindowsPath('c:/a'), 'time': datetime.datetime(2021, 6, 17, 12, 0, 0, 5),
    'time with zone': datetime.datetime(2021, 6, 17, tzinfo=datetime.timezone.utc), 'date': datetime.date(2021, 6, 17),
    'duration': datetime.timedelta(hours=1), 'defaultdict': collections.defaultdict(list, {'a': [1]}),
    'defaultdict of dicts': collections.defaultdict(dict, {1: {}}), 'deque': collections.deque([1, 2], maxlen=3),
    'Counter': collections.Counter('aab'), 'OrderedDict': collections.OrderedDict(a=1),
    'Namespace': argparse.Namespace(output_dir=pathlib.Path('x')), 'SimpleNamespace': types.SimpleNamespace(a=1),
    'frozenset': frozenset([1]), 'set': {1}, 'complex': 1j, 'Decimal': decimal.Decimal('1.5'),
    'version': torch.__version__, 'dtype': torch.float16, 'size': torch.Size([1, 2]), 'device': torch.device('cpu')}


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'older format'])
@pytest.mark.parametrize('kind', BESIDE)
def test_harmless_types_are_read(tmp_path, kind, zipped):
    """As they were, or what comes nearest to them."""
    path = saved({'model': {'w': torch.ones(1)}, 'args': {'x': BESIDE[kind]}}, tmp_path,
                 _use_new_zipfile_serialization=zipped)
    value = checkpoints.load_checkpoint(path, '--pretrained')['args']['x']
    expected = {'deque': [1, 2]}.get(kind, BESIDE[kind])
    assert str(value) == str(expected) if kind not in ('defaultdict', 'defaultdict of dicts') else value == expected


@pytest.mark.parametrize(('old', 'new'), [(b'numpy._core', b'numpy.core'), (b'numpy.core', b'numpy._core')])
def test_numpy_of_either_age(tmp_path, old, new):
    """NumPy 1 and 2 call the same module otherwise; so does Python 3.13 with that of paths."""
    path = Path(saved({'best': np.float64(76.), 'mean': np.ones(3)}, tmp_path, pickle_protocol=2))
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w') as archive:
        for name, content in entries.items():
            archive.writestr(name, content.replace(old, new) if name.endswith('data.pkl') else content)
    content = checkpoints.load_checkpoint(str(path), '--pretrained')
    assert content['best'] == 76
    assert content['mean'].tolist() == [1, 1, 1]
    paths = {f'{module}.{kind}' for module in ('pathlib', 'pathlib._local') for kind in ('PosixPath', 'WindowsPath')}
    assert paths <= {name for _, name in harmless.safe_globals()}


class Config:
    """Somebody's own class."""


class Evil:
    def __reduce__(self):
        return print, ('executed',)


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize(('thing', 'word'), [(Config(), 'test_foreign_checkpoints.Config'),
                                             (Evil(), '(builtins.)?print')],
                         ids=['class', 'function'])
def test_refused_type_is_named(tmp_path, capsys, thing, word, zipped):
    """In one line with the remedy, and nothing is executed."""
    path = saved({'model': {'w': torch.ones(1)}, 'x': thing}, tmp_path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=rf'holds a Python object of type {word}, .*save the weights alone') as caught:
        checkpoints.load_checkpoint(path, '--pretrained')
    assert '\n' not in str(caught.value)
    assert 'executed' not in capsys.readouterr().out


# ----- where the weights are

def behind(prefix: str, state: dict) -> dict:
    return {f'{prefix}{key}': value for key, value in state.items()}


def in_timm_naming(state: dict) -> dict:
    return weights.xcit_zoo.to_timm_names(state)


def pruned(state: dict) -> dict:
    key = 'blocks.0.mlp.fc1.weight'
    rest = {name: value for name, value in state.items() if name != key}
    return {**rest, f'{key}_orig': state[key], f'{key}_mask': torch.ones_like(state[key])}


METRICS = {'val_acc.total': torch.zeros(1), 'loss_fn.weight': torch.ones(5)}
AROUND = {
    'Lightning': lambda s: {'state_dict': {**behind('model.', s), **METRICS}, 'epoch': 3, 'callbacks': {'a': {}}},
    'Lightning net': lambda s: {'state_dict': behind('net.', s)},
    'Lightning, compiled': lambda s: {'state_dict': behind('model._orig_mod.', s)},
    'average of SWA': lambda s: {**behind('module.', s), 'n_averaged': torch.tensor(7)},
    'two wrappers': lambda s: {'model': behind('module.module.', s)},
    'Hugging Face': lambda s: behind('timm_model.', in_timm_naming(s)),
    'DeepSpeed': lambda s: {'module': s, 'optimizer': {'state': {0: {'exp': torch.ones(1)}}}},
    'model_state_dict': lambda s: {'model_state_dict': s, 'optimizer_state_dict': {'state': {}}},
    'model_state': lambda s: {'model_state': s, 'epoch': 1},
    'net': lambda s: {'net': s, 'acc': 99.},
    'average alone': lambda s: {'state_dict_ema': s},
    'weights and average': lambda s: {'state_dict': s, 'state_dict_ema': {k: v * 0 for k, v in s.items()}},
    'weights and average of SWA': lambda s: {'a': s, 'b': {**behind('module.', {k: v * 0 for k, v in s.items()}),
                                                         'n_averaged': torch.tensor(7)}},
    'nested': lambda s: {'run': {'best': {'weights': behind('encoder.', s)}}},
    'pruned': lambda s: {'model': pruned(s)},
    'mmpretrain': lambda s: {'meta': {}, 'state_dict': {
        **behind('backbone.', {k: v for k, v in s.items() if not k.startswith('head.')}),
        'head.fc.weight': s['head.weight'], 'head.fc.bias': s['head.bias']}},
    'the same twice': lambda s: {'model': s, 'state_dict': {k: v.clone() for k, v in s.items()}},
    'metrics beside': lambda s: {**s, **METRICS},
    'in a list': lambda s: {'models': [s]},
    'arrays': lambda s: {'model': {key: value.numpy() for key, value in s.items()}},
    'backbone and classifier': lambda s: {**behind('net.encoder.', {k: v for k, v in s.items() if 'head' not in k}),
                                          'net.classifier.weight': s['head.weight'],
                                          'net.classifier.bias': s['head.bias']},
    'moments by names': lambda s: {'model': s, 'optimizer': {'exp_avg': {k: 0 * v for k, v in s.items()}}},
    'inside another name': lambda s: {'algorithm': behind('student.encoder.', s)},
}


@pytest.mark.parametrize('kind', AROUND)
def test_weights_are_found(tmp_path, model, state, kind):
    """Wherever they are and whatever stands before their names, by main.py, the tools and timm's own loader."""
    path = saved(AROUND[kind](state), tmp_path)
    fresh = timm.create_model(NAME, num_classes=CLASSES)
    weights.load(fresh, weights.read(path, '--pretrained', NAME))
    assert torch.equal(logits(fresh), logits(model))
    assert torch.equal(logits(weights.create_model(NAME, path)), logits(model))
    assert convert_checkpoint.model_of(weights.read(path, 'IN')) == NAME


def test_says_what_was_taken_and_left(tmp_path, state):
    """Entry, prefix, and how many tensors are not the model's."""
    given = weights.read(saved(AROUND['Lightning'](state), tmp_path), '--pretrained', NAME)
    assert given.description == ("'state_dict', names without model., 2 other tensors are left (val_acc.total, "
                                 'loss_fn.weight), of epoch 3')


TWO = {
    'two entries': (lambda s, t: {'model': s, 'net': t}, ('model', 'net')),
    'two prefixes': (lambda s, t: {'state_dict': {**behind('student.', s), **behind('teacher.', t)}},
                     ('state_dict.student', 'state_dict.teacher')),
    'prefix and none': (lambda s, t: {**s, **behind('teacher.', t)}, ('the file itself', 'teacher')),
}


@pytest.mark.parametrize('kind', TWO)
def test_two_sets_of_weights(tmp_path, state, kind):
    """Both are named, and --checkpoint-key chooses."""
    make, labels = TWO[kind]
    other = {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}
    path = saved(make(state, other), tmp_path)
    with pytest.raises(InputError, match=f'holds 2 sets of weights that differ: {", ".join(labels)}; choose one of them'
                                         f' by --checkpoint-key'):
        weights.read(path, '--pretrained', NAME)
    chosen = weights.read(path, '--pretrained', NAME, key=labels[1])
    assert torch.equal(chosen.tensors['norm.weight'], other['norm.weight'])
    with pytest.raises(InputError, match=rf'no weights under nothing \(--checkpoint-key\); it has: {labels[0]}'):
        weights.read(path, '--pretrained', NAME, key='nothing')


def test_students_of_dino_can_be_chosen(tmp_path, state):
    """The teacher is what is taken; the key says otherwise, to the programs too."""
    other = {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}
    path = saved({'student': behind('module.backbone.', other), 'teacher': behind('backbone.', state)}, tmp_path)
    assert torch.equal(weights.read(path, '', NAME).tensors['norm.weight'], state['norm.weight'])
    convert_checkpoint.main([path, str(tmp_path / 'o.pth'), '--to', 'original', '--checkpoint-key', 'student'])
    converted = torch.load(tmp_path / 'o.pth', weights_only=True)['model']
    assert torch.equal(converted['norm.weight'], other['norm.weight'])


def test_checkpoint_key_without_weights():
    """It has nothing to choose from."""
    with pytest.raises(InputError, match='--checkpoint-key: needs weights'):
        main(['--data-set', 'SAMPLE', '--device', 'cpu', '--checkpoint-key', 'x'])


def test_head_of_another_width(tmp_path, state):
    """Both shapes, not the same number of classes twice."""
    path = saved({**state, 'head.weight': torch.zeros(2, 192)}, tmp_path)
    fresh = timm.create_model(NAME, num_classes=2)
    with pytest.raises(InputError, match=r'head\.weight \(2, 192\), model has \(2, 128\)'):
        weights.load(fresh, weights.read(path, '--pretrained', NAME))


# ----- what files say of their model

@pytest.mark.parametrize('args', [None, [], [1, 2], 'text', 3, {}, {1: 2}, argparse.Namespace(model=None),
                                  types.SimpleNamespace(model=7, input_size='big'),
                                  {'model': ['x'], 'input_size': None}], ids=str)
def test_flags_of_any_kind(tmp_path, state, args):
    """They are used where they make sense, and never in the way."""
    path = saved({'model': state, 'args': args}, tmp_path)
    loaded = common.load_model(predict.get_args_parser().parse_args(
        ['x.png', '--pretrained', path, '--model', NAME, '--device', 'cpu']))
    assert loaded.input_size == 224
    data = write_folders(tmp_path / 'data')
    assert main(tiny(data, '--eval', '--resume', path))['images'] == 8


@pytest.mark.parametrize(('size', 'side'), [
    (48, 48), ((3, 48, 48), 48), ([48, 48], 48), ('48', 48), ((48,), 48), ((3, 48, 64), None), (None, None), ({}, None),
    ('big', None), ((), None), (-1, None), (0, None), (48., 48), ('3, 48, 48', 48), (np.array([48, 48]), 48)], ids=str)
def test_input_size_of_any_kind(size, side):
    """A side is what two equal numbers say, or one."""
    assert side_of(size) == side


@pytest.mark.parametrize(('classes', 'names'), [
    (['cat', 'dog'], ['cat', 'dog']), (('cat', 'dog'), ['cat', 'dog']), ({0: 'cat', 1: 'dog'}, ['cat', 'dog']),
    ({'1': 'dog', '0': 'cat'}, ['cat', 'dog']), ({'dog': 1, 'cat': 0}, ['cat', 'dog']), (2, None), (None, None),
    ('cat', None), ({}, None), ([], None), ({1: 'dog'}, ['class 0', 'dog']), ([7, 8], ['7', '8']),
    (['cat'], ['cat', 'class 1']), ('cat,dog', ['cat', 'dog']), ('["cat", "dog"]', ['cat', 'dog']),
    (np.array(['cat', 'dog']), ['cat', 'dog']), (['a', 'b', 'c'], None)], ids=str)
def test_classes_of_any_kind(classes, names):
    """Names by index, however they are held."""
    assert names_of(classes, 2) == names


@pytest.mark.parametrize('args', [
    ['main.py', '--model', NAME, '--input-size=48', '--full-crop'], f'--model {NAME} --input_size 48 --full_crop',
    {'model': NAME, 'input_size': 48, 'full_crop': True}, f"Namespace(model='{NAME}', input_size=48, full_crop=True)",
    collections.UserDict(model=NAME, input_size=48, full_crop=True),
    json.dumps({'model': NAME, 'input_size': 48, 'full_crop': True})], ids=str)
def test_flags_are_found(args):
    """In dicts and namespaces, and in command lines as words or text."""
    found = trained_with({'args': args})
    assert (found['model'], found['input_size'], found['full_crop']) == (NAME, 48, True)


@pytest.mark.parametrize('classes', [['cat', 'dog', 'emu'], 2, {0: 'cat', 1: 'dog'}, ['a', 'b', 'c']], ids=str)
def test_tools_with_classes_of_any_kind(tmp_path, state, classes, capsys):
    """Names that do not fit are left, with a notice."""
    path = saved({'model': state, 'args': {'model': NAME, 'input_size': (3, 48, 48)}, 'classes': classes}, tmp_path)
    loaded = common.load_model(predict.get_args_parser().parse_args(['x.png', '--pretrained', path, '--device', 'cpu']))
    assert loaded.input_size == 48
    assert loaded.classes == (['cat', 'dog'] if isinstance(classes, dict) else None)
    assert ('names of classes are left' in capsys.readouterr().out) is not isinstance(classes, dict)


# ----- files that are something else

def zipped(names: dict) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive:
        for name, content in names.items():
            archive.writestr(name, content)
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode='w') as archive:
        archive.addfile(tarfile.TarInfo('a.pth'))
    return file.getvalue()


ELSE = {
    'a Git-LFS pointer': b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n',
    'a web page': b'\n<!DOCTYPE html>\n<html><head><title>404</title></head></html>',
    'a zip archive of other files (model/w.pth); unpack it': zipped({'model/w.pth': b'', 'README.md': b''}),
    'an office document': zipped({'[Content_Types].xml': b'', 'word/document.xml': b''}),
    'a NumPy archive (a.npy)': zipped({'a.npy': b''}),
    'a TorchScript program': zipped({'m/data.pkl': b'', 'm/constants.pkl': b'', 'm/code/x.py': b''}),
    'a gzip archive': b'\x1f\x8b\x08\x00',
    'a tar archive': tarred(),
    'an ONNX model': b'\x08\x0a\x12\x07pytorch\x1a\x052.9.0:\x10',
    'an HDF5 file': b'\x89HDF\r\n\x1a\n',
    'an index of weights in several files (a-00001-of-2.bin)': json.dumps(
        {'metadata': {}, 'weight_map': {'norm.weight': 'a-00001-of-2.bin'}}).encode(),
    'a JSON file': b'{"batch_size": 12345678}',
    'a text file': b'these are my notes on weights\n',
    'a picture': b'\x89PNG\r\n\x1a\n',
    'empty': b'',
}


@pytest.mark.parametrize('name', ['w.pth', 'w.safetensors', 'w.bin'])
@pytest.mark.parametrize('kind', ELSE)
def test_other_files_are_named(tmp_path, kind, name):
    """Whatever their suffix says."""
    (tmp_path / name).write_bytes(ELSE[kind])
    with pytest.raises(InputError) as caught:
        checkpoints.load_checkpoint(str(tmp_path / name), '--pretrained')
    assert f'{name}: is {kind}' in str(caught.value)
    assert '\n' not in str(caught.value)


def test_folder_is_named(tmp_path):
    """It is no file."""
    with pytest.raises(InputError, match='a directory, not a checkpoint file'):
        checkpoints.load_checkpoint(str(tmp_path), '--pretrained')


def test_wrong_suffixes_are_read(tmp_path, state):
    """Files are known by their content."""
    safetensors.torch.save_file({key: value.clone() for key, value in state.items()}, tmp_path / 'a.pth')
    torch.save(state, tmp_path / 'b.safetensors')
    for name in ('a.pth', 'b.safetensors'):
        assert checkpoints.load_checkpoint(str(tmp_path / name), '').keys() == state.keys()


@pytest.mark.parametrize('zipped', [True, False])
def test_whole_model_is_named(tmp_path, model, zipped):
    """A pickled module: its class, and how to save the weights."""
    path = saved(model, tmp_path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r'holds a Python object of type xcit\.Xcit|is a whole pickled model'):
        checkpoints.load_checkpoint(path, '--pretrained')
    path = saved(torch.nn.Sequential(torch.nn.Linear(1, 1)), tmp_path)
    with pytest.raises(InputError, match=r'is a whole pickled model \(torch\.nn\.modules\..*save its weights'):
        checkpoints.load_checkpoint(path, '--pretrained')
    with open(tmp_path / 'p.pkl', 'wb') as file:
        pickle.dump(Config(), file)
    with pytest.raises(InputError, match='damaged, truncated or not a checkpoint'):
        checkpoints.load_checkpoint(str(tmp_path / 'p.pkl'), '--pretrained')


@pytest.mark.parametrize('part', ['neck.conv', 'rpn_head.rpn_conv', 'roi_head.bbox_head.fc', 'decode_head.conv_seg',
                                  'auxiliary_head.conv', 'backbone.fpn1.0'])
def test_detectors_and_segmenters_are_named(tmp_path, state, part):
    """By every program, instead of words on missing class attention."""
    backbone = behind('backbone.', {k: v for k, v in state.items() if not k.startswith(('cls', 'head'))})
    path = saved({'state_dict': {**backbone, f'{part}.weight': torch.zeros(1)}, 'meta': {}}, tmp_path)
    picture = write_folders(tmp_path / 'data') / 'val' / 'cat' / '0.png'
    message = r'the weights of a detector or a segmenter \('
    for call in (lambda: main(tiny(tmp_path / 'data', '--pretrained', path)),
                 lambda: predict.main([str(picture), '--pretrained', path, '--model', NAME, '--device', 'cpu']),
                 lambda: extract_features.main([str(picture), '--pretrained', path, '--device', 'cpu', '--output',
                                                str(tmp_path / 'f.npz')]),
                 lambda: export.main(['--format', 'onnx', '--pretrained', path, '--output', str(tmp_path / 'm.onnx')]),
                 lambda: convert_checkpoint.main([path, str(tmp_path / 'o.pth'), '--to', 'timm'])):
        with pytest.raises(InputError, match=message):
            call()


# ----- what conversion keeps

@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('trained')
    main(tiny(write_folders(folder / 'data'), '--epochs', '1', '--full-crop', '--output-dir', str(folder / 'run')))
    return folder / 'run' / 'best_model.pth'


@pytest.mark.parametrize('naming', ['original', 'timm'])
def test_safetensors_say_what_they_are_of(tmp_path, trained, naming):
    """Model, classes, size and crop: every tool knows them from the file alone, and main.py goes on from it."""
    path = tmp_path / 'w.safetensors'
    convert_checkpoint.main([str(trained), str(path), '--to', naming])
    loaded, expected = (common.load_model(predict.get_args_parser().parse_args(
        ['x.png', '--pretrained', str(file), '--device', 'cpu'])) for file in (path, trained))
    assert (loaded.name, loaded.classes, loaded.input_size, loaded.full_crop) == (
        expected.name, expected.classes, expected.input_size, expected.full_crop) == (NAME, ['cat', 'dog'], 32, True)
    assert torch.equal(logits(loaded.model), logits(expected.model))
    data = trained.parent.parent / 'data'
    assert main(tiny(data, '--eval', '--pretrained', str(path)))['images'] == 8


def test_timm_opens_the_folder(tmp_path, trained):
    """As its own model, with the names of the classes and the images that it was trained with."""
    convert_checkpoint.main([str(trained), str(tmp_path / 'model.safetensors'), '--to', 'timm'])
    theirs = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert type(theirs).__module__ == 'timm.models.xcit'
    assert theirs.pretrained_cfg['label_names'] == ['cat', 'dog']
    data = timm.data.resolve_model_data_config(theirs)
    assert (*data['input_size'], data['crop_pct'], data['interpolation']) == (3, 32, 32, 1., 'bicubic')
    own = timm.create_model(NAME, num_classes=2)
    weights.load(own, weights.read(str(trained), '', NAME))
    torch.testing.assert_close(logits(theirs), logits(own), rtol=1e-4, atol=1e-5)


def test_config_of_something_else_stays(tmp_path, trained):
    """A config.json that is not timm's is not replaced."""
    (tmp_path / 'config.json').write_text('{"mine": 1}')
    with pytest.raises(InputError, match=r"config\.json is there, and is not timm's"):
        convert_checkpoint.main([str(trained), str(tmp_path / 'model.safetensors'), '--to', 'timm'])
    assert [file.name for file in tmp_path.iterdir()] == ['config.json']
