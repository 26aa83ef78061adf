"""Training recipe of classification: flags of augmentation, mixup and distillation, and the objects that they set."""
import argparse
from typing import Callable, Optional

import torchvision
from timm.data import Mixup

import weights
from classification import teacher
from loaders import samples, transforms
from losses import DISTILLATION_TYPES, DistillationLoss, classification_loss
from run import flags
from run.commandline import COUNT, FRACTION, NON_NEGATIVE, PATH, POSITIVE
from utils import InputError, dashed, first_line

boolean = argparse.BooleanOptionalAction


def add_flags(parser: argparse.ArgumentParser):
    group = parser.add_argument_group('augmentation')
    group.add_argument('--color-jitter', default=.4, type=NON_NEGATIVE, help='color jitter, used if --aa is empty')
    group.add_argument('--aa', default='rand-m9-mstd0.5-inc1', metavar='POLICY',
                       help='timm AutoAugment policy; \'\' or none: no policy')
    group.add_argument('--smoothing', default=.1, type=FRACTION, help='label smoothing')
    group.add_argument('--train-interpolation', default='bicubic', choices=['random', 'bilinear', 'bicubic'],
                       help='interpolation of training images')
    group.add_argument('--repeated-aug', action=boolean, default=True,
                       help='repeated augmentation: three versions of each image, a third of the images per epoch')
    group.add_argument('--reprob', default=.25, type=FRACTION, help='probability of random erasing')
    group.add_argument('--remode', default='pixel', choices=['const', 'rand', 'pixel'],
                       help='content of erased rectangles: zeros, a random colour, or random pixels')
    group.add_argument('--recount', default=1, type=COUNT, help='maximum number of erased rectangles')
    group.add_argument('--resplit', action=boolean, default=False, help='random erasing in half of each batch only')

    group = parser.add_argument_group('mixup')
    group.add_argument('--mixup', default=.8, type=NON_NEGATIVE, metavar='ALPHA', help='alpha of mixup; 0: off')
    group.add_argument('--cutmix', default=1., type=NON_NEGATIVE, metavar='ALPHA', help='alpha of cutmix; 0: off')
    group.add_argument('--cutmix-minmax', type=FRACTION, nargs='+', metavar='FRACTION',
                       help='minimum and maximum side of the patch of cutmix; replaces --cutmix')
    group.add_argument('--mixup-prob', default=1., type=FRACTION, help='probability of mixup or cutmix')
    group.add_argument('--mixup-switch-prob', default=.5, type=FRACTION, help='probability of cutmix if both are on')
    group.add_argument('--mixup-mode', default='batch', choices=['batch', 'pair', 'elem'],
                       help='unit for which the mixing ratio is drawn: batch, pair of images, or image')

    group = parser.add_argument_group('distillation')
    group.add_argument('--distillation-type', default='none', choices=DISTILLATION_TYPES,
                       help='target of distillation: the teacher\'s probabilities (soft) or its class (hard)')
    group.add_argument('--teacher-model', default='regnety_160', help='name of a timm model')
    group.add_argument('--teacher-path', default='', type=PATH, metavar=flags.WEIGHTS, help='weights of the teacher')
    group.add_argument('--teacher-pretrained', action=boolean, default=False, help='timm\'s weights for the teacher')
    group.add_argument('--teacher-mean', type=float, nargs=3, metavar='MEAN',
                       help='mean of each channel in the teacher\'s training; timm\'s value if unset')
    group.add_argument('--teacher-std', type=POSITIVE, nargs=3, metavar='DEVIATION',
                       help='standard deviation of each channel in the teacher\'s training; timm\'s value if unset')
    group.add_argument('--distillation-alpha', default=.5, type=FRACTION, help='weight of the distillation loss')
    group.add_argument('--distillation-tau', default=1., type=POSITIVE, help='temperature of --distillation-type soft')


def check_flags(args):
    """Check the flags of the recipe; raise InputError if a flag is invalid, or has no effect."""
    flags.check_pair('--cutmix-minmax', args.cutmix_minmax)
    if args.distillation_type == 'none':
        for name in ('teacher_path', 'teacher_pretrained', 'teacher_mean', 'teacher_std'):
            if vars(args)[name]:
                raise InputError(f'{dashed(name)}: has no effect without --distillation-type soft or hard')
    else:
        weights.check_model('--teacher-model', args.teacher_model)
        if bool(args.teacher_path) == args.teacher_pretrained:
            raise InputError(f'--distillation-type {args.distillation_type}: needs the teacher\'s weights from either '
                             f'--teacher-path or --teacher-pretrained')
    if uses_soft_targets(args) and args.batch_size % 2 and not args.eval:
        raise InputError(f'--batch-size {args.batch_size}: mixup and cutmix, on by default, mix pairs of images '
                         f'and need an even number (or --mixup 0 --cutmix 0)')
    try:
        build_transform(args, resize=True)
    except Exception as error:  # timm parses a policy without checks of its own
        raise InputError(f'--aa {args.aa}: not a timm policy (as rand-m9-mstd0.5-inc1, original, v0, augmix-m3; '
                         f'{type(error).__name__} {first_line(error)})') from None


def uses_soft_targets(args) -> bool:
    """Return True if targets are probabilities, for mixup and the criterion alike."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def build_transform(args, *, resize: bool) -> torchvision.transforms.Compose:
    return transforms.train_transform(
        input_size=args.input_size, resize=resize, color_jitter=args.color_jitter,
        auto_augment_policy=None if args.aa == 'none' else args.aa, interpolation=args.train_interpolation,
        erasing=0. if args.resplit else args.reprob,  # --resplit erases in half of each batch, see CleanHalfErasing
        erasing_mode=args.remode, erasing_count=args.recount, mean=args.mean, std=args.std)


def build_collate(args) -> Callable[[list], list]:
    return samples.CleanHalfErasing(args.reprob, args.remode, args.recount) if args.resplit else samples.collate


def build_mixup(args, num_classes: int) -> Optional[Mixup]:
    if not uses_soft_targets(args):
        return None
    return Mixup(mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, cutmix_minmax=args.cutmix_minmax,
                 prob=args.mixup_prob, switch_prob=args.mixup_switch_prob, mode=args.mixup_mode,
                 label_smoothing=args.smoothing, num_classes=num_classes)


def build_criterion(args, num_classes: int) -> DistillationLoss:
    return DistillationLoss(
        classification_loss(soft_targets=uses_soft_targets(args), smoothing=args.smoothing),
        None if args.distillation_type == 'none' else teacher.build(
            args.teacher_model, num_classes, path=args.teacher_path, pretrained=args.teacher_pretrained,
            input_size=args.input_size, mean=args.teacher_mean, std=args.teacher_std,
            student=(tuple(args.mean or teacher.IMAGENET[0]), tuple(args.std or teacher.IMAGENET[1]))),
        args.distillation_type, alpha=args.distillation_alpha, tau=args.distillation_tau)
