"""Division of a folder without val/ into pictures for training and pictures held out for evaluation."""
import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Iterable, Optional

from utils import InputError, first_line, write_json

FILE = 'split.json'  # in the run's folder


class Split:
    """Division of pictures into training and evaluation by name, stable when pictures are added.

    Args:
        names: names CLASS/... of all pictures, relative to the folder of class folders.
        fraction: approximate fraction of each class to hold out; at least one picture, at most all but one.
        stored: division of the resumed run, whose pictures keep their sides.
    """

    def __init__(self, names: Iterable[str], *, fraction: float, seed: int, stored: Optional[dict] = None):
        self.fraction, self.seed, self.train, self.val = fraction, seed, set(), set()
        fixed = {name: number for key, number in (('train', 1.), ('val', 0.)) for name in (stored or {}).get(key, ())}
        classes = defaultdict(dict)
        for name in names:
            classes[name.partition('/')[0]][name] = fixed[name] if name in fixed else number_of(name, seed)
        for numbers in classes.values():
            held_out = {name for name, number in numbers.items() if number < fraction}
            if not held_out and len(numbers) > 1:
                held_out = {min(numbers, key=numbers.get)}
            elif held_out == numbers.keys():
                held_out.remove(max(numbers, key=numbers.get))
            self.val |= held_out
            self.train |= numbers.keys() - held_out

    def write(self, folder: Path):
        write_json(folder / FILE, {'val_fraction': self.fraction, 'seed': self.seed,
                                   'train': sorted(self.train), 'val': sorted(self.val)})


def number_of(name: str, seed: int) -> float:
    """Return a pseudorandom number from 0 to 1 that is a function of the name and the seed."""
    digest = hashlib.blake2b(f'{seed}/{name}'.encode('utf-8', 'surrogateescape'), digest_size=8).digest()
    return int.from_bytes(digest, 'big') / 2 ** 64


def read(folder: Optional[Path]) -> Optional[dict]:
    """Read the division in a run's folder; None if there is none. Raise InputError if the file is damaged."""
    if folder is None or not (folder / FILE).is_file():
        return None
    try:
        stored = json.loads((folder / FILE).read_text())
        return {'train': list(stored['train']), 'val': list(stored['val']),
                'val_fraction': float(stored['val_fraction']), 'seed': int(stored['seed'])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f'{folder / FILE}: is not a split of pictures ({type(error).__name__} {first_line(error)})'
                         ) from None
