"""xcit.py: the original's numbers, and the interface of timm's models."""
import json
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import REFERENCE, seeded_images, seeded_model
from timm.models import group_parameters

import xcit
import xcit_zoo

NANO = 'xcit_nano_12_p16'


@pytest.fixture(scope='module')
def published() -> dict:
    return json.loads((REFERENCE / 'models.json').read_text())


@pytest.fixture(scope='module')
def logits() -> dict:
    return np.load(REFERENCE / 'logits.npz')


# ----- parity with the original

def test_there_are_14_models(published):
    """The variants are the published ones, with names that `is_xcit_name` recognises."""
    assert sorted(xcit.MODELS) == sorted(published)
    assert len(xcit.MODELS) == 14
    assert all(xcit.is_xcit_name(name) and xcit.is_xcit_name(f'{name}.fb_in1k') for name in xcit.MODELS)
    assert not any(xcit.is_xcit_name(name) for name in ('', 'resnet50', f'{NANO}_224', f'timm/{NANO}'))


@pytest.mark.parametrize('name', xcit.MODELS)
@torch.no_grad()
def test_logits_equal_the_originals(name, published, logits):
    """Parameter count, logits and pooled features equal the original's for the same weights and image."""
    model = seeded_model(name).eval()
    assert sum(p.numel() for p in model.parameters()) == published[name]['params']
    tokens = model.forward_features(seeded_images(2, 3, 224, 224)[:1])
    np.testing.assert_allclose(tokens[:, 0], logits[f'{name}/224x224/features'][:1], rtol=0, atol=1e-4)
    np.testing.assert_allclose(model.forward_head(tokens), logits[f'{name}/224x224/logits'][:1], rtol=0, atol=1e-4)


@pytest.mark.parametrize('name', ['xcit_nano_12_p8', 'xcit_small_24_p16'])
def test_state_dict_has_the_published_keys(name, published):
    """A published checkpoint loads strictly: the same keys and shapes."""
    own = {key: list(value.shape) for key, value in timm.create_model(name).state_dict().items()}
    assert own == dict(published[name]['keys'])


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('name', ['xcit_nano_12_p8', 'xcit_tiny_12_p16'])
def test_training_step_equals_the_originals(name, checkpointing, reference):
    """Loss, gradient norms of all parameters and BatchNorm's statistics equal the original's."""
    expected = reference[f'train/{name}']
    model = seeded_model(name, num_classes=10).train()
    model.set_grad_checkpointing(checkpointing)
    loss = F.cross_entropy(model(seeded_images(4, 3, 64, 96)), torch.tensor([1, 3, 5, 9]))
    loss.backward()
    assert loss.item() == pytest.approx(expected['loss'], rel=1e-4)
    norms = {key: p.grad.norm().item() for key, p in model.named_parameters()}
    assert norms == pytest.approx(expected['grad_norm'], rel=1e-4)
    means = {key: b.norm().item() for key, b in model.named_buffers() if key.endswith('running_mean')}
    assert means == pytest.approx(expected['running_mean_norm'], rel=1e-4)


@pytest.mark.parametrize('name', ['xcit_nano_12_p8', 'xcit_tiny_12_p16', 'xcit_small_24_p16'])
@torch.no_grad()
def test_logits_equal_timms(name):
    """timm's own XCiT computes the same with the same weights."""
    model = seeded_model(name, num_classes=10).eval()
    theirs = timm.create_model(f'{name}_224', num_classes=10).eval()
    theirs.load_state_dict(timm.models.xcit.checkpoint_filter_fn({'model': model.state_dict()}, theirs))
    images = seeded_images(1, 3, 96, 64)
    torch.testing.assert_close(model(images), theirs(images), rtol=0, atol=1e-4)


@torch.no_grad()
def test_xca_equals_a_plain_loop():
    """XCA equals the paper's equation 4, head by head."""
    dim, heads, d = 12, 3, 4
    xca = xcit.XCA(dim, heads)
    xca.temperature.copy_(torch.tensor([.5, 1., 3.]).reshape(3, 1, 1))
    x = torch.randn(2, 7, dim)
    q, k, v = (x @ xca.qkv.weight.T + xca.qkv.bias).split(dim, dim=2)
    expected = torch.empty_like(x)
    for image in range(2):
        for head in range(heads):
            part = slice(head * d, head * d + d)
            q_hat, k_hat = (t[image, :, part] / t[image, :, part].norm(dim=0) for t in (q, k))
            attention = ((q_hat.T @ k_hat) * xca.temperature[head]).softmax(dim=1)
            expected[image, :, part] = v[image, :, part] @ attention.T
    torch.testing.assert_close(xca(x), xca.proj(expected), rtol=0, atol=1e-6)


