"""What the programs share: errors, processes, randomness, checkpoints, meters and logs.

The only file that calls `torch.distributed`. Every helper for several processes has a safe answer for one.
"""
import argparse
import datetime
import json
import os
import pickle
import platform
import random
import subprocess
import sys
import time
import urllib.error
import warnings
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torchvision
from tqdm import tqdm


class InputError(ValueError):
    """Something that the user gave can't be used: one line that says what, where, and what is allowed."""


class RunStopped(RuntimeError):
    """A run can't go on, for a reason that one line tells."""


def run_program(main):
    """Run a program's `main()`; what stops it for a known reason is one line on stderr, and the exit code."""
    try:
        main()
    except (InputError, RunStopped) as error:
        print(f'{Path(sys.argv[0]).name}: error: {error}', file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)


def notice(*words):
    """Print on the main process only."""
    if is_main_process():
        print(*words, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Processes and devices

def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def get_rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def is_main_process() -> bool:
    return get_rank() == 0


def barrier():
    if is_distributed():
        dist.barrier()


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Elementwise sum of a CPU tensor over all processes."""
    if not is_distributed():
        return values
    values = values.to('cuda' if dist.get_backend() == 'nccl' else 'cpu')
    dist.all_reduce(values)
    return values.cpu()


def init_distributed(device: torch.device, *, world_size: int, dist_url: str) -> torch.device:
    """Join the other processes where a launcher (torchrun, srun) has set RANK and WORLD_SIZE.

    Args:
        device: the kind of device, e.g. `cuda`.
        world_size: the number of processes, where the environment doesn't say it.
        dist_url: where the processes meet; `env://` reads MASTER_ADDR and MASTER_PORT.

    Returns:
        This process's own device.
    """
    if 'RANK' not in os.environ:
        if world_size > 1:
            raise InputError(f'--world-size {world_size}: RANK is not set; start the processes with torchrun')
        return device
    world_size = int(os.environ.get('WORLD_SIZE', world_size))
    if device.type == 'cuda' and device.index is None:
        device = torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0)))
        torch.cuda.set_device(device)
    dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo', init_method=dist_url,
                            world_size=world_size, rank=int(os.environ['RANK']))
    return device


def wrap_for_distributed(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """DistributedDataParallel where there are several processes, with BatchNorm synchronised over several GPUs."""
    if not is_distributed():
        return model
    if device.type == 'cuda':
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=[device.index])
    return torch.nn.parallel.DistributedDataParallel(model)


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside DistributedDataParallel."""
    return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model


def end_distributed():
    if is_distributed():
        dist.destroy_process_group()


def choose_device(name: str) -> torch.device:
    """`auto` (cuda, then mps, then cpu) or a device's name -> the device.

    Raises:
        InputError: there is no such device here.
    """
    available = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(), 'cpu': True}
    here = [kind for kind, there in available.items() if there]
    if name == 'auto':
        return torch.device(here[0])
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f'--device {name}: no such device; allowed: auto, cuda, cuda:N, mps, cpu') from None
    if not available.get(device.type):
        raise InputError(f'--device {name}: not available on this machine, which has: {", ".join(here)}')
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f'--device {name}: this machine has {torch.cuda.device_count()} GPU(s), counted from 0')
    return device


# ---------------------------------------------------------------------------------------------------------------------
# Randomness: always a function of where in the training it is used, never of what happened before

def derive_seed(*keys: int) -> int:
    """A 64-bit seed from any number of integers >= 0, e.g. (seed, epoch, position)."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0])


def seed_everything(*keys: int):
    """Seed Python's, NumPy's and torch's generators (CPU and accelerator) with a function of `keys`."""
    seed = derive_seed(*keys)
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.manual_seed(seed % 2 ** 63)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: plain values and state dicts

def save_checkpoint(state: dict, path: Path):
    """Write `state` so that `path` holds either the old file or the whole new one, at every moment."""
    if not is_main_process():
        return
    unfinished = path.with_name(path.name + '.tmp')
    with open(unfinished, 'wb') as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def is_url(source) -> bool:
    return str(source).startswith(('http://', 'https://', 'file://'))


