"""What a DINO training says of itself: figures of each epoch, collapse in words, nearest neighbours, and pictures."""
import argparse
import math
from pathlib import Path
from typing import List

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

import datasets
from dino import data, features, neighbours
from dino.networks import MultiCrop
from engine import evaluating
from loaders import readers
from reports import maps
from run import flags, parts, processes
from run.commandline import COUNT, COUNT_OR_0, PATH, POSITIVE
from run.processes import notice
from run.training import Run
from utils import InputError, replaced, whole_file

EQUAL, NEAR = .01, .01  # entropies that are so near to each other, or to ln(out_dim), in units of ln(out_dim)
LEAST_SPREAD = .02
REMEDIES = 'try a lower --teacher-temp, a lower --lr, --use-bn-in-head true, or a smaller --out-dim'
PICTURES = 'dino_pictures'  # a folder in --output-dir
SHOWN_SIDE = 480  # pixels of the longer side of pictures whose maps are drawn
NO_LABELS = 'needs labelled pictures: --knn-data-path, with train/ and val/ of class folders'


# ---------------------------------------------------------------------------------------------------------------------
# Arguments

def add_flags(group):
    group.add_argument('--knn-every', default=0, type=COUNT_OR_0, metavar='N',
                       help='epochs between two classifications by nearest neighbours among the teacher\'s features, '
                       'from before the first one on; the best epoch stays as best_checkpoint.pth; 0: none')
    group.add_argument('--knn-data-set', metavar='NAME',
                       help='labelled pictures for it, one of main.py\'s data sets; if unset, --data-set, or FOLDER '
                       f'if that is {data.ANY}')
    group.add_argument('--knn-data-path', type=PATH, metavar='DIR', help='where they are; --data-path if unset')
    group.add_argument('--knn-images', type=COUNT, metavar='N', help='at most so many of each split; all if unset')
    group.add_argument('--nb-knn', default=20, type=COUNT, metavar='K', help='neighbours')
    group.add_argument('--knn-temperature', default=.07, type=POSITIVE, metavar='T', help='of their votes')
    group.add_argument('--pictures-every', default=0, type=COUNT_OR_0, metavar='N',
                       help='epochs between two drawings of attention and principal components; 0: none')
    group.add_argument('--pictures', default='', type=PATH, metavar='DIR',
                       help='pictures to draw them of; some of the training\'s if unset')
    group.add_argument('--pictures-count', default=8, type=COUNT, metavar='N', help='of them')


def check_flags(args, parser: argparse.ArgumentParser):
    """Refuse what can't work, and flags without effect.

    Raises:
        InputError: so it is.
    """
    if args.knn_every:
        if args.knn_data_set is not None:
            try:
                datasets.check_data_set(replaced(args, data_set=args.knn_data_set))
            except InputError as error:
                raise InputError(str(error).replace('--data-set', '--knn-data-set')) from None
        elif args.data_set == data.ANY and not args.knn_data_path:
            raise InputError(f'--knn-every {args.knn_every}: {NO_LABELS}')
    else:
        unused = ('knn_data_set', 'knn_data_path', 'knn_images', 'nb_knn', 'knn_temperature')
        flags.refuse_without_effect(args, parser, unused, 'without --knn-every')
    if not args.pictures_every:
        flags.refuse_without_effect(args, parser, ['pictures', 'pictures_count'], 'without --pictures-every')
    if args.pictures_every and not args.output_dir:
        raise InputError(f'--pictures-every {args.pictures_every}: needs --output-dir to write to')
    if args.pictures_every and not args.pictures and readers.is_stream(args.data_set):
        raise InputError(f'--pictures-every {args.pictures_every}: {args.data_set} is a stream, whose pictures have no '
                         f'numbers: add --pictures DIR')
    if args.pictures and not Path(args.pictures).is_dir():
        raise InputError(f'--pictures {args.pictures}: no such directory')


# ---------------------------------------------------------------------------------------------------------------------
# Figures of an epoch

