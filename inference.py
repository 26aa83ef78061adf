"""Prepare a trained XCiT for inference: the same outputs with less work and less memory.

`fuse(model)` changes a model in eval mode, in place; it can't be trained or stored under the published names any more.
Shapes as in xcit.py.
"""
from typing import Dict

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mlp import in_pieces, piece
from xca import product_type, second_moment, token_mean
from xcit import ClassAttentionBlock, ConvPatchEmbed, PositionalEncodingFourier, XCABlock, Xcit


def fuse(model: Xcit) -> Xcit:
    """Fold BatchNorm and LayerScale into the layers beside them, in place; returns the model.

    Raises:
        ValueError: the model is in training mode, or is fused already.
    """
    if model.training:
        raise ValueError('a model must be in eval mode to be fused: call model.eval() first')
    if isinstance(model.patch_embed, FusedPatchEmbed):
        raise ValueError('the model is fused already')
    with torch.no_grad():
        model.patch_embed = FusedPatchEmbed(model.patch_embed)
        model.pos_embeder = CachedPositionalEncoding(model.pos_embeder)
        for i, block in enumerate(model.blocks):
            model.blocks[i] = FusedBlock(block)
        for block in model.cls_attn_blocks:
            fuse_class_attention(block)
    return model.requires_grad_(False)


def fuse_stem(stem: ConvPatchEmbed):
    """Fold the BatchNorms of a patch stem in eval mode into its convolutions, in place."""
    for i, layer in enumerate(stem.proj):
        if isinstance(layer, nn.Sequential):  # conv3x3; the others are GELUs
            stem.proj[i] = fuse_conv_bn_eval(*layer)


def scale_rows(layer: nn.Module, gamma: torch.Tensor):
    """Let a linear layer or a convolution compute gamma times what it did, for each output channel."""
    layer.weight.mul_(gamma.view(-1, *[1] * (layer.weight.ndim - 1)))
    if layer.bias is not None:
        layer.bias.mul_(gamma)


def fuse_class_attention(block: ClassAttentionBlock):
    """`gamma2` goes into the MLP; `gamma1` stays, since the patches need it too."""
    scale_rows(block.mlp.fc2, block.gamma2)
    block.gamma2.fill_(1)


