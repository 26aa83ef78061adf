"""The pictures that DINO learns from: any, whatever folders they are in, or a data set of datasets.py."""
import argparse
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Callable, List, Optional, Tuple

from PIL import Image
from torch.utils.data import Dataset

import datasets
from dino import crops
from loaders import pictures, readers
from loaders.pictures import load_rgb
from run import flags
from run.commandline import COUNT, COUNT_OR_0, FRACTION, PATH, number
from run.flags import add_data_path_flag
from run.processes import is_main_process, notice
from utils import InputError, UnreadableImage, derive_seed, seed_cpu, writing

ANY = 'PICTURES'  # the --data-set of all pictures below --data-path
PART = number(float, 0, 1, above=True)


class Pictures(Dataset):
    """All pictures of a folder and its subfolders, without labels.

    Args:
        root: the folder; of one that has train/ and val/ or test/, train/ is taken.
        upright: turn pictures as their EXIF orientation says.

    Raises:
        InputError: no such folder, or no pictures in it.
    """
    classes = ('',)

    def __init__(self, root: Path, *, upright: bool):
        if not root.is_dir():
            raise InputError(f'--data-path {root}: no such directory')
        if (root / 'train').is_dir() and any((root / name).is_dir() for name in datasets.HELD_OUT):
            notice(f'--data-path {root}: has train/ and pictures held out; takes those of train/')
            root = root / 'train'
        left_out = Counter()
        self.samples = [(path, 0) for path in pictures.find(root, left_out)]
        pictures.notice_left_out(f'--data-path: {root}', left_out)
        if not self.samples:
            raise InputError(f'--data-path {root}: no pictures there or in its subfolders')
        self.upright, self.load = upright, partial(load_rgb, upright=upright)
        self.transform: Optional[Callable] = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        path, label = self.samples[index]
        image = self.load(path)
        return self.transform(image) if self.transform else image, label


# ---------------------------------------------------------------------------------------------------------------------
# Arguments

def add_data_flags(group):
    group.add_argument('--data-set', default=ANY, metavar='NAME',
                       help=f'{ANY}: all pictures of --data-path, in whatever folders; or one of main.py\'s (see '
                       'docs/data.md), whose labels are not looked at')
    add_data_path_flag(group, default='/path/to/imagenet/train/', help='where the pictures are; not needed for SAMPLE')
    datasets.add_source_flags(group)
    datasets.add_normalisation_flags(group)


def add_crop_flags(group):
    group.add_argument('--global-crops-size', '--input-size', dest='input_size', default=224, type=COUNT,
                       metavar='PIXELS', help='side of the global crops')
    group.add_argument('--local-crops-size', default=96, type=COUNT, metavar='PIXELS', help='side of the local crops')
    group.add_argument('--local-crops-number', default=8, type=COUNT_OR_0, metavar='N',
                       help='local crops of an image; with 0, --global-crops-scale 0.14 1 is advised')
    group.add_argument('--global-crops-scale', default=[.4, 1.], type=PART, nargs='+', metavar='PART',
                       help='least and largest part of the image\'s area that a global crop shows')
    group.add_argument('--local-crops-scale', default=[.05, .4], type=PART, nargs='+', metavar='PART',
                       help='the same of a local crop')
    group.add_argument('--flip', default=.5, type=FRACTION, metavar='PROBABILITY', help='horizontal; 0: off')
    group.add_argument('--color-jitter', default=[.4, .4, .2, .1], type=FRACTION, nargs='+', metavar='STRENGTH',
                       help=f'of brightness, contrast, saturation and hue (up to 0.5), with probability '
                       f'{crops.JITTER_PROBABILITY}; 0: off')
    group.add_argument('--grayscale', default=.2, type=FRACTION, metavar='PROBABILITY', help='0: off')
    group.add_argument('--blur', default=[1., .1, .5], type=FRACTION, nargs='+', metavar='PROBABILITY',
                       help='of the first global crop, the second, and local ones; its radius is up to 2 pixels, '
                       'which is much for small crops; 0: off')
    group.add_argument('--solarize', default=.2, type=FRACTION, metavar='PROBABILITY',
                       help='of the second global crop; 0: off')
    group.add_argument('--preview-crops', type=PATH, metavar='DIR', help='write crops as PNG files there, and stop')
    group.add_argument('--preview-count', default=8, type=COUNT, metavar='N', help='pictures whose crops are written')


