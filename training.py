"""What a training holds, how it is stored, and how it goes on."""
import contextlib
import dataclasses
import os
import signal
import threading
from pathlib import Path
from typing import Optional, Tuple

import torch
from timm.utils import ModelEmaV3

import checkpoints
import utils
import weights
from utils import InputError, notice

CHECKPOINT, PREVIOUS, BEST = 'checkpoint.pth', 'checkpoint_previous.pth', 'best_model.pth'
DAMAGED = 'checkpoint_damaged.pth'
NOT_SHARED = '--output-dir must be on a file system that all nodes share'


class WarmupPlateau:
    """Linear warm-up, then a decay whenever the accuracy stops rising.

    timm's own can't be stored, ignores the cooldown and without warm-up stays at --warmup-lr.
    """

    def __init__(self, args, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self.warmup_epochs, self.warmup_lr = args.warmup_epochs, args.warmup_lr
        for group in optimizer.param_groups:  # timm's other schedules apply --layer-decay themselves
            group['lr'] *= group.get('lr_scale', 1.)
        self.base_lrs = [group['lr'] for group in optimizer.param_groups]
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, mode='max', factor=args.decay_rate, patience=args.patience_epochs,
            cooldown=args.cooldown_epochs, min_lr=args.min_lr)
        if self.warmup_epochs:
            self._warm_up(0)

    def _warm_up(self, epoch: int):
        for group, base_lr in zip(self.optimizer.param_groups, self.base_lrs):
            group['lr'] = self.warmup_lr + (base_lr - self.warmup_lr) * epoch / self.warmup_epochs

    def step(self, epoch: int, accuracy: float):
        if self.warmup_epochs and epoch <= self.warmup_epochs:
            self._warm_up(epoch)
        else:
            self.plateau.step(accuracy)

    def state_dict(self) -> dict:
        return self.plateau.state_dict()

    def load_state_dict(self, state: dict):
        self.plateau.load_state_dict(state)


def images_per_batch(args) -> int:
    """Images of one forward and backward pass, of all processes together."""
    return args.batch_size * utils.get_world_size()


