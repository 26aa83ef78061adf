"""Resizing as OpenCV and mmcv do it, and resizing of maps row by row."""
from typing import Callable, Tuple

import numpy as np
import torch

BITS = 11  # of OpenCV's interpolation weights


def scaled_size(size: Tuple[int, int], short: int, longest: int) -> Tuple[int, int]:
    """Return (height, width) scaled so that the short side is `short`, or else the long side is `longest`.

    Source: mmcv 1.3 image/geometric.py, rescale_size.
    """
    scale = min(longest / max(size), short / min(size))
    height, width = (int(side * scale + .5) for side in size)
    return max(1, height), max(1, width)


def sources(length: int, out_length: int) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, for each output pixel of one axis, the input pixels before and after it, and the weight of the latter.

    Pixels outside the picture are -1 or `length`. Weights are in 2048ths.
    """
    position = ((np.arange(out_length) + .5) * (1 / (out_length / length)) - .5).astype(np.float32)  # as OpenCV rounds
    before = np.floor(position).astype(np.int64)
    return before, before + 1, np.rint((position - before.astype(np.float32)) * 2 ** BITS).astype(np.int32)


def resize(pixels: np.ndarray, size: Tuple[int, int]) -> np.ndarray:
    """Resize pixels (height, width, channels), uint8, as OpenCV's bilinear interpolation does, without antialiasing.

    Source: OpenCV imgproc/resize.cpp, INTER_LINEAR for 8 bits.
    """
    height, width = pixels.shape[:2]
    if (height, width) == tuple(size):
        return pixels
    top, bottom, down = sources(height, size[0])
    left, right, across = sources(width, size[1])
    # Rows outside the picture have a weight, unlike columns
    across = np.where((left < 0) | (right >= width), 0, across)[:, None]
    rows, inverse = np.unique(np.stack((top, bottom)).clip(0, height - 1), return_inverse=True)
    lines = pixels[rows].astype(np.int32)
    lines = (2 ** BITS - across) * lines[:, left.clip(0)] + across * lines[:, right.clip(0, width - 1)] >> 4
    top, bottom = inverse.reshape(2, -1)
    down = down[:, None, None]
    out = ((2 ** BITS - down) * lines[top] >> 16) + (down * lines[bottom] >> 16) + 2 >> 2
    return out.astype(np.uint8)


class ResizedRows:
    """Maps resized bilinearly, row by row, as by F.interpolate with align_corners=False.

    The values of a row do not depend on the rows that are computed with it.

    Args:
        rows: function from `start` and `stop` to these rows of the maps, (..., stop - start, width).
        size: height and width of the maps that `rows` returns.
        out_size: height and width of the result.
    """

    def __init__(self, rows: Callable[[int, int], torch.Tensor], size: Tuple[int, int], out_size: Tuple[int, int]):
        self.source, self.is_identity = rows, size == out_size
        self.down, self.across = (weights(length, out) for length, out in zip(size, out_size))

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        if self.is_identity:
            return self.source(start, stop)
        top, bottom, down = (values[start:stop] for values in self.down)
        first = int(top[0])
        x = self.source(first, int(bottom[-1]) + 1)
        left, right, across = (values.to(x.device) for values in self.across)
        x = x[..., left] * (1 - across) + x[..., right] * across
        top, bottom, down = (top - first).to(x.device), (bottom - first).to(x.device), down[:, None].to(x.device)
        return x[..., top, :] * (1 - down) + x[..., bottom, :] * down


def rows_of(x: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
    """Return a function from `start` and `stop` to rows of maps (..., height, width)."""
    return lambda start, stop: x[..., start:stop, :]


def weights(length: int, out_length: int) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return, for each output pixel of one axis, its two input pixels and the weight of the second."""
    position = ((torch.arange(out_length) + .5) * (length / out_length) - .5).clamp_(0, length - 1)
    first = position.long()
    return first, (first + 1).clamp_(max=length - 1), position - first