def spread(found: torch.Tensor) -> torch.Tensor:
    """How much the features (n, C) of all processes differ: their mean standard deviation at length 1, times sqrt(C).

    1: they are spread evenly over all directions; 0: they are the same.
    """
    unit = F.normalize(found.detach().float(), dim=1)
    mean = processes.mean_over_processes(unit.mean(dim=0))
    variance = processes.mean_over_processes((unit - mean).square().mean(dim=0))
    return variance.sqrt().mean() * found.shape[1] ** .5


def line(stats: dict) -> dict:
    """What the table of epochs shows of one: texts by column."""
    columns = {'loss': ('train_loss', '.4f'), 'lr': ('train_lr', '.2e'), 'wd': ('train_wd', '.3f'),
               'entropy': ('train_teacher_entropy', '.3f'), 'of mean': ('train_mean_entropy', '.3f'),
               'centre': ('train_center_norm', '.3f'), 'spread': ('train_feature_spread', '.3f'),
               'k-NN': ('knn_top1', '.2f'), 'images/s': ('train_images_per_s', '.0f'),
               'MB': ('train_memory_mb', '.0f')}
    return {column: format(stats[name], spec) if name in stats else '-' for column, (name, spec) in columns.items()}


def collapse(stats: dict, out_dim: int) -> dict:
    """Which kinds of collapse the figures of an epoch show: words by name."""
    teacher, mean, most = stats['train_teacher_entropy'], stats['train_mean_entropy'], math.log(out_dim)
    found = {}
    if teacher > (1 - NEAR) * most:
        found['uniform'] = (f'the teacher says nothing of any image: both entropies ({teacher:.3f} and {mean:.3f}) are '
                            f'near ln(out_dim) = {most:.3f}')
    elif mean - teacher < EQUAL * most:
        found['alike'] = (f'the teacher says the same of all images: the entropy of an image\'s output ({teacher:.3f}) '
                          f'is that of the mean output ({mean:.3f})')
    if stats['train_feature_spread'] < LEAST_SPREAD:
        found['features'] = (f'the features of all images are alike: their spread is '
                             f'{stats["train_feature_spread"]:.4f}, below {LEAST_SPREAD}')
    return found


# ---------------------------------------------------------------------------------------------------------------------
# While a training goes on

