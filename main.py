"""Train and evaluate image classifiers: XCiT, or any other model that timm knows.

The recipe is the paper's by default. Data flows one way: arguments -> builders -> loop -> checkpoint.
"""
import run.startup  # noqa: F401  first of all

import argparse
import copy
import dataclasses
import math
import shlex
from pathlib import Path
from typing import Callable, Dict, List, Optional, Tuple

import timm
import torch
import torchvision
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup
from timm.utils import ModelEmaV3

import datasets
import weights
import xca_gram
import xcit
from engine import NonFiniteLoss, evaluate, train_one_epoch
from loaders import pictures, readers
from loaders.batches import build_eval_loader, build_train_loader, images_of_epoch
from losses import DISTILLATION_TYPES, DistillationLoss, TeacherOfOtherImages, classification_loss
from reports import drawings, real_labels, tables
from reports.predictions import Predictions
from run import flags, optimization, parts, processes
from run.commandline import COUNT, COUNT_OR_0, FRACTION, NON_NEGATIVE, PATH, POSITIVE, Parser, number, run_program
from run.descriptions import names_of, trained_with
from run.folder import BEST, CHECKPOINT
from run.logs import environment
from run.optimization import build_scheduler
from run.position import Epochs
from run.processes import notice
from run.resume import load_for_resume
from run.training import Run
from utils import InputError, first_line, replaced, seed_everything, write_json

REFERENCE_BATCH = 512  # images for which --lr is meant
LOW_LR = 1e-5  # a peak below it hardly trains anything
# What --finetune changes in the recipe; any of it can be given on the command line
FINETUNING = dict(epochs=30, lr=4e-4, min_lr=1e-6, warmup_epochs=0, drop_path=0., reprob=0., repeated_aug=False,
                  full_crop=True)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments

