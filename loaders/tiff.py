"""Pages of TIFF files: channels, depth and kind, also of pages that Pillow can't read."""
import contextlib
import dataclasses
from typing import BinaryIO, List

from PIL.TiffImagePlugin import ImageFileDirectory_v2 as Directory

from utils import counted

BEGINNINGS = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')  # the last two: BigTIFF
REDUCED, MASK = 1, 4  # bits of tag 254: a smaller version of another page, a mask
COLOURS = {2: 3, 5: 4, 6: 3, 8: 3}  # channels of the photometric interpretations that are not grey
SEPARATE = 2
KINDS = {2: ' (signed)', 3: ' (floats)'}  # kinds of numbers besides unsigned integers
READABLE = (1, 2, 5, 7, 8, 32773, 32946)  # common compressions
THREE = 'write three of the channels to a file, e.g. gdal_translate -b 4 -b 3 -b 2 -co PHOTOMETRIC=RGB IN.tif OUT.tif'
ONE = 'write one of the channels to a file, e.g. gdal_translate -b 1 IN.tif OUT.tif'
BYTES = 'convert the file, e.g. gdal_translate -ot Byte -scale IN.tif OUT.tif'


@dataclasses.dataclass(frozen=True)
class Page:
    """Page of a TIFF.

    Args:
        channels, colours: all channels; channels that are grey or colours according to the file.
        bits, kind: bits and kind of the numbers, see KINDS.
        compression: number of the compression.
        is_separate: each channel is stored as a picture of its own.
        is_extra: a smaller version of another page, or a mask.
    """
    channels: int
    colours: int
    bits: int
    kind: int
    compression: int
    is_separate: bool
    is_extra: bool

    @property
    def is_misread(self) -> bool:
        """True if Pillow would read bytes of 16 bits as numbers of 8 bits."""
        return self.is_separate and self.bits == 16 and self.channels > 1 and self.compression == 1

    @property
    def remedy(self) -> str:
        return THREE if self.channels > 3 else ONE if self.channels == 2 else BYTES

    def describe(self) -> str:
        """Return a description of a page that Pillow can't read, with a remedy; '' if the page is a common one."""
        is_common = self.channels == self.colours and self.bits <= 16 and self.compression in READABLE
        if is_common and not self.is_misread:
            return ''
        places = ' in separate planes' * self.is_separate
        compressed = '' if self.compression in READABLE else f' and compression {self.compression}'
        return (f'a TIFF of {counted(self.channels, "channel")} with {self.bits} bits{KINDS.get(self.kind, "")}{places}'
                f'{compressed}, which Pillow can\'t read: {self.remedy}')


def pages(file: BinaryIO) -> List[Page]:
    """Return the pages of an open file; empty if the file is not a TIFF. Keep the file's position."""
    place, found = file.tell(), []
    try:
        file.seek(0)
        header = file.read(8)
        if header[:4] in BEGINNINGS:
            header += file.read(8) if header[2:3] in b'+' or header[3:4] == b'+' else b''
            with contextlib.suppress(Exception):  # a damaged file has fewer pages
                read(file, Directory(header), found)
    finally:
        file.seek(place)
    return found


def read(file: BinaryIO, directory: Directory, found: List[Page]):
    """Append the pages of an open file, from the first directory on."""
    visited = set()
    while directory.next and directory.next not in visited:
        visited.add(directory.next)
        file.seek(directory.next)
        directory.load(file)
        found.append(page(directory))


def page(tags: Directory) -> Page:
    photometric, bits, kinds = tags.get(262, 0), tags.get(258, (1,)), tags.get(339, (1,))
    return Page(channels=tags.get(277, len(bits)), colours=COLOURS.get(photometric, 1), bits=max(bits), kind=max(kinds),
                compression=tags.get(259, 1), is_separate=tags.get(284, 1) == SEPARATE,
                is_extra=bool(tags.get(254, 0) & (REDUCED | MASK)))