@torch.no_grad()
def test_attention_weights_are_those_of_forward():
    """The attention of CLS to all tokens sums to 1, and times the values gives the output of `forward`."""
    attention = xcit.ClassAttention(12, 3)
    x = torch.randn(2, 7, 12)
    weights = attention.attention_weights(x)
    values = (x @ attention.qkv.weight[24:].T + attention.qkv.bias[24:]).unflatten(2, (3, 4))  # (B, 1 + N, h, d)
    torch.testing.assert_close(weights.sum(dim=2), torch.ones(2, 3))
    cls = torch.einsum('bhn,bnhd->bhd', weights, values).flatten(1)
    torch.testing.assert_close(attention(x)[:, 0], attention.proj(cls), rtol=0, atol=1e-6)


@torch.no_grad()
def test_class_attention_calls_layers_that_are_more_than_their_weights():
    """A hook, which may change the output, is called once."""
    attention = xcit.ClassAttention(12, 3)
    x = torch.randn(2, 7, 12)
    expected, weights = attention(x), attention.attention_weights(x)
    seen = []
    attention.qkv.register_forward_hook(lambda layer, args, output: seen.append(output))
    torch.testing.assert_close(attention(x), expected, rtol=0, atol=1e-6)
    assert [output.shape for output in seen] == [(2, 7, 36)]
    torch.testing.assert_close(attention.attention_weights(x), weights, rtol=0, atol=1e-6)


