"""tools.convert_checkpoint: bitwise conversion in both directions, and into timm's own models."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from conftest import ROOT, seeded_images, seeded_model, tiny, write_folders
from processes import finish, start

import main as training
import weights
import xcit
import xcit_zoo
from run import checkpoints
from tools.convert_checkpoint import main, model_of
from utils import InputError, RunStopped

NAME, CLASSES = 'xcit_nano_12_p16', 3


@pytest.fixture
def original(tmp_path) -> Path:
    """A file in the published layout, for 3 classes."""
    torch.save({'model': seeded_model(NAME, num_classes=CLASSES).state_dict()}, tmp_path / 'original.pth')
    return tmp_path / 'original.pth'


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Path:
    """A checkpoint of a real run with 3 classes."""
    data = write_folders(tmp_path_factory.mktemp('data'), classes=('a', 'b', 'c'), per_class=4)
    run = tmp_path_factory.mktemp('run')
    training.main(tiny(data, '--epochs', '1', '--output-dir', str(run)))
    return run / 'checkpoint.pth'


def convert(source, target, to: str, *more: str) -> dict:
    """Run the program, and return the weights in the file."""
    main([str(source), str(target), '--to', to, *more])
    return weights_in(target)


def weights_in(path) -> dict:
    content = load(path)
    return content.get('model', content)


def load(path) -> dict:
    return safetensors.torch.load_file(path) if Path(path).suffix == '.safetensors' else torch.load(path)


def assert_same(own: dict, other: dict):
    """Assert that names, types and bits of the tensors are equal."""
    assert own.keys() == other.keys()
    assert all(torch.equal(own[key], other[key]) and own[key].dtype == other[key].dtype for key in own)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(seeded_images(2, 3, 48, 32))


# ----- the files

@pytest.mark.parametrize('there', ['timm.pth', 'timm.safetensors'])
@pytest.mark.parametrize('back', ['back.pth', 'back.safetensors'])
def test_round_trip_is_bitwise(original, tmp_path, there, back):
    """The conversion original -> timm -> original is bitwise, through either kind of file."""
    convert(original, tmp_path / there, 'timm')
    content = convert(tmp_path / there, tmp_path / back, 'original')
    assert_same(content, weights_in(original))


def test_round_trip_from_timm_is_bitwise(tmp_path):
    """The conversion timm -> original -> timm is bitwise, also in half precision."""
    theirs = timm.create_model('xcit_tiny_12_p8_224').half().state_dict()
    safetensors.torch.save_file(theirs, tmp_path / 'theirs.safetensors')
    convert(tmp_path / 'theirs.safetensors', tmp_path / 'original.pth', 'original')
    assert_same(convert(tmp_path / 'original.pth', tmp_path / 'back.safetensors', 'timm'), theirs)


@pytest.mark.parametrize('to', ['original', 'timm'])
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_file_has_the_layout_of_its_kind(original, tmp_path, to, suffix):
    """A .pth file has `model` and `args`; a .safetensors file only has the weights, and the rest as metadata."""
    tensors = convert(original, tmp_path / f'out{suffix}', to)
    if suffix == '.pth':
        assert {**load(tmp_path / 'out.pth'), 'model': 0} == {'model': 0, 'args': {'model': NAME}}
    assert xcit_zoo.has_timm_names(tensors) == (to == 'timm')
    assert all(isinstance(value, torch.Tensor) for value in tensors.values())


def test_safetensors_say_whose_tensors_they_are(original, tmp_path):
    """The metadata have the format, for other libraries, and the model's name."""
    convert(original, tmp_path / 'out.safetensors', 'timm')
    with safetensors.safe_open(tmp_path / 'out.safetensors', 'pt') as file:
        assert file.metadata() == {'format': 'pt', 'args': json.dumps({'model': NAME})}


def test_odd_layouts_in_memory_are_written(tmp_path):
    """Tensors that share memory, or are not contiguous, are written to .safetensors."""
    state = seeded_model(NAME).state_dict()
    shared = torch.stack([state['norm.weight'], state['norm.bias']])
    odd = {**state, 'norm.weight': shared[0], 'norm.bias': shared[1],
           'blocks.0.mlp.fc1.weight': state['blocks.0.mlp.fc1.weight'].t().contiguous().t()}
    torch.save({'model': odd}, tmp_path / 'odd.pth')
    assert_same(convert(tmp_path / 'odd.pth', tmp_path / 'out.safetensors', 'original'), state)


