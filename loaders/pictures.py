"""Picture files and their conversion to RGB, for every program; docs/data.md, "Pictures", lists the rules."""
import contextlib
import functools
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Iterable, List, Optional, Sequence, Set, Tuple

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from run.output import log, write_line
from utils import UnreadableImage, abridge, first_line

# Folders made by systems and programs, in lower case; names with a dot in front are hidden too
SYSTEM_FOLDERS = ('__macosx', '@eadir', '@tmp', '#recycle', '@recycle', '$recycle.bin', 'system volume information',
                  'lost+found', '__pycache__')
# Formats that Pillow can't decode, or only with a program that would execute the file (Ghostscript)
NOT_PICTURES = ('MPEG', 'EPS')
UNREGISTERED = ('.mpo', '.jps')  # suffixes of formats that Pillow recognises by their content only
HEIF = ('.heic', '.heif', '.hif')  # suffixes that Pillow reads with the package pillow-heif
UNKNOWN = (0, 0)  # size of a picture that can't be opened
SIXTEEN_BIT_FORMATS = ('PNG', 'PPM')  # formats whose mode `I` has 16 bits
NUM_PROBED = 1000  # pictures that are checked before work starts
NUM_MEASURED = 20  # probed 16-bit pictures whose brightness is measured
MOST_REPORTED = 5  # pictures per process whose broken EXIF data are reported
# Transpositions that turn a picture upright, by the number of its EXIF orientation
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}
# Kinds of pictures whose conversion is logged
PECULIARITIES = {
    '16-bit': 'values from 0 to 65535 are scaled to 0 to 255',
    '32-bit': 'each is scaled by its own range: its smallest value becomes black, its largest white. Convert the '
              'pictures to 16 bits to keep their brightness',
    'transparent': 'transparency is ignored, the stored colours are used'}


# ---------------------------------------------------------------------------------------------------------------------
# Files that are pictures

@functools.cache
def suffixes() -> Set[str]:
    """Return the suffixes, in lower case, of the pictures that the installed Pillow can decode."""
    with contextlib.suppress(ImportError):
        import pillow_heif
        pillow_heif.register_heif_opener()
    Image.init()
    stubs = {name for name, (factory, _) in Image.OPEN.items()
             if isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)}
    return {*UNREGISTERED, *(suffix for suffix, name in Image.registered_extensions().items()
                             if name in Image.OPEN and name not in stubs and name not in NOT_PICTURES)}


def is_hidden(name: str) -> bool:
    """Return True if a file or folder is hidden, or made by a system."""
    return name.startswith('.') or name.lower() in SYSTEM_FOLDERS


def visible_folders(folder: Path) -> List[str]:
    """Return the names of the folders in a folder, sorted, without hidden folders."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name))


def find(folder: Path, left_out: Counter) -> List[str]:
    """Return the sorted paths of pictures in a folder and its subfolders; count other files by suffix in `left_out`."""
    files, paths = [], []
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not is_hidden(name) and not leads_back(os.path.join(root, name))]
        files += [(root, name) for name in names if not is_hidden(name)]
    for root, name in sorted(files):
        suffix = os.path.splitext(name)[1].lower()
        if suffix in suffixes():
            paths.append(os.path.join(root, name))
        else:
            left_out[suffix or 'no suffix'] += 1
    return paths


def leads_back(path: str) -> bool:
    """Return True if `path` is a link to a folder that contains the link; to follow this link would never end."""
    return os.path.islink(path) and Path(path).resolve() in Path(path).parent.resolve().joinpath('x').parents


def log_left_out(place: str, left_out: Counter):
    """Log the numbers of files of a folder that are not pictures, if there are any."""
    if left_out:
        counts = abridge([f'{count} {suffix}' for suffix, count in left_out.most_common()])
        remedy = '; for .heic: pip install pillow-heif' if set(HEIF) & set(left_out) else ''
        log_once(f'{place}: {sum(left_out.values())} files are not pictures that Pillow reads, and are left out: '
                 f'{counts}{remedy}')


log_once = functools.cache(log)  # a folder may be searched for training and again for evaluation


# ---------------------------------------------------------------------------------------------------------------------
# From a file to RGB

def load_rgb(path, *, upright: bool = True) -> Image.Image:
    """Decode a picture file to RGB, by default upright according to EXIF; raise UnreadableImage if Pillow can't."""
    try:
        with open(path, 'rb') as file:
            return decode(file, str(path), upright=upright)
    except UnidentifiedImageError:  # Pillow's message contains the open file
        raise UnreadableImage(f'unreadable image {path}: damaged, or not a picture that Pillow reads') from None
    except Exception as error:
        raise UnreadableImage(f'unreadable image {path}: {first_line(error)}') from None


def decode(file: BinaryIO, name: str, *, upright: bool) -> Image.Image:
    """Decode an open picture file, called `name` in messages, to RGB; raise any error of Pillow's."""
    suffixes()  # registers the formats of other packages
    return finish(Image.open(file), name, upright=upright)


