"""Samples: the protocol of data sets of pictures, checks before work starts, and the way from samples to batches."""
import contextlib
import copy
import sys
from collections import Counter
from typing import Callable, List, Optional, Sequence, Tuple

import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from torch.utils.data import Dataset, IterableDataset, default_collate

from loaders import pictures
from run.output import log, write_line
from utils import InputError, UnreadableImage, abridge, counted, seed_cpu, shown

FEW = 10  # pictures of a class, below which a warning is logged
NUM_LISTED = 20  # maximum number of classes whose numbers of pictures are listed one by one
FOR_TRAINING = '--skip-bad-images N replaces up to N such training images by others'
FOR_EVALUATION = 'repair or remove the image: --skip-bad-images only applies to training images'


class PictureSet:
    """Protocol of a data set of pictures: the attributes that loaders, programs and reports read.

    A data set derives from this class and from torch's. Its constructor sets the attributes that differ from the
    defaults below. A sample is a pair: the RGB picture or the result of its transform, and the label.

    Attributes:
        classes: class names in the order of their indices.
        samples: (path, label) of each picture; empty if the pictures are not files.
        upright: pictures are rotated by their EXIF orientation.
        standard: all class names of a published data set, of which `classes` may be a part; None: not published.
        possible: indices of the only classes that the pictures have; None: all.
        split: division into training and evaluation by --val-fraction; None: the data set has its own.
        transform: function of a picture; None: samples contain the picture itself.
    """
    classes: Sequence[str] = ()
    samples: Sequence[Tuple[str, int]] = ()
    upright = False
    standard: Optional[List[str]] = None
    possible: Optional[List[int]] = None
    split = None
    transform: Optional[Callable] = None

    def with_transform(self, transform: Optional[Callable]) -> 'PictureSet':
        """Return this data set with another transform."""
        changed = copy.copy(self)
        changed.transform = transform
        return changed

    def files(self) -> List[str]:
        """Return the paths of the pictures; empty if they are not files."""
        return [path for path, _ in self.samples]

    def class_names(self) -> List[str]:
        """Return the names of the classes 0, 1, ...: words, or the WordNet ids of ImageNet."""
        is_standard = self.standard is not None and set(self.classes) <= set(self.standard)
        return list(self.standard if is_standard else self.classes)

    def classes_present(self) -> List[str]:
        """Return the names of the classes that the pictures in `samples` have; without `samples`, of all classes."""
        names = self.class_names()
        return [names[label] for label in sorted({label for _, label in self.samples})] or names

    def transformed(self, picture: Image.Image):
        return picture if self.transform is None else self.transform(picture)


class Part(PictureSet, Dataset):
    """Part of a data set without a transform: the pictures with these indices."""

    def __init__(self, source: PictureSet, indices: Sequence[int]):
        self.source, self.indices = source, list(indices)
        self.classes, self.standard, self.upright, self.possible = (
            source.classes, source.standard, source.upright, source.possible)
        self.samples = [source.samples[i] for i in self.indices] if source.samples else ()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int):
        picture, label = self.source[self.indices[index]]
        return self.transformed(picture), label


def picture_of(dataset: PictureSet) -> Optional[Callable[[int], Image.Image]]:
    """Return a function from an index to the picture before any transform; None for a stream."""
    plain = dataset.with_transform(None)
    return None if isinstance(dataset, IterableDataset) else lambda index: plain[index][0]


# ---------------------------------------------------------------------------------------------------------------------
# Checks before work starts

def inspect(train: Optional[PictureSet], evaluated: Optional[PictureSet] = None, *, skips_bad: bool = False,
            same_size: bool = False, with_long: bool = False):
    """Log peculiar pictures, and decode some pictures of each data set, evenly spread.

    Args:
        train, evaluated: data sets for training and for evaluation; None: no such data set.
        skips_bad: unreadable training images are allowed.
        same_size: pictures for evaluation must have equal sizes.
        with_long: pictures are cropped to squares; log the number of long ones.

    Raises:
        UnreadableImage: the first picture that can't be decoded.
        InputError: pictures for evaluation differ in size.
    """
    pictures.log_peculiarities([file for dataset in (train, evaluated) if dataset is not None
                                for file in dataset.files()], with_long=with_long)
    for dataset, remedy in ((None if skips_bad else train, FOR_TRAINING), (evaluated, FOR_EVALUATION)):
        if dataset is not None:
            with adding(remedy):
                sizes = pictures.sizes(pictures.evenly_spread(dataset.files()), upright=dataset.upright)
            if same_size and dataset is evaluated:
                check_same_size(sizes)


