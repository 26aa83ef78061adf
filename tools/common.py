"""What the tools share: a model with its weights, classes and transform, and the pictures to show it."""
import argparse
import dataclasses
import sys
from collections import Counter
from pathlib import Path
from typing import Iterator, List, Optional, Tuple

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch.utils.data import Dataset
from tqdm import tqdm

import datasets
import weights
import xcit
from loaders import pictures
from loaders.workers import Loader
from run import flags, processes
from run.commandline import COUNT, COUNT_OR_0, PATH
from run.descriptions import evaluation_crop, names_of, number_of, side_of, trained_with
from run.progress import map_tensors
from utils import InputError, RunStopped, UnreadableImage, whole_file
from weights import check_model


@dataclasses.dataclass
class LoadedModel:
    """A model in eval mode on its device, and what is known of it.

    Args:
        model: with its weights.
        name: e.g. 'xcit_small_12_p16'.
        classes: what the classes 0, 1, ... are called, in words; None where that is not known, or there is no head.
        input_size: side of the square images it is evaluated with, in pixels.
        full_crop: whether the whole shorter side of an image is used, or 0.875 of it.
        device: where it is.
        amp_dtype: autocast type; None: full precision.
        mean, std: of each channel, by which images are normalised; None: ImageNet's.
        seed: of the training that the weights come from, if that is known.
    """
    model: torch.nn.Module
    name: str
    classes: Optional[List[str]]
    input_size: int
    full_crop: bool
    device: torch.device
    amp_dtype: Optional[torch.dtype]
    mean: Optional[List[float]] = None
    std: Optional[List[float]] = None
    seed: Optional[int] = None

    def transform(self, image: Image.Image) -> torch.Tensor:
        """An image as evaluation shows it, (3, img_h, img_w); larger ones are resized to small sizes, too."""
        small = not datasets.resizes_for_evaluation(self) and max(image.size) > self.input_size
        return datasets.build_eval_transform(dataclasses.replace(self, full_crop=True) if small else self)(image)


def add_weights_arguments(parser: argparse.ArgumentParser):
    """The flags that say which model it is, and with which weights."""
    group = parser.add_argument_group('model')
    group.add_argument('--model', metavar='NAME', help='one of the 14 XCiT models, or of timm\'s; if unset, what the '
                       'weights say, as a training\'s checkpoint does')
    group.add_argument('--pretrained', required=True, type=PATH, metavar='TAG|PATH|URL|hf-hub:NAME',
                       help='weights: published ones by their tag (see the README), or any others')
    add_choice_of_weights(group)


def add_choice_of_weights(group):
    """The flags that say which of several sets of weights in a file it is."""
    group.add_argument('--use-ema', action=argparse.BooleanOptionalAction, default=False,
                       help='take the moving average that a training\'s checkpoint holds beside the weights')
    group.add_argument('--checkpoint-key', default='', metavar='KEY',
                       help='where the weights are in a file that holds several, as in state_dict.student')


def add_square_arguments(parser: argparse.ArgumentParser):
    """The flags that say how images become squares."""
    group = parser.add_argument_group('images')
    group.add_argument('--input-size', type=COUNT, metavar='PIXELS',
                       help='side of the square images; if unset, as the model was evaluated')
    group.add_argument('--full-crop', action=argparse.BooleanOptionalAction,
                       help='use the whole shorter side of an image instead of 0.875 of it; if unset, as the model was '
                       'evaluated')


def add_device_arguments(parser: argparse.ArgumentParser):
    group = parser.add_argument_group('device')
    flags.add_device_flag(group)
    flags.add_amp_flag(group)


def load_model(args, *, fuse: bool = True) -> LoadedModel:
    """Build the model that the flags above describe, with as many classes as its weights have.

    A program that does not offer one of them sets it by `parser.set_defaults`. An XCiT is prepared for inference by
    xcit.fuse, unless `fuse` is False.

    Raises:
        InputError: there is no such model or device, or the weights are not the model's.
    """
    device = flags.choose_device(args)
    if args.model:
        check_model('--model', args.model)
    weights.check_exists(args.pretrained, '--pretrained', args.model or '')
    given = weights.read(args.pretrained, '--pretrained', args.model or '', use_ema=args.use_ema,
                         key=args.checkpoint_key)
    trained = trained_with(given.checkpoint)
    published = weights.published(args.model or '', args.pretrained) or weights.published_as(args.pretrained)
    name = args.model or (published and published.model) or weights.model_of_training(given.checkpoint)
    if name is None:
        raise InputError(f'--model: is needed, since {args.pretrained} does not say what it is the weights of')
    check_model('--model', name)
    model = timm.create_model(name, num_classes=weights.num_classes(name, given))
    weights.load(model, given)
    model.eval().requires_grad_(False)
    if fuse and isinstance(model, xcit.Xcit):
        xcit.fuse(model)
    own_size = published.resolution if published else side_of(trained.get('input_size')) or (
        model.default_cfg['input_size'][-1])
    own_crop = published.crop if published else evaluation_crop(trained)
    return LoadedModel(
        model.to(device), name, names_in_words(given, model),
        input_size=args.input_size or own_size,
        full_crop=own_crop == 1. if args.full_crop is None else args.full_crop,
        device=device, amp_dtype=flags.amp_dtype(args, device), mean=trained.get('mean'), std=trained.get('std'),
        seed=number_of(trained.get('seed')))