def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser('main.py', description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    boolean = argparse.BooleanOptionalAction

    group = parser.add_argument_group('run')
    flags.add_run_flags(group)
    flags.add_amp_flag(group)
    flags.add_checkpoint_flags(group)
    group.add_argument('--start-epoch', default=0, type=COUNT_OR_0, metavar='N', help='first epoch, without --resume')
    group.add_argument('--epochs', default=400, type=COUNT, metavar='N', help='of the whole training')

    group = parser.add_argument_group('model')
    group.add_argument('--model', default='xcit_small_12_p16',
                       help='one of the 14 XCiT models, or of timm\'s; if unset, and the file of --pretrained or '
                       '--finetune says what it is of, that')
    group.add_argument('--input-size', default=224, type=COUNT, metavar='PIXELS', help='side of the square images')
    group.add_argument('--drop', default=0., type=FRACTION, metavar='FRACTION', help='dropout')
    group.add_argument('--drop-path', default=.1, type=number(float, 0, .999), metavar='FRACTION',
                       help='stochastic depth, the same in all layers of XCiT')
    group.add_argument('--pretrained', type=PATH, metavar='TAG|PATH|URL|hf-hub:NAME',
                       help='initial weights: published ones by their tag (see the README), or any others; a head for '
                       'another number of classes is left out')
    group.add_argument('--finetune', type=PATH, metavar='TAG|PATH|URL|hf-hub:NAME',
                       help='the same, with other defaults: '
                       + ', '.join(f'{name} {value}' for name, value in FINETUNING.items()))
    group.add_argument('--freeze-backbone', action=boolean, default=False,
                       help='train the head alone (linear probe); BatchNorm statistics stay as they are, too')
    group.add_argument('--use-ema', action=boolean, default=False,
                       help='take the moving average that a training\'s checkpoint holds beside the weights')
    group.add_argument('--checkpoint-key', default='', metavar='KEY',
                       help='where the weights are in a file that holds several, as in state_dict.student')
    group.add_argument('--surgery', type=PATH, metavar='TAG|PATH|URL|hf-hub:NAME',
                       help='copy the patch stem from these weights and keep it frozen: steadier for large models')
    group.add_argument('--grad-checkpointing', action=boolean, default=False,
                       help='compute activations twice to save memory')
    group.add_argument('--xca', choices=xca_gram.FORMS, default='auto',
                       help='how XCiT\'s attention is computed; auto: the faster way for the number of tokens; '
                            'gram needs --amp off')
    flags.add_compile_flags(group)
    group.add_argument('--model-ema', action=boolean, default=True, help='keep a moving average of the weights')
    group.add_argument('--model-ema-decay', default=.99996, type=FRACTION, metavar='FRACTION',
                       help='of the average; rises to this value over the first steps')
    group.add_argument('--model-ema-force-cpu', action=boolean, default=False, help='keep the average in CPU memory')

    group = parser.add_argument_group('optimizer')
    flags.add_batch_flags(group)
    flags.add_optimizer_flags(group)

    group = parser.add_argument_group('schedule')
    group.add_argument('--lr', default=5e-4, type=POSITIVE,
                       help=f'peak learning rate for {REFERENCE_BATCH} images a step; scaled with the real number')
    flags.add_schedule_flags(group)

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
    group.add_argument('--mixup-mode', default='batch', choices=['batch', 'pair', 'elem'], help='what has its own mix')

    group = parser.add_argument_group('distillation')
    group.add_argument('--distillation-type', default='none', choices=DISTILLATION_TYPES,
                       help='learn from a teacher\'s probabilities or from its class')
    group.add_argument('--teacher-model', default='regnety_160', help='name of a timm model')
    group.add_argument('--teacher-path', default='', type=PATH, metavar='TAG|PATH|URL|hf-hub:NAME',
                       help='the teacher\'s weights')
    group.add_argument('--teacher-pretrained', action=boolean, default=False, help='take timm\'s weights instead')
    group.add_argument('--teacher-mean', type=float, nargs=3, metavar='MEAN',
                       help='of each channel, by which the teacher\'s images were normalised; timm\'s value if unset')
    group.add_argument('--teacher-std', type=POSITIVE, nargs=3, metavar='DEVIATION', help='likewise')
    group.add_argument('--distillation-alpha', default=.5, type=FRACTION, help='weight of the teacher\'s term')
    group.add_argument('--distillation-tau', default=1., type=POSITIVE, help='temperature of "soft"')

    group = parser.add_argument_group('data')
    datasets.add_data_flags(group)
    flags.add_loader_flags(group)

    group = parser.add_argument_group('evaluation')
    group.add_argument('--eval', action='store_true', help='evaluate only')
    group.add_argument('--report', action=boolean, default=True,
                       help='with --output-dir: figures of each class, confusions and mistakes in its folder report')
    group.add_argument('--real-labels', type=PATH, metavar=f'FILE|{real_labels.OF_TIMM}',
                       help='with --eval and IMNET: the accuracy by reassessed labels, too (real.json; '
                       f'{real_labels.OF_TIMM}: the one that comes with timm)')
    group.add_argument('--test-freq', default=1, type=COUNT, metavar='N', help='epochs between two evaluations')
    group.add_argument('--full-crop', action=boolean, default=False,
                       help='evaluate the whole shorter side (crop 1.0, as published) instead of 0.875 of it')

    group = parser.add_argument_group('distributed')
    group.add_argument('--dist-eval', action=boolean, default=True,
                       help='share the evaluation images between the processes')
    flags.add_distributed_flags(group)
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
    if args.pretrained:
        parser.set_defaults(model=None)
        if parser.parse_args(argv).model is None:
            args.model = model_of_weights(args)
    weights.check_model('--model', args.model)
    if weights.published('', args.model) and not args.pretrained and not args.resume:
        args.pretrained = args.model  # a name with a tag asks for its weights
    datasets.check_data_set(args)
    flags.check_run_flags(args)
    flags.check_optimizer_flags(args)
    flags.check_schedule_flags(args)
    flags.check_pair('--cutmix-minmax', args.cutmix_minmax)
    if args.xca != 'auto' and args.model.partition('.')[0] not in xcit.MODELS:
        raise InputError(f'--xca {args.xca}: is for the XCiT models, and {args.model} is none')
    if args.xca == 'gram' and flags.amp_dtype(args, flags.choose_device(args)):
        raise InputError('--xca gram: needs float32, so add --amp off')
    if uses_soft_targets(args) and args.batch_size % 2 and not args.eval:
        raise InputError(f'--batch-size {args.batch_size}: mixup and cutmix mix pairs of images and need an even '
                         f'number (or --mixup 0 --cutmix 0)')
    if args.distillation_type == 'none':
        for flag in ('teacher_path', 'teacher_pretrained', 'teacher_mean', 'teacher_std'):
            if getattr(args, flag):
                raise InputError(f'--{flag.replace("_", "-")}: has no effect without --distillation-type soft or hard')
    else:
        weights.check_model('--teacher-model', args.teacher_model)
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
    if args.use_ema and not args.pretrained and not (args.eval and args.resume):
        raise InputError('--use-ema: needs weights to take the average from: --pretrained, or --eval with --resume')
    if args.checkpoint_key and not args.pretrained and not (args.eval and args.resume):
        raise InputError('--checkpoint-key: needs weights to choose from: --pretrained, or --eval with --resume')
    if args.real_labels and not (args.eval and args.data_set == 'IMNET'):
        raise InputError(f'--real-labels {args.real_labels}: needs --eval and --data-set IMNET')
    if args.start_epoch >= args.epochs:
        raise InputError(f'--start-epoch {args.start_epoch}: must be less than --epochs {args.epochs}')
    try:
        datasets.build_train_transform(args)
    except Exception as error:  # timm checks a policy's text with whatever its parsing runs into
        raise InputError(f'--aa {args.aa}: not a policy of timm\'s (as rand-m9-mstd0.5-inc1, original, v0, augmix-m3; '
                         f'{type(error).__name__} {first_line(error)})') from None
    return args


def uses_soft_targets(args) -> bool:
    """Whether targets are probabilities: the one place that decides, for mixup and for the criterion."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def model_of_weights(args) -> str:
    """What --model is where it is not given: what the weights say, as a training's file does, or the default."""
    flag = '--finetune' if args.finetune else '--pretrained'
    name = weights.model_named_in(args.pretrained, flag)
    if name is None or name == args.model or not timm.is_model(name):
        return args.model
    notice(f'{flag} {args.pretrained}: is of {name}, so --model is that')
    return name


# ---------------------------------------------------------------------------------------------------------------------
# Builders

def build_model(args, num_classes: int, *, new_head: bool) -> torch.nn.Module:
    """The model with its initial weights; `new_head`: see weights.load."""
    seed_everything(args.seed)
    try:
        model = timm.create_model(
            args.model, num_classes=num_classes, drop_rate=args.drop, drop_path_rate=args.drop_path)
    except (TypeError, RuntimeError, ValueError) as error:
        raise InputError(f'--model {args.model}: timm can\'t build it ({first_line(error)})') from None
    if isinstance(model, xcit.Xcit):
        model.xca_form = args.xca
    else:
        weights.check_input_size(args, model)
    if args.pretrained:
        flag = '--finetune' if args.finetune else '--pretrained'
        given = weights.read(args.pretrained, flag, args.model, use_ema=args.use_ema, key=args.checkpoint_key)
        weights.load(model, given, new_head=new_head)
        notice_other_normalisation(args, given.checkpoint)
    if args.surgery:
        transplant_stem(model, args)
    if args.freeze_backbone:
        model.requires_grad_(False)
        model.get_classifier().requires_grad_(True)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    return model


def notice_other_normalisation(args, checkpoint: dict):
    """Say so where a model was trained on images that were normalised otherwise than these will be."""
    trained = trained_with(checkpoint)
    for flag in ('mean', 'std'):
        before, now = trained.get(flag), getattr(args, flag)
        if 'mean' in trained and before != now:
            notice(f'Warning: the weights were trained with --{flag} {before or "of ImageNet"}, and here it is '
                   f'{now or "of ImageNet"}')


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
        raise InputError(f'{source}: timm can\'t get the weights ({first_line(error)})') from None
    trained = {}
    if args.teacher_path:
        given = weights.read(args.teacher_path, '--teacher-path', args.teacher_model)
        weights.load(teacher, given)
        trained = trained_with(given.checkpoint)
    return adapt_teacher(args, teacher.eval().requires_grad_(False), own='train_interpolation' in trained)


def adapt_teacher(args, teacher: torch.nn.Module, *, own: bool) -> torch.nn.Module:
    """Let a teacher see the images as it was trained, if that is not how the student sees them; and say so.

    Args:
        own: it was trained by this program, which normalises as ImageNet's statistics say.

    Raises:
        InputError: it can't see images of --input-size, nor resized ones.
    """
    config, student = getattr(teacher, 'pretrained_cfg', {}), (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    mean, std = student if own else (tuple(config.get(name) or default) for name, default in
                                     zip(('mean', 'std'), student))
    mean, std = tuple(args.teacher_mean or mean), tuple(args.teacher_std or std)
    size = None
    if not weights.takes(teacher, (args.input_size, args.input_size)):
        size = tuple(config.get('input_size', (3, 224, 224))[1:])
        if not weights.takes(teacher, size):
            raise InputError(f'--teacher-model {args.teacher_model}: can see images neither of {args.input_size} '
                             f'pixels (--input-size) nor of {size[0]}')
    if size is None and (mean, std) == student:
        return teacher
    resized = f'resized to {size[0]} x {size[1]} pixels and ' if size else ''
    notice(f'--teacher-model {args.teacher_model}: sees the images {resized}normalised by mean {mean} and standard '
           f'deviation {std}, as it was trained')
    return TeacherOfOtherImages(teacher, student=student, own=(mean, std), size=size)


def with_batch_that_fits(args, dataset) -> argparse.Namespace:
    """The flags with a --batch-size that the training pictures fill, which a small folder may not."""
    images = images_of_epoch(dataset, args)
    smaller = images - images % 2 if uses_soft_targets(args) else images
    if smaller >= args.batch_size or smaller < 1:  # of no picture at all the loader tells
        return args
    notice(f'--batch-size {args.batch_size}: an epoch has {images} images for each process; goes on with a batch of '
           f'{smaller}')
    return replaced(args, batch_size=smaller)


def scaled_lr(args) -> float:
    return args.lr * flags.images_per_step(args) / REFERENCE_BATCH


def build_optimizer(args, model: torch.nn.Module) -> torch.optim.Optimizer:
    return optimization.build_optimizer(args, model, lr=scaled_lr(args))


# ---------------------------------------------------------------------------------------------------------------------
# The two programs

def train(args, device: torch.device) -> dict:
    """Train a model; returns the last epoch's statistics."""
    dataset_train, num_classes = datasets.build_dataset(args, is_train=True)
    args = replaced(args, resize=dataset_train.resizes)
    dataset_val, _ = datasets.build_dataset(args, is_train=False)
    pictures.notice_peculiarities(datasets.files_of(dataset_train) + datasets.files_of(dataset_val))
    datasets.notice_class_sizes(dataset_train, dataset_val)
    if not args.skip_bad_images:
        datasets.probe_images(dataset_train, is_train=True)
    datasets.probe_images(dataset_val, same_size=not datasets.resizes_for_evaluation(args))
    args = with_batch_that_fits(args, dataset_train)
    train_loader = build_train_loader(dataset_train, args, device,
                                      collate_fn=datasets.build_train_collate(args))
    eval_loader = build_eval_loader(dataset_val, args, device)

    amp_dtype = flags.amp_dtype(args, device)
    model = build_model(args, num_classes, new_head=True).to(device)
    if isinstance(model, xcit.Xcit):
        xcit.speed_up_training(model)
    model_ema = build_model_ema(args, model)
    criterion = build_criterion(args, num_classes, device)
    mixup = build_mixup(args, num_classes)
    optimizer = build_optimizer(args, model)
    scheduler = build_scheduler(args, optimizer)
    scaler = flags.build_scaler(args, device)
    accuracy = parts.Metrics(last=0., best=0., best_ema=0.)
    run = build_run(args, model, model_ema, optimizer, scheduler, scaler, accuracy, datasets.class_names(dataset_train))
    derived = {'device': str(device), 'amp_dtype': str(amp_dtype), 'processes': processes.get_world_size(),
               'global_batch': flags.images_per_step(args), 'scaled_lr': scaled_lr(args),
               'num_classes': num_classes, 'train_images': len(dataset_train), 'eval_images': len(dataset_val),
               'n_parameters': sum(p.numel() for p in model.parameters() if p.requires_grad)}

    with run.locked():
        lacking = run.resume()
        if 'model_ema' in lacking:
            model_ema.set(model)
        scheduler.go_to(run.position.done)
        if run.is_over():
            return {}
        if args.compile:
            compile_all(args, model, model_ema, criterion)
        ddp_model = processes.wrap_for_distributed(model, device, sync_bn=args.sync_bn)

        def losses(batch) -> dict:
            images, targets = batch if mixup is None else mixup(*batch)
            return {'loss': criterion(images, ddp_model(images), targets)}

        with run.started(derived):
            if args.output_dir and processes.is_main_process() and hasattr(dataset_train, 'split'):
                dataset_train.split.write(Path(args.output_dir))
            notice_pace(args, batches=len(train_loader), images=images_of_epoch(dataset_train, args))
            show_first_images(args, run, train_loader)
            for epoch in run.rounds(train_loader):
                best = False
                train_stats = train_one_epoch(
                    ddp_model, losses, train_loader, optimizer=optimizer, clip_grad=args.clip_grad,
                    frozen=frozen_part(args, model),
                    average=None if model_ema is None else lambda updates: model_ema.update(model, step=updates),
                    **run.options(epoch, device))
                stats = {f'train_{k}': v for k, v in train_stats.items()}
                if epoch % args.test_freq == 0 or epoch == args.epochs - 1:
                    run.save_untested()  # an evaluation picture may be unreadable, which ends the run
                    try:
                        tested, found = test(model, model_ema, eval_loader, device=device, amp_dtype=amp_dtype,
                                             where=f'the end of epoch {epoch}', after_batch=run.look_up,
                                             collects=bool(args.report and args.output_dir))
                    except NonFiniteLoss:
                        run.take_back()
                        raise
                    stats.update(tested)
                    best = note(accuracy, stats, epoch)
                    if best and found:
                        predictions = found['average' if accuracy['better_is_average'] else 'model']
                        predictions.gather(eval_loader)
                        write_tables(args, dataset_val, predictions)
                # faithful: stepped with the epoch just finished, so that epochs 0 and 1 share a rate (original main.py)
                scheduler.step(epoch, accuracy['last'])
                stats['n_parameters'] = derived['n_parameters']
                run.finish(epoch, stats, best=best, summary=line_of_table(stats))
    if args.output_dir:
        conclude(args, accuracy, dataset_val)
    return stats


def build_run(args, model: torch.nn.Module, model_ema: Optional[ModelEmaV3], optimizer: torch.optim.Optimizer,
              scheduler, scaler: torch.amp.GradScaler, accuracy: parts.Metrics, classes: Optional[list]) -> Run:
    """What a training consists of, under the names that a checkpoint has for it."""
    depends_on_the_past = scheduler.depends_on_the_past
    return Run(
        args, Epochs(args.epochs, first=args.start_epoch),
        {'model': weights.ModelPart(model),
         'model_ema': None if model_ema is None else weights.ModelPart(model_ema.module),
         'optimizer': parts.Optimizer(optimizer, keeps_lr=depends_on_the_past),
         'lr_scheduler': scheduler,
         'scaler': scaler,
         'accuracy': accuracy,
         'classes': parts.Classes(classes)},
        optional=('model_ema', 'scaler', 'accuracy', 'classes', *(() if depends_on_the_past else ('lr_scheduler',))),
        fixed=('opt', 'val_fraction'))


def test(model: torch.nn.Module, model_ema: Optional[ModelEmaV3], loader, *, device: torch.device,
         amp_dtype: Optional[torch.dtype], where: str, after_batch: Callable[[], None], collects: bool
         ) -> Tuple[dict, Dict[str, Predictions]]:
    """Evaluate the model and its moving average.

    Args:
        where: for the error of a model that has diverged.
        collects: keep what they predict.

    Returns:
        The figures; and the predictions of 'model' and 'average', where they are kept.
    """
    found = {name: Predictions() for name in ('model', 'average')} if collects else {}
    stats = evaluate(model, loader, device=device, amp_dtype=amp_dtype, after_batch=after_batch, announce=False,
                     collect=found.get('model'))
    if not math.isfinite(stats['loss']):
        raise NonFiniteLoss('evaluation loss', stats['loss'], where)
    result = {f'test_{k}': v for k, v in stats.items() if k not in ('images', 'resolution')}
    if model_ema is not None:
        average = model_ema.module
        if model_ema.device is not None:
            average = copy.deepcopy(average).to(device)
        ema_stats = evaluate(average, loader, device=device, amp_dtype=amp_dtype,
                             header='Test of the moving average', after_batch=after_batch, announce=False,
                             collect=found.get('average'))
        result.update({f'test_ema_{k}': ema_stats[k] for k in ('acc1', 'acc5', 'loss')})
    return result, found


def note(accuracy: parts.Metrics, stats: dict, epoch: int) -> bool:
    """Enter an evaluation; whether the model, or its average, is as good as any before.

    Not before all of it is known: a run that is stopped within it does it again.
    """
    model, average = stats['test_acc1'], stats.get('test_ema_acc1', -1.)
    accuracy['last'] = model
    before = max(accuracy['best'], accuracy['best_ema'])
    accuracy.note_best('best', model)
    accuracy.note_best('best_ema', max(average, 0.))
    if max(model, average) < before:
        return False
    accuracy.update(better_is_average=float(average > model), best_epoch=float(epoch))
    return True


def write_tables(args, dataset, predictions: Predictions):
    """The tables of a report, on the main process, of what all of them have predicted."""
    if processes.is_main_process():
        tables.write(Path(args.output_dir, tables.FOLDER), predictions, datasets.class_names(dataset),
                     datasets.files_of(dataset) or None)


def draw_report(output_dir: str, dataset):
    """The pictures of a report whose tables are there, and of a training's log."""
    folder = Path(output_dir, tables.FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    drawings.draw(folder, Path(output_dir, 'log.txt'), datasets.picture_of(dataset))
    notice(f'Report: {folder}')


def conclude(args, accuracy: parts.Metrics, dataset):
    """After a training: its report, which model is best, and what to do with it."""
    if args.report and processes.is_main_process():
        draw_report(args.output_dir, dataset)
    if 'best_epoch' in accuracy:
        which = 'the moving average' if accuracy['better_is_average'] else 'the model'
        best = accuracy['best_ema' if accuracy['better_is_average'] else 'best']
        notice(f'Best: epoch {accuracy["best_epoch"]:.0f}, {which}, Acc@1 {best:.3f}, in {best_weights(args)}')
    ema = ['--use-ema'] if accuracy.get('better_is_average') else []
    notice('Next, evaluate it, or predict pictures of your own:\n  ' + shlex.join(evaluation_command(args) + ema)
           + '\n  ' + shlex.join(['python', '-m', 'tools.predict', 'PICTURE.jpg', '--pretrained',
                                  str(best_weights(args)), *ema]))


def notice_pace(args, *, batches: int, images: int):
    """Say how fast is learnt, and warn where it hardly can be.

    Args:
        batches: of an epoch, of this process.
        images: of an epoch, of this process, of which the last fill no batch.
    """
    lr, per_step, steps = scaled_lr(args), flags.images_per_step(args), -(-batches // args.accum_iter)
    left_out = (images - batches * args.batch_size) * processes.get_world_size()
    notice(f'Learning rate {lr:.3g} at its peak: --lr {args.lr:g} x {per_step} images a step / {REFERENCE_BATCH}')
    notice(f'An epoch has {steps} steps, the warm-up {steps * args.warmup_epochs}'
           + (f'; {left_out} of {images * processes.get_world_size()} pictures of an epoch fill no batch and are left '
              f'out' if left_out > 0 else ''))
    if lr < LOW_LR <= args.lr:
        notice(f'Warning: --lr {args.lr:g} has become {lr:.3g}, since a step has {per_step} images and not '
               f'{REFERENCE_BATCH}; for a rate of {args.lr:g}, give --lr {args.lr * REFERENCE_BATCH / per_step:.3g}')
    if args.warmup_epochs >= args.epochs:
        notice(f'Warning: --warmup-epochs {args.warmup_epochs} is as long as the training (--epochs {args.epochs}), so '
               f'that the learning rate never reaches its peak')


def line_of_table(stats: dict) -> dict:
    """What the table of epochs shows of one: texts by column."""
    columns = {'loss': ('train_loss', '.4f'), 'lr': ('train_lr', '.2e'), 'Acc@1': ('test_acc1', '.3f'),
               'Acc@5': ('test_acc5', '.3f'), 'val loss': ('test_loss', '.3f'), 'EMA Acc@1': ('test_ema_acc1', '.3f'),
               'images/s': ('train_images_per_s', '.0f'), 'MB': ('train_memory_mb', '.0f')}
    return {column: format(stats[name], spec) if name in stats else '-' for column, (name, spec) in columns.items()}


def show_first_images(args, run: Run, loader):
    """In TensorBoard, what the model is about to see, where a training begins."""
    if run.log is not None and run.first == 0:
        images = loader.first_images(min(args.batch_size, 32))
        if images is not None:
            run.log.tensorboard.do(
                'add_image', 'train/images', torchvision.utils.make_grid(images, normalize=True, scale_each=True))


def best_weights(args) -> Path:
    best = Path(args.output_dir, BEST)
    return best if best.exists() else Path(args.output_dir, CHECKPOINT)  # no new best after a resume from elsewhere


def evaluation_command(args) -> List[str]:
    words = ['python', 'main.py', '--eval', '--resume', str(best_weights(args)), '--model', args.model,
             '--input-size', str(args.input_size), '--data-set', args.data_set]
    words += [] if args.data_set == 'SAMPLE' else ['--data-path', args.data_path]
    words += ['--inat-category', args.inat_category] if args.data_set.startswith('INAT') else []
    words += ['--full-crop'] if args.full_crop else []
    for flag in ('mean', 'std'):
        words += [f'--{flag}', *map(str, getattr(args, flag))] if getattr(args, flag) else []
    if readers.prefix_of(args.data_set):
        words += ['--val-split', args.val_split]
        words += ['--num-classes', str(args.num_classes)] if args.num_classes else []
    return words


def evaluate_only(args, device: torch.device) -> dict:
    """Evaluate a model; returns and stores its statistics."""
    dataset, num_classes = datasets.build_dataset(args, is_train=False)
    if args.real_labels:  # what can't be read is refused before the work
        real_labels.read(args.real_labels)
        real_labels.numbers_of(datasets.files_of(dataset))
    args = replaced(args, resize=dataset.resizes)
    pictures.notice_peculiarities(datasets.files_of(dataset))
    datasets.probe_images(dataset, same_size=not datasets.resizes_for_evaluation(args))
    model = build_model(args, num_classes, new_head=False)
    checkpoint, source = load_for_resume(args)
    if checkpoint is not None:
        weights.load(model, weights.extract(checkpoint, source, own=weights.names_of(args.model), use_ema=args.use_ema,
                                            key=args.checkpoint_key))
        notice_other_normalisation(args, checkpoint)
    elif args.resume:
        raise InputError(f'--resume auto: no {CHECKPOINT} in {args.output_dir} to evaluate')
    elif args.pretrained:
        notice_published_setting(args)
    else:
        notice('Neither --resume nor --pretrained: the weights are random')
    crop = 1. if args.full_crop or not datasets.resizes_for_evaluation(args) else .875
    notice(', '.join(f'{name} {value}' for name, value in environment().items()))
    notice(f'{args.model}: {len(dataset)} images at {args.input_size} pixels, crop {crop:g}')
    if checkpoint is not None and names_of(checkpoint.get('classes')) not in (
            None, datasets.class_names(dataset)):
        notice(f'{source}: was trained on classes of other names, or in another order, than these')
    loader = build_eval_loader(dataset, args, device)
    if isinstance(model, xcit.Xcit):
        xcit.fuse(model.eval())
    if args.compile:
        model.compile(mode=args.compile_mode)
    predictions = Predictions()
    stats = evaluate(model.to(device), loader, device=device, amp_dtype=flags.amp_dtype(args, device),
                     classes=datasets.possible_classes(dataset), collect=predictions)
    predictions.gather(loader)
    if args.real_labels:
        stats.update(evaluate_real_labels(args, dataset, predictions))
    stats.update(model=args.model, weights=args.resume or args.pretrained, crop=crop)
    if args.output_dir and processes.is_main_process():
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        write_json(Path(args.output_dir, 'eval.json'),
                   {**stats, 'args': vars(args), 'environment': environment()})
    if args.output_dir and args.report:
        write_tables(args, dataset, predictions)
        if processes.is_main_process():
            draw_report(args.output_dir, dataset)
    return stats


def evaluate_real_labels(args, dataset, predictions: Predictions) -> dict:
    """Accuracies by --real-labels, which are printed too."""
    labels = real_labels.read(args.real_labels)
    top1, top5, count = real_labels.accuracy(predictions, datasets.files_of(dataset), labels)
    notice(f'* ReaL Acc@1 {top1:.3f} Acc@5 {top5:.3f} of {count} images')
    return {'real_acc1': top1, 'real_acc5': top5, 'real_images': count}


def notice_published_setting(args):
    """Say so where published weights are not evaluated as they were published."""
    published = weights.published(args.model, args.pretrained) or weights.published_as(args.pretrained)
    full_crop = published is not None and published.crop == 1.
    if published and (args.input_size != published.resolution or args.full_crop != full_crop):
        notice(f'{published.tag}: its published accuracy is for --input-size {published.resolution} '
               f'--{"" if full_crop else "no-"}full-crop')


def main(argv: Optional[list] = None) -> dict:
    """Run with a command line (`sys.argv` if None), given as a list of words; returns the last statistics.

    Raises:
        InputError: the arguments, or the data or weights they name, can't be used.
    """
    args = parse_args(argv)
    with processes.joined(args, trains=not args.eval) as device:
        return evaluate_only(args, device) if args.eval else train(args, device)


if __name__ == '__main__':
    run_program(main)
