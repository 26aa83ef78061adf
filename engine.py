"""One epoch of training, and evaluation: the same loops for every device, precision and number of processes."""
import math
from typing import Iterable, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import Mixup
from timm.utils import ModelEmaV3

import utils


class NonFiniteLoss(utils.RunStopped):
    """The training diverged."""


def train_one_epoch(
        model: nn.Module, criterion: nn.Module, loader: Iterable, *, optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler, device: torch.device, epoch: int, seed: int,
        amp_dtype: Optional[torch.dtype] = None, accum_iter: int = 1, clip_grad: Optional[float] = None,
        mixup_fn: Optional[Mixup] = None, model_ema: Optional[ModelEmaV3] = None,
        frozen: Optional[nn.Module] = None) -> dict:
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
        frozen: part of the model that stays in eval mode.

    Returns:
        Averages over the epoch: loss, grad_norm, lr; and images_per_s, data_s, memory_mb.

    Raises:
        NonFiniteLoss: before the step that it would have spoiled.
    """
    model.train()
    if frozen is not None:
        frozen.eval()
    steps = len(loader)
    updates_per_epoch = -(-steps // accum_iter)
    progress = utils.Progress(loader, f'Epoch {epoch}', device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    lr = optimizer.param_groups[0]['lr']
    loss_sum = norm_sum = 0.
    optimizer.zero_grad()

    for step, (images, targets) in enumerate(progress):
        utils.seed_everything(seed, epoch, step, utils.get_rank())
        images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        if mixup_fn is not None:
            images, targets = mixup_fn(images, targets)

        first_of_group = step - step % accum_iter
        group = min(accum_iter, steps - first_of_group)  # the last group of an epoch may be smaller
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            loss = criterion(images, model(images), targets)
        # timm marks the optimizers that need the graph of the gradient (AdaHessian)
        scaler.scale(loss / group).backward(create_graph=getattr(optimizer, 'is_second_order', False))

        last_of_group = step + 1 == first_of_group + group
        grad_norm = loss.new_zeros(())
        if last_of_group:
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, clip_grad or math.inf)
        # The one point of a step where the CPU waits for the device: before the weights change.
        loss_value, norm_value = torch.stack([loss.detach().float(), grad_norm.float()]).tolist()
        if not math.isfinite(loss_value):
            raise NonFiniteLoss(f'loss is {loss_value} at epoch {epoch}, step {step}: training stopped; '
                                f'the last checkpoint is as it was')
        if last_of_group:
            scaler.step(optimizer)  # under fp16 only if the gradient is finite
            scaler.update()
            optimizer.zero_grad()
            norm_sum += norm_value if math.isfinite(norm_value) else 0.
            if model_ema is not None:
                # the number of this update, so that the warm-up of the average survives a restart
                model_ema.update(utils.unwrap(model), step=epoch * updates_per_epoch + step // accum_iter + 1)

        loss_sum += loss_value
        progress.values = {'loss': f'{loss_sum / (step + 1):.4f}', 'lr': f'{lr:.2e}'}

    # Each process has its own share of the batch: its loss, but the norm of the common gradient.
    loss_sum = utils.sum_over_processes(torch.tensor(loss_sum, dtype=torch.float64)).item()
    return {'loss': loss_sum / steps / utils.get_world_size(), 'grad_norm': norm_sum / updates_per_epoch, 'lr': lr,
            **progress.stats()}


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Iterable, *, device: torch.device, amp_dtype: Optional[torch.dtype] = None,
             header: str = 'Test') -> dict:
    """Top-1 and top-5 accuracy (percent) and mean cross-entropy over the images of all processes' loaders.

    Args:
        loader: yields images (B, 3, img_h, img_w) and class indices (B,); each image is in one process's loader.
        amp_dtype: autocast type; None: full precision.

    Returns:
        acc1, acc5, loss, images (their number), images_per_s.
    """
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64)  # images, right, right among five, loss
    progress = utils.Progress(loader, header, device)
    for images, targets in progress:
        images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            logits = model(images)
        # differs: every image counts the same; the original averages the loss over batches, of which the last is short
        loss = F.cross_entropy(logits.float(), targets, reduction='none')
        hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        totals += torch.stack([torch.tensor(len(targets)).double(), hits[:, 0].sum().double().cpu(),
                               hits.sum().double().cpu(), loss.double().sum().cpu()])
    images, top1, top5, loss = utils.sum_over_processes(totals).tolist()
    stats = {'acc1': 100 * top1 / images, 'acc5': 100 * top5 / images, 'loss': loss / images, 'images': int(images),
             'images_per_s': progress.stats()['images_per_s']}
    utils.notice(f'* Acc@1 {stats["acc1"]:.3f} Acc@5 {stats["acc5"]:.3f} loss {stats["loss"]:.3f}')
    return stats
