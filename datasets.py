"""Data sets of pictures with class labels, their flags, and the checks of the flags.

To add a data set, write a builder that takes (source, is_train) and returns a `loaders.samples.PictureSet`, and enter
the builder into `BUILDERS`. Transforms receive RGB pictures.
"""
import argparse
import dataclasses
import gzip
import json
import pkgutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Dict, Optional, Sequence, Tuple

import numpy as np
from PIL import Image
from timm.data import ImageNetInfo
from torch.utils.data import Dataset, IterableDataset
from torchvision import datasets

from loaders import pictures, readers, split
from loaders.class_folders import ClassFolders
from loaders.samples import PictureSet
from loaders.source import Source
from loaders.transforms import SMALL, View
from run.commandline import COUNT, POSITIVE, number
from run.flags import add_data_path_flag
from run.output import log
from run.resume import resumed_folder
from utils import InputError, abridge, counted, dashed, first_line

INAT_CATEGORIES = ('kingdom', 'phylum', 'class', 'order', 'supercategory', 'family', 'genus', 'name')
SAMPLE = 'SAMPLE'  # the data set that comes with the repository
SAMPLE_DATA = Path(__file__).parent / 'sample_data'  # part of Fashion-MNIST, see the README there
DEFAULT_PATHS = ('/datasets01/imagenet_full_size/061417/', '/path/to/imagenet/train/')  # the original's
HELD_OUT = ('val', 'test')  # folders beside train/
NO_HELD_OUT = '; without val/, --val-fraction 0.2 holds out pictures for evaluation'
NO_CLASSES = '; labelled pictures are needed, in a folder for each class'
# Parts of the names of data sets whose pictures are not turned: the published accuracies were measured without turns
PUBLISHED = ('imnet', 'imagenet', 'inat')
ARRAYS = ('CIFAR10', 'CIFAR100', 'FASHION', SAMPLE)  # data sets that are not files of pictures


# ---------------------------------------------------------------------------------------------------------------------
# Data sets

class Cifar10(PictureSet, datasets.CIFAR10):
    """CIFAR-10 as torchvision reads it."""


class Cifar100(PictureSet, datasets.CIFAR100):
    """CIFAR-100 as torchvision reads it."""


class FashionMNIST(PictureSet, Dataset):
    """Fashion-MNIST from its four IDX files, gzipped or not, in `root` or its FashionMNIST/raw/, as RGB images."""

    def __init__(self, root: Path, train: bool, *, flag: str = '--data-path'):
        part, self.classes = 'train' if train else 't10k', datasets.FashionMNIST.classes
        self.images = read_idx(root, f'{part}-images-idx3-ubyte', flag)
        self.labels = read_idx(root, f'{part}-labels-idx1-ubyte', flag)
        if len(self.images) != len(self.labels):
            raise InputError(f'{flag}: {root}: {len(self.images)} {part} images but '
                             f'{counted(len(self.labels), "label")}')
        if self.labels.max(initial=0) >= len(self.classes):
            raise InputError(f'{flag}: {root}: a {part} label is {self.labels.max()}, the last is '
                             f'{len(self.classes) - 1}')

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return self.transformed(Image.fromarray(self.images[index]).convert('RGB')), int(self.labels[index])


