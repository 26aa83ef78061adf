"""Segmentation models: a backbone with one of the heads, by name; weights of mmsegmentation and of our own."""
from functools import partial
from typing import Dict, Optional, Tuple, Union

import torch
import torch.nn as nn

import xcit
import xcit_zoo
from dense import backbone
from dense.backbone import STRIDES
from run.output import log
from segmentation.heads import FPN, FCNHead, FPNHead, Head, LinearHead, UPerHead
from utils import InputError, abridge

# Heads by their names, each with a module of its own that other heads lack
HEADS = {'sem_fpn': 'decode_head.scale_heads.', 'upernet': 'decode_head.psp_modules.', 'linear': 'decode_head.norm.'}
# Drop-path rates of the original's configurations by size; other sizes have the rate of their neighbour
DROP_PATH = {'nano': 0., 'tiny': 0., 'small_12': .05, 'small_24': .1, 'medium': .15, 'large': .15}


class Segmenter(nn.Module):
    """Backbone, neck (Semantic FPN) and head; logits have a quarter of the image's size.

    Args:
        name: name of the model, e.g. upernet_xcit_small_12_p16.
        num_classes: K.
        drop_path: stochastic depth of the backbone.
    """

    def __init__(self, name: str, num_classes: int, drop_path: float):
        super().__init__()
        self.kind, self.backbone_name = backbone.parse(name, HEADS)
        self.name, self.num_classes = name, num_classes
        self.backbone = backbone.build(self.backbone_name, drop_path=drop_path, pyramid=self.kind != 'linear')
        channels = self.backbone.embed_dim
        self.neck = FPN(channels) if self.kind == 'sem_fpn' else nn.Identity()
        heads = {'sem_fpn': FPNHead, 'upernet': UPerHead,
                 'linear': partial(LinearHead, scale=self.backbone.patch_size // STRIDES[0])}
        self.decode_head: Head = heads[self.kind](channels, num_classes)
        self.auxiliary_head = FCNHead(channels, num_classes) if self.kind == 'upernet' else None

    def forward(self, images: torch.Tensor, auxiliary: bool = False
                ) -> Union[torch.Tensor, Tuple[torch.Tensor, Optional[torch.Tensor]]]:
        """Compute logits (B, K, about img_h / 4, img_w / 4) from images (B, 3, img_h, img_w).

        Args:
            auxiliary: return a pair, with the logits of UPerNet's auxiliary head (None for other heads).
        """
        maps = self.backbone(images)
        logits = self.decode_head(self.neck(maps))
        if not auxiliary:
            return logits
        return logits, None if self.auxiliary_head is None else self.auxiliary_head(maps)


def default_drop_path(name: str) -> float:
    """Return the original's drop-path rate of a model."""
    kind, backbone_name = backbone.parse(name, HEADS)
    if kind == 'sem_fpn' and 'medium' in backbone_name:
        return .2  # faithful: Semantic FPN alone (original configs/xcit/sem_fpn_xcit_medium_24_*)
    return next(rate for size, rate in DROP_PATH.items() if size in backbone_name)


def build(name: str, num_classes: int = 150, drop_path: Optional[float] = None) -> Segmenter:
    """Build a model with random weights; `drop_path`: stochastic depth of the backbone, the original's if None."""
    return Segmenter(name, num_classes, default_drop_path(name) if drop_path is None else drop_path)


# ---------------------------------------------------------------------------------------------------------------------
# Weights

def name_in(state_dict: Dict[str, torch.Tensor]) -> Optional[str]:
    """Return the name of the model that weights belong to; None: not a segmenter of this package."""
    kind = next((kind for kind, start in HEADS.items() if any(key.startswith(start) for key in state_dict)), None)
    if kind is None or 'decode_head.conv_seg.weight' not in state_dict:
        return None
    tensors = {key.removeprefix('backbone.'): value for key, value in state_dict.items() if key.startswith('backbone.')}
    name = xcit.name_with(tensors, width_of='blocks.0.norm1.weight')
    return name and f'{kind}_{name}'


def check_kind(state_dict: Dict[str, torch.Tensor], source: str):
    """Raise InputError if weights are not a segmenter's; the message names their kind."""
    if name_in(state_dict) is None:
        parts = [part for part in xcit_zoo.of_other_task(list(state_dict)) if not part.startswith('fpn')]
        kind = (f'another model with {", ".join(parts)}, such as a detector' if parts else
                'a classifier or a backbone; --pretrained begins a training with them')
        raise InputError(f'{source}: not the weights of a segmenter with {" or ".join(HEADS)}, but of {kind}')


def load_weights(model: Segmenter, state_dict: Dict[str, torch.Tensor], *, source: str = 'state_dict',
                 new_classes: bool = False):
    """Load weights of a segmenter strictly, e.g. the `state_dict` of a published file.

    Args:
        source: flag and file, for messages.
        new_classes: keep the model's new classifiers if the weights have another number of classes, and log it.

    Raises:
        InputError: the weights are not a segmenter's, another model's, or for another number of classes.
    """
    check_kind(state_dict, source)
    name, count, own = name_in(state_dict), len(state_dict['decode_head.conv_seg.weight']), model.state_dict()
    if name != model.name:
        raise InputError(f'{source}: weights of {name}, not of {model.name}')
    if count != model.num_classes:
        if not new_classes:
            raise InputError(f'{source}: weights for {count} classes, not {model.num_classes}')
        log(f'{source}: for {count} classes, not {model.num_classes}; all weights but the classifiers\' are loaded')
        state_dict = {**state_dict, **{key: own[key] for key in own if '.conv_seg.' in key}}
    problems = {'missing': [key for key in own if key not in state_dict],
                'unexpected': [key for key in state_dict if key not in own],
                'other shapes': [key for key in own if key in state_dict and own[key].shape != state_dict[key].shape]}
    if any(problems.values()):
        details = '; '.join(f'{problem}: {abridge(keys, 4)}' for problem, keys in problems.items() if keys)
        raise InputError(f'{source}: the weights do not match {model.name}; {details}')
    model.load_state_dict(state_dict)