def load_checkpoint(source, flag: str) -> dict:
    """Read a checkpoint onto the CPU, without executing anything that it holds.

    Args:
        source: path or URL (kept in torch.hub's cache).
        flag: the option that named it, for the error's text.

    Raises:
        InputError: not there, damaged, or holding Python objects.
    """
    try:
        # Checkpoints of the original's main.py hold its parsed arguments, which can do no harm.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch's about the format of files that it then refuses
            if is_url(source):
                checkpoint = torch.hub.load_state_dict_from_url(
                    str(source), map_location='cpu', check_hash=True, weights_only=True)
            else:
                checkpoint = torch.load(source, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise InputError(f'{flag} {source}: no such file') from None
    except IsADirectoryError:
        raise InputError(f'{flag} {source}: a directory, not a checkpoint file') from None
    except urllib.error.URLError as error:
        raise InputError(f'{flag} {source}: can\'t be downloaded ({error})') from None
    except pickle.UnpicklingError:
        raise InputError(f'{flag} {source}: not a checkpoint of tensors and plain values; files that need Python '
                         f'code to be run are refused') from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f'{flag} {source}: damaged, truncated or not a checkpoint ({first_line(error)})') from None
    if not isinstance(checkpoint, dict):
        raise InputError(f'{flag} {source}: holds a {type(checkpoint).__name__}, not a checkpoint')
    return checkpoint


def load_weights(model: torch.nn.Module, state_dict: dict, source: str, *, new_head: bool = False):
    """Load every weight of `state_dict` into `model`.

    Args:
        state_dict: weights by name, or a checkpoint that holds them under 'model'.
        source: the option and value they came from, for messages.
        new_head: keep the model's fresh head where the file's is for another number of classes.

    Raises:
        InputError: a weight is missing, left over or of another shape.
    """
    given, own = state_dict.get('model', state_dict), model.state_dict()
    wrong_shape = [k for k in own if k in given and getattr(given[k], 'shape', None) != own[k].shape]
    missing = [k for k in own if k not in given]
    unexpected = [k for k in given if k not in own]
    head = [f'{getattr(model, "default_cfg", {}).get("classifier", "head")}.{part}' for part in ('weight', 'bias')]
    if missing or unexpected or set(wrong_shape) - set(head):
        shapes = [f'{k} {tuple(getattr(given[k], "shape", ()))}, model has {tuple(own[k].shape)}' for k in wrong_shape]
        problems = {'missing keys': missing, 'unexpected keys': unexpected, 'other shapes': shapes}
        raise InputError(f'{source}: the weights are not this model\'s; '
                         + '; '.join(f'{what}: {abridge(keys)}' for what, keys in problems.items() if keys))
    if wrong_shape:
        classes = f'{len(given[head[0]])} classes, not {len(own[head[0]])}'
        if not new_head:
            raise InputError(f'{source}: the weights are for {classes}')
        notice(f'{source}: its head is for {classes}, and is left out; the model keeps a fresh one')
        given = {k: v for k, v in given.items() if k not in head}
    model.load_state_dict(given, strict=not wrong_shape)


def abridge(items: list, most: int = 8) -> str:
    """The first `most` of the items, and how many more there are."""
    more = f', ... {len(items) - most} more' if len(items) > most else ''
    return ', '.join(map(str, items[:most])) + more


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------------------------------------------------------------
# Output directory

def open_output_dir(path: Path, *, keep: bool):
    """Make the directory; where it holds another run and `keep` is off, move that run's files into `previous-N`."""
    if not is_main_process():
        return
    path.mkdir(parents=True, exist_ok=True)
    files = [p for name in RUN_FILES if (p := path / name).exists()]
    if keep or not files:
        return
    number = 1
    while (path / f'previous-{number}').exists():
        number += 1
    (path / f'previous-{number}').mkdir()
    for file in files:
        file.rename(path / f'previous-{number}' / file.name)
    notice(f'{path} held another run: its files are now in {path}/previous-{number} (to continue it: --resume auto)')


RUN_FILES = ('checkpoint.pth', 'best_model.pth', 'log.txt', 'args.json', 'eval.json', 'tb')


