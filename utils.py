"""What the programs share: errors, processes, command lines, randomness, meters and logs.

The only file that calls `torch.distributed`. Every helper for several processes has a safe answer for one.
"""
import argparse
import atexit
import contextlib
import ctypes
import datetime
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Callable, Iterator, Optional

import numpy as np
import timm
import torch
import torch.distributed as dist
import torchvision
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class InputError(ValueError):
    """Something that the user gave can't be used: one line that says what, where, and what is allowed."""
    exit_code = 2

    def __init__(self, message: str):
        # An exception of a data-loading worker comes back with the worker's traceback before its text.
        last_line = (message.strip().splitlines() or [''])[-1]
        super().__init__(last_line.removeprefix(f'{type(self).__module__}.{type(self).__qualname__}: '))


class UnreadableImage(InputError):
    """An image can't be decoded; the message names it."""


class RunStopped(RuntimeError):
    """A run can't go on, for a reason that one line tells."""
    exit_code = 1


class Interrupted(RunStopped):
    """A signal asked a run to stop, and its state is stored."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signum


def run_program(main):
    """Run a program's `main()`; what stops it for a known reason is one line on stderr, and the exit code.

    2: the user's input; 128 + n: signal n; 1: anything else.
    """
    try:
        main()
    except (InputError, RunStopped) as error:
        rank = os.environ.get('RANK', '0')
        where = '' if rank == '0' else f' (rank {rank})'
        print(f'{Path(sys.argv[0]).name}: error{where}: {error}', file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def is_installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # taken out of sys.modules
        return False


def notice(*words):
    """Print on the main process only."""
    if is_main_process():
        print(*words, flush=True)


def abridge(items: list, most: int = 8) -> str:
    """The first `most` of the items, and how many more there are."""
    more = f', ... {len(items) - most} more' if len(items) > most else ''
    return ', '.join(map(str, items[:most])) + more


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------------------------------------------------------------
# Command lines

class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(message)


def number(kind: type, low, high=None, *, above: bool = False):
    """An argparse type: a number of `kind` from `low` (or `above` it) to `high`."""
    allowed = f'{"an integer" if kind is int else "a number"} {">" if above else ">="} {low}'
    allowed += '' if high is None else f' and <= {high}'

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = float('nan')
        if not (value > low if above else value >= low) or value == float('inf') or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f'{text!r} is not allowed: it must be {allowed}')
        return value

    return parse


COUNT = number(int, 1)
COUNT_OR_0 = number(int, 0)
FRACTION = number(float, 0, 1)
NON_NEGATIVE = number(float, 0)
POSITIVE = number(float, 0, above=True)


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


def reduce_over_processes(values: torch.Tensor, op=dist.ReduceOp.SUM) -> torch.Tensor:
    """Elementwise sum (or another reduction) of a CPU tensor over all processes."""
    if is_distributed():
        values = values.clone()
        dist.all_reduce(values, op)
    return values


def sum_over_processes(sums: dict) -> dict:
    """The totals of all processes' `sums`, value by value."""
    return dict(zip(sums, reduce_over_processes(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist()))


def max_over_processes(value: int) -> int:
    """The largest of the processes' values, on every process."""
    return int(reduce_over_processes(torch.tensor(value), dist.ReduceOp.MAX)) if is_distributed() else value


def wait_for_all():
    """Return when all processes have come here."""
    max_over_processes(0)


def on_main_process(decide: Callable[[], str]) -> str:
    """What `decide()` returns on the main process, the only one to call it; its InputError is every process's."""
    decision, error = '', ''
    if is_main_process():
        try:
            decision = decide()
        except InputError as caught:
            error = str(caught)
    if is_distributed():
        told = [decision, error]
        dist.broadcast_object_list(told, src=0, device=torch.device('cpu'))
        decision, error = told
    if error:
        raise InputError(error)
    return decision


def init_distributed(device: torch.device, *, world_size: int, dist_url: str, timeout_minutes: float) -> torch.device:
    """Join the other processes where a launcher, such as torchrun, has set the environment.

    Args:
        device: the kind of device, e.g. `cuda`.
        world_size: the number of processes, where the environment doesn't say it.
        dist_url: where the processes meet; `env://` reads MASTER_ADDR and MASTER_PORT.
        timeout_minutes: how long a process waits for the others before it gives up.

    Returns:
        This process's own device.

    Raises:
        InputError: the environment is set in part, or to what can't be.
        RunStopped: the processes can't meet.
    """
    needed = ['RANK'] + ['WORLD_SIZE'] * (world_size == 1) + ['MASTER_ADDR', 'MASTER_PORT'] * (dist_url == 'env://')
    given = [name for name in ('RANK', 'WORLD_SIZE') if name in os.environ]
    missing = [name for name in needed if name not in os.environ]
    if not given and world_size == 1:
        return device
    if missing:
        raise InputError(f'{", ".join(given) or f"--world-size {world_size}"} is set, but {", ".join(missing)} is not: '
                         f'start the processes with torchrun, or set all of them')
    world_size = integer_from_environment('WORLD_SIZE', low=1, default=world_size)
    rank = integer_from_environment('RANK', high=world_size - 1)
    if device.type == 'cuda' and device.index is None:
        local_rank = integer_from_environment('LOCAL_RANK', high=torch.cuda.device_count() - 1, default=0)
        device = torch.device('cuda', local_rank)
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    meeting = {'init_method': dist_url}
    port = integer_from_environment('MASTER_PORT', low=1, high=65535) if dist_url == 'env://' else None
    # Small messages about the run go by gloo on GPUs too: they need not wait for what the GPUs are computing.
    backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
    try:
        if dist_url == 'env://' and os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
            # torchrun's store outlives a restart of the processes (--max-restarts), with the addresses of the dead ones
            store = dist.TCPStore(os.environ['MASTER_ADDR'], port, is_master=False, timeout=timeout)
            meeting = {'store': dist.PrefixStore(f'restart_{os.environ.get("TORCHELASTIC_RESTART_COUNT")}', store)}
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout, **meeting)
    except (dist.DistError, ValueError, OSError) as error:
        where = dist_url if port is None else f'{os.environ["MASTER_ADDR"]}:{port}'
        raise RunStopped(f'the processes can\'t meet at {where} ({first_line(error)})') from None
    return device


