"""Processes and devices: the only file that calls `torch.distributed`.

Every helper for several processes has a safe answer for one.
"""
import contextlib
import ctypes
import datetime
import os
import socket
import sys
import time
from typing import Callable, Iterator, Optional

import torch
import torch.distributed as dist

from run.launch import Launch, find_launch
from run.output import discard, has_no_reader
from utils import InputError, Interrupted, RunStopped, first_line, seed_everything

PATIENCE_S = 3.  # for what processes say to each other when they end


class Meeting:
    """Where the processes have met; None: nowhere, or by --dist-url."""
    store: Optional[dist.Store] = None


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def get_rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def is_main_process() -> bool:
    return get_rank() == 0


def reduce_over_processes(values: torch.Tensor, op=dist.ReduceOp.SUM) -> torch.Tensor:
    """Elementwise sum (or another reduction) of a tensor, on any device, over all processes."""
    if is_distributed():
        values = values.clone()
        dist.all_reduce(values, op)
    return values


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Elementwise mean, on any device, over all processes."""
    return reduce_over_processes(values) / get_world_size()


def sum_over_processes(sums: dict) -> dict:
    """The totals of all processes' `sums`, value by value."""
    return dict(zip(sums, reduce_over_processes(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist()))


def gather_rows(rows: torch.Tensor, *, in_turn: bool) -> torch.Tensor:
    """The rows of all processes' CPU tensors (n, m), on each of them.

    Args:
        in_turn: they take the images of a data set in turn; else they have one part after another.
    """
    rank, world = get_rank(), get_world_size()
    counts = torch.zeros(world, dtype=torch.int64)
    counts[rank] = len(rows)
    counts = reduce_over_processes(counts)
    columns = max_over_processes(rows.shape[1] if len(rows) else 0)
    places = rank + world * torch.arange(len(rows)) if in_turn else counts[:rank].sum() + torch.arange(len(rows))
    everything = torch.zeros(int(counts.sum()), columns, dtype=rows.dtype)
    if len(rows):
        everything[places] = rows
    if is_distributed():
        dist.all_reduce(everything)
    return everything


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
    """Join the other processes where a launcher, such as torchrun, srun or mpirun, has set the environment.

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
    launch = find_launch(world_size=world_size, dist_url=dist_url)
    if launch is None:
        return device
    if device.type == 'cuda' and device.index is None:
        device = torch.device('cuda', own_gpu(launch))
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    # Small messages about the run go by gloo on GPUs too: they need not wait for what the GPUs are computing.
    backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
    try:
        Meeting.store = store_of(launch, timeout) if dist_url == 'env://' else None
        meeting = {'store': Meeting.store} if Meeting.store else {'init_method': dist_url}
        dist.init_process_group(backend, rank=launch.rank, world_size=launch.world_size, timeout=timeout, **meeting)
    except (dist.DistError, ValueError, OSError) as error:
        where = f'{launch.address}:{launch.port}' if dist_url == 'env://' else dist_url
        remedy = '' if launch.launcher == 'torchrun' else '; MASTER_ADDR and MASTER_PORT name another place'
        raise RunStopped(f'the processes can\'t meet at {where} ({first_line(error)}){remedy}') from None
    if launch.launcher != 'torchrun':
        notice(f'{launch.launcher} has started {launch.world_size} processes, which work together')
    return device


def say_once(words: str, say: Callable[[], None]) -> bool:
    """Call `say()` at the end of a program, unless the main process ends with the same words.

    The processes need not have met: the environment is enough.

    Returns:
        Whether it was called.
    """
    try:
        launch = find_launch(world_size=1, dist_url='env://')
    except InputError:
        launch = None
    if launch is None or launch.world_size == 1 or launch.rank == 0:
        say()
    if launch is None or launch.world_size == 1:
        return True
    with contextlib.suppress(RuntimeError, ValueError, OSError):  # they can't meet
        if launch.rank == 0:
            tell_last_words(launch, words)
        elif last_words(launch) == words:
            return False
    if launch.rank > 0:
        say()
    return True


def tell_last_words(launch: Launch, words: str):
    """Of the main process; waits some seconds for the others to hear them: the store or a launcher ends with it."""
    store = Meeting.store or store_of(launch, datetime.timedelta(seconds=PATIENCE_S))
    store.set('last words', words)
    wait_for(lambda: store.add('heard', 0) >= launch.world_size - 1)


def last_words(launch: Launch) -> str:
    """Those of the main process; '': none within some seconds."""
    # torch would say sixty lines of a store that is not there
    if Meeting.store is None and not wait_for(lambda: is_reachable(launch)):
        return ''
    store = Meeting.store or store_of(launch, datetime.timedelta(seconds=PATIENCE_S))
    if not wait_for(lambda: store.check(['last words'])):
        return ''
    heard = store.get('last words').decode()
    store.add('heard', 1)
    return heard


def is_reachable(launch: Launch) -> bool:
    try:
        socket.create_connection((launch.address, launch.port), timeout=PATIENCE_S).close()
    except OSError:
        return False
    return True


def wait_for(condition: Callable[[], bool]) -> bool:
    """Whether it has come true within PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while not (true := condition()) and time.monotonic() < deadline:
        time.sleep(.05)
    return true


def own_gpu(launch: Launch) -> int:
    """Index of this process's GPU; srun and others may show each process its own one alone."""
    gpus = torch.cuda.device_count()
    if launch.launcher != 'torchrun' and gpus == 1:
        return 0
    if launch.local_rank is None or launch.local_rank >= gpus:
        number = 'which is not known here' if launch.local_rank is None else launch.local_rank
        raise InputError(f'LOCAL_RANK, {number}, says which GPU a process takes: must be from 0 to {gpus - 1}')
    return launch.local_rank


def store_of(launch: Launch, timeout: datetime.timedelta) -> dist.Store:
    """Where the processes tell each other their addresses."""
    store = dist.TCPStore(launch.address, launch.port, timeout=timeout, multi_tenant=True,
                          is_master=launch.rank == 0 and not is_store_of_torchrun())
    # torchrun's store outlives a restart of the processes (--max-restarts), with the addresses of the dead ones
    return dist.PrefixStore(f'restart_{os.environ.get("TORCHELASTIC_RESTART_COUNT")}', store)


def is_store_of_torchrun() -> bool:
    return os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True'


def wrap_for_distributed(model: torch.nn.Module, device: torch.device, *, sync_bn: bool) -> torch.nn.Module:
    """DistributedDataParallel where there are several processes, with BatchNorm synchronised over several GPUs."""
    if not is_distributed():
        return model
    if device.type != 'cuda':
        notice('BatchNorm is not synchronised: each process normalises with its own batch (only CUDA can do that)')
        return torch.nn.parallel.DistributedDataParallel(model)
    if sync_bn:
        model = with_synchronised_bn(model, device)
    return torch.nn.parallel.DistributedDataParallel(model, device_ids=[device.index])


def with_synchronised_bn(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model with BatchNorms that take the batches of all processes together, where there are several GPUs."""
    if not is_distributed() or device.type != 'cuda':
        return model
    return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)


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
    Meeting.store = None


@contextlib.contextmanager
def joined(args, *, trains: bool = True) -> Iterator[torch.device]:
    """A context for a program's work among its processes, seeded by --seed; gives this process's device.

    Args:
        args: the flags of run.flags.add_run_flags and add_distributed_flags.
        trains: prepare for a training, which keeps the memory that it frees.
    """
    set_deterministic(args.deterministic)
    seed_everything(args.seed)
    device = init_distributed(choose_device(args.device), world_size=args.world_size, dist_url=args.dist_url,
                              timeout_minutes=args.dist_timeout)
    if device.type == 'cpu' and trains:
        keep_freed_memory()
    if device.type == 'cpu':
        notice_busy_cores()
    try:
        yield device
    except Interrupted:
        end_distributed()
        raise  # of any other error the processes know nothing: leaving the group could wait for them
    end_distributed()


def set_deterministic(deterministic: bool):
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')


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


def usable_workers(wanted: int) -> int:
    """So many data-loading processes, but not more than there are cores for this process."""
    return min(wanted, usable_cores())


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def notice_busy_cores():
    """Say so where other programs have the cores that torch's threads count on.

    These wait for each other at every step by spinning: on cores that are taken, a training can be ten times slower.
    """
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows; not to be had
        return
    cores = usable_cores()
    free = max(0., cores - load)
    if load > free and torch.get_num_threads() > 1 and 'OMP_NUM_THREADS' not in os.environ:
        notice(f'Other programs are using this machine: its load is {load:.1f}, and this one has {cores} cores and '
               f'{torch.get_num_threads()} threads; if it is slow, set OMP_NUM_THREADS={max(1, int(free))} in front of '
               f'the command')


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
# What one process says for all

class Output:
    """Standard output; `on_broken_pipe` is called, instead of an error, where nobody reads it any more."""
    on_broken_pipe: Optional[Callable[[], None]] = None


def notice(*words):
    """Print on the main process only.

    Raises:
        BrokenPipeError: nobody reads it, and the program is not at a place where that is noted (run.signals).
    """
    if not is_main_process():
        return
    try:
        print(*words, flush=True)
    except BrokenPipeError:
        if Output.on_broken_pipe is None or not has_no_reader(sys.stdout):
            raise
        discard(sys.stdout)
        Output.on_broken_pipe()


def shows_bar() -> bool:
    """Whether progress is a bar on a terminal; one without columns, as some programs make, has no place for it."""
    if not is_main_process() or not sys.stderr.isatty():
        return False
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):  # a stream that is no file
        return False
