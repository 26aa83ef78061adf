"""What checkpoints of DINO hold, under the original's names, and in files of others, from any year."""
import hashlib
import os
import re
from typing import List, Optional

import torch
from torch.utils.data import Dataset

import datasets
import xcit_zoo
from dino.loss import DinoLoss
from dino.networks import MultiCrop
from run.position import Epochs
from utils import InputError, abridge

BACKBONE = 'backbone'  # name of the file with the teacher's backbone
BEST = 'best_checkpoint.pth'
WRAPPER = 'module.'  # before every name, as DistributedDataParallel has it
OLD_NAMES = {'projection_head.': 'mlp.', 'prototypes.': 'last_layer.',
             'last_layer.parametrizations.weight.original0': 'last_layer.weight_g',
             'last_layer.parametrizations.weight.original1': 'last_layer.weight_v'}
HEAD = re.compile(r'(head\.)?((mlp\.\d+|last_layer)\..*)')


class NextEpoch(Epochs):
    """Epochs, of which a checkpoint names the next one, as the original's does."""
    required = ('epoch', 'step')

    def state_dict(self) -> dict:
        return {'epoch': self.done + 1, 'step': self.step}

    def load_state_dict(self, state: dict):
        self.done, self.step = state['epoch'] - 1, state['step']


class Network:
    """The student or the teacher as a part of a training (run.parts)."""

    def __init__(self, network: MultiCrop):
        self.network = network

    def state_dict(self) -> dict:
        return {WRAPPER + key: value for key, value in self.network.state_dict().items()}

    def load_state_dict(self, state: dict):
        load(self.network, renamed(state))


class DataSet:
    """What a training learns from, as a part of it: pictures that may not change, though their folder may move."""

    def __init__(self, dataset: Dataset):
        names = datasets.files_of(dataset)
        root = os.path.commonpath([os.path.dirname(name) for name in names] or ['.'])
        listed = '\n'.join(os.path.relpath(name, root) for name in names)
        self.images, self.names = len(dataset), hashlib.sha256(listed.encode()).hexdigest()[:16]

    def state_dict(self) -> dict:
        return {'images': self.images, 'names': self.names}

    def load_state_dict(self, state: dict):
        if state['images'] != self.images:
            raise InputError(f'was trained on {state["images"]} pictures, and --data-path has {self.images}')
        if state.get('names', self.names) != self.names:
            raise InputError(f'was trained on {self.images} pictures of other names than --data-path has')


def renamed(state: dict) -> dict:
    """A student's or a teacher's weights by the names of MultiCrop, whichever the file has for them."""
    tensors, _ = xcit_zoo.without_wrappers({key: value for key, value in state.items() if torch.is_tensor(value)})
    backbone, head = {}, {}
    for key, value in tensors.items():
        key = key.replace(WRAPPER, '')
        for old, new in OLD_NAMES.items():
            key = key.replace(old, new)
        found = HEAD.fullmatch(key)
        if found:
            head[f'head.{found[2]}'] = value
        else:
            backbone[key.removeprefix('backbone.')] = value
    if xcit_zoo.has_timm_names(backbone):
        backbone = xcit_zoo.from_timm_names(backbone)
    if 'head.last_layer.weight' in head:  # never normalised
        weight = head.pop('head.last_layer.weight')
        head['head.last_layer.weight_g'], head['head.last_layer.weight_v'] = weight.norm(dim=1, keepdim=True), weight
    return {**{f'backbone.{key}': value for key, value in backbone.items()}, **head}


def load(network: MultiCrop, tensors: dict):
    """Load weights, all of them.

    Raises:
        InputError: names those that are missing, left over or of another shape.
    """
    own = network.state_dict()
    problems = {'missing': [key for key in own if key not in tensors],
                'unexpected': [key for key in tensors if key not in own],
                'of another shape': [f'{key} {tuple(tensors[key].shape)}, here {tuple(own[key].shape)}'
                                     for key in own if key in tensors and tensors[key].shape != own[key].shape]}
    found = '; '.join(f'{what}: {abridge(keys)}' for what, keys in problems.items() if keys)
    if found:
        raise InputError(f'its weights are of another network ({found})')
    network.load_state_dict(tensors)


def is_full(content: dict) -> bool:
    """Whether a file holds a student or a teacher with its head."""
    return any(isinstance(content.get(name), dict) and any('last_layer' in key or 'prototypes' in key
                                                           for key in content[name]) for name in ('student', 'teacher'))


def load_full(content: dict, student: MultiCrop, teacher: MultiCrop, criterion: DinoLoss) -> List[str]:
    """Load both networks, and the centre, from a training's file.

    Returns:
        What is not as it was, in words.

    Raises:
        InputError: they are other networks.
    """
    words = []
    for name, network in (('student', student), ('teacher', teacher)):
        other = 'teacher' if name == 'student' else 'student'
        if not isinstance(content.get(name), dict):
            words.append(f'it has no {name}: the {other}\'s weights are taken')
        load(network, renamed(content[name] if isinstance(content.get(name), dict) else content[other]))
    centre = centre_in(content)
    if centre is None:
        words.append('it has no centre, which starts from 0')
    elif centre.shape != criterion.center.shape:
        words.append(f'its centre has the shape {tuple(centre.shape)}, and a new one starts from 0')
    else:
        criterion.center.copy_(centre)
    return words


def centre_in(content: dict) -> Optional[torch.Tensor]:
    loss = content.get('dino_loss')
    found = [value for key, value in loss.items() if key.endswith('center')] if isinstance(loss, dict) else []
    return found[0] if found else None


def backbone_state(network: MultiCrop) -> dict:
    """A network's backbone as a bare state dict of contiguous tensors."""
    return {key: value.detach().contiguous() for key, value in network.backbone.state_dict().items()}
