"""Weights of a checkpoint, and into a model."""
import torch

from utils import InputError, abridge, notice


def model_weights(checkpoint: dict, source: str) -> dict:
    """The weights by name in a checkpoint: under 'model' (as published and as stored here), 'state_dict', or bare.

    Raises:
        InputError: there are none.
    """
    weights = checkpoint.get('model', checkpoint.get('state_dict', checkpoint))
    if not isinstance(weights, dict) or not any(isinstance(value, torch.Tensor) for value in weights.values()):
        raise InputError(f'{source}: no weights under \'model\'; the file has: {abridge(list(checkpoint))}')
    return weights


def load_weights(model: torch.nn.Module, given: dict, source: str, *, new_head: bool = False):
    """Load all of the weights `given` into `model`.

    Args:
        given: weights by name, as `model_weights` gives them.
        source: the option and value they came from, for messages.
        new_head: keep the model's fresh head where the given one is for another number of classes.

    Raises:
        InputError: a weight is missing, left over or of another shape.
    """
    own = model.state_dict()
    wrong_shape = [k for k in own if k in given and getattr(given[k], 'shape', None) != own[k].shape]
    missing = [k for k in own if k not in given]
    unexpected = [k for k in given if k not in own]
    head = [f'{getattr(model, "default_cfg", {}).get("classifier", "head")}.{part}' for part in ('weight', 'bias')]
    if missing or unexpected or set(wrong_shape) - set(head):
        shapes = [f'{k} {tuple(getattr(given[k], "shape", ()))}, model has {tuple(own[k].shape)}' for k in wrong_shape]
        problems = {'missing keys': missing, 'unexpected keys': unexpected, 'other shapes': shapes}
        raise InputError(f'{source}: the weights are not this model\'s; '
                         + '; '.join(f'{what}: {abridge(keys)}' for what, keys in problems.items() if keys))
    if wrong_shape:
        classes = f'{len(given[head[0]])} classes, not {len(own[head[0]])}'
        if not new_head:
            raise InputError(f'{source}: the weights are for {classes}')
        notice(f'{source}: its head is for {classes}, and is left out; the model keeps a fresh one')
        given = {k: v for k, v in given.items() if k not in head}
    model.load_state_dict(given, strict=not wrong_shape)
