"""Initial weights of a classifier: a patch stem from other weights, and warnings about settings that differ."""
import dataclasses

import torch

import weights
from run.descriptions import trained_with
from run.output import log
from utils import InputError


def transplant_stem(model: torch.nn.Module, given: weights.Weights):
    """Copy the patch stem from other weights into a model and freeze it; raise InputError if the stems differ."""
    if not hasattr(model, 'patch_embed'):
        raise InputError(f'{given.source}: the model has no patch_embed')
    prefix = 'patch_embed.'
    stem = {key.removeprefix(prefix): value for key, value in given.tensors.items() if key.startswith(prefix)}
    weights.load(model.patch_embed, dataclasses.replace(given, tensors=stem))
    model.patch_embed.requires_grad_(False)


def log_other_normalisation(checkpoint: dict, **current):
    """Warn if a model was trained with another normalisation than the `current` mean and std (None: ImageNet's)."""
    trained = trained_with(checkpoint)
    for name, value in current.items():
        if 'mean' in trained and trained.get(name) != value:
            log(f'Warning: the weights were trained with --{name} {trained.get(name) or "of ImageNet"}, not '
                f'{value or "of ImageNet"}')


def log_published_setting(model_name: str, given: str, *, input_size: int, full_crop: bool):
    """Log the setting of the published accuracy, if published weights are evaluated at another size or crop."""
    published = weights.published_as(given, model_name)
    if published and (input_size != published.resolution or full_crop != (published.crop == 1.)):
        log(f'{published.tag}: its published accuracy is for --input-size {published.resolution} '
            f'--{"" if published.crop == 1. else "no-"}full-crop')
