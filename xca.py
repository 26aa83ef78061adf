"""Cross-covariance attention (XCA): its definition, and the Gram form, which computes the same with less work.

Shapes: `B` batch, `N` tokens, `C` channels, `h` heads, `d = C//h`.
"""
from typing import Tuple

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F

FORMS = ('auto', 'plain', 'gram')
# The number of tokens, in units of C, from which on the Gram form is the faster one. On CPUs measured by
# `python -m tools.benchmark xca`; on other devices estimated from the number of multiplications.
GRAM_FROM = {'cpu': {'training': 2., 'inference': 2.5}, 'other': {'training': 4., 'inference': 4.}}


class XCA(nn.Module):
    """Cross-covariance attention: channels attend to channels, at a cost linear in the number of tokens.

    With q, k, v = W_q x + b_q, W_k x + b_k, W_v x + b_v for each token x, and in each head:

        A = softmax(τ q̂ k̂ᵀ)        (d x d), where q̂ and k̂ are q and k (d x N), each row divided by its norm
        output = W_proj (A v) + b_proj

    Multiplications for one image, leading terms: 4 N C² + 2 N C d for the definition, 2 N C² + 3 C³ for the Gram form.

    Args:
        dim: C.
        num_heads: h.

    Attributes:
        form: 'plain' (the definition), 'gram', or 'auto': the one that is faster for this number of tokens.

    Source: paper section 3.1, equation 4; original xcit.py, XCA.
    """

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True, attn_drop: float = 0.,
                 proj_drop: float = 0., device=None, dtype=None):
        super().__init__()
        self.num_heads = num_heads
        self.form = 'auto'
        # faithful: shaped (h, 1, 1), so that rules which spare 1-d tensors do decay it (original xcit.py, XCA)
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1, device=device, dtype=dtype))
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias, device=device, dtype=dtype)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, C) -> (B, N, C)."""
        x = self.gram(x) if self.takes_gram(x) else self.definition(x)
        return self.proj_drop(x)

    def definition(self, x: torch.Tensor) -> torch.Tensor:
        B, N, C = x.shape
        h, d = self.num_heads, C // self.num_heads
        # Three dimensions each: the compiler takes four for pictures, and lays them out as convolutions like it.
        q, k, v = self.qkv(x).reshape(B, N, 3, h, d).permute(2, 0, 3, 4, 1).reshape(3, B * h, d, N).unbind(0)
        q_hat = (q / norm(q)).to(q.dtype)
        attn = self.attention(q_hat @ k.transpose(1, 2) / norm(k).transpose(1, 2))  # k's norms divide d x d, not d x N
        out = attn.to(v.dtype) @ v  # (B * h, d, N)
        return self.proj(out.reshape(B, C, N).transpose(1, 2))

    def attention(self, cosines: torch.Tensor) -> torch.Tensor:
        """q̂ k̂ᵀ (B * h, d, d) -> attention weights A (B * h, d, d)."""
        temperature = self.temperature.repeat(cosines.shape[0] // self.num_heads, 1, 1)
        return self.attn_drop((cosines * temperature).softmax(dim=-1))

    @torch.jit.unused
    def gram(self, x: torch.Tensor) -> torch.Tensor:
        """The same without q, k and v of any token: attention needs no more than the tokens' mean and covariance.

        With the mean x̄ and S = (x - x̄)ᵀ (x - x̄) / N of the tokens x (N x C), and q̄ = W_q x̄ + b_q, k̄ = W_k x̄ + b_k:

            q kᵀ / N = W_q S W_kᵀ + q̄ k̄ᵀ        |q|² / N = diag(W_q S W_qᵀ) + q̄²        and so for k
            output = x M + c,  M = W_vᵀ Aᵀ W_projᵀ,  c = W_proj (A b_v) + b_proj
        """
        mean = x.mean(dim=1)
        matrix, bias = self.mixing(mean, self.covariance(x, mean))
        return torch.baddbmm(bias, x, matrix)

    def covariance(self, x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """S (B, C, C) of the channels of tokens x (B, N, C) with the mean x̄ (B, C)."""
        x = x - mean[:, None]
        return x.transpose(1, 2) @ x / x.shape[1]

    @torch.jit.unused
    def mixing(self, mean: torch.Tensor, covariance: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Mean x̄ (B, C) and covariance S (B, C, C) of the tokens -> M (B, C, C) and c (B, 1, C)."""
        B, C = mean.shape
        h, d = self.num_heads, C // self.num_heads
        w_q, w_k, w_v = self.qkv.weight.chunk(3)
        bias = self.qkv.weight.new_zeros(3 * C) if self.qkv.bias is None else self.qkv.bias
        b_q, b_k, b_v = bias.chunk(3)

        # About the mean: tokens that are nearly alike cost no digits, nor does a bias that cancels their mean.
        q_mean, k_mean = F.linear(mean, w_q, b_q), F.linear(mean, w_k, b_k)  # (B, C)
        q_cov, k_cov = w_q @ covariance, w_k @ covariance  # (B, C, C): of q, or of k, with x
        q_norm, k_norm = (  # not below 1e-12: of 0, the square root has no derivative
            ((cov * w).sum(dim=-1).clamp_min(0) + m.square()).clamp_min(1e-24).sqrt()
            for cov, w, m in ((q_cov, w_q, q_mean), (k_cov, w_k, k_mean)))
        products = q_cov.reshape(B * h, d, C) @ w_k.reshape(h, d, C).repeat(B, 1, 1).transpose(1, 2)
        products = products + q_mean.reshape(B * h, d, 1) * k_mean.reshape(B * h, 1, d)
        attn = self.attention(products / q_norm.reshape(B * h, d, 1) / k_norm.reshape(B * h, 1, d))

        w_proj = self.proj.weight.t().reshape(h, d, C).repeat(B, 1, 1)
        mix = (attn.transpose(1, 2) @ w_proj).reshape(B, C, C)  # Aᵀ W_projᵀ: from values to the output
        return w_v.t() @ mix, (b_v @ mix + self.proj.bias)[:, None]

    def takes_gram(self, x: torch.Tensor) -> bool:
        """The rule that chooses: the Gram form from a number of tokens on, where it applies.

        It reads the matrices of `qkv` and `proj`, so that these must be no more than that. It needs sums in float32. A
        graph that is recorded for images of other sizes has the definition, unless `form` says otherwise.
        """
        if torch.jit.is_scripting():
            return False
        else:  # which TorchScript does not read
            if (isinstance(x, torch.fx.Proxy) or self.form == 'plain' or in_half_precision(x)
                    or not self.reads_as_matrices()):
                return False
            if self.form == 'gram':
                return True
            threshold = GRAM_FROM.get(x.device.type, GRAM_FROM['other'])
            return not torch.compiler.is_exporting() and (
                x.shape[1] >= threshold['training' if torch.is_grad_enabled() else 'inference'] * x.shape[2])

    def reads_as_matrices(self) -> bool:
        """Whether `qkv` and `proj` are no more than weight and bias: no adapters, no hooks, nothing quantized."""
        return is_its_weights(self.qkv) and is_its_weights(self.proj) and self.proj.bias is not None


@torch.fx.wrap
def norm(q: torch.Tensor) -> torch.Tensor:
    """Of each channel over the tokens, in float32 at least: (B * h, d, N) -> (B * h, d, 1)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    least = 1e-12 * q.shape[-1] ** .5  # of channels that are 0 for all tokens
    return torch.linalg.vector_norm(q, dim=-1, keepdim=True, dtype=dtype).clamp_min(least)


def in_half_precision(x: torch.Tensor) -> bool:
    """Whether products of x are in half precision, as its own type or autocast has it."""
    return x.dtype in (torch.float16, torch.bfloat16) or (
        x.device.type != 'meta' and torch.is_autocast_enabled(x.device.type))


def is_its_weights(layer: nn.Module) -> bool:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return (type(layer) is nn.Linear and 'forward' not in vars(layer) and not any(hooks)
            and type(layer.weight) in (nn.Parameter, torch.Tensor))
