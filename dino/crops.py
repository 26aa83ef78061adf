"""Crops of an image for DINO: two global crops, and smaller local crops.

Source: paper section 3.1; original main_dino.py, DataAugmentationDINO.
"""
from typing import List, Optional, Sequence

import torch
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from loaders.transforms import ToNormalizedTensor

BLUR_RADIUS = (.1, 2.)  # pixels, for crops of any size
JITTER_PROBABILITY = .8
SOLARIZE_FROM = 128  # brightness


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
            steps = [transforms.RandomResizedCrop(size, tuple(scale), interpolation=InterpolationMode.BICUBIC),
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
