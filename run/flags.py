"""The flags that trainings share, one function for each group, what is checked of them, and what follows from them.

A program adds those that it has a use for to groups of its parser, so that a flag means and reads the same everywhere.
"""
import argparse
from pathlib import Path
from typing import Iterable, Optional

import torch
from timm.optim import list_optimizers

from run import checkpoints, processes
from run.commandline import COUNT, COUNT_OR_0, FRACTION, NON_NEGATIVE, PATH, POSITIVE, number
from run.folder import check_output_dir
from utils import InputError, similar

AMP_DTYPES = {'fp16': torch.float16, 'bf16': torch.bfloat16, 'off': None}
boolean = argparse.BooleanOptionalAction


# ---------------------------------------------------------------------------------------------------------------------
# Groups; `group` is what parser.add_argument_group returns

def add_run_flags(group):
    group.add_argument('--config', type=PATH, metavar='FILE',
                       help='flags in YAML or JSON, or the args.json of an earlier run; those of the command line win')
    group.add_argument('--output-dir', default='', type=PATH, metavar='DIR',
                       help='where checkpoints and logs go; empty: nothing is written')
    add_device_flag(group)
    group.add_argument('--seed', default=0, type=number(int, 0, 2 ** 32 - 1),
                       help='of weights, data order, augmentation and dropout')
    group.add_argument('--deterministic', action=boolean, default=False,
                       help='refuse operations whose result varies from run to run; slower on GPUs')


def add_device_flag(group):
    group.add_argument('--device', default='auto', help='auto (the first of cuda, mps and cpu that works) or a device')


def add_amp_flag(group, *, default: str = 'fp16 on cuda and off elsewhere'):
    group.add_argument('--amp', choices=list(AMP_DTYPES), help=f'autocast type; {default} if unset')


def add_compile_flags(group):
    group.add_argument('--compile', action=boolean, default=False,
                       help='torch.compile for model, moving average (unless it is in CPU memory) and teacher: a slow '
                            'start, then faster')
    group.add_argument('--compile-mode', choices=['default', 'reduce-overhead', 'max-autotune'], default='default',
                       help='of --compile; the last two use CUDA graphs')


def add_checkpoint_flags(group):
    group.add_argument('--resume', default='', type=PATH, metavar='PATH|URL|auto',
                       help='go on with a training, or evaluate its model; auto: the one in --output-dir, if any')
    group.add_argument('--save-every', default=0, type=COUNT_OR_0, metavar='STEPS',
                       help='steps between two checkpoints within an epoch; 0: at its end only')
    group.add_argument('--stop-after-epochs', default=0, type=COUNT_OR_0, metavar='N',
                       help='do N more epochs, then stop as on SIGTERM: stored, exit code 143; 0: go on to the end')


def add_batch_flags(group, *, spellings: tuple = ('--batch-size',), trains: bool = True):
    group.add_argument(*spellings, dest='batch_size', default=64, type=COUNT, metavar='IMAGES',
                       help='of one process and one pass')
    if trains:
        group.add_argument('--accum-iter', default=1, type=COUNT, metavar='N', help='batches that make one step')


def add_iteration_flags(group, *, iterations: int, every: int):
    """For a training that is counted in them."""
    group.add_argument('--iterations', default=iterations, type=COUNT, metavar='N', help='of the whole training')
    group.add_argument('--every', default=every, type=COUNT, metavar='N', help='iterations between two evaluations')


def add_optimizer_flags(group):
    group.add_argument('--opt', default='adamw', help='name of a timm optimizer')
    group.add_argument('--opt-eps', default=1e-8, type=POSITIVE, metavar='EPS', help='added to denominators')
    group.add_argument('--opt-betas', type=number(float, 0, .99999999), nargs='+', metavar='BETA',
                       help='the optimizer\'s own if unset')
    group.add_argument('--momentum', default=.9, type=FRACTION, help='of SGD and its like')
    group.add_argument('--weight-decay', default=.05, type=NON_NEGATIVE, help='of matrices; vectors are spared')
    group.add_argument('--layer-decay', type=number(float, 0, 1, above=True), metavar='FACTOR',
                       help='learning rate of a layer, as a fraction of the one above it; unset: the same for all')
    group.add_argument('--clip-grad', type=POSITIVE, metavar='NORM', help='largest gradient norm; unset: no clipping')


def add_schedule_flags(group):
    group.add_argument('--sched', default='cosine', choices=['cosine', 'tanh', 'step', 'plateau'],
                       help='course of the learning rate')
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
                       help='the learning rate gets noise from this part of the epochs on, or between two such parts')
    group.add_argument('--lr-noise-pct', default=.67, type=NON_NEGATIVE, help='limit of the noise, as a fraction')
    group.add_argument('--lr-noise-std', default=1., type=NON_NEGATIVE, help='standard deviation of the noise')


def add_data_path_flag(group, *, default: str = '', help: str = 'where the data are'):
    group.add_argument('--data-path', default=default, type=PATH, metavar='DIR', help=help)


