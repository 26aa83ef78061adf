"""Schedules: curves (a list with a value for each step), their use by an optimizer, and timm's schedules by epoch."""
import math
from typing import List, Optional, Sequence

import torch
from timm.scheduler import create_scheduler_v2


def cosine(start: float, end: float, *, steps: int, warmup_steps: int = 0) -> List[float]:
    """Return a linear warm-up from 0 to `start`, then half a cosine from `start` to `end`.

    Source: original DINO utils.py, cosine_scheduler.
    """
    # faithful: the first step has the value 0; the last step of the warm-up and the next step both have `start`
    # (original utils.py, cosine_scheduler)
    warmup = [start * i / max(warmup_steps - 1, 1) for i in range(warmup_steps)]
    remaining = steps - warmup_steps
    # faithful: `end` is never reached, so that the teacher's momentum stays below 1 (original utils.py)
    return warmup + [end + (start - end) * (1 + math.cos(math.pi * i / remaining)) / 2 for i in range(remaining)]


def poly(start: float, end: float, *, steps: int, power: float = 1., warmup_steps: int = 0,
         warmup_factor: float = 0.) -> List[float]:
    """Return a polynomial decay from `start` to `end`, warmed up from `warmup_factor` times the decayed value.

    Source: mmcv 1.3 hooks/lr_updater.py, PolyLrUpdaterHook.
    """
    decayed = [(start - end) * (1 - i / steps) ** power + end for i in range(steps)]
    return warmed_up(decayed, warmup_steps, warmup_factor)


def multistep(start: float, *, steps: int, milestones: Sequence[int], factor: float = .1, warmup_steps: int = 0,
              warmup_factor: float = 0.) -> List[float]:
    """Return a decay by `factor` at each milestone (a step), warmed up from `warmup_factor` times `start`.

    Source: mmcv 1.3 hooks/lr_updater.py, StepLrUpdaterHook.
    """
    decayed = [start * factor ** sum(i >= milestone for milestone in milestones) for i in range(steps)]
    return warmed_up(decayed, warmup_steps, warmup_factor)


def warmed_up(values: List[float], steps: int, factor: float) -> List[float]:
    """Multiply the first `steps` values by a factor that rises linearly from `factor` to 1."""
    return [value * (1 - (1 - i / steps) * (1 - factor)) if i < steps else value for i, value in enumerate(values)]


def ramp(first: float, last: float, *, steps: int, warmup_steps: int) -> List[float]:
    """Return equal increments from `first` to `last`, reached in the last step of the warm-up, then `last`."""
    increment = (last - first) / max(warmup_steps - 1, 1)
    return [first + increment * i for i in range(warmup_steps)] + [last] * (steps - warmup_steps)


class Schedule:
    """Learning rate and weight decay of an optimizer, set before each step.

    Args:
        lr: curve for all groups, times `lr_scale` of a group.
        weight_decay: curve for the groups with the indices `decayed`; None: weight decay is constant.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, lr: Sequence[float], *,
                 weight_decay: Optional[Sequence[float]] = None, decayed: Sequence[int] = ()):
        self.optimizer, self.lr, self.weight_decay, self.decayed = optimizer, lr, weight_decay, decayed

    def set(self, step: int):
        for group in self.optimizer.param_groups:
            group['lr'] = self.lr[step] * group.get('lr_scale', 1.)
        for index in self.decayed:  # indices, because loading a state replaces the groups
            self.optimizer.param_groups[index]['weight_decay'] = self.weight_decay[step]

    def resume(self, steps_done: int):
        """Set the values of the last finished step."""
        if steps_done:
            self.set(steps_done - 1)


def by_epoch(optimizer: torch.optim.Optimizer, *, sched: str, **options):
    """Build timm's schedule `sched` with the options of timm.scheduler.create_scheduler_v2.

    Returns:
        A schedule with `step(epoch, metric)`, to be called after each epoch, and `go_to(epoch)` for a resumed run.
    """
    if sched != 'plateau':
        return ByEpoch(create_scheduler_v2(optimizer, sched=sched, **options)[0])
    names = ('warmup_epochs', 'warmup_lr', 'decay_rate', 'patience_epochs', 'cooldown_epochs', 'min_lr')
    return WarmupPlateau(optimizer, **{name: options[name] for name in names})


class ByEpoch:
    """timm's schedules that are functions of the epoch; their options always come from the command line."""
    depends_on_the_past = False

    def __init__(self, schedule):
        self.schedule = schedule

    def step(self, epoch: int, metric: float = 0.):
        self.schedule.step(epoch)

    def go_to(self, epoch: int):
        """Set the learning rate that follows the end of `epoch`; -1: no epoch has ended."""
        if epoch >= 0:
            self.schedule.step(epoch)

    def state_dict(self) -> dict:
        return self.schedule.state_dict()

    def load_state_dict(self, state: dict):
        pass


class WarmupPlateau:
    """Linear warm-up, then a decay whenever the metric stops rising.

    timm's plateau schedule can't be stored, ignores the cooldown, and stays at `warmup_lr` without a warm-up.
    """
    depends_on_the_past = True

    def __init__(self, optimizer: torch.optim.Optimizer, *, warmup_epochs: int, warmup_lr: float, decay_rate: float,
                 patience_epochs: int, cooldown_epochs: int, min_lr: float):
        self.optimizer, self.warmup_epochs, self.warmup_lr = optimizer, warmup_epochs, warmup_lr
        for group in optimizer.param_groups:  # timm's other schedules apply --layer-decay themselves
            group['lr'] *= group.get('lr_scale', 1.)
        self.base_lrs = [group['lr'] for group in optimizer.param_groups]
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, mode='max', factor=decay_rate, patience=patience_epochs, cooldown=cooldown_epochs, min_lr=min_lr)
        if warmup_epochs:
            self.warm_up(0)

    def warm_up(self, epoch: int):
        for group, base_lr in zip(self.optimizer.param_groups, self.base_lrs):
            group['lr'] = self.warmup_lr + (base_lr - self.warmup_lr) * epoch / self.warmup_epochs

    def step(self, epoch: int, metric: float = 0.):
        if self.warmup_epochs and epoch <= self.warmup_epochs:
            self.warm_up(epoch)
        else:
            self.plateau.step(metric)

    def go_to(self, epoch: int):
        """Return without a change: the learning rate is part of the optimizer's state."""

    def state_dict(self) -> dict:
        return self.plateau.state_dict()

    def load_state_dict(self, state: dict):
        self.plateau.load_state_dict(state)
