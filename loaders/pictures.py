"""Picture files and their conversion to RGB, for every program; docs/data.md, "Pictures", lists the rules."""
import contextlib
import functools
import logging
import os
import re
import sys
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Dict, Iterable, List, Optional, Sequence, Set, Tuple

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from loaders import tiff
from run.output import log, write_line
from run.settings import MostPixels
from utils import UnreadableImage, abridge, counted, first_line, shown

# Folders made by systems and programs, in lower case; names with a dot in front are hidden too
SYSTEM_FOLDERS = ('__macosx', '@eadir', '@tmp', '#recycle', '@recycle', '$recycle.bin', 'system volume information',
                  'lost+found', '__pycache__')
# Formats that Pillow can't decode, or only with a program that would execute the file (Ghostscript)
NOT_PICTURES = ('MPEG', 'EPS')
UNREGISTERED = ('.mpo', '.jps')  # suffixes of formats that Pillow recognises by their content only
HEIF = ('.heic', '.heif', '.hif')  # suffixes that Pillow reads with the package pillow-heif
UNKNOWN = (0, 0)  # size of a picture that can't be opened
SIXTEEN_BIT_FORMATS = ('PNG', 'PPM')  # formats whose mode `I` has 16 bits
ONE_PICTURE = ('MPO', 'PSD')  # formats whose further frames are not pictures of their own: gain maps, layers
BEGINNINGS = {  # kinds of files that are no pictures, by their first bytes in lower case
    b'version https://git-lfs': 'a Git-LFS pointer; git lfs pull downloads the file', b'%pdf': 'a PDF',
    b'\x89hdf': 'an HDF5 file', b'cdf': 'a NetCDF file', b'pk\x03\x04': 'a zip archive', b'\x1f\x8b': 'a gzip archive',
    b'<!doctype': 'a web page', b'<html': 'a web page', b'<svg': 'an SVG drawing', b'<?xml': 'an XML file'}
HEIF_BEGINNINGS = (b'ftypheic', b'ftypheix', b'ftypmif1', b'ftyphevc')
LONG = 2  # ratio of the sides from which random crops often do not fit into a picture
NUM_PROBED = 1000  # pictures that are checked before work starts
NUM_MEASURED = 20  # probed 16-bit pictures whose brightness is measured
MOST_REPORTED = 5  # pictures per process whose broken EXIF data are reported
# Transpositions that turn a picture upright, by the number of its EXIF orientation
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}
# Kinds of pictures whose conversion is logged: a description, and the conversion; {}: details of the first example
PECULIARITIES = {
    '16-bit': 'are 16-bit: values from 0 to 65535 are scaled to 0 to 255',
    '32-bit': 'are 32-bit: each is scaled by its own range: its smallest value becomes black, its largest white. '
              'Convert the pictures to 16 bits to keep their brightness',
    'transparent': 'are transparent: transparency is ignored, the stored colours are used{}',
    'channels': 'have channels that are ignored: this one has {}',
    'pages': 'have several pages or frames: this one has {}, of which the first is used. To use all, write each to a '
             'file of its own, e.g. magick IN.tif OUT-%d.png'}


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


def prepare_pillow():
    """Register the formats of other packages; let Pillow refuse pictures above MostPixels, and print nothing itself."""
    suffixes()
    if Image.MAX_IMAGE_PIXELS != MostPixels.value / 2:  # Pillow warns above this number, and raises above twice of it
        Image.MAX_IMAGE_PIXELS = MostPixels.value / 2
        warnings.filterwarnings('ignore', module=r'PIL\.')
        logging.getLogger('PIL').setLevel(logging.CRITICAL)


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
        log_once(f'{place}: {counted(sum(left_out.values()), "file", "are")} left out, which Pillow does not read: '
                 f'{counts}{remedy}')


log_once = functools.cache(log)  # a folder may be searched for training and again for evaluation


# ---------------------------------------------------------------------------------------------------------------------
# From a file to RGB

