"""Fast training: `speed_up_training` gives a model the same outputs and gradients with less work and less memory.

It replaces modules of an Xcit, in place; the parameters, their names and the state dict stay. The new modules share
the layers of the replaced modules, and use the layers' weights without calling the layers. docs/benchmark.md lists the
gain of each piece. Shapes as in xcit.py.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

import xca_gram
from xca import XCA, norm
from xcit_linear import covariance_in_panels
from xcit_timm import network_of

READ = ('.attn.qkv', '.attn.proj', '.mlp.fc1', '.mlp.fc2')  # layers whose weights are used without calling the layers


def speed_up_training(model: nn.Module) -> nn.Module:
    """Prepare an Xcit, or a `features_only` model with an Xcit, for training, in place; return it.

    - The backward pass of the Gram form has one product with the tokens instead of two.
    - GELU is computed again in the backward pass instead of being kept.
    - Class attention makes no keys and values of the patches.

    Raises:
        ValueError: a layer is not as it was built (adapter, quantized layer, layer with hooks). The message names the
            layer, and the model is unchanged.
    """
    network = network_of(model, 'sped up')
    for i, block in enumerate(network.blocks):
        if type(block.attn) is not XCA:
            raise ValueError(f'blocks.{i}.attn ({type(block.attn).__name__}) cannot be sped up: it is not an XCA as it '
                             f'was built')
    for name, layer in network.named_modules():
        if name.endswith(READ) and not xca_gram.is_plain_linear(layer):
            raise ValueError(f'{name} ({type(layer).__name__}) cannot be sped up: it is not an nn.Linear, has hooks or '
                             f'has another kind of weight')
    for block in network.blocks:
        training = block.training
        block.attn = TrainingXCA(block.attn)
        if type(block.mlp.act) is nn.GELU and block.mlp.act.approximate == 'none' and not block.mlp.drop1.p:
            block.mlp = TrainingMlp(block.mlp)
        block.train(training)
    for block in network.cls_attn_blocks:
        block.attn = ShortClassAttention(block.attn).train(block.attn.training)
    return model


class FastXCA(nn.Module):
    """XCA for layers that `xca_gram.applies` need not check; k's norms divide the d x d products, not k (d x N)."""

    def __init__(self, attn: XCA):
        super().__init__()
        self.num_heads, self.form, self.temperature = attn.num_heads, attn.form, attn.temperature
        self.qkv, self.attn_drop, self.proj, self.proj_drop = attn.qkv, attn.attn_drop, attn.proj, attn.proj_drop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute attention between the channels of tokens: (B, N, C) -> (B, N, C)."""
        return self.proj_drop(self.gram(x) if xca_gram.is_chosen(self.form, x) else self.plain(x))

    def gram(self, x: torch.Tensor) -> torch.Tensor:
        return xca_gram.attend(self, x)

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        B, N, C = x.shape
        h, d = self.num_heads, C // self.num_heads
        # Three dimensions each: the compiler treats tensors of four as images and gives them the layout of convolutions
        q, k, v = self.qkv(x).reshape(B, N, 3, h, d).permute(2, 0, 3, 4, 1).reshape(3, B * h, d, N).unbind(0)
        q_hat = (q / norm(q)).to(q.dtype)
        attn = xca_gram.attention_weights(self, q_hat @ k.transpose(1, 2) / norm(k).transpose(1, 2))
        out = attn.to(v.dtype) @ v  # (B * h, d, N)
        return self.proj(out.reshape(B, C, N).transpose(1, 2))


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


class ShortClassAttention(nn.Module):
    """Class attention (xcit.ClassAttention) without keys and values of the patches, which one query does not need.

    (x W_kᵀ) q is computed as x (W_kᵀ q), and the weighted mean of the values as W_v times the weighted mean of the
    tokens. The bias of the keys adds the same value to all scores, which softmax ignores.
    """

    def __init__(self, attn: nn.Module):
        super().__init__()
        self.num_heads, self.qkv, self.attn_drop = attn.num_heads, attn.qkv, attn.attn_drop
        self.proj, self.proj_drop = attn.proj, attn.proj_drop

    def attention_weights(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the attention of CLS to each token: (B, 1 + N, C), CLS first -> (B, h, 1 + N), with sum 1."""
        B, _, C = x.shape
        h, d = self.num_heads, C // self.num_heads
        w_q, w_k, _ = self.qkv.weight.chunk(3)
        q = F.linear(x[:, 0], w_q, None if self.qkv.bias is None else self.qkv.bias[:C]).view(B, h, 1, d) / d ** .5
        q = (q @ w_k.reshape(h, d, C)).flatten(1, 2)  # (B, h, C)
        return (q @ x.transpose(1, 2)).softmax(dim=-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the new CLS token (B, 1, C) from tokens (B, 1 + N, C), CLS first."""
        B, _, C = x.shape
        h, d = self.num_heads, C // self.num_heads
        attn = self.attn_drop(self.attention_weights(x))
        w_v = self.qkv.weight[2 * C:].reshape(h, d, C)
        cls = (attn @ x)[:, :, None] @ w_v.transpose(1, 2)  # (B, h, 1, d)
        if self.qkv.bias is not None:
            cls = cls + attn.sum(dim=-1)[:, :, None, None] * self.qkv.bias[2 * C:].view(h, 1, d)
        return self.proj_drop(self.proj(cls.reshape(B, 1, C)))


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
