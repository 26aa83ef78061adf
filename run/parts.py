"""Parts of a run, as its checkpoint stores them.

A part is any object with `state_dict` and `load_state_dict`; its name in `run.training.Run` is its key in the file.
These classes add what an object's own methods lack; their `load_state_dict` raises InputError without the file's name.
"""
import hashlib
import math
import os
from typing import Dict, List, Optional, Sequence

import torch

from run.descriptions import names_of
from utils import InputError, abridge, counted, first_line, name_bytes


class Optimizer:
    """Optimizer whose options come from the command line on resume; `keeps_lr`: all options but the learning rate."""
    OPTIONS = ('weight_decay', 'betas', 'eps', 'momentum', 'lr_scale')

    def __init__(self, optimizer: torch.optim.Optimizer, *, keeps_lr: bool = False):
        self.optimizer, self.options = optimizer, self.OPTIONS if keeps_lr else (*self.OPTIONS, 'lr')

    @property
    def param_groups(self) -> list:
        return self.optimizer.param_groups

    def state_dict(self) -> dict:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict):
        current = self.optimizer.param_groups
        options = [{k: v for k, v in group.items() if k in self.options} for group in current]
        try:
            # These two are set before loading, which moves the state to the device that a fused step needs.
            groups = [{**group, **{k: group_now[k] for k in ('fused', 'foreach') if k in group_now}}
                      for group, group_now in zip(state['param_groups'], current)]
            groups += state['param_groups'][len(groups):]
            self.optimizer.load_state_dict({**state, 'param_groups': groups})
        except (ValueError, KeyError) as error:
            raise InputError(f'the optimizer does not match ({first_line(error)})') from None
        for group, group_options in zip(self.optimizer.param_groups, options):
            group.update(group_options)


class Metrics(dict):
    """Numbers by name that are kept from one round to the next, such as the best accuracy."""

    def update_best(self, values: Dict[str, float], *, epoch: Optional[int] = None, larger=True) -> Optional[str]:
        """Store each value that is as good as the best value of its name.

        Args:
            values: values of one round by name, e.g. of several evaluated models; NaN is never best.
            epoch: number to store as `best_epoch` if this round is the best.
            larger: larger values are better.

        Returns:
            Name of the best value if no value of an earlier round was better; else None.
        """
        sign = 1 if larger else -1
        before = max(sign * self.get(name, -sign * math.inf) for name in values)
        for name, value in values.items():
            if sign * value >= sign * self.get(name, -sign * math.inf):
                self[name] = value
        finite = {name: value for name, value in values.items() if not math.isnan(value)}
        best = max(finite, key=lambda name: sign * finite[name], default=None)
        if best is None or sign * finite[best] < before:
            return None
        if epoch is not None:
            self['best_epoch'] = float(epoch)
        return best

    def state_dict(self) -> dict:
        return dict(self)

    def load_state_dict(self, state: dict):
        self.update(state)


class Classes:
    """Class names of a run in their order, which may not change on resume."""

    def __init__(self, names: Optional[List[str]]):
        self.names = names

    def state_dict(self) -> Optional[List[str]]:
        return self.names

    def load_state_dict(self, state):
        names = names_of(state)
        if self.names and names not in (None, self.names):
            raise InputError(f'its classes ({abridge(names, 4)}) differ from the classes of the data '
                             f'({abridge(self.names, 4)}), at least in their order')


class Images:
    """Training images of a run, which may not change on resume; `files`: paths, whose folder may change, or empty."""

    def __init__(self, count: int, files: Sequence[str]):
        self.count, self.digest = count, digest_of(files)

    def state_dict(self) -> dict:
        return {'images': self.count, 'names': self.digest}

    def load_state_dict(self, state: dict):
        if state['images'] != self.count:
            raise InputError(f'was trained on {counted(state["images"], "image")}; --data-path contains {self.count}')
        if state.get('names', self.digest) != self.digest:
            raise InputError(f'was trained on {counted(self.count, "image")} with other names than in --data-path')


def digest_of(files: Sequence[str], notes: Sequence[str] = (), *, root: str = '') -> str:
    """Return a digest of paths relative to `root` or else their common folder, each with a note if there are any."""
    root = root or os.path.commonpath([os.path.dirname(file) for file in files] or ['.'])
    paths = [os.path.relpath(file, root) for file in files]
    lines = [f'{path} {note}' for path, note in zip(paths, notes)] if notes else paths
    return hashlib.sha256(name_bytes('\n'.join(lines))).hexdigest()[:16]
