"""Data sets of pictures with label pictures: ADE20k, folders of one's own, and drawn shapes."""
import argparse
import dataclasses
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

import numpy as np
from torch.utils.data import Dataset

from dense import shapes
from loaders import pictures, split
from loaders.samples import PictureSet, inspect
from run.commandline import COUNT, PATH, number
from run.flags import add_data_path_flag
from run.output import log
from run.resume import resumed_folder
from segmentation import labels
from segmentation.labels import Numbering
from utils import InputError, abridge, dashed, first_line

ADE, MASKS, SAMPLE = 'ADE20K', 'MASKS', 'SAMPLE'
NAMES = (ADE, MASKS, SAMPLE)
ADE_CLASSES = 150
SAMPLE_PICTURES = {True: 600, False: 100}  # for training, for evaluation
VAL_FRACTION = .2  # of MASKS without a folder val/
PROBED = 64  # pictures of each part that are read before work starts


@dataclasses.dataclass(frozen=True)
class Source:
    """Name and place of a data set.

    Args:
        name: one of NAMES.
        path: folder of the data.
        classes: file with a class name per line; '': the data's own names.
        num_classes: number of classes; None: the data's own.
        zero_is_a_class: 0 in label pictures is a class; None: as in ADE20k, or by looking at the values.
        val_fraction: fraction of MASKS to hold out without val/; None: VAL_FRACTION.
        exif: pictures are rotated by their EXIF orientation.
        seed: seed of held-out and of drawn pictures.
        run_folder: folder of the run that is resumed, whose division of pictures is kept; None: a fresh run.
    """
    name: str
    path: str
    classes: str = ''
    num_classes: Optional[int] = None
    zero_is_a_class: Optional[bool] = None
    val_fraction: Optional[float] = None
    exif: bool = True
    seed: int = 0
    run_folder: Optional[Path] = None


class LabelledPictures(PictureSet, Dataset):
    """Picture files with label pictures.

    Args:
        samples: (path of the picture, path of its label picture).
        classes: class names.
        numbering: numbers of the classes in files.
    """

    def __init__(self, samples: Sequence[Tuple[str, str]], classes: Sequence[str], numbering: Numbering, *,
                 upright: bool = True):
        self.samples, self.classes, self.numbering, self.upright = list(samples), list(classes), numbering, upright

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        """Return the transformed picture and labels; without a transform, arrays (height, width, 3) and (h, w)."""
        path, label_path = self.samples[index]
        for upright in dict.fromkeys((self.upright, False)):  # perhaps only the stored sizes fit
            numbers = labels.read(label_path, upright=upright)
            picture = np.asarray(pictures.load_rgb(path, upright=upright))
            if picture.shape[:2] == numbers.shape:
                break
        if picture.shape[:2] != numbers.shape:
            sizes = [f'{shape[1]} x {shape[0]}' for shape in (numbers.shape, picture.shape)]
            raise InputError(f'{label_path}: has {sizes[0]} pixels, but its picture {path} has {sizes[1]}')
        return self.finished(picture, self.numbering.to_classes(numbers, label_path))

    def finished(self, picture: np.ndarray, classes: np.ndarray):
        return (picture, classes) if self.transform is None else self.transform(picture, classes)


class Drawn(LabelledPictures):
    """Drawn shapes, made on the fly."""

    def __init__(self, count: int, *, seed: int):
        super().__init__((), shapes.CLASSES, labels.numbering(len(shapes.CLASSES)))
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        scene = shapes.draw(index, self.seed)
        return self.finished(scene.picture, self.numbering.to_classes(scene.labels().astype(np.int32), 'SAMPLE'))


# ---------------------------------------------------------------------------------------------------------------------
# Builders

