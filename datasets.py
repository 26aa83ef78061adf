"""Data sets and transforms.

To add a data set: write a builder that takes (args, is_train) and returns (dataset, number of classes), and enter it
into `BUILDERS`. Images reach the transform as RGB.
"""
import argparse
import contextlib
import copy
import gzip
import itertools
import json
import pkgutil
import sys
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo, auto_augment, create_transform
from timm.data.random_erasing import RandomErasing
from torch.utils.data import Dataset, IterableDataset, default_collate
from torchvision import datasets, transforms
from torchvision.transforms import InterpolationMode

import utils
from loaders import pictures, readers, split
from loaders.pictures import load_rgb
from run.checkpoints import is_url
from run.commandline import COUNT, POSITIVE, number
from run.flags import add_data_path_flag
from run.processes import notice
from utils import InputError, UnreadableImage

INAT_CATEGORIES = ('kingdom', 'phylum', 'class', 'order', 'supercategory', 'family', 'genus', 'name')
SAMPLE_DATA = Path(__file__).parent / 'sample_data'  # part of Fashion-MNIST, see the README there
NUM_FASHION = 10  # classes
SMALL = 32  # up to this many pixels, images are cropped but not resized
HELD_OUT = ('val', 'test')  # folders beside train/
NO_HELD_OUT = '; where there is no val/, --val-fraction 0.2 sets pictures aside for evaluation'
PUBLISHED = ('imnet', 'imagenet', 'inat')  # in the names of data sets that stay as they were published
NUM_LISTED = 20  # classes whose numbers of pictures are listed
ARRAYS = ('CIFAR10', 'CIFAR100', 'FASHION', 'SAMPLE')  # data sets that are no files of pictures


# ---------------------------------------------------------------------------------------------------------------------
# Looking at pictures before work starts

FOR_TRAINING = '--skip-bad-images N replaces up to N such training pictures by others'
FOR_EVALUATION = 'repair it or take it away: --skip-bad-images is for training pictures alone'


def probe_images(dataset: Dataset, *, is_train: bool = False, same_size: bool = False):
    """Decode some images of a data set of files, evenly spread, so that bad data shows at once.

    Raises:
        UnreadableImage: the first that can't be decoded.
        InputError: they differ in size, and must not (`same_size`).
    """
    with remedy(FOR_TRAINING if is_train else FOR_EVALUATION):
        sizes = pictures.sizes(pictures.evenly_spread(files_of(dataset)), upright=getattr(dataset, 'upright', False))
    if same_size:
        check_same_size(sizes)


@contextlib.contextmanager
def remedy(words: str):
    """A context that adds to the error of an unreadable image what can be done."""
    try:
        yield
    except UnreadableImage as error:
        raise UnreadableImage(f'{error}; {words}') from None


def files_of(dataset: Dataset) -> List[str]:
    """Paths of the pictures of a data set; none where it does not have files of them."""
    return [path for path, _ in getattr(dataset, 'samples', [])]


def check_same_size(sizes: set):
    """Refuse images of several sizes (img_h, img_w), which can't be stacked to a batch."""
    if len(sizes) > 1:
        raise InputError(f'without --resize evaluation images stay as they are, and these are of different sizes '
                         f'({utils.abridge(sorted(sizes), 3)} pixels): add --resize')


# ---------------------------------------------------------------------------------------------------------------------
# Data sets

