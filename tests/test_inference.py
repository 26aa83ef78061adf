"""Prepared for inference, in pieces or compiled, a model computes what it did."""
import copy
import re

import pytest
import timm
import torch
import torch.nn.utils.prune as prune
from conftest import seeded_images, seeded_model

import inference
import mlp
import xcit

SIZES = [(224, 224), (33, 17), (70, 250), (1, 40)]  # also odd, not square, one row of tokens


def both(name: str, **kwargs):
    """A model in eval mode, and the same one fused."""
    model = seeded_model(name, **kwargs).eval()
    return model, inference.fuse(copy.deepcopy(model))


def assert_same(actual: torch.Tensor, expected: torch.Tensor):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.fixture
def small_pieces(monkeypatch):
    """Everything is done piece by piece: a few tokens, the fewest rows."""
    monkeypatch.setitem(mlp.PIECE, 'cpu', 3000)


# ----- fuse

@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('name', ['xcit_nano_12_p8', 'xcit_tiny_12_p16', 'xcit_tiny_24_p16'])
@torch.no_grad()
def test_fused_equals_unfused(name, size):
    """Logits, all tokens and dense features, to 1e-5 of the largest."""
    model, fused = both(name)
    images = seeded_images(2, 3, *size)
    assert_same(fused(images), model(images))
    assert_same(fused.forward_features(images), model.forward_features(images))
    for actual, expected in zip(fused.forward_intermediates(images, [0, 5, 11], intermediates_only=True),
                                model.forward_intermediates(images, [0, 5, 11], intermediates_only=True)):
        assert_same(actual, expected)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('form', ['plain', 'gram'])
@torch.no_grad()
def test_pieces_equal_the_whole(small_pieces, form, size):
    """Strips of the stem and of LPI, pieces of tokens for attention and MLP: nothing is seen of the seams."""
    model, fused = both('xcit_nano_12_p8')
    xcit.set_xca(fused, form)
    images = seeded_images(3, 3, *size)
    with torch.enable_grad():
        expected = model(images).detach()  # whole
    assert_same(fused(images), expected)


@pytest.mark.parametrize('global_pool', ['avg', ''])
@torch.no_grad()
def test_fused_with_other_pooling(global_pool):
    """Where the head sees the patches, these are computed."""
    model, fused = both('xcit_nano_12_p16', global_pool=global_pool)
    images = seeded_images(1, 3, 64, 64)
    assert_same(fused(images), model(images))


def test_input_gradients_of_a_fused_model():
    """Saliency maps need them: no piece is written in place under autograd."""
    model, fused = both('xcit_nano_12_p16')
    gradients = []
    for m in (model, fused):
        images = seeded_images(1, 3, 64, 64).requires_grad_()
        m(images).square().sum().backward()
        gradients.append(images.grad)
    assert_same(gradients[1], gradients[0])


@torch.no_grad()
def test_fused_model_leaves_its_inputs_alone(small_pieces):
    """A block's output that somebody holds is not changed by the next block."""
    _, fused = both('xcit_nano_12_p8')
    seen = []
    for block in fused.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append((output, output.clone())))
    images = seeded_images(1, 3, 64, 64)
    before = images.clone()
    fused(images)
    assert len(seen) == 12
    assert all(torch.equal(now, then) for now, then in seen)
    assert torch.equal(images, before)


@torch.no_grad()
def test_position_is_kept_for_the_last_grid():
    """It is computed once for a grid, anew for another one, and in float32 whatever autocast does."""
    _, fused = both('xcit_nano_12_p16')
    first = fused.pos_embeder(3, 5)
    assert fused.pos_embeder(3, 5) is first
    assert fused.pos_embeder(5, 3).shape == (1, 128, 5, 3)
    with torch.autocast('cpu', torch.bfloat16):
        assert fused.pos_embeder(5, 3).dtype == torch.float32


@pytest.mark.parametrize('training', [True, False])
def test_refusals(training):
    """A model in training mode has no fixed statistics to fold in; a fused one has nothing left to fold."""
    model = seeded_model('xcit_nano_12_p16').eval()
    inference.fuse(model)
    with pytest.raises(ValueError, match='eval mode' if training else 'fused already'):
        inference.fuse(seeded_model('xcit_nano_12_p16').train() if training else model)


class Adapter(torch.nn.Linear):
    pass


