"""tools.export: a file of each format computes the model's outputs at all promised sizes, or is not kept."""
import functools
import json
import resource
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT, seeded_images, seeded_model
from processes import finish, start
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import xcit_fuse
from inference.loaded import LoadedModel
from loaders.transforms import View
from tools.export import FORMATS, export, main, prepare
from utils import InputError, RunStopped

pytestmark = pytest.mark.filterwarnings('ignore:.*torch.jit.*:FutureWarning')  # a format that PyTorch has deprecated

NANO = 'xcit_nano_12_p8'
SHAPES = [(1, 3, 64, 64), (3, 3, 65, 49), (2, 3, 40, 96)]
CLASSES = ['cat', 'dog', 'horse']
METADATA = {'model': NANO, 'classes': CLASSES, 'input_size': 64, 'crop': .875, 'interpolation': 'bicubic',
            'mean': list(IMAGENET_DEFAULT_MEAN), 'std': list(IMAGENET_DEFAULT_STD)}


@pytest.fixture(scope='module')
def weights(tmp_path_factory) -> Path:
    """A training checkpoint of NANO for 3 named classes."""
    path = tmp_path_factory.mktemp('weights') / 'nano.pth'
    torch.save({'model': seeded_model(NANO, num_classes=3).state_dict(), 'classes': CLASSES,
                'args': {'model': NANO, 'input_size': 64, 'full_crop': False}}, path)
    return path


def flags(weights: Path, format_name: str, output: Path, *more: str) -> list:
    return ['--format', format_name, '--pretrained', str(weights), '--output', str(output), *more]


@pytest.fixture(scope='module')
def onnx_file(tmp_path_factory) -> Path:
    """A small model that the program has exported for images of any size."""
    folder = tmp_path_factory.mktemp('onnx')
    torch.save({'model': seeded_model('xcit_test', num_classes=3).state_dict(), 'classes': CLASSES,
                'args': {'model': 'xcit_test', 'input_size': 64, 'full_crop': False}}, folder / 'small.pth')
    main(flags(folder / 'small.pth', 'onnx', folder / 'small.onnx', '--dynamic'))
    return folder / 'small.onnx'


def shallow_model(name: str) -> torch.nn.Module:
    """A model with one XCA block instead of 12, which is exported in a second."""
    return seeded_model(name, num_classes=3, depth=1).eval()


@pytest.fixture(scope='module')
def export_shallow(tmp_path_factory):
    """Function that exports a shallow model, once per setting, and returns the file."""

    @functools.cache
    def exported(name: str, format_name: str, *, dynamic: bool, input_size: int = 64) -> Path:
        path = tmp_path_factory.mktemp('shallow') / f'model{FORMATS[format_name][0]}'
        loaded = LoadedModel(shallow_model(name), name, CLASSES, View(input_size, resize=input_size > 32),
                             device=torch.device('cpu'), amp_dtype=None)
        export(loaded, path, format_name=format_name, dynamic=dynamic, tolerance=1e-4)
        return path

    return exported


def load_onnx(path: Path):
    """Return a file as a function images -> outputs."""
    session = onnxruntime.InferenceSession(path)
    return lambda images: torch.from_numpy(session.run(None, {'images': images.numpy()})[0])


LOADERS = {'onnx': load_onnx, 'torchscript': torch.jit.load,
           'torch-export': lambda path: torch.export.load(path).module()}


def assert_same(exported, model: torch.nn.Module, shapes: list):
    """Assert that both compute the same outputs for images of each shape (B, 3, img_h, img_w)."""
    for shape in shapes:
        images = seeded_images(*shape)
        torch.testing.assert_close(exported(images), model(images), rtol=1e-4, atol=1e-5)


# ----- outputs

@pytest.mark.parametrize('name', ['xcit_nano_12_p16', 'xcit_nano_12_p8', 'xcit_tiny_12_p16'])
@torch.no_grad()
def test_fused_stem_computes_the_same(name):
    """Folding BatchNorm into the convolutions only changes rounding, and no BatchNorm remains in the stem."""
    model, images = seeded_model(name).eval(), seeded_images(2, 3, 70, 45)
    expected, expected_patches = model(images), model.patch_embed(images)
    xcit_fuse.fuse_stem(model)
    torch.testing.assert_close(model.patch_embed(images), expected_patches, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.patch_embed.modules())


def test_stem_in_training_mode_is_not_fused():
    """A stem in training mode is refused: its BatchNorm has no fixed statistics."""
    with pytest.raises(ValueError, match='eval'):
        xcit_fuse.fuse_stem(seeded_model(NANO))


@torch.no_grad()
def test_program_exports_onnx(onnx_file):
    """A checkpoint is exported to a file that computes the same at sizes other than the example's."""
    assert_same(load_onnx(onnx_file), seeded_model('xcit_test', num_classes=3).eval(), SHAPES)


