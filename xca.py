"""Cross-covariance attention (XCA): channels attend to channels, at a cost linear in the number of tokens.

With q, k, v = W_q x + b_q, W_k x + b_k, W_v x + b_v for each token x, equation 4 of the paper is, in each head:

    A = softmax(τ q̂ k̂ᵀ)        (d x d), where q̂ and k̂ are q and k (d x N), each row divided by its norm
    output = W_proj (A v) + b_proj

Shapes: `B` batch, `N` tokens, `C` channels, `h` heads, `d = C//h`.
"""
import torch
import torch.fx
import torch.nn as nn

import xca_gram


class XCA(nn.Module):
    """Cross-covariance attention with C = `dim` and h = `num_heads`.

    Attributes:
        form: 'plain' (equation 4 as written), 'gram' (the same result, see xca_gram.py), or 'auto' (the faster form
            for the number of tokens).

    Source: paper section 3.1, equation 4; original xcit.py, XCA.
    """

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True, attn_drop: float = 0.,
                 proj_drop: float = 0.):
        super().__init__()
        self.num_heads = num_heads
        self.form = 'auto'
        # faithful: shape (h, 1, 1), so weight decay applies, unlike to 1-d tensors (original xcit.py, XCA)
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute attention between the channels of tokens: (B, N, C) -> (B, N, C)."""
        if not torch.jit.is_scripting():  # nested, since TorchScript compiles both sides of `and`
            if xca_gram.applies(self, x):
                return self.proj_drop(xca_gram.attend(self, x))
        B, N, C = x.shape
        h, d = self.num_heads, C // self.num_heads
        q, k, v = self.qkv(x).reshape(B, N, 3, h, d).permute(2, 0, 3, 4, 1).unbind(0)  # (B, h, d, N) each
        q, k = (q / norm(q)).to(q.dtype), (k / norm(k)).to(k.dtype)  # norm: float32 also in half precision
        attn = q @ k.transpose(2, 3)  # (B, h, d, d)
        attn = attn * self.temperature
        attn = self.attn_drop(attn.softmax(dim=-1))
        x = attn @ v  # (B, h, d, N)
        x = self.proj(x.reshape(B, C, N).transpose(1, 2))  # (B, N, C)
        return self.proj_drop(x)


@torch.fx.wrap
def norm(q: torch.Tensor) -> torch.Tensor:
    """Compute the norm of each channel over the tokens, in float32 at least: (..., N) -> (..., 1)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    smallest = 1e-12 * q.shape[-1] ** .5  # for channels that are 0 in all tokens
    return torch.linalg.vector_norm(q, dim=-1, keepdim=True, dtype=dtype).clamp_min(smallest)
