"""The door to fast inference: `fuse` gives the same outputs with less work and less memory.

It replaces the modules of a trained model, in place; the model can't be trained or stored under the published names any
more. What each piece brings is in docs/benchmark.md. Shapes as in xcit.py.
"""
import re
from typing import Callable, Iterator, List, Optional, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Mlp
from torch.nn.utils.fusion import fuse_conv_bn_eval

from xca import XCA, in_half_precision
from xcit_linear import covariance_in_panels, is_eager_inference, lay_out, linear

# Elements that an intermediate result may have before the work is done in pieces. On a CPU 16 MB in float32, measured;
# elsewhere pieces only save memory, and large ones keep the device busy.
PIECE = {'cpu': 2 ** 22, 'other': 2 ** 26}
Pieces = Tuple[torch.Tensor, ...]


def piece(x: torch.Tensor) -> int:
    """Elements of a piece on x's device."""
    return PIECE.get(x.device.type, PIECE['other'])


def fuse(model: nn.Module) -> nn.Module:
    """Prepare an Xcit in eval mode for inference, in place; returns it.

    BatchNorm and LayerScale are folded into the layers beside them, images pass through the stem in strips and tokens
    through the blocks in pieces. Hooks of the model itself, of its LayerNorms and of its head are called, perhaps with
    pieces of the tokens.

    Raises:
        ValueError: the model is in training mode, is fused already, is no Xcit, or has a layer that can't be fused,
            which is named: an adapter, say, a quantized layer, or one that somebody listens to. The model is as it was.
    """
    check(model)
    with torch.no_grad():
        stem = FusedPatchEmbed(model.patch_embed)
        blocks = [FusedBlock(block) for block in model.blocks]
        cls_attn_blocks = [FusedClassAttentionBlock(block) for block in model.cls_attn_blocks]
    model.patch_embed = stem
    model.blocks, model.cls_attn_blocks = nn.ModuleList(blocks), nn.ModuleList(cls_attn_blocks)
    return model.eval().requires_grad_(False)


def fuse_stem(model: nn.Module) -> nn.Module:
    """Fold the stem's BatchNorms alone, in place: the model keeps to plain layers, as TorchScript needs it.

    Raises:
        ValueError: as `fuse`.
    """
    check(model)
    model.patch_embed.proj = folded_stem(model.patch_embed)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# What is let through

def check(model: nn.Module):
    """Refuse a model that fusing would change.

    Raises:
        ValueError: names the layer, and says why.
    """
    if not isinstance(getattr(model, 'blocks', None), nn.ModuleList) or not hasattr(model, 'pos_embeder'):
        raise ValueError(f'a {type(model).__name__} cannot be fused: it is no Xcit of this package')
    if model.training:
        raise ValueError('a model must be in eval mode to be fused: call model.eval() first')
    if isinstance(model.patch_embed, FusedPatchEmbed):
        raise ValueError('the model is fused already')
    for name, expected in fusable(model):
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f'{name} is missing: the model cannot be fused') from None
        problem = problem_of(layer, expected)
        if problem:
            raise ValueError(f'{name} ({type(layer).__name__}) cannot be fused: {problem}')
    for name, module in model.named_modules():
        if not re.match(REPLACED, name):
            continue
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            raise ValueError(f'{name} ({type(module).__name__}) has hooks, which would not be called in a fused model: '
                             f'remove them, or use the model as it is')
        if module.training:
            raise ValueError(f'{name} ({type(module).__name__}) is in training mode: call model.eval() first')


# What is not called any more: the stem, the blocks but not their norms, class-attention blocks but not their MLP
REPLACED = r'patch_embed|blocks\.\d+(?!\.norm\d$)|cls_attn_blocks\.\d+(\.attn|$)'


