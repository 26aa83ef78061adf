"""The networks of DINO: a backbone, the projection head behind it, and what shows crops of several sizes to both.

Shapes: `B` images, `C` channels of the backbone's features, `K` prototypes (--out-dim).
"""
import itertools
from typing import List, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import trunc_normal_

HIDDEN, BOTTLENECK = 2048, 256  # widths of the head


class Prototypes(nn.Module):
    """Linear layer without bias whose rows are directions `weight_v` of lengths `weight_g`: (K, BOTTLENECK).

    Names and shapes are those of torch's old weight_norm, which published files have.
    """

    def __init__(self, out_dim: int, *, norm_last_layer: bool):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=not norm_last_layer)
        # faithful: torch's own initial values, since the original makes this layer after it has initialised the others
        # (original vision_transformer.py, DINOHead)
        self.weight_v = nn.Parameter(nn.Linear(BOTTLENECK, out_dim, bias=False).weight.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, BOTTLENECK) -> (B, K)."""
        # In full precision: the loss divides these logits by .04
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True)))


class Head(nn.Module):
    """Three layers, normalisation to length 1, and prototypes.

    Args:
        in_dim: C.
        out_dim: K.
        use_bn: BatchNorm after the first two layers.
        norm_last_layer: keep all prototypes at length 1.

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
    """A backbone and a head; crops of one size pass the backbone together.

    Args:
        backbone: gives features (B, C).

    Source: original utils.py, MultiCropWrapper.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def features(self, crops: List[torch.Tensor]) -> torch.Tensor:
        """Crops, each (B, 3, img_h, img_w) -> features (crops * B, C), all images of the first crop first."""
        # faithful: BatchNorm normalises global and local crops apart, as each size is a pass of its own; the student's
        # running statistics get an update from each (original utils.py, MultiCropWrapper)
        groups = [torch.cat(list(group)) for _, group in itertools.groupby(crops, key=lambda crop: crop.shape[-1])]
        return torch.cat([self.backbone(group) for group in groups])

    def forward(self, crops: List[torch.Tensor]) -> Tuple[torch.Tensor, torch.Tensor]:
        """Logits (crops * B, K), and the features (crops * B, C) that they are of."""
        features = self.features(crops)
        return self.head(features), features