def check_flags(args, parser: argparse.ArgumentParser):
    """Refuse a data set that is none, and flags without effect.

    Raises:
        InputError: so it is.
    """
    if args.data_set != ANY:
        datasets.check_data_set(args)
    else:
        unused = ('val_fraction', 'num_classes', 'train_split', 'val_split', 'inat_category')
        flags.refuse_without_effect(args, parser, unused, f'with --data-set {ANY}')
    if not args.preview_crops:
        flags.refuse_without_effect(args, parser, ['preview_count'], 'without --preview-crops')


def check_crop_flags(args, *, patch_size: int):
    """Refuse what can't work, and complete lists that are off.

    Raises:
        InputError: so it is.
    """
    for flag, count in (('color_jitter', 4), ('blur', 3)):
        values = getattr(args, flag)
        if values == [0.]:
            setattr(args, flag, [0.] * count)
        elif len(values) != count:
            raise InputError(f'--{flag.replace("_", "-")} {words(values)}: needs {count} values, or 0 for none')
    if args.color_jitter[3] > .5:
        raise InputError(f'--color-jitter {words(args.color_jitter)}: the fourth, of hue, must be at most 0.5')
    for flag in ('global_crops_scale', 'local_crops_scale'):
        scale = getattr(args, flag)
        if len(scale) != 2 or scale[0] > scale[1]:
            raise InputError(f'--{flag.replace("_", "-")} {words(scale)}: needs 2 values, the smaller first')
    for flag, size in (('global', args.input_size), *([('local', args.local_crops_size)] * bool(
            args.local_crops_number))):
        if size < patch_size:
            raise InputError(f'--{flag}-crops-size {size}: is less than a patch of {args.arch}, {patch_size} pixels')


def words(values: list) -> str:
    return ' '.join(f'{value:g}' for value in values)


# ---------------------------------------------------------------------------------------------------------------------
# Builders

def build_dataset(args) -> Dataset:
    """The pictures with the transform that makes crops of them.

    Raises:
        InputError: they are not there, or the first of them can't be read.
    """
    if args.data_set == ANY or (args.data_set == 'FOLDER' and not args.val_fraction):  # which needs no labels
        dataset = Pictures(Path(args.data_path), upright=datasets.turns_upright(args))
    else:
        dataset, _ = datasets.load_dataset(args, is_train=True, labelled=False)
    pictures.notice_peculiarities(datasets.files_of(dataset))
    if not args.skip_bad_images:
        datasets.probe_images(dataset, is_train=True)
    dataset.transform = crops.Crops(args)
    return dataset


def write_preview(args, dataset: Dataset) -> int:
    """Write the crops of some pictures as files; returns how many pictures these are of.

    Raises:
        InputError: the data set is a stream, or the folder can't be made.
    """
    if readers.is_stream(args.data_set):
        raise InputError(f'--preview-crops: needs a data set whose pictures have numbers, and {args.data_set} is a '
                         f'stream')
    if not is_main_process():
        return args.preview_count
    folder = Path(args.preview_crops)
    shown = some_pictures(dataset, args.preview_count, skip_bad=args.skip_bad_images > 0)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for index, image in shown:
            seed_cpu(derive_seed(args.seed, index))
            for number_, crop in enumerate(dataset.transform.pictures(image)):
                crop.save(folder / f'{index:06}_{crops.name_of(number_)}.png')
    notice(f'{folder}: the crops of {len(shown)} of {len(dataset)} pictures')
    return len(shown)


def some_pictures(dataset: Dataset, count: int, *, skip_bad: bool) -> List[Tuple[int, Image.Image]]:
    """Pictures from everywhere in a data set, with their numbers.

    Args:
        skip_bad: leave out those that can't be read.

    Raises:
        UnreadableImage: one can't be read.
    """
    plain, found = datasets.picture_of(dataset), []
    for index in pictures.evenly_spread(range(len(dataset)), count):
        try:
            found.append((index, plain(index)))
        except UnreadableImage:
            if not skip_bad:
                raise
    return found
