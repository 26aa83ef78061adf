"""Heads of segmentation: Semantic FPN, UPerNet, its auxiliary head, and a linear head.

Names of modules as in mmsegmentation 0.11, so that published files load. Maps are (B, channels, height, width), from
fine to coarse, at strides 4, 8, 16 and 32 of the image. Logits are (B, K, height, width).
"""
from typing import List

import torch
import torch.nn as nn
import torch.nn.functional as F

from dense.backbone import STRIDES

DROPOUT = .1  # of whole channels, before the classifier
POOLS = (1, 2, 3, 6)  # sides of UPerNet's pooled maps


class ConvModule(nn.Sequential):
    """Convolution that keeps the size; with BatchNorm and ReLU, unless `plain`."""

    def __init__(self, channels: int, out_channels: int, kernel: int, *, plain: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2, bias=plain)
        if not plain:
            self.bn, self.activate = nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)


def resize(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode='bilinear', align_corners=False)


class FPN(nn.Module):
    """Feature pyramid network as wide as the backbone, without norms.

    Source: mmseg 0.11 models/necks/fpn.py.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.lateral_convs = nn.ModuleList(ConvModule(channels, channels, 1, plain=True) for _ in STRIDES)
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3, plain=True) for _ in STRIDES)

    def forward(self, maps: List[torch.Tensor]) -> List[torch.Tensor]:
        laterals = self.top_down([conv(x) for conv, x in zip(self.lateral_convs, maps)])
        return [conv(x) for conv, x in zip(self.fpn_convs, laterals)]

    def top_down(self, maps: List[torch.Tensor]) -> List[torch.Tensor]:
        """Add each level to the next finer level, from the coarsest on."""
        for i in reversed(range(len(maps) - 1)):
            maps[i] = maps[i] + F.interpolate(maps[i + 1], size=maps[i].shape[-2:])  # nearest neighbour
        return maps


class Head(nn.Module):
    """Head that ends in dropout and a classifier of each pixel."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.dropout, self.conv_seg = nn.Dropout2d(DROPOUT), nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=.01)
        nn.init.zeros_(self.conv_seg.bias)

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv_seg(self.dropout(x))


class FPNHead(Head):
    """Sum of the levels, each brought to the finest by convolutions and upsampling.

    Source: mmseg 0.11 models/decode_heads/fpn_head.py.
    """

    def __init__(self, in_channels: int, num_classes: int, channels: int = 128):
        super().__init__(channels, num_classes)
        self.scale_heads = nn.ModuleList()
        for level in range(len(STRIDES)):
            layers = [ConvModule(in_channels, channels, 3)]
            if level:
                layers.append(DoubleSize())
            for _ in range(level - 1):
                layers += [ConvModule(channels, channels, 3), DoubleSize()]
            self.scale_heads.append(nn.Sequential(*layers))

    def forward(self, maps: List[torch.Tensor]) -> torch.Tensor:
        fine, *coarse = (head(x) for head, x in zip(self.scale_heads, maps))
        for x in coarse:
            fine = fine + resize(x, fine)
        return self.classify(fine)


class DoubleSize(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, channels, height, width) -> (B, channels, 2 height, 2 width)."""
        return F.interpolate(x, scale_factor=2, mode='bilinear', align_corners=False)


class UPerHead(Head):
    """Pooling of the coarsest level, a feature pyramid network, and a classifier of all levels together.

    Source: mmseg 0.11 models/decode_heads/uper_head.py; Xiao et al., Unified Perceptual Parsing, 2018.
    """

    def __init__(self, in_channels: int, num_classes: int, channels: int = 512):
        super().__init__(channels, num_classes)
        self.psp_modules = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(side), ConvModule(in_channels, channels, 1))
                                         for side in POOLS)
        self.bottleneck = ConvModule(in_channels + len(POOLS) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(in_channels, channels, 1) for _ in STRIDES[1:])
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in STRIDES[1:])
        self.fpn_bottleneck = ConvModule(len(STRIDES) * channels, channels, 3)

    def forward(self, maps: List[torch.Tensor]) -> torch.Tensor:
        laterals = self.top_down([conv(x) for conv, x in zip(self.lateral_convs, maps)] + [self.pool(maps[-1])])
        levels = [conv(x) for conv, x in zip(self.fpn_convs, laterals)] + laterals[-1:]
        return self.classify(self.fpn_bottleneck(torch.cat([resize(x, levels[0]) for x in levels], dim=1)))

    def top_down(self, maps: List[torch.Tensor]) -> List[torch.Tensor]:
        """Add each level to the next finer level, from the coarsest on."""
        for i in reversed(range(len(maps) - 1)):
            maps[i] = maps[i] + resize(maps[i + 1], maps[i])
        return maps

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """Add the context of the whole picture to its coarsest map: (B, C, h, w) -> (B, channels, h, w)."""
        return self.bottleneck(torch.cat([x, *(resize(pooled(x), x) for pooled in self.psp_modules)], dim=1))


class FCNHead(Head):
    """One convolution and a classifier of one level, for an auxiliary loss.

    Source: mmseg 0.11 models/decode_heads/fcn_head.py.
    """
    LEVEL = 2

    def __init__(self, in_channels: int, num_classes: int, channels: int = 256):
        super().__init__(channels, num_classes)
        self.convs = nn.Sequential(ConvModule(in_channels, channels, 3))

    def forward(self, maps: List[torch.Tensor]) -> torch.Tensor:
        return self.classify(self.convs(maps[self.LEVEL]))


class LinearHead(Head):
    """BatchNorm and a classifier of the last block's map, for the evaluation of frozen features.

    Args:
        scale: factor by which the logits are enlarged.
    """

    def __init__(self, in_channels: int, num_classes: int, scale: int):
        super().__init__(in_channels, num_classes)
        self.norm, self.scale, self.dropout.p = nn.BatchNorm2d(in_channels), scale, 0.

    def forward(self, maps: List[torch.Tensor]) -> torch.Tensor:
        logits = self.classify(self.norm(maps[-1]))
        return F.interpolate(logits, scale_factor=self.scale, mode='bilinear', align_corners=False)