@pytest.mark.parametrize(('format_name', 'name'), [
    ('onnx', 'xcit_nano_12_p16'), ('onnx', 'xcit_tiny_12_p8'), ('torchscript', 'xcit_nano_12_p8'),
    ('torchscript', 'xcit_tiny_12_p16'), ('torch-export', 'xcit_tiny_12_p16'),
    pytest.param('onnx', 'xcit_tiny_12_p16', marks=pytest.mark.slow),
    pytest.param('torch-export', 'xcit_nano_12_p8', marks=pytest.mark.slow)])
@torch.no_grad()
def test_dynamic_file_takes_any_size(export_shallow, format_name, name):
    """A file with --dynamic takes any batch, odd images, and images that are not square."""
    path = export_shallow(name, format_name, dynamic=True)
    assert_same(LOADERS[format_name](path), shallow_model(name), SHAPES)


@pytest.mark.parametrize(('input_size', 'form'), [(64, 'plain'), (160, 'gram')])
@torch.no_grad()
def test_form_of_xca_in_a_file(export_shallow, input_size, form):
    """A file has the form that is faster at its size of export, and computes all other sizes in this form."""
    model = shallow_model(NANO)
    prepare(model, input_size, 'onnx')
    assert {block.attn.form for block in model.blocks} == {form}
    path = export_shallow(NANO, 'onnx', dynamic=True, input_size=input_size)
    assert_same(load_onnx(path), shallow_model(NANO), [*SHAPES, (1, 3, 168, 176)])


@pytest.mark.parametrize('format_name', ['onnx', 'torch-export'])
@torch.no_grad()
def test_file_of_one_size_takes_any_batch(export_shallow, format_name):
    """Without --dynamic other batch sizes work, and runtimes refuse another height."""
    exported = LOADERS[format_name](export_shallow(NANO, format_name, dynamic=False))
    assert_same(exported, shallow_model(NANO), [(1, 3, 64, 64), (5, 3, 64, 64)])
    with pytest.raises(Exception, match='64'):
        exported(seeded_images(1, 3, 72, 64))


def test_differences_are_printed_and_returned(weights, tmp_path, capsys):
    """A difference is logged and returned for each compared size; --dynamic compares more sizes."""
    differences = main(flags(weights, 'torchscript', tmp_path / 'nano.pt', '--dynamic'))
    assert list(differences) == [(1, 3, 64, 64), (3, 3, 64, 64), (1, 3, 9, 64), (2, 3, 65, 96)]
    assert all(0 < difference < 1e-5 for difference in differences.values())
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if 'largest difference' in line and 'tolerance 1.0e-04' in line]) == 4
    assert lines[-1].endswith('any number of images of more than 8 pixels a side')


def test_file_beyond_the_tolerance_is_not_kept(weights, tmp_path):
    """The error has the difference, the exit code is 1, and an older file is unchanged."""
    output = tmp_path / 'nano.pt'
    output.write_text('older')
    with pytest.raises(RunStopped, match=r'1 x 3 x 64 x 64: largest difference \d\.\de-\d\d, tolerance 0') as caught:
        main(flags(weights, 'torchscript', output, '--tolerance', '0'))
    assert caught.value.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ['nano.pt']
    assert output.read_text() == 'older'


class PositiveOnly(torch.nn.Module):
    """A module with a branch that depends on values, which torch.export does not support."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_what_an_exporter_refuses_is_one_line(tmp_path):
    """An exporter's error becomes RunStopped with its reason."""
    model = shallow_model(NANO)
    model.head = PositiveOnly()
    loaded = LoadedModel(model, NANO, None, View(64, full_crop=True), device=torch.device('cpu'), amp_dtype=None)
    with pytest.raises(RunStopped, match=rf'^{NANO} can\'t be exported as torch-export \(.*data-dependent.*\)$'):
        export(loaded, tmp_path / 'nano.pt2', format_name='torch-export', dynamic=False, tolerance=1e-4)


# ----- what else the file holds

def test_onnx_is_valid_and_named(onnx_file):
    """The checker accepts the file; opset, IR and names of the input's axes are as expected."""
    model = onnx.load(onnx_file)
    onnx.checker.check_model(model, full_check=True)
    assert (model.opset_import[0].version, model.ir_version) == (20, 10)
    axes = model.graph.input[0].type.tensor_type.shape.dim
    assert [axis.dim_param or axis.dim_value for axis in axes] == ['batch', 3, 'height', 'width']


@pytest.mark.parametrize('format_name', ['onnx', 'torch-export'])
def test_no_paths_of_this_machine(export_shallow, format_name):
    """An exported file contains no paths of this machine."""
    assert str(ROOT).encode() not in export_shallow(NANO, format_name, dynamic=True).read_bytes()


def test_model_is_fused(export_shallow):
    """An exported model has no BatchNorm."""
    program = torch.export.load(export_shallow(NANO, 'torch-export', dynamic=False))
    assert not any('batch_norm' in str(node.target) for node in program.graph.nodes)


def test_onnx_metadata(onnx_file):
    """An ONNX file has classes, size, crop and normalisation as metadata."""
    entries = onnxruntime.InferenceSession(onnx_file).get_modelmeta().custom_metadata_map
    assert {key: json.loads(value) for key, value in entries.items()} == {**METADATA, 'model': 'xcit_test'}


