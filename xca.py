"""Cross-covariance attention (XCA): its definition, and the Gram form, which computes the same with less work.

Shapes: `B` batch, `N` tokens, `C` channels, `h` heads, `d = C//h`.
"""
import contextlib
from typing import Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from linear import call, in_transform, is_eager_inference, is_faster, is_linear, linear

FORMS = ('auto', 'plain', 'gram')
# The number of tokens, in units of C, from which on 'auto' takes the Gram form. On a CPU in float32 measured, by
# `python -m tools.benchmark xca` (RESULTS.md) and with `speed --xca`: in inference it is 2 for attention alone, and for
# fused models 2.2 (C = 384 and 768) to 3.5 (C = 192). On GPUs from the number of multiplications, and not measured.
GRAM_FROM = {
    'cpu': {'training': 2., 'inference': 2.5},
    'other': {'training': 4., 'inference': 4.},
    'other, half': {'training': 10., 'inference': 6.},
}
HALF = (torch.float16, torch.bfloat16)
PANELS = 4  # of rows, in which a CPU computes a symmetric matrix


class XCA(nn.Module):
    """Cross-covariance attention: channels attend to channels, at a cost linear in the number of tokens.

    `definition` is what it says, and `by_rows` the same without copies. `gram` makes neither queries nor keys nor
    values: attention follows from the tokens' covariance, and its effect on them is one C x C matrix. Multiplications
    for one image, leading terms: 4 N C^2 + 2 N C d for the definition, 2 N C^2 + 3 C^3 for the Gram form.

    Args:
        dim: C.
        num_heads: h.

    Attributes:
        form: 'plain' (the definition), 'gram', or 'auto': the one that is faster for this number of tokens. Where `qkv`
            or `proj` has hooks or is no plain linear layer, under torch.func's transforms and in forward-mode
            differentiation, it is always the definition.

    Source: paper section 3.1, equation 4; original xcit.py, XCA.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, attn_drop: float = 0., proj_drop: float = 0.):
        super().__init__()
        self.num_heads = num_heads
        self.form = 'auto'
        # faithful: shaped (h, 1, 1), so that rules which spare 1-d tensors do decay it (original xcit.py, XCA)
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, C) -> (B, N, C)."""
        if not torch.jit.is_scripting() and self.takes_gram(x):
            x = self.gram(x)
        else:
            x = self.plain(x)
        return self.proj_drop(x)

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return self.proj(self.definition(self.qkv(x)))
        qkv = call(self.qkv, x)
        return call(self.proj, self.by_rows(qkv) if self.takes_rows(qkv) else self.definition(qkv))

    def definition(self, qkv: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values of every token (B, N, 3 C) -> what attention makes of the values, (B, N, C)."""
        B, N, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        # Not (B, h, d, N): the compiler takes four dimensions for pictures, and lays them out as convolutions like it.
        shape = (B * self.num_heads, C // self.num_heads, N)
        q, k, v = [part.transpose(1, 2).reshape(shape) for part in qkv.chunk(3, dim=2)]
        # Norms are over tokens: divided by them, the products are cosines, whatever N is. Dividing these (d x d)
        # instead of q and k (N x d) saves two passes over the tokens.
        q_norm, k_norm = root_mean_square(q), root_mean_square(k)
        if q.dtype == torch.float16:  # whose range the products of small q and k would leave: here q is divided
            q, q_norm = (q / q_norm.clamp_min(1e-12)[..., None]).to(q.dtype), torch.ones_like(q_norm)
        attn = self.attention(mean_product(q, k), q_norm, k_norm)
        return torch.bmm(attn, v).view(B, C, N).transpose(1, 2)

    @torch.jit.unused
    def takes_rows(self, qkv: torch.Tensor) -> bool:
        # In training it was no faster, and for GPUs it was not measured.
        return is_eager_inference() and qkv.device.type == 'cpu' and not is_half(qkv)

    @torch.jit.unused
    def by_rows(self, qkv: torch.Tensor) -> torch.Tensor:
        """`definition` with queries, keys and values left where `qkv` has put them, one row for each token."""
        B, N, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        h, d = self.num_heads, C // self.num_heads
        qkv = qkv.reshape(B, N, 3, h, d)
        q_norm, k_norm = qkv[:, :, :2].square().mean(dim=1).sqrt_().transpose(0, 1).reshape(2, B * h, d)
        products, out = qkv.new_empty(B, h, d, d), qkv.new_empty(B, N, C)
        # Image by image: heads lie between tokens, so that products of several images at once would copy them.
        for i in range(B):
            q, k = qkv[i, :, 0].permute(1, 2, 0), qkv[i, :, 1].transpose(0, 1)  # (h, d, N), (h, N, d)
            torch.baddbmm(products[i], q, k, beta=0, alpha=1 / N, out=products[i])
        weights = self.attention(products.flatten(0, 1), q_norm, k_norm).view(B, h, d, d)
        for i in range(B):
            of_heads = out[i].view(N, h, d).transpose(0, 1)
            torch.bmm(qkv[i, :, 2].transpose(0, 1), weights[i].transpose(1, 2), out=of_heads)
        return out

    def attention(self, products: torch.Tensor, q_norm: torch.Tensor, k_norm: torch.Tensor) -> torch.Tensor:
        """q kᵀ (B * h, d, d) and norms of q and k over tokens, (B * h, d) -> attention weights (B * h, d, d)."""
        # Norms of 0: as in torch.nn.functional.normalize
        cosines = products / q_norm.clamp_min(1e-12)[:, :, None] / k_norm.clamp_min(1e-12)[:, None, :]
        temperature = self.temperature.repeat(products.shape[0] // self.num_heads, 1, 1)
        return self.attn_drop((cosines * temperature).softmax(dim=-1)).to(products.dtype)

    # ----- the second form

    @torch.jit.unused
    def takes_gram(self, x: torch.Tensor) -> bool:
        if not self.is_plain() or in_transform():
            return False
        if self.form != 'auto':
            return self.form == 'gram'
        half = is_half(x)
        if half and not sums_half_in_float32(x.device):
            return False
        threshold = GRAM_FROM['cpu' if x.device.type == 'cpu' else 'other, half' if half else 'other']
        return x.shape[1] >= threshold['training' if torch.is_grad_enabled() else 'inference'] * x.shape[2]

    @torch.jit.unused
    def is_plain(self) -> bool:
        """Whether the weights and biases of the layers are all there is, and not adapters as well, say."""
        return is_linear(self.qkv) and is_linear(self.proj) and self.proj.bias is not None

    @torch.jit.unused
    def gram(self, x: torch.Tensor) -> torch.Tensor:
        dtype = product_type(x)
        with without_autocast(x.device):
            mean = x.mean(dim=1, dtype=at_least_float32(x.dtype))
            matrix, bias = self.mixing(mean, covariance(x, mean, dtype))
            if dtype == x.dtype and x.shape[0] == 1 and is_faster(x):
                return linear(x, matrix[0].t(), bias.flatten())
            return torch.baddbmm(bias.to(dtype), x.to(dtype), matrix.to(dtype))

    @torch.jit.unused
    def mixing(self, mean: torch.Tensor, covariance: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """What attention does to all tokens alike.

        Args:
            mean: of the tokens x, (B, C).
            covariance: of their channels, (B, C, C); both in float32, or in float64.

        Returns:
            Matrix (B, C, C) and bias (B, 1, C): attention's output is x @ matrix + bias.
        """
        B, C = mean.shape
        h, d = self.num_heads, C // self.num_heads
        w_q, w_k, w_v = self.qkv.weight.to(mean.dtype).chunk(3)
        b_q, b_k, b_v = self.biases(mean.dtype)
        w_proj = self.proj.weight.to(mean.dtype)

        # With x = mean + rest: q = W_q x + b_q has the mean q_mean, and W_q cov(x) W_kᵀ as its covariance with k. So
        # tokens that are nearly alike cost no digits, nor does a bias that cancels their mean.
        q_mean, k_mean = F.linear(mean, w_q, b_q), F.linear(mean, w_k, b_k)
        wq_cov, wk_cov = w_q @ covariance, w_k @ covariance  # (B, C, C)
        q_norm, k_norm = (  # not below 1e-12: of 0, the square root has no derivative
            ((w_cov * w).sum(dim=-1).clamp_min(0) + m.square()).clamp_min(1e-24).sqrt().view(B * h, d)
            for w_cov, w, m in ((wq_cov, w_q, q_mean), (wk_cov, w_k, k_mean)))
        products = torch.bmm(wq_cov.view(B * h, d, C), w_k.view(h, d, C).repeat(B, 1, 1).transpose(1, 2))
        products = products + q_mean.view(B * h, d, 1) * k_mean.view(B * h, 1, d)
        attn = self.attention(products, q_norm, k_norm)

        # Values, attention and projection are linear in x.
        w_proj = w_proj.t().view(h, d, C).repeat(B, 1, 1)
        mix = torch.bmm(attn.transpose(1, 2), w_proj).view(B, C, C)  # from values to the output
        return w_v.t() @ mix, (b_v @ mix + self.proj.bias.to(mean.dtype))[:, None]

    def biases(self, dtype: torch.dtype) -> Tuple[torch.Tensor, ...]:
        bias = self.qkv.bias
        return (self.qkv.weight.new_zeros(3 * self.proj.in_features) if bias is None else bias).to(dtype).chunk(3)


def product_type(x: torch.Tensor) -> torch.dtype:
    """Of a product of x, which autocast may decide."""
    if x.dtype == torch.float64 or not in_autocast(x.device):  # autocast leaves float64 alone
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def is_half(x: torch.Tensor) -> bool:
    """Whether products of x are in half precision."""
    return product_type(x) in HALF


def in_autocast(device: torch.device) -> bool:
    # Not torch.amp.is_autocast_available: torch 2.11's compiler breaks its graph there, once in every layer
    return device.type != 'meta' and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device):
    """A context in which products have their factors' type."""
    return torch.autocast(device.type, enabled=False) if in_autocast(device) else contextlib.nullcontext()


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def root_mean_square(q: torch.Tensor) -> torch.Tensor:
    """Over tokens: (..., N) -> (...), float32 at least."""
    return torch.linalg.vector_norm(q, dim=-1, dtype=at_least_float32(q.dtype)) / q.shape[-1] ** .5


def mean_product(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q kᵀ / N of each head: twice (B * h, d, N) -> (B * h, d, d)."""
    # A mean, since a sum over many tokens overflows in float16. baddbmm scales before it rounds.
    return torch.baddbmm(q.new_zeros(()), q, k.transpose(1, 2), beta=0, alpha=1 / q.shape[-1])


def covariance(x: torch.Tensor, mean: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Of channels over tokens: x (B, N, C), its mean (B, C) -> (B, C, C) in the mean's type.

    Products are taken in `dtype`; sums in float32 at least.
    """
    if torch.is_grad_enabled() and not torch.jit.is_tracing():  # a traced model that holds Python can't be stored
        return Covariance.apply(x, mean, dtype)
    return _covariance(x, mean, dtype)


def _covariance(x: torch.Tensor, mean: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    N, C = x.shape[1:]
    x = (x - mean[:, None]).to(dtype)
    if x.device.type != 'cpu' or C % PANELS or dtype in HALF:
        return product(x.transpose(1, 2), x) / N
    # Symmetric: of each panel of rows only what is right of the diagonal.
    width = C // PANELS
    result = x.new_zeros(x.shape[0], C, C)
    for first in range(0, C, width):
        panel = result[:, first:first + width, first:]
        panel.baddbmm_(x[:, :, first:first + width].transpose(1, 2), x[:, :, first:], alpha=1 / N)
        result[:, first + width:, first:first + width] = panel[:, :, width:].transpose(1, 2)
    return result


class Covariance(torch.autograd.Function):
    """`covariance` with one product in the backward pass, where autograd makes two and adds them."""

    @staticmethod
    def forward(ctx, x, mean, dtype):
        ctx.save_for_backward(x, mean)
        ctx.dtype = dtype
        return _covariance(x, mean, dtype)

    @staticmethod
    def backward(ctx, grad):
        x, mean = ctx.saved_tensors
        # The mean has no part in it: deviations from it add up to 0.
        matrix = (grad + grad.transpose(1, 2)) / x.shape[1]
        if ctx.dtype in HALF:  # its range: the matrix is small, with many tokens
            scale = matrix.abs().amax(dim=(1, 2), keepdim=True).clamp_min(1e-30)
            deviations = (x - mean[:, None]).to(ctx.dtype)
            grad_x = product(deviations, (matrix / scale).to(ctx.dtype)) * scale
        else:
            grad_x = torch.baddbmm(-mean[:, None] @ matrix, x.to(ctx.dtype), matrix)
        return grad_x.to(x.dtype), None, None


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b of batches of matrices, in float32 where they are in half precision."""
    if a.dtype not in HALF:
        return a @ b
    if sums_half_in_float32(a.device):
        return torch.bmm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def sums_half_in_float32(device: torch.device) -> bool:
    """Whether a device has a product of matrices in half precision with its result in float32."""
    return device.type == 'cuda' and torch.version.hip is None