def integer_from_environment(name: str, *, low: int = 0, high: Optional[int] = None, default: Optional[int] = None
                             ) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal() or int(value) < low or (high is not None and int(value) > high):
        raise InputError(f'{name}={value} in the environment: must be an integer from {low} on'
                         + ('' if high is None else f' to {high}'))
    return int(value)


def wrap_for_distributed(model: torch.nn.Module, device: torch.device, *, sync_bn: bool) -> torch.nn.Module:
    """DistributedDataParallel where there are several processes, with BatchNorm synchronised over several GPUs."""
    if not is_distributed():
        return model
    if device.type != 'cuda':
        notice('BatchNorm is not synchronised: each process normalises with its own batch (only CUDA can do that)')
        return torch.nn.parallel.DistributedDataParallel(model)
    if sync_bn:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return torch.nn.parallel.DistributedDataParallel(model, device_ids=[device.index])


def without_sync(model: torch.nn.Module):
    """A context in which DistributedDataParallel leaves the gradients of this process alone."""
    return model.no_sync() if is_wrapped(model) else contextlib.nullcontext()


def is_wrapped(model: torch.nn.Module) -> bool:
    return isinstance(model, torch.nn.parallel.DistributedDataParallel)


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside DistributedDataParallel."""
    return model.module if is_wrapped(model) else model


def broadcast_buffers(model: torch.nn.Module):
    """Give every process the main one's BatchNorm statistics, which differ where they are not synchronised."""
    if is_distributed():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


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
    try:
        device = torch.device(here[0] if name == 'auto' else name)
    except RuntimeError:
        raise InputError(f'--device {name}: no such device; allowed: auto, cuda, cuda:N, mps, cpu') from None
    if not available.get(device.type):
        raise InputError(f'--device {name}: not available on this machine, which has: {", ".join(here)}')
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f'--device {name}: this machine has {torch.cuda.device_count()} GPU(s), counted from 0')
    return device


def keep_freed_memory():
    """Let a process that trains on a CPU keep memory that it frees, where the C library is glibc.

    Otherwise each step may hand its activations back to the system and get them again page by page, zeroed, which takes
    up to a fifth of its time. Inference, whose steps need little, is better off with the default: it holds less.
    """
    set_malloc(mmap_threshold=2 ** 30, trim_threshold=2 ** 31 - 1)


