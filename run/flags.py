"""Flags that training programs share: one function per group, so that a flag has one meaning and help; checks.

Functions below the programs do not read flags: the last section converts flags to values.
"""
import argparse
from pathlib import Path
from typing import Any, ContextManager, Iterable, Optional

import torch
from timm.optim import list_optimizers, optimizer_kwargs
from timm.scheduler.scheduler_factory import scheduler_kwargs

from run import checkpoints, devices, launch, session
from run.commandline import COUNT, COUNT_OR_0, FRACTION, NON_NEGATIVE, PATH, POSITIVE, Parser, number
from run.folder import RUN_FILES, check_output_dir
from run.output import log
from run.pace import Pace
from run.position import Iterations
from run.resume import check_is_free_for, flags_of_run
from run.settings import Loading, MostPixels
from utils import InputError, counted, dashed, similar

WEIGHTS = 'TAG|PATH|URL|hf-hub:NAME'
BATCH_SIZE = 64  # default of --batch-size
boolean = argparse.BooleanOptionalAction


# ---------------------------------------------------------------------------------------------------------------------
# Groups; `group` is the result of parser.add_argument_group

def add_run_group(parser: argparse.ArgumentParser, *, amp_default: str = 'fp16 on cuda and off elsewhere'):
    """Add the group `run` of a training program, and return it for the program's own flags."""
    group = parser.add_argument_group('run')
    add_run_flags(group)
    add_amp_flag(group, default=amp_default)
    add_checkpoint_flags(group)
    return group


def add_run_flags(group):
    group.add_argument('--config', type=PATH, metavar='FILE',
                       help='flags in YAML or JSON, or the args.json of an earlier run; the command line has priority')
    group.add_argument('--output-dir', default='', type=PATH, metavar='DIR',
                       help='folder for checkpoints and logs; empty: nothing is written')
    add_device_flag(group)
    group.add_argument('--seed', default=0, type=number(int, 0, 2 ** 32 - 1),
                       help='seed of weights, data order, augmentation and dropout')
    group.add_argument('--deterministic', action=boolean, default=False,
                       help='deterministic operations only (slower on GPUs); others end the program')


def add_device_flag(group):
    group.add_argument('--device', default='auto', help='device; auto: the first of cuda, mps and cpu that works')
    group.add_argument('--threads', type=COUNT, metavar='N',
                       help='threads on a CPU; if unset, OMP_NUM_THREADS, or the cores that other programs leave')


def add_amp_flag(group, *, default: str = 'fp16 on cuda and off elsewhere'):
    group.add_argument('--amp', choices=list(devices.AMP_DTYPES), help=f'autocast dtype; {default} if unset')


def add_compile_flags(group):
    group.add_argument('--compile', action=boolean, default=False,
                       help='torch.compile for the networks of a run: slow start, then faster')
    group.add_argument('--compile-mode', choices=['default', 'reduce-overhead', 'max-autotune'], default='default',
                       help='mode of torch.compile; the last two use CUDA graphs')


def add_grad_checkpointing_flag(group):
    group.add_argument('--grad-checkpointing', action=boolean, default=False,
                       help='gradient checkpointing: activations are computed twice to save memory')


def add_checkpoint_flags(group):
    group.add_argument('--resume', default='', type=PATH, metavar='PATH|URL|auto',
                       help='checkpoint to resume or evaluate; auto: the newest in --output-dir, if any')
    group.add_argument('--save-every', default=0, type=COUNT_OR_0, metavar='STEPS',
                       help='steps between two checkpoints within an epoch; 0: only at the end of an epoch')
    group.add_argument('--log-every', default=100, type=COUNT_OR_0, metavar='STEPS',
                       help='steps between two points of TensorBoard within an epoch; 0: none')
    group.add_argument('--stop-after-epochs', default=0, type=COUNT_OR_0, metavar='N',
                       help='maximum number of epochs of this process; then exit code 143; 0: no limit')


def add_epochs_flag(group, *, default: int):
    group.add_argument('--epochs', default=default, type=COUNT, metavar='N', help='epochs of the whole run')


def add_model_flag(group, *spellings: str, default: Optional[str] = None, dest: str = 'model'):
    group.add_argument(*spellings, '--model', dest=dest, default=default, metavar='NAME',
                       help='name of one of the 14 XCiT models, or of a timm model; if unset, as named in the weights')


def add_batch_flags(group, *, spellings: tuple = ('--batch-size',), trains: bool = True):
    group.add_argument(*spellings, dest='batch_size', default=BATCH_SIZE, type=COUNT, metavar='IMAGES',
                       help='images per process and forward pass')
    if trains:
        group.add_argument('--accum-iter', default=1, type=COUNT, metavar='N', help='batches per optimizer step')


def add_iteration_flags(group, *, iterations: int, every: int):
    group.add_argument('--iterations', default=iterations, type=COUNT, metavar='N', help='iterations of the whole run')
    group.add_argument('--every', default=every, type=COUNT, metavar='N', help='iterations between two evaluations')


