"""The published XCiT weights: their table, and the names that files give to what is in them.

Paper: https://arxiv.org/abs/2106.09681, tables 1 and 2.
"""
import dataclasses
import re
from collections import Counter
from typing import Iterable, Iterator, List, Optional, Set, Tuple

import numpy as np
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
                yield Published(name, 'fb_dino', url, None, 224, 0, False, linear, knn, crop=.875)


ZOO = {f'{entry.model}.{entry.tag}': entry for entry in published()}

# Linear classifiers of the backbones trained without labels, by model
DINO_LINEAR = {entry.model: f'https://dl.fbaipublicfiles.com/dino/dino_{entry.model}_pretrain/dino_{entry.model}'
                            f'_linearweights.pth' for entry in ZOO.values() if entry.tag == 'fb_dino'}


# ---------------------------------------------------------------------------------------------------------------------
# What files hold, timm's naming and registry

# Where networks of other tasks keep what no classifier or backbone has
OTHER_TASKS = ('neck', 'fpn', 'rpn_head', 'roi_head', 'bbox_head', 'mask_head', 'decode_head', 'auxiliary_head', 'rpn',
               'roi_heads', 'pixel_decoder', 'sem_seg_head')
# Where a classifier that is wrapped around a backbone has its last layer: mmpretrain's is the first
HEADS = ('head.fc', 'classifier', 'fc', 'head', 'cls_head')
AVERAGE = re.compile(r'(^|[._])(ema|averaged?|swa)([._]|$)')  # in the name of a moving average of the weights
DEPTH = 4  # of dicts within dicts that are searched


@dataclasses.dataclass
class Found:
    """Weights of a model in a file: those behind one prefix in one of its dicts.

    Args:
        entry: where the dict is in the file, e.g. 'state_dict'; '' for the file itself.
        prefix: what stands before the model's own names, e.g. 'module.backbone.'.
        tensors: by the model's names, or timm's for them.
        beside: names in the dict of what is not the model's.
        cleared: what wrappers had put within names, and pruning beside them.
    """
    entry: str
    prefix: str
    tensors: dict
    beside: List[str]
    cleared: List[str]

    @property
    def label(self) -> str:
        """What users call it."""
        return f'{self.entry}.{self.prefix}'.strip('.') or 'the file itself'

    @property
    def is_average(self) -> bool:
        return bool(AVERAGE.search(self.label)) or any(name.endswith('n_averaged') for name in self.beside)

    def equals(self, other: 'Found') -> bool:
        return self.tensors.keys() == other.tensors.keys() and all(
            value.shape == other.tensors[key].shape and bool((value == other.tensors[key]).all())
            for key, value in self.tensors.items())


def find_weights(content: dict, own: Set[str]) -> List[Found]:
    """All places in a file's content where a model's names stand behind one prefix.

    Args:
        content: dicts in dicts.
        own: the model's names, and other names for the same; of an unknown model, those of all XCiT.

    Returns:
        The places with half as many names as the best, or more.
    """
    found = []
    for entry, tensors in dicts_of_tensors(content):
        tensors, cleared = without_wrappers(tensors)
        counts = Counter(prefix for key in tensors for prefix in prefixes(key, own))
        found += [(count, entry, prefix, tensors, cleared) for prefix, count in counts.items()]
    most = max((count for count, *_ in found), default=0)
    return [behind_prefix(*rest, own) for count, *rest in found if count >= max(most / 2, 4)]


def dicts_of_tensors(content: dict, entry: str = '', depth: int = DEPTH) -> Iterator[Tuple[str, dict]]:
    """(where it is, its tensors by name) of each dict in a dict that has any."""
    tensors = {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
               for key, value in content.items() if isinstance(key, str) and is_weight(value)}
    if tensors:
        yield entry, tensors
    for key, value in content.items():
        parts = dict(enumerate(value)) if isinstance(value, (list, tuple)) and len(value) < 10 else {'': value}
        for number, part in parts.items():
            if depth and isinstance(key, str) and isinstance(part, dict) and not key.startswith('optim'):
                yield from dicts_of_tensors(part, '.'.join(filter(None, (entry, key, str(number)))), depth - 1)


def is_weight(value) -> bool:
    """Whether a value in a file can be a weight: a tensor, or an array of numbers."""
    return isinstance(value, torch.Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in 'fiu')


