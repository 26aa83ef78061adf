"""Published XCiT weights: their table, and the search for weights in files with other names and nesting.

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
# Published top-1 of the backbones trained without labels (DINO): k-NN, linear
PUBLISHED_DINO_TOP1 = {
    'small_12': {16: (76.0, 77.8), 8: (77.1, 79.2)},
    'medium_24': {16: (76.4, 78.8), 8: (77.9, 80.3)},
}


@dataclasses.dataclass(frozen=True)
class Published:
    """Published checkpoint, for images normalised with ImageNet's mean and standard deviation."""
    model: str  # e.g. 'xcit_small_12_p16'
    tag: str  # name of the weights, e.g. 'fb_dist_in1k_384'
    url: str  # address of the authors' file
    hf_hub_id: Optional[str]  # repository of timm's copy on the Hugging Face hub; None: no copy
    resolution: int  # input size of the evaluation, pixels
    num_classes: int  # outputs of the head; 0 for a backbone
    distilled: bool  # trained with a teacher
    top1: float  # accuracy on ImageNet-1k, percent; for a backbone with a linear classifier
    knn: Optional[float] = None  # accuracy of a backbone with a k-NN classifier, percent
    crop: float = 1.  # fraction of the image that the evaluation crops


def published() -> Iterator[Published]:
    """Yield the 46 checkpoints, in the order of the paper's tables."""
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
# Weights in files, timm's naming and registry

# Modules of networks for other tasks, which no classifier or backbone has
OTHER_TASKS = ('neck', 'fpn', 'rpn_head', 'roi_head', 'bbox_head', 'mask_head', 'decode_head', 'auxiliary_head', 'rpn',
               'roi_heads', 'pixel_decoder', 'sem_seg_head')
# Last layer of a classifier that wraps a backbone; the first is mmpretrain's
HEADS = ('head.fc', 'classifier', 'fc', 'head', 'cls_head')
AVERAGE = re.compile(r'(^|[._])(ema|averaged?|swa)([._]|$)')  # in the name of an EMA of the weights
DEPTH = 4  # levels of nested dicts that are searched
REPLACED = 'replaced.'  # dict of best_model.pth with the weights that are not the best, for a resume


@dataclasses.dataclass
class Found:
    """Weights of a model in a file: the tensors with one prefix in one of the file's dicts."""
    entry: str  # keys of the dict in the file, joined by dots, e.g. 'state_dict'; '' for the file itself
    prefix: str  # prefix of the model's names, e.g. 'module.backbone.'
    tensors: dict  # weights by the model's names, or timm's names
    beside: List[str]  # names of other tensors in the dict
    cleared: List[str]  # removed parts of names, and of pruning

    @property
    def label(self) -> str:
        """Name of these weights for users."""
        return f'{self.entry}.{self.prefix}'.strip('.') or 'the file itself'

    @property
    def is_average(self) -> bool:
        return bool(AVERAGE.search(self.label)) or any(name.endswith('n_averaged') for name in self.beside)

    def equals(self, other: 'Found') -> bool:
        return self.tensors.keys() == other.tensors.keys() and all(
            value.shape == other.tensors[key].shape and bool((value == other.tensors[key]).all())
            for key, value in self.tensors.items())


def find_weights(content: dict, names: Set[str]) -> List[Found]:
    """Find the sets of weights in a file's content: tensors with a model's names after one prefix.

    Args:
        content: nested dicts.
        names: names of the model's weights, in both namings; for an unknown model, names of all XCiT models.

    Returns:
        The sets with at least half as many matching names as the largest set.
    """
    candidates = []
    for entry, tensors in dicts_of_tensors(content):
        tensors, cleared = without_wrappers(tensors)
        counts = Counter(prefix for key in tensors for prefix in prefixes(key, names))
        candidates += [(count, entry, prefix, tensors, cleared) for prefix, count in counts.items()]
    most = max((count for count, *_ in candidates), default=0)
    return [behind_prefix(*rest, names) for count, *rest in candidates if count >= max(most / 2, 4)]


def dicts_of_tensors(content: dict, entry: str = '', depth: int = DEPTH) -> Iterator[Tuple[str, dict]]:
    """Yield (entry, tensors by name) of each nested dict that has tensors."""
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
    """Return True if a value in a file can be a weight: a tensor, or an array of numbers."""
    return isinstance(value, torch.Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in 'fiu')


def without_wrappers(tensors: dict) -> Tuple[dict, List[str]]:
    """Undo the renaming by torch.compile and by pruning; return the tensors and a list of what was removed."""
    cleared = []
    if any('_orig_mod.' in key for key in tensors):  # torch.compile, of the model or of parts
        tensors, cleared = {key.replace('_orig_mod.', ''): value for key, value in tensors.items()}, ['_orig_mod.']
    pruned = {key.removesuffix('_orig') for key in tensors if key.endswith('_orig')
              and f'{key.removesuffix("_orig")}_mask' in tensors}  # torch.nn.utils.prune
    if pruned:
        rest = {key: value for key, value in tensors.items() if re.sub('_(orig|mask)$', '', key) not in pruned}
        tensors = {**rest, **{key: tensors[f'{key}_orig'] * tensors[f'{key}_mask'] for key in pruned}}
        cleared = [*cleared, f'the masks of {len(pruned)} pruned tensors']
    return tensors, cleared


def prefixes(key: str, names: Set[str]) -> Iterator[str]:
    """Yield each prefix of a key after which the rest is one of a model's names."""
    parts = key.split('.')
    for i in range(len(parts)):
        if '.'.join(parts[i:]) in names:
            yield ''.join(f'{part}.' for part in parts[:i])


