"""What checkpoints say of a training, others' too: in whichever types, and never an error."""
import ast
import collections
import contextlib
import json
import re
import shlex
from typing import List, Optional


def trained_with(checkpoint: dict) -> dict:
    """The flags of the training that wrote a checkpoint; empty if it does not say.

    They may be a dict, a namespace, or a command line, as a list of words or as one text.
    """
    args = checkpoint.get('args')
    if isinstance(args, str):
        args = flags_of_text(args)
    if isinstance(args, (list, tuple)):
        args = flags_of_words([str(word) for word in args])
    if isinstance(args, collections.UserDict):
        args = dict(args)
    return args if isinstance(args, dict) else getattr(args, '__dict__', {})


def flags_of_text(text: str):
    """What a text is: JSON, a printed namespace, or the words of a command line."""
    with contextlib.suppress(ValueError):
        return json.loads(text)
    with contextlib.suppress(SyntaxError, ValueError, MemoryError, RecursionError):
        call = ast.parse(text.strip(), mode='eval').body
        return literals(call) if isinstance(call, ast.Call) else ast.literal_eval(call)
    with contextlib.suppress(ValueError):
        return shlex.split(text)
    return None


def literals(call: ast.Call) -> dict:
    """The arguments of a printed call, as of Namespace(...), that are plain values."""
    found = {}
    for word in call.keywords:
        with contextlib.suppress(ValueError):
            found[word.arg] = ast.literal_eval(word.value)
    return found


def flags_of_words(words: List[str]) -> dict:
    """The flags of a command line by name, with values as JSON has them, or as text; True for those without one."""
    found = {}
    for word, after in zip(words, [*words[1:], '--']):
        if word.startswith('--'):
            name, _, value = word[2:].partition('=')
            value = value or (True if after.startswith('--') else after)
            with contextlib.suppress(ValueError, TypeError):
                value = json.loads(value)
            found[name.replace('-', '_')] = value
    return found


def evaluation_crop(trained: dict) -> float:
    """The part of an image's shorter side that a model of these flags is evaluated with."""
    is_dino = 'teacher_temp' in trained and 'out_dim' in trained  # published figures of DINO are those of this crop
    return .875 if trained.get('full_crop') is False or is_dino else 1.


def side_of(size) -> Optional[int]:
    """The side in pixels that an image size means, if it is that of a square.

    Args:
        size: a number, (height, width) or (channels, height, width), or a text of such.
    """
    if isinstance(size, str):
        size = [int(number) for number in re.findall(r'\d+', size)[:4]]
    elif hasattr(size, 'tolist'):  # an array
        size = size.tolist()
    size = size if isinstance(size, (list, tuple)) else [size]
    sides = list(size)[-2:]
    whole = all(type(side) in (int, float) and side == side // 1 > 0 for side in sides)
    return int(sides[0]) if sides and whole and len(set(sides)) == 1 else None


def names_of(classes, count: Optional[int] = None) -> Optional[List[str]]:
    """The names of the classes 0, 1, ... in whichever way a checkpoint has them; None if it has none to be used.

    Args:
        classes: names in order; a dict by number, or with numbers by name.
        count: how many classes the model has, if that is known. Names that are missing are `class N`.
    """
    if isinstance(classes, str):
        with contextlib.suppress(ValueError):
            classes = json.loads(classes)
    if isinstance(classes, str):
        words = [name.strip() for name in re.split(r'[\n,;]', classes.strip())]
        classes = words if len(words) == (count or max(len(words), 2)) else None  # or else it is another text
    if isinstance(classes, collections.UserDict):
        classes = dict(classes)
    if isinstance(classes, dict):
        by_number = {number_of(key): name for key, name in classes.items()}
        if None in by_number or (all(type(value) is int for value in classes.values())
                                 and not all(type(key) is int for key in classes)):
            by_number = {number_of(value): name for name, value in classes.items()}
        if None in by_number or len(by_number) < len(classes) or max(by_number, default=-1) >= 2 ** 20:
            return None
        classes = [by_number.get(i, f'class {i}') for i in range(max(by_number, default=-1) + 1)]
    if hasattr(classes, 'tolist'):  # an array
        classes = classes.tolist()
    if not isinstance(classes, (list, tuple)):
        return None
    names = [', '.join(map(str, name)) if isinstance(name, (list, tuple)) else str(name) for name in classes]
    if not names or (count is not None and len(names) > count):
        return None
    return names + [f'class {i}' for i in range(len(names), count or 0)]


def number_of(value) -> Optional[int]:
    """A class's number, also if it is written as text."""
    text = str(value).strip()
    return int(text) if not isinstance(value, bool) and re.fullmatch(r'\d{1,9}', text) else None
