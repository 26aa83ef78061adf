"""What a training consists of, as its checkpoint holds it.

A part is anything with `state_dict` and `load_state_dict`; its name in `run.training.Run` is its key in the file. Here
are those that need more than the object itself. `load_state_dict` raises InputError with what is wrong about the state,
before which the run puts the file's name.
"""
import math
from typing import List, Optional

import torch

from run.descriptions import names_of
from utils import InputError, abridge, first_line


class Optimizer:
    """An optimizer whose state is stored, and whose options stay those of the command line.

    Args:
        keeps_lr: the learning rate is the stored one: it depends on what happened before.
    """
    OPTIONS = ('weight_decay', 'betas', 'eps', 'momentum', 'lr_scale')

    def __init__(self, optimizer: torch.optim.Optimizer, *, keeps_lr: bool = False):
        self.optimizer, self.options = optimizer, self.OPTIONS if keeps_lr else (*self.OPTIONS, 'lr')

    def state_dict(self) -> dict:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict):
        now = self.optimizer.param_groups
        options = [{k: v for k, v in group.items() if k in self.options} for group in now]
        try:
            # Before loading, which puts the state where a fused step looks for it.
            groups = [{**group, **{k: own[k] for k in ('fused', 'foreach') if k in own}}
                      for group, own in zip(state['param_groups'], now)]
            groups += state['param_groups'][len(groups):]
            self.optimizer.load_state_dict({**state, 'param_groups': groups})
        except (ValueError, KeyError) as error:
            raise InputError(f'its optimizer is another one ({first_line(error)})') from None
        for group, own in zip(self.optimizer.param_groups, options):
            group.update(own)


class Metrics(dict):
    """What a training has reached, by name; numbers that are kept from one epoch to the next."""

    def note_best(self, name: str, value: float, *, larger: bool = True) -> bool:
        """Keep `value` if none before was better; whether that is so."""
        best = self.get(name, -math.inf if larger else math.inf)
        if math.isnan(value) or (value < best if larger else value > best):
            return False
        self[name] = value
        return True

    def state_dict(self) -> dict:
        return dict(self)

    def load_state_dict(self, state: dict):
        self.update(state)


class Classes:
    """The names of the classes that a model is trained for, in their order: they may not change."""

    def __init__(self, names: Optional[List[str]]):
        self.names = names

    def state_dict(self) -> Optional[List[str]]:
        return self.names

    def load_state_dict(self, state):
        names = names_of(state)
        if self.names and names not in (None, self.names):
            raise InputError(f'was trained on other classes ({abridge(names, 4)}), or in another order, than these '
                             f'({abridge(self.names, 4)})')
