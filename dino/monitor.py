"""Monitoring of a DINO run: warnings of collapse, nearest neighbours, and drawings."""
import argparse
import contextlib
import dataclasses
from pathlib import Path
from typing import List, Optional, Tuple

import torch

import datasets
from dino import data, drawings, features, neighbours
from dino.collapse import REMEDIES, kinds_of_collapse
from dino.networks import MultiCrop
from engine import evaluating
from loaders import readers
from loaders.samples import PictureSet
from loaders.transforms import ToNormalizedTensor, View
from run import flags, parts, processes
from run.commandline import COUNT, COUNT_OR_0, PATH, POSITIVE
from run.output import log
from run.settings import Loading
from run.training import Run
from utils import InputError

COLUMNS = {'loss': ('train_loss', '.4f'), 'lr': ('train_lr', '.2e'), 'wd': ('train_wd', '.3f'),
           'entropy': ('train_teacher_entropy', '.3f'), 'of mean': ('train_mean_entropy', '.3f'),
           'centre': ('train_center_norm', '.3f'), 'spread': ('train_feature_spread', '.3f'),
           'k-NN': ('knn_top1', '.2f'), 'images/s': ('train_images_per_s', '.0f'), 'MB': ('train_memory_mb', '.0f')}


K = 20  # default number of neighbours


def add_flags(group):
    group.add_argument('--knn-every', default=0, type=COUNT_OR_0, metavar='N',
                       help='epochs between two k-NN classifications by the teacher\'s features, the first before '
                       'training; the best epoch is kept as best_checkpoint.pth; 0: none')
    group.add_argument('--knn-data-set', metavar='NAME', help='labelled data set for k-NN, as in main.py; if unset, '
                       f'--data-set, or FOLDER with --data-set {data.ANY}')
    group.add_argument('--knn-data-path', type=PATH, metavar='DIR',
                       help='folder of the labelled data set; --data-path if unset')
    group.add_argument('--knn-images', type=COUNT, metavar='N', help='maximum number of images per split; all if unset')
    group.add_argument('--nb-knn', default=K, type=COUNT, metavar='K', help='number of neighbours')
    group.add_argument('--knn-temperature', default=neighbours.TEMPERATURE, type=POSITIVE, metavar='T',
                       help='temperature of the neighbours\' votes')
    group.add_argument('--pictures-every', default=0, type=COUNT_OR_0, metavar='N',
                       help='epochs between two drawings of attention and principal components; 0: none')
    group.add_argument('--pictures', default='', type=PATH, metavar='DIR',
                       help='folder of pictures to draw maps of; if unset, some training pictures')
    group.add_argument('--pictures-count', default=8, type=COUNT, metavar='N', help='number of pictures to draw')


def check_flags(args, parser: argparse.ArgumentParser):
    """Raise InputError if a flag is invalid or has no effect."""
    if not args.knn_every:
        unused = ('knn_data_set', 'knn_data_path', 'knn_images', 'nb_knn', 'knn_temperature')
        flags.refuse_without_effect(args, parser, unused, 'without --knn-every')
    elif args.knn_data_set is not None:
        datasets.check_data_set(args, name=args.knn_data_set, flag='--knn-data-set')
    elif args.data_set == data.ANY and not args.knn_data_path:
        raise InputError(f'--knn-every {args.knn_every}: needs labelled pictures: --knn-data-path, with train/ and '
                         f'val/ of class folders')
    if not args.pictures_every:
        flags.refuse_without_effect(args, parser, ['pictures', 'pictures_count'], 'without --pictures-every')
    elif not args.output_dir:
        raise InputError(f'--pictures-every {args.pictures_every}: needs --output-dir to write to')
    elif not args.pictures and readers.is_stream(args.data_set):
        raise InputError(f'--pictures-every {args.pictures_every}: needs --pictures DIR, because the pictures of '
                         f'{args.data_set}, a stream, have no indices')
    if args.pictures and not Path(args.pictures).is_dir():
        raise InputError(f'--pictures {args.pictures}: no such directory')


@dataclasses.dataclass
class Knn:
    """k-NN classification by the features of a teacher.

    Args:
        sets: labelled images for training and for test.
        flag: flag of the images, for errors.
        k: number of neighbours.
        temperature: temperature of the neighbours' votes.
    """
    sets: List[PictureSet]
    flag: str
    k: int
    temperature: float
    loading: Loading
    amp_dtype: Optional[torch.dtype]

    def __call__(self, teacher: MultiCrop, run: Run) -> Tuple[float, float]:
        """Compute top-1 and top-5 accuracy in percent."""
        processes.broadcast_buffers(teacher)
        with evaluating(teacher.backbone):
            train, test = (features.extract(
                teacher.backbone, dataset, self.loading, amp_dtype=self.amp_dtype, header=f'k-NN, {name} images',
                after_batch=run.check_signals) for dataset, name in zip(self.sets, ('training', 'test')))
        test = features.in_common(train, test, where=f'{self.flag}: test images')
        return neighbours.classify(train, test, ks=[self.k], temperature=self.temperature,
                                   device=self.loading.device)[self.k]


