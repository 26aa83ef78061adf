"""hubconf.py, by torch.hub.load in processes outside this repository."""
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import ROOT, seeded_images, seeded_model

import hubconf
import weights
import xcit
import xcit_zoo
from run import checkpoints
from utils import InputError

NAME = 'xcit_nano_12_p16'


def load(name: str = NAME, **kwargs) -> torch.nn.Module:
    return torch.hub.load(str(ROOT), name, source='local', **kwargs)


def run(script: str, folder: Path, **env) -> str:
    """Run a script in `folder`, with the repository's path in REPO and torch imported; return its output."""
    path = folder / 'program.py'
    path.write_text(f'import json, sys, torch\nREPO = {str(ROOT)!r}\n{script}')
    env = {**{key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}, **env}
    result = subprocess.run([sys.executable, path], cwd=folder, env=env, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert 'Warning' not in result.stderr
    return result.stdout


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Published weights of the first tag, in torch.hub's cache."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    path = checkpoints.cache_path(xcit_zoo.ZOO[f'{NAME}.fb_in1k'].url)
    path.parent.mkdir(parents=True)
    torch.save({'model': seeded_model(NAME).state_dict()}, path)
    return path


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(seeded_images(1, 3, 48, 32))


def test_entry_points_are_the_14_models():
    """The public functions are the 14 models, each with its own documentation."""
    public = {name: value for name, value in vars(hubconf).items() if callable(value) and not name.startswith('_')}
    assert set(public) == set(xcit.MODELS)
    for name, entry_point in public.items():
        size, patch = name.removeprefix('xcit_').rsplit('_p', 1)
        assert entry_point.__name__ == name
        assert entry_point.__doc__.startswith(f'XCiT {size} with {patch} x {patch} pixel patches.')


@pytest.mark.parametrize('name', ['xcit_nano_12_p16', 'xcit_tiny_12_p8'])
def test_entry_point_builds_its_model(name):
    """The model has the size and the patch of its name."""
    model, expected = load(name), timm.create_model(name)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in expected.state_dict().items()}


def test_hub_load_from_another_directory(cached, tmp_path):
    """A program in another directory loads weights by a tag, and gets their logits."""
    output = run(f'model = torch.hub.load(REPO, "{NAME}", source="local", pretrained="fb_in1k").eval()\n'
                 'images = torch.full((1, 3, 48, 32), .5)\n'
                 'print(json.dumps(model(images)[0].tolist()))', tmp_path)
    expected = seeded_model(NAME).eval()(torch.full((1, 3, 48, 32), .5))[0]
    torch.testing.assert_close(torch.tensor(json.loads(output)), expected.detach())


def test_true_is_the_first_tag(cached):
    """pretrained=True loads the first tag, as with timm."""
    assert torch.equal(logits(load(pretrained=True)), logits(seeded_model(NAME)))


def test_false_is_random():
    """A model is loaded with random weights by default, and with pretrained=False."""
    assert not torch.equal(load().head.weight, load(pretrained=False).head.weight)


@pytest.mark.parametrize('as_url', [False, True])
def test_path_and_url_are_read(cached, as_url):
    """A file is loaded by path and by URL, with its number of classes."""
    path = cached.with_name('mine.pth')
    torch.save(xcit_zoo.to_timm_names(seeded_model(NAME, num_classes=5).state_dict()), path)
    model = load(pretrained=path.as_uri() if as_url else str(path))
    assert torch.equal(logits(model), logits(seeded_model(NAME, num_classes=5)))


def test_tag_decides_timms_configuration(cached):
    """A tag sets the resolution of timm's resolve_data_config."""
    path = checkpoints.cache_path(xcit_zoo.ZOO[f'{NAME}.fb_dist_in1k_384'].url)
    path.write_bytes(cached.read_bytes())
    assert timm.data.resolve_data_config(model=load(pretrained='fb_dist_in1k_384'))['input_size'] == (3, 384, 384)


def test_timms_options_pass_through(cached):
    """Other classes and channels, drop-path and features_only work with published weights."""
    expected = seeded_model(NAME).eval()
    model = load(pretrained=True, num_classes=7, drop_path_rate=.2, in_chans=1)
    assert (model.head.out_features, model.patch_embed.proj[0][0].in_channels) == (7, 1)
    assert model.blocks[3].drop_path.drop_prob == .2
    assert torch.equal(model.blocks[3].gamma1, expected.blocks[3].gamma1)
    images = seeded_images(1, 3, 48, 32)
    with torch.no_grad():
        features = load(pretrained=True, features_only=True, out_indices=(1,)).eval()(images)
        assert torch.equal(features[0], expected.forward_intermediates(images, [1], intermediates_only=True)[0])


def test_model_does_not_keep_the_file(cached):
    """The model's configuration does not keep a second copy of the weights."""
    model = load(pretrained=True)
    assert len(pickle.dumps(model)) < 1.1 * sum(v.nbytes for v in model.state_dict().values()) + 1e6