def add_optimizer_flags(group):
    group.add_argument('--opt', default='adamw', help='name of a timm optimizer')
    group.add_argument('--opt-eps', default=1e-8, type=POSITIVE, metavar='EPS', help='epsilon added to denominators')
    group.add_argument('--opt-betas', type=number(float, 0, .99999999), nargs='+', metavar='BETA',
                       help='betas of Adam and its variants; the optimizer\'s own if unset')
    group.add_argument('--momentum', default=.9, type=FRACTION, help='momentum of SGD and its variants')
    group.add_argument('--weight-decay', default=.05, type=NON_NEGATIVE, help='weight decay of matrices; 0 for vectors')
    group.add_argument('--layer-decay', type=number(float, 0, 1, above=True), metavar='FACTOR',
                       help='learning-rate ratio of a layer to the next; unset: 1')
    group.add_argument('--clip-grad', type=POSITIVE, metavar='NORM', help='maximum gradient norm; unset: no clipping')


def add_schedule_flags(group):
    group.add_argument('--sched', default='cosine', choices=['cosine', 'tanh', 'step', 'plateau'],
                       help='schedule of the learning rate')
    group.add_argument('--warmup-lr', default=1e-6, type=NON_NEGATIVE, help='initial learning rate, not scaled')
    group.add_argument('--min-lr', default=1e-5, type=NON_NEGATIVE, help='final learning rate, not scaled')
    group.add_argument('--warmup-epochs', default=5, type=COUNT_OR_0, metavar='N', help='epochs of warm-up; 0: none')
    group.add_argument('--decay-epochs', default=30, type=POSITIVE, metavar='N',
                       help='epochs between two decays of --sched step')
    group.add_argument('--decay-rate', '--dr', default=.1, type=POSITIVE,
                       help='factor of each decay of --sched step and plateau')
    group.add_argument('--patience-epochs', default=10, type=COUNT_OR_0, metavar='N',
                       help='epochs without improvement before --sched plateau decays')
    group.add_argument('--cooldown-epochs', default=10, type=COUNT_OR_0, metavar='N',
                       help='epochs after a decay in which --sched plateau does not count')
    group.add_argument('--lr-noise', type=FRACTION, nargs='+', metavar='FRACTION',
                       help='start, or start and end, of learning-rate noise, as fractions of the run')
    group.add_argument('--lr-noise-pct', default=.67, type=NON_NEGATIVE, help='limit of the noise, as a fraction')
    group.add_argument('--lr-noise-std', default=1., type=NON_NEGATIVE, help='standard deviation of the noise')


def add_data_path_flag(group, *, default: str = '', help: str = 'folder of the data'):
    group.add_argument('--data-path', default=default, type=PATH, metavar='DIR', help=help)


def add_loader_flags(group, *, trains: bool = True):
    add_workers_flag(group)
    add_pixels_flag(group)
    if trains:
        group.add_argument('--skip-bad-images', default=0, type=COUNT_OR_0, metavar='N',
                           help='maximum of unreadable training images that are reported and replaced, per process')
    group.add_argument('--pin-mem', action=boolean, default=True, help='page-locked host memory for cuda')


def add_pixels_flag(group):
    group.add_argument('--max-pixels', default=MostPixels.DEFAULT, type=COUNT, metavar='N',
                       help='maximum number of pixels of a picture; a larger picture is unreadable')


def add_workers_flag(group):
    group.add_argument('--num-workers', default=10, type=COUNT_OR_0, metavar='N',
                       help='loading workers, at most one per core; 0: load in the main process')


def add_distributed_flags(group, *, sync_bn: bool = True):
    group.add_argument('--world-size', default=1, type=COUNT, metavar='N',
                       help='number of processes, if the launcher does not set WORLD_SIZE')
    group.add_argument('--dist-timeout', default=10., type=POSITIVE, metavar='MINUTES',
                       help='timeout of a process that waits for the others')
    if sync_bn:
        group.add_argument('--sync-bn', action=boolean, default=True, help='BatchNorm synchronised over several GPUs')
    group.add_argument('--dist-url', default='env://', metavar='URL', help='address of the rendezvous of the processes')


# ---------------------------------------------------------------------------------------------------------------------
# Checks; each raises InputError

def check_run_flags(args, *, writes: Iterable[str] = RUN_FILES) -> argparse.Namespace:
    """Check the flags of add_run_group, and return them; `writes`: patterns of the files written to --output-dir."""
    choose_device(args)
    if args.resume not in ('', 'auto') and not checkpoints.is_url(args.resume) and not Path(args.resume).exists():
        raise InputError(f'--resume {args.resume}: no such file')
    if args.resume == 'auto' and not args.output_dir:
        raise InputError('--resume auto: needs --output-dir to search')
    check_output_dir(args.output_dir)
    if args.output_dir:
        check_is_free_for(args.resume, args.output_dir, writes)
    return args


def check_compile_flags(args):
    if args.compile_mode != 'default' and not args.compile:
        raise InputError(f'--compile-mode {args.compile_mode}: has no effect without --compile')


