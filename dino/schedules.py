"""Values that change while a DINO training goes on: at each step of the optimizer, or with each epoch.

Source: original utils.py, cosine_scheduler; main_dino.py, DINOLoss.
"""
import math
from typing import List


def cosine(start: float, end: float, *, steps: int, warmup_steps: int = 0) -> List[float]:
    """A value for each step: a linear warm-up from 0 to `start`, then a half cosine from there to `end`."""
    # faithful: step 0 of a warm-up has the value 0, and its last step and the first after it both have `start`
    # (original utils.py, cosine_scheduler)
    warmup = [start * i / max(warmup_steps - 1, 1) for i in range(warmup_steps)]
    left = steps - warmup_steps
    # faithful: `end` is never reached, so that the teacher's momentum stays below 1 (original utils.py)
    return warmup + [end + (start - end) * (1 + math.cos(math.pi * i / left)) / 2 for i in range(left)]


def teacher_temperatures(first: float, last: float, *, warmup_epochs: int, epochs: int) -> List[float]:
    """A temperature for each epoch: from `first` in equal steps to `last`, which the end of the warm-up has already."""
    step = (last - first) / max(warmup_epochs - 1, 1)
    return [first + step * epoch for epoch in range(warmup_epochs)] + [last] * (epochs - warmup_epochs)
