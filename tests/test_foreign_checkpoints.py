"""Checkpoints of other programs: types and names around the weights, and files that are not checkpoints."""
import argparse
import collections
import datetime
import decimal
import io
import pathlib
import pickle
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
from inference import loaded
from main import main
from run import checkpoints, harmless
from run.descriptions import names_of, side_of, trained_with
from tools import convert_checkpoint, export, extract_features, predict
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


def load(path, **options) -> loaded.LoadedModel:
    return loaded.load(str(path), device=torch.device('cpu'), **options)


@torch.no_grad()
def logits(network) -> torch.Tensor:
    return network.eval()(seeded_images(1, 3, 48, 32))


# ----- values beside the weights

VALUES = {
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
@pytest.mark.parametrize('kind', VALUES)
def test_harmless_types_are_read(tmp_path, kind, zipped):
    """Harmless objects are read unchanged, or as the most similar plain values."""
    path = saved({'model': {'w': torch.ones(1)}, 'args': {'x': VALUES[kind]}}, tmp_path,
                 _use_new_zipfile_serialization=zipped)
    value = checkpoints.load_checkpoint(path, '--pretrained')['args']['x']
    expected = {'deque': [1, 2]}.get(kind, VALUES[kind])
    assert str(value) == str(expected) if kind not in ('defaultdict', 'defaultdict of dicts') else value == expected


@pytest.mark.parametrize(('old', 'new'), [(b'numpy._core', b'numpy.core'), (b'numpy.core', b'numpy._core')])
def test_numpy_of_either_age(tmp_path, old, new):
    """NumPy 1 and 2 have two names for a module, and Python 3.13 has another one for pathlib's."""
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
    """Class of another project."""


class Evil:
    def __reduce__(self):
        return print, ('executed',)


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize(('thing', 'word'), [(Config(), 'test_foreign_checkpoints.Config'),
                                             (Evil(), '(builtins.)?print')],
                         ids=['class', 'function'])
def test_refused_type_is_named(tmp_path, capsys, thing, word, zipped):
    """A refused type is named in one line with a remedy, and nothing is executed."""
    path = saved({'model': {'w': torch.ones(1)}, 'x': thing}, tmp_path, _use_new_zipfile_serialization=zipped)
    message = rf'contains a Python object of type {word}, .*save the weights alone'
    with pytest.raises(InputError, match=message) as caught:
        checkpoints.load_checkpoint(path, '--pretrained')
    assert '\n' not in str(caught.value)
    assert 'executed' not in capsys.readouterr().out


# ----- places and names of the weights

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
    """Weights are found under any key and with any prefix, by main.py and the tools."""
    path = saved(AROUND[kind](state), tmp_path)
    fresh = timm.create_model(NAME, num_classes=CLASSES)
    weights.load(fresh, weights.read(path, '--pretrained', NAME))
    assert torch.equal(logits(fresh), logits(model))
    assert torch.equal(logits(weights.create_model(NAME, path)), logits(model))
    assert convert_checkpoint.model_of(weights.read(path, 'IN')) == NAME


def test_description_of_weights(tmp_path, state):
    """The description has entry and epoch, the details have the prefix and the number of other tensors."""
    given = weights.read(saved(AROUND['Lightning'](state), tmp_path), '--pretrained', NAME)
    assert given.description == "weights under 'state_dict', epoch 3"
    assert given.details == 'names without model., 2 other tensors are ignored (val_acc.total, loss_fn.weight)'


TWO = {
    'two entries': (lambda s, t: {'model': s, 'net': t}, ('model', 'net')),
    'two prefixes': (lambda s, t: {'state_dict': {**behind('student.', s), **behind('teacher.', t)}},
                     ('state_dict.student', 'state_dict.teacher')),
    'prefix and none': (lambda s, t: {**s, **behind('teacher.', t)}, ('the file itself', 'teacher')),
}


@pytest.mark.parametrize('kind', TWO)
def test_two_sets_of_weights(tmp_path, state, kind):
    """Both sets are named, and --checkpoint-key selects one."""
    make, labels = TWO[kind]
    other = {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}
    path = saved(make(state, other), tmp_path)
    with pytest.raises(InputError, match=f'holds 2 sets of weights that differ: {", ".join(labels)}; choose one set'
                                         f' by --checkpoint-key'):
        weights.read(path, '--pretrained', NAME)
    chosen = weights.read(path, '--pretrained', NAME, key=labels[1])
    assert torch.equal(chosen.tensors['norm.weight'], other['norm.weight'])
    with pytest.raises(InputError, match=rf'no weights under nothing \(--checkpoint-key\); the file has: {labels[0]}'):
        weights.read(path, '--pretrained', NAME, key='nothing')


def test_students_of_dino_can_be_chosen(tmp_path, state):
    """The teacher is the default; --checkpoint-key selects the student."""
    other = {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}
    path = saved({'student': behind('module.backbone.', other), 'teacher': behind('backbone.', state)}, tmp_path)
    assert torch.equal(weights.read(path, '', NAME).tensors['norm.weight'], state['norm.weight'])
    convert_checkpoint.main([path, str(tmp_path / 'o.pth'), '--to', 'original', '--checkpoint-key', 'student'])
    converted = torch.load(tmp_path / 'o.pth', weights_only=True)['model']
    assert torch.equal(converted['norm.weight'], other['norm.weight'])


def test_checkpoint_key_without_weights():
    """--checkpoint-key is refused without a file."""
    with pytest.raises(InputError, match='--checkpoint-key: needs a file with weights'):
        main(['--data-set', 'SAMPLE', '--device', 'cpu', '--checkpoint-key', 'x'])


def test_head_of_another_width(tmp_path, state):
    """Weights with a head of another width are refused with both shapes."""
    path = saved({**state, 'head.weight': torch.zeros(2, 192)}, tmp_path)
    fresh = timm.create_model(NAME, num_classes=2)
    with pytest.raises(InputError, match=r'head\.weight \(2, 192\), model has \(2, 128\)'):
        weights.load(fresh, weights.read(path, '--pretrained', NAME))


# ----- descriptions of the model

@pytest.mark.parametrize('args', [None, [], [1, 2], 'text', 3, {}, {1: 2}, argparse.Namespace(model=None),
                                  types.SimpleNamespace(model=7, input_size='big'),
                                  {'model': ['x'], 'input_size': None}], ids=str)
def test_flags_of_any_kind(tmp_path, state, args):
    """Flags without a valid model or size do not prevent loading."""
    path = saved({'model': state, 'args': args}, tmp_path)
    assert load(path, model=NAME).view.input_size == 224
    data = write_folders(tmp_path / 'data')
    assert main(tiny(data, '--eval', '--resume', path))['images'] == 8


@pytest.mark.parametrize(('size', 'side'), [
    (48, 48), ((3, 48, 48), 48), ([48, 48], 48), ((48,), 48), ((3, 48, 64), None), (None, None), ({}, None),
    ('48', None), ((), None), (-1, None), (0, None), (True, None)], ids=str)
def test_input_size_of_any_kind(size, side):
    """A number, or two equal numbers, are the side of a square."""
    assert side_of(size) == side


@pytest.mark.parametrize(('classes', 'names'), [
    (['cat', 'dog'], ['cat', 'dog']), (('cat', 'dog'), ['cat', 'dog']), ({0: 'cat', 1: 'dog'}, ['cat', 'dog']),
    ({'1': 'dog', '0': 'cat'}, ['cat', 'dog']), ({'dog': 1, 'cat': 0}, ['cat', 'dog']), (2, None), (None, None),
    ('cat,dog', None), ({}, None), ([], None), ({1: 'dog'}, ['class 0', 'dog']), ([7, 8], ['7', '8']),
    (['cat'], ['cat', 'class 1']), (np.array(['cat', 'dog']), ['cat', 'dog']), (['a', 'b', 'c'], None)], ids=str)
def test_classes_of_any_kind(classes, names):
    """Names are read by index from lists, arrays and dicts."""
    assert names_of(classes, 2) == names


@pytest.mark.parametrize('args', [{'model': NAME}, argparse.Namespace(model=NAME), types.SimpleNamespace(model=NAME)],
                         ids=['dict', 'Namespace', 'SimpleNamespace'])
def test_flags_are_read(args):
    """Flags in a checkpoint are read from a dict or a namespace."""
    assert trained_with({'args': args}) == {'model': NAME}


@pytest.mark.parametrize('classes', [['cat', 'dog', 'emu'], 2, {0: 'cat', 1: 'dog'}, ['a', 'b', 'c']], ids=str)
def test_tools_with_classes_of_any_kind(tmp_path, state, classes, capsys):
    """Names of another number of classes are ignored, which is logged."""
    path = saved({'model': state, 'args': {'model': NAME, 'input_size': (3, 48, 48)}, 'classes': classes}, tmp_path)
    model = load(path)
    assert model.view.input_size == 48
    assert model.classes == (['cat', 'dog'] if isinstance(classes, dict) else None)
    assert ('class names are ignored' in capsys.readouterr().out) is not isinstance(classes, dict)


# ----- files that are not checkpoints

def zipped(names: dict) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive:
        for name, content in names.items():
            archive.writestr(name, content)
    return file.getvalue()


OTHER_KINDS = {
    'a Git-LFS pointer': b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n',
    'a web page': b'\n<!DOCTYPE html>\n<html><head><title>404</title></head></html>',
    'a zip archive of other files (model/w.pth); unpack the archive': zipped({'model/w.pth': b'', 'README.md': b''}),
    'a TorchScript program': zipped({'m/data.pkl': b'', 'm/constants.pkl': b'', 'm/code/x.py': b''}),
    'a gzip archive': b'\x1f\x8b\x08\x00',
    'an ONNX model': b'\x08\x0a\x12\x07pytorch\x1a\x052.9.0:\x10',
    'an HDF5 file': b'\x89HDF\r\n\x1a\n',
    'a text file': b'these are my notes on weights\n',
    'empty': b'',
}


@pytest.mark.parametrize('name', ['w.pth', 'w.safetensors', 'w.bin'])
@pytest.mark.parametrize('kind', OTHER_KINDS)
def test_other_files_are_named(tmp_path, kind, name):
    """The kind of a file is recognised by its content, whatever its suffix."""
    (tmp_path / name).write_bytes(OTHER_KINDS[kind])
    with pytest.raises(InputError) as caught:
        checkpoints.load_checkpoint(str(tmp_path / name), '--pretrained')
    assert f'{name}: is {kind}' in str(caught.value)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('content', [b'\x89PNG\r\n\x1a\n', b'%PDF-1.4', zipped({'a.npy': b''}), b'\x00' * 1000],
                         ids=['picture', 'PDF', 'NumPy', 'zeros'])
def test_any_other_file_is_refused(tmp_path, content):
    """Files of kinds without a name of their own are refused in one line too."""
    (tmp_path / 'w.pth').write_bytes(content)
    with pytest.raises(InputError, match=r'damaged, truncated or not a checkpoint|a zip archive') as caught:
        checkpoints.load_checkpoint(str(tmp_path / 'w.pth'), '--pretrained')
    assert '\n' not in str(caught.value)


def test_folder_is_named(tmp_path):
    """A folder in place of a checkpoint is refused as a directory."""
    with pytest.raises(InputError, match='a directory, not a checkpoint file'):
        checkpoints.load_checkpoint(str(tmp_path), '--pretrained')


def test_wrong_suffixes_are_read(tmp_path, state):
    """Checkpoints are recognised by their content."""
    safetensors.torch.save_file({key: value.clone() for key, value in state.items()}, tmp_path / 'a.pth')
    torch.save(state, tmp_path / 'b.safetensors')
    for name in ('a.pth', 'b.safetensors'):
        assert checkpoints.load_checkpoint(str(tmp_path / name), '').keys() == state.keys()


@pytest.mark.parametrize('zipped', [True, False])
def test_whole_model_is_named(tmp_path, model, zipped):
    """A pickled module is refused with its class and a remedy."""
    path = saved(model, tmp_path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r'contains a Python object of type xcit\.Xcit|is a whole pickled model'):
        checkpoints.load_checkpoint(path, '--pretrained')
    path = saved(torch.nn.Sequential(torch.nn.Linear(1, 1)), tmp_path)
    with pytest.raises(InputError, match=r'is a whole pickled model \(torch\.nn\.modules\..*save the weights alone'):
        checkpoints.load_checkpoint(path, '--pretrained')
    with open(tmp_path / 'p.pkl', 'wb') as file:
        pickle.dump(Config(), file)
    with pytest.raises(InputError, match='damaged, truncated or not a checkpoint'):
        checkpoints.load_checkpoint(str(tmp_path / 'p.pkl'), '--pretrained')


@pytest.mark.parametrize('part', ['neck.conv', 'rpn_head.rpn_conv', 'roi_head.bbox_head.fc', 'decode_head.conv_seg',
                                  'auxiliary_head.conv', 'backbone.fpn1.0'])
def test_detectors_and_segmenters_are_named(tmp_path, state, part):
    """Every program refuses the weights of a detector or a segmenter as such."""
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


# ----- conversion

@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('trained')
    main(tiny(write_folders(folder / 'data'), '--epochs', '1', '--full-crop', '--output-dir', str(folder / 'run')))
    return folder / 'run' / 'best_model.pth'


@pytest.mark.parametrize('naming', ['original', 'timm'])
def test_converted_file_is_described(tmp_path, trained, naming):
    """A converted .safetensors file has model, classes, size and crop for the tools, and main.py evaluates it."""
    path = tmp_path / 'w.safetensors'
    convert_checkpoint.main([str(trained), str(path), '--to', naming])
    converted, expected = map(load, (path, trained))
    assert (converted.name, converted.classes) == (expected.name, expected.classes) == (NAME, ['cat', 'dog'])
    assert converted.view == expected.view
    assert (converted.view.input_size, converted.view.full_crop) == (32, True)
    assert torch.equal(logits(converted.model), logits(expected.model))
    data = trained.parent.parent / 'data'
    assert main(tiny(data, '--eval', '--pretrained', str(path)))['images'] == 8


def test_timm_opens_the_folder(tmp_path, trained):
    """timm loads a converted folder as its own model, with class names, size and crop."""
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
    """A config.json of another program is not replaced."""
    (tmp_path / 'config.json').write_text('{"mine": 1}')
    with pytest.raises(InputError, match=r'config\.json exists, and does not describe a timm model'):
        convert_checkpoint.main([str(trained), str(tmp_path / 'model.safetensors'), '--to', 'timm'])
    assert [file.name for file in tmp_path.iterdir()] == ['config.json']
