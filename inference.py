"""Prepare a trained XCiT for inference: the same outputs with less work and less memory.

`fuse(model)` changes a model in eval mode, in place; it can't be trained or stored under the published names any more.
Shapes as in xcit.py.
"""
import operator
from typing import Callable, List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from linear import has_hooks, is_eager_inference, is_faster, lay_out, linear
from mlp import piece
from xca import covariance, is_half
from xcit import ClassAttentionBlock, ConvPatchEmbed, PositionalEncodingFourier, XCABlock, Xcit, channels_last

Pieces = Tuple[torch.Tensor, ...]
LARGEST_POSITION = 2 ** 23  # elements that are kept


def fuse(model: Xcit) -> Xcit:
    """Fold BatchNorm and LayerScale into the layers beside them, in place; returns the model.

    Hooks: those of the model and of its linear and normalising layers are called, perhaps with pieces of the tokens, or
    scaled by LayerScale. Others are refused: of modules that are replaced or passed by.

    Raises:
        ValueError: the model is in training mode, is fused already, has layers of other types, as adapters are, or has
            hooks that would be lost.
    """
    if model.training:
        raise ValueError('a model must be in eval mode to be fused: call model.eval() first')
    if isinstance(model.patch_embed, FusedPatchEmbed):
        raise ValueError('the model is fused already')
    check_as_built(model)
    with torch.no_grad():
        model.patch_embed = FusedPatchEmbed(model.patch_embed)
        model.pos_embeder = CachedPositionalEncoding(model.pos_embeder)
        for i, block in enumerate(model.blocks):
            model.blocks[i] = FusedBlock(block)
        for i, block in enumerate(model.cls_attn_blocks):
            model.cls_attn_blocks[i] = FusedClassAttentionBlock(block)
    return model.requires_grad_(False)


def check_as_built(model: Xcit):
    """Refuse a model that fusing would change.

    What is folded into weights would not be all there is, GELU is another function, or somebody listens to a module
    that is not called any more.

    Raises:
        ValueError: the name of a layer, and why.
    """
    scaled, gelus = [], []  # names of layers
    for i, layer in enumerate(model.patch_embed.proj):
        if isinstance(layer, nn.Sequential):
            scaled.append(f'patch_embed.proj.{i}.0')
        else:
            gelus.append(f'patch_embed.proj.{i}')
    for i in range(len(model.blocks)):
        scaled += [f'blocks.{i}.{name}' for name in ('attn.proj', 'mlp.fc2', 'local_mp.conv2')]
        gelus += [f'blocks.{i}.{name}' for name in ('mlp.act', 'local_mp.act')]
    scaled += [f'cls_attn_blocks.{i}.mlp.fc2' for i in range(len(model.cls_attn_blocks))]
    for name in scaled + gelus:
        layer = model.get_submodule(name)
        if name in gelus:
            as_built = type(layer) is nn.GELU and layer.approximate == 'none'
        else:  # pruning, say, keeps a weight elsewhere and makes this one of it before each use
            as_built = type(layer) in (nn.Linear, nn.Conv2d) and {'weight', 'bias'} <= layer._parameters.keys()
        if not as_built:
            raise ValueError(f'{name} ({type(layer).__name__}) cannot be fused, since it is not as it was built: merge '
                             f'adapters, make pruning permanent')
    for name, module in model.named_modules():
        if has_hooks(module) and not isinstance(module, (Xcit, nn.Linear, nn.LayerNorm)):
            raise ValueError(f'{name} ({type(module).__name__}) has hooks, which would not be called in a fused model: '
                             f'remove them, or use the model as it is')


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