def build(source: Source, *, trains: bool = True, known: Optional[Tuple[Optional[List[str]], Numbering]] = None
          ) -> Tuple[Optional[LabelledPictures], LabelledPictures]:
    """Build the data for training (None unless `trains`) and for evaluation, without transforms, and check them.

    Args:
        known: names and numbering of a trained model's classes; None: the data's own.

    Raises:
        InputError: the data do not exist, or a label picture is missing or invalid.
    """
    if source.name == SAMPLE:
        return (Drawn(SAMPLE_PICTURES[True], seed=2 * source.seed) if trains else None,
                Drawn(SAMPLE_PICTURES[False], seed=2 * source.seed + 1))
    root = Path(source.path)
    if not root.is_dir():
        raise InputError(f'--data-path {source.path}: no such directory')
    train, val, division = ade_files(root, trains) if source.name == ADE else mask_files(root, source, trains)
    names = class_names(source)
    if known is not None:
        known_names, numbering = known
        if names is not None and len(names) != len(numbering.values):
            raise InputError(f'--classes: {len(names)} names, but the weights have {len(numbering.values)} classes')
        names = names or known_names or [str(value) for value in numbering.values]
    else:
        numbering = numbering_for(source, names, [label for _, label in [*train, *val]])
        names = names or [str(value) for value in numbering.values]
    sets = [LabelledPictures(samples, names, numbering, upright=source.exif) for samples in (train, val)]
    for dataset in sets:
        dataset.split = division
    inspect(sets[0] if trains else None, sets[1])
    for dataset in sets:
        with ThreadPoolExecutor(max_workers=8) as pool:  # raises InputError for labels that do not fit
            list(pool.map(dataset.__getitem__, pictures.evenly_spread(range(len(dataset)), PROBED)))
    return sets[0] if trains else None, sets[1]


def ade_files(root: Path, trains: bool) -> tuple:
    """Return samples for training and for evaluation of the layout of ADE20k; and None, for there is no division."""
    parts = [pairs(root / 'images' / part, root / 'annotations' / part) if is_used else []
             for part, is_used in (('training', trains), ('validation', True))]
    return *parts, None


def mask_files(root: Path, source: Source, trains: bool) -> tuple:
    """Return samples for training and for evaluation from images/ and masks/, and the division without val/."""
    images, masks = root / 'images', root / 'masks'
    held_out = next((name for name in ('val', 'validation', 'test') if (images / name).is_dir()), None)
    if held_out is not None:
        if source.val_fraction:
            raise InputError(f'--val-fraction {source.val_fraction}: {images} has a folder {held_out}/ of its own')
        first = 'training' if (images / 'training').is_dir() else 'train'
        return (pairs(images / first, masks / first) if trains else [],
                pairs(images / held_out, masks / held_out), None)
    samples = pairs(images, masks)
    if not trains and source.run_folder is None and source.val_fraction is None:
        return [], samples, None  # a folder for evaluation alone
    stored = split.read(source.run_folder)
    names = {f'all/{Path(path).relative_to(images).as_posix()}': (path, label) for path, label in samples}
    fraction = source.val_fraction or (stored or {}).get('val_fraction') or VAL_FRACTION
    division = split.Split(names, fraction=fraction, seed=source.seed, stored=stored)
    if not division.val:
        raise InputError(f'--data-path {root}: one picture is not enough for training and evaluation')
    log(f'{images}: no folder val/; {len(division.val)} of {len(names)} pictures are held out for evaluation '
        f'(--val-fraction {fraction:g})')
    return ([names[name] for name in sorted(division.train)], [names[name] for name in sorted(division.val)], division)


def pairs(images: Path, label_folder: Path) -> List[Tuple[str, str]]:
    """Return the pictures of a folder and its subfolders, each with the label picture of the same name.

    Raises:
        InputError: a folder is missing or empty, or a picture has no label picture.
    """
    for folder in (images, label_folder):
        if not folder.is_dir():
            raise InputError(f'--data-path: no folder {folder}')
    left_out = Counter()
    found = pictures.find(images, left_out)
    pictures.log_left_out(f'{images}', left_out)
    if not found:
        raise InputError(f'--data-path: no pictures in {images}')
    by_name = labels.files_by_name(label_folder)
    names = [Path(path).relative_to(images).with_suffix('').as_posix() for path in found]
    missing = [name for name in names if name not in by_name]
    if missing:
        raise InputError(f'{label_folder}: no label picture for {len(missing)} of {len(found)} pictures: '
                         f'{abridge(missing, 4)}')
    return [(path, by_name[name]) for path, name in zip(found, names)]


