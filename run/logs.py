"""Files of a run for its readers: log.txt, TensorBoard, results with their flags and versions."""
import json
import math
import platform
import subprocess
import threading
from pathlib import Path
from typing import Dict, Optional, Tuple

import numpy as np
import timm
import torch
import torchvision

from run.output import log
from utils import first_line, sync_to_disk, write_json, write_text, writing


def environment() -> dict:
    """Return the versions and the git revision that a run's numbers depend on."""
    try:
        git = subprocess.run(['git', 'describe', '--always', '--dirty', '--abbrev=40'], capture_output=True, text=True,
                             cwd=Path(__file__).parent.parent).stdout.strip()
    except FileNotFoundError:  # git is not installed
        git = ''
    return {'python': platform.python_version(), 'torch': torch.__version__, 'torchvision': torchvision.__version__,
            'timm': timm.__version__, 'numpy': np.__version__, 'git': git or 'unknown'}


def log_values(values: dict):
    log(', '.join(f'{name} {value}' for name, value in values.items()))


def write_result(path: Path, values: dict, flags: dict):
    """Write values as JSON, with the flags and the environment that they depend on; make the folder if needed."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**values, 'args': flags, 'environment': environment()})


def table_row(stats: dict, columns: Dict[str, Tuple[str, str]]) -> dict:
    """Return the metrics of a round as a row: texts by column, '-' for a missing metric.

    Args:
        columns: key of a metric and its format, by the name of the column.
    """
    return {column: format(stats[key], spec) if key in stats else '-' for column, (key, spec) in columns.items()}


class TensorBoard:
    """Files for TensorBoard in a folder; a run continues if TensorBoard is missing, broken, or can't write.

    Args:
        start: first step of this process; the steps from `start` on in older files come from lost work and are hidden.
    """

    def __init__(self, folder: Path, *, start: int):
        self.folder, self.writer = folder, None
        try:
            from torch.utils.tensorboard import SummaryWriter  # slow, and only runs with a folder need TensorBoard
            if threading.excepthook is not TensorBoard.excepthook:
                TensorBoard.previous_excepthook, threading.excepthook = threading.excepthook, TensorBoard.excepthook
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
        if isinstance(error, UnicodeError):  # of a folder
            reason = 'TensorBoard needs names in UTF-8'
        log(f'{self.folder}: no more files for TensorBoard ({reason}); the run continues')

    @staticmethod
    def excepthook(args):
        """Print no traceback of an error in TensorBoard's thread: TensorBoard's methods raise the error again."""
        if not type(args.thread).__module__.startswith('tensorboard.'):
            TensorBoard.previous_excepthook(args)


class EpochLog:
    """`log.txt` (one JSON line per round) and TensorBoard files in a run's folder, on the main process.

    Args:
        unit: key of the round's number in each line: 'epoch' or 'iteration'.
        start: first round of this process; the lines of later rounds come from lost work and are removed.
    """

    def __init__(self, output_dir: Path, *, unit: str, start: int):
        self.path, self.unit = output_dir / 'log.txt', unit
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if self.number_of(line) < start]
            write_text(self.path, ''.join(line + '\n' for line in kept))
        self.tensorboard = TensorBoard(output_dir / 'tb', start=start)
        # In a folder of its own: its steps are not rounds, and a resume hides the steps of lost work by their numbers
        self.within_rounds: Optional[TensorBoard] = None

    def number_of(self, line: str) -> float:
        """Return the number of a line's round; infinity for a truncated line, or a run with another unit."""
        try:
            return json.loads(line)[self.unit]
        except (ValueError, KeyError):
            return math.inf

    def write(self, stats: dict):
        with writing(self.path), open(self.path, 'a') as file:
            file.write(json.dumps(stats) + '\n')
            sync_to_disk(file)
        for name, value in stats.items():
            if isinstance(value, float):  # counts are constant, or the horizontal axis
                group, _, rest = name.partition('_')
                self.tensorboard.do('add_scalar', f'{group}/{rest}' if rest else name, value, stats[self.unit])
        self.tensorboard.do('flush')

    def write_point(self, step: int, values: Dict[str, float]):
        """Write averages over the last optimizer steps up to `step`, counted over all rounds."""
        if self.within_rounds is None:
            self.within_rounds = TensorBoard(self.tensorboard.folder / 'steps', start=step)
        for name, value in values.items():
            self.within_rounds.do('add_scalar', f'steps/{name}', value, step)
        self.within_rounds.do('flush')

    def close(self):
        self.tensorboard.do('close')
        if self.within_rounds is not None:
            self.within_rounds.do('close')