class ClassFolders(datasets.ImageFolder):
    """A folder of class folders.

    Args:
        root: the folder.
        standard: class names in the order of their indices, which a subset of them keeps; None: the folders' names,
            sorted.
        numbers: of the classes, by the names of their folders, where these are no standard names.
        upright: turn pictures as their EXIF orientation says.
        allow_empty: classes may have no pictures.

    Raises:
        InputError: no such folder, no class folders in it, a class without images, or a name that is not standard.
    """

    def __init__(self, root: Path, transform: Optional[Callable] = None, *, standard: Optional[List[str]] = None,
                 numbers: Optional[Dict[str, int]] = None, upright: bool = True, allow_empty: bool = False):
        self.standard, self.numbers, self.upright = standard, numbers, upright
        super().__init__(root, transform=transform, loader=partial(load_rgb, upright=upright),
                         allow_empty=allow_empty)

    def find_classes(self, directory) -> Tuple[List[str], Dict[str, int]]:
        try:
            classes = pictures.visible_folders(directory)
        except OSError as error:
            raise InputError(f'--data-path: {directory}: {error.strerror}') from None
        if not classes:
            raise InputError(f'--data-path: {directory} has no class folders')
        class_to_idx = {name: i for i, name in enumerate(classes)}
        if self.numbers is not None:
            return classes, {name: self.numbers[name] for name in classes}
        if self.standard is None:
            return classes, class_to_idx
        index = {name: i for i, name in enumerate(self.standard)}
        if set(classes) == {str(i) for i in range(len(self.standard))}:  # as texts they are in another order
            return classes, {name: int(name) for name in classes}
        unknown = [name for name in classes if name not in index]
        if len(unknown) == len(classes) == len(self.standard):
            return classes, class_to_idx  # all classes, under names of the user's own
        if unknown:
            raise InputError(
                f'--data-path: {directory} has {len(classes)} class folders, of which {len(unknown)} are not named by '
                f'one of the {len(self.standard)} WordNet ids (as n01440764): {utils.abridge(unknown)}')
        return classes, {name: index[name] for name in classes}

    def make_dataset(self, directory, class_to_idx: Dict[str, int], extensions=None, is_valid_file=None,
                     allow_empty: bool = False) -> List[Tuple[str, int]]:
        """Paths and classes of the pictures, in torchvision's order."""
        left_out = Counter()
        found = {name: pictures.find(Path(directory, name), left_out) for name in sorted(class_to_idx)}
        pictures.notice_left_out(f'--data-path: {directory}', left_out)
        empty = [name for name, paths in found.items() if not paths]
        if (empty and not allow_empty) or len(empty) == len(found):
            raise InputError(f'--data-path: {directory}: no pictures in {utils.abridge(empty)}')
        return [(path, class_to_idx[name]) for name, paths in found.items() for path in paths]


class FashionMNIST(Dataset):
    """Fashion-MNIST from its four IDX files, gzipped or not, as RGB images.

    Args:
        root: a folder that holds the files, or torchvision's `FashionMNIST/raw` with them.
    """

    def __init__(self, root: Path, train: bool, transform: Optional[Callable] = None):
        split = 'train' if train else 't10k'
        self.images = read_idx(root, f'{split}-images-idx3-ubyte')
        self.labels = read_idx(root, f'{split}-labels-idx1-ubyte')
        if len(self.images) != len(self.labels):
            raise InputError(f'--data-path: {root}: {len(self.images)} {split} images but {len(self.labels)} labels')
        if self.labels.max(initial=0) >= NUM_FASHION:
            raise InputError(f'--data-path: {root}: a {split} label is {self.labels.max()}, the last is '
                             f'{NUM_FASHION - 1}')
        self.transform = transform
        self.classes = datasets.FashionMNIST.classes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        image = Image.fromarray(self.images[index]).convert('RGB')
        return self.transform(image) if self.transform else image, int(self.labels[index])