class FusedPatchEmbed(nn.Module):
    """The patch stem, BatchNorms folded in; large images pass through it in strips of rows."""

    def __init__(self, stem: ConvPatchEmbed):
        super().__init__()
        fuse_stem(stem)
        self.proj = stem.proj.to(memory_format=torch.channels_last)
        self.convs = [layer for layer in stem.proj if isinstance(layer, nn.Conv2d)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, img_h, img_w) -> (B, C, H, W) in channels_last."""
        if not in_pieces():
            return self.proj(x.contiguous(memory_format=torch.channels_last))
        _, _, height, width = x.shape
        H = -(-height // 2 ** len(self.convs))
        largest = self.convs[0].out_channels * -(-height // 2) * -(-width // 2)  # elements, of one image
        images = max(1, piece(x) // largest)
        # At least 4 rows at a time: a strip has 2 ** convolutions - 1 rows of pixels more than its own.
        rows = max(4, H * piece(x) // largest)
        return torch.cat([
            torch.cat([self.rows(part, len(self.convs), top, min(top + rows, H)) for top in range(0, H, rows)], dim=2)
            for part in x.split(images)])

    def rows(self, x: torch.Tensor, level: int, top: int, bottom: int) -> torch.Tensor:
        """Rows from `top` to before `bottom` of what convolution number `level` (from 1) makes of images x."""
        if level == 0:
            return x[:, :, top:bottom].contiguous(memory_format=torch.channels_last)
        height = -(-x.shape[2] // 2 ** (level - 1))  # of its input
        first, last = 2 * top - 1, 2 * bottom  # rows of it that are seen
        above, below = max(0, -first), max(0, last - height)
        x = self.rows(x, level - 1, first + above, last - below)
        if level > 1:
            x = F.gelu(x)
        conv = self.convs[level - 1]
        if above and last >= height:  # all rows; a row of zeros below that none sees does no harm
            return conv(x)
        return F.conv2d(F.pad(x, (0, 0, above, below)), conv.weight, conv.bias, stride=2, padding=(0, 1))


class CachedPositionalEncoding(nn.Module):
    """The positional encoding; that of the last grid is kept."""

    def __init__(self, encoding: PositionalEncodingFourier):
        super().__init__()
        self.encoding = encoding
        self.cache: Dict[tuple, torch.Tensor] = {}

    def forward(self, H: int, W: int) -> torch.Tensor:
        """(1, C, H, W)."""
        if not in_pieces():
            return self.encoding(H, W)
        weight = self.encoding.token_projection.weight
        key = (H, W, weight.dtype, weight.device, torch.is_autocast_enabled(weight.device.type))
        if key not in self.cache:
            self.cache = {key: self.encoding(H, W)}
        return self.cache[key]


class FusedBlock(nn.Module):
    """An XCABlock with LayerScale in the last layer of each branch."""

    def __init__(self, block: XCABlock):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = block.norm1, block.norm2, block.norm3
        self.attn, self.mlp = block.attn, block.mlp
        scale_rows(self.attn.proj, block.gamma1)
        scale_rows(self.mlp.fc2, block.gamma2)
        self.local_mp = block.local_mp
        scale_rows(self.local_mp.conv2, block.gamma3)

    def forward(self, x: torch.Tensor, H: int, W: int) -> torch.Tensor:
        tokens = max(1, piece(x) // self.mlp.fc1.out_features)  # in a piece
        if not in_pieces() or x.shape[0] * x.shape[1] <= tokens:
            x = x + self.attn(self.norm1(x))
            x = x + self.local_mp(self.norm3(x), H, W)
            return x + self.mlp(self.norm2(x))
        # These two make new tensors: the input may be somebody's intermediate output.
        x = self.add_attention(x, max(1, tokens // x.shape[0]))
        x = self.add_lpi(x, H, W, max(8, tokens // (x.shape[0] * W)))
        for part in x.view(-1, x.shape[-1]).split(tokens):
            part += self.mlp(self.norm2(part))
        return x

    def add_attention(self, x: torch.Tensor, tokens: int) -> torch.Tensor:
        """x + attention, `tokens` of each image at a time where the Gram form allows it."""
        if product_type(x) != torch.float32 or not self.attn.takes_gram(x):
            return x + self.attn(self.norm1(x))
        mean, moment = 0., 0.
        for part in x.split(tokens, dim=1):
            weight = part.shape[1] / x.shape[1]
            part = self.norm1(part)
            mean = mean + weight * token_mean(part)
            moment = moment + weight * second_moment(part)
        matrix, bias = self.attn.mixing(mean, moment)
        out = torch.empty_like(x)
        for part, part_of_out in zip(x.split(tokens, dim=1), out.split(tokens, dim=1)):
            torch.add(part, torch.baddbmm(bias, self.norm1(part), matrix), out=part_of_out)
        return out

    def add_lpi(self, x: torch.Tensor, H: int, W: int, rows: int) -> torch.Tensor:
        """x + LPI, `rows` rows of the grid at a time."""
        lpi = self.local_mp
        grid = x.unflatten(1, (H, W))
        out = torch.empty_like(grid)
        for top in range(0, H, rows):
            bottom = min(top + rows, H)
            # Each convolution sees one row more above and below; beyond the grid's border, zeros.
            outer = slice(max(0, top - 2), min(H, bottom + 2))
            inner = slice(max(0, top - 1), min(H, bottom + 1))
            y = lpi.conv1(self.norm3(grid[:, outer]).permute(0, 3, 1, 2))  # (B, C, rows, W) in channels_last
            y = lpi.bn(lpi.act(y[:, :, inner.start - outer.start:inner.stop - outer.start]))
            y = lpi.conv2(y)[:, :, top - inner.start:bottom - inner.start]
            torch.add(grid[:, top:bottom], y.permute(0, 2, 3, 1), out=out[:, top:bottom])
        return out.flatten(1, 2)
