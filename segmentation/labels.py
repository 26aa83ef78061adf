"""Label pictures: numbers in files, classes inside, and palettes.

Inside, classes are 0 to K - 1, and losses.IGNORED (255) is no class. A `Numbering` converts between both.
"""
import dataclasses
from collections import Counter
from pathlib import Path
from typing import Dict, Tuple

import numpy as np
from PIL import Image

from loaders import pictures
from segmentation.losses import IGNORED
from utils import InputError, abridge, whole_file

MODES = ('1', 'L', 'P', 'I', 'I;16', 'I;16B', 'I;16L')  # of pictures with one number for each pixel
MOST = 255  # classes: their numbers and IGNORED fit into a byte
SMALL_SHARE = .05  # of pixels with the number 0, below which 0 is no class


@dataclasses.dataclass(frozen=True)
class Numbering:
    """Numbers of classes in files.

    Args:
        values: number of each class in files.
        ignored: numbers in files that are no class.
    """
    values: Tuple[int, ...]
    ignored: Tuple[int, ...]

    def to_classes(self, numbers: np.ndarray, file: str) -> np.ndarray:
        """Convert the numbers of a file to classes (uint8); raise InputError for a number of neither kind."""
        table = np.full(2 ** 16, -1, dtype=np.int16)
        table[list(self.ignored)] = IGNORED
        table[list(self.values)] = np.arange(len(self.values))
        inside = numbers.clip(0, len(table) - 1)
        classes = table[inside]
        if (classes < 0).any() or (inside != numbers).any():
            wrong = np.unique(numbers[(classes < 0) | (inside != numbers)]).tolist()
            raise InputError(f'{file}: contains the label{"s" * (len(wrong) > 1)} {abridge(wrong)}; allowed are {self}')
        return classes.astype(np.uint8)

    def to_numbers(self, classes: np.ndarray) -> np.ndarray:
        """Convert classes 0 to K - 1 to the numbers of files."""
        return np.array(self.values, dtype=np.uint8)[classes]

    def __str__(self) -> str:
        first, last = self.values[0], self.values[-1]
        other = ' and '.join(map(str, self.ignored))
        return f'{first} to {last} for {len(self.values)} classes' + (f', {other} for none' if other else '')


def numbering(num_classes: int, *, zero_is_a_class: bool = False) -> Numbering:
    """Return the usual numbering: from 1, and 0 is no class; or from 0. 255 is no class in both."""
    first = 0 if zero_is_a_class else 1
    ignored = {0, 255} - set(range(first, first + num_classes))
    return Numbering(tuple(range(first, first + num_classes)), tuple(sorted(ignored)))


def numbering_of(counts: dict, *, zero_is_a_class) -> Tuple[Numbering, str]:
    """Derive the numbering from the pixels of each number in all label pictures.

    Args:
        counts: pixels by number.
        zero_is_a_class: value of the flag; None: 0 is a class unless it is rare and 255 does not occur.

    Returns:
        The numbering, and its reason for the log.
    """
    numbers = sorted(counts)
    if numbers == [0, 255] and zero_is_a_class is not False:
        return Numbering((0, 255), ()), 'labels are 0 and 255 alone, so both are classes'
    share = counts.get(0, 0) / sum(counts.values())
    reason = f'0 covers {100 * share:.1f} % of the pixels' + (', and 255 occurs' if 255 in counts else '')
    if zero_is_a_class is None:
        zero_is_a_class = 0 in counts and (255 in counts or share >= SMALL_SHARE)
        kind, other = ('a class', '--no-zero-is-a-class') if zero_is_a_class else ('no class', '--zero-is-a-class')
        reason += f', so 0 is {kind} (otherwise, give {other})'
    largest = max([number for number in numbers if number != 255], default=0)
    return numbering(max(largest + zero_is_a_class, 1), zero_is_a_class=zero_is_a_class), reason


def read(path: str, *, upright: bool = False) -> np.ndarray:
    """Read the numbers of a label picture, (height, width), in int32.

    Args:
        upright: turn the picture by its own EXIF orientation.

    Raises:
        InputError: the file is missing, can't be decoded, or has colours instead of numbers.
    """
    pictures.prepare_pillow()
    try:
        with Image.open(path) as picture:
            if picture.mode not in MODES:
                raise InputError(f'{path}: a label picture has one number for each pixel, not the mode {picture.mode}; '
                                 f'allowed modes: {", ".join(MODES[:5])}')
            return np.asarray(pictures.turned(picture, path) if upright else picture).astype(np.int32)
    except FileNotFoundError:
        raise InputError(f'{path}: no such label picture') from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f'{path}: can\'t be decoded as a label picture ({pictures.reason_of(error)})') from None


def palette(num_classes: int) -> np.ndarray:
    """Return a colour for each class, (K, 3), uint8: hues at the golden angle, of alternating brightness."""
    index = np.arange(num_classes)
    hue = (index * .61803398875 + .58) % 1
    saturation = np.array([.85, .6, .95, .7])[index % 4]
    value = np.array([.95, .75, .6, .85])[index // 2 % 4]
    sector = (hue * 6)[:, None] + np.array([5, 3, 1])
    channel = 1 - saturation[:, None] * np.clip(np.minimum(sector % 6, 4 - sector % 6), 0, 1)
    return np.rint(255 * value[:, None] * channel).astype(np.uint8)


def save(path: Path, classes: np.ndarray, numbers: Numbering):
    """Write classes (height, width) as a palette PNG with the numbers of files."""
    picture = Image.fromarray(numbers.to_numbers(classes), 'P')
    colors = np.zeros((256, 3), dtype=np.uint8)
    colors[list(numbers.values)] = palette(len(numbers.values))
    picture.putpalette(colors.tobytes())
    with whole_file(path) as unfinished:
        picture.save(unfinished, format='PNG')


def files_by_name(folder: Path) -> Dict[str, str]:
    """Return the label pictures of a folder and its subfolders by their relative paths without suffixes."""
    return {Path(path).relative_to(folder).with_suffix('').as_posix(): path
            for path in pictures.find(folder, Counter())}
