"""timm's own tests of models, run for this XCiT and for timm's: this XCiT passes every test that timm's passes.

The tests come from timm's source distribution on the package index, in the installed version.
"""
import re
import subprocess
import sys
import tarfile

import pytest
import timm
import torch
from conftest import ROOT, seeded_images, shallow_xcit
from torch._subclasses.fake_tensor import FakeTensorMode

# Models in lists of these tests, where an XCiT is valid as well
PLACES = ('xcit_nano_12_p16_224', 'convit_tiny', 'vgg11', 'convmixer_768_32', 'densenet121', 'resnet50d',
          'hrnet_w18_small', 'xception41p', 'beit_base_patch16_224', 'nasnetalarge')


@pytest.fixture(scope='module')
def timms_tests(tmp_path_factory):
    folder = tmp_path_factory.mktemp('timm')
    command = [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--no-binary', ':all:', '--dest', folder,
               f'timm=={timm.__version__}']
    loaded = subprocess.run(command, capture_output=True, text=True)
    if loaded.returncode:
        pytest.skip(f'timm\'s source distribution can\'t be downloaded: {loaded.stderr.strip().splitlines()[-1]}')
    with tarfile.open(next(folder.glob('timm-*.tar.gz'))) as archive:
        name = next(name for name in archive.getnames() if name.endswith('/tests/test_models.py'))
        return archive.extractfile(name).read().decode()


def failures(tests: str, name: str, folder) -> tuple:
    """Run the tests for a model; return their number, and the names of those that failed, without the model's name."""
    for place in PLACES:
        tests = tests.replace(f"'{place}'", f"'{name}'")
    folder.mkdir()
    (folder / 'test_models.py').write_text(tests)
    program = (f'import sys; sys.path.insert(0, {str(ROOT)!r})\nimport pytest, xcit\n'
               f'sys.exit(pytest.main(sys.argv[1:]))')
    run = subprocess.run(
        [sys.executable, '-c', program, '-q', '-rf', '--tb=no', '-p', 'no:cacheprovider', '-p', 'no:xdist', '-W',
         'ignore', '--rootdir', str(folder), '-k', f'{name} and not {name}_ and not pretrained', str(folder)],
        capture_output=True, text=True, cwd=folder)
    counts = {outcome: int(number) for number, outcome in re.findall(r'(\d+) (passed|failed)', run.stdout)}
    failed = re.findall(r'^FAILED \S+::(\S+)', run.stdout, re.MULTILINE)
    assert len(failed) == counts.get('failed', 0), run.stdout + run.stderr
    return sum(counts.values()), {test.replace(name, 'MODEL') for test in failed}


@pytest.mark.slow
@pytest.mark.parametrize('name', [f'xcit_{size}_12_p{p}' for size in ('nano', 'tiny', 'small') for p in (16, 8)])
def test_ours_passes_what_timms_passes(timms_tests, tmp_path, name):
    """Creation, forward, backward, features, pruning, fx and scripting fail only where timm's class fails too."""
    count, failed = failures(timms_tests, name, tmp_path / 'ours')
    _, of_timms = failures(timms_tests, f'{name}_224', tmp_path / 'timms')
    assert count >= 10  # there are fewer in timm's older versions
    assert failed - of_timms == set()


@pytest.mark.parametrize('side', [32, 96])  # plain form, Gram form
def test_shapes_without_memory(side):
    """A model is built and called with torch's fake tensors."""
    with FakeTensorMode():
        assert shallow_xcit()(torch.rand(2, 3, side, side)).shape == (2, 10)


@pytest.mark.parametrize('side', [32, 96])
def test_linearized_model_has_the_derivatives_of_jvp(side):
    """torch.func.linearize computes the derivatives of torch.func.jvp."""
    model, (images, direction) = shallow_xcit(), seeded_images(2, 1, 3, side, side)
    _, linearized = torch.func.linearize(model, images)
    _, expected = torch.func.jvp(model, (images,), (direction,))
    torch.testing.assert_close(linearized(direction), expected)


@pytest.mark.parametrize('indices', [(0,), (0, 1)])
def test_every_parameter_of_a_feature_extractor_gets_a_gradient(indices):
    """All parameters are used, as DistributedDataParallel requires."""
    model = timm.create_model('xcit_nano_12_p16', depth=3, features_only=True, out_indices=indices)
    sum(features.sum() for features in model(seeded_images(2, 3, 32, 32))).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_another_patch_size():
    """timm's create_model passes a patch size other than the name's to the model."""
    model = timm.create_model('xcit_nano_12_p16', patch_size=8, depth=1).eval()
    assert model.forward_features(seeded_images(1, 3, 32, 32)).shape == (1, 17, 128)
