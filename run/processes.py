"""Processes that train together: all calls of `torch.distributed`. Each function also works for a single process."""
import contextlib
import datetime
import os
import socket
import time
from typing import Callable, Optional

import torch
import torch.distributed as dist

from run.launch import Launch, find_launch
from utils import InputError, RunStopped, decodable, first_line

PATIENCE_S = 3.  # timeout of the exchange of reasons when processes end


class Rendezvous:
    """Store with the addresses of the processes; None for a single process, or with --dist-url."""
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
    """Reduce a tensor on any device elementwise over all processes; the default is the sum."""
    if is_distributed():
        values = values.clone()
        dist.all_reduce(values, op)
    return values


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Average a tensor on any device elementwise over all processes."""
    return reduce_over_processes(values) / get_world_size()


def sum_over_processes(sums: dict) -> dict:
    """Add up the processes' dicts of numbers, value by value."""
    return dict(zip(sums, reduce_over_processes(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist()))


def gather_rows(rows: torch.Tensor, *, in_turn: bool) -> torch.Tensor:
    """Gather the rows of all processes' CPU tensors (n, m) on every process.

    Args:
        in_turn: the images of a data set are distributed in turn; False: each process has one contiguous part.
    """
    rank, world = get_rank(), get_world_size()
    counts = torch.zeros(world, dtype=torch.int64)
    counts[rank] = len(rows)
    counts = reduce_over_processes(counts)
    columns = max_over_processes(rows.shape[1] if len(rows) else 0)
    places = rank + world * torch.arange(len(rows)) if in_turn else counts[:rank].sum() + torch.arange(len(rows))
    gathered = torch.zeros(int(counts.sum()), columns, dtype=rows.dtype)
    if len(rows):
        gathered[places] = rows
    if is_distributed():
        dist.all_reduce(gathered)
    return gathered


def max_over_processes(value: int) -> int:
    """Return the largest of the processes' values on every process."""
    return int(reduce_over_processes(torch.tensor(value), dist.ReduceOp.MAX)) if is_distributed() else value


def wait_for_all():
    """Return when all processes have called this function."""
    max_over_processes(0)


def on_main_process(decide: Callable[[], str]) -> str:
    """Call `decide` on the main process only, and return its result, or raise its InputError, on every process."""
    decision, error = '', ''
    if is_main_process():
        try:
            decision = decide()
        except InputError as caught:
            error = str(caught)
    if is_distributed():
        message = [decision, error]
        dist.broadcast_object_list(message, src=0, device=torch.device('cpu'))
        decision, error = message
    if error:
        raise InputError(error)
    return decision


def init_distributed(launch: Launch, device: torch.device, *, dist_url: str, timeout_minutes: float) -> torch.device:
    """Join the other processes of a launch, and return this process's own device; see `run.session.joined`.

    Raises:
        InputError: no GPU for this process.
        RunStopped: the processes can't connect.
    """
    if device.type == 'cuda' and device.index is None:
        device = torch.device('cuda', own_gpu(launch))
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    # Small messages about the run use gloo on GPUs, too: they do not wait for the computation on the GPUs.
    backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
    try:
        Rendezvous.store = open_store(launch, timeout) if dist_url == 'env://' else None
        rendezvous = {'store': Rendezvous.store} if Rendezvous.store else {'init_method': dist_url}
        dist.init_process_group(backend, rank=launch.rank, world_size=launch.world_size, timeout=timeout, **rendezvous)
    except (dist.DistError, ValueError, OSError) as error:
        where = f'{launch.address}:{launch.port}' if dist_url == 'env://' else dist_url
        remedy = '' if launch.launcher == 'torchrun' else '; set MASTER_ADDR and MASTER_PORT to use another address'
        raise RunStopped(f'the processes can\'t connect at {where} ({first_line(error)}){remedy}') from None
    return device


def end_distributed():
    if is_distributed():
        dist.destroy_process_group()
    Rendezvous.store = None


def own_gpu(launch: Launch) -> int:
    """Return the index of this process's GPU; under srun and mpirun, each process may have a single visible GPU."""
    gpus = torch.cuda.device_count()
    if launch.launcher != 'torchrun' and gpus == 1:
        return 0
    if launch.local_rank >= gpus:
        raise InputError(f'LOCAL_RANK, {launch.local_rank}, selects the GPU of a process: must be from 0 to {gpus - 1}')
    return launch.local_rank


def open_store(launch: Launch, timeout: datetime.timedelta) -> dist.Store:
    """Open the store in which the processes publish their addresses."""
    is_torchruns = os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True'
    store = dist.TCPStore(launch.address, launch.port, timeout=timeout, multi_tenant=True,
                          is_master=launch.rank == 0 and not is_torchruns)
    # After a restart (--max-restarts), torchrun's store still contains the addresses of dead processes.
    return dist.PrefixStore(f'restart_{os.environ.get("TORCHELASTIC_RESTART_COUNT")}', store)


def wrap_for_distributed(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Wrap a model by DistributedDataParallel if there are several processes."""
    if not is_distributed():
        return model
    device_ids = [device.index] if device.type == 'cuda' else None
    return torch.nn.parallel.DistributedDataParallel(model, device_ids=device_ids)


def with_synchronised_bn(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Return the model with BatchNorms that use the batches of all processes, if there are several GPUs."""
    is_needed = is_distributed() and device.type == 'cuda'
    return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) if is_needed else model


def without_sync(model: torch.nn.Module):
    """Return a context in which DistributedDataParallel does not reduce gradients."""
    is_wrapped = isinstance(model, torch.nn.parallel.DistributedDataParallel)
    return model.no_sync() if is_wrapped else contextlib.nullcontext()


def broadcast_buffers(model: torch.nn.Module):
    """Copy the main process's BatchNorm statistics to all processes; without synchronisation they differ."""
    if is_distributed():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def report_once(reason: str, report: Callable[[], None]) -> bool:
    """Call `report` at the end of a program, connected or not, unless the main process ends for the same reason.

    Returns:
        True if `report` was called.
    """
    try:
        launch = find_launch(world_size=1, dist_url='env://')
    except InputError:
        launch = None
    is_single = launch is None or launch.world_size == 1
    if is_single or launch.rank == 0:
        report()
        if not is_single:
            with contextlib.suppress(RuntimeError, ValueError, OSError):  # no connection
                publish_reason(launch, reason)
        return True
    with contextlib.suppress(RuntimeError, ValueError, OSError):
        if reason_of_main_process(launch) == decodable(reason):
            return False
    report()
    return True


def publish_reason(launch: Launch, reason: str):
    """Publish the main process's reason, and wait some seconds for its readers: the store closes with this process."""
    store = Rendezvous.store or open_store(launch, datetime.timedelta(seconds=PATIENCE_S))
    store.set('reason', decodable(reason))
    wait_for(lambda: store.add('readers', 0) >= launch.world_size - 1)


def reason_of_main_process(launch: Launch) -> str:
    """Read the main process's reason; '' if there is none within some seconds."""
    if Rendezvous.store is None and not wait_for(lambda: is_reachable(launch)):  # torch would print sixty lines
        return ''
    store = Rendezvous.store or open_store(launch, datetime.timedelta(seconds=PATIENCE_S))
    if not wait_for(lambda: store.check(['reason'])):
        return ''
    reason = store.get('reason').decode()
    store.add('readers', 1)
    return reason


def is_reachable(launch: Launch) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection((launch.address, launch.port), timeout=PATIENCE_S).close()
        return True
    return False


def wait_for(condition: Callable[[], bool]) -> bool:
    """Return True as soon as `condition` is true, False after PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(.05)
    return holds
