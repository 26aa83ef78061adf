"""Writer of uncompressed TIFF files of any number of channels, bits and pages."""
import struct
from pathlib import Path
from typing import Sequence

import numpy as np

KINDS = {'u': 1, 'i': 2, 'f': 3}  # SampleFormat of a dtype
FORMATS = {3: 'H', 4: 'I'}  # of struct, by the type of a tag


def write_tiff(path: Path, *pages: np.ndarray, photometric: int = 2, extra: Sequence[int] = (), planes: bool = False,
               compression: int = 1, order: str = '<', reduced: Sequence[int] = ()):
    """Write arrays (height, width, channels) as pages.

    Args:
        photometric: 1 for grey, 2 for RGB, 5 for CMYK.
        extra: ExtraSamples, 2 for transparency; 0 (unspecified) for each further channel if empty.
        planes: each channel is stored as a picture of its own.
        compression: tag only; the pixels are not compressed.
        order: `<` for little-endian, `>` for big-endian.
        reduced: numbers of the pages that are smaller versions of others.
    """
    out, link = bytearray(struct.pack(f'{order}2sHI', b'II' if order == '<' else b'MM', 42, 0)), 4
    for number, array in enumerate(pages):
        height, width, channels = array.shape
        pixels = (np.moveaxis(array, 2, 0) if planes else array).astype(array.dtype.newbyteorder(order)).tobytes()
        strips = channels if planes else 1
        unspecified = [0] * (channels - {1: 1, 2: 3, 5: 4}[photometric])
        tags = {254: (4, [int(number in reduced)]), 256: (4, [width]), 257: (4, [height]),
                258: (3, [array.itemsize * 8] * channels), 259: (3, [compression]), 262: (3, [photometric]),
                273: (4, [len(out) + i * len(pixels) // strips for i in range(strips)]), 277: (3, [channels]),
                278: (4, [height]), 279: (4, [len(pixels) // strips] * strips), 284: (3, [1 + planes]),
                338: (3, extra or unspecified), 339: (3, [KINDS[array.dtype.kind]] * channels)}
        out += pixels + b'\0' * (len(pixels) % 2)
        entries = b''
        for tag, (kind, values) in tags.items():
            packed = struct.pack(f'{order}{len(values)}{FORMATS[kind]}', *values)
            if len(packed) > 4:
                place, out = len(out), out + packed + b'\0' * (len(packed) % 2)
                packed = struct.pack(f'{order}I', place)
            if values:
                entries += struct.pack(f'{order}HHI', tag, kind, len(values)) + packed.ljust(4, b'\0')
        struct.pack_into(f'{order}I', out, link, len(out))
        out += struct.pack(f'{order}H', len(entries) // 12) + entries + bytes(4)
        link = len(out) - 4
    path.write_bytes(out)
