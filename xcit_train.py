"""Fast training: `speed_up_training` gives a model the same outputs and gradients with less work and less memory.

It replaces modules of an Xcit, in place; the parameters, their names and the state dict stay. docs/benchmark.md lists
the gain of each piece. Shapes as in xcit.py.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

import xca_gram
from xca import XCA
from xcit_attention import FastXCA, ShortClassAttention
from xcit_linear import covariance_in_panels
from xcit_timm import TimmModel

READ = ('.attn.qkv', '.attn.proj', '.mlp.fc1', '.mlp.fc2')  # layers whose weights are used without calling the layers


def speed_up_training(model: nn.Module) -> nn.Module:
    """Prepare an Xcit for training, in place; return it.

    - The backward pass of the Gram form has one product with the tokens instead of two.
    - GELU is computed again in the backward pass instead of being kept.
    - Class attention makes no keys and values of the patches.

    Raises:
        ValueError: a layer is not as it was built (adapter, quantized layer, layer with hooks). The message names the
            layer, and the model is unchanged.
    """
    if not isinstance(model, TimmModel):
        raise ValueError(f'a {type(model).__name__} cannot be sped up: it is not an Xcit of this package')
    for i, block in enumerate(model.blocks):
        if type(block.attn) is not XCA:
            raise ValueError(f'blocks.{i}.attn ({type(block.attn).__name__}) cannot be sped up: it is not an XCA as it '
                             f'was built')
    for name, layer in model.named_modules():
        if name.endswith(READ) and not xca_gram.is_plain_linear(layer):
            raise ValueError(f'{name} ({type(layer).__name__}) cannot be sped up: it is not an nn.Linear, has hooks or '
                             f'has another kind of weight')
    for block in model.blocks:
        training = block.training
        block.attn = TrainingXCA(block.attn)
        if type(block.mlp.act) is nn.GELU and block.mlp.act.approximate == 'none' and not block.mlp.drop1.p:
            block.mlp = TrainingMlp(block.mlp)
        block.train(training)
    for block in model.cls_attn_blocks:
        block.attn = ShortClassAttention(block.attn).train(block.attn.training)
    return model


class TrainingXCA(FastXCA):
    """XCA with the layers of the given module, and one product less in the backward pass of the Gram form."""

    def gram(self, x: torch.Tensor) -> torch.Tensor:
        return xca_gram.attend(self, x, Covariance.apply)


class Covariance(torch.autograd.Function):
    """Covariance (xca_gram.covariance) with one product in the backward pass; autograd adds two."""

    @staticmethod
    def forward(ctx, x, mean):
        ctx.save_for_backward(x, mean)
        return covariance_in_panels(x, mean)

    @staticmethod
    def backward(ctx, grad):
        x, mean = ctx.saved_tensors
        # The mean has no gradient, since the deviations from the mean add up to 0
        matrix = (grad + grad.transpose(1, 2)) / x.shape[1]
        return torch.baddbmm(-mean[:, None] @ matrix, x, matrix), None


class TrainingMlp(nn.Module):
    """MLP with the layers of the given module that keeps its hidden activations once, before GELU."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.fc1, self.fc2, self.drop2 = mlp.fc1, mlp.fc2, mlp.drop2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
            return self.drop2(self.fc2(F.gelu(self.fc1(x))))  # the compiler itself computes GELU again
        return self.drop2(GeluLinear.apply(self.fc1(x), self.fc2.weight, self.fc2.bias))


class GeluLinear(torch.autograd.Function):
    """Linear layer after GELU: gelu(x) weightᵀ + bias, x (..., D), weight (C, D); keeps only x for backward."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grads = grad.reshape(-1, grad.shape[-1])
        x_needs, weight_needs, bias_needs = ctx.needs_input_grad
        return (torch.ops.aten.gelu_backward(grad @ weight, x) if x_needs else None,
                grads.t() @ F.gelu(x).reshape(-1, x.shape[-1]) if weight_needs else None,
                grads.sum(dim=0) if bias_needs else None)
