"""Maps over a picture, with a value or colour per patch of a model: attention, and principal components."""
from typing import List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from reports import lettering

PERCENTILES = (1, 99)  # percentiles of a map's values that count as its lowest and highest value
BRIGHTEST = 2.  # smallest value with the brightest colour, in multiples of uniform attention
OPACITY = .6  # opacity of the colours over the picture
# matplotlib's "inferno" (CC0) at 17 even steps: from dark to bright, perceptually uniform
INFERNO = ('000004 0b0724 210c4a 3d0965 57106e 71196e 8a226a a32c61 bc3754 d24644 e45a31 f1731d f98e09 fcac11 f9cb35 '
           'f2ea69 fcffa4')
COMPONENTS = 3  # as red, green and blue


def scale_to(picture: Image.Image, longer_side: int, *, multiple_of: int = 1) -> Image.Image:
    """Scale the whole picture to this longer side, in pixels; both sides are rounded to a multiple."""
    scale = longer_side / max(picture.size)
    return picture.resize([max(1, round(side * scale / multiple_of)) * multiple_of for side in picture.size],
                          Image.Resampling.BICUBIC)


def extent(values: torch.Tensor) -> np.ndarray:
    """Return the lowest and the highest value of a map without single patches that are far from the others, (2,)."""
    return np.percentile(values.numpy(), PERCENTILES)


def color_scale(maps: Sequence[torch.Tensor]) -> np.ndarray:
    """Return the values with the darkest and the brightest colour, (2,), for all maps of a sheet.

    Args:
        maps: attention in multiples of uniform attention, which is equal for every token.

    Returns:
        0, and the highest value of all maps. The brightest colour is at least twice uniform attention: maps that are
        nearly uniform have nearly one colour, and do not look like strong attention.
    """
    return np.array([0., max(BRIGHTEST, extent(torch.cat([values.flatten() for values in maps]))[1])])


def in_multiples(weights: torch.Tensor) -> torch.Tensor:
    """Return attention to patches (H, W) in multiples of uniform attention, which the CLS token has as well."""
    return weights * (1 + weights.numel())


def enlarge(weights: torch.Tensor, size: Tuple[int, int], patch_size: int) -> torch.Tensor:
    """Interpolate weights of patches (H, W) to the pixels (height, width) of a picture; `size`: (width, height)."""
    H, W = weights.shape
    # The stem's strided convolutions centre token i on pixel i * patch_size, not on the middle of a patch.
    between_tokens = ((H - 1) * patch_size + 1, (W - 1) * patch_size + 1)
    pixels = F.interpolate(weights[None, None], between_tokens, mode='bicubic', align_corners=True)
    width, height = size
    return F.pad(pixels, (0, width - pixels.shape[3], 0, height - pixels.shape[2]), mode='replicate')[0, 0]


def color_table() -> np.ndarray:
    """Return 256 colours, (256, 3), uint8."""
    anchors = np.array([list(bytes.fromhex(color)) for color in INFERNO.split()])
    at = np.linspace(0, len(anchors) - 1, 256)
    return np.stack([np.interp(at, range(len(anchors)), channel) for channel in anchors.T], axis=1).astype(np.uint8)


def paint(picture: Image.Image, weights: torch.Tensor, scale: np.ndarray, patch_size: int) -> Image.Image:
    """Draw values of patches (H, W) as colours over the grey picture; `scale`: see `color_scale`."""
    low, high = scale
    pixels = enlarge(weights, picture.size, patch_size).numpy()
    level = ((pixels - low) / max(high - low, 1e-12)).clip(0, 1)
    colors = Image.fromarray(color_table()[(level * 255).astype(np.uint8)])
    return Image.blend(picture.convert('L').convert('RGB'), colors, OPACITY)