def read_idx(root: Path, name: str) -> np.ndarray:
    """Array of bytes in the IDX file `name` (two zero bytes, type, rank, sizes as big-endian uint32, data)."""
    folders = (root, root / 'FashionMNIST' / 'raw')
    path = next((p for folder in folders for p in (folder / name, folder / f'{name}.gz') if p.is_file()), None)
    if path is None:
        raise InputError(f'--data-path {root}: no {name}[.gz] there or in FashionMNIST/raw')
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == '.gz' else path.read_bytes()
        rank = content[3]
        shape = np.frombuffer(content, '>u4', count=rank, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except (OSError, EOFError, IndexError, ValueError, zlib.error) as error:
        raise InputError(f'--data-path: {path}: truncated or not an IDX file ({utils.first_line(error)})') from None


class INaturalist(Dataset):
    """iNaturalist 2018 or 2019 from its annotation files.

    Args:
        root: holds `train{year}.json`, `val{year}.json`, `categories.json` and the image folders.
        category: the level of the taxonomy that makes the classes.
        upright: turn pictures as their EXIF orientation says.

    Source: original datasets.py, INatDataset.
    """

    def __init__(self, root: Path, train: bool, year: int, category: str, transform: Optional[Callable] = None, *,
                 upright: bool = False):
        self.upright = upright
        categories = read_json(root / 'categories.json')
        annotations = read_json(root / f'train{year}.json')
        split = annotations if train else read_json(root / f'val{year}.json')
        try:
            # faithful: classes are numbered as they first appear among the training annotations
            names = [categories[int(a['category_id'])][category] for a in annotations['annotations']]
            class_to_idx = {name: i for i, name in enumerate(dict.fromkeys(names))}
            self.samples = []
            for image in split['images']:
                folder, *_, category_id, name = image['file_name'].split('/')
                # The archives unpack to FOLDER/SUPERCATEGORY/ID/NAME; the original's paths have no supercategory.
                path = root / folder / category_id / name
                path = path if path.exists() else root / image['file_name']
                self.samples.append((str(path), class_to_idx[categories[int(category_id)][category]]))
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise InputError(f'--data-path {root}: the annotations of {year} are not iNaturalist\'s '
                             f'({type(error).__name__}: {error}, --inat-category {category})') from None
        self.classes = list(class_to_idx)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        path, target = self.samples[index]
        image = load_rgb(path, upright=self.upright)
        return self.transform(image) if self.transform else image, target


def read_json(path: Path):
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f'--data-path: {path} is missing') from None
    except ValueError as error:
        raise InputError(f'--data-path: {path} is not valid JSON ({error})') from None


def split_folder(root: Path, names: Tuple[str, ...], *, remedy: str = '') -> Path:
    """The first of the folders `names` that `root` has; the error if there is none ends with a remedy."""
    for name in names:
        if (root / name).is_dir():
            return root / name
    there = pictures.visible_folders(root)
    raise InputError(f'--data-path {root}: no {" or ".join(f"{n}/" for n in names)} folder there '
                     f'(it has: {utils.abridge(there) or "no folders"}){remedy}')


def build_imagenet(args, is_train: bool, subset: str = 'imagenet-1k'):
    standard = ImageNetInfo(subset).label_names()
    root = split_folder(Path(args.data_path), ('train',) if is_train else ('val',))
    return ClassFolders(root, standard=standard, upright=turns_upright(args)), len(standard)


def build_test_set(args, is_train: bool, subset: str = ''):
    """One of ImageNet's other test sets; `subset` is timm's name for its 200 classes, '' if it has all 1000."""
    if is_train:
        raise InputError(f'--data-set {args.data_set}: is a test set, for --eval alone')
    standard = ImageNetInfo().label_names()
    known = pkgutil.get_data('timm.data', f'_info/{subset}_synsets.txt').decode().split() if subset else standard
    numbers = {name: standard.index(name) for name in known}
    if not subset:  # ImageNet-V2 comes with folders 0 to 999, which as texts are in another order
        numbers.update({name: int(name) for i in range(len(standard)) for name in (str(i), f'{i:03}', f'{i:04}')})
    root = folder_of_classes(Path(args.data_path), numbers)
    dataset = ClassFolders(root, standard=standard, numbers=numbers, upright=turns_upright(args))
    missing = len(known) - len(dataset.classes)
    if missing:
        notice(f'--data-path: {root} has {len(dataset.classes)} of the {len(known)} classes of {args.data_set}: its '
               f'accuracy is not to be compared')
    dataset.possible = sorted(numbers[name] for name in known) if subset else None
    dataset.classes = standard
    return dataset, len(standard)


