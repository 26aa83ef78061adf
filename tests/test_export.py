"""python -m tools.export"""
import json
import subprocess
import sys

import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT, seeded_images, seeded_model

import xcit
from tools.export import main
from utils import InputError, RunStopped

SIZES = [(1, 64, 64), (3, 65, 97), (2, 40, 33)]  # B, img_h, img_w


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """Files of weights by the model's name."""
    folder = tmp_path_factory.mktemp('weights')
    for name in ('xcit_nano_12_p16', 'xcit_tiny_12_p8'):
        torch.save({'model': seeded_model(name, num_classes=5).state_dict(), 'classes': list('abcde')},
                   folder / f'{name}.pth')
    return folder


def export(weights, output, *words, name='xcit_nano_12_p16', size='64'):
    return main(['--model', name, '--pretrained', str(weights / f'{name}.pth'), '--input-size', size, '--output',
                 str(output), *words])


def assert_same_outputs(function, name: str, sizes: list):
    model = seeded_model(name, num_classes=5).eval()
    for batch, height, width in sizes:
        images = seeded_images(batch, 3, height, width)
        with torch.no_grad():
            torch.testing.assert_close(function(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', ['xcit_nano_12_p16', 'xcit_tiny_12_p8'])  # both patch sizes, both tokens_norm
def test_onnx_at_several_sizes(weights, tmp_path, name):
    """One --dynamic file gives the model's logits at any batch, height and width."""
    path = export(weights, tmp_path / 'm.onnx', '--format', 'onnx', '--dynamic', name=name)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    assert session.get_inputs()[0].shape == ['batch', 3, 'height', 'width']
    assert_same_outputs(lambda images: torch.from_numpy(session.run(None, {'images': images.numpy()})[0]), name, SIZES)


def test_onnx_of_fixed_size(weights, tmp_path):
    """Without --dynamic the file has one shape, with a checked model in it, and no BatchNorm in the stem."""
    path = export(weights, tmp_path / 'm.onnx', '--format', 'onnx', '--batch-size', '2')
    graph = onnx.load(path)
    onnx.checker.check_model(graph, full_check=True)
    assert [d.dim_value for d in graph.graph.input[0].type.tensor_type.shape.dim] == [2, 3, 64, 64]
    assert sum(node.op_type == 'BatchNormalization' for node in graph.graph.node) <= 12  # those of the 12 LPIs


def test_torchscript(weights, tmp_path):
    """A TorchScript file takes any size."""
    path = export(weights, tmp_path / 'm.pt', '--format', 'torchscript')
    assert_same_outputs(torch.jit.load(path), 'xcit_nano_12_p16', SIZES)


def test_torch_export(weights, tmp_path):
    """So does a --dynamic file of torch.export."""
    path = export(weights, tmp_path / 'm.pt2', '--format', 'torch-export', '--dynamic')
    assert_same_outputs(torch.export.load(path).module(), 'xcit_nano_12_p16', SIZES)


def test_torch_export_of_fixed_size(weights, tmp_path):
    """Without --dynamic it takes the shape that was asked for."""
    path = export(weights, tmp_path / 'm.pt2', '--format', 'torch-export', '--batch-size', '2')
    assert_same_outputs(torch.export.load(path).module(), 'xcit_nano_12_p16', [(2, 64, 64)])


def metadata_of(path) -> dict:
    if path.suffix == '.onnx':
        return json.loads({entry.key: entry.value for entry in onnx.load(path).metadata_props}['xcit'])
    files = {'xcit': ''}
    (torch.jit if path.suffix == '.pt' else torch.export).load(path, **{
        '_extra_files' if path.suffix == '.pt' else 'extra_files': files})
    return json.loads(files['xcit'])


@pytest.mark.parametrize('suffix', ['.onnx', '.pt', '.pt2'])
def test_what_a_user_needs_is_in_the_file(weights, tmp_path, suffix):
    """Model, classes, resolution, crop and normalisation can be read back."""
    name = {'.onnx': 'onnx', '.pt': 'torchscript', '.pt2': 'torch-export'}[suffix]
    found = metadata_of(export(weights, tmp_path / f'm{suffix}', '--format', name))
    assert (found['model'], found['classes'], found['input_size']) == ('xcit_nano_12_p16', list('abcde'), 64)
    assert found['crop'] == 1.
    assert len(found['mean']) == len(found['std']) == 3


@pytest.mark.parametrize('name', ['xcit_nano_12_p16', 'xcit_tiny_12_p8'])
@torch.no_grad()
def test_fused_stem_is_the_same(name):
    """The folded BatchNorms change nothing, and the model itself keeps them."""
    model, images = seeded_model(name).eval(), seeded_images(2, 3, 48, 65)
    fused = xcit.fuse_stem(model)
    torch.testing.assert_close(fused(images), model(images), rtol=1e-5, atol=1e-5)
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in fused.patch_embed.modules())
    assert any(isinstance(part, torch.nn.BatchNorm2d) for part in model.patch_embed.modules())


def test_nothing_is_kept_beyond_the_tolerance(weights, tmp_path):
    """A file whose outputs differ more than allowed is not written, and an older one stays."""
    (tmp_path / 'm.pt').write_text('older')
    with pytest.raises(RunStopped, match=r'differs by .* more than --tolerance'):
        export(weights, tmp_path / 'm.pt', '--format', 'torchscript', '--tolerance', '0')
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {'m.pt': 'older'}


@pytest.mark.parametrize(('words', 'output', 'message'), [
    (['--format', 'onnx'], 'm.pt', r'm\.pt: must end in \.onnx for --format onnx'),
    (['--format', 'torchscript'], 'none/m.pt', 'its folder is missing'),
    (['--format', 'torchscript', '--dynamic'], 'm.pt', 'take any size without it'),
    (['--format', 'onnx', '--dynamic', '--batch-size', '2'], 'm.onnx', 'has no effect'),
    (['--format', 'tflite'], 'm.pt', 'invalid choice'),
])
def test_bad_input(weights, tmp_path, words, output, message):
    """One line, before anything is read."""
    with pytest.raises(InputError, match=message):
        export(weights, tmp_path / output, *words)


def test_missing_package(weights, tmp_path):
    """Without onnxruntime the line to install it is printed, with exit code 2."""
    code = ('import sys, utils\nsys.modules["onnxruntime"] = None\nfrom tools.export import main\n'
            'utils.run_program(main)')
    flags = ['--format', 'onnx', '--output', tmp_path / 'm.onnx', '--pretrained', weights / 'xcit_nano_12_p16.pth']
    done = subprocess.run([sys.executable, '-c', code, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert 'needs onnxruntime; pip install -r requirements-export.txt' in done.stderr
