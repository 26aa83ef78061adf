"""Class attention with less work: without keys and values of the patches. Used by both doors; shapes as in xcit.py."""
import torch
import torch.nn as nn
import torch.nn.functional as F


class ShortClassAttention(nn.Module):
    """What xcit.ClassAttention computes, with the layers of the given one, whose weights are used without calling them.

    There is one query: (x W_kᵀ) q is computed as x (W_kᵀ q), and the weighted mean of values as W_v of that of the
    tokens. The keys' bias adds the same to all scores, which softmax does not see.
    """

    def __init__(self, attn: nn.Module):
        super().__init__()
        self.num_heads, self.qkv, self.attn_drop = attn.num_heads, attn.qkv, attn.attn_drop
        self.proj, self.proj_drop = attn.proj, attn.proj_drop

    def attention_weights(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 1 + N, C), CLS first -> how much CLS attends to each token, (B, h, 1 + N); a head's sum is 1."""
        B, _, C = x.shape
        h, d = self.num_heads, C // self.num_heads
        w_q, w_k, _ = self.qkv.weight.chunk(3)
        q = F.linear(x[:, 0], w_q, None if self.qkv.bias is None else self.qkv.bias[:C]).view(B, h, 1, d) / d ** .5
        q = (q @ w_k.reshape(h, d, C)).flatten(1, 2)  # (B, h, C)
        return (q @ x.transpose(1, 2)).softmax(dim=-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 1 + N, C), CLS first -> the new CLS token, (B, 1, C)."""
        B, _, C = x.shape
        h, d = self.num_heads, C // self.num_heads
        attn = self.attn_drop(self.attention_weights(x))
        w_v = self.qkv.weight[2 * C:].reshape(h, d, C)
        cls = (attn @ x)[:, :, None] @ w_v.transpose(1, 2)  # (B, h, 1, d)
        if self.qkv.bias is not None:
            cls = cls + attn.sum(dim=-1)[:, :, None, None] * self.qkv.bias[2 * C:].view(h, 1, d)
        return self.proj_drop(self.proj(cls.reshape(B, 1, C)))
