"""Backbone of dense tasks: an XCiT without class attention, whose blocks give a pyramid of four maps.

Shapes as in xcit.py. Source: original semantic_segmentation/backbone/xcit.py; the file of detection is equal.
"""
from typing import Dict, Iterable, List, Tuple

import torch
import torch.nn as nn

import xcit
from utils import InputError, abridge, similar

# Blocks whose outputs become the levels, by the number of blocks
LEVELS = {12: (3, 5, 7, 11), 24: (7, 11, 15, 23)}
STRIDES = (4, 8, 16, 32)  # pixels of the image per pixel of a level


class XcitPyramid(xcit.Xcit):
    """XCiT without class attention, final norm and head; its outputs are maps at strides 4, 8, 16 and 32.

    Args:
        pyramid: False: the outputs are the four blocks' maps, all at the stride of the patches.
        options: arguments of `xcit.Xcit`.
    """

    def __init__(self, *, pyramid: bool = True, **options):
        super().__init__(num_classes=0, **options)
        C = self.embed_dim
        self.levels = self.prune_intermediate_layers(list(LEVELS[len(self.blocks)]), prune_norm=True)
        if not pyramid:
            self.fpn1 = self.fpn2 = self.fpn3 = self.fpn4 = nn.Identity()
        elif self.patch_size == 16:
            self.fpn1 = nn.Sequential(upsampling(C), nn.BatchNorm2d(C), nn.GELU(), upsampling(C))
            self.fpn2 = nn.Sequential(upsampling(C))
            self.fpn3, self.fpn4 = nn.Identity(), nn.MaxPool2d(2)
        else:
            self.fpn1, self.fpn2 = nn.Sequential(upsampling(C)), nn.Identity()
            self.fpn3, self.fpn4 = nn.Sequential(nn.MaxPool2d(2)), nn.Sequential(nn.MaxPool2d(4))

    def forward_maps(self, x: torch.Tensor) -> List[torch.Tensor]:
        """Compute the outputs of the four blocks (B, C, H, W), not normalised, from images (B, 3, img_h, img_w)."""
        return self.forward_intermediates(x, self.levels, intermediates_only=True)

    def forward(self, x: torch.Tensor) -> List[torch.Tensor]:
        """Compute the pyramid of images (B, 3, img_h, img_w): maps (B, C, height, width) from fine to coarse."""
        steps = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        return [step(x) for step, x in zip(steps, self.forward_maps(x))]


def upsampling(channels: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(channels, channels, 2, stride=2)


def options_of(name: str) -> dict:
    """Return the arguments of `xcit.Xcit` for a model name like xcit_small_12_p16."""
    size, _, patch_size = name.removeprefix('xcit_').rpartition('_p')
    return {**xcit.SIZES[size], 'patch_size': int(patch_size)}


def build(name: str, *, drop_path: float = 0., pyramid: bool = True) -> XcitPyramid:
    """Build the backbone of the XCiT `name` with random weights; `drop_path`: rate, equal in all blocks."""
    return XcitPyramid(**options_of(name), drop_path_rate=drop_path, pyramid=pyramid)


def load(model: XcitPyramid, tensors: Dict[str, torch.Tensor], *, source: str):
    """Load the weights of a backbone, of a classifier, or of another pyramid under published names.

    Class attention, final norm and head are ignored; the layers of the pyramid keep their values if the weights have
    none.

    Raises:
        InputError: a weight of the blocks is missing, or has another shape; the message begins with `source`.
    """
    own = model.state_dict()
    other = {key: tuple(tensors[key].shape) for key in own if key in tensors and tensors[key].shape != own[key].shape}
    missing = [key for key in own if key not in tensors and not key.startswith('fpn')]
    if missing or other:
        details = [f'missing: {abridge(missing, 3)}'] * bool(missing) + [
            f'{key} {shape}, model has {tuple(own[key].shape)}' for key, shape in list(other.items())[:2]]
        raise InputError(f'{source}: not the weights of this backbone (another size or patch size?); '
                         f'{"; ".join(details)}')
    model.load_state_dict({key: value for key, value in tensors.items() if key in own}, strict=False)


def parse(name: str, heads: Iterable[str], *, flag: str = '--model') -> Tuple[str, str]:
    """Divide a name like upernet_xcit_small_12_p16 into the head's name and the backbone's.

    Raises:
        InputError: there is no such model; the message begins with `flag`.
    """
    head, separator, backbone = name.partition('_xcit_')
    if head not in heads or f'xcit_{backbone}' not in xcit.MODELS:
        names = [f'{head}_{model}' for head in heads for model in xcit.MODELS]
        raise InputError(f'{flag} {name}: no such model{similar(name, names)}; allowed: {", ".join(heads)}, each with '
                         f'_{xcit.MODELS[0]} or another XCiT')
    return head, f'xcit_{backbone}'
