"""The folder of a run's files: checked before anything is written, and locked while a run writes there."""
import os
import shutil
import socket
from pathlib import Path
from typing import Optional

from run.processes import is_main_process, notice, on_main_process
from utils import InputError, first_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CHECKPOINT, PREVIOUS, BEST = 'checkpoint.pth', 'checkpoint_previous.pth', 'best_model.pth'
DAMAGED = 'checkpoint_damaged.pth'
# Of all tasks, as patterns
RUN_FILES = (CHECKPOINT, PREVIOUS, DAMAGED, 'checkpoint[0-9][0-9][0-9][0-9].pth', BEST, 'best_checkpoint.pth',
             'backbone.pth', 'backbone.safetensors', 'linear.pth', 'log.txt', 'args.json', 'split.json', 'eval.json',
             'report', 'dino_pictures', 'tb')


def check_output_dir(path: str, flag: str = '--output-dir'):
    """Refuse a directory that could not be made, or written to, without making it; `flag` gave it.

    Raises:
        InputError: so it is.
    """
    folder = Path(path).absolute()
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f'{flag} {path}: {existing} is not a directory that can be written to')


def set_aside(path: Path):
    """Move the files of the run that a directory holds, if any, into `previous-N` there."""
    files = [file for pattern in RUN_FILES for file in sorted(path.glob(pattern))]
    if not files or not is_main_process():
        return
    number = 1
    while (path / f'previous-{number}').exists():
        number += 1
    (path / f'previous-{number}').mkdir()
    for file in files:
        file.rename(path / f'previous-{number}' / file.name)
    notice(f'{path} held another run: its files are now in {path}/previous-{number} (to continue one: --resume auto)')


class DirectoryLock:
    """Makes an output directory, and keeps a second run out of it for as long as this one lives, kill -9 included.

    Use as a context.

    Args:
        path: the directory; None: nothing to lock.

    Raises:
        InputError: another run holds it (on every process), or it can't be made.
    """

    def __init__(self, path: Optional[Path]):
        self.file = self.made = None
        if path is not None:
            holder = on_main_process(lambda: self.take(path))
            if holder:
                raise InputError(f'--output-dir {path}: another run is writing there ({holder})')

    def take(self, path: Path) -> str:
        """Lock the directory; returns who else holds it, if anyone does."""
        self.made = None if path.exists() else path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.file = open(path / '.lock', 'a+')
        except OSError as error:
            raise InputError(f'--output-dir {path}: can\'t be written to ({first_line(error)})') from None
        if fcntl is None:
            return ''
        # A lock lives as long as any process has its file open: those that load data would keep it some time after a
        # kill -9 of this one.
        os.register_at_fork(after_in_child=self.release)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.file.truncate(0)
            self.file.write(f'process {os.getpid()} on {socket.gethostname()}')
            self.file.flush()
        except BlockingIOError:
            self.file.seek(0)
            return self.file.read() or 'another process'
        except OSError as error:  # some network file systems have no locks
            notice(f'{path} can\'t be locked ({first_line(error)}): take care that no other run writes there')
        return ''

    def release(self):
        if self.file is not None:
            self.file.close()

    def __enter__(self):
        return self

    def __exit__(self, error: Optional[type], *_):
        refused = error is not None and issubclass(error, InputError)
        if refused and self.made and [file.name for file in self.made.iterdir()] == ['.lock']:
            shutil.rmtree(self.made)  # a mistake on the command line leaves nothing behind
        self.release()
