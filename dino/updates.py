"""What happens to weights in a step of DINO: groups, clipping, the frozen last layer, LARS, and the moving average."""
from typing import Iterable, List

import torch
import torch.nn as nn


def parameter_groups(model: nn.Module) -> List[dict]:
    """Trainable parameters in two groups for an optimizer: decayed, and not.

    Source: original utils.py, get_params_groups.
    """
    # faithful: cls_token, XCA's temperature and weight_g have more than one dimension, and so are decayed
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    spared = {name for name, parameter in named if name.endswith('.bias') or parameter.ndim == 1}
    return [{'params': [parameter for name, parameter in named if name not in spared]},
            {'params': [parameter for name, parameter in named if name in spared], 'weight_decay': 0.}]


def clip_each(parameters: Iterable[nn.Parameter], largest: float) -> torch.Tensor:
    """Scale each gradient down to a largest norm of its own; 0: none.

    Returns:
        The norm of all gradients together, before.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    if largest:
        # faithful: each tensor by its own norm, and not all of them by the norm of all (original utils.py,
        # clip_gradients)
        factors = (largest / (norms + 1e-6)).clamp(max=1.)
        torch._foreach_mul_(gradients, list(factors.unbind()))
    return torch.linalg.vector_norm(norms)


def freeze_last_layer(model: nn.Module):
    """Take the gradients of the prototypes away: a step then neither moves them nor enters them into its averages."""
    for name, parameter in model.named_parameters():
        if 'last_layer' in name:
            parameter.grad = None


@torch.no_grad()
def average_into(teacher: nn.Module, student: nn.Module, momentum: float):
    """teacher <- momentum * teacher + (1 - momentum) * student, of all parameters."""
    # faithful: of parameters alone; the teacher's BatchNorm statistics come from its own passes (original
    # main_dino.py, train_one_epoch)
    averages = [parameter.data for parameter in teacher.parameters()]
    torch._foreach_mul_(averages, momentum)
    torch._foreach_add_(averages, [parameter.data for parameter in student.parameters()], alpha=1 - momentum)


class Lars(torch.optim.Optimizer):
    """Momentum whose step is, for each matrix, a fixed part of the matrix's norm (https://arxiv.org/abs/1708.03888).

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        weight_decay: of parameters with other than one dimension.
        momentum: of the steps.
        eta: the part of the norm.

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
                    norm, length = parameter.norm(), step.norm()
                    step = step * torch.where((norm > 0) & (length > 0), group['eta'] * norm / length, 1.)
                state = self.state[parameter]
                if 'mu' not in state:
                    state['mu'] = torch.zeros_like(parameter)
                parameter.add_(state['mu'].mul_(group['momentum']).add_(step), alpha=-group['lr'])