@torch.no_grad()
def test_position_is_the_papers_fourier_features():
    """Features are y before x, counted from 1, sine and cosine interleaved, on a non-square grid."""
    encoding = xcit.PositionalEncodingFourier(64)
    encoding.token_projection.weight.copy_(torch.eye(64)[:, :, None, None])
    encoding.token_projection.bias.zero_()
    features = encoding(3, 5)[0]
    for (row, column, frequency) in ((0, 0, 0), (2, 3, 1), (1, 4, 15)):
        y = (row + 1) / (3 + 1e-6) * 2 * math.pi / 10000 ** (2 * frequency / 32)
        x = (column + 1) / (5 + 1e-6) * 2 * math.pi / 10000 ** (2 * frequency / 32)
        expected = torch.tensor([math.sin(y), math.cos(y), math.sin(x), math.cos(x)])
        channels = [2 * frequency, 2 * frequency + 1, 32 + 2 * frequency, 32 + 2 * frequency + 1]
        torch.testing.assert_close(features[channels, row, column], expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_position_calls_a_projection_that_is_more_than_its_weights():
    """A hook, which may change the output, is called once."""
    encoding = xcit.PositionalEncodingFourier(8)
    expected = encoding(3, 5)
    seen = []
    encoding.token_projection.register_forward_hook(lambda layer, args, output: seen.append(output))
    torch.testing.assert_close(encoding(3, 5), expected, rtol=0, atol=1e-6)
    assert [output.shape for output in seen] == [(1, 8, 3, 5)]


@torch.no_grad()
def test_position_calls_another_projection():
    """An adapter in place of `token_projection` is called."""
    class Doubled(torch.nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    encoding = xcit.PositionalEncodingFourier(8)
    expected = 2 * encoding(3, 5)
    weights = encoding.token_projection.state_dict()
    encoding.token_projection = Doubled(64, 8, kernel_size=1)
    encoding.token_projection.load_state_dict(weights)
    torch.testing.assert_close(encoding(3, 5), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_position_in_half_precision(dtype):
    """Coordinates of a large grid are computed in float32, and rounded last."""
    encoding = xcit.PositionalEncodingFourier(8)
    expected = encoding(2, 3000)
    actual = encoding.to(dtype)(2, 3000)
    assert actual.dtype == dtype
    assert (actual - expected).abs().max() < 4 * torch.finfo(dtype).eps * expected.abs().max()


def test_drop_path_is_constant_over_depth():
    """All XCA blocks have the same drop-path rate (faithful to the original)."""
    model = timm.create_model(NANO, drop_path_rate=.05)
    assert {block.drop_path.drop_prob for block in model.blocks} == {.05}


# ----- training

@pytest.mark.parametrize('name', [pytest.param(name, marks=pytest.mark.slow if 'large' in name else ())
                                  for name in xcit.MODELS])
def test_every_parameter_gets_a_gradient(name):
    """Every parameter of every variant is used, and backward works."""
    model = timm.create_model(name, num_classes=10).train()
    model(torch.randn(2, 3, 32, 48)).square().mean().backward()
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_checkpointing_repeats_dropout_and_drop_path():
    """Recomputed activations give the gradients of kept ones, with random layers too."""
    gradients = []
    for enable in (False, True):
        model = seeded_model(NANO, num_classes=10, drop_rate=.1, attn_drop_rate=.1, drop_path_rate=.3).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        model(seeded_images(2, 3, 32, 32)).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_checkpointing_counts_a_batch_once():
    """Checkpointing updates BatchNorm's statistics and counter once per batch."""
    states = []
    for enable in (False, True):
        model = seeded_model(NANO).train()
        model.set_grad_checkpointing(enable)
        model(seeded_images(2, 3, 32, 32)).mean().backward()
        states.append(dict(model.named_buffers()))
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_weight_decay_names_only_the_cls_token():
    """The model lists the CLS token alone (faithful); optimizers skip biases and vectors themselves."""
    assert timm.create_model(NANO).no_weight_decay() == {'cls_token'}


def test_layer_groups_cover_every_parameter_in_order():
    """`group_matcher` has the order stem, blocks, class attention with the norm, head."""
    model = timm.create_model(NANO)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(groups) == {key for key, _ in model.named_parameters()}
    order = ['patch_embed.proj.0.0.weight', 'blocks.0.gamma1', 'blocks.11.gamma1', 'cls_attn_blocks.0.gamma1',
             'cls_attn_blocks.1.gamma1', 'head.weight']
    layers = [groups[key] for key in order]
    assert layers == sorted(layers)
    assert len(set(layers)) == len(layers)
    assert groups['cls_token'] == groups['pos_embeder.token_projection.weight'] == groups[order[0]]
    assert groups['norm.weight'] == groups['cls_attn_blocks.1.gamma1']


# ----- timm's interface

def test_create_model_passes_timms_options():
    """`num_classes`, `drop_path_rate`, `in_chans`, `device` and `dtype` reach the model."""
    model = timm.create_model('xcit_small_12_p16', num_classes=10, drop_path_rate=.05, in_chans=1)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 10)
    assert model.blocks[0].drop_path.drop_prob == .05
    model = timm.create_model(NANO, device='meta', dtype=torch.bfloat16)
    assert {(str(p.device), p.dtype) for p in model.parameters()} == {('meta', torch.bfloat16)}
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize('patch_size', [16, 8])
def test_patch_size_stays(patch_size):
    """`Xcit.patch_size` is in pixels, also of models that are pruned, prepared for training or fused."""
    name = f'xcit_nano_12_p{patch_size}'
    pruned = timm.create_model(name, depth=2)
    pruned.prune_intermediate_layers(1)
    models = [pruned, xcit.speed_up_training(timm.create_model(name, depth=1)),
              xcit.fuse(timm.create_model(name, depth=1).eval())]
    assert [model.patch_size for model in models] == [patch_size] * 3


def test_pretrained_cfg_is_imagenets():
    """The configuration has crop 1.0, bicubic, ImageNet's statistics and the names of first and last layer."""
    cfg = timm.create_model('xcit_tiny_24_p8').pretrained_cfg
    assert (cfg['crop_pct'], cfg['interpolation'], cfg['classifier']) == (1., 'bicubic', 'head')
    assert cfg['first_conv'] == 'patch_embed.proj.0.0'
    assert cfg['mean'] == timm.data.IMAGENET_DEFAULT_MEAN
    assert cfg['std'] == timm.data.IMAGENET_DEFAULT_STD


def test_zoo_is_the_46_published_files():
    """The zoo has 3 classifiers of each model and 4 DINO backbones, at their resolution in timm's registry."""
    cfgs = [timm.models.get_pretrained_cfg(name) for name in xcit_zoo.ZOO]
    assert len({cfg.url for cfg in cfgs}) == len(xcit_zoo.ZOO) == 46
    assert sum(cfg.num_classes == 1000 for cfg in cfgs) == 42
    assert all(cfg.input_size[1] == published.resolution for cfg, published in zip(cfgs, xcit_zoo.ZOO.values()))
    urls = {name: published.url.rsplit('/', 1)[1] for name, published in xcit_zoo.ZOO.items()}
    assert urls['xcit_small_12_p16.fb_dist_in1k_384'] == 'xcit_small_12_p16_384_dist.pth'
    assert urls['xcit_large_24_p8.fb_in1k'] == 'xcit_large_24_p8_224.pth'
    assert urls['xcit_medium_24_p8.fb_dino'] == 'xcit_medium_24_cp8_dino.pth'


def test_zoo_names_timms_own_copies():
    """Hub repositories and URLs are those of timm's own XCiT with the same weights."""
    for published in xcit_zoo.ZOO.values():
        if published.hf_hub_id:
            cfg = timm.models.get_pretrained_cfg(published.hf_hub_id.removeprefix('timm/'))
            assert (cfg.hf_hub_id, cfg.url) == (published.hf_hub_id, published.url)
    assert sum(published.hf_hub_id is not None for published in xcit_zoo.ZOO.values()) == 42


@pytest.mark.parametrize('size', [(224, 160), (33, 47), (16, 16), (7, 5), (1, 1)])
@pytest.mark.parametrize('name', ['xcit_nano_12_p16', 'xcit_nano_12_p8'])
@torch.no_grad()
def test_any_image_size_works(name, size):
    """The token grid is ceil(pixels / patch), whatever the size; all values are finite."""
    model = seeded_model(name, num_classes=10).eval()
    patch = int(name.rsplit('p', 1)[1])
    tokens = model.forward_features(torch.randn(1, 3, *size))
    assert tokens.shape == (1, 1 + math.ceil(size[0] / patch) * math.ceil(size[1] / patch), 128)
    assert model.forward_head(tokens).isfinite().all()


@torch.no_grad()
def test_rows_and_columns_are_not_confused():
    """A transposed image gives other tokens than the transposed grid."""
    model = seeded_model(NANO).eval()
    image = torch.randn(1, 3, 64, 32)
    wide = model.forward_intermediates(image.transpose(2, 3), intermediates_only=True, indices=[0])[0]
    tall = model.forward_intermediates(image, intermediates_only=True, indices=[0])[0]
    assert wide.shape == (1, 128, 2, 4)
    assert not torch.allclose(wide, tall.transpose(2, 3), atol=1e-3)


@pytest.mark.parametrize('pool', ['token', 'avg', ''])
@torch.no_grad()
def test_global_pool(pool):
    """The head's input is the CLS token, the mean of the patches, or all tokens."""
    model = timm.create_model(NANO, num_classes=10, global_pool=pool).eval()
    tokens = model.forward_features(torch.randn(2, 3, 32, 32))
    pooled = {'token': tokens[:, 0], 'avg': tokens[:, 1:].mean(dim=1), '': tokens}[pool]
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), pooled)
    torch.testing.assert_close(model.forward_head(tokens), model.head(pooled))