def folder_of_classes(root: Path, known: Dict[str, int]) -> Path:
    """Where the class folders of a test set are: in `root`, or in a folder there, as archives unpack.

    Raises:
        InputError: nowhere, or among others that are no classes of the set.
    """
    inside = pictures.visible_folders(root)
    problem = f'no class folders (as n01440764) there or one level below; it has: {utils.abridge(inside) or "none"}'
    for folder in (root, *(root / name for name in inside)):
        names = pictures.visible_folders(folder)
        unknown = [name for name in names if name not in known]
        if names and not unknown:
            return folder
        if len(unknown) < len(names):
            problem = f'{folder} has {len(unknown)} folders that are none of its classes: {utils.abridge(unknown)}'
    raise InputError(f'--data-path {root}: {problem}')


def build_folder(args, is_train: bool, num_classes: Optional[int] = None):
    root = Path(args.data_path)
    stored = split.read(run_of(args))
    if args.val_fraction or (stored and not any((root / name).is_dir() for name in HELD_OUT)):
        dataset = split_by_name(args, root, is_train, stored)
    else:
        dataset = own_split(args, root, is_train)
    if num_classes is not None and len(dataset.classes) != num_classes:
        raise InputError(f'--data-set {args.data_set}: {dataset.root} has {len(dataset.classes)} class folders, '
                         f'not {num_classes}')
    return dataset, len(dataset.classes)


def own_split(args, root: Path, is_train: bool) -> ClassFolders:
    """One of a folder's own two parts, which have the same classes."""
    folders = {'train': ('train',), 'held out': HELD_OUT}
    mine = split_folder(root, folders.pop('train' if is_train else 'held out'), remedy=NO_HELD_OUT)
    if is_train or (root / 'train').is_dir():  # evaluation alone needs no training images
        other = split_folder(root, *folders.values(), remedy=NO_HELD_OUT)
        for here, there in ((mine, other), (other, mine)):
            lonely = sorted(set(pictures.visible_folders(here)) - set(pictures.visible_folders(there)))
            if lonely:
                raise InputError(f'--data-path: class folders in {here}, but not in {there}: {utils.abridge(lonely)}')
    return ClassFolders(mine, upright=turns_upright(args), allow_empty=not is_train)


def split_by_name(args, root: Path, is_train: bool, stored: Optional[dict]) -> ClassFolders:
    """One of two parts of a folder whose pictures are divided by --val-fraction, or as a run has stored it."""
    own = [name for name in HELD_OUT if (root / name).is_dir()]
    if own:
        raise InputError(f'--val-fraction {args.val_fraction}: {root} has a {own[0]}/ folder of its own')
    folder = root / 'train' if (root / 'train').is_dir() else root
    dataset = ClassFolders(folder, upright=turns_upright(args))
    names = {path: Path(path).relative_to(folder).as_posix() for path, _ in dataset.samples}
    dataset.split = split.Split(names.values(), stored=stored, **(
        dict(fraction=args.val_fraction, seed=args.seed) if args.val_fraction else
        dict(fraction=stored['val_fraction'], seed=stored['seed'])))
    side = dataset.split.side(is_train)
    dataset.samples = [(path, target) for path, target in dataset.samples if names[path] in side]
    if not dataset.samples:
        raise InputError(f'--val-fraction {args.val_fraction}: leaves no pictures of {folder} for '
                         f'{"training" if is_train else "evaluation"}')
    return dataset


def run_of(args) -> Optional[Path]:
    """The folder of the run that --resume names, if it is one of this machine."""
    if args.resume == 'auto':
        return Path(args.output_dir)
    return Path(args.resume).parent if args.resume and not is_url(args.resume) else None


def turns_upright(args) -> bool:
    """Whether pictures are turned as their EXIF says.

    Published sets stay as they are stored: published accuracies were measured so.
    """
    if args.exif is not None:
        return args.exif
    return not any(word in args.data_set.lower() for word in PUBLISHED)