def set_malloc(*, mmap_threshold: int, trim_threshold: int):
    """Bytes from which on an allocation is a mapping of its own, and of freed memory that is kept; see mallopt(3)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
    mallopt(M_MMAP_THRESHOLD, mmap_threshold) or mallopt(M_MMAP_THRESHOLD, 2 ** 25)  # the most that old versions take
    mallopt(M_TRIM_THRESHOLD, trim_threshold)


# ---------------------------------------------------------------------------------------------------------------------
# Signals

class StopRequest:
    """Notes the signals that ask a run to stop, so that it can do so between two steps.

    Use as a context; a second SIGINT (Ctrl-C) interrupts at once.
    """
    SIGNALS = tuple(s for s in signal.Signals if s.name in ('SIGTERM', 'SIGINT', 'SIGUSR1', 'SIGUSR2'))

    def __init__(self):
        self.signum = 0

    def __enter__(self):
        self.previous = {}
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self.previous = {signum: signal.signal(signum, self._note) for signum in self.SIGNALS}
        return self

    def __exit__(self, *_):
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _frame):
        if self.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = self.signum or signum

    def agreed(self) -> int:
        """The signal that any process has got, 0 for none; all processes must ask at the same step."""
        return max_over_processes(self.signum)


def usable_workers(wanted: int) -> int:
    """So many data-loading processes, but not more than there are cores for this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return min(wanted, cores)


class WorkerSignals:
    """For data-loading workers (`worker_init_fn`): leave signals to the main process, until that one exits.

    A cluster signals every process of a job; without its workers a run could not finish the step that it is at.
    """

    def __init__(self):
        self.exiting = multiprocessing.Value('b', False, lock=False)  # shared with the workers
        atexit.register(self._allow_termination)  # runs before multiprocessing's own, which terminates and joins them

    def _allow_termination(self):
        self.exiting.value = True

    def _terminate(self, _signum: int, _frame):
        if self.exiting.value:
            os._exit(0)

    def __call__(self, _worker_id: int):
        for signum in StopRequest.SIGNALS:
            signal.signal(signum, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._terminate)


# ---------------------------------------------------------------------------------------------------------------------
# Randomness: always a function of where in the training it is used, never of what happened before

def derive_seed(*keys: int) -> int:
    """A 64-bit seed from any number of integers from 0 to 2**32 - 1, e.g. (seed, epoch, position)."""
    # SeedSequence pads with zeros: without their number, (3,) and (3, 0) would give the same.
    return int(np.random.SeedSequence((len(keys), *keys)).generate_state(1, np.uint64)[0])


def seed_everything(*keys: int):
    """Seed Python's, NumPy's and torch's generators (CPU and accelerator) with a function of `keys`."""
    seed_cpu(*keys)
    torch.manual_seed(derive_seed(*keys) % 2 ** 63)


def seed_cpu(*keys: int):
    """The same without accelerators, which takes a tenth of the time: for each sample of a data set."""
    seed = derive_seed(*keys)
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.default_generator.manual_seed(seed % 2 ** 63)


# ---------------------------------------------------------------------------------------------------------------------
# Output directory

@contextlib.contextmanager
def writing(path: Path):
    """A context in which `path` is written; raises RunStopped where the system can't."""
    try:
        yield
    except OSError as error:
        raise RunStopped(f'{path} can\'t be written ({error.strerror or first_line(error)})') from None


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A context in which to write a file under another name (same suffix), which becomes `path` if all went well.

    Raises:
        RunStopped: it can't be written.
    """
    unfinished = path.with_name(f'{path.stem}.unfinished{path.suffix}')
    try:
        with writing(path):
            yield unfinished
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def sync_to_disk(file):
    """Don't come back before the disk has what was written to an open file."""
    file.flush()
    os.fsync(file.fileno())


def check_output_dir(path: str):
    """Refuse a directory that could not be made, or written to, without making it.

    Raises:
        InputError: so it is.
    """
    folder = Path(path).absolute()
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f'--output-dir {path}: {existing} is not a directory that can be written to')


def set_aside(path: Path):
    """Move the files of the run that a directory holds, if any, into `previous-N` there."""
    files = [p for name in RUN_FILES if (p := path / name).exists()]
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