def legend(scale: np.ndarray, size: int) -> Image.Image:
    """Draw the colours and their values in multiples of uniform attention, in letters of `size` pixels."""
    bar = Image.fromarray(color_table()[None]).resize((8 * size, size))
    after = f'{scale[1]:.1f} x uniform attention in all maps'
    start = lettering.width_of('0', size) + size // 2
    end = start + bar.width + size // 2
    line = Image.new('RGB', (end + lettering.width_of(after, size), round(1.4 * size)), 'white')
    lettering.write(line, 0, 0, '0', size, lettering.GREY)
    line.paste(bar, (start, size // 8))
    lettering.write(line, end, 0, after, size, lettering.GREY)
    return line


def enlarged(picture: Image.Image, zoom: int) -> Image.Image:
    """Repeat each pixel `zoom` times in both directions."""
    return picture.resize([zoom * side for side in picture.size], Image.Resampling.NEAREST)


def above(top: Image.Image, bottom: Image.Image, *, gap: int = 8) -> Image.Image:
    """Draw two pictures on a white page, one above the other."""
    page = Image.new('RGB', (max(top.width, bottom.width), top.height + gap + bottom.height), 'white')
    page.paste(top, (0, 0))
    page.paste(bottom, (0, top.height + gap))
    return page


def component_colors(tokens: List[torch.Tensor], *, remove_background: bool = False) -> List[np.ndarray]:
    """Compute colours from the first three principal components, common to all pictures, of patch tokens.

    Args:
        tokens: tokens of each picture (H, W, C).
        remove_background: leave out the patches that the first component separates and that are mostly at the edges.

    Returns:
        Colours of each picture (H, W, 3), from 0 to 1; the background is black.
    """
    flat = [picture.flatten(0, 1) for picture in tokens]
    shown = [torch.ones(len(rows), dtype=torch.bool) for rows in flat]
    if remove_background:
        shown = foreground(tokens, projected(flat, 1))
    values = projected([rows[kept] for rows, kept in zip(flat, shown)], COMPONENTS)
    low, high = np.percentile(torch.cat(values).numpy(), PERCENTILES, axis=0)
    colors = []
    for picture, kept, components in zip(tokens, shown, values):
        color = np.zeros((len(kept), COMPONENTS))
        level = (components.numpy() - low) / np.maximum(high - low, 1e-12)
        color[kept.numpy(), :components.shape[1]] = level.clip(0, 1)
        colors.append(color.reshape(*picture.shape[:2], COMPONENTS))
    return colors


def projected(parts: List[torch.Tensor], count: int) -> List[torch.Tensor]:
    """Project tokens (n, C) on the first principal components of all parts together: (n, count), float64.

    The sign of each component makes its skew positive.
    """
    # Part by part, to save memory in float64
    total = sum(len(part) for part in parts)
    mean = sum(part.double().sum(dim=0) for part in parts) / total
    covariance = sum((part.double() - mean).t() @ (part.double() - mean) for part in parts)
    directions = torch.linalg.eigh(covariance)[1].flip(1)[:, :count]  # eigenvalues rise
    values = [(part.double() - mean) @ directions for part in parts]
    signs = torch.where(torch.cat(values).pow(3).mean(dim=0) < 0, -1., 1.)
    return [part * signs for part in values]


def foreground(tokens: List[torch.Tensor], component: List[torch.Tensor]) -> List[torch.Tensor]:
    """Return masks (n,) of each picture's tokens: the side of a component (n, 1) with fewer tokens at the edges."""
    edge = torch.cat([edges(*picture.shape[:2]).flatten() for picture in tokens])
    values = torch.cat(component)[:, 0]
    above = values > threshold(values)
    if not above.any() or above.all():
        above = torch.ones_like(above)
    elif edge[above].float().mean() >= edge[~above].float().mean():
        above = ~above
    return list(above.split([len(part) for part in component]))


def edges(H: int, W: int) -> torch.Tensor:
    """Return the mask (H, W) of the outermost patches."""
    outer = torch.ones(H, W, dtype=torch.bool)
    outer[1:-1, 1:-1] = False
    return outer


def threshold(values: torch.Tensor) -> float:
    """Return the value that divides numbers (n,) into the two most different parts (Otsu 1979)."""
    ordered = values.sort()[0]
    count = torch.arange(1, len(ordered), dtype=values.dtype)
    below, total = ordered.cumsum(0)[:-1], ordered.sum()
    between = count * (len(ordered) - count) * (below / count - (total - below) / (len(ordered) - count)) ** 2
    return float(ordered[int(between.argmax()) if len(between) else 0])


def color_picture(colors: np.ndarray, size: Tuple[int, int], patch_size: int) -> Image.Image:
    """Interpolate colours of patches (H, W, 3), from 0 to 1, to a picture of (width, height)."""
    channels = [enlarge(torch.from_numpy(colors[:, :, i]), size, patch_size) for i in range(COMPONENTS)]
    return Image.fromarray((torch.stack(channels, dim=2).clamp(0, 1) * 255).round().byte().numpy())


def side_by_side(pictures: List[Image.Image], *, gap: int = 8, columns: Optional[int] = None) -> Image.Image:
    """Draw pictures in rows on a white page, in cells of the size of the largest picture."""
    columns = columns or len(pictures)
    width, height = (max(picture.size[axis] for picture in pictures) + gap for axis in (0, 1))
    rows = -(-len(pictures) // columns)
    page = Image.new('RGB', (columns * width - gap, rows * height - gap), 'white')
    for i, picture in enumerate(pictures):
        page.paste(picture, (i % columns * width, i // columns * height))
    return page