def class_names(source: Source) -> Optional[List[str]]:
    """Read class names from --classes, or ADE20k's objectInfo150.txt; None: there are none."""
    path = Path(source.classes or Path(source.path) / 'objectInfo150.txt')
    if not source.classes and (source.name != ADE or not path.is_file()):
        return None
    try:
        lines = [line for line in path.read_text(encoding='utf-8').splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f'--classes {path}: can\'t be read as text ({first_line(error)})') from None
    if not source.classes:  # a table: number, three shares, Name, with a head
        lines = [line.split('\t')[-1].split(',')[0].strip() for line in lines[1:]]
    if not lines or len(lines) > labels.MOST:
        raise InputError(f'--classes {path}: {len(lines)} names; allowed are 1 to {labels.MOST}')
    return [line.strip() for line in lines]


def numbering_for(source: Source, names: Optional[List[str]], label_paths: List[str]) -> Numbering:
    """Return the numbering by the flags, or by looking at all label pictures of MASKS."""
    count = source.num_classes or (len(names) if names else ADE_CLASSES if source.name == ADE else None)
    if names and count != len(names):
        raise InputError(f'--num-classes {count}: {len(names)} names are given')
    if count and (source.name == ADE or source.zero_is_a_class is not None):
        return labels.numbering(count, zero_is_a_class=bool(source.zero_is_a_class))
    found, reason = labels.numbering_of(count_numbers(label_paths), zero_is_a_class=source.zero_is_a_class)
    if len(found.values) > labels.MOST:
        raise InputError(f'--data-path: labels up to {found.values[-1]}; at most {labels.MOST} classes are possible')
    if count and found.values[0] + count - 1 > found.values[-1]:
        found = labels.numbering(count, zero_is_a_class=found.values[0] == 0)
    if count not in (None, len(found.values)):
        raise InputError(f'--num-classes {count}: label pictures have the numbers {found} ({reason})')
    log(f'Label pictures: {reason}; {found}')
    return found


def count_numbers(label_paths: List[str]) -> dict:
    """Count the pixels of each number in label pictures."""
    def count(path: str) -> Counter:
        return Counter(dict(zip(*(values.tolist() for values in np.unique(labels.read(path), return_counts=True)))))

    with ThreadPoolExecutor(max_workers=8) as pool:
        return dict(sum(pool.map(count, label_paths), Counter()))


class Numbered(Dataset):
    """Samples of a transformed data set, each with its index."""

    def __init__(self, dataset: LabelledPictures):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        return (*self.dataset[index], index)


# ---------------------------------------------------------------------------------------------------------------------
# Flags

def add_data_flags(group):
    """Add the flags of a data set with label pictures."""
    group.add_argument('--data-set', default=ADE, choices=NAMES, help='name of the data set, see docs/segmentation.md')
    add_data_path_flag(group, help='folder of the data; not needed for SAMPLE')
    group.add_argument('--classes', default='', type=PATH, metavar='FILE', help='file with a class name per line')
    group.add_argument('--num-classes', type=COUNT, metavar='N', help='number of classes; the data\'s own if unset')
    group.add_argument('--zero-is-a-class', action=argparse.BooleanOptionalAction,
                       help='number 0 of label pictures as a class; unset: no class, but MASKS is looked at')
    group.add_argument('--val-fraction', type=number(float, 0, .999, above=True), metavar='FRACTION',
                       help=f'fraction of MASKS to hold out without val/; {VAL_FRACTION} if unset')
    group.add_argument('--exif', action=argparse.BooleanOptionalAction, default=True,
                       help='EXIF orientation of pictures')


def check_flags(args):
    """Raise InputError for a flag that has no effect on the data set, or for missing data."""
    if args.data_set == SAMPLE:
        for name in ('data_path', 'classes', 'num_classes', 'zero_is_a_class', 'val_fraction'):
            if vars(args)[name] not in ('', None):
                raise InputError(f'{dashed(name)}: has no effect with --data-set {SAMPLE}')
    elif not args.data_path:
        raise InputError(f'--data-path: needed for --data-set {args.data_set}')
    if args.val_fraction and args.data_set != MASKS:
        raise InputError(f'--val-fraction {args.val_fraction}: only works with --data-set {MASKS}')


def source(args) -> Source:
    """Return the source that the flags describe."""
    return Source(args.data_set, args.data_path, classes=args.classes, num_classes=args.num_classes,
                  zero_is_a_class=args.zero_is_a_class, val_fraction=args.val_fraction, exif=args.exif, seed=args.seed,
                  run_folder=resumed_folder(args.resume, args.output_dir))
