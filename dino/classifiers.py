"""Linear classifiers of features: trained side by side, evaluated, and stored in files.

Shapes: `B` images, `C` width of the features, `K` classes.

Source: original eval_linear.py.
"""
import copy
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import torch
import torch.nn as nn

import weights
import xcit_zoo
from dino.features import Features
from dino.frozen import Frozen
from engine import accuracies, hits_and_loss
from run import checkpoints, processes
from run.descriptions import names_of
from utils import InputError, abridge, counted

TAG = 'fb_dino_linear'  # of the published classifiers
WEIGHT_STD = .01  # of initial weights
BLOCK = 4096  # features per forward pass


class Linears(nn.Module):
    """`count` linear classifiers side by side with equal initial weights; `width`: C, `num_classes`: K."""

    def __init__(self, width: int, num_classes: int, count: int):
        super().__init__()
        layer = nn.Linear(width, num_classes)
        nn.init.normal_(layer.weight, std=WEIGHT_STD)
        nn.init.zeros_(layer.bias)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(count))

    def forward(self, x: torch.Tensor) -> List[torch.Tensor]:
        """(B, C) -> logits (B, K) of each classifier, always in full precision."""
        with torch.autocast(x.device.type, enabled=False):
            return [layer(x.float()) for layer in self.layers]


class Kept:
    """Classifier in the file of a run, as a part of the run (run.parts).

    Attributes:
        layer: the classifier; None: there is none yet.
        description: epoch, learning rate and metrics.
    """

    def __init__(self):
        self.layer: Optional[nn.Linear] = None
        self.description = {}

    def keep(self, layer: nn.Linear, **description):
        self.layer, self.description = copy.deepcopy(layer).cpu(), description

    def state_dict(self) -> Optional[dict]:
        return None if self.layer is None else {'layer': self.layer.state_dict(), **self.description}

    def load_state_dict(self, state: dict):
        layer = nn.Linear(*reversed(state['layer']['weight'].shape))
        layer.load_state_dict(state['layer'])
        self.layer, self.description = layer, {key: value for key, value in state.items() if key != 'layer'}


@torch.inference_mode()
def evaluate(layer: nn.Linear, features: Features, device: torch.device) -> Dict[str, float]:
    """Compute acc1, acc5 (percent) and loss of a classifier over all images."""
    blocks = zip(features.features.split(BLOCK), features.labels.split(BLOCK))
    return accuracies(sum(hits_and_loss(layer(rows.to(device)), labels.to(device)) for rows, labels in blocks))


def read(given: str, model_name: str) -> Tuple[nn.Linear, dict]:
    """Return a classifier and the content of its file; raise InputError if the file contains no linear classifier.

    Args:
        given: --linear-weights: TAG, a path or a URL.
        model_name: backbone of the published classifier, for TAG; '': unknown.
    """
    if given == TAG and model_name not in xcit_zoo.DINO_LINEAR:
        raise InputError(f'--linear-weights {TAG}: not published for {model_name or "features of an unknown model"}; '
                         f'published for {", ".join(xcit_zoo.DINO_LINEAR)}')
    path = xcit_zoo.DINO_LINEAR[model_name] if given == TAG else given
    content = checkpoints.load_checkpoint(path, '--linear-weights')
    for _, tensors in xcit_zoo.dicts_of_tensors(content):
        if len(tensors) == 2 and xcit_zoo.is_linear(tensors):
            values = {key.rpartition('.')[2]: value for key, value in tensors.items()}
            layer = nn.Linear(*reversed(values['weight'].shape))
            layer.load_state_dict({name: value.float() for name, value in values.items()})
            return layer, content
    raise InputError(f'--linear-weights {given}: contains no linear classifier, a weight (K, C) and a bias (K,); '
                     f'contains: {abridge(list(content))}')


def read_matching(given: str, *, width: int, classes: List[str], backbone: dict) -> nn.Linear:
    """Read a classifier, see `read`; raise InputError if the classifier is for other features or classes.

    Args:
        width: C.
        classes: names of the classes 0, 1, ...
        backbone: identity of the backbone, see `dino.frozen.Frozen`; empty: unknown.
    """
    layer, content = read(given, backbone.get('model', ''))
    source = f'--linear-weights {given}'
    if (layer.in_features, layer.out_features) != (width, len(classes)):
        raise InputError(f'{source}: is for features of width {layer.in_features} and '
                         f'{counted(layer.out_features, "class")}, not {width} and {len(classes)}')
    refuse_other_backbone(content.get('backbone'), backbone, source=f'{source}: ')
    names = names_of(content.get('classes'), len(classes))
    if names not in (None, list(classes)):
        raise InputError(f'{source}: is for other classes ({abridge(names, 4)}), or another order of classes, than the '
                         f'data have ({abridge(list(classes), 4)})')
    return layer


def refuse_other_backbone(stored: object, backbone: dict, *, source: str = ''):
    """Raise InputError if two identities of backbones differ and both are known: dicts that are not empty."""
    if isinstance(stored, dict) and stored and backbone and stored != backbone:
        before, now = (f'{values.get("model")}, weights {values.get("fingerprint")}' for values in (stored, backbone))
        raise InputError(f'{source}is for features of another backbone ({before}) than these ({now})')


def save(path: Path, layer: nn.Linear, description: dict):
    """Write a classifier under the original's names; `description`: its backbone, classes and accuracy."""
    state = {f'module.linear.{name}': value.detach().cpu() for name, value in layer.state_dict().items()}
    checkpoints.save_checkpoint({'state_dict': state, **description}, path)


def save_with_backbone(path: Path, layer: nn.Linear, frozen: Frozen, description: dict):
    """Write backbone and classifier as one model; `description`: settings of its evaluation."""
    state = {**frozen.state, **{key: getattr(layer, key.rpartition('.')[2]).detach().cpu()
                                for key in weights.head_keys(frozen.loaded.model)}}
    if processes.is_main_process():
        path.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.save_weights(state, description, path)