@pytest.mark.parametrize('name', xcit.MODELS)
def test_model_is_known_by_its_sizes(name):
    """Each of the 14 models is recognised by the shapes of its weights."""
    with torch.device('meta'):
        state = timm.create_model(name).state_dict()
    assert model_of(weights.Weights(state, '', '', {})) == name


# ----- what opens them

@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('name', ['xcit_nano_12_p16', 'xcit_tiny_12_p16'])
def test_timms_own_models_open_it(tmp_path, name, suffix):
    """timm's model opens the file by checkpoint_path and by pretrained_cfg, with the same logits."""
    expected = seeded_model(name, num_classes=CLASSES)
    torch.save({'model': expected.state_dict()}, tmp_path / 'in.pth')
    path = tmp_path / f'out{suffix}'
    convert(tmp_path / 'in.pth', path, 'timm')
    overlay = dict(file=str(path), num_classes=CLASSES)
    for theirs in (timm.create_model(f'{name}_224', num_classes=CLASSES, checkpoint_path=str(path)),
                   timm.create_model(f'{name}_224', num_classes=CLASSES, pretrained=True,
                                     pretrained_cfg_overlay=overlay)):
        assert type(theirs).__module__ == 'timm.models.xcit'
        torch.testing.assert_close(logits(theirs), logits(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(('flags', 'entry'), [([], 'model'), (['--use-ema'], 'model_ema')])
def test_training_opens_in_timm(trained, tmp_path, flags, entry):
    """timm opens the model and the EMA of a training checkpoint."""
    convert(trained, tmp_path / 'out.safetensors', 'timm', *flags)
    theirs = timm.create_model('xcit_nano_12_p16_224', num_classes=CLASSES,
                               checkpoint_path=str(tmp_path / 'out.safetensors'))
    own = timm.create_model(NAME, num_classes=CLASSES)
    own.load_state_dict(load(trained)[entry])
    torch.testing.assert_close(logits(theirs), logits(own), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_timms_model_opens_here(tmp_path, suffix):
    """Weights of timm's model load strictly into ours, with the same logits."""
    theirs = timm.create_model('xcit_nano_12_p16_224', num_classes=CLASSES)
    torch.save(theirs.state_dict(), tmp_path / 'theirs.pth')
    content = convert(tmp_path / 'theirs.pth', tmp_path / f'out{suffix}', 'original')
    own = timm.create_model(NAME, num_classes=CLASSES)
    own.load_state_dict(content)
    torch.testing.assert_close(logits(own), logits(theirs), rtol=1e-4, atol=1e-5)


# ----- where weights come from

def test_tag_and_url_are_read(tmp_path, monkeypatch):
    """A tag with --model is read from torch.hub's cache, and a URL is read."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    cached = checkpoints.cache_path(xcit_zoo.ZOO[f'{NAME}.fb_in1k'].url)
    cached.parent.mkdir(parents=True)
    torch.save({'model': seeded_model(NAME).state_dict()}, cached)
    from_tag = convert('fb_in1k', tmp_path / 'tag.pth', 'timm', '--model', NAME)
    assert_same(convert(cached.as_uri(), tmp_path / 'url.pth', 'timm'), from_tag)


def test_program_says_what_it_did(original, tmp_path):
    """The program prints the weights that it read and the files that it wrote."""
    result = subprocess.run([sys.executable, '-m', 'tools.convert_checkpoint', original, tmp_path / 'out.pth', '--to',
                             'timm'], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.splitlines() == [
        f"IN {original}: weights under 'model'",
        f'{tmp_path}/out.pth: {NAME}, {CLASSES} classes, {len(weights_in(tmp_path / "out.pth"))} tensors in timm '
        f'naming',
        f"{tmp_path}/config.json: for timm.create_model('local-dir:{tmp_path}')"]
    assert (result.returncode, result.stderr) == (0, '')


# ----- bad input

def refused(argv: list, *words: str):
    with pytest.raises(InputError) as caught:
        main([str(word) for word in argv])
    message = str(caught.value)
    assert '\n' not in message
    assert all(word in message for word in words), message


def test_program_exits_with_2(original, tmp_path):
    """A bad argument is one line on stderr and exit code 2."""
    result = subprocess.run([sys.executable, '-m', 'tools.convert_checkpoint', original, tmp_path / 'out.bin', '--to',
                             'timm'], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, '')
    assert result.stderr == f'convert_checkpoint.py: error: OUT {tmp_path}/out.bin: must end in .pth or .safetensors\n'


def test_out_must_not_be_in(original, tmp_path, monkeypatch):
    """OUT is refused if it is IN under any name."""
    before = original.read_bytes()
    (tmp_path / 'link.pth').symlink_to(original)
    monkeypatch.chdir(tmp_path)
    for target in (original, 'original.pth', 'link.pth'):
        refused([original, target, '--to', 'timm'], 'is IN itself')
    assert original.read_bytes() == before


def test_out_must_be_a_file_in_a_directory(original, tmp_path):
    """A directory as OUT, and a missing directory, are refused."""
    (tmp_path / 'folder.pth').mkdir()
    refused([original, tmp_path / 'folder.pth', '--to', 'timm'], 'is a directory')
    refused([original, tmp_path / 'none' / 'out.pth', '--to', 'timm'], 'no such directory')


@pytest.mark.parametrize(('content', 'words'), [
    (lambda: timm.create_model('resnet18').state_dict(), ['not the weights of an XCiT model', 'conv1.weight']),
    (lambda: timm.create_model('vit_tiny_patch16_224').state_dict(), ['not the weights of an XCiT model']),
    (lambda: timm.create_model('cait_xxs24_224').state_dict(), ['patch_embed']),
    (lambda: {'model': {}}, ['no weights']),
    (lambda: {k: v for k, v in seeded_model(NAME).state_dict().items() if k != 'norm.bias'},
     ['missing keys: norm.bias']),
    (lambda: {**seeded_model(NAME).state_dict(), 'norm.odd': torch.ones(1)}, ['unexpected keys: norm.odd']),
], ids=['resnet', 'vit', 'cait', 'nothing', 'missing', 'left over'])
def test_other_weights_are_refused(tmp_path, content, words):
    """Weights of other models, or incomplete ones, are refused, and an existing OUT is unchanged."""
    torch.save(content(), tmp_path / 'in.pth')
    (tmp_path / 'out.pth').write_bytes(b'mine')
    refused([tmp_path / 'in.pth', tmp_path / 'out.pth', '--to', 'timm'], 'in.pth', *words)
    assert (tmp_path / 'out.pth').read_bytes() == b'mine'
    assert sorted(path.name for path in tmp_path.iterdir()) == ['in.pth', 'out.pth']


@pytest.mark.parametrize(('argv', 'words'), [
    (['none.pth', 'out.pth', '--to', 'timm'], ['IN none.pth: no such file']),
    (['fb_in1k', 'out.pth', '--to', 'timm'], ['IN fb_in1k: no such file']),
    (['fb_in2k', 'out.pth', '--to', 'timm', '--model', NAME], ['tags of xcit_nano_12_p16: fb_in1k']),
    (['in.pth', 'out.pth', '--to', 'timm', '--model', 'xcit_nan_12_p16'], ['similar: xcit_nano_12_p16']),
    (['in.pth', 'out.pth', '--to', 'jax'], ['--to', "'original', 'timm'"]),
    (['in.pth', 'out.pth'], ['--to']),
    (['in.pth'], ['OUT']),
], ids=str)
def test_bad_arguments_are_refused(tmp_path, monkeypatch, argv, words):
    """A bad argument is refused with the allowed values."""
    monkeypatch.chdir(tmp_path)
    refused(argv, *words)


def test_existing_file_is_replaced_only_when_complete(original, tmp_path):
    """A write that fails half way leaves the old file; one that succeeds replaces it."""
    target = tmp_path / 'out.pth'
    target.write_bytes(b'mine')
    script = (
        'import resource, signal, sys; from tools.convert_checkpoint import main; from run import commandline\n'
        'signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 20, 2 ** 20))\n'
        'commandline.run_program(lambda: main(sys.argv[1:]))')
    (code, _, error), = finish(start(['-c', script, original, target, '--to', 'timm'], 1))
    assert code == RunStopped.exit_code
    assert f'{target} can\'t be written' in error
    assert target.read_bytes() == b'mine'
    assert not list(tmp_path.glob('*.tmp'))
    convert(original, target, 'timm')
    assert load(target)
