"""Tests of a segmenter on a data set: flags, and the loop over its pictures."""
import argparse
import dataclasses
from typing import Callable, Optional

import numpy as np
import torch

from engine import EvaluationBatches
from loaders.batches import build_eval_loader
from run import processes
from run.commandline import COUNT
from run.settings import Loading
from segmentation.data import LabelledPictures
from segmentation.metrics import Confusion
from segmentation.predictor import Predictor
from segmentation.transforms import LONG, SHORT, EvalTransform


def add_size_flags(group):
    """Add the flags of the size of a resized picture."""
    group.add_argument('--short', default=SHORT, type=COUNT, metavar='PIXELS', help='short side of a resized picture')
    group.add_argument('--long', default=LONG, type=COUNT, metavar='PIXELS',
                       help='maximum long side of a resized picture')


def add_flags(group):
    """Add the flags of prediction."""
    group.add_argument('--test', choices=['whole', 'slide'], default='whole',
                       help='prediction from the whole picture, or the average of overlapping windows of 512 pixels')
    group.add_argument('--aug-test', action=argparse.BooleanOptionalAction, default=False,
                       help='average over six scales, each also mirrored')
    group.add_argument('--max-size', choices=['none'], metavar='none',
                       help='none: pictures keep their size; if unset, --short and --long limit the size')


def build_predictor(args, model: torch.nn.Module, amp_dtype: Optional[torch.dtype]) -> Predictor:
    short = None if args.max_size == 'none' else args.short
    return Predictor(model, EvalTransform(short, args.long), slide=args.test == 'slide', augmented=args.aug_test,
                     amp_dtype=amp_dtype)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Transform of a picture with labels: the result of `prepare` for the picture, and the unchanged labels."""
    prepare: Callable

    def __call__(self, picture: np.ndarray, classes: np.ndarray) -> tuple:
        return self.prepare(picture), torch.from_numpy(classes)


def only_sample(samples: list):
    """Return the only sample of a batch: pictures of different sizes can't be stacked."""
    sample, = samples
    return sample


def evaluate(predictor: Predictor, dataset: LabelledPictures, loading: Loading, *, header: str = 'Test',
             after_batch: Optional[Callable[[], None]] = None) -> Confusion:
    """Compare predictions with the labels of a data set without a transform; the processes share the pictures.

    Raises:
        InputError: pictures were lost.
    """
    predictor.model.eval()
    processes.broadcast_buffers(predictor.model)
    loader = build_eval_loader(dataset.with_transform(Prepared(predictor.prepare)),
                               dataclasses.replace(loading, batch_size=1), collate_fn=only_sample)
    confusion, count = Confusion(len(dataset.classes), loading.device), 0
    batches = EvaluationBatches(loader, loading.device, header=header, after_batch=after_batch)
    for images, classes in batches:
        confusion.add(predictor.predict(images, tuple(classes.shape)), classes)
        count += 1
    confusion.gather()
    batches.images(round(processes.sum_over_processes({'images': count})['images']))
    return confusion
