"""xcit.fuse: a fused model computes the same outputs, in pieces and compiled."""
import copy
import re

import pytest
import timm
import torch
import torch.nn.utils.prune as prune
import torchvision
from conftest import seeded_images, seeded_model

import xcit
import xcit_fuse

SIZES = [(224, 224), (33, 17), (70, 250), (1, 40)]  # also odd, not square, one row of tokens


def both(name: str, **kwargs):
    """Return a model in eval mode, and the same model fused."""
    model = seeded_model(name, **kwargs).eval()
    return model, xcit_fuse.fuse(copy.deepcopy(model))


def small_model() -> xcit.Xcit:
    torch.manual_seed(0)
    return xcit.Xcit(embed_dim=32, num_heads=4, depth=1, num_classes=10)


def assert_same(actual: torch.Tensor, expected: torch.Tensor):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.fixture
def small_pieces(monkeypatch):
    """Let every module work in pieces: a few tokens, the fewest rows."""
    monkeypatch.setitem(xcit_fuse.PIECE, 'cpu', 3000)


# ----- fuse

@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('name', ['xcit_nano_12_p8', 'xcit_tiny_12_p16', 'xcit_tiny_24_p16'])
@torch.no_grad()
def test_fused_equals_unfused(name, size):
    """Logits, all tokens and dense features agree to 1e-5 of the largest."""
    model, fused = both(name)
    images = seeded_images(2, 3, *size)
    assert_same(fused(images), model(images))
    assert_same(fused.forward_features(images), model.forward_features(images))
    for actual, expected in zip(fused.forward_intermediates(images, [0, 5, 11], intermediates_only=True),
                                model.forward_intermediates(images, [0, 5, 11], intermediates_only=True)):
        assert_same(actual, expected)


@torch.no_grad()
def test_features_only_model_is_fused():
    """timm's `features_only` model has the same maps when its Xcit is fused."""
    model = timm.create_model('xcit_nano_12_p16', features_only=True, out_indices=(3, 7)).eval()
    images = seeded_images(2, 3, 70, 50)
    expected = model(images)
    assert xcit.fuse(model) is model
    assert isinstance(model.model.patch_embed, xcit_fuse.FusedPatchEmbed)
    for actual, maps in zip(model(images), expected):
        assert_same(actual, maps)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('form', ['plain', 'gram'])
@torch.no_grad()
def test_pieces_equal_the_whole(small_pieces, form, size):
    """Strips of the stem and of LPI, and pieces of tokens, join without seams."""
    model, fused = both('xcit_nano_12_p8')
    fused.xca_form = form
    images = seeded_images(3, 3, *size)
    with torch.enable_grad():
        expected = model(images).detach()  # whole
    assert_same(fused(images), expected)


@pytest.mark.parametrize('global_pool', ['avg', ''])
@torch.no_grad()
def test_fused_with_other_pooling(global_pool):
    """Patches are right as well, which the head reads with other pooling."""
    model, fused = both('xcit_nano_12_p16', global_pool=global_pool)
    images = seeded_images(1, 3, 64, 64)
    assert_same(fused(images), model(images))


def test_input_gradients_of_a_fused_model():
    """Saliency maps work: no piece is written in place under autograd."""
    model, fused = both('xcit_nano_12_p16')
    gradients = []
    for m in (model, fused):
        images = seeded_images(1, 3, 64, 64).requires_grad_()
        m(images).square().sum().backward()
        gradients.append(images.grad)
    assert_same(gradients[1], gradients[0])


@torch.no_grad()
def test_fused_model_leaves_its_inputs_alone(small_pieces):
    """The next block does not change a block's output, nor the model its images."""
    _, fused = both('xcit_nano_12_p8')
    outputs = []
    for block in fused.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append((output, output.clone())))
    images = seeded_images(1, 3, 64, 64)
    before = images.clone()
    fused(images)
    assert len(outputs) == 12
    assert all(torch.equal(now, then) for now, then in outputs)
    assert torch.equal(images, before)


@pytest.mark.parametrize('training', [True, False])
def test_refusals(training):
    """A model in training mode and a fused model are refused."""
    model = seeded_model('xcit_nano_12_p16').eval()
    xcit_fuse.fuse(model)
    with pytest.raises(ValueError, match='eval mode' if training else 'already fused'):
        xcit_fuse.fuse(seeded_model('xcit_nano_12_p16').train() if training else model)


class Adapter(torch.nn.Linear):
    pass


class Wrapper(torch.nn.Sequential):
    """Module around another module, with its attributes."""

    def __getattr__(self, name):
        return getattr(self[0], name) if name in ('attn', 'mlp', 'norm1', 'qkv') else super().__getattr__(name)


