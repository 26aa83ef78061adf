"""The published XCiT weights: their table, and the names that files give to what is in them.

Paper: https://arxiv.org/abs/2106.09681, tables 1 and 2.
"""
import dataclasses
import re
from typing import Iterator, List, Optional, Tuple

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

# Published top-1 on ImageNet-1k, percent, crop 1.0: at 224 pixels, at 224 with distillation, at 384 with distillation
PUBLISHED_TOP1 = {
    'nano_12': {16: (69.9, 72.2, 75.4), 8: (73.8, 76.3, 77.8)},
    'tiny_12': {16: (77.1, 78.6, 80.9), 8: (79.7, 81.2, 82.4)},
    'tiny_24': {16: (79.4, 80.4, 82.6), 8: (81.9, 82.6, 83.7)},
    'small_12': {16: (82.0, 83.3, 84.7), 8: (83.4, 84.2, 85.1)},
    'small_24': {16: (82.6, 83.9, 85.1), 8: (83.9, 84.9, 85.6)},
    'medium_24': {16: (82.7, 84.3, 85.4), 8: (83.7, 85.1, 85.8)},
    'large_24': {16: (82.9, 84.9, 85.8), 8: (84.4, 85.4, 86.0)},
}
# Of the backbones trained without labels (DINO): k-NN, linear
PUBLISHED_DINO_TOP1 = {
    'small_12': {16: (76.0, 77.8), 8: (77.1, 79.2)},
    'medium_24': {16: (76.4, 78.8), 8: (77.9, 80.3)},
}


@dataclasses.dataclass(frozen=True)
class Published:
    """A published checkpoint, for images normalised with ImageNet's mean and standard deviation.

    Args:
        model: name of the model, e.g. 'xcit_small_12_p16'.
        tag: of these weights, e.g. 'fb_dist_in1k_384'.
        url: the authors' file.
        hf_hub_id: repository of timm's copy on the Hugging Face hub, if there is one.
        resolution: pixels, at which the accuracy was measured.
        num_classes: 0 for a backbone.
        distilled: trained with a teacher.
        top1: on ImageNet-1k, percent; of a backbone by a linear classifier.
        knn: of a backbone by its nearest neighbours.
    """
    model: str
    tag: str
    url: str
    hf_hub_id: Optional[str]
    resolution: int
    num_classes: int
    distilled: bool
    top1: float
    knn: Optional[float] = None
    crop: float = 1.


def published() -> Iterator[Published]:
    """The 46 files, in the order of the paper's tables."""
    files = 'https://dl.fbaipublicfiles.com/xcit/'
    for patch in (16, 8):
        for size in PUBLISHED_TOP1:
            name = f'xcit_{size}_p{patch}'
            top1 = PUBLISHED_TOP1[size][patch]
            for tag, suffix, resolution, distilled, accuracy in (
                    ('fb_in1k', '224', 224, False, top1[0]), ('fb_dist_in1k', '224_dist', 224, True, top1[1]),
                    ('fb_dist_in1k_384', '384_dist', 384, True, top1[2])):
                copy = f'timm/{name}_{resolution}.{tag.removesuffix("_384")}'
                yield Published(name, tag, f'{files}{name}_{suffix}.pth', copy, resolution, 1000, distilled, accuracy)
            if size in PUBLISHED_DINO_TOP1:
                knn, linear = PUBLISHED_DINO_TOP1[size][patch]
                url = f'{files}xcit_{size}_cp{patch}_dino.pth'
                yield Published(name, 'fb_dino', url, None, 224, 0, False, linear, knn)


ZOO = {f'{entry.model}.{entry.tag}': entry for entry in published()}


# ---------------------------------------------------------------------------------------------------------------------
# What files hold, timm's naming and registry

ENTRIES = ('model', 'state_dict', 'teacher')  # under which files keep weights: published and ours, many others, DINO


