"""What a run writes for its readers: log.txt, TensorBoard files, and the versions that its numbers depend on."""
import json
import math
import platform
import subprocess
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision

from utils import sync_to_disk, write_text, writing


def environment() -> dict:
    """Versions and git revision that a run's numbers depend on."""
    try:
        git = subprocess.run(['git', 'describe', '--always', '--dirty', '--abbrev=40'], capture_output=True, text=True,
                             cwd=Path(__file__).parent.parent).stdout.strip()
    except FileNotFoundError:  # git is not installed
        git = ''
    return {'python': platform.python_version(), 'torch': torch.__version__, 'torchvision': torchvision.__version__,
            'timm': timm.__version__, 'numpy': np.__version__, 'git': git or 'unknown'}


class EpochLog:
    """`log.txt` (one JSON line an epoch) and TensorBoard files in a run's directory, on the main process.

    Args:
        output_dir: the run's directory.
        unit: what the run is counted in, and calls its lines by: 'epoch' or 'iteration'.
        start: lines from this one on come from work that was lost, and are taken out.
    """

    def __init__(self, output_dir: Path, *, unit: str, start: int):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only runs with a directory need it
        self.path, self.unit = output_dir / 'log.txt', unit
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if self.place(line) < start]
            write_text(self.path, ''.join(line + '\n' for line in kept))
        with writing(output_dir / 'tb'):
            self.tensorboard = SummaryWriter(output_dir / 'tb', purge_step=start)

    def place(self, line: str) -> float:
        try:
            return json.loads(line)[self.unit]
        except (ValueError, KeyError):  # cut short by a crash; of another kind of run
            return math.inf

    def write(self, stats: dict):
        with writing(self.path), open(self.path, 'a') as file:
            file.write(json.dumps(stats) + '\n')
            sync_to_disk(file)
        with writing(self.path.with_name('tb')):
            for name, value in stats.items():
                if name not in (self.unit, 'n_parameters'):
                    group, _, rest = name.partition('_')
                    self.tensorboard.add_scalar(f'{group}/{rest}' if rest else name, value, stats[self.unit])
            self.tensorboard.flush()

    def close(self):
        self.tensorboard.close()
