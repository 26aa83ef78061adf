"""Cross-covariance attention: both forms compute the same, in every dtype and at every size."""
from typing import Optional

import pytest
import torch
import torch.nn.functional as F
from conftest import seeded_images, seeded_model

import xca_gram
import xcit
from xca import XCA

SHAPES = [(2, 7, 24), (1, 1, 24), (3, 24, 24), (2, 500, 24), (1, 301, 48)]  # B, N, C: N < C, N = 1, N = C, N > C


def attention(dim: int, form: str, *, seed: int = 0, **kwargs) -> XCA:
    """Build XCA with 4 heads and random weights, biases and temperatures."""
    torch.manual_seed(seed)
    module = XCA(dim, 4, **kwargs)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=.3)
    module.form = form
    return module


def pair(dim: int, **kwargs):
    """Return the same module in both forms."""
    return attention(dim, 'plain', **kwargs), attention(dim, 'gram', **kwargs)


def tokens(kind: str, shape) -> torch.Tensor:
    """Return tokens as from a LayerNorm, or a harder kind."""
    torch.manual_seed(1)
    x = torch.randn(shape)
    if kind == 'outliers':
        x[..., :2] *= 50
        x[..., 3] += 50
    elif kind == 'constant channels':
        x[..., :4] = torch.tensor([0., 50., -3., 1e-3])
    elif kind == 'equal tokens':
        x = x[:, :1].expand(shape).contiguous()
    elif kind == 'nearly equal tokens':
        x = x[:, :1] + 1e-3 * x
    elif kind == 'zeros':
        x = torch.zeros(shape)
    return x


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference, as a fraction of b's largest element."""
    return ((a - b).abs().max() / b.abs().max()).item()


def results(module: XCA, x: torch.Tensor, *, dtype: Optional[torch.dtype] = None) -> dict:
    """Return the output, under autocast to `dtype` if given, and all gradients of a loss with unequal weights."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
        y = module(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=x.device).sin().view(y.shape)
    (y.double() * weights).sum().backward()
    return {'output': y.detach(), 'x': x.grad, **{name: p.grad.clone() for name, p in module.named_parameters()}}


@pytest.mark.parametrize(
    'kind', ['normal', 'outliers', 'constant channels', 'equal tokens', 'nearly equal tokens', 'zeros'])
@pytest.mark.parametrize('shape', SHAPES)
@torch.no_grad()
def test_gram_equals_plain(shape, kind):
    """Both forms agree to 1e-5 of the largest output in float32, also for outlier channels and equal tokens."""
    plain, gram = pair(shape[2])
    x = tokens(kind, shape)
    assert largest_difference(gram(x), plain(x)) < 1e-5


@pytest.mark.parametrize('kind', ['normal', 'outliers', 'constant channels'])
@pytest.mark.parametrize('shape', SHAPES)
def test_gradients_of_gram_equal_plains(shape, kind):
    """Gradients of tokens and all parameters agree in float64."""
    plain, gram = (module.double() for module in pair(shape[2]))
    x = tokens(kind, shape).double()
    expected = results(plain, x)
    for name, value in results(gram, x).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-8 * float(expected[name].abs().max() + 1))


def test_gradients_of_dead_channels():
    """Channels of q or k that are 0 in all tokens have finite gradients, equal in both forms."""
    gradients = []
    for module in pair(24):
        with torch.no_grad():
            module.qkv.weight[[3, 30]] = 0.
            module.qkv.bias[[3, 30]] = 0.
        gradients.append(results(module.double(), tokens('normal', (2, 60, 24)).double()))
    for name, expected in gradients[0].items():
        assert gradients[1][name].isfinite().all()
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-6, atol=1e-8)


def test_gradients_of_gram_in_float32():
    """The error against float64 is at most ten times that of the plain form."""
    plain, gram = pair(48)
    x = tokens('outliers', (2, 300, 48))
    exact = results(attention(48, 'plain').double(), x.double())
    by_plain, by_gram = results(plain, x), results(gram, x)
    for name, value in exact.items():
        distance = largest_difference(by_plain[name], value)
        assert largest_difference(by_gram[name], value) < max(1e-5, 10 * distance), name


@torch.no_grad()
def test_plain_does_not_overflow_in_float16():
    """Sums over many large tokens are above float16's range; their means are not."""
    module = attention(48, 'plain')
    x = 30 * tokens('normal', (1, 2000, 48))
    with torch.autocast('cpu', torch.float16):
        y = module(x)
    assert largest_difference(y.double(), attention(48, 'plain').double()(x.double())) < .02


@torch.no_grad()
def test_plain_does_not_underflow_in_float16():
    """Means of products of small queries and keys are below float16's range; their cosines are not."""
    module, exact = attention(48, 'plain'), attention(48, 'plain').double()
    for m in (module, exact):
        m.qkv.weight[:96] *= 1e-4
        m.qkv.bias[:96] *= 1e-4
    x = tokens('normal', (1, 500, 48))
    with torch.autocast('cpu', torch.float16):
        y = module(x)
    assert largest_difference(y.double(), exact(x.double())) < .005


