"""Picture files of a user: search, batches, forward pass of a model, and files of drawings."""
import sys
from collections import Counter
from pathlib import Path
from typing import Callable, Iterator, List, Optional, Tuple

import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from inference.loaded import LoadedModel
from loaders import pictures
from loaders.transforms import SMALL
from loaders.workers import Loader
from run.output import shows_bar, write_line
from run.progress import map_leaves
from utils import InputError, RunStopped, UnreadableImage, shown, whole_file

IMAGENET_SIDE = 224  # pixels


def find_images(given: List[str], missing: Optional[list] = None) -> List[Path]:
    """Return the given files and, sorted, the image files in the given folders; log files that are left out.

    Args:
        missing: receives the InputErrors of missing paths and of folders without images; None: the first is raised.

    Raises:
        InputError: a path is invalid, and `missing` is None or there are no other images.
    """
    images, errors, left_out = [], [], Counter()
    for path in map(Path, given):
        files = sorted(map(Path, pictures.find(path, left_out))) if path.is_dir() else [path]
        if not files:
            errors.append(InputError(f'{shown(path)}: no images in this folder (suffixes of images: '
                                     f'{", ".join(sorted(pictures.suffixes()))})'))
        elif not path.exists():
            errors.append(InputError(f'{shown(path)}: no such file or folder'))
        else:
            images += files
    if errors:
        if missing is None or not images:
            raise errors[0]
        missing += errors
    pictures.log_left_out('Folders', left_out)
    pictures.log_peculiarities(images)
    return images


class ImageFiles(Dataset):
    """Image files as pairs: the transformed image or the error of an unreadable image, and the index."""

    def __init__(self, paths: List[Path], transform: Callable):
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        try:
            return self.transform(pictures.load_rgb(self.paths[index])), index
        except UnreadableImage as error:
            return error, index


def batches(paths: List[Path], loaded: LoadedModel, *, batch_size: int, num_workers: int, unreadable: list
            ) -> Iterator[Tuple[torch.Tensor, List[int]]]:
    """Load image files in batches, with a progress bar.

    Args:
        unreadable: receives the errors of images that can't be decoded; these images are left out.

    Yields:
        images (B, 3, img_h, img_w) on the model's device, and their indices in `paths`.
    """
    if not loaded.view.resizes:
        batch_size = 1  # images that keep their sizes can't be stacked
    loader = Loader(ImageFiles(paths, loaded.transform), num_workers=num_workers, collate_fn=list,
                    batch_size=batch_size)
    with tqdm(total=len(paths), unit=' images', disable=not shows_bar()) as bar:
        for samples in loader:
            unreadable += [image for image, _ in samples if isinstance(image, UnreadableImage)]
            readable = [(image, index) for image, index in samples if isinstance(image, torch.Tensor)]
            if readable:
                images, indices = zip(*readable)
                yield torch.stack(images).to(loaded.device), list(indices)
            bar.update(len(samples))


def forward(loaded: LoadedModel, function: Callable, images: torch.Tensor):
    """Compute `function(images)`, a tensor or nested tensors, under the model's autocast; return float32 on the CPU."""
    with torch.inference_mode(), torch.autocast(loaded.device.type, loaded.amp_dtype,
                                                enabled=loaded.amp_dtype is not None):
        return map_leaves(function(images), torch.Tensor, lambda tensor: tensor.float().cpu())


def report_unreadable(unreadable: list, total: int):
    """Print the errors of unreadable images; raise the last error, if any, as RunStopped."""
    for error in unreadable[:-1]:
        write_line(error, stream=sys.stderr)
    if unreadable:
        raise RunStopped(f'{unreadable[-1]} ({len(unreadable)} of {total} could not be read)')


def drawing_side(own: int, most: int) -> int:
    """Return the longer side of drawn pictures, in pixels, for a model with pictures of side `own`.

    It is `most` for models of ImageNet's 224 pixels and more, in proportion for smaller pictures, and the own side for
    pictures that are not resized in training: patches of other sizes than in training have no meaning for a model.
    """
    return own if own <= SMALL else min(most, own * most // IMAGENET_SIDE)


def unique_stems(paths: List[Path]) -> List[str]:
    """Return the paths' names without suffixes; equal names get numbers."""
    stems = {}  # by lower case: some file systems ignore case
    for path in paths:
        stem, number = path.stem, 1
        while stem.lower() in stems:
            number += 1
            stem = f'{path.stem}-{number}'
        stems[stem.lower()] = stem
    return list(stems.values())


def check_inputs_are_kept(inputs: List[Path], outputs: List[Path]):
    """Refuse outputs that would overwrite inputs."""
    lost = {path.resolve() for path in inputs} & {path.resolve() for path in outputs}
    if lost:
        raise InputError(f'--output-dir {outputs[0].parent}: {min(lost)} would be overwritten; choose another folder')


def save_picture(picture: Image.Image, path: Path):
    with whole_file(path) as unfinished:
        picture.save(unfinished)