@contextlib.contextmanager
def adding(remedy: str):
    """Append a remedy to the error of an unreadable image."""
    try:
        yield
    except UnreadableImage as error:
        raise UnreadableImage(f'{error}; {remedy}') from None


def check_same_size(sizes: set):
    """Refuse images of several sizes (img_h, img_w), which can't be stacked to a batch."""
    if len(sizes) > 1:
        raise InputError(f'without --resize evaluation images keep their size, and these have different sizes '
                         f'({abridge(sorted(sizes), 3)} pixels): add --resize')


def log_class_sizes(train: PictureSet, evaluated: PictureSet):
    """Log the number of pictures of each class, and warn about classes with too few."""
    if not train.files():
        return
    names = train.class_names()
    trained, tested = (Counter(label for _, label in dataset.samples) for dataset in (train, evaluated))
    labels = sorted(trained.keys() | tested.keys())
    if len(labels) <= NUM_LISTED:
        counts = ', '.join(f'{shown(names[i])} {trained[i]}/{tested[i]}' for i in labels)
        log(f'Pictures of each class for training/evaluation: {counts}')
    else:
        ranges = [f'{min(count[i] for i in labels)} to {max(count[i] for i in labels)}' for count in (trained, tested)]
        log(f'{counted(len(labels), "class")}, each with {counted(ranges[0], "picture")} for training and {ranges[1]} '
            'for evaluation')
    for counts, side in ((trained, 'training'), (tested, 'evaluation')):
        if few := [f'{names[i]} {counts[i]}' for i in labels if counts[i] < FEW]:
            log(f'Warning: fewer than {FEW} pictures for {side} in {len(few)} of {counted(len(labels), "class")}: '
                f'{abridge(few)}')


# ---------------------------------------------------------------------------------------------------------------------
# From samples to batches

class SeededSamples(Dataset):
    """Samples under keys (index, augmentation seed); the next sample replaces an unreadable image, `most_bad` times."""

    def __init__(self, dataset: Dataset, *, most_bad: int = 0):
        self.dataset, self.most_bad = dataset, most_bad
        self.bad = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()  # shared by all workers

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Tuple[int, int]):
        index, seed = key
        while True:
            # differs: randomness - a function of the position; the original's generators run on from sample to sample
            seed_cpu(seed)  # timm's transforms use Python's, NumPy's and torch's generators
            try:
                return self.dataset[index]
            except UnreadableImage as error:
                self.record_bad(index, error)
                index = (index + 1) % len(self)

    def record_bad(self, index: int, error: UnreadableImage):
        """Report an unreadable image; raise UnreadableImage if `most_bad` images were already reported."""
        if self.bad[index]:  # reported before
            return
        self.bad[index] = True
        count = int(self.bad.sum())
        if count > self.most_bad:
            remedy = f'more than --skip-bad-images {self.most_bad} allows' if self.most_bad else FOR_TRAINING
            raise UnreadableImage(f'{error}; {remedy}') from None
        write_line(f'{error}: skipped ({count} of at most {self.most_bad})', stream=sys.stderr)


class EvaluationSamples(Dataset):
    """Samples of an evaluation, which must all be readable."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        with adding(FOR_EVALUATION):
            return self.dataset[index]


def collate(samples: list) -> List[torch.Tensor]:
    """Stack samples to a batch: images (B, 3, img_h, img_w), targets (B,)."""
    check_same_size({tuple(image.shape[1:]) for image, _ in samples})
    return default_collate(samples)


class CleanHalfErasing:
    """`collate` for --resplit: random erasing, with timm's options, in the second half of the batch only."""

    def __init__(self, probability: float, mode: str, count: int):
        self.erase = RandomErasing(probability, mode=mode, max_count=count, num_splits=2, device='cpu')

    def __call__(self, samples: list) -> List[torch.Tensor]:
        images, targets = collate(samples)
        return [self.erase(images), targets]  # the last sample's seed determines what is erased