@pytest.mark.parametrize('form', ['plain', 'gram'])
def test_equation_4(form):
    """Both forms compute equation 4, written with torch's own normalize."""
    module, x = attention(24, form).double(), tokens('normal', (2, 60, 24)).double()
    q, k, v = module.qkv(x).reshape(2, 60, 3, 4, 6).permute(2, 0, 3, 4, 1)
    cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    expected = (cosines * module.temperature).softmax(dim=-1) @ v
    expected = module.proj(expected.permute(0, 3, 1, 2).reshape(2, 60, 24))
    torch.testing.assert_close(module(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize('form', ['plain', 'gram'])
@torch.no_grad()
def test_without_bias(form):
    """qkv_bias=False equals a bias of zeros."""
    module, other = attention(24, form, qkv_bias=False), attention(24, form)
    other.load_state_dict({**module.state_dict(), 'qkv.bias': torch.zeros(72)})
    x = tokens('normal', (2, 60, 24))
    torch.testing.assert_close(module(x), other(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(('N', 'grad', 'expected'), [
    (47, True, False), (48, True, True), (59, False, False), (60, False, True)])
def test_auto_follows_the_measured_rule(N, grad, expected):
    """CPUs use the Gram form from 2 C tokens on in training, from 2.5 C on in inference."""
    with torch.set_grad_enabled(grad):
        assert xca_gram.applies(attention(24, 'auto'), torch.zeros(1, N, 24)) == expected


def test_auto_under_autocast():
    """Half precision uses the plain form for any number of tokens, since the Gram form needs sums in float32."""
    x = torch.zeros(1, 1000, 24)
    with torch.autocast('cpu', torch.bfloat16):
        assert not xca_gram.applies(attention(24, 'auto'), x)
    assert not xca_gram.applies(attention(24, 'gram').bfloat16(), x.bfloat16())
    assert xca_gram.applies(attention(24, 'auto'), x)


@pytest.mark.parametrize('size', [64, 512])
def test_shapes_without_data(size):
    """Models on the meta device compute shapes, in either form."""
    model = xcit.xcit_nano_12_p16().to('meta')
    assert model(torch.zeros(2, 3, size, size, device='meta')).shape == (2, 1000)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('form', ['plain', 'gram'])
@torch.no_grad()
def test_module_in_half_precision(form, dtype):
    """Weights and tokens in half precision, without autocast, give outputs of this dtype and close values."""
    module, x = attention(48, form), tokens('normal', (2, 300, 48))
    expected = module(x)
    actual = module.to(dtype)(x.to(dtype))
    assert actual.dtype == dtype
    assert largest_difference(actual.float(), expected) < .05


@pytest.mark.parametrize('form', ['plain', 'gram'])
@torch.no_grad()
def test_float64_under_autocast(form):
    """Float64 stays float64 under autocast, in both forms."""
    module, x = attention(24, form).double(), tokens('normal', (2, 60, 24)).double()
    expected = module(x)
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize('grad', [True, False])
def test_other_layers_in_place_of_qkv_are_called(grad):
    """Adapters, which are more than a weight and a bias, are called, since the plain form is used."""
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    module, x = attention(24, 'gram'), tokens('normal', (2, 60, 24))
    linear = module.qkv
    module.qkv = Doubled(24, 72)
    module.qkv.load_state_dict(linear.state_dict())
    other = attention(24, 'plain')
    with torch.no_grad():
        other.qkv.weight.mul_(2)
        other.qkv.bias.mul_(2)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(module(x), other(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('name', 'shape'), [('qkv', (2, 60, 72)), ('proj', (2, 60, 24))])
@torch.no_grad()
def test_hooks_of_layers_are_called(name, shape):
    """Hooks of `qkv` and `proj` are called with form 'gram' as well."""
    module, x = attention(24, 'gram'), tokens('normal', (2, 60, 24))
    expected = module(x)
    seen = []
    module.get_submodule(name).register_forward_hook(lambda layer, args, output: seen.append(output))
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
    assert [output.shape for output in seen] == [shape]


@torch.no_grad()
def test_projection_without_bias():
    """A projection whose bias was removed works."""
    module, x = attention(24, 'gram'), tokens('normal', (2, 60, 24))
    expected = module(x) - module.proj.bias
    module.proj.bias = None
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)


def test_torch_func_transforms():
    """Gradients per input by torch.func add up to those of autograd, in either form."""
    for module in pair(24):
        x = tokens('normal', (3, 60, 24))
        weights = {key: value.detach() for key, value in module.named_parameters()}

        def loss(weights, x, module=module):
            return torch.func.functional_call(module, weights, (x,)).square().sum()

        gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x[:, None])
        module(x).square().sum().backward()
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient.sum(dim=0), module.get_parameter(key).grad, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_model_computes_the_same_in_every_form():
    """`xca_form` reaches all blocks, and the logits stay the same."""
    model, images = seeded_model('xcit_tiny_12_p8').eval(), seeded_images(2, 3, 96, 72)
    logits = {}
    for form in xca_gram.FORMS:
        model.xca_form = form
        assert model.xca_form == form
        assert {block.attn.form for block in model.blocks} == {form}
        logits[form] = model(images)
    for form in ('plain', 'gram'):
        torch.testing.assert_close(logits[form], logits['auto'], rtol=1e-5, atol=1e-5)


def test_unknown_form_is_refused():
    """An unknown `xca_form` is refused with the value and the allowed values."""
    with pytest.raises(ValueError, match=r"'fast' is not one of .*gram"):
        seeded_model('xcit_nano_12_p16').xca_form = 'fast'


def test_attention_dropout_works_in_both_forms():
    """Dropout of attention weights draws the same random numbers in both forms."""
    outputs = []
    for module in pair(24, attn_drop=.5):
        torch.manual_seed(0)
        outputs.append(module.train()(tokens('normal', (2, 60, 24))))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
    assert not torch.allclose(outputs[0], attention(24, 'plain')(tokens('normal', (2, 60, 24))))
