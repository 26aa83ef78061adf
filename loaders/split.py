"""Division of a folder without val/ into pictures for training and pictures held out for evaluation."""
import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Iterable, Optional

from utils import InputError, first_line, name_bytes, write_json

FILE = 'split.json'  # in the run's folder


class Split:
    """Division of pictures into training and evaluation by the hashes of their names.

    A new picture changes the side of at most one other picture, of its class.

    Args:
        names: names CLASS/... of all pictures, relative to the folder of class folders.
        fraction: fraction of each class to hold out, to the nearest picture; at least one, at most all but one.
        stored: division of the resumed run, whose pictures keep their sides.
    """

    def __init__(self, names: Iterable[str], *, fraction: float, seed: int, stored: Optional[dict] = None):
        self.fraction, self.seed, self.train, self.val = fraction, seed, set(), set()
        train, val = (set((stored or {}).get(side, ())) for side in ('train', 'val'))
        classes = defaultdict(set)
        for name in names:
            classes[name.partition('/')[0]].add(name)
        for members in classes.values():
            ranked = sorted(members - train - val, key=lambda name: hash_of(name, seed))
            wanted = min(max(int(fraction * len(members) + .5), 1), len(members) - 1)
            held_out = (members & val) | set(ranked[:max(0, wanted - len(members & val))])
            self.val |= held_out
            self.train |= members - held_out

    def write(self, folder: Path):
        write_json(folder / FILE, {'val_fraction': self.fraction, 'seed': self.seed,
                                   'train': sorted(self.train), 'val': sorted(self.val)})


def hash_of(name: str, seed: int) -> bytes:
    return hashlib.blake2b(name_bytes(f'{seed}/{name}'), digest_size=8).digest()


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
