"""Segmenters in files: published, our own, and backbones to begin with."""
import dataclasses
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import torch

import weights
from dense import backbone
from run import checkpoints
from run.descriptions import names_of, trained_with
from run.output import log
from segmentation import labels, models
from segmentation.labels import Numbering
from segmentation.models import Segmenter
from utils import InputError

TAG = 'fb_ade20k'
URL = 'https://dl.fbaipublicfiles.com/xcit/ade/{}.pth'
# mIoU in percent on ADE20k's validation pictures, as published by the authors; columns: patches of 16 and 8 pixels
PUBLISHED = {
    'sem_fpn': {'tiny_12': (38.1, 39.9), 'small_12': (43.9, 44.2), 'small_24': (44.6, 47.1), 'medium_24': (45.9, 46.9)},
    'upernet': {'tiny_12': (41.5, 43.5), 'small_12': (45.9, 46.6), 'small_24': (46.9, 48.1), 'medium_24': (47.6, 48.4)},
}
MIOU = {f'{kind}_xcit_{size}_p{patch_size}': miou for kind, sizes in PUBLISHED.items()
        for size, values in sizes.items() for patch_size, miou in zip((16, 8), values)}


@dataclasses.dataclass
class Loaded:
    """Segmenter with its weights.

    Args:
        model: model, in training mode, on the CPU.
        classes: class names; None: unknown.
        numbering: numbers of the classes in label pictures.
        trained: flags of the training, if known.
    """
    model: Segmenter
    classes: Optional[List[str]]
    numbering: Numbering
    trained: dict

    def known(self, zero_is_a_class: Optional[bool]) -> Tuple[Optional[List[str]], Numbering]:
        """Return names and numbering of the classes; the flag --zero-is-a-class has priority, if given."""
        if zero_is_a_class is None:
            return self.classes, self.numbering
        return self.classes, labels.numbering(self.model.num_classes, zero_is_a_class=zero_is_a_class)


class ClassesPart:
    """Class names and numbers as a part of a run; they may not change on resume."""

    def __init__(self, classes: List[str], numbering: Numbering):
        self.classes, self.numbering = list(classes), numbering

    def state_dict(self) -> dict:
        return {'names': self.classes, **{name: list(values) for name, values in vars(self.numbering).items()}}

    def load_state_dict(self, state: dict):
        if state != self.state_dict():
            raise InputError('its classes, or their numbers, differ from those of the data')


def check_exists(given: str, flag: str, name: str):
    """Raise InputError unless `given` by `flag` is TAG for a published model, a URL, or an existing file."""
    if given == TAG:
        if name not in MIOU:
            raise InputError(f'{flag} {TAG}: needs --model with one of {", ".join(MIOU)}')
    elif not checkpoints.is_url(given) and not Path(given).exists():
        raise InputError(f'{flag} {given}: no such file; allowed: a path, a URL, or {TAG}')


def read(given: str, flag: str, name: str) -> dict:
    """Read the content of a segmenter's file; `name`: model, for TAG."""
    return checkpoints.load_checkpoint(URL.format(name) if given == TAG else given, flag)


def tensors_in(content: dict) -> Dict[str, torch.Tensor]:
    """Return the weights in the content of a file, of mmsegmentation, of a run, or bare, without `module.`."""
    tensors = next((content[key] for key in ('state_dict', 'model') if isinstance(content.get(key), dict)), content)
    return {key.removeprefix('module.'): value for key, value in tensors.items() if isinstance(value, torch.Tensor)}


def load(given: str, flag: str, name: str = '') -> Loaded:
    """Build the model of a file, with its weights.

    Args:
        given: path, URL, or TAG.
        name: model; '': the model of the weights.

    Raises:
        InputError: the file can't be read, or does not contain this model.
    """
    source, content = f'{flag} {given}', read(given, flag, name)
    state = tensors_in(content)
    models.check_kind(state, source)
    count = len(state['decode_head.conv_seg.weight'])
    model = models.build(name or models.name_in(state), num_classes=count)
    models.load_weights(model, state, source=source)
    classes, numbering = names_of((content.get('meta') or {}).get('CLASSES'), count), labels.numbering(count)
    if isinstance(content.get('classes'), dict):
        stored = content['classes']
        classes, numbering = stored['names'], Numbering(tuple(stored['values']), tuple(stored['ignored']))
    return Loaded(model, classes, numbering, trained_with(content))


def load_initial(model: Segmenter, given: str, flag: str):
    """Load initial weights: of a segmenter, or of a backbone alone, from any file that `weights.read` accepts.

    Raises:
        InputError: the file can't be read, or its weights do not match the backbone.
    """
    source = f'{flag} {given}'
    if given == TAG or (not weights.published(model.backbone_name, given)
                        and models.name_in(tensors_in(checkpoints.load_checkpoint(given, flag)))):
        state = tensors_in(read(given, flag, model.name))
        if models.name_in(state) == model.name:
            models.load_weights(model, state, source=source, new_classes=True)
            return
        log(f'{source}: weights of {models.name_in(state)}; the backbone alone is loaded')
        tensors = {key.removeprefix('backbone.'): value for key, value in state.items() if key.startswith('backbone.')}
    else:
        found = weights.read(given, flag, model.backbone_name)
        log(f'{source}: backbone from {found.description}')
        tensors = found.tensors
    backbone.load(model.backbone, tensors, source=source)
