"""Pictures that a training sets aside for its evaluation, where a folder has no `val`."""
import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Iterable, Optional, Set

from utils import InputError, first_line, write_json

FILE = 'split.json'  # in the run's folder


class Split:
    """Which pictures are for training and which for evaluation.

    It is decided by the names alone: where others come later, a picture keeps its side.

    Args:
        names: of all pictures, CLASS/..., as they lie under the folder of class folders.
        fraction: of each class, about, that is for evaluation. It is at least one picture, and leaves at least one.
        seed: other seeds give other sides.
        stored: the split of the run that goes on, whose pictures keep their sides.
    """

    def __init__(self, names: Iterable[str], *, fraction: float, seed: int, stored: Optional[dict] = None):
        self.fraction, self.seed = fraction, seed
        known = stored or {'train': [], 'val': []}
        train, val = set(known['train']), set(known['val'])
        classes = defaultdict(dict)
        for name in names:
            classes[name.partition('/')[0]][name] = (0. if name in val else 1. if name in train else
                                                     number_of(name, seed))
        self.train, self.val = set(), set()
        for numbers in classes.values():
            held_out = {name for name, number in numbers.items() if number < fraction}
            if not held_out and len(numbers) > 1:
                held_out = {min(numbers, key=numbers.get)}
            elif held_out == numbers.keys():
                held_out.remove(max(numbers, key=numbers.get))
            self.val |= held_out
            self.train |= numbers.keys() - held_out

    def side(self, is_train: bool) -> Set[str]:
        return self.train if is_train else self.val

    def write(self, folder: Path):
        write_json(folder / FILE, {'val_fraction': self.fraction, 'seed': self.seed,
                                   'train': sorted(self.train), 'val': sorted(self.val)})


def number_of(name: str, seed: int) -> float:
    """From 0 to 1, as if at random, but always the same for a name."""
    digest = hashlib.blake2b(f'{seed}/{name}'.encode('utf-8', 'surrogateescape'), digest_size=8).digest()
    return int.from_bytes(digest, 'big') / 2 ** 64


def read(folder: Optional[Path]) -> Optional[dict]:
    """The split that a run's folder holds, if any.

    Raises:
        InputError: it is damaged.
    """
    path = folder and folder / FILE
    if path is None or not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text())
        return {'train': list(stored['train']), 'val': list(stored['val']),
                'val_fraction': float(stored['val_fraction']), 'seed': int(stored['seed'])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f'{path}: is not a split of pictures ({type(error).__name__} {first_line(error)})') from None
