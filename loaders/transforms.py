"""Transforms of classification, from RGB pictures to normalised tensors."""
import dataclasses
import itertools
from functools import cache
from typing import Iterator, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, auto_augment, create_transform
from torchvision import transforms
from torchvision.transforms import InterpolationMode

SMALL = 32  # largest side, in pixels, of images that are cropped but not resized
PADDING = 4  # pixels around small images before a square is cropped
Mean = Optional[Sequence[float]]


def train_transform(*, input_size: int, resize: bool, color_jitter: float, auto_augment_policy: Optional[str],
                    interpolation: str, erasing: float, erasing_mode: str, erasing_count: int, mean: Mean = None,
                    std: Mean = None) -> transforms.Compose:
    """Build the training transform from timm's steps.

    Args:
        input_size: side of the square images, in pixels.
        resize: resize to the size; False: pad and crop.
        color_jitter: strength of the jitter, which is used without a policy.
        auto_augment_policy: timm's name of a policy; None: no policy.
        interpolation: 'random', 'bilinear' or 'bicubic'.
        erasing, erasing_mode, erasing_count: probability, mode and maximum number of erased rectangles.
        mean, std: normalisation of each channel; ImageNet's if unset.

    Source: original datasets.py, build_transform.
    """
    transform = create_transform(
        input_size=input_size, is_training=True, color_jitter=color_jitter, auto_augment=auto_augment_policy,
        interpolation=interpolation, re_prob=erasing, re_mode=erasing_mode, re_count=erasing_count)
    for op in augment_ops(transform):
        if op.aug_fn is auto_augment.posterize:
            op.aug_fn = posterize
    names = [type(step).__name__ for step in transform.transforms]
    first = names.index('MaybeToTensor')
    assert names[first + 1] == 'Normalize', names
    transform.transforms[first:first + 2] = [ToNormalizedTensor(mean, std)]
    if not resize:
        # faithful: small images (CIFAR) are padded and cropped, not resized (original datasets.py, build_transform)
        # differs: small images - images below the size are padded to it, where the original raises an error; larger
        # images, and images of different sizes, are resized (datasets.decide_resize)
        transform.transforms[0] = transforms.RandomCrop(input_size, padding=PADDING, pad_if_needed=True)
    return transform


@dataclasses.dataclass(frozen=True)
class View:
    """Part and size of an image that a model is evaluated with, and the normalisation.

    Args:
        input_size: side of the square images, in pixels.
        full_crop: use the whole shorter side of an image; False: 0.875 of this side.
        resize: resize images; False: images keep their size, unless `full_crop`; None: depends on the images, see
            `datasets.decide_resize`.
        mean, std: normalisation of each channel; None: ImageNet's.
    """
    input_size: int
    full_crop: bool = False
    resize: Optional[bool] = None
    mean: Mean = None
    std: Mean = None

    @property
    def resizes(self) -> bool:
        """True if all images become squares of one size."""
        return self.full_crop or self.resize is not False

    @property
    def crop(self) -> float:
        """Used fraction of the shorter side of an image."""
        return 1. if self.full_crop or not self.resizes else .875

    def setting(self) -> dict:
        """Return the values that another program's flags need for the same view."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != 'resize'}

    def transform(self) -> transforms.Compose:
        """Build the transform: resize, centre crop, normalise.

        Source: original datasets.py, build_transform.
        """
        steps = [ToNormalizedTensor(self.mean, self.std)]
        if self.resizes:
            # faithful: without --full_crop the shorter side becomes 256/224 of the size, and the centre is cropped
            side = self.input_size if self.full_crop else int(self.input_size * 256 / 224)
            steps[:0] = [transforms.Resize(side, InterpolationMode.BICUBIC), transforms.CenterCrop(self.input_size)]
        return transforms.Compose(steps)


def augment_ops(transform: transforms.Compose) -> Iterator[auto_augment.AugmentOp]:
    """Yield the operations of timm's policies in `transform`."""
    for step in transform.transforms:
        if isinstance(step, auto_augment.AutoAugment):
            yield from itertools.chain.from_iterable(step.policy)
        elif isinstance(step, (auto_augment.RandAugment, auto_augment.AugMixAugment)):
            yield from step.ops


def posterize(image: Image.Image, bits_to_keep: int, **kwargs) -> Image.Image:
    """Posterize by timm's function, also to 0 bits, which `rand-m9-mstd0.5-inc1` sometimes draws."""
    # faithful: 0 bits make a black image, as in the original's version of Pillow; newer versions raise an error
    return image.point(lambda value: 0) if bits_to_keep == 0 else auto_augment.posterize(image, bits_to_keep, **kwargs)


class ToNormalizedTensor:
    """Transform of an RGB image to a normalised tensor (3, img_h, img_w); bitwise equal to ToTensor and Normalize."""

    def __init__(self, mean: Mean = None, std: Mean = None):
        self.mean, self.std = tuple(mean or IMAGENET_DEFAULT_MEAN), tuple(std or IMAGENET_DEFAULT_STD)

    @staticmethod
    @cache  # some programs build a transform for each image
    def table(mean: Tuple[float, ...], std: Tuple[float, ...]) -> np.ndarray:
        """Return the normalised value of each of the 256 values of each channel, (3, 256)."""
        values = np.arange(256, dtype=np.uint8)[:, None, None].repeat(3, axis=2)  # (256, 1, 3)
        return transforms.Normalize(mean, std)(transforms.functional.to_tensor(values))[:, :, 0].numpy()

    def __call__(self, image: Image.Image) -> torch.Tensor:
        pixels = np.asarray(image)
        out = np.empty((3, *pixels.shape[:2]), dtype=np.float32)
        for channel, values in enumerate(self.table(self.mean, self.std)):
            np.take(values, pixels[:, :, channel], out=out[channel], mode='clip')  # 'raise' would copy
        return torch.from_numpy(out)

    def __repr__(self) -> str:
        return f'{type(self).__name__}(mean={self.mean}, std={self.std})'
