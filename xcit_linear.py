"""Linear layers for inference on CPUs, by the faster of torch's two libraries for matrix products, and covariances.

torch computes products in float32 by MKL. On AMD processors oneDNN is 1.1 to 1.4 times as fast for products of tokens
and weights (RESULTS.md), and computes GELU or adds a residual in the same pass. With MKL, the bias is added after the
product; torch itself writes the bias into every row of the result before the product. In a training step both gain
less than 5 % (docs/benchmark.md).
Shapes: `M` tokens of all images, `C` channels of the tokens, `D` channels of the result.
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

# Smallest number of multiplications for oneDNN. oneDNN alone is faster from about 2 ** 23 on (RESULTS.md), but the
# operation below calls Python, which takes about 0.1 ms.
LEAST = 2 ** 25


def is_eager_inference() -> bool:
    """Return True if no autograd, compiler, export or transform records the operations.

    Only then modules write in place and into given memory, and work in pieces.
    """
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
                or transforms_are_active())


@torch.compiler.assume_constant_result
def transforms_are_active() -> bool:
    """Return True inside a transform of torch.func (e.g. vmap) or forward-mode differentiation."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def linear(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None,
           residual: Optional[torch.Tensor] = None, gelu: bool = False) -> torch.Tensor:
    """Compute gelu(x weightᵀ + bias), or residual + x weightᵀ + bias, (..., D) in new memory.

    Args:
        x, weight, bias, residual: (..., C), (D, C), (D,) and (..., D).
        gelu: apply GELU; only without `residual`.
    """
    if by_onednn_is_faster(x, weight):
        return torch.ops.xcit.linear(x, weight, bias, residual, gelu)
    by_mkl = x.dtype == torch.float32 and x.device.type == 'cpu' and not torch.is_autocast_enabled('cpu')
    if by_mkl and is_eager_inference():
        residual = None if residual is None else residual.reshape(-1, len(weight))
        return by_blas(x.reshape(-1, x.shape[-1]), weight, bias, residual, gelu).view(*x.shape[:-1], len(weight))
    if by_mkl and bias is not None and torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        # The compiler would merge a product and a sum into one operation that writes the bias first. A difference is
        # not merged, but fused with the following operations.
        x = x @ weight.t() - (-bias)
    else:
        x = F.linear(x, weight, bias)
    x = F.gelu(x) if gelu else x
    return x if residual is None else residual + x


def by_onednn_is_faster(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return True if oneDNN is usable (no derivatives, no graph for other runtimes) and faster for tokens x."""
    return (x.device.type == 'cpu' and x.dtype == torch.float32 and prefers_onednn() and not is_small(x, weight)
            and not (torch.is_autocast_enabled('cpu') or torch.is_grad_enabled() or torch.jit.is_tracing()
                     or torch.compiler.is_exporting() or transforms_are_active()))


def is_small(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return True if the product is too small for oneDNN; False for dynamic sizes, which must not add a guard."""
    small = x.numel() * weight.shape[0] < LEAST
    return statically_known_true(small) if torch.compiler.is_compiling() else small


def lay_out(weight: torch.Tensor) -> torch.Tensor:
    """Return the weight (D, C) with the memory layout (C, D), which oneDNN reads without a copy."""
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


PANELS = 4  # panels of rows in which a CPU computes a symmetric matrix


def covariance_in_panels(x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Compute xca_gram.covariance with half of the products on CPUs: (B, N, C), mean (B, C) -> (B, C, C)."""
    N, C = x.shape[1:]
    x = x - mean[:, None]
    if x.device.type != 'cpu' or C % PANELS:
        return x.transpose(1, 2) @ x / N
    # Symmetric: only the part of each panel of rows to the right of the diagonal is computed.
    width = C // PANELS
    result = x.new_zeros(x.shape[0], C, C)
    for first in range(0, C, width):
        panel = result[:, first:first + width, first:]
        panel.baddbmm_(x[:, :, first:first + width].transpose(1, 2), x[:, :, first:], alpha=1 / N)
        result[:, first + width:, first:first + width] = panel[:, :, width:].transpose(1, 2)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Custom operation, which the compiler calls unchanged; the compiler uses oneDNN's own only for frozen weights.

def _linear(x, weight, bias, residual, gelu):
    shape = (*x.shape[:-1], weight.shape[0])
    x = x.reshape(-1, x.shape[-1]).contiguous()  # (M, C)
    residual = None if residual is None else residual.reshape(-1, shape[-1])
    uses_onednn = not is_small(x, weight) and torch._C._get_mkldnn_enabled()
    return (by_onednn if uses_onednn else by_blas)(x, weight, bias, residual, gelu).view(shape)


def _operations(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """Count operations for torch.utils.flop_counter."""
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


# Once per process, even if this file is imported again, under this name or another name, as by torch.hub
_library = globals().get('_library') if hasattr(torch.ops.xcit, 'linear') else _define()
