"""XCiT: Cross-Covariance Image Transformers, as timm models.

Paper: https://arxiv.org/abs/2106.09681. Importing this file registers the 14 models of `SIZES` x {p16, p8} with
timm; `timm.create_model('xcit_small_12_p16')` then builds one. Module and parameter names are those of the published
checkpoints, which load strictly.

Shapes: `B` batch, `N = H*W` tokens, `C` channels, `H, W` token grid (never pixels), `h` heads, `d = C//h`,
`K` classes. Images are `(B, 3, img_h, img_w)` in pixels; any size works, the grid is `ceil(pixels / patch)`.
"""
import contextlib
import dataclasses
import math
import re
from typing import ClassVar, Iterator, List, Optional, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices

from linear import has_hooks, in_transform, is_linear
from mlp import Mlp
from xca import FORMS, XCA, at_least_float32, without_autocast

__all__ = ['Xcit']  # timm adds the name of each registered model

# The 14 models: each row below with patch 16 and with patch 8. `tokens_norm`: see ClassAttentionBlock.
SIZES = {
    'nano_12': dict(embed_dim=128, depth=12, num_heads=4, eta=1., tokens_norm=False),
    'tiny_12': dict(embed_dim=192, depth=12, num_heads=4, eta=1., tokens_norm=True),
    'tiny_24': dict(embed_dim=192, depth=24, num_heads=4, eta=1e-5, tokens_norm=True),
    'small_12': dict(embed_dim=384, depth=12, num_heads=8, eta=1., tokens_norm=True),
    'small_24': dict(embed_dim=384, depth=24, num_heads=8, eta=1e-5, tokens_norm=True),
    'medium_24': dict(embed_dim=512, depth=24, num_heads=8, eta=1e-5, tokens_norm=True),
    'large_24': dict(embed_dim=768, depth=24, num_heads=16, eta=1e-5, tokens_norm=True),
}
PATCH_SIZES = (16, 8)
GLOBAL_POOLS = ('token', 'avg', '')


class PositionalEncodingFourier(nn.Module):
    """Sine/cosine features of each token's (y, x), mapped to C channels; analytic, so any grid works.

    Source: paper section 3.3; original xcit.py, PositionalEncodingFourier.
    """

    def __init__(self, dim: int, hidden_dim: int = 32, temperature: float = 10000.):
        super().__init__()
        self.token_projection = nn.Conv2d(2 * hidden_dim, dim, kernel_size=1)
        self.hidden_dim = hidden_dim
        self.temperature = temperature

    def axis_features(self, length: int) -> torch.Tensor:
        """Features of the coordinates 1..length of one axis, scaled to (0, 2 pi]: (length, hidden_dim), float32."""
        # Float32 whatever the weights' type: half precision cannot tell neighbouring coordinates of a large grid apart.
        device = self.token_projection.weight.device
        position = torch.arange(1, length + 1, dtype=torch.float32, device=device) / (length + 1e-6) * (2 * math.pi)
        exponent = torch.arange(0, self.hidden_dim, 2, dtype=torch.float32, device=device) / self.hidden_dim
        angle = position[:, None] / self.temperature ** exponent  # (length, hidden_dim / 2)
        return torch.stack((angle.sin(), angle.cos()), dim=2).flatten(1)  # sin and cos interleaved

    def forward(self, H: int, W: int) -> torch.Tensor:
        """Encoding of an H x W grid: (1, C, H, W) in channels_last, of the weights' type."""
        if not torch.jit.is_scripting():
            if not self.is_plain():
                return self.definition(H, W)
            # Not in half precision under autocast: float32 LayerScale makes tokens float32 in the first block anyway.
            with without_autocast(self.token_projection.weight.device):
                return self.by_axis(H, W)
        return self.by_axis(H, W)

    def by_axis(self, H: int, W: int) -> torch.Tensor:
        # The projection of (y, x) is that of y and that of x: H + W rows are projected, and not H * W. A convolution
        # would also let the compiler compile anew for larger grids, since on CPUs its size decides what computes it.
        weight, bias = self.token_projection.weight, self.token_projection.bias
        dtype = at_least_float32(weight.dtype)
        weight_y, weight_x = weight.flatten(1).to(dtype).chunk(2, dim=1)
        y = F.linear(self.axis_features(H).to(dtype), weight_y, None if bias is None else bias.to(dtype))
        x = F.linear(self.axis_features(W).to(dtype), weight_x)
        return (y[:, None] + x).to(weight.dtype).permute(2, 0, 1)[None]

    @torch.jit.unused
    def is_plain(self) -> bool:
        """Whether weight and bias of `token_projection` are all there is, and not an adapter as well, say."""
        return type(self.token_projection) is nn.Conv2d and not has_hooks(self.token_projection)

    @torch.jit.unused
    def definition(self, H: int, W: int) -> torch.Tensor:
        """The same by calling `token_projection`, under autocast in half precision."""
        y = self.axis_features(H)[:, None].expand(-1, W, -1)
        x = self.axis_features(W)[None].expand(H, -1, -1)
        features = torch.cat((y, x), dim=2).permute(2, 0, 1)[None]  # (1, 2 * hidden_dim, H, W)
        return self.token_projection(features.to(self.token_projection.weight.dtype))


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """Images (B, in_chans, img_h, img_w) in that layout."""
    if not torch.jit.is_scripting() and in_transform():  # where memory is not that of what is seen
        return x
    return x.contiguous(memory_format=torch.channels_last)


