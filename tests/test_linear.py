"""xcit_linear.py: both libraries compute the same in every use by a model."""
import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from conftest import seeded_images
from torch.utils.flop_counter import FlopCounterMode

import xcit
import xcit_fuse
import xcit_linear
from xcit_linear import linear

ONEDNN = xcit_linear.has_onednn()


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.skipif(not ONEDNN, reason='needs oneDNN'))],
                ids=['mkl', 'onednn'])
def onednn(request, monkeypatch) -> bool:
    """Preference for oneDNN, then for products of any size."""
    monkeypatch.setattr(xcit_linear, 'is_amd_with_onednn', lambda: request.param)
    monkeypatch.setattr(xcit_linear, 'LEAST', 0)
    torch._dynamo.reset()
    return request.param


def tensors(dtype=torch.float32, *, x=(2, 5, 8), channels=6):
    torch.manual_seed(0)
    weight, bias = torch.randn(channels, x[-1], dtype=dtype), torch.randn(channels, dtype=dtype)
    return torch.randn(x, dtype=dtype), weight, bias


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('shape', [(2, 5, 8), (7, 8), (1, 8), (0, 8)])
@pytest.mark.parametrize('has_bias', [True, False])
@torch.no_grad()
def test_linear(onednn, shape, dtype, has_bias):
    """Products with GELU, with a residual, or without both are right; the inputs are unchanged."""
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
@torch.no_grad()
def test_memory_layouts(onednn, lay):
    """Tokens, weights and residuals of any memory layout work."""
    x, weight, bias = tensors(x=(5, 8))
    residual = torch.randn(5, 6)
    torch.testing.assert_close(linear(lay(x), lay(weight), bias, lay(residual)), residual + F.linear(x, weight, bias))


def test_gradients(onednn):
    """First and second derivatives are right, for all inputs and for one input alone."""
    inputs = [t.requires_grad_() for t in tensors(torch.float64)]
    assert torch.autograd.gradcheck(linear, inputs)
    assert torch.autograd.gradgradcheck(linear, inputs)
    x, weight, bias = tensors()
    for i in range(3):
        wanted = [t.clone().requires_grad_(i == j) for j, t in enumerate((x, weight, bias))]
        derivatives = []
        for function in (linear, F.linear):
            first, = torch.autograd.grad(function(*wanted).pow(3).sum(), wanted[i], create_graph=True)
            derivatives.append((first, *torch.autograd.grad(first.square().sum(), wanted[i])))
        for actual, expected in zip(*derivatives):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-2)


def test_several_gradients_at_once(onednn):
    """Jacobians by vmap over the backward pass are right."""
    x, weight, bias = tensors(x=(2, 8))

    def jacobian(function):
        return torch.autograd.functional.jacobian(lambda x: function(x, weight, bias), x, vectorize=True)

    torch.testing.assert_close(jacobian(linear), jacobian(F.linear))


