"""Pictures for DINO, from a folder or a data set of datasets.py, and flags of their crops."""
import argparse
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Callable, List, Tuple

from PIL import Image
from torch.utils.data import Dataset

import datasets
from dino import crops
from loaders import pictures, readers
from loaders.samples import PictureSet, inspect, picture_of
from loaders.source import Source
from run import flags
from run.commandline import COUNT, COUNT_OR_0, FRACTION, PATH, number
from run.output import log
from utils import InputError, UnreadableImage, dashed

ANY = 'PICTURES'  # --data-set of all pictures below --data-path
PART = number(float, 0, 1, above=True)


class Pictures(PictureSet, Dataset):
    """All pictures of a folder and its subfolders, or of its train/ if there is val/ or test/ beside; without labels.

    Args:
        upright: turn pictures by their EXIF orientation.
        flag: flag that gave the folder, for errors.

    Raises:
        InputError: the folder does not exist, or has no pictures.
    """
    classes = ('',)

    def __init__(self, root: Path, *, upright: bool, flag: str = '--data-path'):
        if not root.is_dir():
            raise datasets.no_directory(flag, root)
        if (root / 'train').is_dir() and any((root / name).is_dir() for name in datasets.HELD_OUT):
            log(f'{flag} {root}: contains train/ and val/ (or test/); using train/')
            root = root / 'train'
        ignored = Counter()
        self.samples = [(path, 0) for path in pictures.find(root, ignored)]
        pictures.log_left_out(f'{flag}: {root}', ignored)
        if not self.samples:
            raise InputError(f'{flag} {root}: no pictures there or in its subfolders')
        self.upright, self.load = upright, partial(pictures.load_rgb, upright=upright)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        path, label = self.samples[index]
        return self.transformed(self.load(path)), label


def build_dataset(source: Source, transform: Callable, *, skips_bad: bool) -> PictureSet:
    """Build the training pictures with the transform to crops, without a check of pictures if `skips_bad`."""
    if source.name == ANY or (source.name == 'FOLDER' and not source.val_fraction):  # FOLDER would need labels
        dataset = Pictures(Path(source.path), upright=datasets.turns_upright(source), flag=source.flag)
    else:
        dataset, _ = datasets.load(source, is_train=True, labelled=False)
    inspect(dataset, skips_bad=skips_bad)
    return dataset.with_transform(transform)


def some_pictures(dataset: PictureSet, count: int, *, skips_bad: bool) -> List[Tuple[int, Image.Image]]:
    """Return (index, picture) of pictures evenly spread over a data set; `skips_bad`: leave out unreadable pictures."""
    load, chosen = picture_of(dataset), []
    for index in pictures.evenly_spread(range(len(dataset)), count):
        try:
            chosen.append((index, load(index)))
        except UnreadableImage:
            if not skips_bad:
                raise
    return chosen


def add_data_flags(group):
    group.add_argument('--data-set', default=ANY, metavar='NAME',
                       help=f'name of the data set: {ANY} for all pictures in --data-path and its subfolders, or a '
                       'data set of main.py (see docs/data.md), whose labels are ignored')
    flags.add_data_path_flag(group, default=datasets.DEFAULT_PATHS[1], help='picture folder; not needed for SAMPLE')
    datasets.add_source_flags(group)
    datasets.add_normalisation_flags(group)


def add_crop_flags(group):
    group.add_argument('--global-crops-size', '--input-size', dest='input_size', metavar='PIXELS', default=224,
                       type=COUNT, help='side of the global crops')
    group.add_argument('--local-crops-size', default=96, type=COUNT, metavar='PIXELS', help='side of the local crops')
    group.add_argument('--local-crops-number', default=8, type=COUNT_OR_0, metavar='N',
                       help='local crops of an image; with 0, --global-crops-scale 0.14 1 is advised')
    group.add_argument('--global-crops-scale', default=[.4, 1.], type=PART, nargs='+', metavar='PART',
                       help='smallest and largest fraction of the image\'s area in a global crop')
    group.add_argument('--local-crops-scale', default=[.05, .4], type=PART, nargs='+', metavar='PART',
                       help='smallest and largest fraction of the image\'s area in a local crop')
    group.add_argument('--flip', default=.5, type=FRACTION, metavar='P', help='probability of horizontal flips; 0: off')
    group.add_argument('--color-jitter', default=[.4, .4, .2, .1], type=FRACTION, nargs='+', metavar='STRENGTH',
                       help='strength of the jitter of brightness, contrast, saturation and hue (up to 0.5), used with '
                       f'probability {crops.JITTER_PROBABILITY}; 0: off')
    group.add_argument('--grayscale', default=.2, type=FRACTION, metavar='P', help='probability of grey crops; 0: off')
    group.add_argument('--blur', default=[1., .1, .5], type=FRACTION, nargs='+', metavar='P',
                       help='probability of blur, with a radius up to 2 pixels, for the first global crop, the second '
                       'global crop, and local crops; 0: off, advised for small crops')
    group.add_argument('--solarize', default=.2, type=FRACTION, metavar='P',
                       help='probability of solarization for the second global crop; 0: off')
    group.add_argument('--preview-crops', type=PATH, metavar='DIR',
                       help='folder for crops as PNG files; the program ends after writing the files')
    group.add_argument('--preview-count', default=8, type=COUNT, metavar='N', help='pictures whose crops are written')


def check_flags(args, parser: argparse.ArgumentParser):
    """Raise InputError for an unknown data set, and for flags without effect."""
    if args.data_set == ANY:
        unused = ('val_fraction', 'num_classes', 'train_split', 'val_split', 'inat_category')
        flags.refuse_without_effect(args, parser, unused, f'with --data-set {ANY}')
    else:
        datasets.check_data_set(args)
    if not args.preview_crops:
        flags.refuse_without_effect(args, parser, ['preview_count'], 'without --preview-crops')
    elif readers.is_stream(args.data_set):
        raise InputError(f'--preview-crops: needs pictures with indices, and {args.data_set} is a stream')


def check_crop_flags(args, *, patch_size: int):
    """Raise InputError for invalid crops; repeat a single 0 (off) for each value of a list."""
    for name, count in (('color_jitter', 4), ('blur', 3)):
        values = vars(args)[name]
        if values == [0.]:
            vars(args)[name] = [0.] * count
        elif len(values) != count:
            raise InputError(f'{dashed(name)} {text_of(values)}: needs {count} values, or 0 for none')
    if args.color_jitter[3] > .5:
        raise InputError(f'--color-jitter {text_of(args.color_jitter)}: the fourth value, for hue, must be at most 0.5')
    for name, scale in (('global', args.global_crops_scale), ('local', args.local_crops_scale)):
        if len(scale) != 2 or scale[0] > scale[1]:
            raise InputError(f'--{name}-crops-scale {text_of(scale)}: needs 2 values, the smaller first')
    for name, size in (('global', args.input_size), ('local', args.local_crops_size)):
        if size < patch_size and (name == 'global' or args.local_crops_number):
            raise InputError(f'--{name}-crops-size {size}: must be >= {patch_size} pixels, a patch of {args.arch}')


def text_of(values: List[float]) -> str:
    return ' '.join(f'{value:g}' for value in values)


def build_crops(args) -> crops.Crops:
    return crops.Crops(
        global_size=args.input_size, local_size=args.local_crops_size, local_count=args.local_crops_number,
        global_scale=args.global_crops_scale, local_scale=args.local_crops_scale, flip=args.flip, blur=args.blur,
        color_jitter=args.color_jitter, grayscale=args.grayscale, solarize=args.solarize, mean=args.mean, std=args.std)