@pytest.mark.parametrize(('name', 'change'), [
    ('blocks.3.mlp.fc2', lambda model: setattr(model.blocks[3].mlp, 'fc2', Adapter(512, 128))),
    ('blocks.0.attn.proj', lambda model: prune.l1_unstructured(model.blocks[0].attn.proj, 'weight', .1)),
    ('patch_embed.proj.2.0', lambda model: prune.l1_unstructured(model.patch_embed.proj[2][0], 'weight', .1)),
    ('blocks.1.local_mp.act', lambda model: setattr(model.blocks[1].local_mp, 'act', torch.nn.ReLU())),
    ('blocks.1.mlp.act', lambda model: setattr(model.blocks[1].mlp, 'act', torch.nn.GELU('tanh'))),
])
def test_changed_layers_are_refused(name, change):
    """What goes into their weights would be missing from the rest of them, or a GELU would take their place."""
    model = seeded_model('xcit_nano_12_p16').eval()
    change(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f'^{re.escape(name)} '):
        inference.fuse(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@torch.no_grad()
def test_no_images():
    """A batch of none gives none."""
    _, fused = both('xcit_nano_12_p16')
    assert fused(torch.zeros(0, 3, 64, 64)).shape == (0, 1000)
    assert fused.forward_features(torch.zeros(0, 3, 64, 64)).shape == (0, 17, 128)


@pytest.mark.filterwarnings('ignore')  # tracing is deprecated, and warns of each size that it takes for fixed
@torch.no_grad()
def test_traced_model_takes_other_numbers_of_images(small_pieces):
    """Pieces for the images that it was traced with are not part of it."""
    _, fused = both('xcit_nano_12_p16')
    traced = torch.jit.trace(fused, seeded_images(1, 3, 64, 64), check_trace=False)
    images = seeded_images(3, 3, 64, 64)
    assert_same(traced(images), fused(images))


@torch.no_grad()
def test_hooks_of_a_fused_models_linear_layers_are_called(small_pieces):
    """Who listens to one of them hears it, in pieces: an image's tokens here are more than one."""
    model, fused = both('xcit_nano_12_p16')
    seen = []
    block = fused.blocks[0]
    for layer in (block.attn.qkv, block.mlp.fc1, fused.cls_attn_blocks[0].attn.qkv):
        layer.register_forward_hook(lambda layer, args, output: seen.append(output.shape))
    images = seeded_images(1, 3, 64, 64)
    assert_same(fused(images), model(images))
    assert seen == [(1, 16, 384), (4, 512), (4, 512), (4, 512), (4, 512), (1, 17, 384)]


@pytest.mark.gpu
@pytest.mark.parametrize(('dtype', 'tolerance'), [(None, 2e-3), (torch.bfloat16, .05), (torch.float16, .01)])
@pytest.mark.parametrize('form', ['plain', 'gram'])
@torch.no_grad()
def test_fused_on_cuda(monkeypatch, form, dtype, tolerance):
    """Piece by piece, in full precision and under autocast, as near to the CPU's float32 as the type allows."""
    monkeypatch.setitem(mlp.PIECE, 'other', 3000)
    model, fused = both('xcit_nano_12_p8')
    xcit.set_xca(fused, form)
    images = seeded_images(2, 3, 70, 250)
    expected = model(images)
    with torch.autocast('cuda', dtype, enabled=dtype is not None):
        actual = fused.cuda()(images.cuda()).float().cpu()
    assert float((actual - expected).abs().max()) < tolerance * float(expected.abs().max())


@torch.no_grad()
def test_fused_under_autocast():
    """In bfloat16 a fused model is as near to float32 as an unfused one."""
    model, fused = both('xcit_nano_12_p8')
    images = seeded_images(2, 3, 96, 96)
    expected = model(images)
    with torch.autocast('cpu', torch.bfloat16):
        errors = [(m(images) - expected).abs().max() for m in (model, fused)]
    assert errors[1] <= 1.5 * errors[0]


@pytest.mark.parametrize('fused', [False, True])
@torch.no_grad()
def test_tokens_are_float32_under_autocast(fused):
    """What the blocks add up keeps its digits, in a fused model as well."""
    models = both('xcit_nano_12_p8')
    with torch.autocast('cpu', torch.bfloat16):
        tokens, = models[fused].forward_intermediates(seeded_images(1, 3, 64, 64), [3], intermediates_only=True)
    assert tokens.dtype == torch.float32


@pytest.mark.parametrize('fused', [False, True])
@torch.no_grad()
def test_model_in_half_precision(fused):
    """A model whose weights are bfloat16 runs as it is, and is near the one in float32."""
    model, images = both('xcit_nano_12_p16')[fused], seeded_images(2, 3, 96, 64)
    expected = model(images)
    actual = model.bfloat16()(images.bfloat16())
    assert actual.dtype == torch.bfloat16
    assert (actual - expected).abs().max() < .1 * expected.abs().max()


# ----- MLP in pieces

@pytest.mark.parametrize('shape', [(2, 50, 16), (1, 1, 16), (7, 16)])
def test_mlp_in_pieces(monkeypatch, shape):
    """Output and gradients are those of the layers one after the other, for tokens of any shape."""
    torch.manual_seed(0)
    module = mlp.Mlp(16, 64)
    results = []
    for size in (2 ** 22, 64 * 3):
        monkeypatch.setitem(mlp.PIECE, 'cpu', size)
        x = torch.linspace(-2, 2, torch.Size(shape).numel()).view(shape).requires_grad_()
        module.zero_grad()
        y = module(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad.clone() for p in module.parameters())])
    for whole, pieces in zip(*results):
        torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)


