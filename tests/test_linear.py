"""linear.py: the same numbers from both libraries, wherever a model takes them."""
import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import seeded_images, seeded_model
from torch.utils.flop_counter import FlopCounterMode

import inference
import linear as linear_layer
import mlp
import xca
import xcit
from linear import linear

ONEDNN = linear_layer.has_onednn()


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.skipif(not ONEDNN, reason='needs oneDNN'))],
                ids=['mkl', 'onednn'])
def onednn(request, monkeypatch) -> bool:
    """Whether oneDNN is preferred, and then for products of any size."""
    monkeypatch.setattr(linear_layer, '_prefers_onednn', lambda: request.param)
    monkeypatch.setattr(linear_layer, 'LEAST', 0)
    torch._dynamo.reset()
    return request.param


def tensors(dtype=torch.float32, *, x=(2, 5, 8), channels=6):
    torch.manual_seed(0)
    weight, bias = torch.randn(channels, x[-1], dtype=dtype), torch.randn(channels, dtype=dtype)
    return torch.randn(x, dtype=dtype), weight, bias


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('shape', [(2, 5, 8), (7, 8), (1, 8), (0, 8)])
@pytest.mark.parametrize('has_bias', [True, False])
def test_linear(onednn, shape, dtype, has_bias):
    """With GELU, with a residual, or neither; its inputs stay as they are."""
    x, weight, bias = tensors(dtype, x=shape)
    bias = bias if has_bias else None
    residual = torch.randn(*shape[:-1], 6, dtype=dtype)
    before = copy.deepcopy((x, weight, bias, residual))
    expected = F.linear(x, weight, bias)
    torch.testing.assert_close(linear(x, weight, bias), expected)
    torch.testing.assert_close(linear(x, weight, bias, gelu=True), F.gelu(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear(x, weight, bias, residual), residual + expected)
    for now, then in zip((x, weight, bias, residual), before):
        torch.testing.assert_close(now, then, rtol=0, atol=0)


@pytest.mark.parametrize('lay', [lambda t: t, lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
                                 lambda t: torch.stack((t, t), dim=-1)[..., 0]], ids=['rows', 'columns', 'strided'])
def test_memory_layouts(onednn, lay):
    """Tokens, weights and residuals may lie in memory as they like."""
    x, weight, bias = tensors(x=(5, 8))
    residual = torch.randn(5, 6)
    torch.testing.assert_close(linear(lay(x), lay(weight), bias, lay(residual)), residual + F.linear(x, weight, bias))


def test_gradients(onednn):
    """First and second derivatives, and those of one of the inputs alone."""
    inputs = [t.requires_grad_() for t in tensors(torch.float64)]
    assert torch.autograd.gradcheck(linear, inputs)
    assert torch.autograd.gradgradcheck(linear, inputs)
    x, weight, bias = tensors()
    for i in range(3):
        wanted = [t.clone().requires_grad_(i == j) for j, t in enumerate((x, weight, bias))]
        actual, = torch.autograd.grad(linear(*wanted).square().sum(), wanted[i])
        expected, = torch.autograd.grad(F.linear(*wanted).square().sum(), wanted[i])
        torch.testing.assert_close(actual, expected)


def test_several_gradients_at_once(onednn):
    """As jacobians take them, by vmap over the backward pass."""
    x, weight, bias = tensors(x=(2, 8))

    def jacobian(function):
        return torch.autograd.functional.jacobian(lambda x: function(x, weight, bias), x, vectorize=True)

    torch.testing.assert_close(jacobian(linear), jacobian(F.linear))


def test_operations_are_counted(onednn):
    """By torch's counter, like those of any linear layer."""
    x, weight, bias = (t.requires_grad_() for t in tensors())
    with FlopCounterMode(display=False) as counter:
        linear(x, weight, bias).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 10 * 8 * 6


@pytest.mark.filterwarnings('ignore')  # tracing is deprecated
@pytest.mark.skipif(not ONEDNN, reason='needs oneDNN')
def test_where_it_is_faster(monkeypatch):
    """On AMD's processors, in float32; not under autocast, in transforms, in traces and exports."""
    x = torch.zeros(1, 8)
    monkeypatch.setattr(linear_layer, '_prefers_onednn', lambda: False)
    assert not linear_layer.is_faster(x)
    monkeypatch.setattr(linear_layer, '_prefers_onednn', lambda: True)
    assert linear_layer.is_faster(x)
    assert not linear_layer.is_faster(x.double())
    assert not linear_layer.is_faster(x.to('meta'))
    with torch.autocast('cpu', torch.bfloat16):
        assert not linear_layer.is_faster(x)
    assert not torch.func.vmap(lambda row: row + linear_layer.is_faster(row))(x).any()
    module = mlp.Mlp(8, 16)
    assert 'xcit::' not in str(torch.jit.trace(module, x).inlined_graph)
    assert 'xcit.linear' not in str(torch.export.export(module, (x,)).graph)


@pytest.mark.parametrize('cpuinfo', [None, 'vendor_id\t: GenuineIntel\n', 'vendor_id\t: AuthenticAMD\n'])
def test_preference_by_processor(monkeypatch, cpuinfo):
    """Where the system tells that it is AMD's, and torch has oneDNN."""
    def read_text(path):
        if cpuinfo is None:
            raise FileNotFoundError
        return cpuinfo

    monkeypatch.setattr(linear_layer.Path, 'read_text', read_text)
    prefers = linear_layer._prefers_onednn.__wrapped__
    assert prefers() == (ONEDNN and cpuinfo is not None and 'AMD' in cpuinfo)
    monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: False)
    assert not prefers()


