"""Optimizer of dense tasks, its flags, and the lines at the beginning of a run in iterations."""
from typing import Optional

import torch
import torch.nn as nn

from run.commandline import COUNT_OR_0, FRACTION, NON_NEGATIVE, POSITIVE
from run.optimization import parameter_groups


def add_optimizer_flags(group, *, lr: float, weight_decay: float, warmup_iterations: int, warmup_factor: float,
                        reference_batch: int):
    """Add the flags of AdamW and its warm-up; `reference_batch`: images per step that --lr refers to."""
    group.add_argument('--lr', default=lr, type=POSITIVE, help=f'peak learning rate for {reference_batch} images per '
                       'step; scaled with the actual number')
    group.add_argument('--weight-decay', default=weight_decay, type=NON_NEGATIVE,
                       help='weight decay; 0 for norms of tokens')
    group.add_argument('--clip-grad', type=POSITIVE, metavar='NORM', help='maximum gradient norm; unset: no clipping')
    group.add_argument('--warmup-iterations', default=warmup_iterations, type=COUNT_OR_0, metavar='N',
                       help='iterations of linear warm-up; 0: none')
    group.add_argument('--warmup-factor', default=warmup_factor, type=FRACTION, metavar='FRACTION',
                       help='initial learning rate of the warm-up, as a fraction of the scheduled rate')


def build_optimizer(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Build AdamW for the trainable parameters of a model; a schedule sets the learning rate."""
    # faithful: parameters with `norm` in their names get no weight decay; BatchNorms, biases, LayerScale and
    # temperature do (original semantic_segmentation and detection, paramwise_cfg)
    groups = parameter_groups(model, lambda name, _: 'norm' in name)
    return torch.optim.AdamW([group for group in groups if group['params']], lr=lr, weight_decay=weight_decay,
                             fused=True)


def freezable(model: nn.Module, *, freezes: bool) -> Optional[nn.Module]:
    """Return `model` without trainable parameters if `freezes`, for engine.train_one_epoch; else None."""
    if not freezes:
        return None
    return model.requires_grad_(False)