def conv3x3(in_chans: int, out_chans: int) -> nn.Sequential:
    """Stride-2 3x3 convolution and BatchNorm: one halving of the resolution."""
    return nn.Sequential(
        nn.Conv2d(in_chans, out_chans, kernel_size=3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(out_chans))


class ConvPatchEmbed(nn.Module):
    """Patch stem: log2(patch_size) stride-2 convolutions that double the channels, GELU between them.

    Source: paper section 3.3 (following LeViT); original xcit.py, ConvPatchEmbed.
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        halvings = PATCH_HALVINGS[patch_size]
        widths = [in_chans] + [embed_dim // 2 ** i for i in reversed(range(halvings))]
        layers: List[nn.Module] = []
        for in_width, out_width in zip(widths, widths[1:]):
            layers += [conv3x3(in_width, out_width), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])  # the last convolution has no activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, img_h, img_w) -> (B, C, H, W) in channels_last."""
        return self.proj(channels_last(x))


PATCH_HALVINGS = {16: 4, 8: 3}


class LPI(nn.Module):
    """Local patch interaction: two depthwise 3x3 convolutions on the token grid.

    Source: paper section 3.2; original xcit.py, LPI.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        self.act = nn.GELU()
        self.bn = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        # As tokens (B, N, C) lie in memory they are a grid (B, C, H, W) in channels_last; with weights that are marked
        # so, too, nothing is copied.
        self.to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor, H: int, W: int) -> torch.Tensor:
        x = x.transpose(1, 2).unflatten(2, (H, W))  # (B, C, H, W) in channels_last: the same memory
        x = self.conv2(self.bn(self.act(self.conv1(x))))
        return x.flatten(2).transpose(1, 2)  # (B, N, C)


class XCABlock(nn.Module):
    """XCA, LPI and MLP, each normalised before, scaled (LayerScale) and dropped (stochastic depth) after."""

    def __init__(self, dim: int, num_heads: int, *, mlp_ratio: float, qkv_bias: bool, drop: float, attn_drop: float,
                 drop_path: float, eta: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = XCA(dim, num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=drop)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)
        self.local_mp = LPI(dim)
        self.gamma1 = nn.Parameter(eta * torch.ones(dim))
        self.gamma2 = nn.Parameter(eta * torch.ones(dim))
        self.gamma3 = nn.Parameter(eta * torch.ones(dim))

    def forward(self, x: torch.Tensor, H: int, W: int) -> torch.Tensor:
        x = self.add(x, self.gamma1, self.attn(self.norm1(x)))
        # faithful: 3 comes before 2; the published weights need this order (original xcit.py, XCABlock)
        x = self.add(x, self.gamma3, self.local_mp(self.norm3(x), H, W))
        x = self.add(x, self.gamma2, self.mlp(self.norm2(x)))
        return x

    def add(self, x: torch.Tensor, gamma: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        """x + drop_path(gamma * branch), in one pass over the tokens: it is gamma that is dropped."""
        gamma = self.drop_path(gamma.expand(x.shape[0], 1, -1))
        if branch.dtype != gamma.dtype:  # autocast would have addcmul keep a second branch, in float32
            return x + gamma * branch
        return torch.addcmul(x, gamma, branch)


class ClassAttention(nn.Module):
    """Attention of the CLS token over all tokens.

    Source: CaiT (https://arxiv.org/abs/2103.17239) section 3; original xcit.py, ClassAttention.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, attn_drop: float = 0., proj_drop: float = 0.):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def attention_weights(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 1 + N, C), CLS first -> how much CLS attends to each token, (B, h, 1 + N); a head's sum is 1."""
        if not torch.jit.is_scripting() and not self.is_plain():
            return self.definition(x)[0]
        B, _, C = x.shape
        h, d = self.num_heads, C // self.num_heads
        # The published weights hold q, k and v in one matrix.
        bias_q = None if self.qkv.bias is None else self.qkv.bias[:C]
        q = F.linear(x[:, 0], self.qkv.weight[:C], bias_q).view(B, h, 1, d) / math.sqrt(d)
        # There is one query: (x W_kᵀ) q is computed as x (W_kᵀ q), without any keys. Their bias would add the same to
        # the scores of all tokens, which softmax does not see.
        q = (q @ self.qkv.weight[C:2 * C].view(h, d, C)).flatten(1, 2)  # (B, h, C)
        return (q @ x.transpose(1, 2)).softmax(dim=-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 1 + N, C), CLS first -> the new CLS token, (B, 1, C)."""
        B, _, C = x.shape
        h, d = self.num_heads, C // self.num_heads
        if not torch.jit.is_scripting() and not self.is_plain():
            return self.proj_drop(self.proj(self.definition(x)[1].view(B, 1, C)))
        attn = self.attn_drop(self.attention_weights(x))
        # Likewise without values of all tokens: the weighted mean of tokens first, then its values.
        cls = (attn @ x).unsqueeze(2) @ self.qkv.weight[2 * C:].view(h, d, C).transpose(1, 2)  # (B, h, 1, d)
        if self.qkv.bias is not None:
            cls = cls + attn.sum(dim=-1)[:, :, None, None] * self.qkv.bias[2 * C:].view(h, 1, d)
        return self.proj_drop(self.proj(cls.view(B, 1, C)))

    @torch.jit.unused
    def is_plain(self) -> bool:
        """Whether weight and bias of `qkv` are all there is, and not an adapter as well, say."""
        return is_linear(self.qkv)

    @torch.jit.unused
    def definition(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """With keys and values of all tokens, by calling `qkv`.

        (B, 1 + N, C) -> attention weights (B, h, 1 + N), and the heads' outputs for CLS (B, h, d).
        """
        B, tokens, C = x.shape
        h, d = self.num_heads, C // self.num_heads
        q, k, v = self.qkv(x).view(B, tokens, 3, h, d).permute(2, 0, 3, 1, 4)
        attn = (q[:, :, :1] / math.sqrt(d) @ k.transpose(2, 3)).softmax(dim=-1)
        return attn[:, :, 0], (self.attn_drop(attn) @ v)[:, :, 0]


class ClassAttentionBlock(nn.Module):
    """Class attention and an MLP on the CLS token; the patches pass through, but not unchanged (see forward)."""

    def __init__(self, dim: int, num_heads: int, *, mlp_ratio: float, qkv_bias: bool, drop: float, attn_drop: float,
                 eta: float, tokens_norm: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ClassAttention(dim, num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=drop)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.gamma1 = nn.Parameter(eta * torch.ones(dim))
        self.gamma2 = nn.Parameter(eta * torch.ones(dim))
        self.tokens_norm = tokens_norm

    def forward(self, x: torch.Tensor, cls_only: bool = False) -> torch.Tensor:
        """(B, 1 + N, C), CLS first -> the same; with `cls_only` what becomes of CLS, (B, 1, C)."""
        normed = self.norm1(x)
        cls = self.new_cls(x, normed)
        return cls if cls_only else torch.cat((cls, self.new_patches(x[:, 1:], normed[:, 1:])), dim=1)

    def new_cls(self, x: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """All tokens (B, 1 + N, C), as they are and normalised -> (B, 1, C)."""
        # differs: nano models - the original writes the CLS row in place, which breaks the backward pass
        cls = self.norm2(x[:, :1] + self.gamma1 * self.attn(normed))
        return cls + self.gamma2 * self.mlp(cls)

    def new_patches(self, x: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """Patches (B, N, C), as they are and normalised -> (B, N, C)."""
        # faithful: the patches add their own scaled LayerNorm here, where attention was meant for the CLS token
        # alone (original xcit.py, ClassAttentionBlock)
        x = torch.addcmul(x, self.gamma1, normed)
        # faithful: the residual doubles the patches (original xcit.py, ClassAttentionBlock)
        return 2 * (self.norm2(x) if self.tokens_norm else x)


class Xcit(nn.Module):
    """Patch stem and positional encoding, `depth` XCA blocks, class-attention blocks, linear head.

    Args:
        patch_size: 16 or 8 pixels.
        in_chans: channels of the image.
        num_classes: K; 0 leaves the head out.
        global_pool: what the head sees: 'token' the CLS token, 'avg' the mean of the patches, '' every token.
        embed_dim: C.
        depth: number of XCA blocks.
        num_heads: h, must divide C.
        mlp_ratio: hidden width of the MLPs, in units of C.
        qkv_bias: whether the q, k, v projections have a bias.
        drop_rate: dropout after the positional encoding, after each attention's projection and in the MLPs, fraction.
        attn_drop_rate: dropout of attention weights, fraction.
        drop_path_rate: stochastic depth of the XCA blocks, fraction.
        cls_attn_layers: number of class-attention blocks.
        eta: initial value of LayerScale.
        tokens_norm: whether class-attention blocks normalise all tokens or only CLS.

    Raises:
        ValueError: an argument outside what is listed above.
    """

    def __init__(
            self,
            patch_size: int = 16,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'token',
            embed_dim: int = 384,
            depth: int = 12,
            num_heads: int = 8,
            mlp_ratio: float = 4.,
            qkv_bias: bool = True,
            drop_rate: float = 0.,
            attn_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            cls_attn_layers: int = 2,
            eta: float = 1.,
            tokens_norm: bool = True,
    ):
        super().__init__()
        check_global_pool(global_pool)
        if patch_size not in PATCH_HALVINGS:
            raise ValueError(f'patch_size {patch_size} is not one of {sorted(PATCH_HALVINGS)}')
        if embed_dim % num_heads:
            raise ValueError(f'embed_dim {embed_dim} is not a multiple of num_heads {num_heads}')
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1
        self.grad_checkpointing = False

        self.patch_embed = ConvPatchEmbed(patch_size, in_chans, embed_dim)
        self.pos_embeder = PositionalEncodingFourier(embed_dim)  # sic: the published name
        self.pos_drop = nn.Dropout(drop_rate)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        block_args = dict(mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, drop=drop_rate, attn_drop=attn_drop_rate, eta=eta)
        # faithful: the drop-path rate does not grow with depth (original xcit.py, XCiT.__init__)
        self.blocks = nn.ModuleList([
            XCABlock(embed_dim, num_heads, drop_path=drop_path_rate, **block_args) for _ in range(depth)])
        self.cls_attn_blocks = nn.ModuleList([
            ClassAttentionBlock(embed_dim, num_heads, tokens_norm=tokens_norm, **block_args)
            for _ in range(cls_attn_layers)])
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.feature_info = [
            dict(num_chs=embed_dim, reduction=patch_size, module=f'blocks.{i}') for i in range(depth)]

        trunc_normal_(self.cls_token, std=.02)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Linear):  # convolutions and norms keep PyTorch's own initial values
            trunc_normal_(module.weight, std=.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    __jit_unused_properties__: ClassVar[List[str]] = ['xca_form']

    @property
    def xca_form(self) -> str:
        """How XCA is computed: 'auto', 'plain' or 'gram', see `xca.XCA`. Assigned, it is that of all blocks.

        Raises:
            ValueError: there is no such form.
        """
        return self.blocks[0].attn.form

    @xca_form.setter
    def xca_form(self, form: str):
        if form not in FORMS:
            raise ValueError(f'form {form!r} is not one of {FORMS}')
        for block in self.blocks:
            block.attn.form = form

    @torch.jit.ignore
    def no_weight_decay(self):
        return {'cls_token'}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False):
        return dict(
            stem=r'^cls_token|^pos_embeder|^patch_embed',
            blocks=r'^blocks\.(\d+)',
            cls_attn_blocks=[(r'^cls_attn_blocks\.(\d+)', None), (r'^norm', (99999,))])  # timm: with the one before

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True):
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None):
        """Replace the head by a fresh one of `num_classes` (0: none), and the pooling where given."""
        if global_pool is not None:
            check_global_pool(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        head = nn.Linear(self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self._init_weights(head)
        self.head = head.to(device=self.cls_token.device, dtype=self.cls_token.dtype)

    def forward_patches(self, x: torch.Tensor) -> Tuple[torch.Tensor, int, int]:
        """Image -> tokens with position (B, N, C), H, W."""
        x = self.patch_embed(x)
        H, W = x.shape[-2:]
        x = x + self.pos_embeder(H, W)
        return self.pos_drop(x.flatten(2).transpose(1, 2)), H, W

    def forward_cls(self, x: torch.Tensor, cls_only: bool = False) -> torch.Tensor:
        """Patch tokens (B, N, C) -> normalised tokens with the CLS token in front, (B, 1 + N, C), or CLS (B, 1, C)."""
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        for i, block in enumerate(self.cls_attn_blocks):
            last = cls_only and i + 1 == len(self.cls_attn_blocks)
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_block(block, x, last)
            else:
                x = block(x, last)
        return self.norm(x)

    def forward_features(self, x: torch.Tensor, cls_only: bool = False) -> torch.Tensor:
        """Image (B, in_chans, img_h, img_w) -> normalised tokens (B, 1 + N, C), CLS first, or CLS alone (B, 1, C)."""
        x, H, W = self.forward_patches(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_block(block, x, H, W)
            else:
                x = block(x, H, W)
        return self.forward_cls(x, cls_only)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens (B, 1 + N, C) -> logits (B, K), or what the head would see (`pre_logits`)."""
        if self.global_pool == 'token':
            x = x[:, 0]
        elif self.global_pool == 'avg':
            x = x[:, self.num_prefix_tokens:].mean(dim=1)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x, cls_only=self.global_pool == 'token'))

    @torch.jit.ignore
    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Outputs of chosen XCA blocks, as timm's models give them.

        Args:
            x: (B, in_chans, img_h, img_w).
            indices: the last n blocks if a number, all if None, or a list of block numbers (negative: from the end).
            norm: apply the final LayerNorm to each.
            stop_early: leave out the blocks after the last one chosen (with `intermediates_only`).
            output_fmt: 'NCHW' for (B, C, H, W), 'NLC' for (B, N, C).
            intermediates_only: return the list alone.

        Returns:
            The list, or the pair (normalised tokens (B, 1 + N, C), list).
        """
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f"output_fmt {output_fmt!r} is not one of 'NCHW', 'NLC'")
        wanted, last = feature_take_indices(len(self.blocks), indices)
        blocks = self.blocks[:last + 1] if stop_early and intermediates_only else self.blocks
        x, H, W = self.forward_patches(x)
        intermediates = []
        for i, block in enumerate(blocks):
            x = checkpoint_block(block, x, H, W) if self.grad_checkpointing else block(x, H, W)
            if i in wanted:
                tokens = self.norm(x) if norm else x
                if output_fmt == 'NCHW':
                    tokens = tokens.transpose(1, 2).unflatten(2, (H, W)).contiguous()
                intermediates.append(tokens)
        if intermediates_only:
            return intermediates
        return self.forward_cls(x), intermediates

    @torch.jit.ignore
    def prune_intermediate_layers(
            self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True):
        """Delete the layers that the chosen intermediates don't need; returns the block numbers chosen."""
        wanted, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[:last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.cls_attn_blocks = nn.ModuleList()
            self.reset_classifier(0)
        return wanted


def check_global_pool(global_pool: str):
    if global_pool not in GLOBAL_POOLS:
        raise ValueError(f'global_pool {global_pool!r} is not one of {GLOBAL_POOLS}')


@contextlib.contextmanager
def frozen_batchnorm_statistics(module: nn.Module):
    """Let the BatchNorms in `module` normalise with the batch's statistics without recording them."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(m.momentum, m.num_batches_tracked.clone()) for m in norms]
    for m in norms:
        m.momentum = 0.
    try:
        yield
    finally:
        for m, (momentum, num_batches_tracked) in zip(norms, before):
            m.momentum = momentum
            m.num_batches_tracked.copy_(num_batches_tracked)


def checkpoint_block(block: nn.Module, *args) -> torch.Tensor:
    """Run a block without keeping its activations; the backward pass computes them again."""
    # The second run must not enter the batch into BatchNorm's running statistics once more. A compiled block needs
    # (and takes) no context: the compiler repeats the arithmetic alone, not the update of the statistics.
    contexts = {} if torch.compiler.is_compiling() else dict(
        context_fn=lambda: (contextlib.nullcontext(), frozen_batchnorm_statistics(block)))
    return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False, **contexts)


# ---------------------------------------------------------------------------------------------------------------------
# Published weights

# Published top-1 on ImageNet-1k, percent, crop 1.0: at 224 pixels, at 224 with distillation, at 384 with distillation
PUBLISHED_TOP1 = {
    'nano_12': {16: (69.9, 72.2, 75.4), 8: (73.8, 76.3, 77.8)},
    'tiny_12': {16: (77.1, 78.6, 80.9), 8: (79.7, 81.2, 82.4)},
    'tiny_24': {16: (79.4, 80.4, 82.6), 8: (81.9, 82.6, 83.7)},
    'small_12': {16: (82.0, 83.3, 84.7), 8: (83.4, 84.2, 85.1)},
    'small_24': {16: (82.6, 83.9, 85.1), 8: (83.9, 84.9, 85.6)},
    'medium_24': {16: (82.7, 84.3, 85.4), 8: (83.7, 85.1, 85.8)},
    'large_24': {16: (82.9, 84.9, 85.8), 8: (84.4, 85.4, 86.0)},
}
# Of the backbones trained without labels (DINO): k-NN, linear
PUBLISHED_DINO_TOP1 = {
    'small_12': {16: (76.0, 77.8), 8: (77.1, 79.2)},
    'medium_24': {16: (76.4, 78.8), 8: (77.9, 80.3)},
}


@dataclasses.dataclass(frozen=True)
class Published:
    """A published checkpoint, for images normalised with ImageNet's mean and standard deviation.

    Args:
        model: name of the model, e.g. 'xcit_small_12_p16'.
        tag: of these weights, e.g. 'fb_dist_in1k_384'.
        url: the authors' file.
        hf_hub_id: repository of timm's copy on the Hugging Face hub, if there is one.
        resolution: pixels, at which the accuracy was measured.
        num_classes: 0 for a backbone.
        distilled: trained with a teacher.
        top1: on ImageNet-1k, percent; of a backbone by a linear classifier.
        knn: of a backbone by its nearest neighbours.
    """
    model: str
    tag: str
    url: str
    hf_hub_id: Optional[str]
    resolution: int
    num_classes: int
    distilled: bool
    top1: float
    knn: Optional[float] = None
    crop: float = 1.


def _published() -> Iterator[Published]:
    files = 'https://dl.fbaipublicfiles.com/xcit/'
    for patch in PATCH_SIZES:
        for size in SIZES:
            name = f'xcit_{size}_p{patch}'
            top1 = PUBLISHED_TOP1[size][patch]
            for tag, suffix, resolution, distilled, accuracy in (
                    ('fb_in1k', '224', 224, False, top1[0]), ('fb_dist_in1k', '224_dist', 224, True, top1[1]),
                    ('fb_dist_in1k_384', '384_dist', 384, True, top1[2])):
                copy = f'timm/{name}_{resolution}.{tag.removesuffix("_384")}'
                yield Published(name, tag, f'{files}{name}_{suffix}.pth', copy, resolution, 1000, distilled, accuracy)
            if size in PUBLISHED_DINO_TOP1:
                knn, linear = PUBLISHED_DINO_TOP1[size][patch]
                url = f'{files}xcit_{size}_cp{patch}_dino.pth'
                yield Published(name, 'fb_dino', url, None, 224, 0, False, linear, knn)


ZOO = {f'{published.model}.{published.tag}': published for published in _published()}


# ---------------------------------------------------------------------------------------------------------------------
# What files hold, timm's naming and registry

ENTRIES = ('model', 'state_dict', 'teacher')  # under which files keep weights: published and ours, many others, DINO


def strip_prefixes(weights: dict) -> Tuple[dict, List[str]]:
    """Names without what wrappers put in front of them; and which these were."""
    removed = []
    if any('_orig_mod.' in key for key in weights):  # torch.compile, of the whole or of parts
        weights, removed = {key.replace('_orig_mod.', ''): value for key, value in weights.items()}, ['_orig_mod.']
    if weights and all(key.startswith('module.') for key in weights):  # DistributedDataParallel
        weights = {key.removeprefix('module.'): value for key, value in weights.items()}
        removed.append('module.')
    prefix = 'backbone.'  # DINO, whose projection head ('head.') is no part of the model
    if any(key.startswith(prefix) for key in weights):
        weights = {key.removeprefix(prefix): value for key, value in weights.items() if not key.startswith('head.')}
        removed.append(prefix)
    return weights, removed


def has_timm_names(weights: dict) -> bool:
    """Whether weights are named as in timm's own XCiT, which calls two things otherwise."""
    return any(key.startswith('pos_embed.') or re.fullmatch(TIMM_CLASS_ATTENTION, key) for key in weights)


TIMM_CLASS_ATTENTION = r'(cls_attn_blocks\.\d+\.attn\.)([qkv])\.(weight|bias)'


def from_timm_names(weights: dict) -> dict:
    """timm's naming -> the published one: `pos_embeder`, and one `qkv` in class attention."""
    published = {}
    for key, value in weights.items():
        split = re.fullmatch(TIMM_CLASS_ATTENTION, key)
        parts = [f'{split[1]}{part}.{split[3]}' for part in 'qkv'] if split else []
        if split is None or not all(part in weights for part in parts):
            published[re.sub(r'^pos_embed\.', 'pos_embeder.', key)] = value
        elif split[2] == 'q':
            published[f'{split[1]}qkv.{split[3]}'] = torch.cat([weights[part] for part in parts])
    return published


def to_timm_names(weights: dict) -> dict:
    """The published naming -> timm's."""
    renamed = {}
    for key, value in weights.items():
        joined = re.fullmatch(r'(cls_attn_blocks\.\d+\.attn\.)qkv\.(weight|bias)', key)
        if joined is None:
            renamed[re.sub(r'^pos_embeder\.', 'pos_embed.', key)] = value
        else:
            for part, third in zip('qkv', value.chunk(3)):
                renamed[f'{joined[1]}{part}.{joined[2]}'] = third.clone()
    return renamed


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """What timm loads from a file, in whichever format XCiT weights come.

    Raises:
        ValueError: weights are missing or left over; where the head is for other classes, timm itself would not tell.
    """
    weights = next((state_dict[name] for name in ENTRIES if isinstance(state_dict.get(name), dict)), state_dict)
    weights, _ = strip_prefixes(weights)
    weights = from_timm_names(weights) if has_timm_names(weights) else weights
    own = model.state_dict()
    for what, keys in (('missing', own.keys() - weights.keys()), ('unexpected', weights.keys() - own.keys())):
        keys = sorted(key for key in keys if not key.startswith('head.'))
        if keys:
            raise ValueError(f'the weights are not this model\'s; {what} keys: {", ".join(keys)}')
    return weights


def _cfg(published: Published) -> dict:
    return {
        'url': published.url, 'hf_hub_id': published.hf_hub_id, 'num_classes': published.num_classes,
        'input_size': (3, published.resolution, published.resolution), 'pool_size': None, 'crop_pct': published.crop,
        'interpolation': 'bicubic', 'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'patch_embed.proj.0.0', 'classifier': 'head', 'license': 'apache-2.0',
    }


MODELS = [f'xcit_{size}_p{patch}' for patch in PATCH_SIZES for size in SIZES]

default_cfgs = generate_default_cfgs({name: _cfg(published) for name, published in ZOO.items()})


def _register(size: str, patch_size: int):
    """Register `xcit_{size}_p{patch_size}` with timm, and make it a function of this module."""

    def entrypoint(pretrained: bool = False, **kwargs) -> Xcit:
        return build_model_with_cfg(
            Xcit, entrypoint.__name__, pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(out_indices=kwargs.pop('out_indices', 3), feature_cls='getter'),
            **dict(SIZES[size], patch_size=patch_size, **kwargs))

    entrypoint.__name__ = entrypoint.__qualname__ = f'xcit_{size}_p{patch_size}'
    entrypoint.__doc__ = f'XCiT {size} with {patch_size} x {patch_size} pixel patches.'
    globals()[entrypoint.__name__] = register_model(entrypoint)


for _size in SIZES:
    for _patch_size in PATCH_SIZES:
        _register(_size, _patch_size)