class Monitor:
    """Looks at a teacher after epochs.

    Args:
        args: the training's flags.
        dataset: what it learns from.

    Attributes:
        seen: what it has found so far, as a part of the training.

    Raises:
        InputError: data that the flags name can't be used.
    """

    def __init__(self, args, dataset: Dataset, device: torch.device):
        self.args, self.device = args, device
        self.seen = parts.Metrics()
        self.sets = self.build_sets() if args.knn_every else None
        self.shown = self.choose_pictures(dataset) if args.pictures_every else []

    def build_sets(self) -> List[Dataset]:
        """The labelled images for training and for test."""
        args = self.labelled_args()
        try:
            sets = [features.build_dataset(args, is_train=is_train, most=args.knn_images) for is_train in (True, False)]
            features.check_common(*sets)
        except InputError as error:
            flag = '--knn-data-path' if self.args.knn_data_path else '--data-path'
            raise InputError(f'--knn-every: {str(error).replace("--data-path", flag)}') from None
        if not readers.is_stream(args.data_set):
            neighbours.check([args.nb_knn], len(sets[0]))
        return sets

    def labelled_args(self) -> argparse.Namespace:
        name = self.args.knn_data_set or ('FOLDER' if self.args.data_set == data.ANY else self.args.data_set)
        return replaced(self.args, data_set=name, data_path=self.args.knn_data_path or self.args.data_path,
                        full_crop=False, resize=None, dist_eval=True, resume='')

    def choose_pictures(self, dataset: Dataset) -> List[Image.Image]:
        if self.args.pictures:
            chosen = data.Pictures(Path(self.args.pictures), upright=True)
        else:
            chosen = dataset
        return [picture for _, picture in data.some_pictures(chosen, self.args.pictures_count,
                                                             skip_bad=self.args.skip_bad_images > 0)]

    def before_training(self, teacher: MultiCrop, run: Run):
        """Look at the untrained teacher."""
        if self.sets:
            top1, top5 = self.knn(teacher, run)
            self.seen['knn_before'] = top1
            notice(f'Before the first step: {neighbours.line(self.args.nb_knn, top1, top5)}')
        if self.shown:
            self.draw(teacher, 'before', run, 0)

    def after_epoch(self, epoch: int, stats: dict, teacher: MultiCrop, run: Run) -> bool:
        """Look at what an epoch has brought, and enter it into its figures; whether its k-NN is as good as any before.
        """
        if epoch or not self.args.warmup_epochs:  # the first epoch of a warm-up hardly changes untrained features
            for kind, words in collapse(stats, self.args.out_dim).items():
                if kind not in self.seen:
                    self.seen[kind] = float(epoch)
                    notice(f'Warning: collapse in epoch {epoch}: {words}; {REMEDIES}')
        draws = self.shown and (epoch + 1) % self.args.pictures_every == 0
        classifies = self.sets and ((epoch + 1) % self.args.knn_every == 0 or epoch + 1 == self.args.epochs)
        if draws or classifies:
            run.save_untested()
        if draws:
            self.draw(teacher, f'epoch{epoch:04}', run, epoch + 1)
        if not classifies:
            return False
        stats['knn_top1'], stats['knn_top5'] = self.knn(teacher, run)
        if 'knn_before' in self.seen:
            stats['knn_before'] = self.seen['knn_before']
        return self.seen.note_best('knn_best', stats['knn_top1'])

    def knn(self, teacher: MultiCrop, run: Run) -> tuple:
        """Top-1 and top-5 in percent by the features of the teacher's backbone."""
        args = self.labelled_args()
        processes.broadcast_buffers(teacher)
        with evaluating(teacher.backbone):
            train, test = (features.extract(args, teacher.backbone, dataset, self.device,
                                            header=f'k-NN, {name} images', after_batch=run.look_up)
                           for dataset, name in zip(self.sets, ('training', 'test')))
        test = features.in_common(train, test, where='--knn-data-path: test images')
        return neighbours.classify(train, test, ks=[args.nb_knn], temperature=args.knn_temperature,
                                   device=self.device)[args.nb_knn]

    def draw(self, teacher: MultiCrop, name: str, run: Run, done: int):
        """Write a sheet of the pictures with their attention and principal components; `done`: epochs that are."""
        if not processes.is_main_process():
            return
        with evaluating(teacher.backbone):
            sheet = draw_maps(teacher.backbone, self.shown, self.args, self.device)
        path = folder(self.args) / PICTURES / f'{name}.png'
        path.parent.mkdir(exist_ok=True)
        with whole_file(path) as unfinished:
            sheet.save(unfinished)
        if run.log is not None:
            run.log.tensorboard.do('add_image', 'pictures', np.asarray(sheet), done, None, 'HWC')


@torch.inference_mode()
def draw_maps(backbone: torch.nn.Module, shown: List[Image.Image], args, device: torch.device) -> Image.Image:
    """Each picture beside the mean attention of its CLS token, and its patch tokens as colours, in common for all."""
    patch_size = backbone.feature_info[0]['reduction']
    side = SHOWN_SIDE if args.input_size > datasets.SMALL else args.input_size
    scaled = [maps.scale_to(picture, side) for picture in shown]
    transform, attentions, tokens = datasets.build_normalisation(args), [], []
    for picture in scaled:
        attention, found = backbone.forward_attention(transform(picture)[None].to(device))
        grid = -(-picture.height // patch_size), -(-picture.width // patch_size)
        attentions.append(attention[0].mean(dim=0).unflatten(0, grid).cpu())
        tokens.append(found[0, 1:].unflatten(0, grid).float().cpu())
    row = []
    for picture, attention, colors in zip(scaled, attentions, maps.component_colors(tokens)):
        row += [picture, maps.paint(picture, attention, maps.color_scale(attention), patch_size),
                maps.color_picture(colors, picture.size, patch_size)]
    enlarged = max(1, 96 // max(max(picture.size) for picture in scaled))
    row = [picture.resize([side * enlarged for side in picture.size], Image.Resampling.NEAREST) for picture in row]
    return maps.side_by_side(row, columns=3 * math.ceil(math.sqrt(len(shown) / 3)))


def folder(args) -> Path:
    return Path(args.output_dir)