def fusable(model: nn.Module) -> Iterator[Tuple[str, Union[type, str]]]:
    """Names of the layers that fusing reads or replaces, and their classes in a model as it is built.

    Of classes in xcit.py, which imports this file, it is the class's name.
    """
    yield 'patch_embed', 'ConvPatchEmbed'
    yield 'patch_embed.proj', nn.Sequential
    for i in range(len(model.patch_embed.proj) if isinstance(model.patch_embed.proj, nn.Sequential) else 0):
        if i % 2:
            yield f'patch_embed.proj.{i}', nn.GELU
        else:
            yield f'patch_embed.proj.{i}.0', nn.Conv2d
            yield f'patch_embed.proj.{i}.1', nn.BatchNorm2d
    for i in range(len(model.blocks)):
        for name, expected in (('', 'XCABlock'), ('.attn', XCA), ('.mlp', Mlp), ('.local_mp', 'LPI')):
            yield f'blocks.{i}{name}', expected
        for name in ('attn.qkv', 'attn.proj', 'mlp.fc1', 'mlp.fc2'):
            yield f'blocks.{i}.{name}', nn.Linear
        for name in ('mlp.act', 'local_mp.act'):
            yield f'blocks.{i}.{name}', nn.GELU
        for name in ('local_mp.conv1', 'local_mp.conv2'):
            yield f'blocks.{i}.{name}', DepthwiseConv2d
        yield f'blocks.{i}.local_mp.bn', nn.BatchNorm2d
    for i in range(len(model.cls_attn_blocks)):
        yield f'cls_attn_blocks.{i}', 'ClassAttentionBlock'
        yield f'cls_attn_blocks.{i}.attn', 'ClassAttention'
        for name in ('attn.qkv', 'attn.proj'):
            yield f'cls_attn_blocks.{i}.{name}', nn.Linear


class DepthwiseConv2d(nn.Conv2d):
    """What LPI has: of stride 1, one kernel a channel."""


def problem_of(layer: nn.Module, expected: Union[type, str]) -> Optional[str]:
    """Why a layer can't be fused; None if it can."""
    depthwise = expected is DepthwiseConv2d
    expected = nn.Conv2d if depthwise else expected
    class_name = expected if isinstance(expected, str) else expected.__name__
    if (expected not in (type(layer), type(layer).__name__)
            and not (expected is nn.BatchNorm2d and type(layer) is nn.SyncBatchNorm)):
        return (f'it is no {class_name} as it was built (merge adapters, make pruning and parametrizations '
                f'permanent; a quantized model is used as it is)')
    if 'forward' in vars(layer):
        return 'its forward method was replaced'
    if expected is nn.GELU and layer.approximate != 'none':
        return f'approximate={layer.approximate!r} is another function than GELU'
    if expected is nn.BatchNorm2d and layer.running_var is None:
        return 'it has no running statistics'
    if expected in (nn.Linear, nn.Conv2d):
        plain = (nn.Parameter, type(None))  # pruning, say, keeps a parameter elsewhere and makes this one of it
        if any(type(layer._parameters.get(name, layer)) not in plain for name in ('weight', 'bias')):
            return ('its weight or bias is no plain parameter (make pruning permanent; a quantized model is used as it '
                    'is)')
    if expected is nn.Conv2d:
        if (layer.kernel_size, layer.padding, layer.dilation, layer.padding_mode) != ((3, 3), (1, 1), (1, 1), 'zeros'):
            return 'it must have a 3x3 kernel, no dilation, and one row of zeros as padding'
        if depthwise and (layer.stride != (1, 1) or layer.groups != layer.out_channels):
            return 'it must be depthwise and of stride 1'
    return None


# ---------------------------------------------------------------------------------------------------------------------
# What takes the layers' places

class FusedLinear(nn.Module):
    """A linear layer, its outputs scaled by LayerScale's gamma if given; see xcit_linear.linear."""

    def __init__(self, layer: nn.Linear, gamma: Optional[torch.Tensor] = None):
        super().__init__()
        weight = layer.weight if gamma is None else gamma[:, None] * layer.weight
        bias = layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
        self.weight = nn.Parameter(lay_out(weight.detach()))
        self.bias = nn.Parameter((bias if gamma is None else gamma * bias).detach())

    def forward(self, x: torch.Tensor, residual: Optional[torch.Tensor] = None, gelu: bool = False) -> torch.Tensor:
        return linear(x, self.weight, self.bias, residual, gelu)


def scaled_convolution(conv: nn.Conv2d, gamma: torch.Tensor) -> nn.Conv2d:
    """A depthwise convolution, its outputs scaled by LayerScale's gamma."""
    scaled = nn.utils.skip_init(nn.Conv2d, conv.in_channels, conv.out_channels, 3, padding=1, groups=conv.groups,
                                device=conv.weight.device, dtype=conv.weight.dtype)
    scaled.weight.copy_(conv.weight * gamma[:, None, None, None])
    scaled.bias.copy_(gamma * conv.bias if conv.bias is not None else torch.zeros_like(gamma))
    return scaled.to(memory_format=torch.channels_last)


def folded_stem(stem: nn.Module) -> nn.Sequential:
    """The stem's convolutions and GELUs, with the BatchNorms' work in the convolutions."""
    folded = [fuse_conv_bn_eval(*layer) if isinstance(layer, nn.Sequential) else layer for layer in stem.proj]
    return nn.Sequential(*folded).to(memory_format=torch.channels_last)


