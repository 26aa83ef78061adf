"""Checkpoints of DINO under the original's names, and names in files of other programs and years."""
import itertools
import re
from typing import List, Optional

import torch

import xcit_zoo
from dino.loss import DinoLoss
from dino.networks import MultiCrop
from run.position import Epochs
from utils import InputError, abridge

BEST = 'best_checkpoint.pth'
PREFIX = 'module.'  # prefix that DistributedDataParallel adds to every name
OLD_NAMES = {'projection_head.': 'mlp.', 'prototypes.': 'last_layer.',
             'last_layer.parametrizations.weight.original0': 'last_layer.weight_g',
             'last_layer.parametrizations.weight.original1': 'last_layer.weight_v'}
HEAD = re.compile(r'(head\.)?((mlp\.\d+|last_layer)\..*)')


class NextEpoch(Epochs):
    """Epochs whose checkpoint contains the number of the next epoch, as the original's does."""
    required = ('epoch', 'step')

    def state_dict(self) -> dict:
        return {'epoch': self.done + 1, 'step': self.step}

    def load_state_dict(self, state: dict):
        self.done, self.step = state['epoch'] - 1, state['step']


class Network:
    """Student or teacher as a part of a run (run.parts)."""

    def __init__(self, network: MultiCrop):
        self.network = network

    def state_dict(self) -> dict:
        return {PREFIX + key: value for key, value in self.network.state_dict().items()}

    def load_state_dict(self, state: dict):
        load(self.network, renamed(state))


def renamed(state: dict) -> dict:
    """Return the weights of a student or teacher under MultiCrop's names, from any naming."""
    tensors, _ = xcit_zoo.without_wrappers({key: value for key, value in state.items() if torch.is_tensor(value)})
    backbone, head = {}, {}
    for key, value in tensors.items():
        key = key.replace(PREFIX, '')
        for old, new in OLD_NAMES.items():
            key = key.replace(old, new)
        if match := HEAD.fullmatch(key):
            head[f'head.{match[2]}'] = value
        else:
            backbone[key.removeprefix('backbone.')] = value
    if xcit_zoo.has_timm_names(backbone):
        backbone = xcit_zoo.from_timm_names(backbone)
    if 'head.last_layer.weight' in head:  # without weight_norm
        weight = head.pop('head.last_layer.weight')
        head['head.last_layer.weight_g'], head['head.last_layer.weight_v'] = weight.norm(dim=1, keepdim=True), weight
    return {**{f'backbone.{key}': value for key, value in backbone.items()}, **head}


def load(network: MultiCrop, tensors: dict):
    """Load all weights of a network; raise InputError with the weights that are missing, unexpected or mismatched."""
    expected = network.state_dict()
    problems = {'missing': [key for key in expected if key not in tensors],
                'unexpected': [key for key in tensors if key not in expected],
                'of another shape': [f'{key} {tuple(tensors[key].shape)}, not {tuple(value.shape)}' for key, value in
                                     expected.items() if key in tensors and tensors[key].shape != value.shape]}
    if any(problems.values()):
        listed = '; '.join(f'{problem}: {abridge(keys)}' for problem, keys in problems.items() if keys)
        names = itertools.chain(*problems.values())
        remedy = ('; only the heads differ: --pretrained with backbone.pth, the file of the backbone alone, starts '
                  'with new heads of any --out-dim' if all(name.startswith('head.') for name in names) else '')
        raise InputError(f'the weights do not match this network ({listed}){remedy}')
    network.load_state_dict(tensors)


def is_full(content: dict) -> bool:
    """Return True if a file contains a student or a teacher with its head."""
    networks = [content[name] for name in ('student', 'teacher') if isinstance(content.get(name), dict)]
    return any('last_layer' in key or 'prototypes' in key for network in networks for key in network)


def load_full(content: dict, student: MultiCrop, teacher: MultiCrop, criterion: DinoLoss) -> List[str]:
    """Load both networks, which must match, and the centre; return notes on parts that the checkpoint lacks."""
    notes = []
    for name, other, network in (('student', 'teacher', student), ('teacher', 'student', teacher)):
        if not isinstance(content.get(name), dict):
            notes.append(f'has no {name}; the {other}\'s weights are used')
            name = other
        load(network, renamed(content[name]))
    centre = centre_in(content)
    if centre is None:
        notes.append('has no centre, which starts at 0')
    elif centre.shape != criterion.center.shape:
        notes.append(f'has a centre of shape {tuple(centre.shape)}, which does not match and starts at 0')
    else:
        criterion.center.copy_(centre)
    return notes


def centre_in(content: dict) -> Optional[torch.Tensor]:
    loss = content.get('dino_loss')
    tensors = loss if isinstance(loss, dict) else {}
    return next((tensor for name, tensor in tensors.items() if name.endswith('center')), None)
