"""Picture files: which files count as pictures, and how each becomes RGB. The same rules for every program.

docs/data.md, "Pictures", says them in words.
"""
import contextlib
import functools
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Iterable, Iterator, List, Sequence, Set, Tuple

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from run.processes import notice
from utils import UnreadableImage, abridge, first_line

# What systems and programs leave beside the users' own folders, in lower case; names with a dot in front are hidden too
SYSTEM_FOLDERS = ('__macosx', '@eadir', '@tmp', '#recycle', '@recycle', '$recycle.bin', 'system volume information',
                  'lost+found', '__pycache__')
# Formats that Pillow knows but can't decode, or only by a program that would run what is in the file (Ghostscript)
NOT_PICTURES = ('MPEG', 'EPS')
BY_ANOTHER_NAME = ('.mpo', '.jps')  # pictures that Pillow knows by their content, not by their suffix
HEIF = ('.heic', '.heif', '.hif')  # Pillow reads them with the package pillow-heif
UNKNOWN = (0, 0)  # the size of a picture that can't be opened
SIXTEEN_BIT = ('PNG', 'PPM')  # formats whose mode `I` means 16 bits
NUM_PROBED = 1000  # pictures looked at before work starts
NUM_MEASURED = 20  # of the 16-bit ones among them, those whose brightness is measured
SIXTEEN_BIT_WORDS = '16-bit: 0 to 65535 becomes 0 to 255'
MOST_TOLD = 5  # pictures of each process whose broken EXIF is reported
# What a camera did to the picture, by EXIF's number, and what undoes it
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}


# ---------------------------------------------------------------------------------------------------------------------
# Which files are pictures

@functools.cache
def suffixes() -> Set[str]:
    """Suffixes, in lower case, of the pictures that the installed Pillow can decode."""
    try:
        import pillow_heif
        pillow_heif.register_heif_opener()
    except ImportError:
        pass
    Image.init()
    stubs = {name for name, (factory, _) in Image.OPEN.items()
             if isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)}
    return {*BY_ANOTHER_NAME, *(suffix for suffix, name in Image.registered_extensions().items()
                                if name in Image.OPEN and name not in stubs and name not in NOT_PICTURES)}


def is_hidden(name: str) -> bool:
    """Whether a file or folder is not the user's own: hidden, or made by a system."""
    return name.startswith('.') or name.lower() in SYSTEM_FOLDERS


