"""Training run with named parts and a position, which is stored and resumed after any interruption.

The program keeps its loop:

    run = Run(args, Epochs(args.epochs), {'model': model, 'optimizer': parts.Optimizer(optimizer)})
    with run.resumed():
        with run.started(derived):
            for epoch in run.rounds(loader):
                stats = engine.train_one_epoch(model, losses, loader, ..., **run.options(epoch, device))
                run.finish(epoch, stats, keep=..., summary=...)
"""
import contextlib
import datetime
import os
import signal
import threading
import time
from pathlib import Path
from typing import Dict, Iterable, Iterator, Optional

import torch

from run import checkpoints
from run.commandline import words_of
from run.descriptions import trained_with
from run.devices import amp_dtype_of
from run.folder import ARGS, CHECKPOINT, PREVIOUS, RUN_FILES, DirectoryLock, set_aside
from run.logs import EpochLog, environment, log_values, write_result
from run.output import log
from run.position import Epochs
from run.processes import (
    get_world_size,
    is_main_process,
    max_over_processes,
    on_main_process,
    sum_over_processes,
    wait_for_all,
)
from run.progress import Table, map_leaves
from run.resume import NOT_SHARED, continues_in_place, load_for_resume
from run.signals import StopRequest
from utils import InputError, Interrupted, NonFiniteLoss, counted, dashed, decodable, first_line

BEFORE = -1  # step of what TensorBoard shows from before the first round


