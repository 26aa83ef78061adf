"""Descriptions in checkpoints of any program, in any of their types: flags, input sizes and class names."""
import collections
import re
from typing import List, Optional


def trained_with(checkpoint: dict) -> dict:
    """Return the flags of the run that wrote a checkpoint (its `args`, a dict or a namespace), or an empty dict."""
    flags = checkpoint.get('args')
    flags = flags.data if isinstance(flags, collections.UserDict) else flags
    return flags if isinstance(flags, dict) else vars(flags) if hasattr(flags, '__dict__') else {}


def side_of(size) -> Optional[int]:
    """Return the side in pixels of a square size: a number, (height, width) or (channels, ...); else None."""
    size = size.tolist() if hasattr(size, 'tolist') else size
    sides = list(size if isinstance(size, (list, tuple)) else [size])[-2:]
    is_square = all(type(side) in (int, float) and side == side // 1 > 0 for side in sides) and len(set(sides)) == 1
    return int(sides[0]) if is_square else None


def names_of(classes, count: Optional[int] = None) -> Optional[List[str]]:
    """Return the names of the classes 0, 1, ... in a checkpoint; None if there are no valid names.

    Args:
        classes: names in order (a list or an array), a dict of names by number, or a dict of numbers by name.
        count: number of the model's classes, if known; a class without a name is `class N`.
    """
    if isinstance(classes, dict):
        by_number = {number_of(key): name for key, name in classes.items()}
        if None in by_number or (all(type(value) is int for value in classes.values())
                                 and not all(type(key) is int for key in classes)):
            by_number = {number_of(value): name for name, value in classes.items()}
        if None in by_number or len(by_number) < len(classes) or max(by_number, default=-1) >= 2 ** 20:
            return None
        classes = [by_number.get(i, f'class {i}') for i in range(max(by_number, default=-1) + 1)]
    if hasattr(classes, 'tolist'):
        classes = classes.tolist()
    if not isinstance(classes, (list, tuple)):
        return None
    names = [', '.join(map(str, name)) if isinstance(name, (list, tuple)) else str(name) for name in classes]
    if not names or (count is not None and len(names) > count):
        return None
    return names + [f'class {i}' for i in range(len(names), count or 0)]


def number_of(value) -> Optional[int]:
    """Return a number that may be written as text, as JSON's keys are; None for other values."""
    text = str(value).strip()
    return int(text) if not isinstance(value, bool) and re.fullmatch(r'\d{1,9}', text) else None