def strip_prefixes(weights: dict) -> Tuple[dict, List[str]]:
    """Names without what wrappers put in front of them; and which these were."""
    removed = []
    if any('_orig_mod.' in key for key in weights):  # torch.compile, of the whole or of parts
        weights, removed = {key.replace('_orig_mod.', ''): value for key, value in weights.items()}, ['_orig_mod.']
    if weights and all(key.startswith('module.') for key in weights):  # DistributedDataParallel
        weights = {key.removeprefix('module.'): value for key, value in weights.items()}
        removed.append('module.')
    prefix = 'backbone.'  # DINO, whose projection head ('head.') is no part of the model
    if any(key.startswith(prefix) for key in weights):
        weights = {key.removeprefix(prefix): value for key, value in weights.items() if not key.startswith('head.')}
        removed.append(prefix)
    return weights, removed


def has_timm_names(weights: dict) -> bool:
    """Whether weights are named as in timm's own XCiT, which calls two things otherwise."""
    return any(key.startswith('pos_embed.') or re.fullmatch(TIMM_CLASS_ATTENTION, key) for key in weights)


TIMM_CLASS_ATTENTION = r'(cls_attn_blocks\.\d+\.attn\.)([qkv])\.(weight|bias)'


def from_timm_names(weights: dict) -> dict:
    """timm's naming -> the published one: `pos_embeder`, and one `qkv` in class attention."""
    published = {}
    for key, value in weights.items():
        split = re.fullmatch(TIMM_CLASS_ATTENTION, key)
        parts = [f'{split[1]}{part}.{split[3]}' for part in 'qkv'] if split else []
        if split is None or not all(part in weights for part in parts):
            published[re.sub(r'^pos_embed\.', 'pos_embeder.', key)] = value
        elif split[2] == 'q':
            published[f'{split[1]}qkv.{split[3]}'] = torch.cat([weights[part] for part in parts])
    return published


def to_timm_names(weights: dict) -> dict:
    """The published naming -> timm's."""
    renamed = {}
    for key, value in weights.items():
        joined = re.fullmatch(r'(cls_attn_blocks\.\d+\.attn\.)qkv\.(weight|bias)', key)
        if joined is None:
            renamed[re.sub(r'^pos_embeder\.', 'pos_embed.', key)] = value
        else:
            for part, third in zip('qkv', value.chunk(3)):
                renamed[f'{joined[1]}{part}.{joined[2]}'] = third.clone()
    return renamed


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """What timm loads from a file, in whichever format XCiT weights come.

    Raises:
        ValueError: weights are missing or left over; where the head is for other classes, timm itself would not tell.
    """
    weights = next((state_dict[name] for name in ENTRIES if isinstance(state_dict.get(name), dict)), state_dict)
    weights, _ = strip_prefixes(weights)
    weights = from_timm_names(weights) if has_timm_names(weights) else weights
    own = model.state_dict()
    if 'pos_embeder.token_projection.weight' not in own:  # use_pos_embed=False
        weights = {key: value for key, value in weights.items() if not key.startswith('pos_embeder.')}
    for what, keys in (('missing', own.keys() - weights.keys()), ('unexpected', weights.keys() - own.keys())):
        keys = sorted(key for key in keys if not key.startswith('head.'))
        if keys:
            raise ValueError(f'the weights are not this model\'s; {what} keys: {", ".join(keys)}')
    return weights


def timm_cfgs() -> dict:
    """Of each published file, by 'model.tag', what timm's registry wants to know."""
    return {name: {
        'url': entry.url, 'hf_hub_id': entry.hf_hub_id, 'num_classes': entry.num_classes,
        'input_size': (3, entry.resolution, entry.resolution), 'pool_size': None, 'crop_pct': entry.crop,
        'interpolation': 'bicubic', 'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'patch_embed.proj.0.0', 'classifier': 'head', 'license': 'apache-2.0',
    } for name, entry in ZOO.items()}