@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('form', ['plain', 'gram'])
def test_training(onednn, monkeypatch, form, compiled):
    """A model's output and gradients are those in float64, to float32's digits; one image, for the Gram form."""
    if not compiled:
        monkeypatch.setitem(mlp.PIECE, 'cpu', 1000)
    torch.manual_seed(0)
    model = xcit.Xcit(embed_dim=32, num_heads=4, depth=1, num_classes=10).eval()
    model.xca_form = form
    exact, images = copy.deepcopy(model).double(), seeded_images(1, 3, 96, 80)
    results = []
    for m, x in ((exact, images.double()), (model, images)):
        y = (torch.compile(m, backend='aot_eager', fullgraph=True) if compiled else m)(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(m.parameters()))])
    for expected, actual in zip(*results):
        assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-6


@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('form', ['plain', 'gram'])
@torch.no_grad()
def test_inference(onednn, form, compiled):
    """A model in eval mode and a fused one, eager and compiled, compute what the layers do one after the other."""
    model = seeded_model('xcit_nano_12_p16', depth=2).eval()
    model.xca_form = form
    images = seeded_images(2, 3, 96, 80)
    expected = copy.deepcopy(model).double()(images.double()).float()
    fused = inference.fuse(copy.deepcopy(model))
    for m in (model, fused):
        actual = (torch.compile(m, backend='aot_eager', fullgraph=True) if compiled else m)(images)
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.skipif(not ONEDNN, reason='needs oneDNN')
@pytest.mark.parametrize('training', [True, False])
def test_models_take_it(monkeypatch, training):
    """All linear layers of the blocks: forward, and for the tokens' gradients."""
    calls = []

    def by_onednn(*args):
        calls.append(args)
        return linear_layer.by_blas(*args)

    monkeypatch.setattr(linear_layer, '_prefers_onednn', lambda: True)
    monkeypatch.setattr(linear_layer, 'LEAST', 0)
    monkeypatch.setattr(linear_layer, 'by_onednn', by_onednn)
    module = xcit.XCABlock(32, 4, mlp_ratio=4, qkv_bias=True, drop=0, attn_drop=0, drop_path=0, eta=1)
    model = xcit.Xcit(embed_dim=32, num_heads=4, depth=1)
    x = torch.randn(1, 16, 32, requires_grad=training)
    if training:
        module(x, 4, 4).sum().backward()
    else:
        inference.fuse(model.eval()).blocks[0](x, 4, 4)
    assert len(calls) == (8 if training else 4)


def test_hooks_are_called(onednn):
    """A layer that somebody listens to, or that is an adapter, is called."""
    module, seen = xca.XCA(16, 2), []
    module.proj.register_forward_hook(lambda *args: seen.append(args))
    module(torch.randn(1, 5, 16))
    assert len(seen) == 1
