"""Optimizer steps of DINO: optimizers, weight decay, clipping, frozen prototypes, and the teacher's EMA."""
from typing import Callable, Iterable

import torch
import torch.nn as nn

from run.commandline import COUNT_OR_0, NON_NEGATIVE, POSITIVE
from run.optimization import parameter_groups

OPTIMIZERS = ('adamw', 'sgd', 'lars')
SGD_MOMENTUM = .9


def build_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """Build one of OPTIMIZERS; a schedule sets learning rate and weight decay before each step."""
    groups = parameter_groups(model, is_spared)
    if name == 'adamw':
        return torch.optim.AdamW(groups, lr=0., fused=True)
    if name == 'sgd':
        # The fused kernel fails if only some weights have a momentum: --freeze-last-layer
        return torch.optim.SGD(groups, lr=0., momentum=SGD_MOMENTUM, foreach=True)
    return Lars(groups, lr=0.)


def is_spared(name: str, parameter: nn.Parameter) -> bool:
    """Return True if a parameter gets no weight decay."""
    # faithful: cls_token, XCA's temperature and weight_g have more than one dimension and are decayed (original
    # utils.py, get_params_groups)
    return name.endswith('.bias') or parameter.ndim == 1


def clip_each(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Clip each gradient by its own norm (0: no clipping); return the global norm before clipping."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    if max_norm:
        # faithful: by the norm of each tensor, not by the global norm (original utils.py, clip_gradients)
        factors = (max_norm / (norms + 1e-6)).clamp(max=1.)
        torch._foreach_mul_(gradients, list(factors.unbind()))
    return torch.linalg.vector_norm(norms)


def freeze_last_layer(model: nn.Module):
    """Remove the gradients of the prototypes: a step changes neither the prototypes nor their optimizer state."""
    for name, parameter in model.named_parameters():
        if 'last_layer' in name:
            parameter.grad = None


def clip_of(student: nn.Module, max_norm: float, *, freezes: bool) -> Callable[[list], torch.Tensor]:
    """Return a function for engine.train_one_epoch that clips gradients; `freezes`: also freeze the prototypes."""
    def clip(parameters: list) -> torch.Tensor:
        norm = clip_each(parameters, max_norm)
        if freezes:
            freeze_last_layer(student)
        return norm
    return clip


@torch.no_grad()
def average_into(teacher: nn.Module, student: nn.Module, momentum: float):
    """Update the EMA: teacher <- momentum * teacher + (1 - momentum) * student, for all parameters."""
    # faithful: parameters only; the teacher's BatchNorm statistics come from its own passes (original main_dino.py,
    # train_one_epoch)
    averages = [parameter.data for parameter in teacher.parameters()]
    torch._foreach_mul_(averages, momentum)
    torch._foreach_add_(averages, [parameter.data for parameter in student.parameters()], alpha=1 - momentum)


class Lars(torch.optim.Optimizer):
    """LARS: SGD with momentum and, for each matrix, steps of a fixed fraction `eta` of its norm (arXiv 1708.03888).

    Parameters with one dimension have no weight decay.

    Source: original utils.py, LARS.
    """

    def __init__(self, params, lr: float, *, weight_decay: float = 0., momentum: float = .9, eta: float = .001):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, eta=eta))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group['params']:
                if parameter.grad is None:
                    continue
                step = parameter.grad
                if parameter.ndim != 1:
                    step = step + group['weight_decay'] * parameter
                    norm, step_norm = parameter.norm(), step.norm()
                    step = step * torch.where((norm > 0) & (step_norm > 0), group['eta'] * norm / step_norm, 1.)
                state = self.state[parameter]
                if 'mu' not in state:
                    state['mu'] = torch.zeros_like(parameter)
                parameter.add_(state['mu'].mul_(group['momentum']).add_(step), alpha=-group['lr'])


def add_flags(group, *, reference_batch: int):
    """Add the flags of optimizer and step; `reference_batch`: images per step that --lr refers to."""
    group.add_argument('--optimizer', default='adamw', choices=OPTIMIZERS, help='name of the optimizer')
    group.add_argument('--lr', default=.0005, type=POSITIVE,
                       help=f'peak learning rate for {reference_batch} images per step; scaled with the actual number')
    group.add_argument('--warmup-epochs', default=10, type=COUNT_OR_0, metavar='N',
                       help='epochs of the learning rate\'s warm-up; 0: none')
    group.add_argument('--min-lr', default=1e-6, type=NON_NEGATIVE, help='final learning rate, not scaled')
    group.add_argument('--weight-decay', default=.04, type=NON_NEGATIVE, help='initial weight decay')
    group.add_argument('--weight-decay-end', default=.4, type=NON_NEGATIVE, help='final weight decay')
    group.add_argument('--clip-grad', default=3., type=NON_NEGATIVE, metavar='NORM',
                       help='maximum gradient norm of each weight tensor; 0: no clipping')
    group.add_argument('--freeze-last-layer', default=1, type=COUNT_OR_0, metavar='N',
                       help='initial epochs with frozen prototypes')
