"""xcit.speed_up_training: the same outputs, gradients and state dict."""
import copy
import re

import pytest
import torch
import torch.nn as nn
from conftest import seeded_images, seeded_model

import xcit
import xcit_train


def both(**kwargs):
    """Return a model, and the same model prepared for training."""
    torch.manual_seed(0)
    model = xcit.Xcit(embed_dim=32, num_heads=4, depth=2, num_classes=10, **kwargs)
    with torch.no_grad():  # biases that are not 0
        for parameter in model.parameters():
            parameter.add_(.1 * torch.randn_like(parameter))
    return model, xcit.speed_up_training(copy.deepcopy(model))


@pytest.mark.parametrize('form', ['plain', 'gram'])
@pytest.mark.parametrize('kwargs', [{}, {'qkv_bias': False}, {'act_layer': nn.ReLU}, {'proj_drop_rate': .3}],
                         ids=['plain', 'no bias', 'relu', 'dropout'])
def test_same_gradients(form, kwargs):
    """Gradients of images and all parameters agree in float64; dropout draws the same random numbers."""
    results = []
    for model in both(**kwargs):
        model.double().train().xca_form = form
        torch.manual_seed(0)
        images = seeded_images(2, 3, 96, 80).double().requires_grad_()
        logits = model(images)
        results.append([logits, *torch.autograd.grad(logits.square().sum(), [images, *model.parameters()])])
    for plain, fast in zip(*results):
        torch.testing.assert_close(fast, plain, rtol=1e-6, atol=1e-8 * float(plain.detach().abs().max() + 1))


def test_state_dict_is_the_same():
    """Names and order of parameters are the same, so that checkpoints and optimizer states fit both models."""
    model, fast = both()
    assert list(fast.state_dict()) == list(model.state_dict())
    assert [name for name, _ in fast.named_parameters()] == [name for name, _ in model.named_parameters()]
    model.load_state_dict(fast.state_dict(), strict=True)


def test_parameters_stay_the_same_objects():
    """An optimizer that was built before keeps its parameters."""
    model = xcit.Xcit(embed_dim=32, num_heads=4, depth=1)
    before = list(model.parameters())
    assert all(a is b for a, b in zip(before, xcit.speed_up_training(model).parameters()))


def test_modes_stay():
    """Modules in eval mode, such as frozen parts, stay in eval mode."""
    model = xcit.Xcit(embed_dim=32, num_heads=4, depth=2).train()
    model.blocks[1].eval()
    xcit.speed_up_training(model)
    assert {m.training for m in model.blocks[0].modules()} == {True}
    assert {m.training for m in model.blocks[1].modules()} == {False}
    assert not any(m.training for m in xcit.speed_up_training(xcit.Xcit(depth=1).eval()).modules())


def test_hidden_activations_are_kept_once():
    """Activations after GELU are computed again, not kept."""
    counts = []
    for model in both():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            model.blocks[0].mlp(torch.randn(2, 5, 32, requires_grad=True))
        counts.append(sum(t.shape[-1] == 128 and t.numel() == 2 * 5 * 128 for t in kept))
    assert counts == [2, 1]


@pytest.mark.parametrize('function', [xcit_train.GeluLinear, xcit_train.Covariance])
@pytest.mark.parametrize('index', [0, 1, 2, None])
def test_derivatives(function, index):
    """First and second derivatives are right, for all inputs or one input alone."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    inputs = [x, torch.randn(4, 8, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]
    if function is xcit_train.Covariance:
        if index in (1, 2):
            pytest.skip('the mean has no gradient')
        inputs, call = [x], lambda x: function.apply(x, x.mean(dim=1))
    else:
        call = function.apply
    inputs = [t.requires_grad_(index in (None, i)) for i, t in enumerate(inputs)]
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize(('name', 'change'), [
    ('blocks.1.attn.qkv', lambda m: m.blocks[1].attn.qkv.register_forward_hook(lambda *args: None)),
    ('blocks.0.mlp.fc2', lambda m: setattr(m.blocks[0].mlp, 'fc2', type('Adapter', (nn.Linear,), {})(512, 128))),
    ('cls_attn_blocks.1.attn.proj', lambda m: nn.utils.parametrizations.weight_norm(m.cls_attn_blocks[1].attn.proj)),
    ('blocks.0.attn', xcit.speed_up_training),
])
def test_refusals(name, change):
    """A model with a changed layer is refused with the name of the layer, and is not modified."""
    model = seeded_model('xcit_nano_12_p16', depth=2)
    change(model)
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=f'^{re.escape(name)} .*'):
        xcit.speed_up_training(model)
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize('form', ['plain', 'gram'])
def test_fast_model_has_one_graph(form):
    """The compiled model is one graph, and computes the same."""
    torch._dynamo.reset()
    model, fast = both()
    model.xca_form = fast.xca_form = form
    images = seeded_images(2, 3, 64, 64)
    expected, actual = model(images), torch.compile(fast, backend='aot_eager', fullgraph=True)(images)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), list(m.parameters()))
                      for m, y in ((model, expected), (fast, actual)))):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4 * float(a.abs().max() + 1))