def load_rgb(path, *, upright: bool = True) -> Image.Image:
    """Decode a picture file to RGB, by default upright according to EXIF; raise UnreadableImage if Pillow can't."""
    try:
        with open(path, 'rb') as file:
            return decode(file, str(path), upright=upright)
    except Exception as error:
        raise UnreadableImage(f'unreadable image {shown(path)}: {reason_of(error)}') from None


def decode(file: BinaryIO, name: str, *, upright: bool) -> Image.Image:
    """Decode an open picture file, called `name` in messages, to RGB; raise UnreadableImage or an error of Pillow's."""
    prepare_pillow()
    try:
        image = Image.open(file)
        if image.format == 'TIFF':
            seek_main_page(image)
            if tiff.page(image.tag_v2).is_misread:
                raise UnidentifiedImageError
        return finish(image, name, upright=upright)
    except (UnidentifiedImageError, ValueError) as error:  # Pillow's message contains the open file, or its own terms
        reason = first_line(error) if isinstance(error, ValueError) else 'damaged, or not a picture that Pillow reads'
        raise UnidentifiedImageError(kind_of(file) or reason) from None


def seek_main_page(image: Image.Image):
    """Go to the first page of a TIFF that is no smaller version of another page, and no mask, if there is one."""
    if not tiff.page(image.tag_v2).is_extra:
        return
    for number in range(1, image.n_frames):
        image.seek(number)
        if not tiff.page(image.tag_v2).is_extra:
            return
    image.seek(0)


def kind_of(file: BinaryIO) -> str:
    """Return a description of an open file that Pillow can't read; '' if its kind is unknown, or common."""
    pages = tiff.pages(file)
    if pages:
        return pages[0].describe()
    file.seek(0)
    head = file.read(64)
    known = [kind for beginning, kind in BEGINNINGS.items() if head.lstrip().lower().startswith(beginning)]
    if head[4:12] in HEIF_BEGINNINGS:
        known = ['a HEIC picture, which needs pip install pillow-heif']
    return known[0] if known else '' if head else 'an empty file'


def reason_of(error: Exception) -> str:
    """Return the reason why Pillow can't read a picture."""
    if isinstance(error, Image.DecompressionBombError):
        count = re.search(r'\d+', str(error))  # Pillow's message: Image size (N pixels) exceeds limit of ...
        return f'{count[0] if count else "too many"} pixels, more than --max-pixels {MostPixels.value} allows'
    return first_line(error)


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
        write_line(f'{shown(name)}: broken EXIF data are ignored ({problem}){more}', stream=sys.stderr)


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


def header(path) -> Tuple[Dict[str, str], Tuple[int, int]]:
    """Return a picture's keys of PECULIARITIES, each with details ('' for none), and its size; see UNKNOWN.

    The size is (img_h, img_w).
    """
    prepare_pillow()
    try:
        with open(path, 'rb') as file, Image.open(file) as image:
            if image.format == 'TIFF':
                seek_main_page(image)
            return peculiarities(image, tiff.pages(file)), image.size[::-1]
    except Exception:  # reported when the picture is decoded
        return {}, UNKNOWN


def peculiarities(image: Image.Image, pages: List[tiff.Page]) -> Dict[str, str]:
    """Return the keys of PECULIARITIES of an opened picture; `pages`: of a TIFF."""
    kinds = {}
    is_grey = image.mode.startswith('I;16') or (image.mode == 'I' and image.format in SIXTEEN_BIT_FORMATS)
    if is_grey or is_reduced(image):
        kinds['16-bit'] = ''
    elif image.mode in ('I', 'F'):
        kinds['32-bit'] = ''
    main = next((page for page in pages if not page.is_extra), pages[0] if pages else None)
    channels, colours = (main.channels, main.colours) if main else (0, 0)
    if image.has_transparency_data:
        is_last = channels == colours + 1
        kinds['transparent'] = f'. This one has {channels} channels, of which the last is ignored' if is_last else ''
    if channels > colours + image.has_transparency_data:
        used = {1: 'the first is used as grey', 3: 'the first 3 are used as red, green and blue'}
        of_which = used.get(colours, 'the first 4 are used as CMYK')
        kinds['channels'] = f'{channels}, of which {of_which}. To use others, {main.remedy}'
    count = sum(not page.is_extra for page in pages) if pages else number_of_frames(image)
    if count > 1:
        kinds['pages'] = str(count)
    return kinds


