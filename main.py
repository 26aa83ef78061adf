"""Train and evaluate image classifiers: XCiT, or any other model that timm knows.

The recipe is the paper's by default. Data flows one way: arguments -> builders -> loop -> checkpoint.
"""
import argparse
import copy
import dataclasses
import datetime
import difflib
import functools
import itertools
import math
import os
import shlex
import time
from pathlib import Path
from typing import Callable, Optional, Union

import timm
import torch
import torchvision
from timm.data import Mixup
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader, Dataset

import checkpoints
import datasets
import readers
import samplers
import training
import utils
import weights
import xca
import xcit
from engine import NonFiniteLoss, evaluate, train_one_epoch
from losses import DISTILLATION_TYPES, DistillationLoss, classification_loss
from training import BEST, CHECKPOINT, Keeper, Training, WarmupPlateau, images_per_batch
from utils import COUNT, COUNT_OR_0, FRACTION, NON_NEGATIVE, POSITIVE, InputError, Parser, notice, number

AMP_DTYPES = {'fp16': torch.float16, 'bf16': torch.bfloat16, 'off': None}
FUSED_OPTIMIZERS = ('adam', 'adamw', 'sgd')  # torch's own, which have one kernel for all parameters
REFERENCE_BATCH = 512  # images for which --lr is meant
# What --finetune changes in the recipe; any of it can be given on the command line
FINETUNING = dict(epochs=30, lr=4e-4, min_lr=1e-6, warmup_epochs=0, drop_path=0., reprob=0., repeated_aug=False,
                  full_crop=True)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments

