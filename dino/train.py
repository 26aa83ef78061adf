"""Train XCiT without labels by DINO: a student is trained to match the output of a teacher, the EMA of the student.

The teacher receives the global crops of an image, the student all crops. The defaults are the original's recipe.
Checkpoints contain student, teacher and everything needed to resume; backbone.pth contains the teacher's backbone.
"""
import argparse
import math
import os
import shlex
import sys
from pathlib import Path
from typing import Dict, List, Optional, Tuple

if not __package__:  # started as a file
    sys.path[0] = os.path.realpath(f'{__file__}/../..')

import torch

import datasets
import weights
import xcit
from dino import crops, data, drawings, files, monitor, networks, updates
from dino.loss import GLOBAL, DinoLoss, losses_of
from dino.networks import MultiCrop
from engine import train_one_epoch
from loaders.batches import build_train_loader, images_of_epoch
from loaders.samples import PictureSet
from run import devices, flags, parts
from run.assembly import prepare
from run.commandline import COUNT_OR_0, PATH, POSITIVE, Parser, run_program, switch, words_of
from run.folder import CHECKPOINT, RUN_FILES, check_output_dir
from run.logs import table_row
from run.output import log
from run.schedules import Schedule, cosine, ramp
from run.training import Run
from utils import InputError, counted, dashed, seed_everything

REFERENCE_BATCH = 256  # images per step that --lr refers to
# Flags that may not change on resume: schedules, crops and targets
FIXED = ('arch', 'epochs', 'warmup_epochs', 'warmup_teacher_temp_epochs', 'lr', 'min_lr', 'weight_decay',
         'weight_decay_end', 'momentum_teacher', 'warmup_teacher_temp', 'teacher_temp', 'freeze_last_layer',
         'clip_grad', 'optimizer', 'local_crops_number', 'norm_last_layer', 'data_set')
FILES = (*RUN_FILES, 'checkpoint[0-9][0-9][0-9][0-9].pth', files.BEST, 'backbone.pth', 'backbone.safetensors',
         drawings.FOLDER)


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser('python -m dino.train', description=__doc__,
                    example='--arch xcit_small_12_p16 --data-path pictures --output-dir runs/dino')
    group = flags.add_run_group(parser, amp_default='bf16 on cuda, or fp16 if not supported, and off elsewhere')
    group.add_argument('--use-fp16', dest='amp', type=lambda text: 'fp16' if switch(text) else 'off',
                       metavar='true|false', help='flag of the original; true: --amp fp16, false: --amp off')
    flags.add_epochs_flag(group, default=100)
    group.add_argument('--saveckp-freq', default=20, type=COUNT_OR_0, metavar='N',
                       help='epochs between two checkpoints that are kept, e.g. as checkpoint0020.pth; 0: none')
    group.add_argument('--backbone-format', default='pth', choices=['pth', 'safetensors'],
                       help='format of the file with the teacher\'s backbone')

    group = parser.add_argument_group('model')
    networks.add_flags(group)
    group.add_argument('--pretrained', default='', type=PATH, metavar=flags.WEIGHTS,
                       help='initial weights: student and teacher of a DINO checkpoint, or a backbone for both')
    flags.add_grad_checkpointing_flag(group)
    flags.add_compile_flags(group)

    group = parser.add_argument_group('temperature of the teacher')
    group.add_argument('--warmup-teacher-temp', default=.04, type=POSITIVE, metavar='T', help='initial temperature')
    group.add_argument('--teacher-temp', default=.04, type=POSITIVE, metavar='T',
                       help='temperature after the warm-up; above 0.07, training can collapse')
    group.add_argument('--warmup-teacher-temp-epochs', default=0, type=COUNT_OR_0, metavar='N',
                       help='epochs of the temperature\'s warm-up')

    group = parser.add_argument_group('optimization')
    flags.add_batch_flags(group, spellings=('--batch-size-per-gpu', '--batch-size'))
    updates.add_flags(group, reference_batch=REFERENCE_BATCH)

    data.add_crop_flags(parser.add_argument_group('crops'))
    group = parser.add_argument_group('data')
    data.add_data_flags(group)
    flags.add_loader_flags(group)
    monitor.add_flags(parser.add_argument_group('monitoring'))
    group = parser.add_argument_group('distributed')
    flags.add_distributed_flags(group)
    group.add_argument('--local-rank', type=int, help=argparse.SUPPRESS)  # given by launchers of 2021
    parser.set_defaults(output_dir='.')
    return parser


