"""Linear layers on CPUs, by whichever of torch's two libraries for products of matrices is the faster.

For inference: in a training step neither gains 5 % (docs/benchmark.md). torch gives products in float32 to MKL. On
AMD's processors oneDNN is 1.1 to 1.4 times as fast for those of tokens and weights (RESULTS.md), and computes GELU or
adds a residual on the way. Where MKL stays, a bias is added to the product; torch itself writes it into every row of
the result before.
Shapes: `M` tokens of all images, `C` channels of the tokens, `D` of the result.
"""
import functools
import math
from pathlib import Path
from typing import Optional

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils.flop_counter import register_flop_formula

# Multiplications from which on oneDNN is taken. Alone it pays from about 2 ** 23 on (RESULTS.md), but the operation
# below calls Python, which takes about 0.1 ms.
LEAST = 2 ** 25


def is_eager_inference() -> bool:
    """Whether operations run as they are written: no autograd, compiler, export or transform looks on.

    Only then results are written in place and into given memory, and work is done in pieces.
    """
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
                or transforms_are_active())


@torch.compiler.assume_constant_result
def transforms_are_active() -> bool:
    """Of torch.func (vmap, say), or forward-mode differentiation."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def linear(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None,
           residual: Optional[torch.Tensor] = None, gelu: bool = False) -> torch.Tensor:
    """residual + gelu(x weightᵀ + bias), in new memory.

    Args:
        x: (..., C).
        weight: (D, C).
        bias: (D,).
        residual: (..., D); not with `gelu`.
        gelu: apply it.

    Returns:
        (..., D).
    """
    if by_onednn_is_faster(x, weight):
        return torch.ops.xcit.linear(x, weight, bias, residual, gelu)
    by_mkl = x.dtype == torch.float32 and x.device.type == 'cpu' and not autocasts()
    if by_mkl and is_eager_inference():
        residual = None if residual is None else residual.reshape(-1, len(weight))
        return by_blas(x.reshape(-1, x.shape[-1]), weight, bias, residual, gelu).view(*x.shape[:-1], len(weight))
    if by_mkl and bias is not None and torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        # The compiler makes one operation of a product and a sum, in which the bias comes before. A difference it
        # leaves alone, and joins to what follows.
        x = x @ weight.t() - (-bias)
    else:
        x = F.linear(x, weight, bias)
    x = F.gelu(x) if gelu else x
    return x if residual is None else residual + x


def autocasts() -> bool:
    return torch.is_autocast_enabled('cpu')


def by_onednn_is_faster(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """For tokens x, where its operation can be used: without derivatives, and not in a graph for other runtimes."""
    return (x.device.type == 'cpu' and x.dtype == torch.float32 and prefers_onednn() and not is_small(x, weight)
            and not (autocasts() or torch.is_grad_enabled() or torch.jit.is_tracing()
                     or torch.compiler.is_exporting() or transforms_are_active()))


def is_small(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Of a size that the compiler takes for free it is not known; it is not to be told apart."""
    small = x.numel() * weight.shape[0] < LEAST
    return statically_known_true(small) if torch.compiler.is_compiling() else small


def lay_out(weight: torch.Tensor) -> torch.Tensor:
    """The same weight (D, C), in memory as (C, D): from there oneDNN reads it without a copy."""
    if weight.device.type != 'cpu' or weight.dtype != torch.float32 or not prefers_onednn():
        return weight
    return weight.t().contiguous().t()


@torch.compiler.assume_constant_result
def prefers_onednn() -> bool:
    return is_amd_with_onednn()


@functools.cache
def is_amd_with_onednn() -> bool:
    try:
        return has_onednn() and 'AuthenticAMD' in Path('/proc/cpuinfo').read_text()
    except OSError:  # not Linux
        return False


def has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')


def by_onednn(x, weight, bias, residual, gelu):
    if residual is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual.contiguous(), weight, bias, 'add')
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'gelu' if gelu else 'none', [], 'none')


def by_blas(x, weight, bias, residual, gelu):
    out = torch.mm(x, weight.t()) if residual is None else torch.addmm(residual, x, weight.t())
    if bias is not None:
        out += bias
    return torch.ops.aten.gelu_(out) if gelu else out


PANELS = 4  # of rows, in which a CPU computes a symmetric matrix


def covariance_in_panels(x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Covariance of the channels of tokens x (B, N, C) with the mean (B, C): (B, C, C), of each row what is needed."""
    N, C = x.shape[1:]
    x = x - mean[:, None]
    if x.device.type != 'cpu' or C % PANELS:
        return x.transpose(1, 2) @ x / N
    # Symmetric: of each panel of rows only what is right of the diagonal.
    width = C // PANELS
    result = x.new_zeros(x.shape[0], C, C)
    for first in range(0, C, width):
        panel = result[:, first:first + width, first:]
        panel.baddbmm_(x[:, :, first:first + width].transpose(1, 2), x[:, :, first:], alpha=1 / N)
        result[:, first + width:, first:first + width] = panel[:, :, width:].transpose(1, 2)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The operation: one that the compiler calls as it is. oneDNN's own it takes for inference with frozen weights alone.

def _linear(x, weight, bias, residual, gelu):
    shape = (*x.shape[:-1], weight.shape[0])
    x = x.reshape(-1, x.shape[-1]).contiguous()  # (M, C)
    residual = None if residual is None else residual.reshape(-1, shape[-1])
    takes_onednn = not is_small(x, weight) and torch._C._get_mkldnn_enabled()
    return (by_onednn if takes_onednn else by_blas)(x, weight, bias, residual, gelu).view(shape)


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
    register_flop_formula(torch.ops.xcit.linear)(_operations)
    return library


# Once in a process, also where this file is loaded again, under this name or another one, as torch.hub does
_library = globals().get('_library') if hasattr(torch.ops.xcit, 'linear') else _define()
