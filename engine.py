"""One epoch of training, for any task, and loops over evaluations: for each device, precision, number of processes."""
import contextlib
import functools
import math
import operator
from typing import Callable, Dict, Iterable, Iterator, Optional, Sequence, Union

import torch
import torch.nn as nn
import torch.nn.functional as F

from run import processes
from run.output import log
from run.progress import DevicePrefetch, Progress
from utils import NonFiniteLoss, seed_everything

Clip = Callable[[list], torch.Tensor]
RESERVED = {'loss', 'grad_norm', 'lr', 'images_per_s', 'data_s', 'memory_mb'}  # metrics of each epoch


def train_one_epoch(
        model: nn.Module, losses: Callable[[object], dict], loader: Iterable, *, optimizer: torch.optim.Optimizer,
        device: torch.device, epoch: int, seed: int, scaler: Optional[torch.amp.GradScaler] = None,
        amp_dtype: Optional[torch.dtype] = None, accum_iter: int = 1, clip_grad: Union[float, Clip, None] = None,
        before_update: Optional[Callable[[int], None]] = None, average: Optional[Callable[[int], None]] = None,
        frozen: Optional[nn.Module] = None, header: Optional[str] = None, first_update: Optional[int] = None,
        first_step: int = 0, sums: Optional[dict] = None,
        after_update: Optional[Callable[[int, dict], None]] = None) -> dict:
    """Train on every batch of `loader` once.

    Args:
        model: trained model, with its wrapper for several processes.
        losses: function of a batch on the device that returns losses by name, called under autocast and with seeded
            random generators. The sum of the losses with a gradient is minimised; others are averaged and logged.
        loader: yields batches of tensors, nested in lists, tuples and dicts in any way.
        epoch: number of the epoch, from 0; epoch, seed and step determine all random numbers in `losses`.
        scaler: scaler of the loss; needed under fp16.
        amp_dtype: autocast dtype; None: full precision.
        accum_iter: batches per optimizer step.
        clip_grad: maximum gradient norm, or a function that clips gradients and returns their norm; None: no clipping.
        before_update: function of the update's number, from 0 over all epochs, called before its first batch.
        average: function of the number of updates done, called after each update: for EMAs and teachers.
        frozen: the model, or a part of it, that stays in eval mode.
        header: name of the epoch in log lines and errors; `Epoch 3` if unset.
        first_update: updates before this epoch; if unset, all epochs have as many updates as this epoch.
        first_step: batches of this epoch that an earlier process did; `loader` does not yield these batches.
        sums: sums of the metrics over the first `first_step` batches, as `after_update` received them.
        after_update: function of the batches done and the sums of their metrics on this process, called after each
            update.

    Returns:
        Averages over the epoch: loss, each of `losses` if there are several, grad_norm; and lr, images_per_s, data_s,
        memory_mb.

    Raises:
        NonFiniteLoss: a loss or the gradient norm is not finite; the weights are unchanged by the step.
    """
    if amp_dtype == torch.float16 and scaler is None:
        raise ValueError('amp_dtype float16: needs a scaler (run.flags.build_scaler)')
    model.train()
    if frozen is not None:
        frozen.eval()
    header = header or f'Epoch {epoch}'
    steps = first_step + len(loader)
    updates_per_epoch = -(-steps // accum_iter)
    first_update = epoch * updates_per_epoch if first_update is None else first_update
    progress = Progress(DevicePrefetch(loader, device), header, device, first_step=first_step)
    parameters = [p for p in model.parameters() if p.requires_grad]
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    clip = clip_grad if callable(clip_grad) else functools.partial(  # without a maximum, the norm is only computed
        torch.nn.utils.clip_grad_norm_, max_norm=clip_grad or math.inf)
    sums = dict(sums or {'loss': 0., 'grad_norm': 0.})
    lr = learning_rate(optimizer)
    optimizer.zero_grad()

    for step, batch in enumerate(progress, start=first_step):
        seed_everything(seed, epoch, step, processes.get_rank())
        updates = first_update + step // accum_iter  # done before this step
        if before_update is not None and step % accum_iter == 0:
            before_update(updates)
            lr = learning_rate(optimizer)

        group = min(accum_iter, steps - step + step % accum_iter)  # the last group of an epoch may be smaller
        is_last_of_group = (step + 1) % accum_iter == 0 or step + 1 == steps
        with contextlib.nullcontext() if is_last_of_group else processes.without_sync(model):
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                parts = losses(batch)
            loss = total(parts)
            # timm marks optimizers that need the graph of the gradient (AdaHessian)
            scaler.scale(loss / group).backward(create_graph=getattr(optimizer, 'is_second_order', False))

        grad_norm = loss.new_zeros(())
        if is_last_of_group:
            scaler.unscale_(optimizer)
            grad_norm = clip(parameters)
        # The only point of a step where the CPU waits for the device: before the weights change.
        logged = {'loss': loss, **(parts if len(parts) > 1 else {}), 'grad_norm': grad_norm}
        values = dict(zip(logged, torch.stack([value.detach().float() for value in logged.values()]).tolist()))
        for name, value in values.items():
            # a scaler skips a step whose gradient is not finite, and the run continues
            if not math.isfinite(value) and not (name == 'grad_norm' and scaler.is_enabled()):
                raise NonFiniteLoss('gradient norm' if name == 'grad_norm' else name, value,
                                    f'{header[:1].lower()}{header[1:]}, step {step}')
        if is_last_of_group:
            scaler.step(optimizer)  # under fp16 only if the gradient is finite
            scaler.update()
            optimizer.zero_grad()
            if average is not None:
                average(updates + 1)

        for name, value in values.items():
            sums[name] = sums.get(name, 0.) + (value if math.isfinite(value) else 0.)
        progress.values = {'loss': f'{sums["loss"] / (step + 1):.4f}', 'lr': f'{lr:.2e}'}
        if is_last_of_group and after_update is not None:
            after_update(step + 1, sums)

    totals = processes.sum_over_processes(sums)
    counts = {name: updates_per_epoch if name == 'grad_norm' else steps for name in totals}
    return {**{name: value / counts[name] / processes.get_world_size() for name, value in totals.items()}, 'lr': lr,
            **progress.stats()}


def total(losses: dict) -> torch.Tensor:
    """Add up the losses that have a gradient; raise ValueError if there is none, or if a name is reserved."""
    minimised = [value for value in losses.values() if value.requires_grad]
    if not minimised:
        raise ValueError(f'none of the losses ({", ".join(losses)}) has a gradient')
    if reserved := RESERVED & losses.keys() if len(losses) > 1 else ():
        raise ValueError(f'{", ".join(sorted(reserved))}: reserved for a metric of the epoch; rename the loss')
    return functools.reduce(operator.add, minimised)


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """Return the highest learning rate of all groups: --layer-decay lowers the rate of lower layers."""
    return max(group['lr'] for group in optimizer.param_groups)


class EvaluationBatches:
    """Iteration over the batches of an evaluation: on the device, under autocast, with progress and stop requests.

    Args:
        loader: loader of `loaders.batches`.
        header: name of the evaluation, for its progress.
        amp_dtype: autocast dtype; None: full precision.
        after_batch: function called after each batch, equally often on all processes; never called if the processes
            can't predict the number of batches.
    """

    def __init__(self, loader, device: torch.device, *, header: str, amp_dtype: Optional[torch.dtype] = None,
                 after_batch: Optional[Callable[[], None]] = None):
        self.loader, self.device, self.amp_dtype, self.after_batch = loader, device, amp_dtype, after_batch
        self.progress = Progress(DevicePrefetch(loader, device), header, device)

    def __iter__(self) -> Iterator:
        is_called = self.after_batch is not None and self.loader.counts_batches
        most = processes.max_over_processes(len(self.loader))
        for batch in self.progress:
            yield batch
            if is_called:
                self.after_batch()
        for _ in range(most - len(self.loader) if is_called else 0):
            self.after_batch()

    def autocast(self) -> torch.autocast:
        """Return a context in which the model runs in the dtype of the evaluation."""
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def images(self, count: int) -> int:
        """Return the exact number of images behind `count` results of all processes, or raise InputError."""
        return self.loader.images_evaluated(count)

    def images_per_s(self) -> float:
        return self.progress.stats()['images_per_s']


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Iterable, *, device: torch.device, amp_dtype: Optional[torch.dtype] = None,
             header: str = 'Test', after_batch: Optional[Callable[[], None]] = None, prints: bool = True,
             classes: Optional[Sequence[int]] = None,
             collect: Optional[Callable[[torch.Tensor, torch.Tensor], None]] = None) -> dict:
    """Compute top-1 and top-5 accuracy (percent) and mean cross-entropy over the images of all processes.

    Args:
        loader: loader of `loaders.batches` that yields images (B, 3, img_h, img_w) and class indices (B,).
        amp_dtype, header, after_batch: see EvaluationBatches.
        prints: print the result.
        classes: classes that are allowed as predictions, for test sets with a part of a model's classes; None: all.
        collect: function of the logits (B, K), -inf for excluded classes, and the targets (B,) of each batch.

    Returns:
        acc1, acc5, loss, images (their number), resolution ([img_h, img_w] of the last), images_per_s.

    Raises:
        InputError: images were lost.
    """
    model.eval()
    processes.broadcast_buffers(model)
    totals = torch.zeros(4, dtype=torch.float64)
    batches = EvaluationBatches(loader, device, header=header, amp_dtype=amp_dtype, after_batch=after_batch)
    resolution = None
    for images, targets in batches:
        resolution = list(images.shape[-2:])
        with batches.autocast():
            logits = model(images)
        if classes is not None:
            logits = only_classes(logits, classes)
        if collect is not None:
            collect(logits, targets)
        totals += hits_and_loss(logits, targets)
    totals = processes.reduce_over_processes(totals)
    metrics = accuracies(totals)
    if prints:
        log(accuracy_line(metrics))
    return {**metrics, 'images': batches.images(int(totals[0])), 'resolution': resolution,
            'images_per_s': batches.images_per_s()}


