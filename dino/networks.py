"""Networks of DINO: a backbone with a projection head, and its forward pass over crops of several sizes.

Shapes: `B` images, `C` channels of the backbone's features, `K` prototypes (--out-dim).
"""
import itertools
from typing import List, Optional, Tuple

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import trunc_normal_

import weights
import xcit
from run.commandline import COUNT, FRACTION, SWITCH, number
from utils import InputError, similar

HIDDEN, BOTTLENECK = 2048, 256  # widths of the head


class Prototypes(nn.Module):
    """Linear layer (K, BOTTLENECK) without bias; its rows have the directions `weight_v` and the norms `weight_g`.

    Published files contain these names and shapes, from torch's old weight_norm.
    """

    def __init__(self, out_dim: int, *, norm_last_layer: bool):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=not norm_last_layer)
        # faithful: torch's own initial values, since the original builds this layer after initialising the others
        # (original vision_transformer.py, DINOHead)
        self.weight_v = nn.Parameter(nn.Linear(BOTTLENECK, out_dim, bias=False).weight.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, BOTTLENECK) -> (B, K)."""
        # In full precision: the loss divides these logits by .04
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True)))


class Head(nn.Module):
    """Projection head: MLP of three layers, L2 normalisation, prototypes.

    Args:
        in_dim: C.
        out_dim: K.
        use_bn: BatchNorm after the first two layers.
        norm_last_layer: fix the norm of all prototypes at 1.

    Source: paper section 3.1; original vision_transformer.py, DINOHead.
    """

    def __init__(self, in_dim: int, out_dim: int, *, use_bn: bool, norm_last_layer: bool):
        super().__init__()
        layers: List[nn.Module] = []
        for width, next_width in ((in_dim, HIDDEN), (HIDDEN, HIDDEN)):
            layers += [nn.Linear(width, next_width), *([nn.BatchNorm1d(next_width)] if use_bn else []), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(HIDDEN, BOTTLENECK))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                trunc_normal_(layer.weight, std=.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = Prototypes(out_dim, norm_last_layer=norm_last_layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C) -> logits (B, K)."""
        x = self.mlp(x)
        return self.last_layer(F.normalize(x.float(), dim=-1))


class MultiCrop(nn.Module):
    """Backbone, which returns features (B, C), and head; consecutive crops of equal size pass the backbone together.

    Source: original utils.py, MultiCropWrapper.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, crops: List[torch.Tensor]) -> Tuple[torch.Tensor, torch.Tensor]:
        """Crops, each (B, 3, img_h, img_w) -> logits (crops * B, K), features (crops * B, C); the first crop first."""
        # faithful: BatchNorm normalises global and local crops apart, as each size is a pass of its own; the student's
        # running statistics get an update from each (original utils.py, MultiCropWrapper)
        groups = [torch.cat(list(group)) for _, group in itertools.groupby(crops, key=lambda crop: crop.shape[-1])]
        features = torch.cat([self.backbone(group) for group in groups])
        return self.head(features), features


def build(arch: str, out_dim: int, given: Optional[weights.Weights] = None, *, drop_path_rate: float, use_bn: bool,
          norm_last_layer: bool) -> MultiCrop:
    """Build a network on the backbone `arch` with the weights `given` (None: random); see `Head` for the rest."""
    backbone = weights.create_backbone(arch, given, drop_path_rate=drop_path_rate)
    return MultiCrop(backbone, Head(backbone.num_features, out_dim, use_bn=use_bn, norm_last_layer=norm_last_layer))


def checked_patch_size(arch: str, patch_size: Optional[int] = None) -> int:
    """Return the patch size of --arch in pixels; raise InputError unless it is an XCiT with patches of --patch-size."""
    if not timm.is_model(arch.partition('.')[0]):
        raise InputError(f'--arch {arch}: no such XCiT model{similar(arch, [*xcit.MODELS])}')
    weights.check_model('--arch', arch)
    if '.' in arch:
        name, _, tag = arch.partition('.')
        raise InputError(f'--arch {arch}: weights are given by --pretrained: --arch {name} --pretrained {tag}')
    with torch.device('meta'):
        backbone = weights.create_backbone(arch) if arch.startswith('xcit') else None
    if not isinstance(backbone, xcit.Xcit):
        raise InputError(f'--arch {arch}: not an XCiT model; allowed: {", ".join(xcit.MODELS)}')
    check_patch_size(patch_size, arch, backbone.patch_size)
    return backbone.patch_size


def add_patch_size_flag(group):
    group.add_argument('--patch-size', type=COUNT, metavar='PIXELS', help='side of a patch, which must be the model\'s')


def check_patch_size(given: Optional[int], name: str, actual: Optional[int]):
    """Raise InputError if --patch-size is set, and is not that of the model `name`."""
    if given not in (None, actual):
        raise InputError(f'--patch-size {given}: {name} has patches of {actual} pixels')


def add_flags(group):
    group.add_argument('--arch', '--model', dest='arch', default='xcit_small_12_p16', metavar='NAME',
                       help='name of one of the 14 XCiT models')
    add_patch_size_flag(group)
    group.add_argument('--drop-path-rate', default=.1, type=number(float, 0, .999), metavar='FRACTION',
                       help='stochastic depth of the student')
    group.add_argument('--out-dim', default=65536, type=COUNT, metavar='N', help='number of prototypes of the head')
    group.add_argument('--norm-last-layer', default=True, **SWITCH, help='norm of all prototypes fixed at 1')
    group.add_argument('--use-bn-in-head', default=False, **SWITCH, help='BatchNorm in the head')
    group.add_argument('--momentum-teacher', default=.996, type=FRACTION, metavar='FRACTION',
                       help='initial EMA momentum of the teacher; rises to 1')