def build_cifar(args, is_train: bool, cls: type):
    try:
        dataset = cls(args.data_path, train=is_train)
    except RuntimeError:
        raise InputError(f'--data-path {args.data_path}: no intact {cls.base_folder} there; to get it: python -c "from '
                         f'torchvision.datasets import {cls.__name__}; {cls.__name__}(\'{args.data_path}\', '
                         f'download=True)"') from None
    return dataset, len(dataset.classes)


def build_inaturalist(args, is_train: bool, year: int):
    dataset = INaturalist(Path(args.data_path), is_train, year, args.inat_category, upright=turns_upright(args))
    return dataset, len(dataset.classes)


BUILDERS = {
    'IMNET': build_imagenet,
    'IMNET22k': partial(build_imagenet, subset='imagenet-22k'),
    'IMNET_V2': build_test_set,
    'IMNET_SKETCH': build_test_set,
    'IMNET_A': partial(build_test_set, subset='imagenet_a'),
    'IMNET_R': partial(build_test_set, subset='imagenet_r'),
    'CIFAR10': partial(build_cifar, cls=datasets.CIFAR10),
    'CIFAR100': partial(build_cifar, cls=datasets.CIFAR100),
    'FASHION': lambda args, is_train: (FashionMNIST(Path(args.data_path), is_train), NUM_FASHION),
    'INAT': partial(build_inaturalist, year=2018),
    'INAT19': partial(build_inaturalist, year=2019),
    'CARS': partial(build_folder, num_classes=196),
    'FLOWERS': partial(build_folder, num_classes=102),
    'FOLDER': build_folder,
    'SAMPLE': lambda args, is_train: (FashionMNIST(SAMPLE_DATA, is_train), NUM_FASHION),
}


def add_data_flags(group):
    """The flags that `check_data_set` and `build_dataset` read; `group` is of an argparse parser."""
    group.add_argument('--data-set', default='IMNET', metavar='NAME',
                       help=f'{", ".join(BUILDERS)}; or through timm {", ".join(readers.PACKAGES)}, each with '
                       '/NAME (see docs/data.md)')
    add_data_path_flag(group, default='/datasets01/imagenet_full_size/061417/', help='not needed for SAMPLE')
    add_source_flags(group)
    add_normalisation_flags(group)
    group.add_argument('--resize', action=argparse.BooleanOptionalAction,
                       help=f'bring pictures to --input-size by resizing instead of by padding and cropping; if unset, '
                       f'where it is over {SMALL}, or the pictures are over {SMALL} pixels or of different sizes')


def add_source_flags(group):
    """What else `load_dataset` reads."""
    group.add_argument('--val-fraction', type=number(float, 0, .999, above=True), metavar='FRACTION',
                       help='of FOLDER without val/: so much of each class is for evaluation, chosen by the files\' '
                       'names')
    group.add_argument('--exif', action=argparse.BooleanOptionalAction,
                       help='turn pictures as their camera says; if unset, all but ImageNet\'s and iNaturalist\'s')
    group.add_argument('--inat-category', default='name', choices=INAT_CATEGORIES,
                       help='level of the taxonomy that makes the classes of INAT and INAT19')
    group.add_argument('--train-split', default='train', metavar='NAME', help='for timm\'s readers')
    group.add_argument('--val-split', default='validation', metavar='NAME', help='for timm\'s readers')
    group.add_argument('--num-classes', type=COUNT, metavar='N', help='for timm\'s readers, where they can\'t tell')


def add_normalisation_flags(group):
    group.add_argument('--mean', type=float, nargs=3, metavar='MEAN',
                       help='of each channel, by which images are normalised; ImageNet\'s if unset')
    group.add_argument('--std', type=POSITIVE, nargs=3, metavar='DEVIATION', help='likewise')