def read_idx(root: Path, name: str, flag: str) -> np.ndarray:
    """Read the IDX file `name`: two zero bytes, type, rank, sizes as big-endian uint32, bytes of data."""
    folders = (root, root / 'FashionMNIST' / 'raw')
    path = next((p for folder in folders for p in (folder / name, folder / f'{name}.gz') if p.is_file()), None)
    if path is None:
        raise InputError(f'{flag} {root}: no {name}[.gz] there or in FashionMNIST/raw')
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == '.gz' else path.read_bytes()
        rank = content[3]
        shape = np.frombuffer(content, '>u4', count=rank, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except (OSError, EOFError, IndexError, ValueError, zlib.error) as error:
        raise InputError(f'{flag}: {path}: truncated or not an IDX file ({first_line(error)})') from None


class INaturalist(PictureSet, Dataset):
    """iNaturalist 2018 or 2019 from `train{year}.json`, `val{year}.json`, `categories.json` and image folders.

    Source: original datasets.py, INatDataset.
    """

    def __init__(self, source: Source, is_train: bool, year: int):
        self.upright, root, category = turns_upright(source), Path(source.path), source.inat_category
        categories, annotations = (read_json(root / name, source.flag) for name in
                                   ('categories.json', f'train{year}.json'))
        part = annotations if is_train else read_json(root / f'val{year}.json', source.flag)
        try:
            # faithful: classes are numbered as they first appear among the training annotations
            names = [categories[int(a['category_id'])][category] for a in annotations['annotations']]
            class_to_idx = {name: i for i, name in enumerate(dict.fromkeys(names))}
            self.samples = []
            for image in part['images']:
                folder, *_, category_id, name = image['file_name'].split('/')
                # The archives unpack to FOLDER/SUPERCATEGORY/ID/NAME; the original's paths have no supercategory.
                path = root / folder / category_id / name
                path = path if path.exists() else root / image['file_name']
                self.samples.append((str(path), class_to_idx[categories[int(category_id)][category]]))
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise InputError(f'{source.flag} {root}: the annotations of {year} are not iNaturalist\'s '
                             f'({type(error).__name__}: {error}, --inat-category {category})') from None
        self.classes = list(class_to_idx)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        path, target = self.samples[index]
        return self.transformed(pictures.load_rgb(path, upright=self.upright)), target


def read_json(path: Path, flag: str):
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f'{flag}: {path} is missing') from None
    except ValueError as error:
        raise InputError(f'{flag}: {path} is not valid JSON ({error})') from None


def split_folder(source: Source, names: Tuple[str, ...], *, remedy: str = '') -> Path:
    """Return the first existing folder of `names` in --data-path; append the remedy to the error if there is none."""
    root = Path(source.path)
    for name in names:
        if (root / name).is_dir():
            return root / name
    existing = pictures.visible_folders(root)
    raise InputError(f'{source.flag} {root}: no {" or ".join(f"{name}/" for name in names)} folder there (existing: '
                     f'{abridge(existing) or "no folders"}){remedy if existing else NO_CLASSES}')


# ---------------------------------------------------------------------------------------------------------------------
# Builders

def build_imagenet(source: Source, is_train: bool, subset: str = 'imagenet-1k') -> ClassFolders:
    root = split_folder(source, ('train',) if is_train else ('val',))
    return ClassFolders(root, standard=ImageNetInfo(subset).label_names(), upright=turns_upright(source),
                        flag=source.flag)


def build_test_set(source: Source, is_train: bool, subset: str = '') -> ClassFolders:
    """Build one of ImageNet's other test sets; `subset` is timm's name for 200 classes, '' for all 1000."""
    if is_train:
        raise InputError(f'--data-set {source.name}: is a test set, only for --eval')
    standard = ImageNetInfo().label_names()
    known = pkgutil.get_data('timm.data', f'_info/{subset}_synsets.txt').decode().split() if subset else standard
    numbers = {name: standard.index(name) for name in known}
    if not subset:  # ImageNet-V2 has folders 0 to 999, which are in another order when sorted as texts
        numbers.update({name: int(name) for i in range(len(standard)) for name in (str(i), f'{i:03}', f'{i:04}')})
    root = folder_of_classes(source, numbers)
    possible = sorted(numbers[name] for name in known) if subset else None
    dataset = ClassFolders(root, standard=standard, numbers=numbers, possible=possible, upright=turns_upright(source),
                           flag=source.flag)
    if len(dataset.classes) < len(known):
        log(f'{source.flag}: {root} has {len(dataset.classes)} of the {counted(len(known), "class")} of '
            f'{source.name}: its accuracy is not comparable')
    return dataset