@pytest.mark.parametrize(('given', 'message'), [
    ('fb_in2k', 'tags of xcit_nano_12_p16: fb_in1k, fb_dist_in1k'), ('none.pth', 'no such file')])
def test_unknown_weights_are_refused(given, message):
    """Unknown weights raise a ValueError of one line."""
    with pytest.raises(ValueError, match=message) as caught:
        load(pretrained=given)
    assert '\n' not in str(caught.value)


def test_weights_of_another_model_are_refused(cached):
    """Weights of another model are refused with both names."""
    with pytest.raises(InputError, match=r': checkpoint is xcit_nano_12_p16, the model is xcit_tiny_24_p16$'):
        weights.create_model('xcit_tiny_24_p16', str(cached))


CLASH = '''
import datasets, utils, weights
modules = utils, datasets, weights
model = torch.hub.load(REPO, "xcit_nano_12_p16", source="local", pretrained=True)
again = torch.hub.load(REPO, "xcit_nano_12_p16", source="local", pretrained=True)
import datasets, utils, weights
assert modules == (utils, datasets, weights) and utils.MINE == datasets.MINE == weights.MINE
assert isinstance(again, type(model))
print(sum(p.numel() for p in model.parameters()))
'''


def test_callers_modules_of_the_same_names_are_left_alone(cached, tmp_path):
    """A program with its own utils, datasets and weights keeps these modules."""
    for name in ('utils', 'datasets', 'weights'):
        (tmp_path / f'{name}.py').write_text('MINE = True\n')
    assert run(CLASH, tmp_path) == '3053224\n'


def test_callers_modules_can_be_imported_afterwards(cached, tmp_path):
    """The caller's `utils` can be imported after loading a model."""
    (tmp_path / 'utils.py').write_text('MINE = True\n')
    run('torch.hub.load(REPO, "xcit_nano_12_p16", source="local")\nimport utils\nassert utils.MINE', tmp_path)


def test_models_can_be_pickled(tmp_path):
    """Models can be pickled in the program that loaded them."""
    run('import copy, pickle\nmodel = torch.hub.load(REPO, "xcit_nano_12_p16", source="local")\n'
        'pickle.loads(pickle.dumps(copy.deepcopy(model)))', tmp_path)


def test_own_modules_are_shared(tmp_path):
    """A program that imported xcit from this repository gets models of its type Xcit."""
    run('import utils, xcit\nmodel = torch.hub.load(REPO, "xcit_nano_12_p16", source="local")\n'
        'assert isinstance(model, xcit.Xcit) and sys.modules["utils"] is utils', tmp_path, PYTHONPATH=str(ROOT))


def copy_of_models(folder: Path, change: str = '') -> Path:
    """Copy the modules of the installed package; append `change` to one of them."""
    for name in hubconf._MODELS:
        (folder / f'{name}.py').write_text((ROOT / f'{name}.py').read_text() + change * (name == 'xcit_timm'))
    return folder


def test_installed_package_serves_hub_models_too(tmp_path):
    """Beside an equal installed package, models have the package's types, without warnings, which `run` refuses."""
    run('import xcit\nfor _ in range(2):\n'
        '    model = torch.hub.load(REPO, "xcit_nano_12_p16", source="local")\n'
        '    assert type(model) is xcit.Xcit\nxcit.fuse(model.eval())', tmp_path,
        PYTHONPATH=str(copy_of_models(tmp_path)))


def test_other_version_is_named(tmp_path):
    """Beside another version, there is one warning with both places, and `fuse` names the two copies."""
    output = run('import warnings, xcit\nwith warnings.catch_warnings(record=True) as raised:\n'
                 '    warnings.simplefilter("always")\n'
                 '    model = torch.hub.load(REPO, "xcit_nano_12_p16", source="local")\n'
                 'print(*(w.message for w in raised), sep="\\n")\n'
                 'try:\n    xcit.fuse(model.eval())\nexcept ValueError as error:\n    print(error)', tmp_path,
                 PYTHONPATH=str(copy_of_models(tmp_path, '\n# older\n')))
    warning, error = output.splitlines()
    assert str(tmp_path / 'xcit.py') in warning
    assert str(ROOT / 'xcit.py') in warning
    assert 'comes from another copy of this package' in error
    assert str(tmp_path / 'xcit_timm.py') in error


def test_missing_packages_are_named(tmp_path):
    """torch.hub reads `dependencies` before any of these packages is imported."""
    script = ('sys.modules["timm"] = None\nimport importlib.util as util\nfind = util.find_spec\n'
              'util.find_spec = lambda name, *rest: None if name == "timm" else find(name, *rest)\n'
              'try:\n    torch.hub.load(REPO, "xcit_nano_12_p16", source="local")\n'
              'except RuntimeError as error:\n    print(error)')
    assert run(script, tmp_path) == 'Missing dependencies: timm\n'
