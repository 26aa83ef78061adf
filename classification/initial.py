"""Initial weights of a classifier: a patch stem from other weights."""
import dataclasses

import torch

import weights
from utils import InputError


def transplant_stem(model: torch.nn.Module, given: weights.Weights):
    """Copy the patch stem from other weights into a model and freeze it; raise InputError if the stems differ."""
    if not hasattr(model, 'patch_embed'):
        raise InputError(f'{given.source}: the model has no patch_embed')
    prefix = 'patch_embed.'
    stem = {key.removeprefix(prefix): value for key, value in given.tensors.items() if key.startswith(prefix)}
    weights.load(model.patch_embed, dataclasses.replace(given, tensors=stem, expected=('', '')))
    model.patch_embed.requires_grad_(False)
