"""Drawings over pictures: classes as colours, and a legend."""
from typing import List, Sequence, Tuple

import numpy as np
from PIL import Image, ImageDraw

from reports import lettering

INK = (20, 20, 20)


def overlay(picture: np.ndarray, classes: np.ndarray, colors: np.ndarray, *, opacity: float = .55) -> np.ndarray:
    """Paint the colour of each pixel's class over a picture, with the borders of regions in white.

    Args:
        picture: (height, width, 3), uint8.
        classes: (height, width); values beyond `colors` stay unpainted.
        colors: (K, 3), uint8.
    """
    table = np.zeros((256, 3), dtype=np.uint8)
    table[:len(colors)] = colors
    is_painted = (classes < len(colors))[..., None]
    out = np.where(is_painted, picture * (1 - opacity) + table[classes] * opacity, picture).astype(np.uint8)
    border = np.zeros(classes.shape, dtype=bool)
    border[1:] |= classes[1:] != classes[:-1]
    border[:, 1:] |= classes[:, 1:] != classes[:, :-1]
    out[border] = 255
    return out


def legend(entries: Sequence[Tuple[str, np.ndarray]], width: int, *, font: int) -> Image.Image:
    """Draw a list of texts, each beside its colour (3,), in as many columns as fit into `width` pixels."""
    line = round(1.6 * font)
    texts = [lettering.drawable(text) for text, _ in entries]
    longest = max((lettering.width_of(text, font) for text in texts), default=0) + 2.5 * font
    columns = max(1, int(width / longest))
    rows = -(-len(entries) // columns)
    page = Image.new('RGB', (max(width, round(longest)), line * rows + font), 'white')
    pen = ImageDraw.Draw(page)
    for i, (text, (_, color)) in enumerate(zip(texts, entries)):
        x, y = font // 2 + i // rows * page.width // columns, font // 2 + i % rows * line
        pen.rectangle([x, y, x + font, y + font], fill=tuple(map(int, color)), outline=INK)
        lettering.write(page, x + round(1.4 * font), y, text, font)
    return page


def stacked(pictures: List[Image.Image]) -> Image.Image:
    """Return pictures one below the other, as wide as the widest."""
    page = Image.new('RGB', (max(picture.width for picture in pictures), sum(p.height for p in pictures)), 'white')
    y = 0
    for picture in pictures:
        page.paste(picture, (0, y))
        y += picture.height
    return page