def test_mlp_in_pieces_is_taken(monkeypatch):
    """Where the hidden activations are above the limit, unless dropout, autocast or a compiler is at work."""
    x = torch.zeros(1, 100, 16)
    assert not mlp.Mlp(16, 64).takes_pieces(x)
    monkeypatch.setitem(mlp.PIECE, 'cpu', 6399)
    assert mlp.Mlp(16, 64).takes_pieces(x)
    assert not mlp.Mlp(16, 64, drop=.1).takes_pieces(x)
    with torch.autocast('cpu', torch.bfloat16):
        assert not mlp.Mlp(16, 64).takes_pieces(x)


@pytest.mark.parametrize('wanted', range(5))
def test_mlp_in_pieces_with_frozen_tensors(wanted):
    """One gradient alone is asked for, of the tokens or of one parameter; its derivative as well."""
    shapes = ((3, 4), (8, 4), (8,), (4, 8), (4,))
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    inputs[wanted].requires_grad_()

    def function(tensor):
        return mlp.PiecewiseMlp.apply(*inputs[:wanted], tensor, *inputs[wanted + 1:])

    assert torch.autograd.gradcheck(function, inputs[wanted])
    assert torch.autograd.gradgradcheck(function, inputs[wanted])


def test_mlp_in_pieces_keeps_nothing_without_gradients(monkeypatch):
    """The hidden activations of all tokens are for the backward pass."""
    monkeypatch.setitem(mlp.PIECE, 'cpu', 64 * 3)
    module, x, lengths = mlp.Mlp(16, 64), torch.zeros(50, 16), []
    monkeypatch.setattr(torch, 'mm', lambda a, b, out: lengths.append(out.untyped_storage().nbytes()) or out.zero_())
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            module(x)
    assert max(lengths[:17]) == 50 * 64 * 4
    assert max(lengths[17:]) == 3 * 64 * 4


def test_second_derivatives_of_mlp_in_pieces():
    """Optimizers that need the gradient's gradient get it."""
    shapes = ((3, 4), (8, 4), (8,), (4, 8), (4,))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(mlp.PiecewiseMlp.apply, inputs)
    assert torch.autograd.gradgradcheck(mlp.PiecewiseMlp.apply, inputs)


# ----- compiled

def small_model() -> xcit.Xcit:
    torch.manual_seed(0)
    return xcit.Xcit(embed_dim=32, num_heads=4, depth=1, num_classes=10)


def test_compiler_sees_one_graph():
    """No graph break in training, with drop-path, in either form of XCA."""
    for form in ('plain', 'gram'):
        model = timm.create_model('xcit_nano_12_p16', num_classes=10, drop_path_rate=.1).train()
        xcit.set_xca(model, form)
        explanation = torch._dynamo.explain(model)(torch.randn(2, 3, 64, 64))
        assert explanation.graph_break_count == 0, explanation.break_reasons
        torch._dynamo.reset()


@pytest.mark.parametrize('form', ['plain', 'gram'])
def test_compiled_training_step(form):
    """Compiled, output and gradients are the eager ones; further steps compile nothing."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = small_model().train()
    xcit.set_xca(model, form)
    images = seeded_images(2, 3, 64, 64)
    expected = model(images)
    gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    compiled = torch.compile(model, fullgraph=True)
    for _ in range(2):
        model.zero_grad()
        actual = compiled(images)
        actual.square().sum().backward()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    for parameter, gradient in zip(model.parameters(), gradients):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1


@torch.no_grad()
def test_compiled_biases_join_what_follows():
    """A compiled MLP has two products, and writes no bias into a result's rows before; its outputs are the same."""
    torch._dynamo.reset()
    module, x = mlp.Mlp(16, 64), torch.randn(2, 50, 16)
    actual, (code,) = torch._inductor.utils.run_and_get_code(torch.compile(module), x)
    assert code.count('extern_kernels.mm(') == 2
    assert 'addmm' not in code
    torch.testing.assert_close(actual, module(x))


def test_exported_mlp_has_linear_layers():
    """For other runtimes, which have an operation for them."""
    graph = torch.export.export(mlp.Mlp(16, 64), (torch.randn(2, 50, 16),)).graph
    assert [node.target for node in graph.nodes].count(torch.ops.aten.linear.default) == 2


@pytest.mark.slow
@pytest.mark.parametrize(('form', 'graphs'), [('gram', 1), ('auto', 2)])
@torch.no_grad()
def test_compiled_inference_takes_any_resolution(form, graphs):
    """With free sizes one graph serves several resolutions, as far as they use the same form of XCA."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = inference.fuse(small_model().eval())
    xcit.set_xca(model, form)
    compiled = torch.compile(model, dynamic=True, fullgraph=True)
    for size in ((224, 224), (256, 192), (320, 448), (384, 512)):
        images = seeded_images(2, 3, *size)
        assert_same(compiled(images), model(images))
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == graphs
