"""A training as it is stored: named parts, where it is, and how it goes on after whatever interrupted it.

The program keeps its loop:

    run = Run(args, Epochs(args.epochs), {'model': model, 'optimizer': parts.Optimizer(optimizer)})
    with run.locked():
        run.resume()
        if run.is_over():
            return
        with run.started(derived):
            for epoch in run.rounds(loader):
                stats = engine.train_one_epoch(model, losses, loader, ..., **run.options(epoch, device))
                run.finish(epoch, stats, best=..., summary=...)
"""
import contextlib
import datetime
import os
import signal
import threading
import time
from pathlib import Path
from typing import Iterable, Iterator, Optional, Union

import torch

from run import checkpoints
from run.descriptions import trained_with
from run.flags import amp_dtype, images_per_batch, images_per_step
from run.folder import BEST, CHECKPOINT, PREVIOUS, DirectoryLock, set_aside
from run.logs import EpochLog, environment
from run.position import Epochs, Iterations
from run.processes import get_world_size, is_main_process, max_over_processes, notice, sum_over_processes, wait_for_all
from run.progress import Table
from run.resume import NOT_SHARED, goes_on_in_place, load_for_resume
from run.signals import StopRequest
from utils import InputError, Interrupted, first_line, write_json


class Run:
    """A training, with everything that has to be stored for it to go on as if nothing had interrupted it.

    Args:
        args: its flags, with those of run.flags.add_run_flags and add_checkpoint_flags, and `batch_size`.
        position: what it is counted in.
        parts: by name, which is its key in a checkpoint: anything with `state_dict` and `load_state_dict`, or None
            where a training has no such part. They are loaded in this order.
        optional: the parts that a checkpoint may lack; the others are needed to go on.
        fixed: flags whose value may not change when a training goes on.

    Attributes:
        step: batches done of the round that is not finished.
        sums: this process's totals over those batches, by name.
    """

    def __init__(self, args, position: Union[Epochs, Iterations], parts: dict, *, optional: tuple = (),
                 fixed: tuple = ()):
        self.args, self.position, self.parts, self.optional, self.fixed = args, position, parts, optional, fixed
        if taken := parts.keys() & {*position.state_dict(), 'averages', 'batch', 'args'}:
            raise ValueError(f'{", ".join(sorted(taken))}: a checkpoint has this key already; call the part otherwise')
        self.sums, self.log, self.table, self.stop = {}, None, Table(), StopRequest()
        self.folder = Path(args.output_dir) if args.output_dir else None
        self.untested = False  # whether the newest checkpoint is that of save_untested
        self.writing: Optional[threading.Thread] = None
        self.error: Optional[Exception] = None

    @property
    def step(self) -> int:
        return self.position.step

    # -----------------------------------------------------------------------------------------------------------------
    # Order of things

    def locked(self) -> DirectoryLock:
        """A context in which no other run can write to --output-dir.

        Raises:
            InputError: another one does.
        """
        return DirectoryLock(self.folder)

    def resume(self) -> set:
        """Go on with what --resume names, if anything; under the lock, so that what is read now stays the newest.

        Returns:
            The optional parts that the checkpoint lacks.
        """
        checkpoint, source = load_for_resume(self.args)
        if checkpoint is None:
            return set()
        lacking = self.load(checkpoint, source)
        notice(f'{source}: goes on at {self.position}')
        return lacking

    def is_over(self) -> bool:
        """Whether nothing is left to do; says so."""
        if not list(self.position.rounds_left()):
            notice(f'--{self.position.flag} {getattr(self.args, self.position.flag)}: nothing is left to do')
            return True
        return False

    @contextlib.contextmanager
    def under_way(self, derived: dict) -> Iterator['Run']:
        """A context for the loop of a program that has nothing to do between locking, resuming and starting."""
        with self.locked():
            self.resume()
            with contextlib.nullcontext() if self.is_over() else self.started(derived):
                yield self

    @contextlib.contextmanager
    def started(self, derived: dict) -> Iterator['Run']:
        """A context for the loop: its log is open, and a signal ends it between two steps, stored.

        Before this, nothing but the lock has been written.

        Args:
            derived: what follows from the flags and the data, for args.json.
        """
        self.begun, self.first = time.monotonic(), self.position.done + 1
        self.log = self.open_log(derived)
        with self.stop:
            try:
                yield self
            finally:
                self.join()

    def rounds(self, loader) -> Iterator[int]:
        """The numbers of the epochs, or rounds of iterations, that are left; each has to be finished.

        Args:
            loader: of `loaders.batches`; it is set to the position before each.
        """
        for number in self.position.rounds_left():
            loader.set_position(number, self.step)
            yield number

    def options(self, number: int, device: torch.device) -> dict:
        """What engine.train_one_epoch has to know of the position and of the shared flags; and the part `scaler`."""
        return dict(device=device, amp_dtype=amp_dtype(self.args, device), epoch=number, seed=self.args.seed,
                    scaler=self.parts.get('scaler'),
                    accum_iter=self.args.accum_iter, header=self.position.name(number),
                    first_update=self.position.updates_before(number), first_step=self.step, sums=self.sums,
                    after_update=self.after_update)

    def finish(self, number: int, stats: dict, *, best: bool, summary: dict, keep: Iterable[str] = ()):
        """A round is done and evaluated: log it, store it, and leave if that is asked for.

        Args:
            stats: for the log.
            best: whether this is the best so far, and to be kept as best_model.pth; the same on all processes.
            summary: of the round, for the line that is printed: texts by the names of their columns.
            keep: names of files in which this state stays, whatever comes later; the same on all processes.

        Raises:
            Interrupted: --stop-after-epochs.
        """
        self.position.finish(number)
        self.sums = dict.fromkeys(self.sums, 0.)
        stats[self.position.unit] = self.position.count()
        # In this order a crash between two of these lines only means that the epoch is done again.
        if self.log is not None:
            self.log.write(stats)
        names = [*([BEST] if best else []), *keep]
        if names and self.folder is not None:
            checkpoints.save_checkpoint(self.state_dict(), self.folder / names[0])
            for name in names[1:]:
                checkpoints.copy_as(self.folder / names[0], self.folder / name)
        self.save()
        spent, done = time.monotonic() - self.begun, number + 1 - self.first
        left = spent / done * (self.position.total - number - 1)
        self.table.add({self.position.unit: str(stats[self.position.unit]), **summary,
                        'time left': str(datetime.timedelta(seconds=int(left)))})
        if number + 1 == self.position.total:
            notice(f'Training time {datetime.timedelta(seconds=int(spent))}')
            if self.log is not None:
                self.log.close()
        elif done == self.args.stop_after_epochs:
            wait_for_all()
            self.interrupt(signal.SIGTERM, f'--stop-after-epochs {done}')

    # -----------------------------------------------------------------------------------------------------------------
    # Storing

    def state_dict(self) -> dict:
        """What a checkpoint holds; all processes must ask for it together."""
        totals = sum_over_processes(self.sums) if self.sums else {}
        return {
            **{name: None if part is None else part.state_dict() for name, part in self.parts.items()},
            **self.position.state_dict(),
            'averages': {k: total / max(self.step, 1) / get_world_size() for k, total in totals.items()},
            'batch': images_per_batch(self.args),
            'args': vars(self.args),
        }

    def save_untested(self):
        """Store the training before a round that is done is evaluated, which may fail; the round is not over yet."""
        self.save(beside=True)
        self.untested = True

    def take_back(self):
        """Undo `save_untested`: the model has diverged, and the checkpoint before is the one to go on from."""
        self.join()
        if self.folder is not None and is_main_process() and self.error is None:
            if (self.folder / PREVIOUS).exists():
                os.replace(self.folder / PREVIOUS, self.folder / CHECKPOINT)
            else:
                (self.folder / CHECKPOINT).unlink()

    def save(self, *, beside: bool = False):
        """Store the training; `beside`: come back before it is written, once its state is copied to host memory."""
        if self.folder is None:
            return
        state = self.state_dict()
        self.wait()
        # One that was not tested yet is of no use beside the same training after the test.
        keep = None if self.untested else self.folder / PREVIOUS
        self.untested = False
        if not beside:
            self.write(state, keep)
        elif is_main_process():
            self.writing = threading.Thread(target=self.note_error, args=(copy_to_host(state), keep))
            self.writing.start()

    def write(self, state: dict, keep: Optional[Path]):
        checkpoints.save_checkpoint(state, self.folder / CHECKPOINT, keep=keep)

    def note_error(self, state: dict, keep: Optional[Path]):
        try:
            self.write(state, keep)
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
        """Between two steps of the optimizer; `step` batches of this round are done, and have these sums."""
        self.position.step, self.sums = step, sums
        update = -(-step // self.args.accum_iter)
        self.look_up(save=bool(self.args.save_every) and update % self.args.save_every == 0)

    def look_up(self, *, save: bool = False):
        """Store the training if asked to; stop, stored, if any process got a signal."""
        signum = self.stop.agreed()
        if save or signum:
            self.save(beside=not signum)
        if signum:
            wait_for_all()  # a launcher may kill what is left when the first process ends
            self.interrupt(signum, signal.Signals(signum).name)

    def interrupt(self, signum: int, reason: str):
        kept = (f'stored in {self.folder}, to go on: --resume auto' if self.folder is not None else
                'nothing is stored without --output-dir')
        raise Interrupted(signum, f'{reason}: stopped at {self.position}; {kept}')

    # -----------------------------------------------------------------------------------------------------------------
    # Going on

    def load(self, checkpoint: dict, source: str) -> set:
        """Go on where `checkpoint` was stored; `source` is what to call it in messages. Returns what `resume` does.

        Raises:
            InputError: it lacks something, or is of another training.
        """
        parts = {name: part for name, part in self.parts.items() if part is not None}
        lacking = {name for name in parts if checkpoint.get(name) is None}
        self.refuse_other_settings(checkpoint, source)
        for name, part in parts.items():
            if name not in lacking and checkpoint[name] != {}:  # a scaler that was not needed
                try:
                    part.load_state_dict(checkpoint[name])
                except InputError as error:
                    raise InputError(f'{source}: {error}') from None
                except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
                    raise InputError(f'{source}: its {name} is of another training ({first_line(error)})') from None
        needed = [name for name in (*parts, *self.position.required)
                  if (name in lacking or name not in checkpoint) and name not in self.optional]
        if needed:
            raise InputError(f'{source}: has no {" and no ".join(needed)} to go on with; to start from its weights, '
                             f'use --pretrained')
        self.position.load_state_dict(checkpoint)
        self.recount(checkpoint, source)
        self.sums = {k: average * self.step for k, average in checkpoint.get('averages', {}).items()}
        self.refuse_disagreement(source)
        return lacking

    def refuse_other_settings(self, checkpoint: dict, source: str):
        before = trained_with(checkpoint)
        for name in (*self.fixed, *self.position.fixed):
            now = getattr(self.args, name)
            if before.get(name, now) != now:
                raise InputError(f'{source}: was trained with --{name.replace("_", "-")} {before[name]}, not {now}')
        images, now = checkpoint.get('batch', 0) * before.get('accum_iter', 1), images_per_step(self.args)
        if images and images != now:
            raise InputError(f'{source}: was trained with {images} images a step (--batch-size x --accum-iter x '
                             f'processes), not {now}')

    def recount(self, checkpoint: dict, source: str):
        """Find the position within a round whose batches had another number of images."""
        before = checkpoint.get('batch'), trained_with(checkpoint).get('accum_iter')
        now = images_per_batch(self.args), self.args.accum_iter
        if self.step and None not in before and before != now and isinstance(self.position, Epochs):
            notice(f'{source}: was stored in the middle of an epoch with {before[0]} images a batch and --accum-iter '
                   f'{before[1]}, now it is {now[0]} and {now[1]}: goes on with about the same images')
            self.position.step = self.step * before[0] // now[0] // now[1] * now[1]

    def refuse_disagreement(self, source: str):
        """Raises InputError where the processes have read different checkpoints."""
        place = self.position.done * 2 ** 32 + self.step
        if max_over_processes(place) != -max_over_processes(-place):
            raise InputError(f'{source}: is not the same file for all processes: {NOT_SHARED}')

    # -----------------------------------------------------------------------------------------------------------------
    # Log

    def open_log(self, derived: dict) -> Optional[EpochLog]:
        """Say what is run; prepare --output-dir."""
        for description in (environment(), derived):
            notice(', '.join(f'{name} {value}' for name, value in description.items()))
        if self.folder is None:
            return None
        if not goes_on_in_place(self.args):
            set_aside(self.folder)
        if not is_main_process():
            return None
        write_json(self.folder / 'args.json',
                   {'args': vars(self.args), 'derived': derived, 'environment': environment()})
        log = EpochLog(self.folder, unit=self.position.unit, start=self.position.first_to_log())
        if self.first == 0:  # also when going on within it: the log starts anew there
            log.tensorboard.do('add_text', 'args', '\n'.join(f'    {k}: {v}' for k, v in vars(self.args).items()))
        return log


def copy_to_host(state):
    """A copy of nested dicts, lists and tuples whose tensors are in the host's memory, and change no more."""
    if isinstance(state, torch.Tensor):
        return state.detach().to('cpu', copy=True)
    if isinstance(state, dict):
        return {key: copy_to_host(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(copy_to_host(value) for value in state)
    return state