@pytest.mark.parametrize(('name', 'change'), [
    ('blocks.3.mlp.fc2', lambda model: setattr(model.blocks[3].mlp, 'fc2', Adapter(512, 128))),
    ('blocks.0.attn.proj', lambda model: prune.l1_unstructured(model.blocks[0].attn.proj, 'weight', .1)),
    ('patch_embed.proj.2.0', lambda model: prune.l1_unstructured(model.patch_embed.proj[2][0], 'weight', .1)),
    ('blocks.1.local_mp.act', lambda model: setattr(model.blocks[1].local_mp, 'act', torch.nn.ReLU())),
    ('blocks.1.mlp.act', lambda model: setattr(model.blocks[1].mlp, 'act', torch.nn.GELU('tanh'))),
    ('blocks.2.mlp.fc2', lambda model: prune.l1_unstructured(model.blocks[2].mlp.fc2, 'bias', .1)),
    ('cls_attn_blocks.1.attn.qkv', lambda model: setattr(model.cls_attn_blocks[1].attn, 'qkv', Adapter(128, 384))),
    *[(name, lambda model, name=name: model.set_submodule(name, Wrapper(model.get_submodule(name)))) for name in (
        'patch_embed', 'blocks.1', 'blocks.0.mlp', 'blocks.2.local_mp', 'cls_attn_blocks.1', 'cls_attn_blocks.0.attn')],
])
def test_changed_layers_are_refused(name, change):
    """Adapters, pruned layers, other activations and wrapped modules are named; the model is unchanged."""
    model = seeded_model('xcit_nano_12_p16').eval()
    change(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f'^{re.escape(name)} '):
        xcit_fuse.fuse(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def restride(model: xcit.Xcit, *strides):
    """Set other strides of the stem's convolutions, as for small images."""
    for layer, stride in zip(model.patch_embed.proj[::2], strides):
        layer[0].stride = stride


@pytest.mark.parametrize('strides', [[(1, 1), (2, 2), (2, 2)], [(1, 1), (1, 1), (1, 1)], [(3, 3), (2, 1), (1, 2)]])
@torch.no_grad()
def test_stems_of_other_strides(small_pieces, strides):
    """Stems of other strides work in strips."""
    model = seeded_model('xcit_nano_12_p8', depth=1).eval()
    restride(model, *strides)
    for size in ((32, 32), (45, 31), (7, 50), (1, 1)):
        images = seeded_images(2, 3, *size)
        expected = model(images)
        assert_same(xcit_fuse.fuse(copy.deepcopy(model))(images), expected)


@pytest.mark.parametrize(('name', 'change'), [
    ('patch_embed.proj.4.0', lambda m: vars(m.patch_embed.proj[4][0]).update(dilation=(2, 2))),
    ('patch_embed.proj.0.0', lambda m: vars(m.patch_embed.proj[0][0]).update(padding_mode='circular')),
    ('patch_embed.proj.2.0', lambda m: vars(m.patch_embed.proj[2][0]).update(padding=(0, 0))),
    ('patch_embed.proj.0.0', lambda m: m.patch_embed.proj[0].__setitem__(0, torch.nn.Conv2d(3, 32, 5, 2, 2))),
    ('patch_embed.proj.0.1', lambda m: m.patch_embed.proj[0].__setitem__(1, torch.nn.GroupNorm(4, 32))),
    ('patch_embed.proj.0.1', lambda m: m.patch_embed.proj[0].__setitem__(
        1, torchvision.ops.FrozenBatchNorm2d(32))),
    ('patch_embed.proj.2.1', lambda m: m.patch_embed.proj[2][1].train()),
    ('blocks.1.local_mp.bn', lambda m: setattr(m.blocks[1].local_mp, 'bn', torch.nn.Identity())),
    ('blocks.0.attn.qkv', lambda m: torch.ao.quantization.quantize_dynamic(m, {torch.nn.Linear}, inplace=True)),
    ('blocks.1.attn.proj', lambda m: torch.nn.utils.parametrizations.weight_norm(m.blocks[1].attn.proj)),
    ('blocks.1.mlp.fc1', lambda m: vars(m.blocks[1].mlp.fc1).update(forward=lambda x: x)),
    ('cls_attn_blocks.0.attn.attn_drop', lambda m: m.cls_attn_blocks[0].attn.attn_drop.train()),
])
@pytest.mark.filterwarnings('ignore')  # torch's own quantization is deprecated
def test_refused_layers_are_named_and_nothing_is_changed(name, change):
    """Other convolutions, norms and linear layers, and modules in training mode, are named; the model is unchanged."""
    model = seeded_model('xcit_nano_12_p8', depth=2).eval()
    change(model)
    modules, before = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f'^{re.escape(name)} .*'):
        xcit_fuse.fuse(model)
    assert dict(model.named_modules()) == modules
    for key, value in model.state_dict().items():
        assert not isinstance(value, torch.Tensor) or value.is_quantized or torch.equal(value, before[key])


