"""Reassessed labels of ImageNet (ReaL): any number of right classes for an image.

Source: Beyer et al., Are we done with ImageNet?, https://arxiv.org/abs/2006.07159.
"""
import json
import pkgutil
import re
from pathlib import Path
from typing import List, Tuple

from reports.predictions import Predictions
from utils import InputError, first_line

IMAGES = 50000  # in ImageNet's validation set
OF_TIMM = 'timm'  # name of the file that comes with timm


def read(source: str) -> List[List[int]]:
    """Return the right classes of each image of ImageNet's validation set, in the order of the images' numbers.

    Args:
        source: path of real.json, or OF_TIMM.

    Raises:
        InputError: the file can't be read, or has other content.
    """
    try:
        labels = json.loads(pkgutil.get_data('timm.data', '_info/imagenet_real_labels.json') if source == OF_TIMM
                            else Path(source).read_bytes())
    except (OSError, ValueError) as error:
        problem = f'can\'t be read as JSON ({first_line(error)})'
        raise InputError(f'--real-labels {source}: {problem}; for the file that comes with timm: {OF_TIMM}') from None
    if not isinstance(labels, list) or len(labels) != IMAGES or not all(
            isinstance(classes, list) and all(isinstance(label, int) for label in classes) for classes in labels):
        raise InputError(f'--real-labels {source}: must be a list of {IMAGES} lists of classes, for '
                         f'ILSVRC2012_val_00000001 and so on')
    return labels


def numbers_of(files: List[str]) -> List[int]:
    """Return the numbers, from 0, of images of ImageNet's validation set; raise InputError for other files."""
    matches = [re.search(r'ILSVRC2012_val_(\d{8})', Path(file).name) for file in files]
    bad = [file for file, number in zip(files, matches) if number is None or not 1 <= int(number[1]) <= IMAGES]
    if bad or not files:
        raise InputError(f'--real-labels: needs images named as ILSVRC2012_val_00000001.JPEG, not '
                         f'{Path(bad[0]).name if bad else "none"}')
    return [int(number[1]) - 1 for number in matches]


def accuracy(predictions: Predictions, files: List[str], labels: List[List[int]]) -> Tuple[float, float, int]:
    """Return (top-1, top-5, number) of the images that have a right class, in percent; `labels`: result of `read`."""
    right = [set(labels[number]) for number in numbers_of(files)]
    rows = [(top, classes) for top, classes in zip(predictions.top.tolist(), right) if classes]
    top1 = sum(top[0] in classes for top, classes in rows)
    top5 = sum(bool(classes & set(top)) for top, classes in rows)
    count = max(len(rows), 1)
    return 100 * top1 / count, 100 * top5 / count, len(rows)
