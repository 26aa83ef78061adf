"""Crops of an image for DINO: two global crops, and smaller local crops.

Source: paper section 3.1; original main_dino.py, DataAugmentationDINO.
"""
import math
from typing import List, Optional, Sequence, Tuple

import torch
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from loaders import pictures
from loaders.transforms import ToNormalizedTensor

BLUR_RADIUS = (.1, 2.)  # pixels, for crops of any size
JITTER_PROBABILITY = .8
ATTEMPTS = 10  # areas and ratios that are drawn for a crop
SOLARIZE_FROM = 128  # brightness


class RandomResizedCrop(transforms.RandomResizedCrop):
    """torchvision's crop, at a random place of long pictures too: see pictures.is_long."""

    @staticmethod
    def get_params(img: Image.Image, scale: Sequence[float], ratio: Sequence[float]) -> Tuple[int, int, int, int]:
        """Return top, left, height and width of a crop with random area and ratio."""
        width, height = transforms.functional.get_image_size(img)
        if not pictures.is_long(height, width):
            return transforms.RandomResizedCrop.get_params(img, scale, ratio)
        for _ in range(ATTEMPTS):  # as torchvision
            area, shape = width * height * uniform(*scale), log_uniform(*ratio)
            w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
            if 0 < w <= width and 0 < h <= height:
                break
        else:
            # differs: DINO crops - if no area fits in ten attempts, torchvision takes the central rectangle: for 15 %
            # of the crops at 2:1, 90 % at 3:1, all beyond 10:3. Both global crops are then equal
            w, h = fitting_size(width, height, scale, ratio)
        return place(height - h), place(width - w), h, w


def fitting_size(width: int, height: int, scale: Sequence[float], ratio: Sequence[float]) -> Tuple[int, int]:
    """Return width and height of a crop of a long picture, with `scale` and `ratio` limited to values that fit."""
    if width < height:
        return fitting_size(height, width, scale, [1 / ratio[1], 1 / ratio[0]])[::-1]
    largest = ratio[1] * height / width
    part = uniform(min(scale[0], largest), min(scale[1], largest))
    shape = log_uniform(min(max(ratio[0], part * width / height), ratio[1]), ratio[1])
    area = part * width * height
    return max(1, round(math.sqrt(area * shape))), max(1, min(height, round(math.sqrt(area / shape))))


def uniform(low: float, high: float) -> float:
    return torch.empty(1).uniform_(low, high).item()


def log_uniform(low: float, high: float) -> float:
    return torch.exp(torch.empty(1).uniform_(*torch.log(torch.tensor([low, high])))).item()


def place(free: int) -> int:
    return torch.randint(0, free + 1, size=(1,)).item()


def blurred(image: Image.Image) -> Image.Image:
    """Blur a picture by a Gaussian of random radius."""
    # differs: DINO crops - from torch's generator; the original's Python generator was never seeded
    low, high = BLUR_RADIUS
    return image.filter(ImageFilter.GaussianBlur(low + (high - low) * float(torch.rand(()))))


class Crops:
    """Transform of an RGB image to its crops: normalised tensors (3, side, side), the global crops first.

    Args:
        global_size, local_size: sides in pixels.
        local_count: number of local crops.
        global_scale, local_scale: smallest and largest fraction of the image's area in a crop.
        flip, grayscale, solarize: probabilities; only the second global crop is solarized.
        color_jitter: strengths for brightness, contrast, saturation and hue.
        blur: probabilities for the first global crop, the second, and local crops.
        mean, std: normalisation of each channel; None: ImageNet's.
    """

    def __init__(self, *, global_size: int, local_size: int, local_count: int, global_scale: Sequence[float],
                 local_scale: Sequence[float], flip: float, color_jitter: Sequence[float], grayscale: float,
                 blur: Sequence[float], solarize: float, mean: Optional[Sequence[float]] = None,
                 std: Optional[Sequence[float]] = None):
        def plan(size: int, scale: Sequence[float], blur: float, solarize: float = 0.) -> transforms.Compose:
            steps = [RandomResizedCrop(size, tuple(scale), interpolation=InterpolationMode.BICUBIC),
                     transforms.RandomHorizontalFlip(flip)]
            if any(color_jitter):
                steps.append(transforms.RandomApply([transforms.ColorJitter(*color_jitter)], JITTER_PROBABILITY))
            steps.append(transforms.RandomGrayscale(grayscale))
            if blur:
                steps.append(transforms.RandomApply([transforms.Lambda(blurred)], blur))
            if solarize:
                steps.append(transforms.RandomSolarize(SOLARIZE_FROM, solarize))
            return transforms.Compose(steps)

        self.plans = [plan(global_size, global_scale, blur[0]), plan(global_size, global_scale, blur[1], solarize),
                      *[plan(local_size, local_scale, blur[2])] * local_count]
        self.names = ['global1', 'global2', *(f'local{i + 1}' for i in range(local_count))]
        self.finish = ToNormalizedTensor(mean, std)

    def pictures(self, image: Image.Image) -> List[Image.Image]:
        return [plan(image) for plan in self.plans]

    def __call__(self, image: Image.Image) -> List[torch.Tensor]:
        return list(map(self.finish, self.pictures(image)))


def collate(samples: List[tuple]) -> List[torch.Tensor]:
    """Stack samples (crops, label) to a batch for each crop, (B, 3, side, side); labels are dropped."""
    return [torch.stack(list(crop)) for crop in zip(*(crops for crops, *_ in samples))]