def check_optimizer_flags(args):
    if args.opt.lower().split('_')[-1] not in list_optimizers():
        raise InputError(f'--opt {args.opt}: timm has no such optimizer{similar(args.opt, list_optimizers())}')
    check_pair('--opt-betas', args.opt_betas)


def check_schedule_flags(args):
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
    """Refuse flags that differ from their default but have no effect for a reason, e.g. 'without --compile'."""
    for name in names:
        if vars(args)[name] != parser.get_default(name):
            raise InputError(f'{dashed(name)}: has no effect {reason}')


# ---------------------------------------------------------------------------------------------------------------------
# Defaults that other flags rule out; `argv`: command line, None: sys.argv

def fit_default(args, parser: Parser, argv: Optional[list], name: str, fitting: Any, reason: str):
    """Replace the default of a flag by a fitting value, and log it; a flag that is given stays.

    Args:
        name: destination of the flag.
        fitting: value for a new run; None: the default fits. A resumed run keeps the value in its args.json.
        reason: flags that rule out the default.
    """
    if not parser.is_default(argv, name):
        return
    stored = flags_of_run(args.resume, args.output_dir).get(name)
    value = fitting if stored is None else stored
    default = vars(args)[name]
    if value in (None, default):
        return
    vars(args)[name] = value
    if not launch.environment_rank():
        why = f'because the default, {default}, does not fit {reason}' if stored is None else 'as before the resume'
        log(f'{dashed(name)} {value} is used, {why}')


def filled_batch(batch_size: int, images: int, *, even: bool = False) -> int:
    """Return the images of a batch that the `images` of an epoch on this process can fill; log a smaller batch."""
    smaller = images - images % 2 if even else images
    if not 0 < smaller < batch_size:
        return batch_size
    log(f'--batch-size {batch_size}: an epoch has {counted(images, "image")} per process; using batches of {smaller}')
    return smaller


def fit_warmup(args, parser: Parser, argv: Optional[list]):
    """Fit the default of --warmup-epochs to a run that the warm-up would fill: a tenth of the run."""
    fitting = max(1, args.epochs // 10) if args.epochs > 1 else 0
    fit_default(args, parser, argv, 'warmup_epochs', None if args.warmup_epochs < args.epochs else fitting,
                f'--epochs {args.epochs}')


def fit_schedule(args, parser: Parser, argv: Optional[list]):
    """Fit the defaults of add_schedule_flags to a short run, in which the learning rate would never change."""
    fit_warmup(args, parser, argv)
    part = max(1, args.epochs // 4)
    for sched, name in (('step', 'decay_epochs'), ('plateau', 'patience_epochs'), ('plateau', 'cooldown_epochs')):
        if args.sched == sched:
            fit_default(args, parser, argv, name, None if vars(args)[name] < args.epochs else part,
                        f'--sched {sched} with --epochs {args.epochs}')


# ---------------------------------------------------------------------------------------------------------------------
# Values

def choose_device(args) -> torch.device:
    """Return the device of --device; raise InputError if there is no such device, or if --amp needs another device."""
    device = devices.choose_device(args.device)
    if args.amp == 'fp16' and device.type != 'cuda':
        raise InputError(f'--amp fp16: needs cuda, not {device.type}; allowed: bf16, off')
    return device


def amp_dtype(args, device: torch.device) -> Optional[torch.dtype]:
    """Return the autocast dtype; None: full precision."""
    return devices.amp_dtype_of(args.amp, device)


def build_scaler(args, device: torch.device) -> torch.amp.GradScaler:
    """Build the scaler of the loss under fp16; it does nothing with other dtypes."""
    return torch.amp.GradScaler(device.type, enabled=amp_dtype(args, device) == torch.float16)


def joined(args, *, trains: bool = True) -> ContextManager[torch.device]:
    return session.joined(args.device, seed=args.seed, deterministic=args.deterministic, world_size=args.world_size,
                          dist_url=args.dist_url, timeout_minutes=args.dist_timeout, trains=trains,
                          threads=args.threads)


def loading(args, device: torch.device) -> Loading:
    return Loading(args.batch_size, device, num_workers=args.num_workers, pin_memory=args.pin_mem, seed=args.seed,
                   accum_iter=args.accum_iter, skip_bad_images=args.skip_bad_images)


def iterations(args) -> Iterations:
    return Iterations(args.iterations, every=args.every, accum_iter=args.accum_iter)


def pace(args, *, reference_batch: Optional[int]) -> Pace:
    return Pace(args.lr, args.batch_size, args.accum_iter, reference_batch)


def optimizer_options(args) -> dict:
    """Return the flags of add_optimizer_flags as options of optimization.build_optimizer; `lr` is not among them."""
    return {name: value for name, value in optimizer_kwargs(args).items() if name != 'lr'}


def schedule_options(args) -> dict:
    """Return the flags of add_schedule_flags, --epochs and --seed as options of schedules.by_epoch."""
    return scheduler_kwargs(args)
