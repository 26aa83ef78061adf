"""Attention layers that both `xcit.fuse` and `xcit.speed_up_training` use: the same results in a faster order.

They share the layers of the modules that they replace, and use the layers' weights without calling the layers. Shapes
as in xcit.py.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

import xca_gram
from xca import XCA, norm


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
