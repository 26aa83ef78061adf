"""Optimizer and learning rate schedule, as the shared flags describe them; both are timm's."""
import argparse

import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs

from utils import InputError, first_line

FUSED_OPTIMIZERS = ('adam', 'adamw', 'sgd')  # torch's own, which have one kernel for all parameters


def build_optimizer(args, model: torch.nn.Module, *, lr: float) -> torch.optim.Optimizer:
    """timm's optimizer `--opt` of the model's trainable parameters, vectors without decay.

    Args:
        lr: the peak learning rate, already scaled to the images of a step, where a program scales it.

    Raises:
        InputError: timm can't build it here.
    """
    try:
        kwargs = optimizer_kwargs(argparse.Namespace(**{**vars(args), 'lr': lr}))
        if args.opt.lower() in FUSED_OPTIMIZERS:
            kwargs['fused'] = True
        return create_optimizer_v2(model, **kwargs)
    except (AssertionError, ImportError, TypeError) as error:  # of another package, or without such an option
        raise InputError(f'--opt {args.opt}: timm can\'t build it here ({first_line(error)})') from None


def build_scheduler(args, optimizer: torch.optim.Optimizer):
    """A schedule with `step(epoch, accuracy)`, to be called after each epoch; `go_to(epoch)` after a restart."""
    return WarmupPlateau(args, optimizer) if args.sched == 'plateau' else ByEpoch(args, optimizer)


class ByEpoch:
    """timm's schedules, which are functions of the epoch: their options are always this command line's."""
    depends_on_the_past = False

    def __init__(self, args, optimizer: torch.optim.Optimizer):
        self.schedule = create_scheduler_v2(optimizer, **scheduler_kwargs(args))[0]

    def step(self, epoch: int, accuracy: float = 0.):
        self.schedule.step(epoch)

    def go_to(self, epoch: int):
        """Take the rate that follows the end of `epoch`; none has ended at -1."""
        if epoch >= 0:
            self.schedule.step(epoch)

    def state_dict(self) -> dict:
        return self.schedule.state_dict()

    def load_state_dict(self, state: dict):
        pass


class WarmupPlateau:
    """Linear warm-up, then a decay whenever the accuracy stops rising.

    timm's own can't be stored, ignores the cooldown and without warm-up stays at --warmup-lr.
    """
    depends_on_the_past = True

    def __init__(self, args, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self.warmup_epochs, self.warmup_lr = args.warmup_epochs, args.warmup_lr
        for group in optimizer.param_groups:  # timm's other schedules apply --layer-decay themselves
            group['lr'] *= group.get('lr_scale', 1.)
        self.base_lrs = [group['lr'] for group in optimizer.param_groups]
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, mode='max', factor=args.decay_rate, patience=args.patience_epochs,
            cooldown=args.cooldown_epochs, min_lr=args.min_lr)
        if self.warmup_epochs:
            self.warm_up(0)

    def warm_up(self, epoch: int):
        for group, base_lr in zip(self.optimizer.param_groups, self.base_lrs):
            group['lr'] = self.warmup_lr + (base_lr - self.warmup_lr) * epoch / self.warmup_epochs

    def step(self, epoch: int, accuracy: float = 0.):
        if self.warmup_epochs and epoch <= self.warmup_epochs:
            self.warm_up(epoch)
        else:
            self.plateau.step(accuracy)

    def go_to(self, epoch: int):
        """Nothing: its rate depends on what happened, and comes back with the optimizer's state."""

    def state_dict(self) -> dict:
        return self.plateau.state_dict()

    def load_state_dict(self, state: dict):
        self.plateau.load_state_dict(state)
