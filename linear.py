"""Linear layers on CPUs, by whichever of torch's two libraries for products of matrices is the faster.

torch gives products in float32 to MKL. On AMD's processors oneDNN is 1.1 to 1.4 times as fast for those of tokens and
weights (RESULTS.md), and computes GELU or adds a residual on the way; there it takes the place of `torch.nn.Linear`.
Shapes: `M` tokens of all images, `C` channels of the tokens, `D` of the result.
"""
import functools
import math
from pathlib import Path
from typing import Optional

import torch
import torch.nn as nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

# Multiplications from which on oneDNN is taken. Alone it pays from about 2 ** 23 on (RESULTS.md); training also calls
# Python for each layer and gradient, which takes about 0.1 ms.
LEAST = 2 ** 25


def linear(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None,
           residual: Optional[torch.Tensor] = None, gelu: bool = False) -> torch.Tensor:
    """residual + gelu(x weightᵀ + bias), in new memory.

    Args:
        x: (..., C).
        weight: (D, C).
        bias: (D,).
        residual: (..., D); not with `gelu`, and neither where gradients are wanted.
        gelu: apply it.

    Returns:
        (..., D).
    """
    assert x.shape[-1] == weight.shape[1]
    assert residual is None or residual.shape == (*x.shape[:-1], weight.shape[0])
    return torch.ops.xcit.linear(x, weight, bias, residual, gelu)


def call(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """layer(x), by `linear` where that is the same and faster."""
    if not is_linear(layer) or not is_faster(x):
        return layer(x)
    # Sizes are not to be looked at where the compiler may take them for free ones.
    if not torch.compiler.is_compiling() and not is_large(x, layer.weight):
        return layer(x)
    return linear(x, layer.weight, layer.bias)


def is_faster(x: torch.Tensor) -> bool:
    """Whether `linear` is to be preferred to a linear layer for tokens x.

    Not where a graph is recorded for other runtimes, nor in transforms that have no rule for it.
    """
    return (x.device.type == 'cpu' and x.dtype == torch.float32 and prefers_onednn()
            and not torch.is_autocast_enabled('cpu')
            and not (torch.jit.is_tracing() or torch.compiler.is_exporting() or transforms_are_active()))


def is_large(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return x.numel() * weight.shape[0] >= LEAST


def lay_out(weight: torch.Tensor) -> torch.Tensor:
    """The same weight (D, C), in memory as (C, D): from there oneDNN reads it without a copy."""
    if weight.device.type != 'cpu' or weight.dtype != torch.float32 or not prefers_onednn():
        return weight
    return weight.t().contiguous().t()


@torch.compiler.assume_constant_result
def prefers_onednn() -> bool:
    return _prefers_onednn()


@functools.cache
def _prefers_onednn() -> bool:
    try:
        return has_onednn() and 'AuthenticAMD' in Path('/proc/cpuinfo').read_text()
    except OSError:  # not Linux
        return False


def has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is no more than its weight and bias, and nobody listens to it."""
    return (type(layer) is nn.Linear and 'forward' not in layer.__dict__ and not has_hooks(layer)
            and type(layer.weight) in (nn.Parameter, torch.Tensor))  # and no quantized one, say


def has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


@torch.jit.unused
def in_transform() -> bool:
    """Whether a transform of torch.func is at work, vmap, say, or forward-mode differentiation.

    For those the autograd functions here have no rule, nor have operations that write into given memory.
    """
    if torch.compiler.is_compiling():  # whose own plan includes them
        return False
    return transforms_are_active()


@torch.compiler.assume_constant_result
def transforms_are_active() -> bool:
    """The same, also while a compiler looks on."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def is_eager() -> bool:
    """Whether operations run as they are written, with no plan of a transform, a compiler or an export."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or in_transform())


def is_eager_inference() -> bool:
    """The same, and without autograd."""
    return not torch.is_grad_enabled() and is_eager()


# ---------------------------------------------------------------------------------------------------------------------
# The operation: one that the compiler calls as it is. oneDNN's own it takes for inference with frozen weights alone.

def _linear(x, weight, bias, residual, gelu):
    shape = (*x.shape[:-1], weight.shape[0])
    x = x.reshape(-1, x.shape[-1]).contiguous()  # (M, C)
    if residual is not None:
        residual = residual.reshape(-1, shape[-1])
    if (x.dtype == torch.float32 and x.device.type == 'cpu' and is_large(x, weight) and prefers_onednn()
            and torch._C._get_mkldnn_enabled()):
        out = by_onednn(x, weight, bias, residual, gelu)
    else:
        out = by_blas(x, weight, bias, residual, gelu)
    return out.view(shape)


def by_onednn(x, weight, bias, residual, gelu):
    if residual is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual.contiguous(), weight, bias, 'add')
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'gelu' if gelu else 'none', [], 'none')


def by_blas(x, weight, bias, residual, gelu):
    # The bias after the product: torch would write it into every row before.
    out = torch.mm(x, weight.t()) if residual is None else torch.addmm(residual, x, weight.t())
    if bias is not None:
        out += bias
    return torch.ops.aten.gelu_(out) if gelu else out


def _keep_for_backward(ctx, inputs, output):
    x, weight, bias, residual, gelu = inputs
    assert residual is None
    assert not gelu
    wants_x, wants_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    grads = grad.reshape(-1, grad.shape[-1])
    grad_x = grad_weight = None
    if wants_x:
        grad_x = grad @ weight if in_transform() else linear(grad, weight.t())
    if wants_weight:  # a sum over tokens, at which oneDNN is no faster
        grad_weight = grads.t() @ x.reshape(-1, x.shape[-1])
    return grad_x, grad_weight, grads.sum(dim=0) if wants_bias else None, None, None


def _operations(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """For torch.utils.flop_counter."""
    return 2 * math.prod(x_shape) * weight_shape[0]


def _define() -> torch.library.Library:
    library = torch.library.Library('xcit', 'FRAGMENT')
    name = 'xcit::linear'
    library.define('linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool gelu) -> Tensor')
    library.impl('linear', _linear, 'CompositeExplicitAutograd')
    torch.library.register_fake(
        name, lambda x, weight, bias, residual, gelu: x.new_empty(*x.shape[:-1], weight.shape[0]), lib=library)
    torch.library.register_autograd(name, _backward, setup_context=_keep_for_backward, lib=library)
    register_flop_formula(torch.ops.xcit.linear)(_operations)
    return library


# Once in a process, also where this file is loaded again, under this name or another one, as torch.hub does
_library = globals().get('_library') if hasattr(torch.ops.xcit, 'linear') else _define()