def test_unknown_global_pool_is_refused():
    """An unknown `global_pool` is refused with the value and the allowed values."""
    with pytest.raises(ValueError, match="'max' is not one of"):
        timm.create_model(NANO, global_pool='max')


def test_reset_classifier():
    """reset_classifier makes a head of another size, or none, and sets the pooling."""
    model = timm.create_model(NANO)
    model.reset_classifier(7, 'avg')
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 7)
    assert model.get_classifier().out_features == model.num_classes == 7
    model.reset_classifier(0)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 128)


@torch.no_grad()
def test_forward_intermediates():
    """forward_intermediates returns chosen blocks' outputs on the grid, and the features of `forward_features`."""
    model = seeded_model(NANO).eval()
    images = torch.randn(2, 3, 40, 64)
    features, (first, last) = model.forward_intermediates(images, indices=[0, -1])
    torch.testing.assert_close(features, model.forward_features(images))
    assert first.shape == last.shape == (2, 128, 3, 4)
    tokens = model.forward_intermediates(images, indices=1, output_fmt='NLC', intermediates_only=True, norm=True)
    torch.testing.assert_close(tokens[0], model.norm(last.flatten(2).transpose(1, 2)))


@torch.no_grad()
def test_stopping_early_runs_no_later_block():
    """`stop_early` gives the same tensors without the blocks after the last one chosen."""
    model = seeded_model(NANO).eval()
    images = torch.randn(1, 3, 32, 32)
    expected = model.forward_intermediates(images, indices=[2], intermediates_only=True)[0]
    model.blocks[3].forward = None  # a call would raise
    early = model.forward_intermediates(images, indices=[2], intermediates_only=True, stop_early=True)[0]
    torch.testing.assert_close(early, expected)


@torch.no_grad()
def test_features_only():
    """timm's feature extractor returns one map per index, and has neither class attention nor head."""
    extractor = timm.create_model(NANO, features_only=True, out_indices=(3, 7, 11)).eval()
    maps = extractor(torch.randn(1, 3, 64, 48))
    assert [m.shape for m in maps] == [(1, 128, 4, 3)] * 3
    assert extractor.feature_info.reduction() == [16, 16, 16]
    assert not any(key.startswith(('model.cls_attn', 'model.head')) for key in extractor.state_dict())