def environment() -> dict:
    """Versions and git revision that a run's numbers depend on."""
    try:
        git = subprocess.run(['git', 'describe', '--always', '--dirty', '--abbrev=40'], capture_output=True, text=True,
                             cwd=Path(__file__).parent).stdout.strip()
    except FileNotFoundError:  # git is not installed
        git = ''
    return {'python': platform.python_version(), 'torch': torch.__version__, 'torchvision': torchvision.__version__,
            'timm': timm.__version__, 'numpy': np.__version__, 'git': git or 'unknown'}


def write_json(path: Path, values: dict):
    unfinished = path.with_name(path.name + '.tmp')
    unfinished.write_text(json.dumps(values, indent=2) + '\n')
    os.replace(unfinished, path)


class EpochLog:
    """`log.txt` (one JSON line an epoch) and TensorBoard files in a run's directory, on the main process.

    Args:
        output_dir: the run's directory.
        start_epoch: lines of this epoch and later ones come from work that was lost, and are taken out.
    """

    def __init__(self, output_dir: Path, start_epoch: int):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only runs with a directory need it
        self.path = output_dir / 'log.txt'
        if self.path.exists():
            lines = self.path.read_text().splitlines()
            kept = [line for line in lines if json.loads(line)['epoch'] < start_epoch]
            self.path.write_text(''.join(line + '\n' for line in kept))
        self.tensorboard = SummaryWriter(output_dir / 'tb', purge_step=start_epoch)

    def write(self, stats: dict):
        with open(self.path, 'a') as file:
            file.write(json.dumps(stats) + '\n')
        for name, value in stats.items():
            if name not in ('epoch', 'n_parameters'):
                group, _, rest = name.partition('_')
                self.tensorboard.add_scalar(f'{group}/{rest}' if rest else name, value, stats['epoch'])
        self.tensorboard.flush()

    def close(self):
        self.tensorboard.close()


# ---------------------------------------------------------------------------------------------------------------------
# Progress

class Progress:
    """Iterate over a loader and show how far it is: a tqdm bar on a terminal, a line now and then elsewhere.

    Args:
        loader: yields batches whose first element is a tensor (B, ...).
        header: what is running.
        device: for peak memory.
        every: steps between two lines.

    After the loop, `stats()` gives images a second, data time and peak memory.
    """

    def __init__(self, loader, header: str, device: torch.device, every: int = 50):
        self.loader, self.header, self.device, self.every = loader, header, device, every
        self.values = {}
        self.images = 0
        self.data_time = 0.

    def __iter__(self):
        if self.device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(self.device)
        bar = tqdm(total=len(self.loader), desc=self.header, leave=False, disable=not shows_bar())
        self.start = asked = time.perf_counter()
        with bar:
            for step, batch in enumerate(self.loader, start=1):
                self.data_time += time.perf_counter() - asked
                yield batch
                self.images += len(batch[0]) * get_world_size()
                bar.set_postfix(self.values, refresh=False)
                bar.update()
                if not shows_bar() and (step % self.every == 0 or step == len(self.loader)):
                    notice(self.line(step))
                asked = time.perf_counter()
        self.seconds = time.perf_counter() - self.start

    def line(self, step: int) -> str:
        seconds = time.perf_counter() - self.start
        eta = datetime.timedelta(seconds=int(seconds / step * (len(self.loader) - step)))
        shown = '  '.join(f'{name} {value}' for name, value in self.values.items())
        memory = f'  max mem {peak_memory(self.device):.0f} MB' if self.device.type == 'cuda' else ''
        return (f'{self.header} [{step:{len(str(len(self.loader)))}}/{len(self.loader)}]  eta {eta}  {shown}  '
                f'{self.images / seconds:.0f} images/s  data {self.data_time / step:.4f} s{memory}')

    def stats(self) -> dict:
        return {'images_per_s': self.images / self.seconds, 'data_s': self.data_time / max(len(self.loader), 1),
                'memory_mb': peak_memory(self.device)}


def shows_bar() -> bool:
    return is_main_process() and sys.stderr.isatty()


def peak_memory(device: torch.device) -> float:
    """Peak memory in MB (2**20 bytes): of the tensors on a GPU, else of the whole process."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    if device.type == 'mps':
        return torch.mps.driver_allocated_memory() / 2 ** 20
    if sys.platform == 'win32':
        return 0.  # not told there
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == 'darwin' else 2 ** 10)