class FusedPatchEmbed(nn.Module):
    """The patch stem, BatchNorms folded in; large images pass through it in strips of rows."""

    def __init__(self, stem: nn.Module):
        super().__init__()
        self.proj = folded_stem(stem)

    @property
    def convs(self) -> List[nn.Conv2d]:
        return [layer for layer in self.proj if isinstance(layer, nn.Conv2d)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, img_h, img_w) -> (B, C, H, W) in channels_last."""
        if not is_eager_inference() or not len(x):
            return self.proj(x)
        first, height, width = self.convs[0], *x.shape[2:]
        largest = (first.out_channels * halved(height, first.stride[0])  # elements, of one image
                   * halved(width, first.stride[1]))
        for conv in self.convs:
            height = halved(height, conv.stride[0])
        images = max(1, piece(x) // largest)
        # At least 4 rows at a time: a strip has some rows of pixels more than its own.
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
        """Rows from `top` to before `bottom` of what convolution number `level` (from 1) makes of images x."""
        if level == 0:
            return x[:, :, top:bottom]
        conv = self.convs[level - 1]
        height = x.shape[2]  # of its input
        for before in self.convs[:level - 1]:
            height = halved(height, before.stride[0])
        if top == 0 and bottom == halved(height, conv.stride[0]):
            first, last = 0, height
        else:
            first, last = conv.stride[0] * top - 1, conv.stride[0] * (bottom - 1) + 2  # rows of it that are seen
        above, below = max(0, -first), max(0, last - height)
        x = self.rows(x, level - 1, first + above, last - below)
        if level > 1:
            x = torch.ops.aten.gelu_(x)
        if (first, last) == (0, height):
            return conv(x)
        x = F.pad(x, (0, 0, above, below)) if above or below else x
        return F.conv2d(x, conv.weight, conv.bias, stride=conv.stride, padding=(0, 1), groups=conv.groups)


def halved(length: int, stride: int) -> int:
    """Rows or columns that a 3x3 convolution with one of padding makes of so many."""
    return -(-length // stride)


class FusedBlock(nn.Module):
    """An XCABlock with LayerScale in the last layer of each branch; large inputs are worked off in pieces."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = block.norm1, block.norm2, block.norm3
        self.attn = FusedXCA(block.attn, block.gamma1)
        self.conv1 = block.local_mp.conv1
        bn = block.local_mp.bn
        # BatchNorm can't be folded into the second convolution, whose padding is zeros after it
        scale = (bn.running_var + bn.eps).rsqrt() * (1 if bn.weight is None else bn.weight)
        shift = (0 if bn.bias is None else bn.bias) - bn.running_mean * scale
        self.register_buffer('bn_scale', scale[:, None, None])
        self.register_buffer('bn_shift', shift[:, None, None])
        self.conv2 = scaled_convolution(block.local_mp.conv2, block.gamma3)
        self.fc1, self.fc2 = FusedLinear(block.mlp.fc1), FusedLinear(block.mlp.fc2, block.gamma2)

    def forward(self, x: torch.Tensor, H: int, W: int) -> torch.Tensor:
        x = x.to(self.bn_shift.dtype)  # under autocast, the first LayerScale made tokens float32
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

        # Not in place at first: the input may be somebody's intermediate output.
        mixed = by_pieces(mix_tokens, x, tokens // N).view(-1, C)
        return by_pieces(self.add_mlp, mixed, tokens, out=mixed).view(x.shape)

    def add_lpi(self, grid: torch.Tensor, rows: int):
        """LPI is added to grid (B, H, W, C), `rows` of its rows at a time."""
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
            y = torch.ops.aten.gelu_(self.conv1(x.permute(0, 3, 1, 2)))  # (B, C, rows, W) in channels_last
            y = y[:, :, inner.start - outer.start:inner.stop - outer.start]
            torch.addcmul(self.bn_shift, y, self.bn_scale, out=y)
            added = self.conv2(y)[:, :, top - inner.start:bottom - inner.start].permute(0, 2, 3, 1)
        grid[:, top:] += added

    def add_mlp(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (M, C) + MLP."""
        return self.fc2(self.fc1(self.norm2(x), gelu=True), residual=x)


class FusedXCA(XCA):
    """XCA with LayerScale in its projection; for inference, tokens in pieces and heads without copies."""

    def __init__(self, attn: XCA, gamma: torch.Tensor):
        nn.Module.__init__(self)
        self.num_heads, self.form, self.temperature = attn.num_heads, attn.form, attn.temperature
        self.qkv, self.proj = FusedLinear(attn.qkv), FusedLinear(attn.proj, gamma)
        self.attn_drop = self.proj_drop = nn.Identity()

    def reads_as_matrices(self) -> bool:
        return True

    def residual(self, x: torch.Tensor, norm: nn.Module, tokens: int) -> torch.Tensor:
        """x + attention of norm(x); the Gram form works off `tokens` of an image at a time."""
        if self.takes_gram(x):
            out = x.new_empty(x.shape)
            self.gram_in_pieces(norm, *(pieces(t, tokens, dim=1) for t in (x, out)))
            return out
        if in_half_precision(x):
            return x + self(norm(x))
        return self.proj(self.by_rows(self.qkv(norm(x))), residual=x)

    def definition(self, x: torch.Tensor) -> torch.Tensor:
        """The same; when compiling for CPUs, heads are copied as rows of d channels, not channel by channel."""
        compiles = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        if not compiles or x.device.type != 'cpu' or in_half_precision(x):
            return super().definition(x)
        B, N, C = x.shape
        h, d = self.num_heads, C // self.num_heads
        q, k, v = self.qkv(x).reshape(B, N, 3, h, d).permute(2, 0, 3, 1, 4).reshape(3, B * h, N, d).unbind(0)
        q_norm, k_norm = (t.square().sum(dim=1, keepdim=True).sqrt().clamp_min(1e-12) for t in (q, k))
        attn = self.attention(q.transpose(1, 2) @ k / q_norm.transpose(1, 2) / k_norm)
        out = v @ attn.transpose(1, 2)  # (B * h, N, d)
        return self.proj(out.unflatten(0, (B, h)).transpose(1, 2).reshape(B, N, C))

    def by_rows(self, qkv: torch.Tensor) -> torch.Tensor:
        """A v with queries, keys and values left where `qkv` (B, N, 3 C) has put them: (B, N, C)."""
        B, N, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        h, d = self.num_heads, C // self.num_heads
        qkv = qkv.view(B, N, 3, h, d)
        norms = qkv[:, :, :2].square().sum(dim=1).sqrt_().clamp_min_(1e-12)  # (B, 2, h, d)
        cosines, out = qkv.new_empty(B, h, d, d), qkv.new_empty(B, N, C)
        # Image by image: heads lie between tokens, so that products of several images at once would copy them.
        for i in range(B):
            torch.bmm(qkv[i, :, 0].permute(1, 2, 0), qkv[i, :, 1].transpose(0, 1), out=cosines[i])
        cosines /= norms[:, 0, :, :, None]
        cosines /= norms[:, 1, :, None]
        attn = self.attention(cosines.flatten(0, 1)).view(B, h, d, d)
        for i in range(B):
            of_heads = out[i].view(N, h, d).transpose(0, 1)
            torch.bmm(qkv[i, :, 2].transpose(0, 1), attn[i].transpose(1, 2), out=of_heads)
        return out

    def gram_in_pieces(self, norm: nn.Module, parts: Pieces, parts_of_out: Pieces):
        """XCA's Gram form; each part (B, tokens, C)."""
        shares = parts[0].new_tensor([part.shape[1] for part in parts])
        shares /= shares.sum()
        means, within = [], 0.
        for part, normed, share in zip(parts, parts_of_out, shares):
            normed.copy_(norm(part))
            means.append(normed.mean(dim=1))
            within = within + share * covariance_in_panels(normed, means[-1])
        # The covariance of all tokens is that within the parts, and that of the parts' means.
        means = torch.stack(means, dim=1)  # (B, parts, C)
        mean = shares @ means
        deviations = means - mean[:, None]
        between = (shares[:, None] * deviations).transpose(1, 2) @ deviations
        matrix, bias = self.mixing(mean, within + between)
        for part, normed in zip(parts, parts_of_out):
            for x, y, matrix_of_x, bias_of_x in zip(part, normed, matrix, bias):
                y.copy_(linear(y, matrix_of_x.t(), bias_of_x[0], x))


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


class FusedClassAttentionBlock(nn.Module):
    """A ClassAttentionBlock with the short class attention; the patches are worked off in pieces."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.norm1, self.norm2, self.tokens_norm = block.norm1, block.norm2, block.tokens_norm
        self.attn, self.mlp = ShortClassAttention(block.attn), block.mlp
        self.gamma1, self.gamma2 = block.gamma1, block.gamma2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 1 + N, C), CLS first -> the same."""
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
        """Patches (B, N, C), as they are and normalised -> (B, N, C)."""
        x = torch.addcmul(x, self.gamma1, normed)
        return 2 * (self.norm2(x) if self.tokens_norm else x)


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