@torch.no_grad()
def test_torchscript_of_features():
    """The scripted feature extractor computes the same maps."""
    extractor = timm.create_model(NANO, depth=3, features_only=True, out_indices=(0, 1)).eval()
    images = seeded_images(1, 3, 64, 48)
    torch.testing.assert_close(torch.jit.script(extractor)(images), extractor(images))


@torch.no_grad()
def test_torchscript_and_export_agree_with_eager():
    """The scripted and the exported model (dynamic batch, height and width) compute the same at another size."""
    model = seeded_model('xcit_nano_12_p8', num_classes=10, depth=2).eval()
    images = torch.randn(1, 3, 70, 45)
    expected = model(images)
    torch.testing.assert_close(torch.jit.script(model)(images), expected)
    auto = torch.export.Dim.AUTO
    exported = torch.export.export(model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    torch.testing.assert_close(exported.module()(images), expected)


@pytest.mark.parametrize('checkpointing', [False, True])
def test_compile_agrees_with_eager(checkpointing):
    """Logits, gradients and BatchNorm statistics of the compiled model, captured as one graph."""
    results = []
    for compiled in (False, True):
        model = seeded_model(NANO, num_classes=10, depth=2).train()
        model.set_grad_checkpointing(checkpointing)
        # aot_eager captures forward and backward as inductor does, without its minute of code generation
        run = torch.compile(model, backend='aot_eager', fullgraph=True) if compiled else model
        logits = run(seeded_images(2, 3, 32, 32))
        logits.square().mean().backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters()), *model.buffers()])
    torch._dynamo.reset()
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_bf16_autocast_stays_close():
    """Under bfloat16 autocast the logits keep their bfloat16 digits."""
    model = seeded_model(NANO, num_classes=10).eval()
    images = seeded_images(2, 3, 64, 64)
    with torch.autocast('cpu', torch.bfloat16):
        logits = model(images)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model(images), rtol=.05, atol=.1)


# ----- on a GPU

@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
@pytest.mark.parametrize('training', [True, False])
def test_one_graph_under_autocast(device, training):
    """The compiled model is one graph under autocast (torch 2.11 split it at each query of autocast)."""
    torch._dynamo.reset()
    model = timm.create_model(NANO, num_classes=2, depth=2).to(device).train(training)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    with torch.set_grad_enabled(training), torch.autocast(device, torch.bfloat16):
        assert compiled(torch.randn(2, 3, 48, 48, device=device)).shape == (2, 2)


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_autocast_on_cuda_stays_close(dtype):
    """Half-precision autocast with 576 tokens gives logits close to full precision and finite gradients."""
    model = seeded_model('xcit_tiny_12_p16', num_classes=10).cuda().train()
    images = seeded_images(2, 3, 384, 384).cuda()
    expected = model(images)
    with torch.autocast('cuda', dtype):
        logits = model(images)
    torch.testing.assert_close(logits.float(), expected, rtol=.05, atol=.15)
    logits.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.gpu
def test_inductor_on_cuda_agrees_with_eager():
    """The compiled model computes the outputs of the eager model."""
    model = seeded_model('xcit_tiny_12_p16', num_classes=10).cuda().eval()
    images = seeded_images(2, 3, 224, 224).cuda()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model)(images), model(images), rtol=1e-3, atol=1e-3)


def peak_cuda_memory(model: torch.nn.Module, side: int) -> int:
    """Return the peak memory in bytes of one training step on a square image."""
    torch.cuda.reset_peak_memory_stats()
    model(torch.randn(1, 3, side, side, device='cuda')).square().mean().backward()
    model.zero_grad()
    return torch.cuda.max_memory_allocated()


@pytest.mark.gpu
def test_memory_grows_linearly_with_the_pixels():
    """Four times the pixels need about four times the memory."""
    model = timm.create_model('xcit_nano_12_p8').cuda().train()
    peak_cuda_memory(model, 256)  # the workspaces of the libraries
    assert peak_cuda_memory(model, 2048) < 4.4 * peak_cuda_memory(model, 1024)


@pytest.mark.gpu
def test_checkpointing_saves_memory():
    """Checkpointing halves the peak memory at high resolution."""
    model = timm.create_model('xcit_small_12_p16').cuda().train()
    kept = peak_cuda_memory(model, 1024)
    model.set_grad_checkpointing()
    assert peak_cuda_memory(model, 1024) < kept / 2
