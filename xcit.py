"""XCiT: Cross-Covariance Image Transformers, as timm models.

Paper: https://arxiv.org/abs/2106.09681. Importing this file registers the 14 models of `SIZES` x {p16, p8} with
timm; `timm.create_model('xcit_small_12_p16')` then builds one. Module and parameter names are those of the published
checkpoints, which load strictly. Cross-covariance attention itself, equation 4, is in xca.py, the table of published
weights in xcit_zoo.py. What is faster than this definition is behind `fuse` and `speed_up_training`.

Shapes: `B` batch, `N = H*W` tokens, `C` channels, `H, W` token grid (never pixels), `h` heads, `d = C//h`,
`K` classes. Images are `(B, in_chans, img_h, img_w)` in pixels; any size works, the grid is `ceil(pixels / patch)`.
"""
import functools
import math
from typing import List, Optional, Tuple, Union

import torch
import torch.fx
import torch.nn as nn
from timm.layers import DropPath, Mlp, get_act_layer, get_norm_layer, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from xca import XCA
from xcit_fuse import fuse
from xcit_timm import TimmModel, checkpoint_block
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


class PositionalEncodingFourier(nn.Module):
    """Sine/cosine features of each token's (y, x), mapped to C channels; analytic, so any grid works.

    Source: paper section 3.3; original xcit.py, PositionalEncodingFourier.
    """

    def __init__(self, dim: int, hidden_dim: int = 32, temperature: float = 10000., device=None, dtype=None):
        super().__init__()
        self.token_projection = nn.Conv2d(2 * hidden_dim, dim, kernel_size=1, device=device, dtype=dtype)
        self.hidden_dim = hidden_dim
        self.temperature = temperature

    def forward(self, H: int, W: int) -> torch.Tensor:
        """Encoding of an H x W grid: (1, C, H, W)."""
        weight = self.token_projection.weight
        y = axis_features(H, self.hidden_dim, self.temperature, weight)[:, None].expand(-1, W, -1)
        x = axis_features(W, self.hidden_dim, self.temperature, weight)[None].expand(H, -1, -1)
        return self.token_projection(torch.cat((y, x), dim=2).permute(2, 0, 1)[None])


@torch.fx.wrap  # one operation to torch.fx, which can't trace arange
def axis_features(length: int, dim: int, temperature: float, like: torch.Tensor) -> torch.Tensor:
    """Features of the coordinates 1..length of one axis, scaled to (0, 2 pi]: (length, dim), on `like`'s device."""
    # Float32 whatever the type: half precision cannot tell neighbouring coordinates of a large grid apart.
    position = torch.arange(1, length + 1, dtype=torch.float32, device=like.device) / (length + 1e-6) * (2 * math.pi)
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=like.device) / dim
    angle = position[:, None] / temperature ** exponent  # (length, dim / 2)
    return torch.stack((angle.sin(), angle.cos()), dim=2).flatten(1).to(like.dtype)  # sin and cos interleaved


def conv3x3(in_chans: int, out_chans: int, device=None, dtype=None) -> nn.Sequential:
    """Stride-2 3x3 convolution and BatchNorm: one halving of the resolution."""
    return nn.Sequential(
        nn.Conv2d(in_chans, out_chans, kernel_size=3, stride=2, padding=1, bias=False, device=device, dtype=dtype),
        nn.BatchNorm2d(out_chans, device=device, dtype=dtype))


class ConvPatchEmbed(nn.Module):
    """Patch stem: log2(patch_size) stride-2 convolutions that double the channels, GELU between them.

    Source: paper section 3.3 (following LeViT); original xcit.py, ConvPatchEmbed.
    """

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, act_layer=nn.GELU, device=None,
                 dtype=None):
        super().__init__()
        # What timm's users read; images may have any other size.
        self.img_size, self.patch_size = to_2tuple(img_size), patch_size
        self.num_patches = math.prod(-(-side // patch_size) for side in self.img_size)
        convolutions = STEM_CONVOLUTIONS[patch_size]
        widths = [in_chans] + [embed_dim // 2 ** i for i in reversed(range(convolutions))]
        layers: List[nn.Module] = []
        for in_width, out_width in zip(widths, widths[1:]):
            layers += [conv3x3(in_width, out_width, device, dtype), act_layer()]
        self.proj = nn.Sequential(*layers[:-1])  # the last convolution has no activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, img_h, img_w) -> (B, C, H, W) in channels_last: in memory as tokens lie, see LPI."""
        return self.proj(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))


class LPI(nn.Module):
    """Local patch interaction: two depthwise 3x3 convolutions on the token grid.

    Source: paper section 3.2; original xcit.py, LPI.
    """

    def __init__(self, dim: int, act_layer=nn.GELU, device=None, dtype=None):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, device=device, dtype=dtype)
        self.act = act_layer()
        self.bn = nn.BatchNorm2d(dim, device=device, dtype=dtype)
        self.conv2 = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, device=device, dtype=dtype)
        # As tokens (B, N, C) lie in memory they are a grid (B, C, H, W) in channels_last; with weights that are marked
        # so, too, nothing is copied.
        for conv in (self.conv1, self.conv2):
            conv.weight = nn.Parameter(conv.weight.detach().contiguous(memory_format=torch.channels_last))

    def forward(self, x: torch.Tensor, H: int, W: int) -> torch.Tensor:
        x = x.transpose(1, 2).unflatten(2, (H, W))  # (B, C, H, W) in channels_last: the same memory
        x = self.conv2(self.bn(self.act(self.conv1(x))))
        return x.flatten(2).transpose(1, 2)  # (B, N, C)