def add_loader_flags(group, *, trains: bool = True):
    group.add_argument('--num-workers', default=10, type=COUNT_OR_0, metavar='N',
                       help='processes that load data, at most one for each core; 0: load in the main process')
    if trains:
        group.add_argument('--skip-bad-images', default=0, type=COUNT_OR_0, metavar='N',
                           help='up to N unreadable training images (of each process, since its start) are replaced by '
                           'their neighbours, and reported')
    group.add_argument('--pin-mem', action=boolean, default=True, help='page-locked host memory for cuda')


def add_distributed_flags(group, *, sync_bn: bool = True):
    group.add_argument('--world-size', default=1, type=COUNT, metavar='N',
                       help='number of processes, where the launcher has not set WORLD_SIZE')
    group.add_argument('--dist-timeout', default=10., type=POSITIVE, metavar='MINUTES',
                       help='how long a process waits for the others')
    if sync_bn:
        group.add_argument('--sync-bn', action=boolean, default=True, help='synchronise BatchNorm over several GPUs')
    group.add_argument('--dist-url', default='env://', metavar='URL', help='where the processes meet')


def add_training_flags(parser: argparse.ArgumentParser):
    """All that a training can't do without, in groups: for a program that puts none of its own between them."""
    for title, functions in (('run', (add_run_flags, add_amp_flag, add_checkpoint_flags)),
                             ('data', (add_data_path_flag, add_batch_flags, add_loader_flags)),
                             ('distributed', (add_distributed_flags,))):
        group = parser.add_argument_group(title)
        for add_flags in functions:
            add_flags(group)


# ---------------------------------------------------------------------------------------------------------------------
# What can't work. Each raises InputError.

def check_run_flags(args) -> argparse.Namespace:
    """The flags themselves, if they can work.

    Those of add_run_flags, add_amp_flag, add_checkpoint_flags, and of add_compile_flags if a program has them.
    """
    choose_device(args)
    if getattr(args, 'compile_mode', 'default') != 'default' and not args.compile:
        raise InputError(f'--compile-mode {args.compile_mode}: has no effect without --compile')
    if args.resume not in ('', 'auto') and not checkpoints.is_url(args.resume) and not Path(args.resume).exists():
        raise InputError(f'--resume {args.resume}: no such file')
    if args.resume == 'auto' and not args.output_dir:
        raise InputError('--resume auto: needs --output-dir to look in')
    check_output_dir(args.output_dir)
    return args


def check_optimizer_flags(args):
    """Of add_optimizer_flags."""
    if args.opt.lower().split('_')[-1] not in list_optimizers():
        raise InputError(f'--opt {args.opt}: timm has no such optimizer{similar(args.opt, list_optimizers())}')
    check_pair('--opt-betas', args.opt_betas)


def check_schedule_flags(args):
    """Of add_schedule_flags."""
    if args.lr_noise is not None and args.sched == 'plateau':
        raise InputError('--lr-noise: has no effect with --sched plateau')
    if args.sched == 'plateau' and args.decay_rate >= 1:
        raise InputError(f'--decay-rate {args.decay_rate}: must be less than 1 with --sched plateau')
    if args.lr_noise is not None and len(args.lr_noise) > 2:
        raise InputError(f'--lr-noise {" ".join(map(str, args.lr_noise))}: needs 1 or 2 values')


def check_pair(flag: str, values: Optional[list]):
    if values is not None and len(values) != 2:
        raise InputError(f'{flag} {" ".join(map(str, values))}: needs 2 values')


def refuse_without_effect(args, parser: argparse.ArgumentParser, names: Iterable[str], reason: str):
    """Refuse flags that were given another value than their default; `reason` says why they have no effect."""
    for name in names:
        if getattr(args, name) != parser.get_default(name):
            raise InputError(f'--{name.replace("_", "-")}: has no effect {reason}')


# ---------------------------------------------------------------------------------------------------------------------
# What follows from flags

def choose_device(args) -> torch.device:
    """What --device means here.

    Raises:
        InputError: there is no such device, or it can't do what --amp asks for.
    """
    device = processes.choose_device(args.device)
    if args.amp == 'fp16' and device.type != 'cuda':
        raise InputError(f'--amp fp16: needs cuda, and the device is {device.type}; allowed: bf16, off')
    return device


def amp_dtype(args, device: torch.device) -> Optional[torch.dtype]:
    return AMP_DTYPES[args.amp or ('fp16' if device.type == 'cuda' else 'off')]


def build_scaler(args, device: torch.device) -> torch.amp.GradScaler:
    """What scales the loss under fp16; it does nothing in other precisions."""
    return torch.amp.GradScaler(device.type, enabled=amp_dtype(args, device) == torch.float16)


def images_per_batch(args) -> int:
    """Images of one forward and backward pass, of all processes together."""
    return args.batch_size * processes.get_world_size()


def images_per_step(args) -> int:
    """Images that make one step of the optimizer."""
    return images_per_batch(args) * args.accum_iter
