"""Optimizers: timm's by name, and parameter groups by a rule."""
from typing import Callable, List

import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2

from utils import InputError, first_line

FUSED_OPTIMIZERS = ('adam', 'adamw', 'sgd')  # optimizers of torch with one kernel for all parameters


def build_optimizer(model: nn.Module, *, opt: str, **options) -> torch.optim.Optimizer:
    """Build an optimizer by timm.optim.create_optimizer_v2 with its options; vectors get no weight decay.

    Raises:
        InputError: timm can't build the optimizer on this machine.
    """
    if opt.lower() in FUSED_OPTIMIZERS:
        options['fused'] = True
    try:
        return create_optimizer_v2(model, opt=opt, **options)
    except (AssertionError, ImportError, TypeError) as error:  # a package is missing, or an option does not exist
        raise InputError(f'--opt {opt}: timm can\'t build this optimizer here ({first_line(error)})') from None


def parameter_groups(model: nn.Module, is_spared: Callable[[str, nn.Parameter], bool]) -> List[dict]:
    """Divide the trainable parameters into two groups: with weight decay, and without (`is_spared`)."""
    decayed, spared = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (spared if is_spared(name, parameter) else decayed).append(parameter)
    return [{'params': decayed}, {'params': spared, 'weight_decay': 0.}]