def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser('main.py', description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    boolean = argparse.BooleanOptionalAction

    group = parser.add_argument_group('run')
    group.add_argument('--output-dir', '--output_dir', default='', metavar='DIR',
                       help='where checkpoints and logs go; empty: nothing is written')
    group.add_argument('--device', default='auto', help='auto (cuda, mps or cpu, the first there is) or a device')
    group.add_argument('--amp', choices=list(AMP_DTYPES), help='autocast type; fp16 on cuda and off elsewhere if unset')
    group.add_argument('--seed', default=0, type=number(int, 0, 2 ** 32 - 1),
                       help='of weights, data order, augmentation and dropout')
    group.add_argument('--deterministic', action=boolean, default=False,
                       help='refuse operations whose result varies from run to run; slower on GPUs')
    group.add_argument('--resume', default='', metavar='PATH|URL|auto',
                       help='go on with a training, or evaluate its model; auto: the one in --output-dir, if any')
    group.add_argument('--save-every', default=0, type=COUNT_OR_0, metavar='STEPS',
                       help='steps between two checkpoints within an epoch; 0: at its end only')
    group.add_argument('--start-epoch', '--start_epoch', default=0, type=COUNT_OR_0, metavar='N',
                       help='first epoch, without --resume')
    group.add_argument('--epochs', default=400, type=COUNT, metavar='N', help='of the whole training')

    group = parser.add_argument_group('model')
    group.add_argument('--model', default='xcit_small_12_p16', help='one of the 14 XCiT models, or of timm\'s')
    group.add_argument('--input-size', default=224, type=COUNT, metavar='PIXELS', help='side of the square images')
    group.add_argument('--drop', default=0., type=FRACTION, metavar='FRACTION', help='dropout')
    group.add_argument('--drop-path', default=.1, type=number(float, 0, .999), metavar='FRACTION',
                       help='stochastic depth, the same in all layers of XCiT')
    group.add_argument('--pretrained', metavar='TAG|PATH|URL|hf-hub:NAME',
                       help='initial weights: published ones by their tag (see the README), or any others; a head for '
                       'another number of classes is left out')
    group.add_argument('--finetune', metavar='TAG|PATH|URL|hf-hub:NAME',
                       help='the same, with other defaults: '
                       + ', '.join(f'{name} {value}' for name, value in FINETUNING.items()))
    group.add_argument('--freeze-backbone', action=boolean, default=False,
                       help='train the head alone (linear probe); BatchNorm statistics stay as they are, too')
    group.add_argument('--use-ema', action=boolean, default=False,
                       help='take the moving average that a training\'s checkpoint holds beside the weights')
    group.add_argument('--surgery', metavar='TAG|PATH|URL|hf-hub:NAME',
                       help='copy the patch stem from these weights and keep it frozen: steadier for large models')
    group.add_argument('--grad-checkpointing', action=boolean, default=False,
                       help='compute activations twice to save memory')
    group.add_argument('--xca', choices=xca.FORMS, default='auto',
                       help='how XCiT\'s attention is computed; auto: the faster way for the number of tokens')
    group.add_argument('--compile', action=boolean, default=False,
                       help='torch.compile for model, moving average (but for one in CPU memory) and teacher: a slow '
                            'start, then faster')
    group.add_argument('--compile-mode', choices=['default', 'reduce-overhead', 'max-autotune'], default='default',
                       help='of --compile; the last two use CUDA graphs')
    group.add_argument('--model-ema', action=boolean, default=True, help='keep a moving average of the weights')
    group.add_argument('--model-ema-decay', default=.99996, type=FRACTION, metavar='FRACTION',
                       help='of the average; rises to this value over the first steps')
    group.add_argument('--model-ema-force-cpu', action=boolean, default=False, help='keep the average in CPU memory')

    group = parser.add_argument_group('optimizer')
    group.add_argument('--batch-size', default=64, type=COUNT, metavar='IMAGES', help='of one process and one pass')
    group.add_argument('--accum-iter', default=1, type=COUNT, metavar='N', help='batches that make one step')
    group.add_argument('--opt', default='adamw', help='name of a timm optimizer')
    group.add_argument('--opt-eps', default=1e-8, type=POSITIVE, metavar='EPS', help='added to denominators')
    group.add_argument('--opt-betas', type=number(float, 0, .99999999), nargs='+', metavar='BETA',
                       help='the optimizer\'s own if unset')
    group.add_argument('--momentum', default=.9, type=FRACTION, help='of SGD and its like')
    group.add_argument('--weight-decay', default=.05, type=NON_NEGATIVE, help='of matrices; vectors are spared')
    group.add_argument('--layer-decay', type=number(float, 0, 1, above=True), metavar='FACTOR',
                       help='learning rate of a layer, as a fraction of the one above it; unset: the same for all')
    group.add_argument('--clip-grad', type=POSITIVE, metavar='NORM', help='largest gradient norm; unset: no clipping')

    group = parser.add_argument_group('schedule')
    group.add_argument('--sched', default='cosine', choices=['cosine', 'tanh', 'step', 'plateau'],
                       help='course of the learning rate')
    group.add_argument('--lr', default=5e-4, type=POSITIVE,
                       help=f'peak learning rate for {REFERENCE_BATCH} images a step; scaled with the real number')
    group.add_argument('--warmup-lr', default=1e-6, type=NON_NEGATIVE, help='learning rate to start at, not scaled')
    group.add_argument('--min-lr', default=1e-5, type=NON_NEGATIVE, help='learning rate to end at, not scaled')
    group.add_argument('--warmup-epochs', default=5, type=COUNT_OR_0, metavar='N', help='0: no warm-up')
    group.add_argument('--decay-epochs', default=30, type=POSITIVE, metavar='N', help='between two decays of "step"')
    group.add_argument('--decay-rate', '--dr', default=.1, type=POSITIVE, help='of "step" and "plateau"')
    group.add_argument('--patience-epochs', default=10, type=COUNT_OR_0, metavar='N',
                       help='epochs without progress that "plateau" waits for')
    group.add_argument('--cooldown-epochs', default=10, type=COUNT_OR_0, metavar='N',
                       help='epochs that "plateau" pauses for after a decay')
    group.add_argument('--lr-noise', type=FRACTION, nargs='+', metavar='FRACTION',
                       help='part of the epochs from which on (or between which two) the learning rate gets noise')
    group.add_argument('--lr-noise-pct', default=.67, type=NON_NEGATIVE, help='limit of the noise, as a fraction')
    group.add_argument('--lr-noise-std', default=1., type=NON_NEGATIVE, help='standard deviation of the noise')

    group = parser.add_argument_group('augmentation')
    group.add_argument('--color-jitter', default=.4, type=NON_NEGATIVE, help='used where --aa is empty')
    group.add_argument('--aa', default='rand-m9-mstd0.5-inc1', metavar='POLICY',
                       help='timm AutoAugment policy; \'\' or none: no policy')
    group.add_argument('--smoothing', default=.1, type=FRACTION, help='label smoothing')
    group.add_argument('--train-interpolation', default='bicubic', choices=['random', 'bilinear', 'bicubic'])
    group.add_argument('--repeated-aug', action=boolean, default=True,
                       help='three versions of each image, a third of the images an epoch')
    group.add_argument('--reprob', default=.25, type=FRACTION, help='probability of random erasing')
    group.add_argument('--remode', default='pixel', choices=['const', 'rand', 'pixel'], help='what erases')
    group.add_argument('--recount', default=1, type=COUNT, help='largest number of erased rectangles')
    group.add_argument('--resplit', action=boolean, default=False, help='leave the first half of each batch unerased')

    group = parser.add_argument_group('mixup')
    group.add_argument('--mixup', default=.8, type=NON_NEGATIVE, metavar='ALPHA', help='0: off')
    group.add_argument('--cutmix', default=1., type=NON_NEGATIVE, metavar='ALPHA', help='0: off')
    group.add_argument('--cutmix-minmax', type=FRACTION, nargs='+', metavar='FRACTION',
                       help='smallest and largest side of the patch; turns cutmix on, and its alpha off')
    group.add_argument('--mixup-prob', default=1., type=FRACTION, help='probability of either')
    group.add_argument('--mixup-switch-prob', default=.5, type=FRACTION, help='probability of cutmix where both are on')
    group.add_argument('--mixup-mode', default='batch', choices=['batch', 'pair', 'elem'], help='what is drawn anew')

    group = parser.add_argument_group('distillation')
    group.add_argument('--distillation-type', default='none', choices=DISTILLATION_TYPES,
                       help='learn from a teacher\'s probabilities or from its class')
    group.add_argument('--teacher-model', default='regnety_160', help='name of a timm model')
    group.add_argument('--teacher-path', default='', metavar='TAG|PATH|URL|hf-hub:NAME',
                       help='the teacher\'s weights')
    group.add_argument('--teacher-pretrained', action=boolean, default=False, help='take timm\'s weights instead')
    group.add_argument('--distillation-alpha', default=.5, type=FRACTION, help='weight of the teacher\'s term')
    group.add_argument('--distillation-tau', default=1., type=POSITIVE, help='temperature of "soft"')

    group = parser.add_argument_group('data')
    group.add_argument('--data-set', default='IMNET', metavar='NAME',
                       help=f'{", ".join(datasets.BUILDERS)}; or through timm {", ".join(readers.PACKAGES)}, each with '
                       '/NAME (see the README)')
    group.add_argument('--data-path', default='/datasets01/imagenet_full_size/061417/', metavar='DIR',
                       help='not needed for SAMPLE')
    group.add_argument('--inat-category', default='name', choices=datasets.INAT_CATEGORIES,
                       help='level of the taxonomy that makes the classes of INAT and INAT19')
    group.add_argument('--train-split', default='train', metavar='NAME', help='for timm\'s readers')
    group.add_argument('--val-split', default='validation', metavar='NAME', help='for timm\'s readers')
    group.add_argument('--num-classes', type=COUNT, metavar='N', help='for timm\'s readers, where they can\'t tell')
    group.add_argument('--num-workers', '--num_workers', default=10, type=COUNT_OR_0, metavar='N',
                       help='processes that load data, at most one for each core; 0: load in the main process')
    group.add_argument('--skip-bad-images', default=0, type=COUNT_OR_0, metavar='N',
                       help='up to N unreadable training images (of each process, since its start) are replaced by '
                       'their neighbours, and reported')
    group.add_argument('--pin-mem', action=boolean, default=True, help='page-locked host memory for cuda')

    group = parser.add_argument_group('evaluation')
    group.add_argument('--eval', action='store_true', help='evaluate only')
    group.add_argument('--test-freq', default=1, type=COUNT, metavar='N', help='epochs between two evaluations')
    group.add_argument('--full-crop', '--full_crop', action=boolean, default=False,
                       help='evaluate the whole shorter side (crop 1.0, as published) instead of 0.875 of it')

    group = parser.add_argument_group('distributed')
    group.add_argument('--dist-eval', action=boolean, default=True,
                       help='share the evaluation images between the processes')
    group.add_argument('--world-size', '--world_size', default=1, type=COUNT, metavar='N',
                       help='number of processes, where the launcher has not set WORLD_SIZE')
    group.add_argument('--dist-timeout', default=10., type=POSITIVE, metavar='MINUTES',
                       help='how long a process waits for the others')
    group.add_argument('--sync-bn', action=boolean, default=True, help='synchronise BatchNorm over several GPUs')
    group.add_argument('--dist-url', '--dist_url', default='env://', metavar='URL', help='where the processes meet')
    return parser


def parse_args(argv: Optional[list] = None) -> argparse.Namespace:
    """Parse the command line and refuse what can't work before any work is done."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if args.finetune:
        if args.pretrained:
            raise InputError('--finetune: takes the place of --pretrained; give one of them')
        parser.set_defaults(**FINETUNING)
        args = parser.parse_args(argv)
        args.pretrained = args.finetune
    check_model('--model', args.model)
    if weights.published('', args.model) and not args.pretrained and not args.resume:
        args.pretrained = args.model  # a name with a tag asks for its weights
    datasets.check_data_set(args)
    device = utils.choose_device(args.device)
    if args.amp == 'fp16' and device.type != 'cuda':
        raise InputError(f'--amp fp16: needs cuda, and the device is {device.type}; allowed: bf16, off')
    if args.opt.lower().split('_')[-1] not in list_optimizers():
        raise InputError(f'--opt {args.opt}: timm has no such optimizer{similar(args.opt, list_optimizers())}')
    if args.xca != 'auto' and args.model.partition('.')[0] not in xcit.MODELS:
        raise InputError(f'--xca {args.xca}: is for the XCiT models, and {args.model} is none')
    if args.compile_mode != 'default' and not args.compile:
        raise InputError(f'--compile-mode {args.compile_mode}: has no effect without --compile')
    for flag, values in (('--opt-betas', args.opt_betas), ('--cutmix-minmax', args.cutmix_minmax)):
        if values is not None and len(values) != 2:
            raise InputError(f'{flag} {" ".join(map(str, values))}: needs 2 values')
    if args.lr_noise is not None and args.sched == 'plateau':
        raise InputError('--lr-noise: has no effect with --sched plateau')
    if args.sched == 'plateau' and args.decay_rate >= 1:
        raise InputError(f'--decay-rate {args.decay_rate}: must be less than 1 with --sched plateau')
    if args.lr_noise is not None and len(args.lr_noise) > 2:
        raise InputError(f'--lr-noise {" ".join(map(str, args.lr_noise))}: needs 1 or 2 values')
    if uses_soft_targets(args) and args.batch_size % 2 and not args.eval:
        raise InputError(f'--batch-size {args.batch_size}: mixup and cutmix mix pairs of images and need an even '
                         f'number (or --mixup 0 --cutmix 0)')
    if args.distillation_type == 'none':
        for flag in ('teacher_path', 'teacher_pretrained'):
            if getattr(args, flag):
                raise InputError(f'--{flag.replace("_", "-")}: has no effect without --distillation-type soft or hard')
    else:
        check_model('--teacher-model', args.teacher_model)
        if bool(args.teacher_path) == args.teacher_pretrained:
            raise InputError(f'--distillation-type {args.distillation_type}: needs the teacher\'s weights from either '
                             f'--teacher-path or --teacher-pretrained')
    if args.freeze_backbone and not args.pretrained and not args.resume:
        raise InputError('--freeze-backbone: needs trained weights, from --finetune, --pretrained or --resume')
    if args.freeze_backbone and args.surgery:
        raise InputError('--surgery: has no place with --freeze-backbone, which trains no stem')
    for flag, model in (('pretrained', args.model), ('surgery', args.model), ('teacher_path', args.teacher_model)):
        if getattr(args, flag):
            option = 'finetune' if flag == 'pretrained' and args.finetune else flag.replace('_', '-')
            weights.check_exists(getattr(args, flag), f'--{option}', model)
    if args.resume not in ('', 'auto') and not checkpoints.is_url(args.resume) and not Path(args.resume).exists():
        raise InputError(f'--resume {args.resume}: no such file')
    if args.use_ema and not args.pretrained and not (args.eval and args.resume):
        raise InputError('--use-ema: needs weights to take the average from: --pretrained, or --eval with --resume')
    if args.resume == 'auto' and not args.output_dir:
        raise InputError('--resume auto: needs --output-dir to look in')
    if args.start_epoch >= args.epochs:
        raise InputError(f'--start-epoch {args.start_epoch}: must be less than --epochs {args.epochs}')
    utils.check_output_dir(args.output_dir)
    try:
        datasets.build_train_transform(args)
    except Exception as error:  # timm checks a policy's text with whatever its parsing runs into
        raise InputError(f'--aa {args.aa}: not a policy of timm\'s (as rand-m9-mstd0.5-inc1, original, v0, augmix-m3; '
                         f'{type(error).__name__} {utils.first_line(error)})') from None
    return args


def check_model(flag: str, name: str):
    base, _, tag = name.partition('.')
    if not timm.is_model(base):
        raise InputError(f'{flag} {name}: no such model{similar(name, xcit.MODELS + timm.list_models())}')
    known = [full.partition('.')[2] for full in timm.list_pretrained(f'{base}.*')]
    if tag and tag not in known:
        raise InputError(f'{flag} {name}: {base} has no such tag; it has: {", ".join(known)}')


def similar(name: str, names: list) -> str:
    matches = difflib.get_close_matches(name, names, n=5, cutoff=.5)
    return f'; similar: {", ".join(dict.fromkeys(matches))}' if matches else ''


def uses_soft_targets(args) -> bool:
    """Whether targets are probabilities: the one place that decides, for mixup and for the criterion."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


# ---------------------------------------------------------------------------------------------------------------------
# Builders

def build_amp_dtype(args, device: torch.device) -> Optional[torch.dtype]:
    return AMP_DTYPES[args.amp or ('fp16' if device.type == 'cuda' else 'off')]


def build_loader(dataset: Dataset, args, device: torch.device, *, workers: Optional[int] = None,
                 persistent: bool = True, **kwargs) -> DataLoader:
    workers = utils.usable_workers(args.num_workers) if workers is None else workers
    # Where `import datasets` means Hugging Face's package, a fresh process would not find datasets.py.
    context = 'fork' if workers and readers.prefix_of(args.data_set) == 'hfds' else None
    return DataLoader(dataset, num_workers=workers, persistent_workers=persistent and workers > 0,
                      worker_init_fn=utils.WorkerSignals(), multiprocessing_context=context,
                      pin_memory=args.pin_mem and device.type == 'cuda', **kwargs)


def build_train_loader(dataset: Dataset, args, device: torch.device) -> Union[DataLoader, readers.StreamLoader]:
    collate = datasets.CleanHalfErasing(args) if args.resplit else datasets.collate
    if isinstance(dataset, readers.Stream):
        if args.repeated_aug:
            notice(f'--data-set {args.data_set} is a stream: no repeated augmentation')
        return readers.build_loader(dataset, args, batch_size=args.batch_size, build=functools.partial(
            build_loader, args=args, device=device, collate_fn=collate))
    sampler = samplers.TrainingSampler(dataset, repeated_aug=args.repeated_aug, seed=args.seed,
                                       num_replicas=utils.get_world_size(), rank=utils.get_rank())
    if args.repeated_aug and len(dataset) < samplers.GROUP:
        notice(f'Repeated augmentation: {len(dataset)} images are less than a group of {samplers.GROUP}; '
               f'an epoch has {len(sampler)} samples')
    if args.batch_size > len(sampler):
        raise InputError(f'--batch-size {args.batch_size}: an epoch has {len(sampler)} images for each process, less '
                         f'than one batch')
    if args.accum_iter > len(sampler) // args.batch_size:
        raise InputError(f'--accum-iter {args.accum_iter}: an epoch has {len(sampler) // args.batch_size} batches')
    return build_loader(
        datasets.SeededSamples(dataset, most_bad=args.skip_bad_images), args, device, sampler=sampler,
        batch_size=args.batch_size, drop_last=True, collate_fn=collate)


def build_eval_loader(dataset: Dataset, args, device: torch.device) -> Union[DataLoader, readers.StreamLoader]:
    batch_size = int(1.5 * args.batch_size)
    if isinstance(dataset, readers.Stream):
        return readers.build_loader(dataset, args, batch_size=batch_size, build=functools.partial(
            build_loader, args=args, device=device, collate_fn=datasets.collate))
    replicas, rank = (utils.get_world_size(), utils.get_rank()) if args.dist_eval else (1, 0)
    return build_loader(
        dataset, args, device, sampler=samplers.evaluation_indices(dataset, num_replicas=replicas, rank=rank),
        batch_size=batch_size, collate_fn=datasets.collate)


def build_model(args, num_classes: int, *, new_head: bool) -> torch.nn.Module:
    """The model with its initial weights; `new_head`: see weights.load."""
    utils.seed_everything(args.seed)
    try:
        model = timm.create_model(
            args.model, num_classes=num_classes, drop_rate=args.drop, drop_path_rate=args.drop_path)
    except (TypeError, RuntimeError, ValueError) as error:
        raise InputError(f'--model {args.model}: timm can\'t build it ({utils.first_line(error)})') from None
    if isinstance(model, xcit.Xcit):
        model.xca_form = args.xca
    else:
        check_input_size(args, model)
    if args.pretrained:
        flag = '--finetune' if args.finetune else '--pretrained'
        given = weights.read(args.pretrained, flag, args.model, use_ema=args.use_ema)
        weights.load(model, given, new_head=new_head)
    if args.surgery:
        transplant_stem(model, args)
    if args.freeze_backbone:
        model.requires_grad_(False)
        model.get_classifier().requires_grad_(True)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    return model


@torch.no_grad()
def check_input_size(args, model: torch.nn.Module):
    """Refuse a size that the model is not made for; XCiT takes any."""
    try:
        model.eval()(torch.zeros(1, 3, args.input_size, args.input_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise InputError(f'--input-size {args.input_size}: {args.model} can\'t take it ({utils.first_line(error)})'
                         ) from None


def transplant_stem(model: torch.nn.Module, args):
    """Copy `patch_embed` from a checkpoint and freeze it."""
    given = weights.read(args.surgery, '--surgery', args.model)
    prefix = 'patch_embed.'
    stem = {key.removeprefix(prefix): value for key, value in given.tensors.items() if key.startswith(prefix)}
    if not hasattr(model, 'patch_embed'):
        raise InputError(f'--surgery {args.surgery}: the model has no patch_embed')
    weights.load(model.patch_embed, dataclasses.replace(given, tensors=stem))
    model.patch_embed.requires_grad_(False)


def frozen_part(args, model: torch.nn.Module) -> Optional[torch.nn.Module]:
    """What stays in eval mode while the model is trained."""
    if args.freeze_backbone:
        return model  # the head, a linear layer, is the same in both modes
    return model.patch_embed if args.surgery else None


def build_model_ema(args, model: torch.nn.Module) -> Optional[ModelEmaV3]:
    if not args.model_ema:
        return None
    # differs: moving average - its decay rises as 1 - (1 + step) ** -0.8, so that the average of a short run is not
    # made of its initial weights; from 314,000 steps on (251 of ImageNet's 400 epochs) it is the original's 0.99996
    return ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=True, warmup_power=.8,
                      device=torch.device('cpu') if args.model_ema_force_cpu else None)


def build_mixup(args, num_classes: int) -> Optional[Mixup]:
    if not uses_soft_targets(args):
        return None
    return Mixup(mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, cutmix_minmax=args.cutmix_minmax,
                 prob=args.mixup_prob, switch_prob=args.mixup_switch_prob, mode=args.mixup_mode,
                 label_smoothing=args.smoothing, num_classes=num_classes)


def build_criterion(args, num_classes: int, device: torch.device) -> DistillationLoss:
    teacher = None if args.distillation_type == 'none' else build_teacher(args, num_classes).to(device)
    return DistillationLoss(
        classification_loss(soft_targets=uses_soft_targets(args), smoothing=args.smoothing),
        teacher, args.distillation_type, alpha=args.distillation_alpha, tau=args.distillation_tau)


def compile_all(args, model: torch.nn.Module, model_ema: Optional[ModelEmaV3], criterion: DistillationLoss):
    """Let a training's model, its moving average and its teacher be compiled when they are first used."""
    model.compile(mode=args.compile_mode)
    if model_ema is not None and model_ema.device is None:  # else it is evaluated as a copy on the model's device
        model_ema.module.compile(mode=args.compile_mode)
    if criterion.teacher is not None:
        criterion.teacher.compile()  # no CUDA graphs: the model's would take the place of its outputs


def build_teacher(args, num_classes: int) -> torch.nn.Module:
    source = f'--teacher-pretrained (--teacher-model {args.teacher_model})'
    if args.teacher_pretrained:
        own_classes = timm.models.get_pretrained_cfg_value(args.teacher_model, 'num_classes')
        if own_classes != num_classes:
            raise InputError(f'{source}: timm\'s weights are for {own_classes} classes, not {num_classes}')
    try:
        teacher = timm.create_model(args.teacher_model, pretrained=args.teacher_pretrained, num_classes=num_classes)
    except Exception as error:  # of whichever hub timm asks
        if not args.teacher_pretrained:
            raise
        raise InputError(f'{source}: timm can\'t get the weights ({utils.first_line(error)})') from None
    if args.teacher_path:
        weights.load(teacher, weights.read(args.teacher_path, '--teacher-path', args.teacher_model))
    return teacher.eval().requires_grad_(False)


def global_batch(args) -> int:
    """Images that make one step."""
    return images_per_batch(args) * args.accum_iter


def scaled_lr(args) -> float:
    return args.lr * global_batch(args) / REFERENCE_BATCH


def build_optimizer(args, model: torch.nn.Module) -> torch.optim.Optimizer:
    try:
        kwargs = {**optimizer_kwargs(args), 'lr': scaled_lr(args)}
        if args.opt.lower() in FUSED_OPTIMIZERS:
            kwargs['fused'] = True
        return create_optimizer_v2(model, **kwargs)
    except (AssertionError, ImportError, TypeError) as error:  # of another package, or without such an option
        raise InputError(f'--opt {args.opt}: timm can\'t build it here ({utils.first_line(error)})') from None


def build_scheduler(args, optimizer: torch.optim.Optimizer):
    """A schedule with `step(epoch, accuracy)`, to be called after each epoch."""
    if args.sched == 'plateau':
        return WarmupPlateau(args, optimizer)
    return create_scheduler_v2(optimizer, **scheduler_kwargs(args))[0]


# ---------------------------------------------------------------------------------------------------------------------
# The two programs

def train(args, device: torch.device) -> dict:
    """Train a model; returns the last epoch's statistics."""
    dataset_train, num_classes = datasets.build_dataset(args, is_train=True)
    dataset_val, _ = datasets.build_dataset(args, is_train=False)
    if not args.skip_bad_images:
        datasets.probe_images(dataset_train)
    datasets.probe_images(dataset_val, same_size=not datasets.resizes_for_evaluation(args))
    train_loader = build_train_loader(dataset_train, args, device)
    eval_loader = build_eval_loader(dataset_val, args, device)

    amp_dtype = build_amp_dtype(args, device)
    model = build_model(args, num_classes, new_head=True).to(device)
    criterion = build_criterion(args, num_classes, device)
    optimizer = build_optimizer(args, model)
    run = Training(model, build_model_ema(args, model), optimizer, build_scheduler(args, optimizer),
                   torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16), epoch=args.start_epoch - 1,
                   classes=datasets.class_names(dataset_train))
    derived = {'device': str(device), 'amp_dtype': str(amp_dtype), 'processes': utils.get_world_size(),
               'global_batch': global_batch(args), 'scaled_lr': scaled_lr(args),
               'num_classes': num_classes, 'train_images': len(dataset_train), 'eval_images': len(dataset_val),
               'n_parameters': sum(p.numel() for p in model.parameters() if p.requires_grad)}
    with utils.DirectoryLock(Path(args.output_dir) if args.output_dir else None):
        resume(run, args)  # under the lock: what is read now stays the newest
        if run.epoch + 1 >= args.epochs:
            notice(f'--epochs {args.epochs}: nothing is left to do')
            return {}
        for description in (args, utils.environment(), derived):
            notice(description)
        if args.compile:
            compile_all(args, model, run.model_ema, criterion)
        loop = dict(ddp_model=utils.wrap_for_distributed(model, device, sync_bn=args.sync_bn), criterion=criterion,
                    mixup_fn=build_mixup(args, num_classes), device=device, amp_dtype=amp_dtype)
        log = open_log(args, derived, train_loader, run)
        with utils.StopRequest() as stop:
            keeper = Keeper(args, run, stop)
            try:
                return run_epochs(args, run, train_loader, eval_loader, log=log, keeper=keeper, **loop)
            finally:
                keeper.join()


def resume(run: Training, args):
    """Go on with what --resume names, if anything."""
    checkpoint, source = training.load_for_resume(args)
    if checkpoint is not None:
        run.load(checkpoint, source, args)
        notice(f'{source}: goes on at epoch {run.epoch + 1}, step {run.step}')
    if run.epoch >= 0 and not isinstance(run.scheduler, WarmupPlateau):
        run.scheduler.step(run.epoch)


def run_epochs(args, run: Training, train_loader: DataLoader, eval_loader: DataLoader, *, log: Optional[utils.EpochLog],
               keeper: Keeper, ddp_model: torch.nn.Module, criterion: torch.nn.Module, mixup_fn: Optional[Mixup],
               device: torch.device, amp_dtype: Optional[torch.dtype]) -> dict:
    """The loop over the epochs that are left; returns the last one's statistics."""
    n_parameters = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    started, first_epoch, stats = time.monotonic(), run.epoch + 1, {}
    for epoch in range(first_epoch, args.epochs):
        if isinstance(train_loader, readers.StreamLoader):
            train_loader.set_epoch(epoch, run.step)
        else:
            train_loader.sampler.set_epoch(epoch, first=run.step * args.batch_size)
        train_stats = train_one_epoch(
            ddp_model, criterion, train_loader, optimizer=run.optimizer, scaler=run.scaler, device=device, epoch=epoch,
            seed=args.seed, amp_dtype=amp_dtype, accum_iter=args.accum_iter, clip_grad=args.clip_grad,
            mixup_fn=mixup_fn, model_ema=run.model_ema, frozen=frozen_part(args, run.model),
            first_step=run.step, sums=run.sums, after_update=keeper.after_update)
        stats = {f'train_{k}': v for k, v in train_stats.items()}
        if epoch % args.test_freq == 0 or epoch == args.epochs - 1:
            stats.update(test(run, eval_loader, device=device, amp_dtype=amp_dtype,
                              after_batch=keeper.look_up))
        # faithful: stepped with the epoch just finished, so that epochs 0 and 1 share a rate (original main.py)
        run.scheduler.step(epoch, run.accuracy['last'])
        run.epoch, run.step, run.sums = epoch, 0, dict.fromkeys(run.sums, 0.)
        stats.update(epoch=epoch, n_parameters=n_parameters)
        # In this order a crash between two of these lines only means that the epoch is done again.
        if log is not None:
            log.write(stats)
        if args.output_dir and stats.get('test_acc1', -1.) >= run.accuracy['best']:
            checkpoints.save_checkpoint(run.state_dict(args), Path(args.output_dir, BEST))
        keeper.save()
        spent = time.monotonic() - started
        left = spent / (epoch + 1 - first_epoch) * (args.epochs - epoch - 1)
        notice(f'Epoch {epoch} done: loss {stats["train_loss"]:.4f}, best Acc@1 {run.accuracy["best"]:.2f}, '
               f'time left {datetime.timedelta(seconds=int(left))}')

    notice(f'Training time {datetime.timedelta(seconds=int(time.monotonic() - started))}')
    if log is not None:
        log.close()
    if args.output_dir:
        notice('Next, evaluate the best model:\n  ' + evaluation_command(args))
    return stats


def test(run: Training, loader: DataLoader, *, device: torch.device, amp_dtype: Optional[torch.dtype],
         after_batch: Callable[[], None]) -> dict:
    """Evaluate the model and its moving average, and enter their accuracies into `run`."""
    stats = evaluate_all(run.model, loader, device=device, amp_dtype=amp_dtype, after_batch=after_batch)
    if not math.isfinite(stats['loss']):
        raise NonFiniteLoss('evaluation loss', stats['loss'], f'the end of epoch {run.epoch + 1}')
    result = {f'test_{k}': v for k, v in stats.items() if k not in ('images', 'resolution')}
    if run.model_ema is not None:
        average = run.model_ema.module
        if run.model_ema.device is not None:
            average = copy.deepcopy(average).to(device)
        ema_stats = evaluate_all(average, loader, device=device, amp_dtype=amp_dtype,
                                 header='Test of the moving average', after_batch=after_batch)
        result.update({f'test_ema_{k}': ema_stats[k] for k in ('acc1', 'acc5', 'loss')})
    # Not before both are known: a run that is stopped between them does both again.
    run.accuracy.update(last=stats['acc1'], best=max(run.accuracy['best'], stats['acc1']),
                        best_ema=max(run.accuracy['best_ema'], result.get('test_ema_acc1', 0.)))
    return result


def evaluate_all(model: torch.nn.Module, loader: Union[DataLoader, readers.StreamLoader], *,
                 after_batch: Optional[Callable[[], None]] = None, **options) -> dict:
    """engine.evaluate, of a stream too: its processes may have different numbers of batches, and cannot agree."""
    if not isinstance(loader, readers.StreamLoader):
        return evaluate(model, loader, after_batch=after_batch, **options)
    stats = evaluate(model, loader, **options)
    loader.loader.dataset.refuse_losses(stats['images'])
    return stats


def open_log(args, derived: dict, train_loader: DataLoader, run: Training) -> Optional[utils.EpochLog]:
    """Prepare --output-dir: but for its lock, nothing before this has written anything."""
    if not args.output_dir:
        return None
    folder, first_epoch = Path(args.output_dir), run.epoch + 1
    if not training.goes_on_in_place(args):
        utils.set_aside(folder)
    if not utils.is_main_process():
        return None
    utils.write_json(folder / 'args.json',
                     {'args': vars(args), 'derived': derived, 'environment': utils.environment()})
    log = utils.EpochLog(folder, first_epoch)
    if first_epoch == 0:  # also when going on within it: the log starts anew there
        log.tensorboard.add_text('args', '\n'.join(f'    {k}: {v}' for k, v in vars(args).items()))
        if not isinstance(train_loader, readers.StreamLoader):  # which could not go back to its beginning
            keys = itertools.islice(train_loader.sampler, min(args.batch_size, 32))
            images = torch.stack([train_loader.dataset[key][0] for key in keys])
            log.tensorboard.add_image(
                'train/images', torchvision.utils.make_grid(images, normalize=True, scale_each=True))
    return log


def evaluation_command(args) -> str:
    best = Path(args.output_dir, BEST)
    weights = best if best.exists() else Path(args.output_dir, CHECKPOINT)  # no new best after a resume from elsewhere
    words = ['python', 'main.py', '--eval', '--resume', str(weights), '--model', args.model,
             '--input-size', str(args.input_size), '--data-set', args.data_set]
    words += [] if args.data_set == 'SAMPLE' else ['--data-path', args.data_path]
    words += ['--inat-category', args.inat_category] if args.data_set.startswith('INAT') else []
    words += ['--full-crop'] if args.full_crop else []
    if readers.prefix_of(args.data_set):
        words += ['--val-split', args.val_split]
        words += ['--num-classes', str(args.num_classes)] if args.num_classes else []
    return shlex.join(words)


def evaluate_only(args, device: torch.device) -> dict:
    """Evaluate a model; returns and stores its statistics."""
    dataset, num_classes = datasets.build_dataset(args, is_train=False)
    datasets.probe_images(dataset, same_size=not datasets.resizes_for_evaluation(args))
    model = build_model(args, num_classes, new_head=False)
    checkpoint, source = training.load_for_resume(args)
    if checkpoint is not None:
        weights.load(model, weights.extract(checkpoint, source, use_ema=args.use_ema))
    elif args.resume:
        raise InputError(f'--resume auto: no {CHECKPOINT} in {args.output_dir} to evaluate')
    elif args.pretrained:
        notice_published_setting(args)
    else:
        notice('Neither --resume nor --pretrained: the weights are random')
    for description in (args, utils.environment()):
        notice(description)
    if checkpoint is not None and checkpoint.get('classes') not in (None, datasets.class_names(dataset)):
        notice(f'{source}: was trained on classes of other names, or in another order, than these')
    loader = build_eval_loader(dataset, args, device)
    if args.compile:
        model.compile(mode=args.compile_mode)
    stats = evaluate_all(model.to(device), loader, device=device, amp_dtype=build_amp_dtype(args, device))
    if not args.dist_eval and not isinstance(loader, readers.StreamLoader):  # each process has evaluated all of them
        stats['images'] //= utils.get_world_size()
    stats.update(model=args.model, weights=args.resume or args.pretrained,
                 crop=1. if args.full_crop or not datasets.resizes_for_evaluation(args) else .875)
    if args.output_dir and utils.is_main_process():
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        utils.write_json(Path(args.output_dir, 'eval.json'),
                         {**stats, 'args': vars(args), 'environment': utils.environment()})
    return stats


def notice_published_setting(args):
    """Say so where published weights are not evaluated as they were published."""
    published = weights.published(args.model, args.pretrained) or weights.published_as(args.pretrained)
    if published and (args.input_size != published.resolution or not args.full_crop):
        notice(f'{published.tag}: its published accuracy is for --input-size {published.resolution} --full-crop')


def set_deterministic(deterministic: bool):
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')


def main(argv: Optional[list] = None) -> dict:
    """Run with a command line (`sys.argv` if None), given as a list of words; returns the last statistics.

    Raises:
        InputError: the arguments, or the data or weights they name, can't be used.
    """
    args = parse_args(argv)
    set_deterministic(args.deterministic)
    device = utils.init_distributed(utils.choose_device(args.device), world_size=args.world_size,
                                    dist_url=args.dist_url, timeout_minutes=args.dist_timeout)
    if device.type == 'cpu' and not args.eval:
        utils.keep_freed_memory()
    try:
        stats = evaluate_only(args, device) if args.eval else train(args, device)
    except utils.Interrupted:
        utils.end_distributed()
        raise  # of any other error the processes know nothing: leaving the group could wait for them
    utils.end_distributed()
    return stats


if __name__ == '__main__':
    utils.run_program(main)