@pytest.mark.parametrize(('format_name', 'load', 'keyword'), [
    ('torchscript', torch.jit.load, '_extra_files'), ('torch-export', torch.export.load, 'extra_files')])
def test_torch_metadata(export_shallow, format_name, load, keyword):
    """Files of PyTorch's two formats have the metadata as an extra file."""
    extra = {'metadata.json': ''}
    load(export_shallow(NANO, format_name, dynamic=False), **{keyword: extra})
    assert json.loads(extra['metadata.json']) == METADATA


# ----- mistakes

def refused(weights: Path, format_name: str, output: Path, *more: str) -> str:
    """Assert that the command is refused in one line without a file, and return the line."""
    before = sorted(output.parent.iterdir()) if output.parent.is_dir() else None
    with pytest.raises(InputError) as caught:
        main(flags(weights, format_name, output, *more))
    assert '\n' not in str(caught.value)
    assert before is None or sorted(output.parent.iterdir()) == before
    return str(caught.value)


@pytest.mark.parametrize(('format_name', 'name', 'allowed'), [
    ('onnx', 'nano.pt', '.onnx'), ('torchscript', 'nano', '.pt '), ('torch-export', 'nano.pt', '.pt2')])
def test_wrong_suffix(weights, tmp_path, format_name, name, allowed):
    """A wrong suffix is refused with the suffix of the format."""
    message = refused(weights, format_name, tmp_path / name)
    assert message.startswith('--output')
    assert f'must end in {allowed}' in message


def test_missing_directory(weights, tmp_path):
    """A missing directory is refused before the weights are read."""
    message = refused(weights, 'torchscript', tmp_path / 'missing' / 'nano.pt', '--pretrained', 'missing.pth')
    assert 'is in no directory' in message


def test_directory_as_output(weights, tmp_path):
    """A directory as output is refused."""
    (tmp_path / 'nano.pt').mkdir()
    assert 'is a directory' in refused(weights, 'torchscript', tmp_path / 'nano.pt')


def test_images_of_one_patch_are_not_dynamic(weights, tmp_path):
    """--dynamic with images of one patch is refused, because torch.export specialises on one token."""
    message = refused(weights, 'torch-export', tmp_path / 'nano.pt2', '--dynamic', '--input-size', '8')
    assert message.startswith('--input-size 8: must be above 8 with --dynamic')


def test_dynamic_is_for_xcit(weights, tmp_path):
    """--dynamic with another model than XCiT is refused."""
    torch.save(seeded_model('resnet10t').state_dict(), tmp_path / 'resnet10t.pth')
    message = refused(weights, 'torchscript', tmp_path / 'resnet.pt', '--dynamic', '--model', 'resnet10t',
                      '--pretrained', str(tmp_path / 'resnet10t.pth'))
    assert message.startswith('--dynamic')


def test_flags_without_effect_are_not_offered(weights, tmp_path):
    """--device is unknown: export runs on the CPU in float32."""
    assert '--device' in refused(weights, 'torchscript', tmp_path / 'nano.pt', '--device', 'cpu')


@pytest.mark.parametrize('package', ['onnx', 'onnxscript', 'onnxruntime'])
def test_missing_package(weights, tmp_path, monkeypatch, package):
    """--format onnx without a package is refused with the command that installs it."""
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    message = refused(weights, 'onnx', tmp_path / 'nano.onnx')
    assert message.startswith(f'--format onnx: needs {package}: ')
    assert message.endswith(': pip install -r requirements-export.txt')


def run_without_onnx(*argv: str) -> tuple:
    """Run the program without the three packages; return exit code, stdout and stderr."""
    program = ('import sys; sys.modules.update(onnx=None, onnxscript=None, onnxruntime=None)\n'
               'from run import commandline\nfrom tools.export import main\ncommandline.run_program(main)')
    return finish(start(['-c', program, *argv], 1))[0]


def test_missing_package_is_one_line(weights, tmp_path):
    """The program without a package ends with exit code 2 and one line, without a file."""
    code, _, err = run_without_onnx(*flags(weights, 'onnx', tmp_path / 'nano.onnx'))
    assert code == 2
    assert err.splitlines() == [err.rstrip('\n')]
    assert list(tmp_path.iterdir()) == []


def test_other_formats_need_no_onnx(weights, tmp_path):
    """TorchScript is exported without the three packages, and stderr is empty."""
    output = tmp_path / 'nano.pt'
    code, _, err = run_without_onnx(*flags(weights, 'torchscript', output))
    assert (code, err) == (0, '')
    assert output.exists()


def test_full_disk(weights, tmp_path):
    """A full disk ends the export in one line, and leaves no file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 20, hard))
    try:
        with pytest.raises(RunStopped, match=r'nano\.pt can\'t be written \(.*File too large') as caught:
            main(flags(weights, 'torchscript', tmp_path / 'nano.pt'))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []
