"""What a run writes for its readers: log.txt, TensorBoard files, and the versions that its numbers depend on."""
import json
import math
import platform
import subprocess
import threading
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision

from run.processes import notice
from utils import first_line, sync_to_disk, write_text, writing


def environment() -> dict:
    """Versions and git revision that a run's numbers depend on."""
    try:
        git = subprocess.run(['git', 'describe', '--always', '--dirty', '--abbrev=40'], capture_output=True, text=True,
                             cwd=Path(__file__).parent.parent).stdout.strip()
    except FileNotFoundError:  # git is not installed
        git = ''
    return {'python': platform.python_version(), 'torch': torch.__version__, 'torchvision': torchvision.__version__,
            'timm': timm.__version__, 'numpy': np.__version__, 'git': git or 'unknown'}


class TensorBoard:
    """Files for TensorBoard. A run goes on without them where TensorBoard is missing, broken, or can't write.

    Args:
        folder: for the files.
        start: what is there from this step on comes from work that was lost.
    """

    def __init__(self, folder: Path, *, start: int):
        self.folder, self.writer = folder, None
        try:
            from torch.utils.tensorboard import SummaryWriter  # slow, and only runs with a directory need it
            self.quiet_own_thread()
            self.writer = SummaryWriter(folder, purge_step=start)
        except Exception as error:  # an installation can be broken in any way
            self.give_up(error)

    def do(self, method: str, *args):
        """Call a method of SummaryWriter, e.g. `add_scalar`."""
        if self.writer is None:
            return
        try:
            getattr(self.writer, method)(*args)
        except Exception as error:
            self.give_up(error)

    def give_up(self, error: Exception):
        self.writer = None
        reason = getattr(error, 'strerror', None) or first_line(error)
        notice(f'{self.folder}: there will be no more files for TensorBoard ({reason}); the run goes on')

    @classmethod
    def quiet_own_thread(cls):
        """Have no traceback printed of an error in TensorBoard's thread: its methods raise it again."""
        if threading.excepthook is not cls.excepthook:
            cls.others_excepthook, threading.excepthook = threading.excepthook, cls.excepthook

    @staticmethod
    def excepthook(args):
        if not type(args.thread).__module__.startswith('tensorboard.'):
            TensorBoard.others_excepthook(args)


class EpochLog:
    """`log.txt` (one JSON line an epoch) and TensorBoard files in a run's directory, on the main process.

    Args:
        output_dir: the run's directory.
        unit: what the run is counted in, and calls its lines by: 'epoch' or 'iteration'.
        start: lines from this one on come from work that was lost, and are taken out.
    """

    def __init__(self, output_dir: Path, *, unit: str, start: int):
        self.path, self.unit = output_dir / 'log.txt', unit
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if self.place(line) < start]
            write_text(self.path, ''.join(line + '\n' for line in kept))
        self.tensorboard = TensorBoard(output_dir / 'tb', start=start)

    def place(self, line: str) -> float:
        try:
            return json.loads(line)[self.unit]
        except (ValueError, KeyError):  # cut short by a crash; of another kind of run
            return math.inf

    def write(self, stats: dict):
        with writing(self.path), open(self.path, 'a') as file:
            file.write(json.dumps(stats) + '\n')
            sync_to_disk(file)
        for name, value in stats.items():
            if name not in (self.unit, 'n_parameters'):
                group, _, rest = name.partition('_')
                self.tensorboard.do('add_scalar', f'{group}/{rest}' if rest else name, value, stats[self.unit])
        self.tensorboard.do('flush')

    def close(self):
        self.tensorboard.do('close')