def without_wrappers(tensors: dict) -> Tuple[dict, List[str]]:
    """Names as if the model had never been compiled or pruned; and what was done."""
    cleared = []
    if any('_orig_mod.' in key for key in tensors):  # torch.compile, of the whole or of parts
        tensors, cleared = {key.replace('_orig_mod.', ''): value for key, value in tensors.items()}, ['_orig_mod.']
    pruned = {key.removesuffix('_orig') for key in tensors if key.endswith('_orig')
              and f'{key.removesuffix("_orig")}_mask' in tensors}  # torch.nn.utils.prune
    if pruned:
        rest = {key: value for key, value in tensors.items() if re.sub('_(orig|mask)$', '', key) not in pruned}
        tensors = {**rest, **{key: tensors[f'{key}_orig'] * tensors[f'{key}_mask'] for key in pruned}}
        cleared = [*cleared, f'{len(pruned)} pruned ones as pruning leaves them']
    return tensors, cleared


def prefixes(key: str, own: Set[str]) -> Iterator[str]:
    """What stands before one of a model's own names in a key; there may be several ways to see it."""
    parts = key.split('.')
    for i in range(len(parts)):
        if '.'.join(parts[i:]) in own:
            yield ''.join(f'{part}.' for part in parts[:i])


def behind_prefix(entry: str, prefix: str, tensors: dict, cleared: List[str], own: Set[str]) -> Found:
    """What of a dict is the model's: all names behind the prefix that begin as one of its own does."""
    first = {name.partition('.')[0] for name in own}
    mine = {key.removeprefix(prefix): value for key, value in tensors.items()
            if key.startswith(prefix) and key.removeprefix(prefix).partition('.')[0] in first}
    names = {prefix + key for key in mine}
    around = ''.join(f'{part}.' for part in prefix.split('.')[:-2])  # of a prefix a.b., a.
    if prefix and not any(key.startswith('head.') for key in mine):
        found = next((name for name in HEADS if f'{around}{name}.weight' in tensors), None)
        for part in ('weight', 'bias') if found else ():
            if f'{around}{found}.{part}' in tensors:
                mine[f'head.{part}'] = tensors[f'{around}{found}.{part}']
                names.add(f'{around}{found}.{part}')
    return Found(entry, prefix, mine, [key for key in tensors if key not in names], cleared)


def of_other_task(beside: List[str]) -> List[str]:
    """The parts of a detector or of a segmenter among names, if there are any."""
    return sorted({part for key in beside for part in key.split('.')[:3] if part.rstrip('0123456789') in OTHER_TASKS})


def choose(found: List[Found], *, average: bool = False, key: str = '') -> Optional[Found]:
    """The weights that are meant among those in a file; None: there are none of that kind.

    Args:
        average: take the moving average.
        key: the label of those to take, or how it begins.

    Raises:
        ValueError: there are several that differ.
    """
    if key:
        found = [one for one in found if one.label == key] or [
            one for one in found if f'{one.label}.'.startswith(f'{key}.')]
    elif average:
        found = [one for one in found if one.is_average]
    else:
        found = [one for one in found if not one.is_average] or found
        if any(one.entry == 'teacher' for one in found):  # of a training by DINO, whose student is not what it is for
            found = [one for one in found if one.entry != 'student']
    different = found[:1] + [one for one in found[1:] if not one.equals(found[0])]
    if len(different) > 1:
        raise ValueError(f'holds {len(different)} sets of weights that differ: '
                         f'{", ".join(one.label for one in different)}')
    return found[0] if found else None


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


def in_both_namings(names: Iterable[str]) -> Set[str]:
    """A model's names, and what they are in the other naming."""
    tensors = dict.fromkeys(names, torch.empty(3, device='meta'))
    return {*tensors, *to_timm_names(tensors), *from_timm_names(tensors)}


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """What timm loads from a file, in whichever format XCiT weights come.

    Raises:
        ValueError: weights are missing or left over; where the head is for other classes, timm itself would not tell.
    """
    own = model.state_dict()
    found = choose(find_weights(state_dict, in_both_namings(own)))
    weights = state_dict if found is None else found.tensors
    weights = from_timm_names(weights) if has_timm_names(weights) else weights
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