class XCABlock(nn.Module):
    """XCA, LPI and MLP, each normalised before, scaled (LayerScale) and dropped (stochastic depth) after."""

    def __init__(self, dim: int, num_heads: int, *, mlp_ratio: float, qkv_bias: bool, proj_drop: float,
                 attn_drop: float, drop_path: float, eta: float, act_layer, norm_layer, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm1 = norm_layer(dim, **dd)
        self.attn = XCA(dim, num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.norm3 = norm_layer(dim, **dd)
        self.local_mp = LPI(dim, act_layer, **dd)
        self.gamma1 = nn.Parameter(eta * torch.ones(dim, **dd))
        self.gamma2 = nn.Parameter(eta * torch.ones(dim, **dd))
        self.gamma3 = nn.Parameter(eta * torch.ones(dim, **dd))

    def forward(self, x: torch.Tensor, H: int, W: int) -> torch.Tensor:
        x = x + self.drop_path(self.gamma1 * self.attn(self.norm1(x)))
        # faithful: 3 comes before 2; the published weights need this order (original xcit.py, XCABlock)
        x = x + self.drop_path(self.gamma3 * self.local_mp(self.norm3(x), H, W))
        x = x + self.drop_path(self.gamma2 * self.mlp(self.norm2(x)))
        return x


class ClassAttention(nn.Module):
    """Attention of the CLS token over all tokens: softmax(q kᵀ / √d) v, with the CLS token's q.

    Source: CaiT (https://arxiv.org/abs/2103.17239) section 3; original xcit.py, ClassAttention.
    """

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True, attn_drop: float = 0.,
                 proj_drop: float = 0., device=None, dtype=None):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias, device=device, dtype=dtype)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def weights_and_values(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """(B, 1 + N, C), CLS first -> attention of CLS (B, h, 1, 1 + N), values (B, h, 1 + N, d)."""
        B, tokens, C = x.shape
        h, d = self.num_heads, C // self.num_heads
        q, k, v = self.qkv(x).reshape(B, tokens, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
        return (q[:, :, :1] / d ** .5 @ k.transpose(2, 3)).softmax(dim=-1), v

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 1 + N, C), CLS first -> the new CLS token, (B, 1, C)."""
        attn, v = self.weights_and_values(x)
        cls = self.attn_drop(attn) @ v  # (B, h, 1, d)
        return self.proj_drop(self.proj(cls.transpose(1, 2).flatten(2)))

    def attention_weights(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 1 + N, C), CLS first -> how much CLS attends to each token, (B, h, 1 + N); a head's sum is 1."""
        return self.weights_and_values(x)[0][:, :, 0]


class ClassAttentionBlock(nn.Module):
    """Class attention and an MLP on the CLS token; the patches pass through, but not unchanged (see forward)."""

    def __init__(self, dim: int, num_heads: int, *, mlp_ratio: float, qkv_bias: bool, proj_drop: float,
                 attn_drop: float, eta: float, tokens_norm: bool, act_layer, norm_layer, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm1 = norm_layer(dim, **dd)
        self.attn = ClassAttention(dim, num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop, **dd)
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.gamma1 = nn.Parameter(eta * torch.ones(dim, **dd))
        self.gamma2 = nn.Parameter(eta * torch.ones(dim, **dd))
        self.tokens_norm = tokens_norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 1 + N, C), CLS first -> the same."""
        normed = self.norm1(x)
        # faithful: the patches add their own scaled LayerNorm here, where attention was meant for the CLS token
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
        img_size: pixels, only for who asks the model (`patch_embed.img_size`, `.num_patches`): any size works.
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
            timm's own XCiT drops before the head instead.
        pos_drop_rate: dropout after the positional encoding, if it is another one.
        proj_drop_rate: dropout after each attention's projection and in the MLPs, if it is another one.
        attn_drop_rate: dropout of attention weights, fraction.
        drop_path_rate: stochastic depth of the XCA blocks, fraction.
        act_layer: activation of stem, LPI and MLPs, a class or timm's name; None: GELU.
        norm_layer: normalisation of tokens, a class or timm's name; None: LayerNorm. BatchNorms stay what they are.
        cls_attn_layers: number of class-attention blocks.
        use_pos_embed: whether there is a positional encoding.
        eta: initial value of LayerScale.
        tokens_norm: whether class-attention blocks normalise all tokens or only CLS.
        device, dtype: of the parameters, as in torch.

    Raises:
        ValueError: an argument outside what is listed above.
    """

    def __init__(
            self,
            img_size: Union[int, Tuple[int, int]] = 224,
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
            pos_drop_rate: Optional[float] = None,
            proj_drop_rate: Optional[float] = None,
            attn_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            act_layer=None,
            norm_layer=None,
            cls_attn_layers: int = 2,
            use_pos_embed: bool = True,
            eta: float = 1.,
            tokens_norm: bool = True,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if patch_size not in STEM_CONVOLUTIONS:
            raise ValueError(f'patch_size {patch_size} is not one of {sorted(STEM_CONVOLUTIONS)}')
        if embed_dim % num_heads:
            raise ValueError(f'embed_dim {embed_dim} is not a multiple of num_heads {num_heads}')
        if not isinstance(drop_path_rate, (int, float)):
            raise ValueError(f'drop_path_rate {drop_path_rate} is not allowed: it is one number for all blocks')
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1
        self.grad_checkpointing = False

        # faithful: one rate for dropout everywhere but before the head (original xcit.py, XCiT.__init__)
        proj_drop = drop_rate if proj_drop_rate is None else proj_drop_rate
        act_layer = get_act_layer(act_layer) or nn.GELU
        norm_layer = get_norm_layer(norm_layer) or functools.partial(nn.LayerNorm, eps=1e-6)
        block_args = dict(mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, proj_drop=proj_drop, attn_drop=attn_drop_rate,
                          eta=eta, act_layer=act_layer, norm_layer=norm_layer, **dd)

        self.patch_embed = ConvPatchEmbed(img_size, patch_size, in_chans, embed_dim, act_layer, **dd)
        self.pos_embeder = PositionalEncodingFourier(embed_dim, **dd) if use_pos_embed else None  # sic: published name
        self.pos_drop = nn.Dropout(drop_rate if pos_drop_rate is None else pos_drop_rate)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim, **dd))
        # faithful: the drop-path rate does not grow with depth (original xcit.py, XCiT.__init__)
        self.blocks = nn.ModuleList([
            XCABlock(embed_dim, num_heads, drop_path=drop_path_rate, **block_args) for _ in range(depth)])
        self.cls_attn_blocks = nn.ModuleList([
            ClassAttentionBlock(embed_dim, num_heads, tokens_norm=tokens_norm, **block_args)
            for _ in range(cls_attn_layers)])
        self.norm = norm_layer(embed_dim, **dd)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.set_global_pool(global_pool)
        self.feature_info = [
            dict(num_chs=embed_dim, reduction=patch_size, module=f'blocks.{i}') for i in range(depth)]

        trunc_normal_(self.cls_token, std=.02)
        self.apply(self.init_linear)

    @staticmethod
    def init_linear(module: nn.Module):
        if isinstance(module, nn.Linear):  # convolutions and norms keep PyTorch's own initial values
            trunc_normal_(module.weight, std=.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward_patches(self, x: torch.Tensor) -> Tuple[torch.Tensor, int, int]:
        """Image -> tokens with position (B, N, C), H, W."""
        x = self.patch_embed(x)
        H, W = x.shape[-2:]
        if self.pos_embeder is not None:
            x = x + self.pos_embeder(H, W)
        return self.pos_drop(x.flatten(2).transpose(1, 2)), H, W

    def forward_cls(self, x: torch.Tensor) -> torch.Tensor:
        """Patch tokens (B, N, C) -> normalised tokens with the CLS token in front, (B, 1 + N, C)."""
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        for block in self.cls_attn_blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_block(block, x)
            else:
                x = block(x)
        return self.norm(x)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Image (B, in_chans, img_h, img_w) -> normalised tokens (B, 1 + N, C), CLS first."""
        x, H, W = self.forward_patches(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_block(block, x, H, W)
            else:
                x = block(x, H, W)
        return self.forward_cls(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens (B, 1 + N, C) -> logits (B, K), or what the head would see (`pre_logits`)."""
        if self.global_pool == 'token':
            x = x[:, 0]
        elif self.global_pool == 'avg':
            x = x[:, self.num_prefix_tokens:].mean(dim=1)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


# ---------------------------------------------------------------------------------------------------------------------
# timm's registry

default_cfgs = generate_default_cfgs(timm_cfgs())


def register(size: str, patch_size: int):
    """Register `xcit_{size}_p{patch_size}` with timm, and make it a function of this module."""

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
