"""XCiT: Cross-Covariance Image Transformers, as timm models.

Paper: https://arxiv.org/abs/2106.09681. Importing this file registers the 14 models of `SIZES` x {p16, p8} with
timm, for `timm.create_model('xcit_small_12_p16')`. Module and parameter names match the published
checkpoints, which load strictly. xca.py has cross-covariance attention (equation 4), xcit_zoo.py the published weights.
`fuse` and `speed_up_training` replace modules of a model by faster modules.

Shapes: `B` batch, `N = H*W` tokens, `C` channels, `H, W` token grid (never pixels), `h` heads, `d = C//h`,
`K` classes. Images are `(B, in_chans, img_h, img_w)` in pixels; any size works, the grid is `ceil(pixels / patch)`.
"""
import functools
import math
from typing import ClassVar, List, Optional, Tuple, Union

import torch
import torch.fx
import torch.nn as nn
from timm.layers import DropPath, Mlp, get_act_layer, get_norm_layer, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

import xca_gram
from xca import XCA
from xcit_fuse import fuse
from xcit_timm import TimmModel, checkpoint_block, creation_defaults
from xcit_train import speed_up_training
from xcit_zoo import checkpoint_filter_fn, timm_cfgs

__all__ = ['Xcit', 'fuse', 'speed_up_training']  # timm adds the name of each registered model

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
MODELS = [f'xcit_{size}_p{patch}' for patch in (16, 8) for size in SIZES]
STEM_CONVOLUTIONS = {16: 4, 8: 3}  # by patch size


def name_with(tensors: dict, *, width_of: str = 'cls_token') -> Optional[str]:
    """Return the name of the model, one of 14, whose weights have these names and shapes; None: no such model.

    Args:
        width_of: name of a tensor whose last dimension is C; models without class attention have no CLS token.
    """
    depth = len({key.split('.')[1] for key in tensors if key.startswith('blocks.')})
    patch = 2 ** len({key.split('.')[2] for key in tensors if key.startswith('patch_embed.proj.')})
    width = getattr(tensors.get(width_of), 'shape', ())[-1:]
    return next((f'xcit_{size}_p{patch}' for size, config in SIZES.items()
                 if ((config['embed_dim'],), config['depth']) == (width, depth) and patch in STEM_CONVOLUTIONS),
                None)


def is_xcit_name(name: str) -> bool:
    """Return True if `name`, with or without a tag ('.fb_in1k'), is one of MODELS."""
    return name.partition('.')[0] in MODELS


class PositionalEncodingFourier(nn.Module):
    """Sine/cosine features of each token's (y, x), mapped to C channels; a formula, so that any grid works.

    Source: paper section 3.3; original xcit.py, PositionalEncodingFourier.
    """

    def __init__(self, dim: int, hidden_dim: int = 32, temperature: float = 10000.):
        super().__init__()
        self.token_projection = nn.Conv2d(2 * hidden_dim, dim, kernel_size=1)
        self.hidden_dim = hidden_dim
        self.temperature = temperature

    def forward(self, H: int, W: int) -> torch.Tensor:
        """Compute the encoding (1, C, H, W) of an H x W grid."""
        weight = self.token_projection.weight
        y = axis_features(H, self.hidden_dim, self.temperature, weight)[:, None].expand(-1, W, -1)
        x = axis_features(W, self.hidden_dim, self.temperature, weight)[None].expand(H, -1, -1)
        return self.token_projection(torch.cat((y, x), dim=2).permute(2, 0, 1)[None])


@torch.fx.wrap  # one operation for torch.fx, which can't trace arange
def axis_features(length: int, dim: int, temperature: float, like: torch.Tensor) -> torch.Tensor:
    """Compute features (length, dim) of the coordinates 1..length, scaled to (0, 2 pi]; device and dtype of `like`."""
    # Always float32: in half precision, neighbouring coordinates of a large grid are equal.
    position = torch.arange(1, length + 1, dtype=torch.float32, device=like.device) / (length + 1e-6) * (2 * math.pi)
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=like.device) / dim
    angle = position[:, None] / temperature ** exponent  # (length, dim / 2)
    return torch.stack((angle.sin(), angle.cos()), dim=2).flatten(1).to(like.dtype)  # sin and cos interleaved