@dataclasses.dataclass
class Monitor:
    """Evaluations of the teacher between epochs.

    The attribute `metrics`, a part of the run, contains the best k-NN accuracy, the accuracy before training, and the
    first epoch of each kind of collapse.

    Args:
        out_dim, epochs, warmup_epochs: flags of the run.
        knn: k-NN classification, every `knn_every` epochs; None: none.
        drawing: drawing of maps, every `drawing_every` epochs; None: none.
    """
    out_dim: int
    epochs: int
    warmup_epochs: int
    knn: Optional[Knn]
    knn_every: int
    drawing: Optional[drawings.Drawing]
    drawing_every: int

    def __post_init__(self):
        self.metrics = parts.Metrics()

    def before_training(self, teacher: MultiCrop, run: Run):
        if self.knn:
            top1, top5 = self.knn(teacher, run)
            self.metrics['knn_before'] = top1
            log(f'Before the first step: {neighbours.line(self.knn.k, top1, top5)}')
        if self.drawing:
            self.drawing(teacher, run, 'before', step=-1)

    def after_epoch(self, epoch: int, stats: dict, teacher: MultiCrop, run: Run) -> bool:
        """Evaluate the teacher, and add the results to `stats`; return True if the k-NN accuracy is the best so far."""
        if epoch or not self.warmup_epochs:  # the first epoch of a warm-up hardly changes untrained features
            for kind, description in kinds_of_collapse(stats, self.out_dim).items():
                if kind not in self.metrics:
                    self.metrics[kind] = float(epoch)
                    log(f'Warning: collapse in epoch {epoch}: {description}; {REMEDIES}')
        draws = self.drawing and (epoch + 1) % self.drawing_every == 0
        classifies = self.knn and ((epoch + 1) % self.knn_every == 0 or epoch + 1 == self.epochs)
        with run.evaluation() if draws or classifies else contextlib.nullcontext():
            if draws:
                self.drawing(teacher, run, f'epoch{epoch:04}', step=epoch)
            if not classifies:
                return False
            stats['knn_top1'], stats['knn_top5'] = self.knn(teacher, run)
        if 'knn_before' in self.metrics:
            stats['knn_before'] = self.metrics['knn_before']
        return self.metrics.update_best({'knn_best': stats['knn_top1']}) is not None


def build(args, dataset: PictureSet, loading: Loading, amp_dtype: Optional[torch.dtype]) -> Monitor:
    """Build the monitor of a run on `dataset`; raise InputError if data of the flags can't be used."""
    knn = build_knn(args, loading, amp_dtype) if args.knn_every else None
    drawing = None
    if args.pictures_every:
        shown = data.Pictures(Path(args.pictures), upright=True, flag='--pictures') if args.pictures else dataset
        pictures = data.some_pictures(shown, args.pictures_count, skips_bad=args.skip_bad_images > 0)
        files = shown.files()
        names = [Path(files[index]).name if files else f'image {index}' for index, _ in pictures]
        drawing = drawings.Drawing([picture for _, picture in pictures], names, args.input_size,
                                   ToNormalizedTensor(args.mean, args.std), loading.device)
    return Monitor(args.out_dim, args.epochs, args.warmup_epochs, knn, args.knn_every, drawing, args.pictures_every)


def build_knn(args, loading: Loading, amp_dtype: Optional[torch.dtype]) -> Knn:
    name = args.knn_data_set or ('FOLDER' if args.data_set == data.ANY else args.data_set)
    source = dataclasses.replace(datasets.source(args), name=name, path=args.knn_data_path or args.data_path,
                                 flag='--knn-data-path' if args.knn_data_path else '--data-path', run_folder=None)
    images = features.Images(source, View(args.input_size, mean=args.mean, std=args.std))
    try:
        sets = features.build_datasets(images, most=args.knn_images)
    except InputError as error:
        raise InputError(f'--knn-every: {error}') from None
    if not readers.is_stream(name):
        args.nb_knn, = neighbours.fitting([args.nb_knn], len(sets[0]), [K])
    return Knn(sets, source.flag, args.nb_knn, args.knn_temperature, loading, amp_dtype)