def hits_and_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return totals of a batch in float64 on the CPU: images, correct, correct among five, cross-entropy."""
    # differs: evaluation loss - the mean over images; the original's mean over batches, of which the last is short
    loss = F.cross_entropy(logits.float(), targets, reduction='none')
    hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
    totals = torch.stack([hits[:, 0].sum(), hits.sum(), loss.sum()]).cpu()  # float32: some devices have no float64
    return torch.cat([torch.tensor([len(targets)]), totals.double()])


def accuracies(totals: torch.Tensor) -> Dict[str, float]:
    """Return acc1, acc5 (percent) and loss of the totals of `hits_and_loss`."""
    count, top1, top5, loss = totals.tolist()
    return {'acc1': 100 * top1 / count, 'acc5': 100 * top5 / count, 'loss': loss / count}


def accuracy_line(metrics: Dict[str, float]) -> str:
    """Format metrics as the original prints them."""
    return f'* Acc@1 {metrics["acc1"]:.3f} Acc@5 {metrics["acc5"]:.3f} loss {metrics["loss"]:.3f}'


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """Put a model into eval mode within a context, then into train mode."""
    model.eval()
    try:
        yield
    finally:
        model.train()


def only_classes(logits: torch.Tensor, classes: Sequence[int]) -> torch.Tensor:
    """Replace the logits (B, K) of all other classes by -inf."""
    masked = torch.full_like(logits, -math.inf)
    masked[:, classes] = logits[:, classes]
    return masked