def test_operations_are_counted(onednn):
    """torch's FLOP counter counts the operations of a linear layer."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear(*tensors())
    assert counter.get_total_flops() == 2 * 10 * 8 * 6


@pytest.mark.filterwarnings('ignore')  # tracing is deprecated
@pytest.mark.skipif(not ONEDNN, reason='needs oneDNN')
@torch.no_grad()
def test_uses_of_onednn(monkeypatch):
    """oneDNN is for AMD, in float32; not under autocast, for derivatives, in transforms, traces and exports."""
    def uses_onednn(x):
        return xcit_linear.by_onednn_is_faster(x, weight)

    x, weight, _ = tensors(x=(1, 8))
    monkeypatch.setattr(xcit_linear, 'is_amd_with_onednn', lambda: True)
    assert not uses_onednn(x)  # too small
    monkeypatch.setattr(xcit_linear, 'LEAST', 0)
    assert uses_onednn(x)
    assert not uses_onednn(x.double())
    assert not uses_onednn(x.to('meta'))
    with torch.autocast('cpu', torch.bfloat16):
        assert not uses_onednn(x)
    with torch.enable_grad():
        assert not uses_onednn(x)
    assert not torch.func.vmap(lambda row: row + uses_onednn(row))(torch.zeros(1, 8)).any()
    layer = xcit_fuse.FusedLinear(torch.nn.Linear(8, 16))
    assert 'xcit::' not in str(torch.jit.trace(layer, x).inlined_graph)
    assert 'xcit.linear' not in str(torch.export.export(layer, (x,)).graph)
    monkeypatch.setattr(xcit_linear, 'is_amd_with_onednn', lambda: False)
    assert not uses_onednn(x)


@pytest.mark.parametrize('cpuinfo', [None, 'vendor_id\t: GenuineIntel\n', 'vendor_id\t: AuthenticAMD\n'])
def test_preference_by_processor(monkeypatch, cpuinfo):
    """oneDNN is preferred on AMD processors, if torch has oneDNN."""
    def read_text(path):
        if cpuinfo is None:
            raise FileNotFoundError
        return cpuinfo

    monkeypatch.setattr(xcit_linear.Path, 'read_text', read_text)
    prefers = xcit_linear.is_amd_with_onednn.__wrapped__
    assert prefers() == (ONEDNN and cpuinfo is not None and 'AMD' in cpuinfo)
    monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: False)
    assert not prefers()


@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('form', ['plain', 'gram'])
@torch.no_grad()
def test_inference(onednn, form, compiled):
    """A fused model, eager and compiled, agrees with the unfused model in float64."""
    if compiled and not onednn:
        pytest.skip('in test_fuse.py')
    torch.manual_seed(0)
    model = xcit.Xcit(embed_dim=32, num_heads=4, depth=1, num_classes=10).eval()
    model.xca_form = form
    images = seeded_images(2, 3, 96, 80)
    expected = copy.deepcopy(model).double()(images.double()).float()
    fused = xcit_fuse.fuse(copy.deepcopy(model))
    actual = (torch.compile(fused, backend='aot_eager', fullgraph=True) if compiled else fused)(images)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.skipif(not ONEDNN, reason='needs oneDNN')
@torch.no_grad()
def test_models_use_onednn(monkeypatch):
    """All linear layers of a block use oneDNN."""
    calls = []

    def by_onednn(*args):
        calls.append(args)
        return xcit_linear.by_blas(*args)

    monkeypatch.setattr(xcit_linear, 'is_amd_with_onednn', lambda: True)
    monkeypatch.setattr(xcit_linear, 'LEAST', 0)
    monkeypatch.setattr(xcit_linear, 'by_onednn', by_onednn)
    xcit_fuse.fuse(xcit.Xcit(embed_dim=32, num_heads=4, depth=1).eval()).blocks[0](torch.randn(1, 16, 32), 4, 4)
    assert len(calls) == 4


@pytest.mark.skipif(not ONEDNN, reason='needs oneDNN')
@torch.no_grad()
def test_onednn_can_be_switched_off(monkeypatch):
    """torch's own switch disables oneDNN."""
    monkeypatch.setattr(xcit_linear, 'is_amd_with_onednn', lambda: True)
    monkeypatch.setattr(xcit_linear, 'LEAST', 0)
    monkeypatch.setattr(xcit_linear, 'by_onednn', None)
    with torch.backends.mkldnn.flags(enabled=False):
        linear(*tensors())
    with pytest.raises(TypeError):
        linear(*tensors())


@torch.no_grad()
def test_compiled_biases_join_what_follows(monkeypatch):
    """A compiled layer has a product without bias; the bias is added with the operations after it."""
    monkeypatch.setattr(xcit_linear, 'is_amd_with_onednn', lambda: False)
    torch._dynamo.reset()
    layer, x = xcit_fuse.FusedLinear(torch.nn.Linear(16, 64)), torch.randn(2, 50, 16)
    actual, (code,) = torch._inductor.utils.run_and_get_code(torch.compile(layer), x)
    assert code.count('extern_kernels.mm(') == 1
    assert 'addmm' not in code
    torch.testing.assert_close(actual, layer(x))


def test_reloaded():
    """The operation works after a reload of the module."""
    importlib.reload(xcit_linear)
    torch.testing.assert_close(linear(*tensors()), F.linear(*tensors()))


@pytest.mark.parametrize(('device', 'dtype'), [('meta', torch.float32), ('cpu', torch.bfloat16)])
def test_layout_is_for_cpus_in_float32(monkeypatch, device, dtype):
    """Weights on other devices or of other dtypes keep their memory layout."""
    monkeypatch.setattr(xcit_linear, 'is_amd_with_onednn', lambda: True)
    assert xcit_linear.lay_out(torch.zeros(3, 2)).stride() == (1, 3)
    assert xcit_linear.lay_out(torch.zeros(3, 2, device=device, dtype=dtype)).stride() == (2, 1)


@torch.no_grad()
def test_fused_block_takes_strided_tokens():
    """A fused block that is called alone accepts strided tokens."""
    model = xcit_fuse.fuse(xcit.Xcit(embed_dim=32, num_heads=4, depth=1).eval())
    x = torch.randn(2, 32, 12).transpose(1, 2)
    for model.xca_form in ('plain', 'gram'):
        torch.testing.assert_close(model.blocks[0](x, 4, 3), model.blocks[0](x.contiguous(), 4, 3))