def folder_of_classes(source: Source, known: Dict[str, int]) -> Path:
    """Return the folder, --data-path or a folder there, with class folders only; raise InputError if there is none."""
    root = Path(source.path)
    folders = pictures.visible_folders(root)
    problem = f'no class folders (as n01440764) there or one level below; existing: {abridge(folders) or "none"}'
    for folder in (root, *(root / name for name in folders)):
        names = pictures.visible_folders(folder)
        unknown = [name for name in names if name not in known]
        if names and not unknown:
            return folder
        if len(unknown) < len(names):
            problem = (f'{folder} has {counted(len(unknown), "folder")} without a class of the test set: '
                       f'{abridge(unknown)}')
    raise InputError(f'{source.flag} {root}: {problem}')


def build_folder(source: Source, is_train: bool, num_classes: Optional[int] = None) -> ClassFolders:
    stored = split.read(source.run_folder)
    has_held_out = any(Path(source.path, name).is_dir() for name in HELD_OUT)
    splits = source.val_fraction or (stored and not has_held_out)
    dataset = split_by_name(source, is_train, stored) if splits else own_split(source, is_train)
    if num_classes is not None and len(dataset.classes) != num_classes:
        raise InputError(f'--data-set {source.name}: {dataset.root} has '
                         f'{counted(len(dataset.classes), "class folder")}, not {num_classes}')
    return dataset


def own_split(source: Source, is_train: bool) -> ClassFolders:
    """Build one of a folder's own two parts, which must have equal classes."""
    parts = {True: ('train',), False: HELD_OUT}
    folder = split_folder(source, parts[is_train], remedy=NO_HELD_OUT)
    if is_train or Path(source.path, 'train').is_dir():  # evaluation alone needs no training images
        other = split_folder(source, parts[not is_train], remedy=NO_HELD_OUT)
        for first, second in ((folder, other), (other, folder)):
            missing = sorted(set(pictures.visible_folders(first)) - set(pictures.visible_folders(second)))
            if missing:
                raise InputError(f'{source.flag}: class folders in {first}, but not in {second}: {abridge(missing)}')
    return ClassFolders(folder, upright=turns_upright(source), allow_empty=not is_train, flag=source.flag)


def split_by_name(source: Source, is_train: bool, stored: Optional[dict]) -> ClassFolders:
    """Build one of two parts of a folder, divided by --val-fraction or by the stored division of a run."""
    root = Path(source.path)
    held_out = [name for name in HELD_OUT if (root / name).is_dir()]
    if held_out:
        raise InputError(f'--val-fraction {source.val_fraction}: {root} has a {held_out[0]}/ folder of its own')
    folder = root / 'train' if (root / 'train').is_dir() else root
    dataset = ClassFolders(folder, upright=turns_upright(source), flag=source.flag)
    fraction, seed = source.val_fraction, source.seed
    if not fraction:
        fraction, seed = stored['val_fraction'], stored['seed']
    part = dataset.divided(split.Split(dataset.names(), fraction=fraction, seed=seed, stored=stored), is_train)
    if not part.samples:
        raise InputError(f'--val-fraction {source.val_fraction}: leaves no pictures of {folder} for '
                         f'{"training" if is_train else "evaluation"}')
    return part


def turns_upright(source: Source) -> bool:
    """Return True if pictures are rotated by their EXIF orientation: by default, all but published data sets."""
    is_published = any(word in source.name.lower() for word in PUBLISHED)
    return not is_published if source.exif is None else source.exif


def build_cifar(source: Source, is_train: bool, cls: type) -> PictureSet:
    try:
        return cls(source.path, train=is_train)
    except RuntimeError:
        name = cls.__mro__[2].__name__  # of torchvision's class
        raise InputError(f'{source.flag} {source.path}: no intact {cls.base_folder} there; to get it: python -c "from '
                         f'torchvision.datasets import {name}; {name}(\'{source.path}\', download=True)"') from None


