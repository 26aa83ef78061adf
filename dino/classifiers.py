"""Linear classifiers of features: trained side by side, evaluated, and in files.

Shapes: `B` images, `C` numbers of a feature, `K` classes.

Source: original eval_linear.py.
"""
import copy
from pathlib import Path
from typing import Dict, List, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import weights
import xcit_zoo
from dino.features import Features
from dino.frozen import Frozen
from run import checkpoints, processes
from utils import InputError, abridge

WEIGHT_STD = .01  # of initial weights
TAG = 'fb_dino_linear'  # the published ones
BLOCK = 4096  # features that are classified at a time


class Linears(nn.Module):
    """Linear classifiers side by side, which begin alike.

    Args:
        width: C.
        num_classes: K.
        count: of classifiers.
    """

    def __init__(self, width: int, num_classes: int, count: int):
        super().__init__()
        layer = nn.Linear(width, num_classes)
        nn.init.normal_(layer.weight, std=WEIGHT_STD)
        nn.init.zeros_(layer.bias)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(count))

    def forward(self, x: torch.Tensor) -> List[torch.Tensor]:
        """(B, C) -> logits (B, K) of each; in full precision, whatever autocast is."""
        with torch.autocast(x.device.type, enabled=False):
            return [layer(x.float()) for layer in self.layers]


@torch.inference_mode()
def evaluate(layer: nn.Linear, found: Features, device: torch.device) -> Dict[str, float]:
    """acc1, acc5 (percent) and loss of a classifier, each image counted once."""
    right, among_five, loss = 0, 0, 0.
    for rows, labels in zip(found.features.split(BLOCK), found.labels.split(BLOCK)):
        labels = labels.to(device)
        logits = layer(rows.to(device))
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        right, among_five = right + int(hits[:, 0].sum()), among_five + int(hits.sum())
        # differs: evaluation loss - the mean over images; the original's over batches, of which the last is short
        loss += float(F.cross_entropy(logits, labels, reduction='sum'))
    return {'acc1': 100 * right / len(found), 'acc5': 100 * among_five / len(found), 'loss': loss / len(found)}


def line(stats: Dict[str, float]) -> str:
    """A result as the original prints it."""
    return f'* Acc@1 {stats["acc1"]:.3f} Acc@5 {stats["acc5"]:.3f} loss {stats["loss"]:.3f}'


# ---------------------------------------------------------------------------------------------------------------------
# Files

def read(given: str, model_name: str) -> Tuple[nn.Linear, dict]:
    """A classifier of --linear-weights, and all that its file holds.

    Args:
        given: TAG, a path or an address.
        model_name: whose published one the tag means; '': not known.

    Raises:
        InputError: it is not there, or no linear classifier.
    """
    if given == TAG and model_name not in xcit_zoo.DINO_LINEAR:
        raise InputError(f'--linear-weights {TAG}: there is none for {model_name or "features of an unknown model"}; '
                         f'there is one for {", ".join(xcit_zoo.DINO_LINEAR)}')
    content = checkpoints.load_checkpoint(xcit_zoo.DINO_LINEAR[model_name] if given == TAG else given,
                                          '--linear-weights')
    for _, tensors in xcit_zoo.dicts_of_tensors(content):
        found = {key.rpartition('.')[2]: value for key, value in tensors.items()}
        if len(tensors) == 2 and found.keys() == {'weight', 'bias'} and found['weight'].ndim == 2 and (
                found['bias'].shape == found['weight'].shape[:1]):
            layer = nn.Linear(*reversed(found['weight'].shape))
            layer.load_state_dict({name: value.float() for name, value in found.items()})
            return layer, content
    raise InputError(f'--linear-weights {given}: holds no linear classifier, a weight (K, C) and a bias (K,); it has: '
                     f'{abridge(list(content))}')


def save(path: Path, layer: nn.Linear, description: dict):
    """Under the original's names; `description`: which backbone and classes it is for, and what it reaches."""
    state = {f'module.linear.{name}': value.detach().cpu() for name, value in layer.state_dict().items()}
    checkpoints.save_checkpoint({'state_dict': state, **description}, path)


def save_with_backbone(path: Path, layer: nn.Linear, frozen: Frozen, description: dict):
    """Backbone and classifier as one model, and what a program has to know to evaluate it."""
    own = {key: getattr(layer, key.rpartition('.')[2]).detach().cpu() for key in weights.head_keys(frozen.loaded.model)}
    state = {**frozen.state, **own}
    if processes.is_main_process():
        path.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.save_checkpoint(state if path.suffix == '.safetensors' else {'model': state, **description}, path,
                                metadata=checkpoints.metadata_of(description))
