"""TorchScript, traces, exports and ONNX of a model as created: the same outputs, at every size."""
import io
import warnings

import pytest
import torch
from conftest import seeded_images, shallow_xcit

import xcit

# For 32 channels: one token, some (plain form) and many (Gram form, where it applies)
SIZES = [(8, 8), (33, 47), (96, 80)]


def script(model, images):
    return torch.jit.script(model)


def trace(model, images):
    return torch.jit.trace(model, images, check_trace=False)


def export(model, images):
    return torch.export.export(model, (images,)).module()


def onnx(model, images, *, dynamo=False):
    onnxruntime = pytest.importorskip('onnxruntime')
    file = io.BytesIO()
    if dynamo:
        torch.onnx.export(model, (images,), dynamo=True, verbose=False).save(file)
    else:
        torch.onnx.export(model, (images,), file, dynamo=False, input_names=['images'])
    session = onnxruntime.InferenceSession(file.getvalue(), providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def onnx_by_dynamo(model, images):
    return onnx(model, images, dynamo=True)


def difference(record, model, size) -> float:
    """Return the largest difference between logits of the graph and the model, in units of the largest logit."""
    images = seeded_images(1, 3, *size)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of deprecation, and of Python in the graph
        recorded = record(model, images)
    expected = model(images)
    return float((recorded(images) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('record', [script, trace, export, onnx, onnx_by_dynamo])
@torch.no_grad()
def test_graph_computes_the_same(record, size):
    """The graph, recorded at one size, has the model's outputs at this size."""
    assert difference(record, shallow_xcit(), size) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize('size', [(8, 8), (480, 640), (1600, 1600)])
@pytest.mark.parametrize('record', [script, trace, export, onnx, onnx_by_dynamo])
@torch.no_grad()
def test_graph_of_a_published_model_computes_the_same(record, size):
    """Large images work; with work in pieces, the older ONNX exporter crashed."""
    torch.manual_seed(0)
    assert difference(record, xcit.xcit_small_12_p8().eval(), size) < 1e-4