BUILDERS = {
    'IMNET': build_imagenet,
    'IMNET22k': partial(build_imagenet, subset='imagenet-22k'),
    'IMNET_V2': build_test_set,
    'IMNET_SKETCH': build_test_set,
    'IMNET_A': partial(build_test_set, subset='imagenet_a'),
    'IMNET_R': partial(build_test_set, subset='imagenet_r'),
    'CIFAR10': partial(build_cifar, cls=Cifar10),
    'CIFAR100': partial(build_cifar, cls=Cifar100),
    'FASHION': lambda source, is_train: FashionMNIST(Path(source.path), is_train, flag=source.flag),
    'INAT': partial(INaturalist, year=2018),
    'INAT19': partial(INaturalist, year=2019),
    'CARS': partial(build_folder, num_classes=196),
    'FLOWERS': partial(build_folder, num_classes=102),
    'FOLDER': build_folder,
    SAMPLE: lambda source, is_train: FashionMNIST(SAMPLE_DATA, is_train),
}


def load(source: Source, is_train: bool, *, labelled: bool = True) -> Tuple[PictureSet, int]:
    """Load the training or the evaluation split of a data set, without a transform, and its number of classes.

    Args:
        labelled: False: the classes are not needed.

    Raises:
        InputError: the data do not exist, or do not match the data set's name.
    """
    if readers.prefix_of(source.name):
        return readers.build_dataset(source, is_train, upright=turns_upright(source), labelled=labelled)
    if source.name != SAMPLE and not Path(source.path).is_dir():
        raise no_directory(source.flag, source.path)
    dataset = BUILDERS[source.name](source, is_train)
    return dataset, len(dataset.class_names())


def no_directory(flag: str, path) -> InputError:
    """Return the error about a missing folder of data, which may be a default that fits no other machine."""
    default = ' (the default); give the folder of the data' if Path(path) in map(Path, DEFAULT_PATHS) else ''
    return InputError(f'{flag} {path}: no such directory{default}')


def load_classes(source: Source, is_train: bool) -> Tuple[PictureSet, int]:
    """Load a split for any classification, see `load`; raise InputError if all training pictures have one class."""
    dataset, num_classes = load(source, is_train)
    refuse_one_class(dataset.classes_present() if is_train else dataset.class_names(),
                     where=f'{source.flag} {source.path}' if source.name in BUILDERS else f'--data-set {source.name}')
    return dataset, num_classes


def refuse_one_class(names: Sequence[str], *, where: str):
    """Raise InputError, which begins with `where`, if there is only one class: every accuracy would be 100 %."""
    if len(names) < 2:
        raise InputError(f'{where}: has one class ({abridge(names)}); a classifier needs two')


def decide_resize(source: Source, dataset: PictureSet, view: View) -> View:
    """Return a view whose `resize`, if None, is the value that a data set without a transform needs."""
    resize = view.resize if view.resize is not None else view.input_size > SMALL or needs_resize(source, dataset)
    return dataclasses.replace(view, resize=resize)


def needs_resize(source: Source, dataset: PictureSet) -> bool:
    """Return True if pictures for a small input are themselves large, or of different sizes."""
    if source.name in ARRAYS or isinstance(dataset, IterableDataset):
        return False  # arrays are small; a stream can't go back to its beginning
    if dataset.files():
        with ThreadPoolExecutor(max_workers=8) as pool:
            sizes = {size for _, size in pool.map(pictures.header, pictures.evenly_spread(dataset.files()))}
    else:
        sizes = {dataset[index][0].size for index in pictures.evenly_spread(range(len(dataset)))[::10]}
    sizes.discard(pictures.UNKNOWN)
    return len(sizes) > 1 or any(max(size) > SMALL for size in sizes)


# ---------------------------------------------------------------------------------------------------------------------
# Flags