class Run:
    """Training run; a resumed run continues as if without interruption.

    Args:
        args: flags, including the flags of run.flags.add_run_flags, add_checkpoint_flags and add_batch_flags.
        position: position in epochs or iterations.
        parts: parts by their key in a checkpoint, in the order of loading: objects with `state_dict` and
            `load_state_dict`, or None for a part that this run does not have.
        optional: names of parts that a checkpoint may lack.
        fixed: flags whose value may not change on resume.
        files: patterns of further files that this run writes to --output-dir; a later run sets them aside.
        remedies: text by the name of a fixed flag or a part, which ends the error about its difference on resume.

    Attributes:
        folder: --output-dir; None: nothing is written.
        log: log of the rounds on the main process; None elsewhere, and without a folder.
        first: first round of this process.
        sums: sums of the current round's metrics on this process, by name.
    """

    def __init__(self, args, position: Epochs, parts: dict, *, optional: tuple = (), fixed: tuple = (),
                 files: tuple = (), remedies: Optional[Dict[str, str]] = None):
        if reserved := parts.keys() & {*position.state_dict(), 'averages', 'batch', 'seconds', 'args', 'replaced'}:
            raise ValueError(f'{", ".join(sorted(reserved))}: reserved keys of a checkpoint; rename the parts')
        self.flags, self.position, self.parts, self.optional = vars(args), position, parts, optional
        self.files = tuple(dict.fromkeys((*RUN_FILES, *files)))
        self.remedies = remedies or {}
        self.fixed = {name: self.flags[name] for name in (*fixed, *position.fixed)}
        self.resume_from, self.save_every, self.stop_after = args.resume, args.save_every, args.stop_after_epochs
        self.seed, self.accum_iter, self.amp, self.log_every = args.seed, args.accum_iter, args.amp, args.log_every
        self.images_per_batch = args.batch_size * get_world_size()
        self.folder = Path(args.output_dir) if args.output_dir else None
        self.sums, self.log, self.table, self.stop = {}, None, Table(), StopRequest()
        self.unevaluated = False  # True if the newest checkpoint was stored before the round's evaluation
        self.start_time, self.seconds_before = time.monotonic(), 0.  # seconds of earlier processes; None: unknown
        self.writing: Optional[threading.Thread] = None
        self.error: Optional[Exception] = None

    @property
    def step(self) -> int:
        """Batches done of the current round."""
        return self.position.step

    @contextlib.contextmanager
    def resumed(self) -> Iterator[set]:
        """Lock --output-dir within a context, and load the checkpoint of --resume, if any.

        The lock precedes loading: with `auto`, no other run can store a newer checkpoint meanwhile.

        Yields:
            Names of the optional parts that the checkpoint lacks.

        Raises:
            InputError: another run writes to --output-dir, or the checkpoint can't be resumed.
        """
        with DirectoryLock(self.folder):
            checkpoint, source = load_for_resume(self.resume_from, str(self.folder or ''))
            missing = set() if checkpoint is None else self.load(checkpoint, source)
            if checkpoint is not None:
                log(f'{source}: resumes at {self.position}')
            yield missing

    def is_over(self) -> bool:
        """Return True, and log a line, if nothing is left to do."""
        if self.position.remaining_rounds():
            return False
        name = f'{self.position.unit}s'
        log(f'--{name} {self.flags[name]}: nothing is left to do')
        return True

    @contextlib.contextmanager
    def started(self, derived: dict) -> Iterator['Run']:
        """Open the log within a context, in which a signal stores and stops the run.

        No file except the lock is written earlier; a run that is over writes none at all. `derived`: values that follow
        from flags and data, for args.json.
        """
        if self.is_over():
            yield self
            return
        self.start_time, self.first = time.monotonic(), self.position.done + 1
        self.log = self.open_log(derived)
        with self.stop:
            try:
                yield self
            finally:
                self.join()

    def rounds(self, loader) -> Iterator[int]:
        """Yield the numbers of the remaining rounds; set the position of the loader (of `loaders.batches`) before."""
        for number in self.position.remaining_rounds():
            loader.set_position(number, self.step)
            updates = -(-(self.step + len(loader)) // self.accum_iter)
            before = self.position.updates_before(number)
            self.updates_before = number * updates if before is None else before
            self.point = self.step, self.totals()
            yield number

    def options(self, number: int, device: torch.device, scaler: Optional[torch.amp.GradScaler] = None) -> dict:
        """Return the arguments of engine.train_one_epoch that are equal for all tasks; `scaler`: needed under fp16."""
        return dict(device=device, amp_dtype=amp_dtype_of(self.amp, device), scaler=scaler, epoch=number,
                    seed=self.seed, accum_iter=self.accum_iter, header=self.position.name(number),
                    first_update=self.position.updates_before(number), first_step=self.step, sums=self.sums,
                    after_update=self.after_update)

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Store the run before an evaluation; remove this checkpoint if the evaluation raises NonFiniteLoss.

        The round is not finished yet: a run that is stopped within the context repeats the evaluation.
        """
        self.save(in_background=True)
        self.unevaluated = True
        try:
            yield
        except NonFiniteLoss:
            self.join()
            if self.folder is not None and is_main_process() and self.error is None:
                if (self.folder / PREVIOUS).exists():
                    os.replace(self.folder / PREVIOUS, self.folder / CHECKPOINT)
                else:
                    (self.folder / CHECKPOINT).unlink()
            raise

    def finish(self, number: int, stats: dict, *, summary: dict, keep: Iterable[str] = (),
               replace: Optional[Dict[str, Optional[str]]] = None):
        """Finish a round after its evaluation: log and store it; raise Interrupted after --stop-after-epochs rounds.

        Args:
            stats: metrics for the log.
            summary: row of the printed table: texts by column.
            keep: names of further files for this state, e.g. of the best round; equal on all processes.
            replace: parts that are another part in these files, by name (None: left out). The files can be resumed.
        """
        self.position.finish(number)
        self.sums = dict.fromkeys(self.sums, 0.)
        stats[self.position.unit] = self.position.count()
        # In this order, a crash between two of these lines only repeats the round.
        if self.log is not None:
            self.log.write(stats)
        files = [self.folder / name for name in keep] if self.folder is not None else []
        if files:
            checkpoints.save_checkpoint(self.state_dict(replace), files[0])
        for file in files[1:]:
            checkpoints.copy_file(files[0], file)
        self.save()
        elapsed, done = time.monotonic() - self.start_time, number + 1 - self.first
        remaining = elapsed / done * (self.position.total - number - 1)
        self.table.add({self.position.unit: str(stats[self.position.unit]), **summary,
                        'time left': str(datetime.timedelta(seconds=int(remaining)))})
        if number + 1 == self.position.total:
            whole = self.seconds()
            log(f'Training time {datetime.timedelta(seconds=int(elapsed if whole is None else whole))}'
                + ' since the resume' * (whole is None))
            if self.log is not None:
                self.log.close()
        elif done == self.stop_after:
            wait_for_all()
            self.interrupt(signal.SIGTERM, f'--stop-after-epochs {done}')

    def state_dict(self, replace: Optional[Dict[str, Optional[str]]] = None) -> dict:
        """Return the content of a checkpoint, see `finish`; all processes must call this method together."""
        averages = {name: total / max(self.step, 1) / get_world_size() for name, total in self.totals().items()}
        states = {name: None if part is None else part.state_dict() for name, part in self.parts.items()}
        replaced = {name: states.pop(name) for name in replace or ()}
        states |= {name: {**states, **replaced}[other] for name, other in (replace or {}).items() if other}
        return {**states, **({'replaced': replaced} if replaced else {}), **self.position.state_dict(),
                'averages': averages, 'batch': self.images_per_batch, 'args': self.flags,
                **({} if self.seconds_before is None else {'seconds': self.seconds()})}

    def totals(self) -> dict:
        """Return the sums of the round's metrics over all processes, by name."""
        return sum_over_processes(self.sums) if self.sums else {}

    def seconds(self) -> Optional[float]:
        """Return the time of training so far, of earlier processes too; None: unknown."""
        return None if self.seconds_before is None else self.seconds_before + time.monotonic() - self.start_time

    def save(self, *, in_background: bool = False):
        """Store the run; `in_background`: return once the state is in host memory, while a thread writes the file."""
        if self.folder is None:
            return
        state = self.state_dict()
        self.wait()
        # A checkpoint of an unevaluated round is redundant once the round is evaluated.
        keep = None if self.unevaluated else self.folder / PREVIOUS
        self.unevaluated = False
        if not in_background:
            checkpoints.save_checkpoint(state, self.folder / CHECKPOINT, keep=keep)
        elif is_main_process():
            host_state = map_leaves(state, torch.Tensor, lambda tensor: tensor.detach().to('cpu', copy=True))
            self.writing = threading.Thread(target=self.write_in_background, args=(host_state, keep))
            self.writing.start()

    def save_weights(self, name: str, weights: dict, *, model: str):
        """Write weights alone beside the checkpoint, with the run's flags and `model`, the name of their model."""
        if self.folder is not None:
            checkpoints.save_weights(weights, {'args': {**self.flags, 'model': model}}, self.folder / name)

    def write_in_background(self, state: dict, keep: Optional[Path]):
        try:
            checkpoints.save_checkpoint(state, self.folder / CHECKPOINT, keep=keep)
        except Exception as error:  # raised by wait(), where the run can be stopped
            self.error = error

    def join(self):
        """Return when the last checkpoint is written, or has failed."""
        if self.writing is not None:
            self.writing.join()
            self.writing = None

    def wait(self):
        """Return when the last checkpoint is written; raise the error if it can't be written."""
        self.join()
        if self.error is not None:
            raise self.error

    def after_update(self, step: int, sums: dict):
        """Store the run if --save-every is due after `step` batches, and stop the run after a signal."""
        self.position.step, self.sums = step, sums
        update = -(-step // self.accum_iter)
        if self.log_every and update % self.log_every == 0 and self.folder is not None:
            self.write_point(self.updates_before + update)
        self.check_signals(save=bool(self.save_every) and update % self.save_every == 0)

    def write_point(self, step: int):
        """Write the averages since the last point of this round, and the learning rate, to TensorBoard."""
        (last, before), totals = self.point, self.totals()
        self.point = self.step, totals
        batches = (self.step - last) * get_world_size()
        updates = (-(-self.step // self.accum_iter) + -last // self.accum_iter) * get_world_size()
        values = {name: (total - before.get(name, 0.)) / (updates if name == 'grad_norm' else batches)
                  for name, total in totals.items()}
        groups = [group for part in self.parts.values() for group in getattr(part, 'param_groups', [])]
        if groups:
            values['lr'] = max(group['lr'] for group in groups)
        if self.log is not None:
            self.log.write_point(step, values)

    def check_signals(self, *, save: bool = False):
        """Store the run if `save`; store and stop the run if any process received a signal."""
        signum = self.stop.agreed()
        if save or signum:
            self.save(in_background=not signum)
        if signum:
            wait_for_all()  # a launcher may kill the other processes when the first process ends
            self.interrupt(signum, signal.Signals(signum).name)

    def interrupt(self, signum: int, reason: str):
        remedy = (f'stored in {self.folder}, to resume: --resume auto' if self.folder is not None
                  else 'nothing is stored without --output-dir')
        raise Interrupted(signum, f'{reason}: stopped at {self.position}; {remedy}')

    def load(self, checkpoint: dict, source: str) -> set:
        """Load a checkpoint, named `source` in messages; return the names of the optional parts that it lacks.

        Raises:
            InputError: the checkpoint is incomplete, or does not match this run.
        """
        checkpoint = {**checkpoint, **checkpoint.get('replaced', {})}
        parts = {name: part for name, part in self.parts.items() if part is not None}
        missing = {name for name in parts if checkpoint.get(name) is None}
        self.check_settings(checkpoint, source)
        for name, part in parts.items():
            if name not in missing and checkpoint[name] != {}:  # {}: a scaler that was not needed
                try:
                    part.load_state_dict(checkpoint[name])
                except InputError as error:
                    raise InputError(f'{source}: {error}{self.remedies.get(name, "")}') from None
                except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
                    raise InputError(f'{source}: its {name} does not match this run ({first_line(error)})') from None
        needed = [name for name in (*parts, *self.position.required)
                  if (name in missing or name not in checkpoint) and name not in self.optional]
        if needed:
            raise InputError(f'{source}: has no {" and no ".join(needed)} to resume with; to start from its weights, '
                             f'use --pretrained')
        self.position.load_state_dict(checkpoint)
        self.seconds_before = checkpoint.get('seconds')
        self.sums = {k: average * self.step for k, average in checkpoint.get('averages', {}).items()}
        place = self.position.done * 2 ** 32 + self.step
        if max_over_processes(place) != -max_over_processes(-place):
            raise InputError(f'{source}: the processes read different files: {NOT_SHARED}')
        return missing

    def check_settings(self, checkpoint: dict, source: str):
        """Raise InputError if a fixed flag, or the number of images, differs from the checkpoint."""
        before = trained_with(checkpoint)
        for name, value in self.fixed.items():
            if before.get(name, value) != value:
                was = [dashed(name), str(before[name])] if not isinstance(value, bool) else words_of({name: not value})
                now = '' if isinstance(value, bool) else f', not {value}'
                raise InputError(f'{source}: was trained with {" ".join(was)}{now}{self.remedies.get(name, "")}')
        batch, accum_iter = checkpoint.get('batch', 0), before.get('accum_iter', 1)
        images, images_now = batch * accum_iter, self.images_per_batch * self.accum_iter
        if images and images != images_now:
            raise InputError(f'{source}: was trained with {counted(images, "image")} a step (--batch-size x '
                             f'--accum-iter x processes), not {images_now}')
        if batch and accum_iter != self.accum_iter and checkpoint.get('step'):
            raise InputError(f'{source}: was stored within an epoch, with {counted(batch, "image")} a batch and '
                             '--accum-iter '
                             f'{accum_iter}, not {self.images_per_batch} and {self.accum_iter}; resume with these '
                             f'values, or from the end of an epoch')

    def open_log(self, derived: dict) -> Optional[EpochLog]:
        """Log versions and derived values; prepare --output-dir."""
        log_values(environment())
        log_values(derived)
        if self.folder is None:
            return None
        if not continues_in_place(self.resume_from, str(self.folder)):
            on_main_process(lambda: set_aside(self.folder, self.files) or '')
        if not is_main_process():
            return None
        write_result(self.folder / ARGS, {'derived': derived, 'files': self.files}, self.flags)
        epoch_log = EpochLog(self.folder, unit=self.position.unit,
                             start=self.position.first_to_log() if self.first or self.step else BEFORE)
        if self.first == 0:  # also for a run that is resumed within its first round: the log starts again
            flags = '\n'.join(f'    {k}: {v}' for k, v in self.flags.items())
            epoch_log.tensorboard.do('add_text', 'args', decodable(flags))
        return epoch_log