def check_data_set(args):
    """Refuse a name that means nothing, and flags without effect."""
    if args.data_set not in BUILDERS and not readers.prefix_of(args.data_set):
        raise InputError(f'--data-set {args.data_set}: must be one of {", ".join(BUILDERS)}, or timm\'s '
                         f'{", ".join(f"{prefix}/NAME" for prefix in readers.PACKAGES)}')
    if args.data_set in BUILDERS:
        for flag, value, unset in (('num-classes', args.num_classes, None), ('train-split', args.train_split, 'train'),
                                   ('val-split', args.val_split, 'validation')):
            if value != unset:
                raise InputError(f'--{flag} {value}: is for timm\'s readers, and {args.data_set} is none of them')
    if args.val_fraction and args.data_set != 'FOLDER':
        raise InputError(f'--val-fraction {args.val_fraction}: is for --data-set FOLDER, not {args.data_set}')
    if args.exif is not None and args.data_set in ARRAYS:
        raise InputError(f'--{"exif" if args.exif else "no-exif"}: has no effect with --data-set {args.data_set}, '
                         f'whose pictures have no EXIF')


def load_dataset(args, is_train: bool, *, labelled: bool = True) -> Tuple[Dataset, int]:
    """The training or the evaluation split of `--data-set`, without a transform, and the number of classes.

    Args:
        labelled: whether the classes matter.

    Raises:
        InputError: the data are not there, or not what the data set's name says.
    """
    if readers.prefix_of(args.data_set):
        return readers.build_dataset(args, is_train, upright=turns_upright(args), labelled=labelled)
    if args.data_set != 'SAMPLE' and not Path(args.data_path).is_dir():
        raise InputError(f'--data-path {args.data_path}: no such directory')
    return BUILDERS[args.data_set](args, is_train)


def build_dataset(args, is_train: bool) -> Tuple[Dataset, int]:
    """The same with its transform, for classification.

    Raises:
        InputError: as `load_dataset`; or there is one class only.
    """
    dataset, num_classes = load_dataset(args, is_train)
    if num_classes < 2:
        raise InputError(f'--data-set {args.data_set}: has one class ({dataset.classes[0]}); a classifier needs two')
    dataset.resizes = decide_resize(args, dataset)
    args = argparse.Namespace(**{**vars(args), 'resize': dataset.resizes})
    dataset.transform = build_train_transform(args) if is_train else build_eval_transform(args)
    return dataset, num_classes


def decide_resize(args, dataset: Dataset) -> bool:
    """What --resize is, or has to be for a data set that has no transform yet."""
    if args.resize is not None or args.input_size > SMALL:
        return args.resize is not False
    if files_of(dataset):
        with ThreadPoolExecutor(max_workers=8) as pool:
            sizes = {size for _, size in pool.map(pictures.header, pictures.evenly_spread(files_of(dataset)))}
    elif args.data_set not in ARRAYS and not isinstance(dataset, IterableDataset):
        sizes = {dataset[index][0].size for index in pictures.evenly_spread(range(len(dataset)))[::10]}
    else:  # of arrays, which are small; of a stream, which could not go back to its beginning
        return False
    sizes.discard(pictures.UNKNOWN)
    return len(sizes) > 1 or any(max(size) > SMALL for size in sizes)


def notice_class_sizes(train: Dataset, held_out: Dataset):
    """Say once how many pictures the classes have, and which have too few."""
    if not files_of(train):
        return
    names = class_names(train)
    counts, held_out = (Counter(target for _, target in dataset.samples) for dataset in (train, held_out))
    there = sorted(counts.keys() | held_out.keys())
    if len(there) <= NUM_LISTED:
        each = ', '.join(f'{names[i]} {counts[i]}/{held_out[i]}' for i in there)
        notice(f'Pictures of each class for training/evaluation: {each}')
    else:
        ranges = [f'{min(count[i] for i in there)} to {max(count[i] for i in there)}' for count in (counts, held_out)]
        notice(f'{len(there)} classes, each with {ranges[0]} pictures for training and {ranges[1]} for evaluation')
    for problem, found in (('less than 2 pictures for training', [names[i] for i in there if counts[i] < 2]),
                           ('no pictures for evaluation', [names[i] for i in there if not held_out[i]])):
        if found:
            notice(f'Warning: {len(found)} of {len(there)} classes have {problem}: {utils.abridge(found)}')


