"""Fast inference: `fuse` gives a model the same outputs with less work and less memory.

It replaces the modules of a trained model, in place; afterwards the model cannot be trained, or stored under the
published names. docs/benchmark.md lists the gain of each piece. Shapes as in xcit.py.
"""
import copy
import re
from typing import Callable, List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Mlp
from torch.nn.utils.fusion import fuse_conv_bn_eval

import xca_gram
from xca import XCA
from xcit_linear import covariance_in_panels, is_eager_inference, lay_out, linear
from xcit_timm import TimmModel, network_of
from xcit_train import FastXCA, ShortClassAttention

# Largest number of elements of an intermediate result that is computed in one piece. On CPUs 16 MB in float32,
# measured; on other devices pieces only save memory, and large pieces keep the device busy.
PIECE = {'cpu': 2 ** 22, 'other': 2 ** 26}
Pieces = Tuple[torch.Tensor, ...]


def piece(x: torch.Tensor) -> int:
    """Return the number of elements of a piece on x's device."""
    return PIECE.get(x.device.type, PIECE['other'])


def fuse(model: nn.Module) -> nn.Module:
    """Prepare an Xcit, or a `features_only` model with an Xcit, in eval mode for inference, in place; return it.

    BatchNorm and LayerScale are folded into the layers beside them, images pass through the stem in strips, and tokens
    through the blocks in pieces. Hooks of the model itself, of its LayerNorms and of its head are still called, perhaps
    with pieces of the tokens.

    Raises:
        ValueError: the model is in training mode, is already fused, is not an Xcit, or has a layer that cannot be fused
            (adapter, quantized layer, layer with hooks). The message names the layer, and the model is unchanged.
    """
    network = network_of(model, 'fused')
    check(network)
    with torch.no_grad():
        stem = FusedPatchEmbed(network.patch_embed)
        blocks = [FusedBlock(block) for block in network.blocks]
        cls_attn_blocks = [FusedClassAttentionBlock(block) for block in network.cls_attn_blocks]
    network.patch_embed = stem
    network.blocks, network.cls_attn_blocks = nn.ModuleList(blocks), nn.ModuleList(cls_attn_blocks)
    return model.eval().requires_grad_(False)


def fuse_stem(model: nn.Module) -> nn.Module:
    """Fold the stem's BatchNorms alone, in place; return the model, whose layers TorchScript can read.

    Raises:
        ValueError: see `fuse`.
    """
    network = network_of(model, 'fused')
    check(network)
    network.patch_embed.proj = folded_stem(network.patch_embed)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Checks

# Modules that a fused model does not call: stem, blocks without their norms, class-attention blocks without their MLP
REPLACED = r'patch_embed|blocks\.\d+(?!\.norm\d$)|cls_attn_blocks\.\d+(\.attn|$)'
# Their classes by name pattern; of xcit.py, which imports this file, the names of the classes
CLASSES = {
    r'patch_embed': 'ConvPatchEmbed',
    r'patch_embed\.proj': nn.Sequential,
    r'patch_embed\.proj\.\d\.0|blocks\.\d+\.local_mp\.conv[12]': nn.Conv2d,
    r'patch_embed\.proj\.\d\.1|blocks\.\d+\.local_mp\.bn': nn.BatchNorm2d,
    r'patch_embed\.proj\.[135]|blocks\.\d+\.(mlp|local_mp)\.act': nn.GELU,
    r'blocks\.\d+': 'XCABlock',
    r'blocks\.\d+\.attn': XCA,
    r'blocks\.\d+\.mlp': Mlp,
    r'blocks\.\d+\.local_mp': 'LPI',
    r'(cls_attn_)?blocks\.\d+\.attn\.(qkv|proj)|blocks\.\d+\.mlp\.fc[12]': nn.Linear,
    r'cls_attn_blocks\.\d+': 'ClassAttentionBlock',
    r'cls_attn_blocks\.\d+\.attn': 'ClassAttention',
}


