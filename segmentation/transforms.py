"""Preparation of pictures and labels for training and for tests.

Pictures are (height, width, 3) in uint8, labels (height, width) in uint8. Source: mmseg 0.11 datasets/pipelines.
"""
import dataclasses
from typing import Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image

from dense.resize import resize, scaled_size
from loaders.transforms import Mean, ToNormalizedTensor
from segmentation.losses import IGNORED

SHORT, LONG = 512, 2048  # sides of a resized picture, at most
RATIOS = (.5, 2.)  # of the resized sides in training
CROP_TRIES = 10
CATEGORY_SHARE = .75  # of a crop's pixels with a class, below which the largest class stays
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32., (.5, 1.5), (.5, 1.5), 18  # hue in 180ths of a turn


def nearest(labels: np.ndarray, size: Tuple[int, int]) -> np.ndarray:
    """Resize labels as OpenCV's nearest neighbour does, which rounds positions down."""
    rows, columns = (np.minimum((np.arange(out) * (length / out)).astype(np.int64), length - 1)
                     for length, out in zip(labels.shape, size))
    return labels[rows[:, None], columns]


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Random scale, crop, flip and colours.

    Args:
        crop: side of the square crop, in pixels.
        short, longest: sides of a picture at the ratio 1.
        ratios: least and largest ratio.
        mean, std: normalisation of each channel; None: ImageNet's.
    """
    crop: int
    short: int = SHORT
    longest: int = LONG
    ratios: Tuple[float, float] = RATIOS
    mean: Mean = None
    std: Mean = None

    def __call__(self, picture: np.ndarray, labels: np.ndarray) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return a normalised image (3, crop, crop) and its labels (crop, crop)."""
        ratio = np.random.uniform(*self.ratios)
        size = scaled_size(labels.shape, int(self.short * ratio), int(self.longest * ratio))
        picture, labels = resize(picture, size), nearest(labels, size)
        rows, columns = random_crop(labels, self.crop)
        picture, labels = picture[rows, columns], labels[rows, columns]
        if np.random.random() < .5:
            picture, labels = picture[:, ::-1], labels[:, ::-1]
        picture = distort(np.ascontiguousarray(picture))
        image = torch.zeros(3, self.crop, self.crop)
        padded = np.full((self.crop, self.crop), IGNORED, dtype=np.uint8)
        height, width = labels.shape
        image[:, :height, :width] = ToNormalizedTensor(self.mean, self.std)(picture)
        padded[:height, :width] = labels
        return image, torch.from_numpy(padded)


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """Resizing to a short side, without padding.

    Args:
        short, longest: sides of the resized picture; `short` None: the picture keeps its size.
        mean, std: normalisation of each channel; None: ImageNet's.
    """
    short: Optional[int] = SHORT
    longest: int = LONG
    mean: Mean = None
    std: Mean = None

    def __call__(self, picture: np.ndarray, *, ratio: float = 1.) -> torch.Tensor:
        """Return the normalised image (3, img_h, img_w) of a picture resized by `ratio`."""
        size = picture.shape[:2]
        if self.short is not None:
            size = scaled_size(size, int(self.short * ratio), int(self.longest * ratio))
        elif ratio != 1:
            size = tuple(max(1, int(side * ratio + .5)) for side in size)
        return ToNormalizedTensor(self.mean, self.std)(resize(picture, size))


def random_crop(labels: np.ndarray, side: int) -> Tuple[slice, slice]:
    """Draw a crop until no class covers CATEGORY_SHARE of its pixels that have a class; the last try counts."""
    for _ in range(CROP_TRIES):
        top, left = (np.random.randint(0, max(length - side, 0) + 1) for length in labels.shape)
        crop = slice(top, top + side), slice(left, left + side)
        counts = np.bincount(labels[crop].ravel(), minlength=IGNORED + 1)[:IGNORED]
        if np.count_nonzero(counts) > 1 and counts.max() < CATEGORY_SHARE * counts.sum():
            break
    return crop


def distort(picture: np.ndarray) -> np.ndarray:
    """Change brightness, contrast, saturation and hue, each with probability 1/2, contrast before or after colours."""
    def with_probability(function, picture: np.ndarray, *args) -> np.ndarray:
        return function(picture, *args) if np.random.randint(2) else picture

    picture = with_probability(scale_values, picture, (1., 1.), (-BRIGHTNESS, BRIGHTNESS))
    contrast_first = np.random.randint(2)
    if contrast_first:
        picture = with_probability(scale_values, picture, CONTRAST)
    picture = with_probability(scale_saturation, picture)
    picture = with_probability(turn_hue, picture)
    return picture if contrast_first else with_probability(scale_values, picture, CONTRAST)


def scale_values(values: np.ndarray, factors: Sequence[float], offsets: Sequence[float] = (0., 0.)) -> np.ndarray:
    """Multiply by a random factor and add a random offset."""
    table = np.arange(256) * np.random.uniform(*factors) + np.random.uniform(*offsets)
    return table.clip(0, 255).astype(np.uint8)[values]


def scale_saturation(picture: np.ndarray) -> np.ndarray:
    hsv = np.array(Image.fromarray(picture).convert('HSV'))
    hsv[..., 1] = scale_values(hsv[..., 1], SATURATION)
    return np.asarray(Image.fromarray(hsv, 'HSV').convert('RGB'))


def turn_hue(picture: np.ndarray) -> np.ndarray:
    hsv = np.array(Image.fromarray(picture).convert('HSV'))
    hsv[..., 0] += np.uint8(round(np.random.randint(-HUE, HUE) * 256 / 180) % 256)  # Pillow's hue has 256 steps a turn
    return np.asarray(Image.fromarray(hsv, 'HSV').convert('RGB'))