def test_other_models_are_refused():
    """timm's own XCiT, which has other layers, is refused."""
    with pytest.raises(ValueError, match='not an Xcit of this package'):
        xcit_fuse.fuse(timm.create_model('xcit_nano_12_p16_224').eval())


@torch.no_grad()
def test_no_images():
    """A batch without images gives no outputs."""
    _, fused = both('xcit_nano_12_p16')
    assert fused(torch.zeros(0, 3, 64, 64)).shape == (0, 1000)
    assert fused.forward_features(torch.zeros(0, 3, 64, 64)).shape == (0, 17, 128)


@pytest.mark.filterwarnings('ignore')  # tracing is deprecated, and warns of each fixed size
@torch.no_grad()
def test_traced_model_takes_other_numbers_of_images(small_pieces):
    """A trace does not depend on the pieces for its images."""
    _, fused = both('xcit_nano_12_p16')
    traced = torch.jit.trace(fused, seeded_images(1, 3, 64, 64), check_trace=False)
    images = seeded_images(3, 3, 64, 64)
    assert_same(traced(images), fused(images))


@pytest.mark.parametrize('name', [
    'patch_embed', 'patch_embed.proj.0.0', 'blocks.0', 'blocks.0.attn', 'blocks.0.attn.qkv', 'blocks.0.drop_path',
    'blocks.0.local_mp.conv1', 'blocks.0.mlp', 'cls_attn_blocks.0', 'cls_attn_blocks.0.attn'])
def test_hooks_that_would_be_lost_are_refused(name):
    """Hooks of modules that a fused model does not call are refused."""
    model = small_model().eval()
    model.get_submodule(name).register_forward_hook(lambda module, args, output: None)
    with pytest.raises(ValueError, match=f'^{re.escape(name)} .*hooks'):
        xcit_fuse.fuse(model)


@torch.no_grad()
def test_hooks_that_fusing_keeps():
    """Hooks of the model, the position, LayerNorms, class attention's MLP and the head are called after fusing."""
    model, called = small_model().eval(), []
    names = ('', 'pos_embeder.token_projection', 'blocks.0.norm1', 'cls_attn_blocks.0.norm2',
             'cls_attn_blocks.0.mlp.fc1', 'head')
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda *args, name=name: called.append(name))
    xcit_fuse.fuse(model)(seeded_images(1, 3, 32, 32))
    assert set(called) == set(names)


def test_fused_parameters_have_no_gradients():
    """Parameters with others folded in are frozen."""
    model = xcit_fuse.fuse(small_model().eval())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model(seeded_images(1, 3, 32, 32)).requires_grad


@pytest.mark.filterwarnings('ignore')  # tracing is deprecated
@pytest.mark.parametrize('form', ['plain', 'gram'])
def test_traced_model_can_be_stored(tmp_path, form):
    """A model that was traced with gradients enabled is stored and loaded."""
    model, images = small_model().eval(), seeded_images(2, 3, 48, 64)
    model.xca_form = form
    torch.jit.trace(model, images, check_trace=False).save(tmp_path / 'model.pt')
    torch.testing.assert_close(torch.jit.load(tmp_path / 'model.pt')(images), model(images))


def per_image_gradients(model, images):
    weights = {key: value.detach() for key, value in model.named_parameters()}

    def loss(weights, image):
        return torch.func.functional_call(model, weights, (image[None],)).square().sum()

    return torch.func.vmap(torch.func.grad(loss, argnums=1), (None, 0))(weights, images)


@pytest.mark.parametrize('fused', [False, True])
def test_gradients_of_single_images(small_pieces, fused):
    """Gradients per image by torch.func.vmap are those of autograd, image by image."""
    model = small_model().eval().double()
    if fused:
        xcit_fuse.fuse(model)
    images = seeded_images(3, 3, 48, 32).double()
    actual = per_image_gradients(model, images)
    for image, gradient in zip(images, actual):
        image = image[None].requires_grad_()
        expected, = torch.autograd.grad(model(image).square().sum(), image)
        torch.testing.assert_close(gradient[None], expected)