@dataclasses.dataclass
class Training:
    """Everything that changes while a model is trained."""
    model: torch.nn.Module  # without wrappers
    model_ema: Optional[ModelEmaV3]
    optimizer: torch.optim.Optimizer
    scheduler: object
    scaler: torch.amp.GradScaler
    epoch: int = -1  # the last finished one
    classes: Optional[list] = None  # their names
    step: int = 0  # batches done of the next one
    sums: dict = dataclasses.field(default_factory=lambda: {'loss': 0., 'grad_norm': 0.})  # this process's, over those
    accuracy: dict = dataclasses.field(default_factory=lambda: {'last': 0., 'best': 0., 'best_ema': 0.})

    def state_dict(self, args) -> dict:
        """What a checkpoint holds; all processes must ask for it together."""
        totals = utils.sum_over_processes(self.sums)
        return {
            'model': self.model.state_dict(),
            'model_ema': self.model_ema.module.state_dict() if self.model_ema else None,
            'optimizer': self.optimizer.state_dict(),
            'lr_scheduler': self.scheduler.state_dict(),
            'scaler': self.scaler.state_dict(),
            'epoch': self.epoch,
            'step': self.step,
            'averages': {k: total / max(self.step, 1) / utils.get_world_size() for k, total in totals.items()},
            'batch': images_per_batch(args),
            'accuracy': self.accuracy,
            'classes': self.classes,
            'args': vars(args),
        }

    def load(self, checkpoint: dict, source: str, args):
        """Go on where `checkpoint` was stored; `source` is what to call it in messages."""
        plateau = isinstance(self.scheduler, WarmupPlateau)  # the other schedules are functions of the epoch
        weights.load(self.model, weights.extract(checkpoint, source))
        lacking = [key for key in ['optimizer', 'epoch'] + ['lr_scheduler'] * plateau if key not in checkpoint]
        if lacking:
            raise InputError(f'{source}: has no {" and no ".join(lacking)} to go on with; to start from its weights, '
                             f'use --pretrained')
        if self.classes and checkpoint.get('classes') not in (None, self.classes):
            raise InputError(f'{source}: was trained on other classes ({utils.abridge(checkpoint["classes"], 4)}), or '
                             f'in another order, than these ({utils.abridge(self.classes, 4)})')
        self.load_optimizer(checkpoint, source, args)
        if plateau:
            self.scheduler.load_state_dict(checkpoint['lr_scheduler'])
        if checkpoint.get('scaler') and self.scaler.is_enabled():
            self.scaler.load_state_dict(checkpoint['scaler'])
        if self.model_ema is not None:
            average = weights.extract(checkpoint, source, use_ema=bool(checkpoint.get('model_ema')))
            self.model_ema.module.load_state_dict(weights.named_for(self.model, average))
        self.epoch = checkpoint['epoch']
        self.accuracy.update(checkpoint.get('accuracy', {}))
        self.step = checkpoint.get('step', 0)
        before = checkpoint.get('batch', images_per_batch(args)), trained_with(checkpoint).get('accum_iter')
        if self.step and before != (images_per_batch(args), args.accum_iter):
            notice(f'{source}: was stored in the middle of an epoch with {before[0]} images a batch and --accum-iter '
                   f'{before[1]}, now it is {images_per_batch(args)} and {args.accum_iter}: goes on with about the '
                   f'same images')
            self.step = self.step * before[0] // images_per_batch(args) // args.accum_iter * args.accum_iter
        self.sums = {k: average * self.step for k, average in checkpoint.get('averages', self.sums).items()}
        refuse_disagreement(self, source)

    def load_optimizer(self, checkpoint: dict, source: str, args):
        """Take over the optimizer's state; its options stay those of this command line."""
        opt = trained_with(checkpoint).get('opt', args.opt)
        if opt != args.opt:
            raise InputError(f'{source}: was trained with --opt {opt}, not {args.opt}')
        flags = {'weight_decay', 'betas', 'eps', 'momentum', 'lr_scale'}
        if not isinstance(self.scheduler, WarmupPlateau):  # whose rate depends on what happened
            flags.add('lr')
        options = [{k: v for k, v in group.items() if k in flags} for group in self.optimizer.param_groups]
        state = checkpoint['optimizer']
        try:
            # Before loading, which puts the state where a fused step looks for it.
            groups = [{**group, **{k: own[k] for k in ('fused', 'foreach') if k in own}}
                      for group, own in zip(state['param_groups'], self.optimizer.param_groups)]
            groups += state['param_groups'][len(groups):]
            self.optimizer.load_state_dict({**state, 'param_groups': groups})
        except (ValueError, KeyError) as error:
            raise InputError(f'{source}: its optimizer is another one ({utils.first_line(error)})') from None
        for group, own in zip(self.optimizer.param_groups, options):
            group.update(own)


def trained_with(checkpoint: dict) -> dict:
    """The flags of the training that wrote a checkpoint; empty if it does not say."""
    args = checkpoint.get('args', {})
    return args if isinstance(args, dict) else vars(args)


def refuse_disagreement(run: Training, source: str):
    """Raises InputError where the processes have read different checkpoints."""
    place = run.epoch * 2 ** 32 + run.step
    if utils.max_over_processes(place) != -utils.max_over_processes(-place):
        raise InputError(f'{source}: is not the same file for all processes: {NOT_SHARED}')


def load_for_resume(args) -> Tuple[Optional[dict], str]:
    """The checkpoint that --resume means (None: a fresh start), and what to call it in messages.

    Raises:
        InputError: it can't be read; with `auto`, none that is there can be.
    """
    if args.resume != 'auto':
        checkpoint = checkpoints.load_checkpoint(args.resume, '--resume') if args.resume else None
        return checkpoint, f'--resume {args.resume}'
    path = utils.on_main_process(lambda: newest_intact(args))
    if not path:
        notice(f'--resume auto: no {CHECKPOINT} in {args.output_dir}, a fresh start')
        return None, ''
    if utils.max_over_processes(not Path(path).exists()):
        raise InputError(f'--resume auto: {path} is not there for all processes: {NOT_SHARED}')
    return checkpoints.load_checkpoint(path, '--resume auto:'), f'--resume auto: {path}'


