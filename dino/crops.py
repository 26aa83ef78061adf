"""The crops of an image that DINO compares: two global ones, and smaller local ones.

Source: paper section 3.1; original main_dino.py, DataAugmentationDINO.
"""
from typing import List, Sequence

import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from datasets import ToNormalizedTensor
from dino.loss import GLOBAL

BLUR_RADIUS = (.1, 2.)  # pixels, whatever the crop's size
JITTER_PROBABILITY = .8
SOLARIZE_FROM = 128  # brightness
PREVIEWED = ('global1', 'global2', 'local')  # in names of files


class Blur:
    """Gaussian blur of a random radius."""

    def __call__(self, image: Image.Image) -> Image.Image:
        # differs: DINO crops - from torch's generator; the original's Python generator was never seeded
        low, high = BLUR_RADIUS
        return image.filter(ImageFilter.GaussianBlur(low + (high - low) * float(torch.rand(()))))


def solarize(image: Image.Image) -> Image.Image:
    return ImageOps.solarize(image, SOLARIZE_FROM)


class Crops:
    """RGB image -> its crops as normalised tensors (3, side, side), the global ones first.

    Args:
        args: the flags of `add_crop_flags`, --mean and --std.
    """

    def __init__(self, args):
        blur = args.blur
        locals_ = args.local_crops_number
        self.plans = [
            build_crop(args, args.input_size, args.global_crops_scale, blur=blur[0], solarize_=0.),
            build_crop(args, args.input_size, args.global_crops_scale, blur=blur[1], solarize_=args.solarize),
            *[build_crop(args, args.local_crops_size, args.local_crops_scale, blur=blur[2], solarize_=0.)] * locals_]
        self.finish = ToNormalizedTensor(args.mean, args.std)

    def pictures(self, image: Image.Image) -> List[Image.Image]:
        """The crops as pictures."""
        return [plan(image) for plan in self.plans]

    def __call__(self, image: Image.Image) -> List[torch.Tensor]:
        return list(map(self.finish, self.pictures(image)))


def build_crop(args, size: int, scale: Sequence[float], *, blur: float, solarize_: float) -> transforms.Compose:
    """What makes one crop of an image.

    Args:
        size: of its sides, in pixels.
        scale: least and largest part of the image's area.
        blur, solarize_: probabilities.
    """
    steps = [transforms.RandomResizedCrop(size, scale=tuple(scale), interpolation=InterpolationMode.BICUBIC),
             transforms.RandomHorizontalFlip(args.flip)]
    if any(args.color_jitter):
        steps.append(transforms.RandomApply([transforms.ColorJitter(*args.color_jitter)], JITTER_PROBABILITY))
    steps.append(transforms.RandomGrayscale(args.grayscale))
    if blur:
        steps.append(transforms.RandomApply([Blur()], blur))
    if solarize_:
        steps.append(transforms.RandomApply([transforms.Lambda(solarize)], solarize_))
    return transforms.Compose(steps)


def collate(samples: List[tuple]) -> List[torch.Tensor]:
    """Samples (crops, label) -> each crop of all images, (B, 3, side, side); labels are left."""
    return [torch.stack(list(crop)) for crop in zip(*(crops for crops, *_ in samples))]


def name_of(number: int) -> str:
    """What a crop is called in the name of a file."""
    return PREVIEWED[number] if number < GLOBAL else f'{PREVIEWED[-1]}{number - GLOBAL + 1}'

