"""One epoch of training, for any task, and the evaluation of classifiers.

The same loops for every device, precision and number of processes.
"""
import contextlib
import math
from typing import Callable, Iterable, Optional, Sequence, Union

import torch
import torch.nn as nn
import torch.nn.functional as F

from run import processes
from run.processes import notice
from run.progress import DevicePrefetch, Progress, with_stops
from utils import RunStopped, seed_everything

Clip = Callable[[list], torch.Tensor]
RESERVED = {'loss', 'grad_norm', 'lr', 'images_per_s', 'data_s', 'memory_mb'}  # what an epoch's figures are called


class NonFiniteLoss(RunStopped):
    """The training diverged."""

    def __init__(self, what: str, value: float, where: str):
        super().__init__(f'{what} is {value} at {where}: training stopped; the last checkpoint is as it was')


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
        model: what is trained, with its wrapper for several processes.
        losses: of a batch on the device, by name. The sum of those that have a gradient is minimised; figures without
            one are only averaged and logged. Called under autocast, with the random generators seeded.
        loader: yields batches of tensors, nested in lists, tuples and dicts in any way.
        epoch: counted from 0; with `seed` and the step it decides everything random in `losses`.
        scaler: scales the loss; needed under fp16.
        amp_dtype: autocast type; None: full precision.
        accum_iter: batches whose gradients make one step of the optimizer.
        clip_grad: largest gradient norm; or a function that changes the parameters' gradients, and returns their norm;
            None: no clipping.
        before_update: called with the number of the update, counted over all epochs from 0, before its first batch:
            for rates that change with every step.
        average: called with the number of updates so far, after each: for averages of the weights, and teachers.
        frozen: the model, or a part of it, that stays in eval mode.
        header: what the epoch is called in lines and errors; `Epoch 3` if unset.
        first_update: updates before this epoch; as many in each as in this one, if unset.
        first_step: batches of this epoch that an earlier run did; they are not in `loader`.
        sums: what they summed up to, as `after_update` was told.
        after_update: called after each change of the weights with the batches done and their sums of losses and
            gradient norm on this process.

    Returns:
        Averages over the epoch: loss, each of `losses` if there are several, grad_norm, lr; and images_per_s, data_s,
        memory_mb.

    Raises:
        NonFiniteLoss: before the step that it would have spoiled.
    """
    model.train()
    if frozen is not None:
        frozen.eval()
    header = header or f'Epoch {epoch}'
    steps = first_step + len(loader)
    updates_per_epoch = -(-steps // accum_iter)
    first_update = epoch * updates_per_epoch if first_update is None else first_update
    progress = Progress(DevicePrefetch(loader, device), header, device, first_step=first_step)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if amp_dtype == torch.float16 and scaler is None:
        raise ValueError('amp_dtype is float16: it needs a scaler (run.flags.build_scaler)')
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    clip = clip_grad if callable(clip_grad) else by_global_norm(clip_grad)
    sums = dict(sums or {'loss': 0., 'grad_norm': 0.})
    lr = learning_rate(optimizer)
    optimizer.zero_grad()

    for step, batch in enumerate(progress, start=first_step):
        seed_everything(seed, epoch, step, processes.get_rank())
        updates = first_update + step // accum_iter  # before this one
        if before_update is not None and step % accum_iter == 0:
            before_update(updates)
            lr = learning_rate(optimizer)

        first_of_group = step - step % accum_iter
        group = min(accum_iter, steps - first_of_group)  # the last group of an epoch may be smaller
        last_of_group = step + 1 == first_of_group + group
        with contextlib.nullcontext() if last_of_group else processes.without_sync(model):
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                parts = losses(batch)
            loss = total(parts)
            # timm marks the optimizers that need the graph of the gradient (AdaHessian)
            scaler.scale(loss / group).backward(create_graph=getattr(optimizer, 'is_second_order', False))

        grad_norm = loss.new_zeros(())
        if last_of_group:
            scaler.unscale_(optimizer)
            grad_norm = clip(parameters)
        # The one point of a step where the CPU waits for the device: before the weights change.
        shown = {'loss': loss, **(parts if len(parts) > 1 else {}), 'grad_norm': grad_norm}
        values = dict(zip(shown, torch.stack([value.detach().float() for value in shown.values()]).tolist()))
        for name, value in values.items():
            # a scaler skips a step whose gradient is not finite, and goes on
            if not math.isfinite(value) and not (name == 'grad_norm' and scaler.is_enabled()):
                raise NonFiniteLoss('gradient norm' if name == 'grad_norm' else name, value,
                                    f'{header[:1].lower()}{header[1:]}, step {step}')
        if last_of_group:
            scaler.step(optimizer)  # under fp16 only if the gradient is finite
            scaler.update()
            optimizer.zero_grad()
            if average is not None:
                average(updates + 1)

        for name, value in values.items():
            sums[name] = sums.get(name, 0.) + (value if math.isfinite(value) else 0.)
        progress.values = {'loss': f'{sums["loss"] / (step + 1):.4f}', 'lr': f'{lr:.2e}'}
        if last_of_group and after_update is not None:
            after_update(step + 1, sums)

    totals = processes.sum_over_processes(sums)
    counts = {name: updates_per_epoch if name == 'grad_norm' else steps for name in totals}
    return {**{name: value / counts[name] / processes.get_world_size() for name, value in totals.items()}, 'lr': lr,
            **progress.stats()}


def total(losses: dict) -> torch.Tensor:
    """The sum of the losses that have a gradient."""
    minimised = [value for value in losses.values() if value.requires_grad]
    if not minimised:
        raise ValueError(f'none of the losses ({", ".join(losses)}) has a gradient')
    if taken := RESERVED & losses.keys() if len(losses) > 1 else ():
        raise ValueError(f'{", ".join(sorted(taken))}: a figure of the epoch has this name; call the loss otherwise')
    loss = minimised[0]
    for value in minimised[1:]:
        loss = loss + value
    return loss


def by_global_norm(largest: Optional[float]) -> Clip:
    """Scale all gradients down to a largest norm of them all; None: leave them as they are."""
    return lambda parameters: torch.nn.utils.clip_grad_norm_(parameters, largest or math.inf)


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """The highest of the groups': lower layers may have less (--layer-decay)."""
    return max(group['lr'] for group in optimizer.param_groups)


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Iterable, *, device: torch.device, amp_dtype: Optional[torch.dtype] = None,
             header: str = 'Test', after_batch: Optional[Callable[[], None]] = None, announce: bool = True,
             classes: Optional[Sequence[int]] = None,
             collect: Optional[Callable[[torch.Tensor, torch.Tensor], None]] = None) -> dict:
    """Top-1 and top-5 accuracy (percent) and mean cross-entropy over the images of all processes' loaders.

    Args:
        loader: a loader of `loaders.batches` that yields images (B, 3, img_h, img_w) and class indices (B,).
        amp_dtype: autocast type; None: full precision.
        after_batch: called after each batch, equally often on all processes; never, where these can't know how often
            that is.
        announce: print the result.
        classes: the only ones that a prediction can be, for test sets that have some of a model's classes; None: all.
        collect: called with the logits (B, K), of other classes -inf, and the targets (B,) of each batch.

    Returns:
        acc1, acc5, loss, images (their number), resolution ([img_h, img_w] of the last), images_per_s.

    Raises:
        InputError: images were lost on the way.
    """
    model.eval()
    processes.broadcast_buffers(model)
    totals = torch.zeros(4, dtype=torch.float64)  # images, right, right among five, loss
    progress = Progress(DevicePrefetch(loader, device), header, device)
    resolution = None
    for images, targets in with_stops(progress, loader, after_batch):
        resolution = list(images.shape[-2:])
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            logits = model(images)
        if classes is not None:
            logits = only_classes(logits, classes)
        if collect is not None:
            collect(logits, targets)
        # differs: evaluation loss - the mean over images; the original's over batches, of which the last is short
        loss = F.cross_entropy(logits.float(), targets, reduction='none')
        hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        batch = torch.stack([hits[:, 0].sum(), hits.sum(), loss.sum()]).cpu()  # float32: some devices have no float64
        totals += torch.cat([torch.tensor([len(targets)]), batch.double()])
    count, top1, top5, loss = processes.reduce_over_processes(totals).tolist()
    acc1, acc5, loss = 100 * top1 / count, 100 * top5 / count, loss / count
    if announce:
        notice(f'* Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} loss {loss:.3f}')
    return {'acc1': acc1, 'acc5': acc5, 'loss': loss, 'images': loader.images_evaluated(int(count)),
            'resolution': resolution, 'images_per_s': progress.stats()['images_per_s']}


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """A context in which a model that is being trained is in eval mode."""
    model.eval()
    try:
        yield
    finally:
        model.train()


def only_classes(logits: torch.Tensor, classes: Sequence[int]) -> torch.Tensor:
    """Logits (B, K) in which all other classes are impossible."""
    possible = torch.full_like(logits, -math.inf)
    possible[:, classes] = logits[:, classes]
    return possible