def newest_intact(args) -> str:
    """The path of the newest checkpoint in --output-dir that can be read; '' if there is none at all.

    Raises:
        InputError: there are some, but none can be read.
    """
    candidates = [path for name in (CHECKPOINT, PREVIOUS) if (path := Path(args.output_dir, name)).exists()]
    for path in candidates:
        try:
            checkpoints.load_checkpoint(path, '--resume auto:')
        except InputError as error:
            if path == candidates[-1]:
                raise
            notice(f'{error}; trying the one before')
            continue
        if path != candidates[0] and not args.eval:  # or the next save would put the damaged one in its place
            with contextlib.suppress(OSError):
                os.replace(candidates[0], Path(args.output_dir, DAMAGED))
        return str(path)
    return ''


def copy_to_host(state):
    """A copy of nested dicts, lists and tuples whose tensors are in the host's memory, and change no more."""
    if isinstance(state, torch.Tensor):
        return state.detach().to('cpu', copy=True)
    if isinstance(state, dict):
        return {key: copy_to_host(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(copy_to_host(value) for value in state)
    return state


class Keeper:
    """Stores a training between two steps: when asked to stop, at the end of an epoch, and every --save-every steps.

    The last of these is done beside the training, which waits only for a copy of its state in the host's memory.

    Args:
        run: what to store.
        stop: the signals that ask to stop.
    """

    def __init__(self, args, run: Training, stop: utils.StopRequest):
        self.args, self.run, self.stop = args, run, stop
        self.writing: Optional[threading.Thread] = None
        self.error: Optional[Exception] = None

    def save(self, *, beside: bool = False):
        """Store the training; `beside`: come back before it is written."""
        if not self.args.output_dir:
            return
        state = self.run.state_dict(self.args)
        self.wait()
        if not beside:
            self.write(state)
        elif utils.is_main_process():
            self.writing = threading.Thread(target=self.note_error, args=(copy_to_host(state),))
            self.writing.start()

    def write(self, state: dict):
        folder = Path(self.args.output_dir)
        checkpoints.save_checkpoint(state, folder / CHECKPOINT, keep=folder / PREVIOUS)

    def note_error(self, state: dict):
        try:
            self.write(state)
        except Exception as error:  # for wait() to raise where the training can be stopped
            self.error = error

    def join(self):
        """Come back when the last checkpoint is written, or has failed."""
        if self.writing is not None:
            self.writing.join()
            self.writing = None

    def wait(self):
        """The same; raises what has kept it from being written."""
        self.join()
        if self.error is not None:
            raise self.error

    def after_update(self, step: int, sums: dict):
        self.run.step, self.run.sums = step, sums
        update = -(-step // self.args.accum_iter)
        self.look_up(save=bool(self.args.save_every) and update % self.args.save_every == 0)

    def look_up(self, *, save: bool = False):
        """Store the training if asked to; stop, stored, if any process got a signal."""
        signum = self.stop.agreed()
        if save or signum:
            self.save(beside=not signum)
        if signum:
            utils.wait_for_all()  # a launcher may kill what is left when the first process ends
            self.interrupt(signum)

    def interrupt(self, signum: int):
        where = f'epoch {self.run.epoch + 1}, step {self.run.step}'
        folder = self.args.output_dir
        kept = f'stored in {folder}, to go on: --resume auto' if folder else 'nothing is stored without --output-dir'
        raise utils.Interrupted(signum, f'{signal.Signals(signum).name}: stopped at {where}; {kept}')


def goes_on_in_place(args) -> bool:
    """Whether --resume continues the run that is in --output-dir."""
    return args.resume == 'auto' or (
        bool(args.resume) and not checkpoints.is_url(args.resume)
        and Path(args.resume).resolve().parent == Path(args.output_dir).resolve())