def add_data_flags(group):
    """Add the flags of labelled data to a group of a parser."""
    group.add_argument('--data-set', default='IMNET', metavar='NAME',
                       help=f'data set: {", ".join(BUILDERS)}; or, read by timm, {", ".join(readers.PACKAGES)}, each '
                       'with /NAME (see docs/data.md)')
    add_data_path_flag(group, default=DEFAULT_PATHS[0], help='folder of the data; not needed for SAMPLE')
    add_source_flags(group)
    add_normalisation_flags(group)
    group.add_argument('--resize', action=argparse.BooleanOptionalAction,
                       help=f'resizing of images to --input-size instead of padding and cropping; if unset, for sizes '
                       f'above {SMALL}, or pictures above {SMALL} pixels or of different sizes')


def add_source_flags(group):
    """Add the flags of `source` but the data set's name and path."""
    group.add_argument('--val-fraction', type=number(float, 0, .999, above=True), metavar='FRACTION',
                       help='fraction of each class to hold out if FOLDER has no val/, chosen by the files\' names')
    group.add_argument('--exif', action=argparse.BooleanOptionalAction,
                       help='EXIF orientation of pictures; if unset, applied to all but ImageNet and iNaturalist')
    group.add_argument('--inat-category', default='name', choices=INAT_CATEGORIES,
                       help='level of the taxonomy that makes the classes of INAT and INAT19')
    group.add_argument('--train-split', default='train', metavar='NAME', help='training split for timm\'s readers')
    group.add_argument('--val-split', default='validation', metavar='NAME', help='evaluation split for timm\'s readers')
    group.add_argument('--num-classes', type=COUNT, metavar='N', help='number of classes, if timm\'s reader has none')


def add_normalisation_flags(group):
    group.add_argument('--mean', type=float, nargs=3, metavar='MEAN',
                       help='mean of each channel for normalisation; ImageNet\'s if unset')
    group.add_argument('--std', type=POSITIVE, nargs=3, metavar='DEVIATION',
                       help='standard deviation of each channel for normalisation; ImageNet\'s if unset')


def check_data_set(args, *, name: Optional[str] = None, flag: str = '--data-set'):
    """Refuse an unknown data set (`name`, given by `flag`; None: --data-set), and flags that have no effect on it."""
    name = args.data_set if name is None else name
    if name not in BUILDERS and not readers.prefix_of(name):
        raise InputError(f'{flag} {name}: must be one of {", ".join(BUILDERS)}, or timm\'s '
                         f'{", ".join(f"{prefix}/NAME" for prefix in readers.PACKAGES)}')
    for option, default in (('num_classes', None), ('train_split', 'train'), ('val_split', 'validation')):
        value = vars(args)[option]
        if name in BUILDERS and value != default:
            raise InputError(f'{dashed(option)} {value}: only works with timm\'s readers, not {name}')
    if args.val_fraction and name != 'FOLDER':
        raise InputError(f'--val-fraction {args.val_fraction}: only works with {flag} FOLDER, not {name}')
    if args.exif is not None and name in ARRAYS:
        raise InputError(f'--{"exif" if args.exif else "no-exif"}: has no effect with {flag} {name}, whose pictures '
                         f'have no EXIF data')


def flags_of(name: str, path: str) -> dict:
    """Return the flags of a data set for the command line of another program, see run.commandline.words_of."""
    return {'data_set': name, 'data_path': None if name == SAMPLE else path}


def source(args, *, resumes: bool = True) -> Source:
    """Return the source that the flags describe; `resumes`: the program has run.flags.add_checkpoint_flags."""
    run_folder = resumed_folder(args.resume, args.output_dir) if resumes else None
    return Source(args.data_set, args.data_path, val_fraction=args.val_fraction, exif=args.exif,
                  inat_category=args.inat_category, train_split=args.train_split, val_split=args.val_split,
                  num_classes=args.num_classes, seed=args.seed if resumes else 0, batch_size=args.batch_size,
                  run_folder=run_folder)
