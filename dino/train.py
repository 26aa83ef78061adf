"""Train XCiT without labels by DINO: a student learns to say of every crop of a picture what its teacher says of it.

The teacher is the student's moving average. The recipe is the original's by default. The files hold the student, the
teacher and all that is needed to go on; backbone.pth is the teacher's backbone alone.
"""
import run.startup  # noqa: F401  first of all

import argparse
import math
from typing import Callable, Dict, List, Optional, Tuple

import timm
import torch

import weights
import xcit
from dino import crops, data, files, monitor, updates
from dino.loss import GLOBAL, DinoLoss
from dino.networks import Head, MultiCrop
from dino.schedules import cosine, teacher_temperatures
from engine import train_one_epoch
from loaders.batches import build_train_loader
from run import checkpoints, flags, parts, processes
from run.commandline import (
    COUNT,
    COUNT_OR_0,
    FRACTION,
    NON_NEGATIVE,
    PATH,
    POSITIVE,
    SWITCH,
    Parser,
    number,
    run_program,
    switch,
)
from run.folder import check_output_dir
from run.position import Epochs
from run.processes import notice
from run.training import Run
from utils import InputError, seed_everything

REFERENCE_BATCH = 256  # images for which --lr is meant
OPTIMIZERS = ('adamw', 'sgd', 'lars')
SGD_MOMENTUM = .9
# What a resume may not change: the schedules, and what is compared with what
FIXED = ('arch', 'epochs', 'warmup_epochs', 'warmup_teacher_temp_epochs', 'lr', 'min_lr', 'weight_decay',
         'weight_decay_end', 'momentum_teacher', 'warmup_teacher_temp', 'teacher_temp', 'freeze_last_layer',
         'clip_grad', 'optimizer', 'local_crops_number', 'norm_last_layer', 'data_set')


# ---------------------------------------------------------------------------------------------------------------------
# Arguments