def picture_of(dataset: Dataset) -> Optional[Callable[[int], Image.Image]]:
    """A function that gives the image of a number, as it is before any transform; None of a stream, without numbers."""
    if isinstance(dataset, IterableDataset):
        return None
    plain = copy.copy(dataset)
    plain.transform = None
    return lambda index: plain[index][0]


def possible_classes(dataset: Dataset) -> Optional[List[int]]:
    """The only classes that images of a test set have; None: all that the model knows."""
    return getattr(dataset, 'possible', None)


def class_names(dataset: Dataset) -> List[str]:
    """What the data set calls the classes 0, 1, ...: words, or the WordNet ids of ImageNet."""
    standard = getattr(dataset, 'standard', None)
    return standard if standard and set(dataset.classes) <= set(standard) else list(dataset.classes)


# ---------------------------------------------------------------------------------------------------------------------
# Transforms

def build_train_transform(args) -> transforms.Compose:
    """Source: original datasets.py, build_transform; the steps are timm's."""
    transform = create_transform(
        input_size=args.input_size,
        is_training=True,
        color_jitter=args.color_jitter,
        auto_augment=None if args.aa == 'none' else args.aa,
        interpolation=args.train_interpolation,
        re_prob=0. if args.resplit else args.reprob,  # --resplit erases whole batches, see CleanHalfErasing
        re_mode=args.remode,
        re_count=args.recount,
    )
    for op in augment_ops(transform):
        if op.aug_fn is auto_augment.posterize:
            op.aug_fn = posterize
    names = [type(step).__name__ for step in transform.transforms]
    first = names.index('MaybeToTensor')
    assert names[first + 1] == 'Normalize', names
    transform.transforms[first:first + 2] = [build_normalisation(args)]
    if not resizes(args):
        # faithful: small images (CIFAR) are padded and cropped, not resized (original datasets.py, build_transform)
        # differs: small images - still smaller ones are padded up to the size, where the original raises an error;
        # larger ones, and those of different sizes, are resized (decide_resize)
        transform.transforms[0] = transforms.RandomCrop(args.input_size, padding=4, pad_if_needed=True)
    return transform


def augment_ops(transform: transforms.Compose) -> Iterator[auto_augment.AugmentOp]:
    """The operations that timm's policies in `transform` choose from."""
    for step in transform.transforms:
        if isinstance(step, auto_augment.AutoAugment):
            yield from itertools.chain.from_iterable(step.policy)
        elif isinstance(step, (auto_augment.RandAugment, auto_augment.AugMixAugment)):
            yield from step.ops


def posterize(image: Image.Image, bits_to_keep: int, **kwargs) -> Image.Image:
    """timm's operation where it asks Pillow for 0 bits too, as `rand-m9-mstd0.5-inc1` does now and then."""
    # faithful: a black image, as Pillow made it then; newer versions raise an error
    return image.point(lambda value: 0) if bits_to_keep == 0 else auto_augment.posterize(image, bits_to_keep, **kwargs)


class ToNormalizedTensor:
    """RGB image -> tensor (3, img_h, img_w), normalised: ToTensor and Normalize in one pass.

    The same bits: an 8-bit channel has 256 values, and those two say what becomes of each.

    Args:
        mean, std: of each channel; ImageNet's if unset.
    """

    def __init__(self, mean: Optional[Sequence[float]] = None, std: Optional[Sequence[float]] = None):
        self.mean, self.std = tuple(mean or IMAGENET_DEFAULT_MEAN), tuple(std or IMAGENET_DEFAULT_STD)

    @staticmethod
    @cache  # some programs make a transform for each image
    def table(mean: Tuple[float, ...], std: Tuple[float, ...]) -> np.ndarray:
        """(3, 256)."""
        values = torch.arange(256, dtype=torch.uint8).numpy()[:, None, None].repeat(3, axis=2)  # (256, 1, 3)
        normalize = transforms.Normalize(mean, std)
        return normalize(transforms.functional.to_tensor(values))[:, :, 0].numpy()

    def __call__(self, image: Image.Image) -> torch.Tensor:
        pixels = np.asarray(image)
        out = np.empty((3, *pixels.shape[:2]), dtype=np.float32)
        for channel, values in enumerate(self.table(self.mean, self.std)):
            np.take(values, pixels[:, :, channel], out=out[channel], mode='clip')  # 'raise' would copy
        return torch.from_numpy(out)

    def __repr__(self) -> str:
        return f'{type(self).__name__}(mean={self.mean}, std={self.std})'