def number_of_frames(image: Image.Image) -> int:
    return 1 if image.format in ONE_PICTURE else getattr(image, 'n_frames', 1)


def is_reduced(image: Image.Image) -> bool:
    """Return True if Pillow decodes channels of 16 bits to 8 bits, as it does for all modes but grey."""
    if image.mode.startswith('I') or not image.tile:
        return False
    codec, _, offset, options = image.tile[0][:4]
    if codec.startswith('ppm'):
        return options[-1] == 2 ** 16 - 1  # other maxima are the brightest value of the file
    if codec == 'jpeg2k':
        image.fp.seek(0)
        head = image.fp.read(4096)
        image.fp.seek(offset)
        return head[head.find(b'\xff\x4f\xff\x51') + 42:][:1] == b'\x0f'  # the precision of a channel, minus one
    return codec == 'SGI16' or ';16' in str(options)


def log_peculiarities(paths: list, *, with_long: bool = False):
    """Log the conversion of pictures that are not plain RGB or 8-bit grey, with the number of each kind.

    Args:
        with_long: pictures are cropped to squares; log the number of long ones.
    """
    probed = evenly_spread(paths)
    with ThreadPoolExecutor(max_workers=8) as pool:
        headers = list(pool.map(header, probed))
    kinds = [kinds for kinds, _ in headers]
    for kind, conversion in PECULIARITIES.items():
        examples = [(path, own[kind]) for path, own in zip(probed, kinds) if kind in own]
        if examples:
            (path, details), measured = examples[0], [path for path, _ in examples[:NUM_MEASURED]]
            remark = remark_on_brightness(measured) if kind == '16-bit' else ''
            log(f'{len(examples)} of {len(probed)} probed pictures (such as {shown(path)}) '
                f'{conversion.format(details)}{remark}')
    long = [(path, size) for path, (_, size) in zip(probed, headers) if is_long(*size)]
    if with_long and long:
        path, (height, width) = long[0]
        log(f'{len(long)} of {len(probed)} probed pictures (such as {shown(path)}, {width} x {height} pixels) are at '
            f'least {LONG} times as long as wide: evaluation uses the central square, and training crops that do not '
            f'fit are central, too. Cut such pictures into parts if their ends matter')


def is_long(height: int, width: int) -> bool:
    return max(height, width) >= LONG * max(1, min(height, width))


def remark_on_brightness(paths: list) -> str:
    """Return a remark on 16-bit pictures that use fewer bits and will be dark; '' for others."""
    try:
        brightest, is_estimate = max(map(brightest_value, paths))
    except Exception:  # reported when the picture is decoded
        return ''
    bits = max(8, brightest.bit_length())
    return '' if brightest >= 2 ** 14 else (
        f'. The brightest value in {len(paths)} of these pictures is {"about " * is_estimate}{brightest}: the pictures '
        f'will be dark. If the values have {bits} bits, multiply the values by {2 ** (16 - bits)}')


def brightest_value(path) -> Tuple[int, bool]:
    """Return the brightest value of a 16-bit picture but for transparency, and True if Pillow only decodes 8 bits."""
    with Image.open(path) as image:
        reduced, is_rounded = is_reduced(image), image.format == 'PPM'
        values = np.asarray(image)
        if image.mode in ('LA', 'RGBA'):
            values = values[..., :-1]
    brightest = int(values.max())
    if not reduced:
        return brightest, False
    return max(0, brightest * 257 - 128) if is_rounded else brightest * 256, True  # the smallest possible value