def check(model: TimmModel):
    """Raise ValueError if fusing would change the model; the message names the layer and the reason."""
    if model.training:
        raise ValueError('a model must be in eval mode to be fused: call model.eval() first')
    if isinstance(model.patch_embed, FusedPatchEmbed):
        raise ValueError('the model is already fused')
    for name, layer in model.named_modules():
        problem = problem_of(name, layer) if re.match(REPLACED, name) else None
        if problem:
            raise ValueError(f'{name} ({type(layer).__name__}) cannot be fused: {problem}')


def problem_of(name: str, layer: nn.Module) -> Optional[str]:
    """Return the reason why a layer cannot be fused, or None."""
    cls = next((cls for pattern, cls in CLASSES.items() if re.fullmatch(pattern, name)), type(layer))
    if cls not in (type(layer), type(layer).__name__) and (cls, type(layer)) != (nn.BatchNorm2d, nn.SyncBatchNorm):
        return (f'it is not the {cls if isinstance(cls, str) else cls.__name__} that was built (merge adapters, make '
                f'parametrizations permanent, use a quantized model unfused)')
    if xca_gram.is_intercepted(layer):
        return ('it has hooks or a replaced forward method, which a fused model would not call (make pruning '
                'permanent, remove the hooks, or use the model unfused)')
    if layer.training:
        return 'it is in training mode: call model.eval() first'
    if cls is nn.GELU and layer.approximate != 'none':
        return f'approximate={layer.approximate!r} is another function than GELU'
    if cls in (nn.Linear, nn.Conv2d) and type(layer.weight) is not nn.Parameter:
        return 'its weight is not a plain parameter (use a quantized model unfused)'
    if cls is nn.Conv2d and (layer.kernel_size, layer.padding, layer.dilation, layer.padding_mode) != (
            (3, 3), (1, 1), (1, 1), 'zeros'):
        return 'it must have a 3x3 kernel, no dilation, and a padding of one row of zeros'
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Modules of a fused model

class FusedLinear(nn.Module):
    """Linear layer with outputs scaled by LayerScale's gamma, if given; see xcit_linear.linear."""

    def __init__(self, layer: nn.Linear, gamma: Optional[torch.Tensor] = None):
        super().__init__()
        weight = layer.weight if gamma is None else gamma[:, None] * layer.weight
        bias = layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
        self.weight = nn.Parameter(lay_out(weight.detach()))
        self.bias = nn.Parameter((bias if gamma is None else gamma * bias).detach())

    def forward(self, x: torch.Tensor, residual: Optional[torch.Tensor] = None, gelu: bool = False) -> torch.Tensor:
        return linear(x, self.weight, self.bias, residual, gelu)


def scaled_convolution(conv: nn.Conv2d, gamma: torch.Tensor) -> nn.Conv2d:
    """Return the depthwise convolution with outputs scaled by LayerScale's gamma."""
    scaled = copy.deepcopy(conv).to(memory_format=torch.channels_last)
    scaled.weight.mul_(gamma[:, None, None, None])
    scaled.bias.mul_(gamma)
    return scaled


def folded_stem(stem: nn.Module) -> nn.Sequential:
    """Return the stem's convolutions, with its BatchNorms folded in, and GELUs."""
    folded = [fuse_conv_bn_eval(*layer) if isinstance(layer, nn.Sequential) else layer for layer in stem.proj]
    return nn.Sequential(*folded).to(memory_format=torch.channels_last)


