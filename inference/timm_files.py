"""Files for timm: the description of weights, their measured accuracy, and their config.json."""
from typing import Optional

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import weights
import xcit
import xcit_zoo
from inference.setting import evaluation_crop
from run.descriptions import names_of, side_of, trained_with


def describe(given: weights.Weights, name: str, published: Optional[xcit_zoo.Published]) -> dict:
    """Return the plain values of a training checkpoint beside its weights, completed for a published file."""
    trained = trained_with(given.checkpoint)
    evaluated = {'input_size': published.resolution, 'full_crop': published.crop == 1.} if published else {}
    names = names_of(given.checkpoint.get('classes'))
    measured = accuracy_of(given)
    if (epoch := xcit_zoo.last_epoch(given.checkpoint)) is not None:
        measured['epoch'] = epoch
    return {'args': {**trained, **evaluated, 'model': name}, **({'classes': names} if names else {}), **measured}


def accuracy_of(given: weights.Weights) -> dict:
    """Return the `accuracy` that main.py measured of these weights, as in a checkpoint, or an empty dict.

    `accuracy` has `last` (top-1 in percent), `last_epoch` and, if known, `images` (number of pictures).
    """
    checkpoint, accuracy = given.checkpoint, given.checkpoint.get('accuracy')
    is_run = given.entry in ('model', 'model_ema', 'replaced.model', 'replaced.model_ema')
    if not is_run or not isinstance(accuracy, dict) or checkpoint.get('step'):  # stored within an epoch
        return {}
    replaced = checkpoint.get('replaced') or {}
    is_ema = given.entry.endswith('model_ema') or (given.entry == 'model' and 'model' in replaced)
    epoch, value = accuracy.get('last_epoch'), accuracy.get('last_ema' if is_ema else 'last')
    if epoch is None:  # of an earlier version
        epoch = accuracy.get('best_epoch')
        value = accuracy.get('best_ema') if is_ema and accuracy.get('better_is_average') else None if is_ema else value
    if value is None or epoch is None or epoch != checkpoint.get('epoch'):
        return {}
    images = {'images': accuracy['images']} if 'images' in accuracy else {}
    return {'accuracy': {'last': value, 'last_epoch': epoch, **images}}


def contiguous(tensors: dict) -> dict:
    """Return copies that share no memory, as .safetensors files need."""
    return {key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}


def config(name: str, described: dict, model: torch.nn.Module, published: Optional[xcit_zoo.Published]) -> dict:
    """Return the content of config.json, by which timm loads the weights, prepares images and names classes."""
    trained, num_classes, default = described['args'], model.num_classes, getattr(model, 'default_cfg', {})
    side = side_of(trained.get('input_size')) or 224
    architecture = f'{name}_{published.resolution if published else 224}' if name in xcit.MODELS else name
    has_names = len(described.get('classes', [])) == num_classes > 0
    return {'architecture': architecture, 'num_classes': num_classes, 'num_features': model.num_features,
            'pretrained_cfg': {
                'tag': published.tag if published else 'trained', 'num_classes': num_classes,
                'input_size': [3, side, side], 'mean': list(trained.get('mean') or IMAGENET_DEFAULT_MEAN),
                'std': list(trained.get('std') or IMAGENET_DEFAULT_STD), 'interpolation': 'bicubic',
                'fixed_input_size': False, 'crop_pct': evaluation_crop(trained), 'crop_mode': 'center',
                'pool_size': None, 'first_conv': default.get('first_conv'),
                'classifier': default.get('classifier', 'head')},
            **({'label_names': described['classes']} if has_names else {})}