class ConvPatchEmbed(nn.Module):
    """Patch stem: log2(patch_size) stride-2 convolutions with BatchNorm that double the channels, GELU between them.

    Source: paper section 3.3 (following LeViT); original xcit.py, ConvPatchEmbed.
    """

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, act_layer=nn.GELU):
        super().__init__()
        # For users of timm, which has these attributes; images of any other size work.
        self.img_size, self.patch_size = to_2tuple(img_size), patch_size
        self.num_patches = math.prod(-(-side // patch_size) for side in self.img_size)
        convolutions = STEM_CONVOLUTIONS[patch_size]
        widths = [in_chans] + [embed_dim // 2 ** i for i in reversed(range(convolutions))]
        layers: List[nn.Module] = []
        for in_width, out_width in zip(widths, widths[1:]):
            conv = nn.Conv2d(in_width, out_width, kernel_size=3, stride=2, padding=1, bias=False)
            layers += [nn.Sequential(conv, nn.BatchNorm2d(out_width)), act_layer()]
        self.proj = nn.Sequential(*layers[:-1])  # the last convolution has no activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embed images (B, in_chans, img_h, img_w) as (B, C, H, W) in channels_last, the memory layout of LPI."""
        return self.proj(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))


class LPI(nn.Module):
    """Local patch interaction: two depthwise 3x3 convolutions on the token grid.

    Source: paper section 3.2; original xcit.py, LPI.
    """

    def __init__(self, dim: int, act_layer=nn.GELU):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        self.act = act_layer()
        self.bn = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        # Tokens (B, N, C) have the memory layout of a grid (B, C, H, W) in channels_last. Weights in channels_last
        # avoid a copy.
        for conv in (self.conv1, self.conv2):
            conv.weight = nn.Parameter(conv.weight.detach().contiguous(memory_format=torch.channels_last))

    def forward(self, x: torch.Tensor, H: int, W: int) -> torch.Tensor:
        x = x.transpose(1, 2).unflatten(2, (H, W))  # (B, C, H, W) in channels_last: the same memory
        x = self.conv2(self.bn(self.act(self.conv1(x))))
        return x.flatten(2).transpose(1, 2)  # (B, N, C)


class XCABlock(nn.Module):
    """XCA, LPI and MLP, each between a norm and LayerScale with stochastic depth."""

    def __init__(self, dim: int, num_heads: int, *, mlp_ratio: float, qkv_bias: bool, proj_drop: float,
                 attn_drop: float, drop_path: float, eta: float, act_layer, norm_layer):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = XCA(dim, num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop)
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop)
        self.norm3 = norm_layer(dim)
        self.local_mp = LPI(dim, act_layer)
        self.gamma1 = nn.Parameter(eta * torch.ones(dim))
        self.gamma2 = nn.Parameter(eta * torch.ones(dim))
        self.gamma3 = nn.Parameter(eta * torch.ones(dim))

    def forward(self, x: torch.Tensor, H: int, W: int) -> torch.Tensor:
        x = x + self.drop_path(self.gamma1 * self.attn(self.norm1(x)))
        # faithful: 3 comes before 2; the published weights need this order (original xcit.py, XCABlock)
        x = x + self.drop_path(self.gamma3 * self.local_mp(self.norm3(x), H, W))
        x = x + self.drop_path(self.gamma2 * self.mlp(self.norm2(x)))
        return x


class ClassAttention(nn.Module):
    """Attention of the CLS token over all tokens: softmax(q kᵀ / √d) v, with q of the CLS token.

    Source: CaiT (https://arxiv.org/abs/2103.17239) section 3; original xcit.py, ClassAttention.
    """

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True, attn_drop: float = 0.,
                 proj_drop: float = 0.):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def weights_and_values(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Compute attention of CLS (B, h, 1, 1 + N) and values (B, h, 1 + N, d) of tokens (B, 1 + N, C), CLS first."""
        B, tokens, C = x.shape
        h, d = self.num_heads, C // self.num_heads
        q, k, v = self.qkv(x).reshape(B, tokens, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
        return (q[:, :, :1] / d ** .5 @ k.transpose(2, 3)).softmax(dim=-1), v

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the new CLS token (B, 1, C) from tokens (B, 1 + N, C), CLS first."""
        attn, v = self.weights_and_values(x)
        cls = self.attn_drop(attn) @ v  # (B, h, 1, d)
        return self.proj_drop(self.proj(cls.transpose(1, 2).flatten(2)))

    def attention_weights(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the attention of CLS to each token: (B, 1 + N, C), CLS first -> (B, h, 1 + N), with sum 1."""
        return self.weights_and_values(x)[0][:, :, 0]


class ClassAttentionBlock(nn.Module):
    """Class attention and MLP for the CLS token; `forward` changes the patches as well."""

    def __init__(self, dim: int, num_heads: int, *, mlp_ratio: float, qkv_bias: bool, proj_drop: float,
                 attn_drop: float, eta: float, tokens_norm: bool, act_layer, norm_layer):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = ClassAttention(dim, num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop)
        self.gamma1 = nn.Parameter(eta * torch.ones(dim))
        self.gamma2 = nn.Parameter(eta * torch.ones(dim))
        self.tokens_norm = tokens_norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Update tokens (B, 1 + N, C), CLS first."""
        normed = self.norm1(x)
        # faithful: the patches add their own scaled LayerNorm here, although attention is meant for the CLS token
        # alone (original xcit.py, ClassAttentionBlock)
        x = x + self.gamma1 * torch.cat((self.attn(normed), normed[:, 1:]), dim=1)
        # differs: nano models (`tokens_norm=False`) - the original writes the CLS row in place, which breaks backward
        x = self.norm2(x) if self.tokens_norm else torch.cat((self.norm2(x[:, :1]), x[:, 1:]), dim=1)
        cls, patches = x[:, :1], x[:, 1:]
        # faithful: the residual doubles the patches (original xcit.py, ClassAttentionBlock)
        return torch.cat((cls + self.gamma2 * self.mlp(cls), patches + patches), dim=1)


class Xcit(TimmModel):
    """Patch stem and positional encoding, `depth` XCA blocks, class-attention blocks, linear head.

    Args:
        img_size: pixels, only for `patch_embed.img_size` and `.num_patches`: images of any size work.
        patch_size: 16 or 8 pixels.
        in_chans: channels of the image.
        num_classes: K; 0 leaves the head out.
        global_pool: input of the head: 'token' (CLS token), 'avg' (mean of the patches) or '' (all tokens).
        embed_dim: C.
        depth: number of XCA blocks.
        num_heads: h, must divide C.
        mlp_ratio: hidden width of the MLPs, in units of C.
        qkv_bias: give the q, k, v projections a bias.
        drop_rate: dropout after the positional encoding, after each attention's projection and in the MLPs, fraction.
            timm's own XCiT drops before the head instead.
        pos_drop_rate: dropout after the positional encoding; None: `drop_rate`.
        proj_drop_rate: dropout after each attention's projection and in the MLPs; None: `drop_rate`.
        attn_drop_rate: dropout of attention weights, fraction.
        drop_path_rate: stochastic depth of the XCA blocks, fraction.
        act_layer: activation of stem, LPI and MLPs, class or timm's name; None: GELU.
        norm_layer: norm of tokens, class or timm's name; None: LayerNorm. The BatchNorms stay.
        cls_attn_layers: number of class-attention blocks.
        use_pos_embed: add the positional encoding.
        eta: initial value of LayerScale.
        tokens_norm: normalise all tokens in class-attention blocks; False: only CLS.
        device, dtype: device and dtype of the parameters; None: torch's defaults.

    Raises:
        ValueError: an argument is not one of the values above.
    """

    def __init__(
            self, img_size: Union[int, Tuple[int, int]] = 224, patch_size: int = 16, in_chans: int = 3,
            num_classes: int = 1000, global_pool: str = 'token', embed_dim: int = 384, depth: int = 12,
            num_heads: int = 8, mlp_ratio: float = 4., qkv_bias: bool = True, drop_rate: float = 0.,
            pos_drop_rate: Optional[float] = None, proj_drop_rate: Optional[float] = None, attn_drop_rate: float = 0.,
            drop_path_rate: float = 0., act_layer=None, norm_layer=None, cls_attn_layers: int = 2,
            use_pos_embed: bool = True, eta: float = 1., tokens_norm: bool = True, device=None, dtype=None):
        super().__init__()
        if patch_size not in STEM_CONVOLUTIONS:
            raise ValueError(f'patch_size {patch_size} is not one of {sorted(STEM_CONVOLUTIONS)}')
        if embed_dim % num_heads:
            raise ValueError(f'embed_dim {embed_dim} is not a multiple of num_heads {num_heads}')
        if not isinstance(drop_path_rate, (int, float)):
            raise ValueError(f'drop_path_rate {drop_path_rate} is not allowed: must be a number, for all blocks')
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.patch_size = patch_size
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1
        self.grad_checkpointing = False

        # faithful: one rate for dropout everywhere but before the head (original xcit.py, XCiT.__init__)
        proj_drop = drop_rate if proj_drop_rate is None else proj_drop_rate
        act_layer = get_act_layer(act_layer) or nn.GELU
        norm_layer = get_norm_layer(norm_layer) or functools.partial(nn.LayerNorm, eps=1e-6)
        block_args = dict(mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, proj_drop=proj_drop, attn_drop=attn_drop_rate,
                          eta=eta, act_layer=act_layer, norm_layer=norm_layer)

        with creation_defaults(device, dtype):
            self.patch_embed = ConvPatchEmbed(img_size, patch_size, in_chans, embed_dim, act_layer)
            self.pos_embeder = PositionalEncodingFourier(embed_dim) if use_pos_embed else None  # sic: published name
            self.pos_drop = nn.Dropout(drop_rate if pos_drop_rate is None else pos_drop_rate)
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
            # faithful: the drop-path rate does not grow with depth (original xcit.py, XCiT.__init__)
            self.blocks = nn.ModuleList([
                XCABlock(embed_dim, num_heads, drop_path=drop_path_rate, **block_args) for _ in range(depth)])
            self.cls_attn_blocks = nn.ModuleList([
                ClassAttentionBlock(embed_dim, num_heads, tokens_norm=tokens_norm, **block_args)
                for _ in range(cls_attn_layers)])
            self.norm = norm_layer(embed_dim)
            self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.set_global_pool(global_pool)
        self.feature_info = [dict(num_chs=embed_dim, reduction=patch_size, module=f'blocks.{i}') for i in range(depth)]

        trunc_normal_(self.cls_token, std=.02)
        self.apply(self.init_linear)

    __jit_unused_properties__: ClassVar[List[str]] = ['xca_form']

    @property
    def xca_form(self) -> str:
        """Form of XCA in all blocks: 'auto', 'plain' or 'gram', see `xca.XCA`; others raise ValueError."""
        return self.blocks[0].attn.form

    @xca_form.setter
    def xca_form(self, form: str):
        if form not in xca_gram.FORMS:
            raise ValueError(f'form {form!r} is not one of {xca_gram.FORMS}')
        for block in self.blocks:
            block.attn.form = form

    @staticmethod
    def init_linear(module: nn.Module):
        if isinstance(module, nn.Linear):  # convolutions and norms keep PyTorch's own initial values
            trunc_normal_(module.weight, std=.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward_patches(self, x: torch.Tensor) -> Tuple[torch.Tensor, int, int]:
        """Compute tokens with position (B, N, C), H and W from images (B, in_chans, img_h, img_w)."""
        x = self.patch_embed(x)
        H, W = x.shape[-2:]
        if self.pos_embeder is not None:
            x = x + self.pos_embeder(H, W)
        return self.pos_drop(x.flatten(2).transpose(1, 2)), H, W

    def forward_cls(self, x: torch.Tensor) -> torch.Tensor:
        """Compute normalised tokens (B, 1 + N, C), CLS first, from patch tokens (B, N, C)."""
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        for block in self.cls_attn_blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_block(block, x)
            else:
                x = block(x)
        return self.norm(x)

    def forward_blocks(self, x: torch.Tensor, H: int, W: int, indices: Optional[List[int]] = None,
                       depth: Optional[int] = None) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        """Run the first `depth` XCA blocks (None: all); return tokens (B, N, C) and outputs of blocks `indices`."""
        outputs: List[torch.Tensor] = []
        for i, block in enumerate(self.blocks):
            if depth is None or i < depth:
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x = checkpoint_block(block, x, H, W)
                else:
                    x = block(x, H, W)
                if indices is not None and i in indices:
                    outputs.append(x)
        return x, outputs

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Compute normalised tokens (B, 1 + N, C), CLS first, from images (B, in_chans, img_h, img_w)."""
        x, H, W = self.forward_patches(x)
        x, _ = self.forward_blocks(x, H, W)
        return self.forward_cls(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Compute logits (B, K), or the input of the head (`pre_logits`), from tokens (B, 1 + N, C)."""
        if self.global_pool == 'token':
            x = x[:, 0]
        elif self.global_pool == 'avg':
            x = x[:, self.num_prefix_tokens:].mean(dim=1)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


default_cfgs = generate_default_cfgs(timm_cfgs())  # read by register_model


def register(size: str, patch_size: int):
    """Register `xcit_{size}_p{patch_size}` with timm, as a function of this module."""
    def entrypoint(pretrained: bool = False, **kwargs) -> Xcit:
        return build_model_with_cfg(
            Xcit, entrypoint.__name__, pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(out_indices=kwargs.pop('out_indices', 3), feature_cls='getter'),
            **{**SIZES[size], 'patch_size': patch_size, **kwargs})

    entrypoint.__name__ = entrypoint.__qualname__ = f'xcit_{size}_p{patch_size}'
    entrypoint.__doc__ = f'XCiT {size} with {patch_size} x {patch_size} pixel patches.'
    globals()[entrypoint.__name__] = register_model(entrypoint)


for _size in SIZES:
    for _patch_size in STEM_CONVOLUTIONS:
        register(_size, _patch_size)