def finish(image: Image.Image, name: str, *, upright: bool) -> Image.Image:
    """Convert an opened picture of any mode to RGB."""
    image.load()
    sixteen_bit = image.format in SIXTEEN_BIT_FORMATS  # a turned picture has no format
    return to_rgb(turned(image, name) if upright else image, sixteen_bit=sixteen_bit)


def turned(image: Image.Image, name: str) -> Image.Image:
    """Return a picture upright, or unchanged if its EXIF data are broken, which is reported."""
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception as error:  # SyntaxError, struct.error, ValueError, ...
        report_broken_exif(name, f'{type(error).__name__}: {first_line(error)}')
        return image
    return image if turn is None else image.transpose(turn)


@functools.cache
def report_broken_exif(name: str, problem: str):
    """Report broken EXIF data on stderr, once for each picture, for MOST_REPORTED pictures."""
    reported = report_broken_exif.cache_info().currsize
    if reported < MOST_REPORTED:
        more = '; further pictures are not reported' if reported == MOST_REPORTED - 1 else ''
        write_line(f'{name}: broken EXIF data are ignored ({problem}){more}', stream=sys.stderr)


def to_rgb(image: Image.Image, *, sixteen_bit: bool = False) -> Image.Image:
    """Convert any mode to RGB; divide 16 bits (`I` if `sixteen_bit`) by 257, scale 32 bits by the picture's range."""
    # differs: pictures - 16 and 32 bits keep their range; Pillow, which the original uses, clips at 255
    if image.mode.startswith('I;16') or (image.mode == 'I' and sixteen_bit):
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert('RGB')
    if image.mode in ('I', 'F'):
        return Image.fromarray(scaled_by_range(np.asarray(image, np.float64))).convert('RGB')
    if image.has_transparency_data:
        # faithful: transparency is ignored, as in torchvision's loader; the stored colours are used
        image = image.convert('LA') if image.mode == 'La' else image  # Pillow's only conversion of this mode
        return image.convert('RGBA').convert('RGB')
    return image.convert('RGB')


def scaled_by_range(values: np.ndarray) -> np.ndarray:
    """Scale numbers to bytes, the smallest to 0, the largest to 255; clip infinities, replace NaN by the smallest."""
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0., 0.)
    scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / ((high - low) or 1.)
    return np.rint(scaled * 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Checks before work starts

def evenly_spread(paths: Sequence, most: Optional[int] = None) -> list:
    """Return at most `most` of the paths, evenly spread; None: at most NUM_PROBED."""
    count = min(NUM_PROBED if most is None else most, len(paths))
    return [paths[len(paths) * i // count] for i in range(count)]


def sizes(paths: Iterable, *, upright: bool) -> Set[Tuple[int, int]]:
    """Decode pictures, and return their sizes (img_h, img_w); raise UnreadableImage if a picture is unreadable."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        return set(pool.map(lambda path: load_rgb(path, upright=upright).size[::-1], paths))


def header(path) -> Tuple[str, Tuple[int, int]]:
    """Return a picture's key of PECULIARITIES ('' for none) and its size (img_h, img_w), UNKNOWN if unreadable."""
    suffixes()  # registers the formats of other packages
    try:
        with Image.open(path) as image:
            if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in SIXTEEN_BIT_FORMATS):
                kind = '16-bit'
            elif image.mode in ('I', 'F'):
                kind = '32-bit'
            else:
                kind = 'transparent' if image.has_transparency_data else ''
            return kind, image.size[::-1]
    except Exception:  # reported when the picture is decoded
        return '', UNKNOWN


def log_peculiarities(paths: list):
    """Log the conversion of pictures that are not plain RGB or 8-bit grey, with the number of each kind."""
    probed = evenly_spread(paths)
    with ThreadPoolExecutor(max_workers=8) as pool:
        kinds = [kind for kind, _ in pool.map(header, probed)]
    for kind in filter(None, dict.fromkeys(kinds)):
        examples = [path for path, other in zip(probed, kinds) if other == kind]
        remark = remark_on_brightness(examples[:NUM_MEASURED]) if kind == '16-bit' else ''
        log(f'{len(examples)} of {len(probed)} probed pictures (such as {examples[0]}) are {kind}: '
            f'{PECULIARITIES[kind]}{remark}')


def remark_on_brightness(paths: list) -> str:
    """Return a remark on 16-bit pictures that use fewer bits and will be dark; '' for others."""
    try:
        brightest = max(int(np.asarray(Image.open(path)).max()) for path in paths)
    except Exception:  # reported when the picture is decoded
        return ''
    bits = max(8, brightest.bit_length())
    return '' if brightest >= 2 ** 14 else (
        f'. The brightest value in {len(paths)} of these pictures is {brightest}: the pictures will be dark. If the '
        f'values have {bits} bits, multiply the values by {2 ** (16 - bits)}')
