"""Preview of a training: the first pictures of a run beside the images that the model receives."""
import math
from pathlib import Path
from typing import List, Optional

import numpy as np
import torch
from PIL import Image

from loaders.samples import PictureSet, picture_of
from loaders.transforms import ToNormalizedTensor
from reports import lettering, maps
from run.logs import EpochLog
from run.output import without_ending
from utils import InputError, whole_file

FILE = 'preview.png'
LEAST_SIDE = 96  # pixels of a small image on the sheet


def sheet(dataset: PictureSet, loader, count: int, normalise: ToNormalizedTensor) -> Optional[Image.Image]:
    """Draw the first images of a loader beside their pictures with file names; None for a stream.

    Args:
        normalise: normalisation of the images, which is inverted.
    """
    images, indices = loader.first_images(count), loader.first_indices(count)
    if images is None or not indices:
        return None
    load, files, tiles = picture_of(dataset), dataset.files(), []
    for image, index in zip(to_pictures(images, normalise), indices):
        zoom = max(1, -(-LEAST_SIDE // max(image.size)))
        try:
            original = maps.scale_to(load(index), zoom * max(image.size))
        except (InputError, OSError):  # an unreadable picture, in whose place the model receives another
            original = Image.new('RGB', [zoom * side for side in image.size], 'lightgrey')
        name = lettering.visible(Path(files[index]).name) if files else f'image {index}'
        tiles += [lettering.captioned(original, [name]), maps.enlarged(image, zoom)]
    return maps.side_by_side(tiles, columns=2 * math.ceil(math.sqrt(len(indices) / 2)))


def to_pictures(images: torch.Tensor, normalise: ToNormalizedTensor) -> List[Image.Image]:
    """Invert the normalisation of images (B, 3, img_h, img_w)."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (normalise.mean, normalise.std))
    levels = ((images.float() * std + mean).clamp(0, 1) * 255).round().byte()
    return [Image.fromarray(level.permute(1, 2, 0).numpy()) for level in levels]


def write(folder: Path, log: EpochLog, page: Image.Image):
    """Write the sheet to a run's folder and to TensorBoard."""
    log.tensorboard.do('add_image', 'train/images', np.asarray(page), None, None, 'HWC')
    with without_ending('the preview'), whole_file(folder / FILE) as unfinished:
        page.save(unfinished)
