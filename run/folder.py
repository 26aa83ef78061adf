"""Output folder of a run: its check, its lock, and files of earlier runs in it."""
import fcntl
import itertools
import json
import os
import shutil
import socket
from pathlib import Path
from typing import Iterable, List, Optional

from run.output import log
from run.processes import on_main_process
from utils import InputError, abridge, first_line

CHECKPOINT, PREVIOUS, BEST = 'checkpoint.pth', 'checkpoint_previous.pth', 'best_model.pth'
DAMAGED, ARGS = 'checkpoint_damaged.pth', 'args.json'
HOLDER = 'process '  # beginning of a lock's content
EVALUATION_FILES = ('eval.json', 'report')
SUMMARY = 'summary.json'  # in a report
# Patterns of the files that every run may write
RUN_FILES = (CHECKPOINT, PREVIOUS, DAMAGED, 'log.txt', ARGS, 'tb')
UNLISTED = (*RUN_FILES, BEST, *EVALUATION_FILES)  # patterns that the args.json of earlier versions does not list


def check_output_dir(path: str, flag: str = '--output-dir'):
    """Raise InputError, naming `flag`, if a folder is not writable or can't be made; nothing is made."""
    folder = Path(path).absolute()
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f'{flag} {path}: {existing} is not a writable directory')


def set_aside(folder: Path, patterns: Iterable[str]):
    """Move the files of an earlier run in a folder to `previous-N`.

    Args:
        patterns: patterns of the files that a new run may write.

    Raises:
        InputError: the new run would write to files that no run has written.
    """
    check_is_free(folder, patterns)
    files = files_of_earlier_run(folder)
    if not files:
        return
    previous = next(path for i in itertools.count(1) if not (path := folder / f'previous-{i}').exists())
    previous.mkdir()
    for file in files:
        file.rename(previous / file.name)
    log(f'{folder} contained another run: its files are now in {previous} (to resume a run: --resume auto)')


def check_is_free(folder: Path, patterns: Iterable[str]):
    """Raise InputError if a folder contains files that match `patterns`, and that no run has written."""
    files_of_run = set(files_of_earlier_run(folder))
    others = [file.name for file in matches(folder, patterns) if file not in files_of_run]
    if others:
        them = 'it' if len(others) == 1 else 'them'
        raise InputError(f'--output-dir {folder}: contains {abridge(others)}, which no earlier run has written (there '
                         f'is no {ARGS} of a run that lists {them}); rename {them}, or choose another folder')


def files_of_earlier_run(folder: Path) -> List[Path]:
    """Return the files of an earlier run or evaluation in a folder, perhaps of another task, by its own list."""
    patterns: List[str] = []
    if run := result_of(folder / ARGS):
        files = run.get('files') if isinstance(run.get('files'), list) else []
        listed = [pattern for pattern in files if pattern and isinstance(pattern, str)]
        patterns = listed if CHECKPOINT in listed else [*UNLISTED, *listed]
    result, report = EVALUATION_FILES
    if result_of(folder / result):  # not every evaluation writes a report
        patterns += EVALUATION_FILES if (folder / report / SUMMARY).is_file() else [result]
    return matches(folder, patterns)


def matches(folder: Path, patterns: Iterable[str]) -> List[Path]:
    return list(dict.fromkeys(file for pattern in patterns for file in sorted(folder.glob(pattern))))


def result_of(path: Path) -> dict:
    """Return the content of a file of run.logs.write_result; {} if there is none."""
    try:
        content = json.loads(path.read_text())
        return content if isinstance(content['args'], dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


class DirectoryLock:
    """Context with the lock of an output folder, which is made if needed; kill -9 of this process releases the lock.

    Args:
        path: the folder; None: nothing is locked.

    Raises:
        InputError: another run has the lock (on every process), or the folder can't be made.
    """

    def __init__(self, path: Optional[Path]):
        self.file = self.made = None
        if path is not None and (holder := on_main_process(lambda: self.lock(path))):
            raise InputError(f'--output-dir {path}: another run is writing there ({holder})')

    def lock(self, path: Path) -> str:
        """Lock the folder; return the name of another process that has the lock, '' if there is none."""
        self.made = None if path.exists() else path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.file = open(path / '.lock', 'a+')
        except OSError as error:
            raise InputError(f'--output-dir {path}: can\'t be written to ({first_line(error)})') from None
        os.register_at_fork(after_in_child=self.release)  # else workers would keep the lock for some time after kill -9
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.file.seek(0)
            if not (self.file.read() or HOLDER).startswith(HOLDER):
                raise InputError(f'--output-dir {path}: {path / ".lock"} is no file of a run; choose another folder')
            self.file.truncate(0)
            self.file.write(f'{HOLDER}{os.getpid()} on {socket.gethostname()}')
            self.file.flush()
        except BlockingIOError:
            self.file.seek(0)
            return self.file.read() or 'another process'
        except OSError as error:  # some network file systems have no locks
            log(f'{path} can\'t be locked ({first_line(error)}): make sure that no other run writes there')
        return ''

    def release(self):
        if self.file is not None:
            self.file.close()

    def __enter__(self):
        return self

    def __exit__(self, error: Optional[type], *_):
        refused = error is not None and issubclass(error, InputError)
        if refused and self.made and [file.name for file in self.made.iterdir()] == ['.lock']:
            shutil.rmtree(self.made)  # remove the folder that an invalid command line created
        self.release()