def names_in_words(given: weights.Weights, model: torch.nn.Module) -> Optional[List[str]]:
    """The names in a training's checkpoint, or ImageNet's for a model of 1000 classes without any."""
    held = given.checkpoint.get('classes')
    names = names_of(held, model.num_classes)
    if names is None and held is not None and model.num_classes:
        processes.notice(f'{given.source}: its names of classes are left, since they are not those of '
                         f'{model.num_classes} classes')
    if names is None and model.num_classes == 1000:
        names = ImageNetInfo('imagenet-1k').label_names()
    if names is None:
        return None
    info = ImageNetInfo('imagenet-1k' if len(names) == 1000 else 'imagenet-22k')
    known = set(info.label_names()) if len(names) in (1000, 21841) else ()
    return [info.label_name_to_description(name) if name in known else name for name in names]


def patch_size(loaded: LoadedModel) -> int:
    """The side of a patch in pixels, of a model that has tokens for patches, and one for the class.

    Raises:
        InputError: it is no XCiT.
    """
    check_xcit(loaded.name)
    return loaded.model.feature_info[0]['reduction']


def check_xcit(model_name: str):
    if model_name.split('.')[0] not in xcit.MODELS:
        raise InputError(f'--model {model_name}: is no XCiT, which this program is for; allowed: '
                         f'{", ".join(xcit.MODELS)}')


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def find_images(given: List[str], missing: Optional[list] = None) -> List[Path]:
    """The image files among paths: files as they are, and those in folders and their subfolders, sorted.

    Says what about them is not as users may expect: other files in the folders, unusual kinds of pictures.

    Args:
        missing: gets an InputError for each path that is not there, and each folder without images; None: the first of
            them is raised.

    Raises:
        InputError: so it is, or none of the paths gives an image.
    """
    images, problems, left_out = [], [], Counter()
    for path in map(Path, given):
        inside = sorted(map(Path, pictures.find(path, left_out))) if path.is_dir() else [path]
        if not inside:
            problems.append(InputError(f'{path}: no images in this folder (looked for '
                                       f'{", ".join(sorted(pictures.suffixes()))})'))
        elif not path.exists():
            problems.append(InputError(f'{path}: no such file or folder'))
        else:
            images += inside
    if problems and (missing is None or not images):
        raise problems[0]
    if problems:
        missing += problems
    pictures.notice_left_out('Folders', left_out)
    pictures.notice_peculiarities(images)
    return images


class ImageFiles(Dataset):
    """Image files as pairs: the transformed image, or the error of one that can't be read; and its place."""

    def __init__(self, paths: List[Path], transform):
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
    """Read image files and go through them with a progress bar.

    Args:
        unreadable: gets the error of each image that can't be decoded, which is left out.

    Yields:
        images (B, 3, img_h, img_w) on the model's device, and their places in `paths`.
    """
    if not datasets.resizes_for_evaluation(loaded):
        batch_size = 1  # the images keep their sizes, and need not be alike
    loader = Loader(ImageFiles(paths, loaded.transform), batch_size=batch_size, collate_fn=list,
                    num_workers=num_workers)
    with tqdm(total=len(paths), unit=' images', disable=not processes.shows_bar()) as bar:
        for samples in loader:
            unreadable += [image for image, _ in samples if isinstance(image, UnreadableImage)]
            readable = [(image, index) for image, index in samples if isinstance(image, torch.Tensor)]
            if readable:
                images, indices = zip(*readable)
                yield torch.stack(images).to(loaded.device), list(indices)
            bar.update(len(samples))


def add_loading_arguments(parser: argparse.ArgumentParser):
    """The flags of `batches`."""
    group = parser.add_argument_group('data')
    group.add_argument('--batch-size', default=64, type=COUNT, metavar='IMAGES', help='of one pass')
    group.add_argument('--num-workers', default=10, type=COUNT_OR_0, metavar='N',
                       help='processes that read images, at most one for each core; 0: read in the main process')


def forward(loaded: LoadedModel, function, images: torch.Tensor):
    """`function(images)` as the model is evaluated: without gradients, in its autocast type; float32 on the CPU.

    The function gives a tensor, or several nested in any way.
    """
    with torch.inference_mode(), torch.autocast(loaded.device.type, loaded.amp_dtype,
                                                enabled=loaded.amp_dtype is not None):
        return map_tensors(function(images), lambda tensor: tensor.float().cpu())


def report_unreadable(unreadable: list, total: int):
    """Name the images that were left out, if any.

    Raises:
        RunStopped: there were some, so that the exit code says it.
    """
    for error in unreadable[:-1]:
        print(error, file=sys.stderr)
    if unreadable:
        raise RunStopped(f'{unreadable[-1]} ({len(unreadable)} of {total} could not be read)')


# ---------------------------------------------------------------------------------------------------------------------
# Drawings

def unique_stems(paths: List[Path]) -> List[str]:
    """The paths' names without suffixes, with numbers where they would be equal."""
    stems, taken = [], set()
    for path in paths:
        stem, number = path.stem, 1
        while stem.lower() in taken:  # some file systems don't tell upper from lower case
            number += 1
            stem = f'{path.stem}-{number}'
        taken.add(stem.lower())
        stems.append(stem)
    return stems


def check_inputs_are_kept(inputs: List[Path], outputs: List[Path]):
    lost = {path.resolve() for path in inputs} & {path.resolve() for path in outputs}
    if lost:
        raise InputError(f'--output-dir {outputs[0].parent}: {min(lost)} would be written over; choose another one')


def save_picture(picture: Image.Image, path: Path):
    with whole_file(path) as unfinished:
        picture.save(unfinished)