def build_normalisation(args) -> ToNormalizedTensor:
    """By --mean and --std; not every program has the flags."""
    return ToNormalizedTensor(getattr(args, 'mean', None), getattr(args, 'std', None))


def resizes(args) -> bool:
    """Whether training resizes, and not only pads and crops; --resize decides if it is given."""
    wanted = getattr(args, 'resize', None)  # not every program has the flag
    return args.input_size > SMALL if wanted is None else wanted


def resizes_for_evaluation(args) -> bool:
    return args.full_crop or resizes(args)


def build_eval_transform(args) -> transforms.Compose:
    """Source: original datasets.py, build_transform."""
    steps = []
    if resizes_for_evaluation(args):
        # faithful: without --full_crop 256/224 of the size is resized to, and the middle of it cropped
        resized = args.input_size if args.full_crop else int(args.input_size * 256 / 224)
        steps = [transforms.Resize(resized, interpolation=InterpolationMode.BICUBIC),
                 transforms.CenterCrop(args.input_size)]
    return transforms.Compose([*steps, build_normalisation(args)])


# ---------------------------------------------------------------------------------------------------------------------
# From samples to batches

class SeededSamples(Dataset):
    """Samples under keys (index, seed), as `samplers.TrainingSampler` gives them: the seed decides the augmentation.

    Args:
        most_bad: up to so many unreadable images are each replaced by the next one in the data set, and reported.
    """

    def __init__(self, dataset: Dataset, *, most_bad: int = 0):
        self.dataset = dataset
        self.most_bad = most_bad
        self.bad = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()  # one for all loading processes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Tuple[int, int]):
        index, seed = key
        while True:
            # differs: randomness - a function of the position; the original's generators run on from sample to sample
            utils.seed_cpu(seed)  # timm's transforms use Python's, NumPy's and torch's generators
            try:
                return self.dataset[index]
            except UnreadableImage as error:
                self.note_bad(index, error)
                index = (index + 1) % len(self)

    def note_bad(self, index: int, error: UnreadableImage):
        if self.bad[index]:
            return
        self.bad[index] = True
        count = int(self.bad.sum())
        if count > self.most_bad:
            if self.most_bad:
                raise UnreadableImage(f'{error}; that is one more than --skip-bad-images {self.most_bad}') from None
            with remedy(FOR_TRAINING):
                raise error
        print(f'{error}: skipped ({count} of at most {self.most_bad})', file=sys.stderr, flush=True)


class EvaluationSamples(Dataset):
    """The samples of an evaluation, of which none may be lost."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        with remedy(FOR_EVALUATION):
            return self.dataset[index]


def collate(samples: list) -> List[torch.Tensor]:
    """Stack samples to a batch: images (B, 3, img_h, img_w), targets (B,)."""
    check_same_size({tuple(image.shape[1:]) for image, _ in samples})
    return default_collate(samples)


class CleanHalfErasing:
    """`collate` for --resplit: random erasing in the second half of the batch, none in the first."""

    def __init__(self, args):
        self.erase = RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, num_splits=2, device='cpu')

    def __call__(self, samples: list) -> List[torch.Tensor]:
        images, targets = collate(samples)
        return [self.erase(images), targets]  # the last sample's seed decides what is erased


def build_train_collate(args) -> Callable[[list], List[torch.Tensor]]:
    return CleanHalfErasing(args) if args.resplit else collate
