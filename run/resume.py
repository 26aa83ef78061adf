"""Choice and reading of the checkpoint for --resume."""
import contextlib
import os
from pathlib import Path
from typing import Iterable, Optional, Tuple

from run import checkpoints
from run.folder import ARGS, CHECKPOINT, DAMAGED, PREVIOUS, check_is_free, result_of
from run.output import log
from run.processes import is_main_process, max_over_processes, on_main_process
from utils import InputError

NOT_SHARED = '--output-dir must be on a file system that all nodes share'


def load_for_resume(resume: str, output_dir: str, *, keeps_damaged: bool = False) -> Tuple[Optional[dict], str]:
    """Read the checkpoint that --resume names.

    Args:
        resume: path, URL, `auto` for the newest readable checkpoint in `output_dir`, or '' for none.
        keeps_damaged: leave a damaged checkpoint in its place, for evaluation.

    Returns:
        The checkpoint (None: a fresh start), and its name for messages.

    Raises:
        InputError: the checkpoint can't be read; with `auto`, there are checkpoints, but none can be read.
    """
    if resume != 'auto':
        return checkpoints.load_checkpoint(resume, '--resume') if resume else None, f'--resume {resume}'
    newest = {}  # read by the main process
    path = on_main_process(lambda: newest_intact(output_dir, newest, keeps_damaged=keeps_damaged))
    if not path:
        log(f'--resume auto: no {CHECKPOINT} in {output_dir}, a fresh start')
        return None, ''
    if max_over_processes(not Path(path).exists()):
        raise InputError(f'--resume auto: {path} does not exist for all processes: {NOT_SHARED}')
    source = f'--resume auto: {path}'
    return newest if is_main_process() else checkpoints.load_checkpoint(path, '--resume auto:'), source


def newest_intact(output_dir: str, content: dict, *, keeps_damaged: bool) -> str:
    """Return the path of the newest readable checkpoint in a folder, '' for none; read the checkpoint into `content`.

    Raises:
        InputError: there are checkpoints, but none can be read.
    """
    candidates = [path for name in (CHECKPOINT, PREVIOUS) if (path := Path(output_dir, name)).exists()]
    for path in candidates:
        try:
            content.update(checkpoints.load_checkpoint(path, '--resume auto:'))
        except InputError as error:
            if path == candidates[-1]:
                raise
            log(f'{error}; trying the checkpoint before')
            continue
        if path != candidates[0] and not keeps_damaged:
            with contextlib.suppress(OSError):  # else the next save would keep the damaged file
                os.replace(candidates[0], Path(output_dir, DAMAGED))
        return str(path)
    return ''


def flags_of_run(resume: str, output_dir: str) -> dict:
    """Return the flags in args.json beside the checkpoint that --resume names; {} without such a file."""
    if not resume or checkpoints.is_url(resume):
        return {}
    folder = Path(output_dir) if resume == 'auto' else Path(resume).parent
    if resume == 'auto' and not has_checkpoint(folder):
        return {}  # a fresh start
    return result_of(folder / ARGS).get('args', {})


def has_checkpoint(folder: Path) -> bool:
    return any((folder / name).exists() for name in (CHECKPOINT, PREVIOUS))


def check_is_free_for(resume: str, output_dir: str, patterns: Iterable[str]):
    """Raise InputError if a run would write to files in its folder, by their `patterns`, that no run has written.

    A checkpoint that is resumed in its folder is a run's, also without args.json.
    """
    folder = Path(output_dir)
    if not (continues_in_place(resume, output_dir) and (resume != 'auto' or has_checkpoint(folder))):
        check_is_free(folder, patterns)


def continues_in_place(resume: str, output_dir: str) -> bool:
    """Return True if --resume continues the run whose files are in `output_dir`."""
    return resume == 'auto' or (
        bool(resume) and not checkpoints.is_url(resume) and Path(resume).resolve().parent == Path(output_dir).resolve())


def resumed_folder(resume: str, output_dir: str) -> Optional[Path]:
    """Return the folder of the run that --resume continues; None: there is none, or it is not on this machine."""
    if resume == 'auto':
        return Path(output_dir)
    return Path(resume).parent if resume and not checkpoints.is_url(resume) else None