def parse_args(argv: Optional[list] = None) -> argparse.Namespace:
    """Parse the command line, and raise InputError for invalid flags before any work is done."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if not args.amp:
        is_cuda = devices.choose_device(args.device).type == 'cuda'
        args.amp = ('bf16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'fp16') if is_cuda else 'off'
    flags.check_run_flags(args, writes=() if args.preview_crops else FILES)
    flags.check_compile_flags(args)
    data.check_flags(args, parser)
    patch_size = networks.checked_patch_size(args.arch, args.patch_size)
    fit_defaults(args, parser, argv, patch_size)
    data.check_crop_flags(args, patch_size=patch_size)
    for name in ('warmup_epochs', 'warmup_teacher_temp_epochs'):
        if vars(args)[name] > args.epochs:
            raise InputError(f'{dashed(name)} {vars(args)[name]}: longer than the run (--epochs {args.epochs})')
    if args.pretrained:
        weights.check_exists(args.pretrained, '--pretrained', args.arch)
    if args.preview_crops:
        check_output_dir(args.preview_crops, '--preview-crops')
    monitor.check_flags(args, parser)
    return args


def fit_defaults(args, parser: Parser, argv: Optional[list], patch_size: int):
    """Fit defaults to a short run, and to small global crops."""
    flags.fit_warmup(args, parser, argv)
    flags.fit_default(args, parser, argv, 'freeze_last_layer', None if args.freeze_last_layer < args.epochs else 0,
                      f'--epochs {args.epochs}')
    side = args.input_size * parser.get_default('local_crops_size') / parser.get_default('input_size')
    fitting = max(1, round(side / patch_size)) * patch_size
    flags.fit_default(args, parser, argv, 'local_crops_size',
                      None if args.local_crops_size <= args.input_size else fitting,
                      f'--global-crops-size {args.input_size}')


def build_dataset(args) -> PictureSet:
    return data.build_dataset(datasets.source(args), data.build_crops(args), skips_bad=args.skip_bad_images > 0)


def build_networks(args, criterion: DinoLoss) -> Tuple[MultiCrop, MultiCrop, bool]:
    """Build student and teacher, with equal weights unless --pretrained contains both; load its centre, if any.

    Returns:
        Student, teacher, and whether their heads are new.
    """
    source, content, given = f'--pretrained {args.pretrained}', {}, None
    if args.pretrained:
        content = weights.read_content(args.pretrained, '--pretrained', args.arch)
        if not files.is_full(content):
            given = weights.extract(content, source, own=weights.names_of(args.arch), expected=(args.arch, '--arch'))
    seed_everything(args.seed)
    student = networks.build(args.arch, args.out_dim, given, drop_path_rate=args.drop_path_rate,
                             use_bn=args.use_bn_in_head, norm_last_layer=args.norm_last_layer)
    teacher = networks.build(args.arch, args.out_dim, drop_path_rate=0., use_bn=args.use_bn_in_head,
                             norm_last_layer=True).requires_grad_(False)
    if files.is_full(content):
        try:
            notes = files.load_full(content, student, teacher, criterion)
        except InputError as error:
            weights.refuse_other_model(weights.model_in(content), args.arch, '--arch', source=source)
            raise InputError(f'{source}: {error}') from None
        log(f'{source}: {"; ".join([*notes, "weights of student and teacher are loaded"])}')
        return student, teacher, False
    if given is not None:
        log(f'{source}: a backbone for student and teacher; their heads are new')
    teacher.load_state_dict(student.state_dict())
    return student, teacher, True


def build_curves(args, *, lr: float, steps: int) -> Dict[str, List[float]]:
    """Compute the values of each optimizer step by their name in the log; `lr`: peak, `steps`: steps per epoch."""
    total = args.epochs * steps
    return {'lr': cosine(lr, args.min_lr, steps=total, warmup_steps=args.warmup_epochs * steps),
            'wd': cosine(args.weight_decay, args.weight_decay_end, steps=total),
            'momentum': cosine(args.momentum_teacher, 1., steps=total)}


def remedy(args) -> str:
    """Return the way to train on with other flags or pictures, for the errors of --resume."""
    file = Path(args.output_dir, CHECKPOINT) if args.resume == 'auto' else args.resume
    return (f'; to train longer, or with other flags or pictures, start from its weights in another folder: '
            f'--pretrained {file} --output-dir OTHER')


def train(args, device: torch.device) -> dict:
    """Train; return the metrics of the last epoch."""
    dataset = build_dataset(args)
    if args.preview_crops:
        return {'pictures': drawings.write_crops(
            args.preview_crops, dataset, args.preview_count, seed=args.seed, skips_bad=args.skip_bad_images > 0)}
    if args.batch_size == flags.BATCH_SIZE:
        args.batch_size = flags.filled_batch(args.batch_size, images_of_epoch(dataset))
    loading, amp_dtype = flags.loading(args, device), flags.amp_dtype(args, device)
    watch = monitor.build(args, dataset, loading, amp_dtype)
    loader = build_train_loader(dataset, loading, collate_fn=crops.collate)
    batches, steps = len(loader), -(-len(loader) // args.accum_iter)
    pace = flags.pace(args, reference_batch=REFERENCE_BATCH)
    criterion = DinoLoss(args.out_dim, GLOBAL + args.local_crops_number).to(device)
    student, teacher, has_new_heads = build_networks(args, criterion)
    for network in (student.to(device), teacher.to(device)):
        xcit.speed_up_training(network.backbone)
    optimizer, scaler = updates.build_optimizer(args.optimizer, student), flags.build_scaler(args, device)
    curves = build_curves(args, lr=pace.scaled_lr, steps=steps)
    temperatures = ramp(args.warmup_teacher_temp, args.teacher_temp, steps=args.epochs,
                        warmup_steps=args.warmup_teacher_temp_epochs)
    run = Run(args, files.NextEpoch(args.epochs), {
        'student': files.Network(student), 'teacher': files.Network(teacher),
        'optimizer': parts.Optimizer(optimizer), 'dino_loss': criterion, 'fp16_scaler': scaler,
        'data': parts.Images(len(dataset), dataset.files()), 'monitor': watch.metrics},
        optional=('fp16_scaler', 'data', 'monitor'), fixed=FIXED, files=FILES,
        remedies=dict.fromkeys({*FIXED, 'data'} - {'arch'}, remedy(args)))

    with run.resumed():
        if run.is_over():
            return {}
        schedule = Schedule(optimizer, curves['lr'], weight_decay=curves['wd'], decayed=[0])
        schedule.resume(run.position.updates_done(per_round=steps, accum_iter=args.accum_iter))
        compiled = [(network.backbone, dict(mode=args.compile_mode, dynamic=False)) for network in (student, teacher)]
        ddp_student = prepare(student, device, checkpointed=student.backbone if args.grad_checkpointing else None,
                              compiled=compiled if args.compile else (), sync_bn=args.sync_bn, synchronised=[teacher])
        teacher.train()  # faithful: also normalises with the statistics of the batch (original main_dino.py)
        with run.started({**pace.derived(device, amp_dtype), 'pictures': len(dataset), 'steps_per_epoch': steps,
                          'n_parameters': sum(p.numel() for p in student.parameters() if p.requires_grad)}):
            pace.log(batches=batches, warmup_epochs=args.warmup_epochs, epochs=args.epochs,
                     images=images_of_epoch(dataset), min_lr=args.min_lr)
            is_fresh = run.position.done < 0 and not run.step
            if is_fresh and has_new_heads:
                log(f'The loss begins at about ln({args.out_dim}) = {math.log(args.out_dim):.2f}')
            if args.accum_iter > 1:
                log(f'--accum-iter {args.accum_iter}: gradients come from {counted(pace.images_per_step, "image")}, '
                    f'but centre and BatchNorm from {pace.images_per_batch} images at a time')
            if is_fresh:
                watch.before_training(teacher, run)
            for epoch in run.rounds(loader):
                stats = train_one_epoch(
                    ddp_student, losses_of(ddp_student, teacher, criterion, temperatures[epoch]), loader,
                    optimizer=optimizer, before_update=schedule.set,
                    clip_grad=updates.clip_of(student, args.clip_grad, freezes=epoch < args.freeze_last_layer),
                    average=lambda done: updates.average_into(teacher, student, curves['momentum'][done - 1]),
                    **run.options(epoch, device, scaler))
                stats = {**{f'train_{name}': value for name, value in stats.items() if name != 'dino'},
                         **{f'train_{name}': sum(values[epoch * steps:(epoch + 1) * steps]) / steps
                            for name, values in curves.items()},
                         'train_teacher_temp': temperatures[epoch], 'train_center_norm': float(criterion.center.norm())}
                is_best = watch.after_epoch(epoch, stats, teacher, run)
                run.save_weights(f'backbone.{args.backbone_format}', model=args.arch, weights={
                    name: value.contiguous() for name, value in teacher.backbone.state_dict().items()})
                # differs: DINO checkpoints - the last checkpoint is kept, too
                is_kept = args.saveckp_freq and (epoch % args.saveckp_freq == 0 or epoch + 1 == args.epochs)
                run.finish(epoch, stats, summary=table_row(stats, monitor.COLUMNS),
                           keep=[f'checkpoint{epoch:04}.pth'] * bool(is_kept) + [files.BEST] * is_best)
    if run.folder is not None:
        print_next_steps(run.folder / CHECKPOINT, args.input_size)
    return stats


def print_next_steps(checkpoint: Path, input_size: int):
    place = words_of({'data_set': 'FOLDER', 'data_path': 'DIR'})
    knn = ['python', '-m', 'dino.knn', *words_of({'pretrained': checkpoint}), *place]
    tune = ['python', 'main.py', *words_of({'finetune': checkpoint, 'input_size': input_size}), *place]
    log(f'Next, evaluate the features, or fine-tune the model with labels:\n  {shlex.join(knn)}\n  {shlex.join(tune)}')


def main(argv: Optional[list] = None) -> dict:
    """Train with a command line (`sys.argv` if None), see `parse_args`; return the metrics of the last epoch."""
    args = parse_args(argv)
    with flags.joined(args) as device:
        return train(args, device)


if __name__ == '__main__':
    run_program(main)
