"""The Gram form of cross-covariance attention: the same result from the tokens' mean and covariance, with less work.

With the mean x̄ and S = (x - x̄)ᵀ (x - x̄) / N of the tokens x (N x C), and q̄ = W_q x̄ + b_q, k̄ = W_k x̄ + b_k:

    q kᵀ / N = W_q S W_kᵀ + q̄ k̄ᵀ        |q|² / N = diag(W_q S W_qᵀ) + q̄²        |k|² / N = diag(W_k S W_kᵀ) + k̄²
    output = x M + c,  M = W_vᵀ Aᵀ W_projᵀ,  c = W_proj (A b_v) + b_proj

Multiplications for one image, leading terms: 4 N C² + 2 N C d in the plain form, 2 N C² + 3 C³ in the Gram form.
`attn` is an xca.XCA, or a module with its attributes. Shapes as in xca.py.
"""
from typing import Callable, Tuple

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F

FORMS = ('auto', 'plain', 'gram')
# Smallest number of tokens, in units of C, for which the Gram form is faster. On CPUs measured by
# `python -m tools.benchmark xca`; on other devices estimated from the number of multiplications.
GRAM_FROM = {'cpu': {'training': 2., 'inference': 2.5}, 'other': {'training': 4., 'inference': 4.}}


def applies(attn: nn.Module, x: torch.Tensor) -> bool:
    """Return True if the Gram form, which reads the weights of `qkv` and `proj`, is right for tokens x (B, N, C)."""
    return (is_chosen(attn.form, x) and is_plain_linear(attn.qkv) and is_plain_linear(attn.proj)
            and attn.proj.bias is not None)


def is_chosen(form: str, x: torch.Tensor) -> bool:
    """Return True if `form`, one of FORMS, is the Gram form for tokens x (B, N, C).

    The Gram form needs sums in float32. A graph that is exported for images of other sizes is plain unless `form` is
    'gram'.
    """
    if isinstance(x, torch.fx.Proxy) or form == 'plain' or in_half_precision(x):
        return False
    if form == 'gram':
        return True
    threshold = GRAM_FROM.get(x.device.type, GRAM_FROM['other'])
    return not torch.compiler.is_exporting() and (
        x.shape[1] >= threshold['training' if torch.is_grad_enabled() else 'inference'] * x.shape[2])


def in_half_precision(x: torch.Tensor) -> bool:
    """Return True if products of x are in half precision, by its dtype or by autocast."""
    return x.dtype in (torch.float16, torch.bfloat16) or (
        x.device.type != 'meta' and torch.is_autocast_enabled(x.device.type))


def is_plain_linear(layer: nn.Module) -> bool:
    """Return True if a call of the layer only applies its weight and bias: no adapter, hook or quantized weight."""
    return type(layer) is nn.Linear and not is_intercepted(layer) and type(layer.weight) in (nn.Parameter, torch.Tensor)


def is_intercepted(layer: nn.Module) -> bool:
    """Return True if a call of the layer runs hooks or a replaced forward method."""
    return 'forward' in vars(layer) or any((layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks,
                                            layer._backward_pre_hooks))


def covariance(x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Compute the covariance S (B, C, C) of the channels of tokens x (B, N, C) with the mean x̄ (B, C)."""
    x = x - mean[:, None]
    return x.transpose(1, 2) @ x / x.shape[1]


def attend(attn: nn.Module, x: torch.Tensor, compute_covariance: Callable = covariance) -> torch.Tensor:
    """Compute attention and projection of tokens: (B, N, C) -> (B, N, C)."""
    mean = x.mean(dim=1)
    matrix, bias = mixing(attn, mean, compute_covariance(x, mean))
    return torch.baddbmm(bias, x, matrix)


def mixing(attn: nn.Module, mean: torch.Tensor, cov: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Compute M (B, C, C) and c (B, 1, C) from the mean x̄ (B, C) and the covariance S (B, C, C) of the tokens."""
    B, C = mean.shape
    h, d = attn.num_heads, C // attn.num_heads
    w_q, w_k, w_v = attn.qkv.weight.chunk(3)
    bias = attn.qkv.weight.new_zeros(3 * C) if attn.qkv.bias is None else attn.qkv.bias
    b_q, b_k, b_v = bias.chunk(3)

    # Relative to the mean, so that nearly equal tokens, or a bias that cancels their mean, lose no digits.
    q_mean, k_mean = F.linear(mean, w_q, b_q), F.linear(mean, w_k, b_k)  # (B, C)
    q_cov, k_cov = w_q @ cov, w_k @ cov  # (B, C, C): of q, or of k, with x
    q_norm, k_norm = (  # at least 1e-12, since the square root has no derivative at 0
        ((c * w).sum(dim=-1).clamp_min(0) + m.square()).clamp_min(1e-24).sqrt()
        for c, w, m in ((q_cov, w_q, q_mean), (k_cov, w_k, k_mean)))
    products = q_cov.reshape(B * h, d, C) @ w_k.reshape(h, d, C).repeat(B, 1, 1).transpose(1, 2)
    products = products + q_mean.reshape(B * h, d, 1) * k_mean.reshape(B * h, 1, d)
    weights = attention_weights(attn, products / q_norm.reshape(B * h, d, 1) / k_norm.reshape(B * h, 1, d))

    w_proj = attn.proj.weight.t().reshape(h, d, C).repeat(B, 1, 1)
    mix = (weights.transpose(1, 2) @ w_proj).reshape(B, C, C)  # Aᵀ W_projᵀ: from values to the output
    return w_v.t() @ mix, (b_v @ mix + attn.proj.bias)[:, None]


def attention_weights(attn: nn.Module, cosines: torch.Tensor) -> torch.Tensor:
    """Compute A (B * h, d, d) from q̂ k̂ᵀ (B * h, d, d)."""
    temperature = attn.temperature.repeat(cosines.shape[0] // attn.num_heads, 1, 1)
    return attn.attn_drop((cosines * temperature).softmax(dim=-1))
