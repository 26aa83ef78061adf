"""One epoch of training, and evaluation: the same loops for every device, precision and number of processes."""
import contextlib
import math
from typing import Callable, Iterable, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import Mixup
from timm.utils import ModelEmaV3

import utils


class NonFiniteLoss(utils.RunStopped):
    """The training diverged."""

    def __init__(self, what: str, value: float, where: str):
        super().__init__(f'{what} is {value} at {where}: training stopped; the last checkpoint is as it was')


def train_one_epoch(
        model: nn.Module, criterion: nn.Module, loader: Iterable, *, optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler, device: torch.device, epoch: int, seed: int,
        amp_dtype: Optional[torch.dtype] = None, accum_iter: int = 1, clip_grad: Optional[float] = None,
        mixup_fn: Optional[Mixup] = None, model_ema: Optional[ModelEmaV3] = None,
        frozen: Optional[nn.Module] = None, first_step: int = 0, sums: Optional[dict] = None,
        after_update: Optional[Callable[[int, dict], None]] = None) -> dict:
    """Train on every batch of `loader` once.

    Args:
        criterion: loss of (images, outputs, targets), e.g. `losses.DistillationLoss`.
        loader: yields images (B, 3, img_h, img_w) and class indices (B,).
        scaler: scales the loss under fp16; disabled for other precisions.
        epoch: counted from 0; with `seed` it decides mixup, dropout and drop-path.
        amp_dtype: autocast type; None: full precision.
        accum_iter: batches whose gradients make one step.
        clip_grad: largest gradient norm; None: no clipping.
        model_ema: updated after each step.
        frozen: the model, or a part of it, that stays in eval mode.
        first_step: batches of this epoch that an earlier run did; they are not in `loader`.
        sums: what they summed up to, as `after_update` was told.
        after_update: called after each change of the weights with the batches done and their sums of loss and gradient
            norm on this process.

    Returns:
        Averages over the epoch: loss, grad_norm, lr; and images_per_s, data_s, memory_mb.

    Raises:
        NonFiniteLoss: before the step that it would have spoiled.
    """
    model.train()
    if frozen is not None:
        frozen.eval()
    steps = first_step + len(loader)
    updates_per_epoch = -(-steps // accum_iter)
    progress = utils.Progress(utils.DevicePrefetch(loader, device), f'Epoch {epoch}', device, first_step=first_step)
    parameters = [p for p in model.parameters() if p.requires_grad]
    lr = max(group['lr'] for group in optimizer.param_groups)  # lower layers may have less (--layer-decay)
    sums = dict(sums or {'loss': 0., 'grad_norm': 0.})
    optimizer.zero_grad()

    for step, (images, targets) in enumerate(progress, start=first_step):
        utils.seed_everything(seed, epoch, step, utils.get_rank())
        if mixup_fn is not None:
            images, targets = mixup_fn(images, targets)

        first_of_group = step - step % accum_iter
        group = min(accum_iter, steps - first_of_group)  # the last group of an epoch may be smaller
        last_of_group = step + 1 == first_of_group + group
        with contextlib.nullcontext() if last_of_group else utils.without_sync(model):
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                loss = criterion(images, model(images), targets)
            # timm marks the optimizers that need the graph of the gradient (AdaHessian)
            scaler.scale(loss / group).backward(create_graph=getattr(optimizer, 'is_second_order', False))

        grad_norm = loss.new_zeros(())
        if last_of_group:
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, clip_grad or math.inf)
        # The one point of a step where the CPU waits for the device: before the weights change.
        loss_value, norm_value = torch.stack([loss.detach().float(), grad_norm.float()]).tolist()
        if not math.isfinite(loss_value):
            raise NonFiniteLoss('loss', loss_value, f'epoch {epoch}, step {step}')
        if not math.isfinite(norm_value) and not scaler.is_enabled():  # a scaler skips such a step, and goes on
            raise NonFiniteLoss('gradient norm', norm_value, f'epoch {epoch}, step {step}')
        if last_of_group:
            scaler.step(optimizer)  # under fp16 only if the gradient is finite
            scaler.update()
            optimizer.zero_grad()
            sums['grad_norm'] += norm_value if math.isfinite(norm_value) else 0.
            if model_ema is not None:
                # the number of this update, so that the warm-up of the average survives a restart
                model_ema.update(utils.unwrap(model), step=epoch * updates_per_epoch + step // accum_iter + 1)

        sums['loss'] += loss_value
        progress.values = {'loss': f'{sums["loss"] / (step + 1):.4f}', 'lr': f'{lr:.2e}'}
        if last_of_group and after_update is not None:
            after_update(step + 1, sums)

    totals = utils.sum_over_processes(sums)
    return {'loss': totals['loss'] / steps / utils.get_world_size(),
            'grad_norm': totals['grad_norm'] / updates_per_epoch / utils.get_world_size(), 'lr': lr,
            **progress.stats()}


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Iterable, *, device: torch.device, amp_dtype: Optional[torch.dtype] = None,
             header: str = 'Test', after_batch: Optional[Callable[[], None]] = None) -> dict:
    """Top-1 and top-5 accuracy (percent) and mean cross-entropy over the images of all processes' loaders.

    Args:
        loader: yields images (B, 3, img_h, img_w) and class indices (B,); each image is in one process's loader.
        amp_dtype: autocast type; None: full precision.
        after_batch: called after each batch, equally often on all processes.

    Returns:
        acc1, acc5, loss, images (their number), resolution ([img_h, img_w] of the last), images_per_s.
    """
    model.eval()
    utils.broadcast_buffers(model)
    most_batches = utils.max_over_processes(len(loader))
    totals = torch.zeros(4, dtype=torch.float64)  # images, right, right among five, loss
    progress = utils.Progress(utils.DevicePrefetch(loader, device), header, device)
    resolution = None
    for images, targets in progress:
        resolution = list(images.shape[-2:])
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            logits = model(images)
        # differs: evaluation loss - the mean over images; the original's over batches, of which the last is short
        loss = F.cross_entropy(logits.float(), targets, reduction='none')
        hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        batch = torch.stack([hits[:, 0].sum(), hits.sum(), loss.sum()]).cpu()  # float32: some devices have no float64
        totals += torch.cat([torch.tensor([len(targets)]), batch.double()])
        if after_batch is not None:
            after_batch()
    for _ in range(most_batches - len(loader)):
        if after_batch is not None:
            after_batch()
    count, top1, top5, loss = utils.reduce_over_processes(totals).tolist()
    stats = {'acc1': 100 * top1 / count, 'acc5': 100 * top5 / count, 'loss': loss / count, 'images': int(count),
             'resolution': resolution, 'images_per_s': progress.stats()['images_per_s']}
    utils.notice(f'* Acc@1 {stats["acc1"]:.3f} Acc@5 {stats["acc5"]:.3f} loss {stats["loss"]:.3f}')
    return stats
