"""Names in reports: visible spaces, escapes of invisible characters, and letters that fonts have."""
import contextlib
import functools
import math
import re
import unicodedata
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Optional, Tuple

from PIL import Image, ImageDraw, ImageFont

from utils import decodable

SPACE = '␣'  # for spaces at the ends of a name, and repeated spaces
INVISIBLE = {'Cc', 'Cf', 'Cn', 'Co', 'Cs', 'Zl', 'Zp', 'Zs'}  # Unicode categories
ELLIPSIS = '…'
GREY = (110, 110, 110)


def visible(name: str) -> str:
    """Return a name in which spaces at the ends, repeated spaces and invisible characters can be seen."""
    text = re.sub('^ +| +$| {2,}', lambda spaces: SPACE * len(spaces[0]), decodable(name))
    return ''.join(c if c == ' ' or unicodedata.category(c) not in INVISIBLE else escape(c) for c in text) or '""'


def distinct(names: List[str]) -> List[str]:
    """Return visible names; names that look alike get their numbers, from 0."""
    shown = list(map(visible, names))
    alike = repeated(unicodedata.normalize('NFC', name) for name in shown)
    return [f'{name} (#{i})' if i in alike else name for i, name in enumerate(shown)]


def repeated(texts: Iterable[str]) -> Dict[int, List[int]]:
    """Return for the number of each text that is not the only one: the numbers of all texts that are equal to it."""
    numbers = {}
    for i, text in enumerate(texts):
        numbers.setdefault(text, []).append(i)
    return {i: same for same in numbers.values() if len(same) > 1 for i in same}


def escape(text: str) -> str:
    return text.encode('unicode_escape').decode()


def abridged(text: str, most: int) -> str:
    """Replace the middle of a text of more than `most` characters by an ellipsis."""
    if len(text) <= most:
        return text
    head = most // 2
    return f'{text[:head]}{ELLIPSIS}{text[len(text) - (most - 1 - head):]}'


def all_abridged(names: List[str], most: int) -> List[str]:
    """Abridge different names so that they stay different."""
    short = [abridged(name, most) for name in names]
    for i, same in repeated(short).items():
        first, last = min(names[j] for j in same), max(names[j] for j in same)
        common = next((k for k, pair in enumerate(zip(first, last)) if pair[0] != pair[1]), len(first))
        rest = names[i][max(0, common - most // 2):]
        short[i] = ELLIPSIS + (rest if len(rest) < most else rest[:most - 2] + ELLIPSIS)
    alike = repeated(short)
    return [names[i] if i in alike else name for i, name in enumerate(short)]


# ---------------------------------------------------------------------------------------------------------------------
# Fonts

@functools.lru_cache(None)
def font_files() -> Dict[str, str]:
    """Return the files of fonts by name: DejaVu Sans of matplotlib, then the system's; none without matplotlib."""
    with contextlib.suppress(Exception):  # not installed, or broken
        import matplotlib
        from matplotlib import font_manager
        own = str(Path(matplotlib.get_data_path()))  # whose other fonts have symbols in the place of letters
        entries = sorted(font_manager.fontManager.ttflist,
                         key=lambda font: (font.style != 'normal', font.weight not in (400, 'normal', 'regular')))
        first = {'DejaVu Sans': font_manager.findfont('DejaVu Sans')}
        return {**{font.name: font.fname for font in reversed(entries) if not font.fname.startswith(own)
                   and not re.search('last ?resort|emoji', font.fname, re.IGNORECASE)}, **first}
    return {}


@functools.lru_cache(None)
def letters_of(file: str) -> frozenset:
    """Return the code points that a font has."""
    from matplotlib import font_manager
    try:
        return frozenset(font_manager.get_font(file).get_charmap())
    except Exception:  # formats that FreeType can't read
        return frozenset()


@functools.lru_cache(None)
def font_with(character: str) -> Optional[str]:
    """Return the name of a font with this character; None: there is none."""
    names = sorted(font_files(), key=lambda name: (name != 'DejaVu Sans', name))
    return next((name for name in names if ord(character) in letters_of(font_files()[name])), None)


def drawable(text: str) -> str:
    r"""Replace characters that no font has by escapes, such as \u4e2d."""
    if not font_files():  # Pillow's own font
        return ''.join(c if ord(c) < 256 else '...' if c == ELLIPSIS else '_' if c == SPACE else escape(c)
                       for c in text)
    return ''.join(c if font_with(c) else escape(c) for c in text)


def families(texts: List[str]) -> List[str]:
    """Return the names of the fonts that matplotlib needs for drawable texts, in order of preference."""
    return list(dict.fromkeys(['DejaVu Sans', *filter(None, map(font_with, sorted(set(''.join(texts)))))]))


# ---------------------------------------------------------------------------------------------------------------------
# Text on pictures of Pillow

@functools.lru_cache(None)
def font_of(name: Optional[str], size: int) -> ImageFont.FreeTypeFont:
    """Load a font by its name; None, or a font that Pillow can't read: Pillow's own."""
    if name is not None:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(font_files()[name], size)
    return ImageFont.load_default(size)


def pieces(text: str, size: int) -> Iterator[Tuple[str, ImageFont.FreeTypeFont]]:
    """Yield the parts of a drawable text with the fonts that have their letters."""
    part, name = '', font_with(text[0]) if text and font_files() else None
    for character in text:
        other = font_with(character) if font_files() else None
        if other != name:
            yield part, font_of(name, size)
            part, name = '', other
        part += character
    if part:
        yield part, font_of(name, size)


def width_of(text: str, size: int) -> int:
    """Return the width of a text in pixels, as `write` draws it."""
    return math.ceil(sum(font.getlength(part) for part, font in pieces(drawable(text), size)))


def wrapped(text: str, size: int, width: int, *, most: int = 2) -> List[str]:
    """Break a text into up to `most` lines of a width in pixels; the end of a longer text is kept."""
    lines, rest = [], text
    while rest and len(lines) < most - 1:
        count = len(rest)
        while count > 1 and width_of(rest[:count], size) > width:
            count -= 1
        lines.append(rest[:count])
        rest = rest[count:]
    count = len(rest)
    while count > 1 and width_of(abridged(rest, count), size) > width:
        count -= 1
    return lines + ([abridged(rest, count)] if rest or not lines else [])


def write(page: Image.Image, x: float, y: float, text: str, size: int, color='black'):
    """Draw a text, whose letters are `size` pixels high, below and to the right of a point."""
    draw, baseline = ImageDraw.Draw(page), y + size
    for part, font in pieces(drawable(text), size):
        draw.text((x, baseline), part, color, font, anchor='ls')
        x += font.getlength(part)


def captioned(picture: Image.Image, texts: List[str], *, size: int = 12) -> Image.Image:
    """Draw a picture above texts, of which each has up to two lines as wide as the picture."""
    lines = [line for text in texts for line in wrapped(text, size, picture.width)]
    page = Image.new('RGB', (picture.width, picture.height + round(1.35 * size * len(lines)) + 2), 'white')
    page.paste(picture, (0, 0))
    for i, line in enumerate(lines):
        write(page, 0, picture.height + 1 + round(1.35 * size * i), line, size)
    return page