@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('fused', [False, True])
def test_forward_mode_derivatives(small_pieces, fused, grad):
    """Directional derivatives by torch.func.jvp and by forward_ad agree with a difference quotient."""
    model = small_model().eval().double()
    if fused:
        xcit_fuse.fuse(model)
    model.xca_form = 'gram'
    image, direction = seeded_images(2, 3, 48, 32).double().split(1)
    with torch.set_grad_enabled(grad):
        expected = (model(image + 1e-4 * direction) - model(image - 1e-4 * direction)) / 2e-4
        _, by_func = torch.func.jvp(model, (image,), (direction,))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(image, direction)
            by_level = torch.autograd.forward_ad.unpack_dual(model(dual)).tangent
    torch.testing.assert_close(by_func, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(by_level, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(('dtype', 'tolerance'), [(None, 2e-3), (torch.bfloat16, .05), (torch.float16, .01)])
@pytest.mark.parametrize('form', ['plain', 'gram'])
@torch.no_grad()
def test_fused_on_cuda(monkeypatch, form, dtype, tolerance):
    """Pieces on a GPU, in full precision and under autocast, agree with the CPU's float32 within the dtype's error."""
    monkeypatch.setitem(xcit_fuse.PIECE, 'other', 3000)
    model, fused = both('xcit_nano_12_p8')
    fused.xca_form = form
    images = seeded_images(2, 3, 70, 250)
    expected = model(images)
    with torch.autocast('cuda', dtype, enabled=dtype is not None):
        actual = fused.cuda()(images.cuda()).float().cpu()
    assert float((actual - expected).abs().max()) < tolerance * float(expected.abs().max())


@pytest.mark.parametrize('form', ['plain', 'gram'])
@torch.no_grad()
def test_fused_under_autocast(form):
    """The bfloat16 error of a fused model is at most 1.5 times that of the unfused model."""
    model, fused = both('xcit_nano_12_p8')
    images = seeded_images(2, 3, 96, 96)
    expected = model(images)
    for m in (model, fused):
        m.xca_form = form
    with torch.autocast('cpu', torch.bfloat16):
        errors = [(m(images) - expected).abs().max() for m in (model, fused)]
    assert errors[1] <= 1.5 * errors[0]


@pytest.mark.parametrize('fused', [False, True])
@torch.no_grad()
def test_tokens_are_float32_under_autocast(fused):
    """Residual sums stay float32 under autocast, in a fused model as well."""
    models = both('xcit_nano_12_p8')
    with torch.autocast('cpu', torch.bfloat16):
        tokens, = models[fused].forward_intermediates(seeded_images(1, 3, 64, 64), [3], intermediates_only=True)
    assert tokens.dtype == torch.float32


@pytest.mark.parametrize('fused', [False, True])
@torch.no_grad()
def test_model_in_half_precision(fused):
    """A model with bfloat16 weights runs, with outputs close to float32."""
    model, images = both('xcit_nano_12_p16')[fused], seeded_images(2, 3, 96, 64)
    expected = model(images)
    actual = model.bfloat16()(images.bfloat16())
    assert actual.dtype == torch.bfloat16
    assert (actual - expected).abs().max() < .1 * expected.abs().max()


# ----- compiled

def test_compiler_sees_one_graph():
    """Training with drop-path has no graph break, in either form of XCA."""
    for form in ('plain', 'gram'):
        model = timm.create_model('xcit_nano_12_p16', depth=2, num_classes=10, drop_path_rate=.1).train()
        model.xca_form = form
        explanation = torch._dynamo.explain(model)(torch.randn(2, 3, 64, 64))
        assert explanation.graph_break_count == 0, explanation.break_reasons
        torch._dynamo.reset()


@pytest.mark.parametrize('form', ['plain', pytest.param('gram', marks=pytest.mark.slow)])
def test_compiled_training_step(form):
    """Compiled output and gradients equal the eager ones; further steps compile nothing."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = small_model().train()
    model.xca_form = form
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


@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
@pytest.mark.parametrize(('form', 'graphs'), [('gram', 1), ('auto', 2)])
@torch.no_grad()
def test_compiled_inference_takes_any_resolution(form, graphs, backend):
    """One graph per form of XCA serves several resolutions with dynamic sizes.

    With several threads, torch compiles one more graph: the position's convolution has a guard at 20480 inputs.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = xcit_fuse.fuse(small_model().eval())
    model.xca_form = form
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for size in ((224, 224), (256, 192), (320, 448), (384, 512), (100, 130), (64, 64)):
        images = seeded_images(2, 3, *size)
        if size == (224, 224):  # the first
            torch._dynamo.mark_dynamic(images, (2, 3))
        assert_same(compiled(images), model(images))
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] - (torch.get_num_threads() > 1) == graphs


@torch.no_grad()
def test_compiled_inference():
    """Compiled code computes the outputs of the fused model."""
    torch._dynamo.reset()
    model, images = xcit_fuse.fuse(small_model().eval()), seeded_images(2, 3, 70, 50)
    assert_same(torch.compile(model, fullgraph=True)(images), model(images))