class FusedPatchEmbed(nn.Module):
    """Patch stem with folded BatchNorms; large images pass through it in strips of rows."""

    def __init__(self, stem: nn.Module):
        super().__init__()
        self.proj = folded_stem(stem)

    @property
    def convs(self) -> List[nn.Conv2d]:
        return [layer for layer in self.proj if isinstance(layer, nn.Conv2d)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embed images (B, in_chans, img_h, img_w) as a grid (B, C, H, W) in channels_last."""
        if not is_eager_inference() or not len(x):
            return self.proj(x)
        first, height, width = self.convs[0], *x.shape[2:]
        largest = (first.out_channels * halved(height, first.stride[0])  # elements of the largest result, per image
                   * halved(width, first.stride[1]))
        for conv in self.convs:
            height = halved(height, conv.stride[0])
        images = max(1, piece(x) // largest)
        # At least 4 rows at a time, since a strip needs some more rows of pixels above and below.
        rows = max(4, height * piece(x) // largest)
        out = None
        for start in range(0, len(x), images):
            for top in range(0, height, rows):
                strip = self.rows(x[start:start + images], len(self.convs), top, min(top + rows, height))
                if out is None:
                    shape = (len(x), strip.shape[1], height, strip.shape[3])
                    out = torch.empty(shape, dtype=strip.dtype, device=x.device, memory_format=torch.channels_last)
                out[start:start + images, :, top:top + rows] = strip
        return out

    def rows(self, x: torch.Tensor, level: int, top: int, bottom: int) -> torch.Tensor:
        """Compute rows `top` to `bottom` (excluded) of the output of convolution `level` (from 1; 0: images x)."""
        if level == 0:
            return x[:, :, top:bottom]
        conv = self.convs[level - 1]
        height = x.shape[2]  # of the convolution's input, after the loop
        for before in self.convs[:level - 1]:
            height = halved(height, before.stride[0])
        if top == 0 and bottom == halved(height, conv.stride[0]):
            first, last = 0, height
        else:
            first, last = conv.stride[0] * top - 1, conv.stride[0] * (bottom - 1) + 2  # rows that the kernel covers
        above, below = max(0, -first), max(0, last - height)
        x = self.rows(x, level - 1, first + above, last - below)
        if level > 1:
            x = torch.ops.aten.gelu_(x)
        if (first, last) == (0, height):
            return conv(x)
        x = F.pad(x, (0, 0, above, below)) if above or below else x
        return F.conv2d(x, conv.weight, conv.bias, stride=conv.stride, padding=(0, 1), groups=conv.groups)


def halved(length: int, stride: int) -> int:
    """Return the output rows or columns of a 3x3 convolution with padding 1, for `length` input rows or columns."""
    return -(-length // stride)


class FusedBlock(nn.Module):
    """XCABlock with LayerScale folded into the last layer of each branch; processes large inputs in pieces."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = block.norm1, block.norm2, block.norm3
        self.attn = FusedXCA(block.attn, block.gamma1)
        self.conv1 = block.local_mp.conv1
        bn = block.local_mp.bn
        # BatchNorm cannot be folded into the second convolution, whose zero padding comes after BatchNorm
        scale = (bn.running_var + bn.eps).rsqrt() * (1 if bn.weight is None else bn.weight)
        shift = (0 if bn.bias is None else bn.bias) - bn.running_mean * scale
        self.register_buffer('bn_scale', scale[:, None, None])
        self.register_buffer('bn_shift', shift[:, None, None])
        self.conv2 = scaled_convolution(block.local_mp.conv2, block.gamma3)
        self.fc1, self.fc2 = FusedLinear(block.mlp.fc1), FusedLinear(block.mlp.fc2, block.gamma2)

    def forward(self, x: torch.Tensor, H: int, W: int) -> torch.Tensor:
        x = x.to(self.bn_shift.dtype)  # under autocast tokens are float32, as in an unfused block
        if not is_eager_inference():
            x = x + self.attn(self.norm1(x))
            grid = self.norm3(x).transpose(1, 2).unflatten(2, (H, W))
            grid = self.conv2(torch.addcmul(self.bn_shift, F.gelu(self.conv1(grid)), self.bn_scale))
            x = x + grid.flatten(2).transpose(1, 2)
            return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        _, N, C = x.shape
        tokens = max(1, piece(x) // len(self.fc1.bias))  # in a piece

        def mix_tokens(images: torch.Tensor) -> torch.Tensor:
            mixed = self.attn.residual(images, self.norm1, tokens)
            self.add_lpi(mixed.unflatten(1, (H, W)), max(8, 2 * tokens // W))
            return mixed

        # Not in place: a caller may hold the input as an intermediate output.
        mixed = by_pieces(mix_tokens, x, tokens // N).view(-1, C)
        return by_pieces(self.add_mlp, mixed, tokens, out=mixed).view(x.shape)

    def add_lpi(self, grid: torch.Tensor, rows: int):
        """Add LPI to grid (B, H, W, C) in place, `rows` rows at a time."""
        H = grid.shape[1]
        added = None
        for top in range(0, H, rows):
            bottom = min(top + rows, H)
            # Each convolution needs one more row above and below; beyond the grid's border, zeros.
            outer = slice(max(0, top - 2), min(H, bottom + 2))
            inner = slice(max(0, top - 1), min(H, bottom + 1))
            x = self.norm3(grid[:, outer])
            if added is not None:  # not before: x needs two of these rows unchanged
                grid[:, top - rows:top] += added
            y = torch.ops.aten.gelu_(self.conv1(x.permute(0, 3, 1, 2)))  # (B, C, rows, W) in channels_last
            y = y[:, :, inner.start - outer.start:inner.stop - outer.start]
            torch.addcmul(self.bn_shift, y, self.bn_scale, out=y)
            added = self.conv2(y)[:, :, top - inner.start:bottom - inner.start].permute(0, 2, 3, 1)
        grid[:, top:] += added

    def add_mlp(self, x: torch.Tensor) -> torch.Tensor:
        """Compute tokens (M, C) + MLP."""
        return self.fc2(self.fc1(self.norm2(x), gelu=True), residual=x)


class FusedXCA(FastXCA):
    """XCA with LayerScale folded into its projection; inference in pieces of tokens and without copies of heads."""

    def __init__(self, attn: XCA, gamma: torch.Tensor):
        super().__init__(attn)
        self.qkv, self.proj = FusedLinear(attn.qkv), FusedLinear(attn.proj, gamma)
        self.attn_drop = self.proj_drop = nn.Identity()

    def residual(self, x: torch.Tensor, norm: nn.Module, tokens: int) -> torch.Tensor:
        """Compute x + attention of norm(x); the Gram form processes `tokens` of an image at a time."""
        if xca_gram.is_chosen(self.form, x):
            out = x.new_empty(x.shape)
            self.gram_in_pieces(norm, *(pieces(t, tokens, dim=1) for t in (x, out)))
            return out
        if xca_gram.in_half_precision(x):
            return x + self(norm(x))
        return self.proj(self.by_rows(self.qkv(norm(x))), residual=x)

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        # Compiled for CPUs, heads are copied as rows of d channels, not channel by channel.
        compiles = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        if not compiles or x.device.type != 'cpu' or xca_gram.in_half_precision(x):
            return super().plain(x)
        B, N, C = x.shape
        h, d = self.num_heads, C // self.num_heads
        q, k, v = self.qkv(x).reshape(B, N, 3, h, d).permute(2, 0, 3, 1, 4).reshape(3, B * h, N, d).unbind(0)
        q_norm, k_norm = (t.square().sum(dim=1, keepdim=True).sqrt().clamp_min(1e-12) for t in (q, k))
        attn = xca_gram.attention_weights(self, q.transpose(1, 2) @ k / q_norm.transpose(1, 2) / k_norm)
        out = v @ attn.transpose(1, 2)  # (B * h, N, d)
        return self.proj(out.unflatten(0, (B, h)).transpose(1, 2).reshape(B, N, C))

    def by_rows(self, qkv: torch.Tensor) -> torch.Tensor:
        """Compute A v (B, N, C) from the output of `qkv` (B, N, 3 C) without a copy of queries, keys and values."""
        B, N, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        h, d = self.num_heads, C // self.num_heads
        qkv = qkv.view(B, N, 3, h, d)
        norms = qkv[:, :, :2].square().sum(dim=1).sqrt_().clamp_min_(1e-12)  # (B, 2, h, d)
        cosines, out = qkv.new_empty(B, h, d, d), qkv.new_empty(B, N, C)
        # Image by image, since batched products of several images would copy the heads, which are strided in memory.
        for i in range(B):
            torch.bmm(qkv[i, :, 0].permute(1, 2, 0), qkv[i, :, 1].transpose(0, 1), out=cosines[i])
        cosines /= norms[:, 0, :, :, None]
        cosines /= norms[:, 1, :, None]
        attn = xca_gram.attention_weights(self, cosines.flatten(0, 1)).view(B, h, d, d)
        for i in range(B):
            of_heads = out[i].view(N, h, d).transpose(0, 1)
            torch.bmm(qkv[i, :, 2].transpose(0, 1), attn[i].transpose(1, 2), out=of_heads)
        return out

    def gram_in_pieces(self, norm: nn.Module, parts: Pieces, parts_of_out: Pieces):
        """Write x + Gram form of norm(x) to `parts_of_out`, for x in `parts`; each part is (B, tokens, C)."""
        shares = parts[0].new_tensor([part.shape[1] for part in parts])
        shares /= shares.sum()
        means, within = [], 0.
        for part, normed, share in zip(parts, parts_of_out, shares):
            normed.copy_(norm(part))
            means.append(normed.mean(dim=1))
            within = within + share * covariance_in_panels(normed, means[-1])
        # The covariance of all tokens is the mean covariance within parts plus the covariance of the means.
        means = torch.stack(means, dim=1)  # (B, parts, C)
        mean = shares @ means
        deviations = means - mean[:, None]
        between = (shares[:, None] * deviations).transpose(1, 2) @ deviations
        matrix, bias = xca_gram.mixing(self, mean, within + between)
        for part, normed in zip(parts, parts_of_out):
            for x, y, matrix_of_x, bias_of_x in zip(part, normed, matrix, bias):
                y.copy_(linear(y, matrix_of_x.t(), bias_of_x[0], x))


class FusedClassAttentionBlock(nn.Module):
    """ClassAttentionBlock with the short class attention; processes the patches in pieces."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.norm1, self.norm2, self.tokens_norm = block.norm1, block.norm2, block.tokens_norm
        self.attn, self.mlp = ShortClassAttention(block.attn), block.mlp
        self.gamma1, self.gamma2 = block.gamma1, block.gamma2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Update tokens (B, 1 + N, C), CLS first."""
        normed = self.norm1(x)
        cls = self.norm2(x[:, :1] + self.gamma1 * self.attn(normed))
        cls = cls + self.gamma2 * self.mlp(cls)
        if not is_eager_inference() or not len(x):
            return torch.cat((cls, self.patches(x[:, 1:], normed[:, 1:])), dim=1)
        out = x.new_empty(x.shape)
        out[:, :1] = cls
        length = piece(x) // (x.shape[0] * x.shape[2])
        for part, normed_part, part_of_out in zip(*(pieces(t[:, 1:], length, dim=1) for t in (x, normed, out))):
            part_of_out.copy_(self.patches(part, normed_part))
        return out

    def patches(self, x: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """Compute the output patches (B, N, C) from patches and normalised patches (B, N, C)."""
        x = torch.addcmul(x, self.gamma1, normed)
        return 2 * (self.norm2(x) if self.tokens_norm else x)


def pieces(x: torch.Tensor, length: int, dim: int = 0) -> Pieces:
    """Split x into parts of about equal length, each at most `length` (or 1)."""
    return x.tensor_split(max(1, -(-x.shape[dim] // max(1, length))), dim)


def by_pieces(function: Callable, x: torch.Tensor, length: int, *, out: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Compute function(x) in pieces of x; several pieces are joined in `out`, or in new memory."""
    parts = pieces(x, length)
    if len(parts) == 1:
        return function(x)
    out = x.new_empty(x.shape) if out is None else out
    for part, part_of_out in zip(parts, pieces(out, length)):
        part_of_out.copy_(function(part))
    return out
