"""Which checkpoint --resume means, and whether it can be read."""
import contextlib
import os
from pathlib import Path
from typing import Optional, Tuple

from run import checkpoints
from run.folder import CHECKPOINT, DAMAGED, PREVIOUS
from run.processes import max_over_processes, notice, on_main_process
from utils import InputError

NOT_SHARED = '--output-dir must be on a file system that all nodes share'


def load_for_resume(args) -> Tuple[Optional[dict], str]:
    """The checkpoint that --resume means (None: a fresh start), and what to call it in messages.

    Raises:
        InputError: it can't be read; with `auto`, none that is there can be.
    """
    if args.resume != 'auto':
        checkpoint = checkpoints.load_checkpoint(args.resume, '--resume') if args.resume else None
        return checkpoint, f'--resume {args.resume}'
    path = on_main_process(lambda: newest_intact(args))
    if not path:
        notice(f'--resume auto: no {CHECKPOINT} in {args.output_dir}, a fresh start')
        return None, ''
    if max_over_processes(not Path(path).exists()):
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
        # Or else the next save would put the damaged one in its place. A program that only evaluates saves none.
        if path != candidates[0] and not getattr(args, 'eval', False):
            with contextlib.suppress(OSError):
                os.replace(candidates[0], Path(args.output_dir, DAMAGED))
        return str(path)
    return ''


def goes_on_in_place(args) -> bool:
    """Whether --resume continues the run that is in --output-dir."""
    return args.resume == 'auto' or (
        bool(args.resume) and not checkpoints.is_url(args.resume)
        and Path(args.resume).resolve().parent == Path(args.output_dir).resolve())