def visible_folders(folder: Path) -> List[str]:
    """Names of the folders in a folder, sorted, without hidden ones."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name))


def find(folder: Path, left_out: Counter) -> List[str]:
    """Paths of the pictures in a folder and its subfolders, in a fixed order.

    Args:
        left_out: counts the other files by suffix; hidden ones are not counted.
    """
    found = []
    for root, names in sorted(walk(folder)):
        for name in sorted(names):
            suffix = os.path.splitext(name)[1].lower()
            if suffix in suffixes():
                found.append(os.path.join(root, name))
            else:
                left_out[suffix or 'no suffix'] += 1
    return found


def walk(folder: Path) -> Iterator[Tuple[str, List[str]]]:
    """(folder, names of its files) for a folder and those in it; hidden ones are skipped, links are followed."""
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not is_hidden(name) and not leads_back(os.path.join(root, name))]
        yield root, [name for name in names if not is_hidden(name)]


def leads_back(path: str) -> bool:
    """Whether a link leads to a folder that it lies in: following it would never end."""
    return os.path.islink(path) and Path(path).resolve() in Path(path).parent.resolve().joinpath('x').parents


def notice_left_out(where: str, left_out: Counter):
    """Say which files of a folder are no pictures, if any."""
    if not left_out:
        return
    words = abridge([f'{count} {suffix}' for suffix, count in left_out.most_common()])
    remedy = '; pip install pillow-heif for .heic' if set(HEIF) & set(left_out) else ''
    count = sum(left_out.values())
    notice_once(f'{where}: {count} files are left out, as no pictures that Pillow reads: {words}{remedy}')


@functools.cache
def notice_once(words: str):
    """A folder may be looked through for training and again for evaluation."""
    notice(words)


# ---------------------------------------------------------------------------------------------------------------------
# From a file to RGB

def load_rgb(path, *, upright: bool = True) -> Image.Image:
    """Decode a picture file to RGB.

    Args:
        upright: turn it as its EXIF orientation says.

    Raises:
        UnreadableImage: not a picture, or damaged; Pillow has many exceptions for that.
    """
    try:
        with open(path, 'rb') as file:
            return decode(file, str(path), upright=upright)
    except UnidentifiedImageError:  # its own words show the open file
        raise UnreadableImage(f'unreadable image {path}: no picture that Pillow knows, or damaged') from None
    except Exception as error:
        raise UnreadableImage(f'unreadable image {path}: {first_line(error)}') from None


def decode(file: BinaryIO, name: str, *, upright: bool) -> Image.Image:
    """The same of an open file, which messages call `name`; raises whatever Pillow does."""
    suffixes()  # registers what is installed beside Pillow
    return finish(Image.open(file), name, upright=upright)


def finish(image: Image.Image, name: str, *, upright: bool) -> Image.Image:
    """An opened picture of any mode, as RGB."""
    image.load()
    sixteen_bit = image.format in SIXTEEN_BIT
    return to_rgb(turned(image, name) if upright else image, sixteen_bit=sixteen_bit)


def turned(image: Image.Image, name: str) -> Image.Image:
    """The picture upright. One whose EXIF is broken is left as it is, and reported."""
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception as error:  # SyntaxError, struct.error, ValueError, ...
        report_broken_exif(name, f'{type(error).__name__}: {first_line(error)}')
        return image
    return image if turn is None else image.transpose(turn)


@functools.cache
def report_broken_exif(name: str, problem: str):
    """On stderr, once for each picture; from MOST_TOLD of them on, no more."""
    told = report_broken_exif.cache_info().currsize
    if told < MOST_TOLD:
        more = '; further ones are not reported' if told == MOST_TOLD - 1 else ''
        print(f'{name}: its EXIF is broken ({problem}), so it is read without{more}', file=sys.stderr, flush=True)


def to_rgb(image: Image.Image, *, sixteen_bit: bool = False) -> Image.Image:
    """Bring any mode to RGB by its range.

    16-bit values are divided by 257. Those of 32 bits are scaled by the picture's own range. Transparency is ignored:
    what counts are the colours that are stored beneath it.

    Args:
        sixteen_bit: mode `I` holds 16 bits.
    """
    # differs: pictures - 16 and 32 bits keep their range; Pillow's own conversion, and so the original's, clips at 255
    if image.mode.startswith('I;16') or (image.mode == 'I' and sixteen_bit):
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert('RGB')
    if image.mode in ('I', 'F'):
        return Image.fromarray(by_own_range(np.asarray(image, np.float64))).convert('RGB')
    if image.has_transparency_data:
        # faithful: the colours beneath count, as in torchvision's loader; a background would be another picture
        image = image.convert('LA') if image.mode == 'La' else image  # Pillow converts it to nothing else
        return image.convert('RGBA').convert('RGB')
    return image.convert('RGB')


def by_own_range(values: np.ndarray) -> np.ndarray:
    """Any numbers as bytes: the least becomes 0, the largest 255; what is not finite, the nearer of them (NaN: 0)."""
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0., 0.)
    scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / ((high - low) or 1.)
    return np.rint(scaled * 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Looking at pictures before work starts

def evenly_spread(paths: Sequence, most: int = NUM_PROBED) -> list:
    """So many of the paths, or all of them if there are fewer."""
    count = min(most, len(paths))
    return [paths[len(paths) * i // count] for i in range(count)]


def sizes(paths: Iterable, *, upright: bool) -> Set[Tuple[int, int]]:
    """Decode pictures; the sizes (img_h, img_w) that they have.

    Raises:
        UnreadableImage: the first that can't be decoded.
    """
    with ThreadPoolExecutor(max_workers=8) as pool:
        return set(pool.map(lambda path: load_rgb(path, upright=upright).size[::-1], paths))


def header(path) -> Tuple[str, Tuple[int, int]]:
    """What about a picture needs a word, '' for nothing; and its (img_h, img_w), UNKNOWN if it can't be opened."""
    suffixes()
    try:
        with Image.open(path) as image:
            return peculiarity(image), image.size[::-1]
    except Exception:  # reported where it is decoded
        return '', UNKNOWN


def peculiarity(image: Image.Image) -> str:
    if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in SIXTEEN_BIT):
        return SIXTEEN_BIT_WORDS
    if image.mode in ('I', 'F'):
        return ('32-bit: each is scaled by its own range, so that its least value is black and its largest white. '
                'Convert them to 16 bits to keep their brightness')
    if image.has_transparency_data:
        return 'transparent: the colours stored beneath transparent parts are what counts'
    return ''


def notice_peculiarities(paths: list):
    """Say once how pictures that are not plain RGB or 8-bit grey are read."""
    looked_at = evenly_spread(paths)
    with ThreadPoolExecutor(max_workers=8) as pool:
        found = [(words, path) for path, (words, _) in zip(looked_at, pool.map(header, looked_at)) if words]
    for words, count in Counter(words for words, _ in found).items():
        example = next(path for kind, path in found if kind == words)
        if words == SIXTEEN_BIT_WORDS:
            words += remark_on_brightness([path for kind, path in found if kind == words][:NUM_MEASURED])
        notice(f'{count} of {len(looked_at)} pictures looked at (as {example}) are {words}')


def remark_on_brightness(paths: list) -> str:
    """Of 16-bit pictures, where they hold fewer bits and will be dark."""
    with contextlib.suppress(Exception):  # of unreadable ones, reported where they are decoded
        brightest = max(int(np.asarray(Image.open(path)).max()) for path in paths)
        if brightest < 2 ** 14:
            bits = max(8, brightest.bit_length())
            return (f'. The brightest value in {len(paths)} of them is {brightest}, so they will be dark: if they hold '
                    f'{bits} bits, multiply them by {2 ** (16 - bits)}')
    return ''