def behind_prefix(entry: str, prefix: str, tensors: dict, cleared: List[str], names: Set[str]) -> Found:
    """Select the model's weights from a dict: names after the prefix whose first part is one of the model's."""
    first_parts = {name.partition('.')[0] for name in names}
    weights = {key.removeprefix(prefix): value for key, value in tensors.items()
               if key.startswith(prefix) and key.removeprefix(prefix).partition('.')[0] in first_parts}
    used = {prefix + key for key in weights}
    outer = ''.join(f'{part}.' for part in prefix.split('.')[:-2])  # 'a.' for the prefix 'a.b.'
    if prefix and not any(key.startswith('head.') for key in weights):
        head = next((outer + name for name in HEADS if f'{outer}{name}.weight' in tensors), None)
        for part in ('weight', 'bias') if head else ():
            if f'{head}.{part}' in tensors:
                weights[f'head.{part}'] = tensors[f'{head}.{part}']
                used.add(f'{head}.{part}')
    return Found(entry, prefix, weights, [key for key in tensors if key not in used], cleared)


def of_other_task(names: List[str]) -> List[str]:
    """Return the parts of names that belong to a detector or a segmenter."""
    return sorted({part for name in names for part in name.split('.')[:3] if part.rstrip('0123456789') in OTHER_TASKS})


def is_linear(tensors: dict) -> bool:
    """Return True if tensors are those of a linear layer, a weight (K, C) and a bias (K,), or of several `layers.N`."""
    layers = {key.rpartition('.')[0] for key in tensors}
    pairs = [[tensors.get(f'{layer}.{part}' if layer else part) for part in ('weight', 'bias')] for layer in layers]
    return len(tensors) == 2 * len(pairs) > 0 and all(
        weight is not None and weight.ndim == 2 and bias is not None and bias.shape == weight.shape[:1]
        for weight, bias in pairs) and (len(pairs) == 1 or all(re.fullmatch(r'layers\.\d+', layer) for layer in layers))


def choose(candidates: List[Found], *, average: bool = False, key: str = '') -> Optional[Found]:
    """Choose one of the sets of weights in a file; None: no set of this kind.

    Args:
        average: choose the EMA.
        key: label of the set, or its first parts.

    Raises:
        ValueError: several sets remain, and differ.
    """
    if key:
        candidates = [weights for weights in candidates if weights.label == key] or [
            weights for weights in candidates if f'{weights.label}.'.startswith(f'{key}.')]
    elif average:
        candidates = [weights for weights in candidates if weights.is_average]
    else:
        candidates = [weights for weights in candidates if not weights.is_average] or candidates
        candidates = [weights for weights in candidates if not weights.entry.startswith(REPLACED)] or candidates
        if any(weights.entry == 'teacher' for weights in candidates):  # DINO, whose result is the teacher
            candidates = [weights for weights in candidates if weights.entry != 'student']
    different = candidates[:1] + [weights for weights in candidates[1:] if not weights.equals(candidates[0])]
    if len(different) > 1:
        raise ValueError(f'holds {len(different)} sets of weights that differ: '
                         f'{", ".join(weights.label for weights in different)}')
    return candidates[0] if candidates else None


def has_timm_names(weights: dict) -> bool:
    """Return True if the weights have the names of timm's own XCiT, which differ in two modules."""
    return any(key.startswith('pos_embed.') or re.fullmatch(TIMM_CLASS_ATTENTION, key) for key in weights)


TIMM_CLASS_ATTENTION = r'(cls_attn_blocks\.\d+\.attn\.)([qkv])\.(weight|bias)'


def from_timm_names(weights: dict) -> dict:
    """Rename timm's naming to the published naming: `pos_embeder`, and one `qkv` in class attention."""
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
    """Rename the published naming to timm's."""
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
    """Return a model's names in both namings, timm's and the published."""
    tensors = dict.fromkeys(names, torch.empty(3, device='meta'))
    return {*tensors, *to_timm_names(tensors), *from_timm_names(tensors)}


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """Return the model's weights from the content of a file in any format of XCiT weights, for timm to load.

    Raises:
        ValueError: weights are missing or unexpected; timm does not check this if the number of classes differs.
    """
    expected = model.state_dict()
    chosen = choose(find_weights(state_dict, in_both_namings(expected)))
    weights = state_dict if chosen is None else chosen.tensors
    weights = from_timm_names(weights) if has_timm_names(weights) else weights
    if 'pos_embeder.token_projection.weight' not in expected:  # use_pos_embed=False
        weights = {key: value for key, value in weights.items() if not key.startswith('pos_embeder.')}
    for problem, keys in (('missing', expected.keys() - weights.keys()),
                          ('unexpected', weights.keys() - expected.keys())):
        keys = sorted(key for key in keys if not key.startswith('head.'))
        if keys:
            raise ValueError(f'the weights do not match this model; {problem} keys: {", ".join(keys)}')
    return weights


def timm_cfgs() -> dict:
    """Return the entries of timm's registry for the published checkpoints, by 'model.tag'."""
    return {name: {
        'url': entry.url, 'hf_hub_id': entry.hf_hub_id, 'num_classes': entry.num_classes,
        'input_size': (3, entry.resolution, entry.resolution), 'pool_size': None, 'crop_pct': entry.crop,
        'interpolation': 'bicubic', 'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'patch_embed.proj.0.0', 'classifier': 'head', 'license': 'apache-2.0',
    } for name, entry in ZOO.items()}


def last_epoch(checkpoint: dict) -> Optional[int]:
    """Return the number of the last finished epoch, as in the run's table; None: unknown, or no epoch is finished."""
    epoch = checkpoint.get('epoch')
    if not isinstance(epoch, int):
        return None
    epoch -= 'teacher' in checkpoint  # files of DINO contain the number of the next epoch
    return epoch if epoch >= 0 else None
