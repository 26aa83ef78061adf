"""The door to fast training: `speed_up_training` gives the same outputs and gradients with less work and less memory.

It replaces modules of an Xcit, in place; the parameters, their names and the state dict stay. What each piece brings is
in docs/benchmark.md. Shapes as in xcit.py.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from xca import XCA, is_its_weights
from xcit_fuse import ShortClassAttention
from xcit_linear import covariance_in_panels


def speed_up_training(model: nn.Module) -> nn.Module:
    """Prepare an Xcit for training, in place; returns it.

    - The backward pass of the Gram form has one product with the tokens instead of two.
    - GELU is computed again in the backward pass instead of being kept.
    - Class attention makes no keys and values of the patches.

    Raises:
        ValueError: a layer is not as it was built: an adapter, say, one that is quantized, or one that somebody listens
            to. It is named, and the model is as it was.
    """
    if not isinstance(getattr(model, 'blocks', None), nn.ModuleList) or not hasattr(model, 'pos_embeder'):
        raise ValueError(f'a {type(model).__name__} cannot be sped up: it is no Xcit of this package')
    for i in range(len(model.blocks)):
        if type(model.blocks[i].attn) is not XCA:
            raise ValueError(f'blocks.{i}.attn ({type(model.blocks[i].attn).__name__}) cannot be sped up: it is no XCA '
                             f'as it was built')
    for name, layer in model.named_modules():
        if name.endswith(READ) and not is_its_weights(layer):
            raise ValueError(f'{name} ({type(layer).__name__}) cannot be sped up: it is no nn.Linear, has hooks, or '
                             f'another kind of weight')
    for block in model.blocks:
        training = block.training
        block.attn = TrainingXCA(block.attn)
        if type(block.mlp.act) is nn.GELU and block.mlp.act.approximate == 'none' and not block.mlp.drop1.p:
            block.mlp = TrainingMlp(block.mlp)
        block.train(training)
    for block in model.cls_attn_blocks:
        block.attn = ShortClassAttention(block.attn).train(block.attn.training)
    return model


READ = ('.attn.qkv', '.attn.proj', '.mlp.fc1', '.mlp.fc2')  # whose weights are used without calling them


class TrainingXCA(XCA):
    """XCA with the layers of the given one."""

    def __init__(self, attn: XCA):
        nn.Module.__init__(self)
        self.num_heads, self.form, self.temperature = attn.num_heads, attn.form, attn.temperature
        self.qkv, self.attn_drop, self.proj, self.proj_drop = attn.qkv, attn.attn_drop, attn.proj, attn.proj_drop

    def reads_as_matrices(self) -> bool:
        return True  # asked once, by the door

    def covariance(self, x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        return Covariance.apply(x, mean)


class Covariance(torch.autograd.Function):
    """XCA.covariance with one product in the backward pass, where autograd makes two and adds them."""

    @staticmethod
    def forward(ctx, x, mean):
        ctx.save_for_backward(x, mean)
        return covariance_in_panels(x, mean)

    @staticmethod
    def backward(ctx, grad):
        x, mean = ctx.saved_tensors
        # The mean has no part in it: deviations from it add up to 0.
        matrix = (grad + grad.transpose(1, 2)) / x.shape[1]
        return torch.baddbmm(-mean[:, None] @ matrix, x, matrix), None


class TrainingMlp(nn.Module):
    """A block's MLP that keeps its hidden activations once, before GELU; with the layers of the given one."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.fc1, self.fc2, self.drop2 = mlp.fc1, mlp.fc2, mlp.drop2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
            return self.drop2(self.fc2(F.gelu(self.fc1(x))))  # the compiler computes GELU again by itself
        return self.drop2(GeluLinear.apply(self.fc1(x), self.fc2.weight, self.fc2.bias))


class GeluLinear(torch.autograd.Function):
    """gelu(x) weightᵀ + bias, of x (..., D) and weight (C, D); the backward pass needs no more than x."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grads = grad.reshape(-1, grad.shape[-1])
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (torch.ops.aten.gelu_backward(grad @ weight, x) if wants_x else None,
                grads.t() @ F.gelu(x).reshape(-1, x.shape[-1]) if wants_weight else None,
                grads.sum(dim=0) if wants_bias else None)