RUN_FILES = ('checkpoint.pth', 'checkpoint_previous.pth', 'checkpoint_damaged.pth', 'best_model.pth', 'log.txt',
             'args.json', 'eval.json', 'tb')


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
    write_text(path, json.dumps(values, indent=2) + '\n')


def write_text(path: Path, text: str):
    with whole_file(path) as unfinished:
        unfinished.write_text(text)


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
            kept = [line for line in self.path.read_text().splitlines() if self._epoch(line) < start_epoch]
            write_text(self.path, ''.join(line + '\n' for line in kept))
        with writing(output_dir / 'tb'):
            self.tensorboard = SummaryWriter(output_dir / 'tb', purge_step=start_epoch)

    @staticmethod
    def _epoch(line: str) -> float:
        try:
            return json.loads(line)['epoch']
        except ValueError:  # cut short by a crash
            return math.inf

    def write(self, stats: dict):
        with writing(self.path), open(self.path, 'a') as file:
            file.write(json.dumps(stats) + '\n')
            sync_to_disk(file)
        with writing(self.path.with_name('tb')):
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
        first_step: steps that an earlier process did.
        every: steps between two lines.

    After the loop, `stats()` gives images a second, data time and peak memory.
    """

    def __init__(self, loader, header: str, device: torch.device, *, first_step: int = 0, every: int = 50):
        self.loader, self.header, self.device, self.every = loader, header, device, every
        self.first_step, self.steps = first_step, first_step + len(loader)
        self.values = {}
        self.images = 0
        self.data_time = 0.

    def __iter__(self):
        if self.device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(self.device)
        bar = tqdm(total=self.steps, initial=self.first_step, desc=self.header, leave=False, disable=not shows_bar())
        self.start = asked = time.perf_counter()
        with bar:
            step = self.first_step
            for step, batch in enumerate(self.loader, start=self.first_step + 1):
                self.data_time += time.perf_counter() - asked
                yield batch
                self.images += len(batch[0]) * get_world_size()
                bar.set_postfix(self.values, refresh=False)
                bar.update()
                if not shows_bar() and step % self.every == 0 and step < self.steps:
                    notice(self.line(step))
                asked = time.perf_counter()
        self.seconds = time.perf_counter() - self.start
        if step > self.first_step:
            notice(self.line(step))

    def line(self, step: int) -> str:
        seconds, done = time.perf_counter() - self.start, step - self.first_step
        eta = datetime.timedelta(seconds=int(seconds / done * (self.steps - step)))
        shown = '  '.join(f'{name} {value}' for name, value in self.values.items())
        return (f'{self.header} [{step:{len(str(self.steps))}}/{self.steps}]  eta {eta}  {shown}  '
                f'{self.images / seconds:.0f} images/s  data {self.data_time / done:.4f} s  '
                f'max mem {peak_memory(self.device):.0f} MB')

    def stats(self) -> dict:
        return {'images_per_s': self.images / max(self.seconds, 1e-9),
                'data_s': self.data_time / max(len(self.loader), 1), 'memory_mb': peak_memory(self.device)}


class DevicePrefetch:
    """Iterate over a loader's batches on a device; to a GPU each is copied while the one before is worked on.

    Args:
        loader: yields lists of tensors, in pinned memory for the copy to be asynchronous.
        device: where they go.
    """

    def __init__(self, loader, device: torch.device):
        self.loader, self.device = loader, device

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        if self.device.type != 'cuda':
            for batch in self.loader:
                yield [tensor.to(self.device) for tensor in batch]
            return
        stream = torch.cuda.Stream(self.device)
        ahead = None
        for batch in self.loader:
            with torch.cuda.stream(stream):
                copied = [tensor.to(self.device, non_blocking=True) for tensor in batch]
                done = stream.record_event()
            if ahead is not None:
                yield self.take(*ahead)
            ahead = copied, done
        if ahead is not None:
            yield self.take(*ahead)

    def take(self, batch: list, done: 'torch.cuda.Event') -> list:
        """Let the work that comes now wait for the copy, and the memory be kept until that work is done."""
        now = torch.cuda.current_stream(self.device)
        now.wait_event(done)
        for tensor in batch:
            tensor.record_stream(now)
        return batch


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