class FusedPatchEmbed(nn.Module):
    """The patch stem, BatchNorms folded in; large images pass through it in strips of rows."""

    def __init__(self, stem: ConvPatchEmbed):
        super().__init__()
        fuse_stem(stem)
        self.proj = stem.proj.to(memory_format=torch.channels_last)

    @property
    def convs(self) -> List[nn.Conv2d]:
        return [layer for layer in self.proj if isinstance(layer, nn.Conv2d)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, img_h, img_w) -> (B, C, H, W) in channels_last."""
        if not is_eager_inference() or not len(x):
            return self.proj(channels_last(x))
        _, _, height, width = x.shape
        H = -(-height // 2 ** len(self.convs))
        largest = self.convs[0].out_channels * -(-height // 2) * -(-width // 2)  # elements, of one image
        images = max(1, piece(x) // largest)
        # At least 4 rows at a time: a strip has 2 ** convolutions - 1 rows of pixels more than its own.
        rows = max(4, H * piece(x) // largest)
        out = None
        for first in range(0, len(x), images):
            for top in range(0, H, rows):
                strip = self.rows(x[first:first + images], len(self.convs), top, min(top + rows, H))
                if out is None:
                    shape = (len(x), strip.shape[1], H, strip.shape[3])
                    out = torch.empty(shape, dtype=strip.dtype, device=x.device, memory_format=torch.channels_last)
                out[first:first + images, :, top:top + rows] = strip
        return out

    def rows(self, x: torch.Tensor, level: int, top: int, bottom: int) -> torch.Tensor:
        """Rows from `top` to before `bottom` of what convolution number `level` (from 1) makes of images x."""
        if level == 0:
            return channels_last(x[:, :, top:bottom])
        height = -(-x.shape[2] // 2 ** (level - 1))  # of its input
        first, last = 2 * top - 1, 2 * bottom  # rows of it that are seen
        above, below = max(0, -first), max(0, last - height)
        x = self.rows(x, level - 1, first + above, last - below)
        if level > 1:
            x = torch.ops.aten.gelu_(x)
        conv = self.convs[level - 1]
        if above and last >= height:  # all rows; a row of zeros below that none sees does no harm
            return conv(x)
        x = F.pad(x, (0, 0, above, below)) if above or below else x
        return F.conv2d(x, conv.weight, conv.bias, stride=2, padding=(0, 1))


class CachedPositionalEncoding(nn.Module):
    """The positional encoding; that of the last grid is kept, unless it is large."""

    def __init__(self, encoding: PositionalEncodingFourier):
        super().__init__()
        self.encoding = encoding
        self.kept: Optional[tuple] = None  # what it was made for, the parameters that made it, the position

    def forward(self, H: int, W: int) -> torch.Tensor:
        """(1, C, H, W)."""
        if not is_eager_inference():
            return self.encoding(H, W)
        parameters = tuple(self.encoding.parameters())
        made_for = (H, W, *((p.dtype, p.device, version(p)) for p in parameters))
        # The same parameters, and not equal ones: comparing those would take longer.
        if self.kept is not None and made_for == self.kept[0] and all(map(operator.is_, parameters, self.kept[1])):
            return self.kept[2]
        position = self.encoding(H, W)
        if position.numel() <= LARGEST_POSITION:
            self.kept = (made_for, parameters, position)
        return position


def version(tensor: torch.Tensor) -> Optional[int]:
    """Another one after each change in place."""
    return None if tensor.is_inference() else tensor._version


class FusedBlock(nn.Module):
    """An XCABlock with LayerScale in the last layer of each branch; large inputs are worked off in pieces."""

    def __init__(self, block: XCABlock):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = block.norm1, block.norm2, block.norm3
        self.attn, self.mlp = block.attn, block.mlp
        scale_rows(self.attn.proj, block.gamma1)
        scale_rows(self.mlp.fc2, block.gamma2)
        for layer in (self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2):
            layer.weight.data = lay_out(layer.weight.data)
        self.local_mp = block.local_mp
        scale_rows(self.local_mp.conv2, block.gamma3)
        bn = self.local_mp.bn
        scale = bn.weight / (bn.running_var + bn.eps).sqrt()
        self.register_buffer('bn_scale', scale[:, None, None], persistent=False)
        self.register_buffer('bn_shift', (bn.bias - bn.running_mean * scale)[:, None, None], persistent=False)

    def forward(self, x: torch.Tensor, H: int, W: int) -> torch.Tensor:
        if not is_eager_inference():
            x = x + self.attn(self.norm1(x))
            x = x + self.local_mp(self.norm3(x), H, W)
            return x + self.mlp(self.norm2(x))
        _, N, C = x.shape
        tokens = max(1, piece(x) // self.mlp.fc1.out_features)  # in a piece

        def mix_tokens(images: torch.Tensor) -> torch.Tensor:
            mixed = self.attention(images, tokens)
            self.add_lpi(mixed.unflatten(1, (H, W)), max(8, 2 * tokens // W))
            return mixed

        # Not in place at first: the input may be somebody's intermediate output.
        mixed = by_pieces(mix_tokens, x, tokens // N).view(-1, C)
        return by_pieces(self.add_mlp, mixed, tokens, out=mixed).view(x.shape)

    def attention(self, x: torch.Tensor, tokens: int) -> torch.Tensor:
        """x + attention; the Gram form works off `tokens` of an image at a time."""
        if not is_half(x) and self.attn.takes_gram(x):
            out = x.new_empty(x.shape)
            self.gram(*(pieces(t, tokens, dim=1) for t in (x, out)))
            return out
        if not is_half(x) and x.device.type == 'cpu' and self.attn.is_plain():
            qkv, proj = self.attn.qkv, self.attn.proj
            return linear(self.attn.by_rows(linear(self.norm1(x), qkv.weight, qkv.bias)), proj.weight, proj.bias, x)
        return x + self.attn(self.norm1(x))

    def gram(self, parts: Pieces, parts_of_out: Pieces):
        """XCA's Gram form; each part (B, tokens, C)."""
        shares = parts[0].new_tensor([part.shape[1] for part in parts])
        shares /= shares.sum()
        means, within = [], 0.
        for part, normed, share in zip(parts, parts_of_out, shares):
            normed.copy_(self.norm1(part))
            means.append(normed.mean(dim=1))
            within = within + share * covariance(normed, means[-1], normed.dtype)
        # The covariance of all tokens is that within the parts, and that of the parts' means.
        means = torch.stack(means, dim=1)  # (B, parts, C)
        mean = shares @ means
        deviations = means - mean[:, None]
        between = (shares[:, None] * deviations).transpose(1, 2) @ deviations
        matrix, bias = self.attn.mixing(mean, within + between)
        for part, normed in zip(parts, parts_of_out):
            if is_faster(part):
                for x, y, matrix_of_x, bias_of_x in zip(part, normed, matrix, bias):
                    y.copy_(linear(y, matrix_of_x.t(), bias_of_x[0], x))
            else:
                normed.copy_(torch.baddbmm(part, normed, matrix).add_(bias))

    def add_lpi(self, grid: torch.Tensor, rows: int):
        """LPI is added to grid (B, H, W, C), `rows` of its rows at a time."""
        lpi = self.local_mp
        H = grid.shape[1]
        added = None
        for top in range(0, H, rows):
            bottom = min(top + rows, H)
            # Each convolution sees one row more above and below; beyond the grid's border, zeros.
            outer = slice(max(0, top - 2), min(H, bottom + 2))
            inner = slice(max(0, top - 1), min(H, bottom + 1))
            x = self.norm3(grid[:, outer])
            if added is not None:  # only now: x needed two of its rows as they were
                grid[:, top - rows:top] += added
            y = torch.ops.aten.gelu_(lpi.conv1(x.permute(0, 3, 1, 2)))  # (B, C, rows, W) in channels_last
            y = y[:, :, inner.start - outer.start:inner.stop - outer.start]
            torch.addcmul(self.bn_shift, y, self.bn_scale, out=y)
            added = lpi.conv2(y)[:, :, top - inner.start:bottom - inner.start].permute(0, 2, 3, 1)
        grid[:, top:] += added

    def add_mlp(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (M, C) + MLP."""
        # Autocast, which may be why, does not see what `linear` does.
        if is_half(x) or not self.mlp.is_plain():
            return x + self.mlp(self.norm2(x))
        fc1, fc2 = self.mlp.fc1, self.mlp.fc2
        return linear(linear(self.norm2(x), fc1.weight, fc1.bias, gelu=True), fc2.weight, fc2.bias, x)


class FusedClassAttentionBlock(ClassAttentionBlock):
    """A class-attention block that makes its patches piece by piece."""

    def __init__(self, block: ClassAttentionBlock):
        nn.Module.__init__(self)
        self.norm1, self.norm2, self.attn, self.mlp = block.norm1, block.norm2, block.attn, block.mlp
        self.gamma1, self.gamma2, self.tokens_norm = block.gamma1, block.gamma2, block.tokens_norm
        scale_rows(self.mlp.fc2, self.gamma2)  # `gamma1` stays, since the patches need it too
        self.gamma2.fill_(1)

    def forward(self, x: torch.Tensor, cls_only: bool = False) -> torch.Tensor:
        if cls_only or not is_eager_inference() or not len(x):
            return super().forward(x, cls_only)
        normed, out = self.norm1(x), x.new_empty(x.shape)
        out[:, :1] = self.new_cls(x, normed)
        length = piece(x) // (x.shape[0] * x.shape[2])
        for part, normed_part, part_of_out in zip(*(pieces(t[:, 1:], length, dim=1) for t in (x, normed, out))):
            part_of_out.copy_(self.new_patches(part, normed_part))
        return out


def pieces(x: torch.Tensor, length: int, dim: int = 0) -> Pieces:
    """Parts of about equal length, and of no more than `length` (or 1)."""
    return x.tensor_split(max(1, -(-x.shape[dim] // max(1, length))), dim)


def by_pieces(function: Callable, x: torch.Tensor, length: int, *, out: Optional[torch.Tensor] = None) -> torch.Tensor:
    """function(x), computed for pieces of x; where these are several, they are joined in `out`, or in new memory."""
    parts = pieces(x, length)
    if len(parts) == 1:
        return function(x)
    out = x.new_empty(x.shape) if out is None else out
    for part, part_of_out in zip(parts, pieces(out, length)):
        part_of_out.copy_(function(part))
    return out