def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser('python -m dino.train', description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    group = parser.add_argument_group('run')
    flags.add_run_flags(group)
    flags.add_amp_flag(group, default='bf16 on cuda, or fp16 where that has none, and off elsewhere')
    group.add_argument('--use-fp16', dest='amp', type=lambda text: 'fp16' if switch(text) else 'off',
                       metavar='true|false', help='the original\'s flag: true means --amp fp16, false --amp off')
    flags.add_checkpoint_flags(group)
    group.add_argument('--epochs', default=100, type=COUNT, metavar='N', help='of the whole training')
    group.add_argument('--saveckp-freq', default=20, type=COUNT_OR_0, metavar='N',
                       help='epochs between two checkpoints that stay, as checkpoint0020.pth, beside the last; 0: none')
    group.add_argument('--backbone-format', default='pth', choices=['pth', 'safetensors'],
                       help='of the file with the teacher\'s backbone')

    group = parser.add_argument_group('model')
    group.add_argument('--arch', '--model', dest='arch', default='xcit_small_12_p16', metavar='NAME',
                       help='one of the 14 XCiT models')
    group.add_argument('--patch-size', type=COUNT, metavar='PIXELS', help='the model\'s name says it')
    group.add_argument('--drop-path-rate', default=.1, type=number(float, 0, .999), metavar='FRACTION',
                       help='stochastic depth of the student')
    group.add_argument('--out-dim', default=65536, type=COUNT, metavar='N', help='prototypes of the head')
    group.add_argument('--norm-last-layer', default=True, **SWITCH, help='keep all prototypes at length 1')
    group.add_argument('--use-bn-in-head', default=False, **SWITCH, help='BatchNorm in the head')
    group.add_argument('--momentum-teacher', default=.996, type=FRACTION, metavar='FRACTION',
                       help='of the moving average that the teacher is, at the beginning; it rises to 1')
    group.add_argument('--pretrained', default='', type=PATH, metavar='TAG|PATH|URL|hf-hub:NAME',
                       help='initial weights: of student and teacher from a file of DINO, or of their backbones from '
                       'any other')
    group.add_argument('--grad-checkpointing', action=argparse.BooleanOptionalAction, default=False,
                       help='compute activations twice to save memory')
    flags.add_compile_flags(group)

    group = parser.add_argument_group('temperature of the teacher')
    group.add_argument('--warmup-teacher-temp', default=.04, type=POSITIVE, metavar='T', help='at the beginning')
    group.add_argument('--teacher-temp', default=.04, type=POSITIVE, metavar='T',
                       help='after the warm-up; above 0.07 a training can collapse')
    group.add_argument('--warmup-teacher-temp-epochs', default=0, type=COUNT_OR_0, metavar='N', help='of its warm-up')

    group = parser.add_argument_group('optimization')
    flags.add_batch_flags(group, spellings=('--batch-size-per-gpu', '--batch-size'))
    group.add_argument('--optimizer', default='adamw', choices=OPTIMIZERS)
    group.add_argument('--lr', default=.0005, type=POSITIVE,
                       help=f'peak learning rate for {REFERENCE_BATCH} images a step; scaled with the real number')
    group.add_argument('--warmup-epochs', default=10, type=COUNT_OR_0, metavar='N', help='0: no warm-up')
    group.add_argument('--min-lr', default=1e-6, type=NON_NEGATIVE, help='learning rate to end at, not scaled')
    group.add_argument('--weight-decay', default=.04, type=NON_NEGATIVE, help='at the beginning')
    group.add_argument('--weight-decay-end', default=.4, type=NON_NEGATIVE, help='at the end')
    group.add_argument('--clip-grad', default=3., type=NON_NEGATIVE, metavar='NORM',
                       help='largest norm of the gradient of each weight tensor; 0: no clipping')
    group.add_argument('--freeze-last-layer', default=1, type=COUNT_OR_0, metavar='N',
                       help='epochs in which the prototypes stay as they are')

    data.add_crop_flags(parser.add_argument_group('crops'))
    group = parser.add_argument_group('data')
    data.add_data_flags(group)
    flags.add_loader_flags(group)
    monitor.add_flags(parser.add_argument_group('monitoring'))
    group = parser.add_argument_group('distributed')
    flags.add_distributed_flags(group)
    group.add_argument('--local-rank', type=int, help=argparse.SUPPRESS)  # launchers of 2021 gave it
    parser.set_defaults(output_dir='.')
    return parser


def parse_args(argv: Optional[list] = None) -> argparse.Namespace:
    """Parse the command line and refuse what can't work before any work is done."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    args.amp = args.amp or default_amp(args)
    flags.check_run_flags(args)
    patch_size = patch_size_of(args.arch)
    if args.patch_size not in (None, patch_size):
        raise InputError(f'--patch-size {args.patch_size}: {args.arch} has patches of {patch_size} pixels')
    data.check_flags(args, parser)
    data.check_crop_flags(args, patch_size=patch_size)
    for flag in ('warmup_epochs', 'warmup_teacher_temp_epochs'):
        if getattr(args, flag) > args.epochs:
            raise InputError(f'--{flag.replace("_", "-")} {getattr(args, flag)}: is longer than the training (--epochs '
                             f'{args.epochs})')
    if args.pretrained:
        weights.check_exists(args.pretrained, '--pretrained', args.arch)
    if args.preview_crops:
        check_output_dir(args.preview_crops, '--preview-crops')
    monitor.check_flags(args, parser)
    return args


def default_amp(args) -> str:
    """What --amp is where it is not given."""
    if processes.choose_device(args.device).type != 'cuda':
        return 'off'
    return 'bf16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'fp16'


def patch_size_of(arch: str) -> int:
    """The side of a model's patches, in pixels.

    Raises:
        InputError: there is no such model, or it is no XCiT.
    """
    weights.check_model('--arch', arch)
    if '.' in arch:
        name, _, tag = arch.partition('.')
        raise InputError(f'--arch {arch}: a tag means weights, which are given by --pretrained: --arch {name} '
                         f'--pretrained {tag}')
    with torch.device('meta'):
        model = timm.create_model(arch, num_classes=0) if arch.startswith('xcit') else None
    if not isinstance(model, xcit.Xcit):
        raise InputError(f'--arch {arch}: is no XCiT; allowed: {", ".join(xcit.MODELS)}')
    return model.feature_info[0]['reduction']


# ---------------------------------------------------------------------------------------------------------------------
# Builders

def build_network(args, *, drop_path_rate: float, norm_last_layer: bool) -> MultiCrop:
    backbone = timm.create_model(args.arch, num_classes=0, drop_path_rate=drop_path_rate)
    return MultiCrop(backbone, Head(backbone.num_features, args.out_dim, use_bn=args.use_bn_in_head,
                                    norm_last_layer=norm_last_layer))


def build_networks(args, criterion: DinoLoss) -> Tuple[MultiCrop, MultiCrop]:
    """Student and teacher, which begins as a copy of it; or both, and the centre, as --pretrained has them.

    Raises:
        InputError: the weights can't be read, or are of another model.
    """
    seed_everything(args.seed)
    student = build_network(args, drop_path_rate=args.drop_path_rate, norm_last_layer=args.norm_last_layer)
    teacher = build_network(args, drop_path_rate=0., norm_last_layer=True).requires_grad_(False)
    if args.pretrained:
        source = f'--pretrained {args.pretrained}'
        content = weights.read_content(args.pretrained, '--pretrained', args.arch)
        if files.is_full(content):
            try:
                for words in files.load_full(content, student, teacher, criterion):
                    notice(f'{source}: {words}')
            except InputError as error:
                raise InputError(f'{source}: {error}') from None
            notice(f'{source}: student and teacher are taken')
            return student, teacher
        given = weights.extract(content, source, own=weights.names_of(args.arch))
        weights.load(student.backbone, without_head(given))
        notice(f'{source}: is a backbone for student and teacher; their heads are fresh')
    teacher.load_state_dict(student.state_dict())
    return student, teacher


def without_head(given: weights.Weights) -> weights.Weights:
    """Weights without the classifier that came with them."""
    given.tensors = {key: value for key, value in given.tensors.items() if not key.startswith('head.')}
    return given


def build_optimizer(args, student: MultiCrop) -> torch.optim.Optimizer:
    """Its rates are set before each step."""
    groups = updates.parameter_groups(student)
    if args.optimizer == 'adamw':
        return torch.optim.AdamW(groups, lr=0., fused=True)
    if args.optimizer == 'sgd':
        # Not the fused kernel, which fails where only some weights have a momentum yet: --freeze-last-layer
        return torch.optim.SGD(groups, lr=0., momentum=SGD_MOMENTUM, foreach=True)
    return updates.Lars(groups, lr=0.)


class Rates:
    """All that changes with the steps of the optimizer, or with the epochs.

    Args:
        steps: of the optimizer in an epoch.

    Attributes:
        lr, weight_decay, momentum: of the teacher's average; a value for each step.
        temperature: of the teacher, a value for each epoch.
    """

    def __init__(self, args, *, steps: int):
        self.steps = steps
        total = args.epochs * steps
        self.lr = cosine(scaled_lr(args), args.min_lr, steps=total, warmup_steps=args.warmup_epochs * steps)
        self.weight_decay = cosine(args.weight_decay, args.weight_decay_end, steps=total)
        self.momentum = cosine(args.momentum_teacher, 1., steps=total)
        self.temperature = teacher_temperatures(args.warmup_teacher_temp, args.teacher_temp, epochs=args.epochs,
                                                warmup_epochs=args.warmup_teacher_temp_epochs)

    def set(self, optimizer: torch.optim.Optimizer, update: int):
        for group in optimizer.param_groups:
            group['lr'] = self.lr[update]
        optimizer.param_groups[0]['weight_decay'] = self.weight_decay[update]

    def go_on(self, optimizer: torch.optim.Optimizer, position: Epochs, *, accum_iter: int):
        """Set what the last step before this position had."""
        if done := (position.done + 1) * self.steps - (-position.step // accum_iter):
            self.set(optimizer, done - 1)

    def means(self, epoch: int) -> Dict[str, float]:
        """Of the steps of an epoch, under the names that the log has for them."""
        steps = slice(epoch * self.steps, (epoch + 1) * self.steps)
        named = {'lr': self.lr, 'wd': self.weight_decay, 'momentum': self.momentum}
        return {**{f'train_{name}': sum(values[steps]) / self.steps for name, values in named.items()},
                'train_teacher_temp': self.temperature[epoch]}


def scaled_lr(args) -> float:
    return args.lr * flags.images_per_step(args) / REFERENCE_BATCH


# ---------------------------------------------------------------------------------------------------------------------
# The program

def train(args, device: torch.device) -> dict:
    """Train; returns the last epoch's figures."""
    dataset = data.build_dataset(args)
    if args.preview_crops:
        return {'pictures': data.write_preview(args, dataset)}
    watch = monitor.Monitor(args, dataset, device)
    loader = build_train_loader(dataset, args, device, collate_fn=crops.collate)
    criterion = DinoLoss(args.out_dim, GLOBAL + args.local_crops_number).to(device)
    student, teacher = (network.to(device) for network in build_networks(args, criterion))
    for network in (student, teacher):
        xcit.speed_up_training(network.backbone)
    optimizer = build_optimizer(args, student)
    scaler = flags.build_scaler(args, device)
    rates = Rates(args, steps=-(-len(loader) // args.accum_iter))
    run = Run(args, files.NextEpoch(args.epochs), {
        'student': files.Network(student), 'teacher': files.Network(teacher),
        'optimizer': parts.Optimizer(optimizer), 'dino_loss': criterion, 'fp16_scaler': scaler,
        'data': files.DataSet(dataset), 'monitor': watch.seen},
        optional=('fp16_scaler', 'data', 'monitor'),
        fixed=FIXED)
    derived = {'device': str(device), 'amp_dtype': str(flags.amp_dtype(args, device)),
               'processes': processes.get_world_size(), 'global_batch': flags.images_per_step(args),
               'scaled_lr': scaled_lr(args), 'pictures': len(dataset), 'steps_per_epoch': rates.steps,
               'n_parameters': sum(p.numel() for p in student.parameters() if p.requires_grad)}

    with run.locked():
        run.resume()
        if run.is_over():
            return {}
        rates.go_on(optimizer, run.position, accum_iter=args.accum_iter)
        if args.grad_checkpointing:
            student.backbone.set_grad_checkpointing()
        if args.compile:
            for network in (student, teacher):
                network.backbone.compile(mode=args.compile_mode, dynamic=False)
        if args.sync_bn:
            teacher = processes.with_synchronised_bn(teacher, device)
        ddp_student = processes.wrap_for_distributed(student, device, sync_bn=args.sync_bn)
        teacher.train()  # faithful: it normalises with the batch's statistics, too (original main_dino.py)
        with run.started(derived):
            notice_pace(args, steps=rates.steps)
            if run.position.done < 0 and not run.step:
                watch.before_training(teacher, run)
            for epoch in run.rounds(loader):
                stats = train_one_epoch(
                    ddp_student, losses_of(ddp_student, teacher, criterion, rates.temperature[epoch]), loader,
                    optimizer=optimizer, clip_grad=clip_of(args, student, epoch),
                    before_update=lambda update: rates.set(optimizer, update),
                    average=lambda done: updates.average_into(teacher, student, rates.momentum[done - 1]),
                    **{**run.options(epoch, device), 'scaler': scaler})
                stats = {**{f'train_{name}': value for name, value in stats.items() if name != 'dino'},
                         **rates.means(epoch), 'train_center_norm': float(criterion.center.norm())}
                best = watch.after_epoch(epoch, stats, teacher, run)
                save_backbone(args, teacher)
                keep = [*([f'checkpoint{epoch:04}.pth'] if stays(args, epoch) else []), *([files.BEST] * best)]
                run.finish(epoch, stats, best=False, keep=keep, summary=monitor.line(stats))
    if args.output_dir:
        conclude(args)
    return stats


def losses_of(ddp_student: torch.nn.Module, teacher: MultiCrop, criterion: DinoLoss, temperature: float
              ) -> Callable[[List[torch.Tensor]], Dict[str, torch.Tensor]]:
    """A function of the crops of a batch: the loss, and figures beside it."""
    def losses(views: List[torch.Tensor]) -> Dict[str, torch.Tensor]:
        with torch.no_grad():
            taught, features = teacher(views[:GLOBAL])
        answered, _ = ddp_student(views)
        loss, figures = criterion(answered, taught, temperature)
        return {'dino': loss, **figures, 'feature_spread': monitor.spread(features)}
    return losses


def clip_of(args, student: MultiCrop, epoch: int) -> Callable[[list], torch.Tensor]:
    """What is done to gradients before a step, for engine.train_one_epoch."""
    def clip(parameters: list) -> torch.Tensor:
        norm = updates.clip_each(parameters, args.clip_grad)
        if epoch < args.freeze_last_layer:
            updates.freeze_last_layer(student)
        return norm
    return clip


def stays(args, epoch: int) -> bool:
    """Whether the checkpoint of an epoch stays beside later ones."""
    # differs: DINO checkpoints - the last one, too
    return args.saveckp_freq > 0 and (epoch % args.saveckp_freq == 0 or epoch + 1 == args.epochs)


def save_backbone(args, teacher: MultiCrop):
    if args.output_dir and processes.is_main_process():
        path = monitor.folder(args) / f'{files.BACKBONE}.{args.backbone_format}'
        checkpoints.save_checkpoint(files.backbone_state(teacher), path, metadata=checkpoints.metadata_of(
            {'args': {**vars(args), 'model': args.arch}}))


def notice_pace(args, *, steps: int):
    """Say what the learning rate is, and what the flags do not mean."""
    notice(f'Learning rate {scaled_lr(args):.3g} at its peak: --lr {args.lr:g} x {flags.images_per_step(args)} images '
           f'a step / {REFERENCE_BATCH}; an epoch has {steps} steps, the warm-up {steps * args.warmup_epochs}')
    notice(f'The loss begins at about ln({args.out_dim}) = {math.log(args.out_dim):.2f}')
    if args.accum_iter > 1:
        notice(f'--accum-iter {args.accum_iter}: gradients are of {flags.images_per_step(args)} images, but the centre '
               f'and BatchNorm see {flags.images_per_batch(args)} at a time, as without it')


def conclude(args):
    checkpoint = monitor.folder(args) / 'checkpoint.pth'
    notice(f'Next, see what the features are worth, or fine-tune them with labels:\n'
           f'  python -m dino.knn --pretrained {checkpoint} --data-set FOLDER --data-path DIR\n'
           f'  python main.py --finetune {checkpoint} --input-size {args.input_size} --data-set FOLDER --data-path DIR')


def main(argv: Optional[list] = None) -> dict:
    """Train with a command line (`sys.argv` if None), given as a list of words; returns the last epoch's figures.

    Raises:
        InputError: the arguments, or the data or weights they name, can't be used.
    """
    args = parse_args(argv)
    with processes.joined(args) as device:
        return train(args, device)


if __name__ == '__main__':
    run_program(main)
