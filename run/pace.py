"""Arithmetic and log lines of batches and learning rates."""
import dataclasses
from typing import Optional

import torch

from run.output import log
from run.processes import get_world_size
from utils import counted

LOW_LR = 1e-5  # a peak below this value hardly trains anything


@dataclasses.dataclass(frozen=True)
class Pace:
    """Batch size and learning rate of a run."""
    lr: float  # peak learning rate, as given by --lr
    batch_size: int  # images per process and forward pass
    accum_iter: int = 1  # batches per optimizer step
    reference_batch: Optional[int] = None  # images per step that `lr` refers to; None: `lr` is not scaled

    @property
    def images_per_batch(self) -> int:
        """Images of one forward and backward pass of all processes."""
        return self.batch_size * get_world_size()

    @property
    def images_per_step(self) -> int:
        """Images of one optimizer step of all processes."""
        return self.images_per_batch * self.accum_iter

    @property
    def scaled_lr(self) -> float:
        """Peak learning rate for the actual number of images per step."""
        return self.lr * self.images_per_step / (self.reference_batch or self.images_per_step)

    def derived(self, device: torch.device, amp_dtype: Optional[torch.dtype]) -> dict:
        """Return the values of a run that follow from its flags, for its log and args.json."""
        return {'device': str(device), 'amp_dtype': str(amp_dtype), 'processes': get_world_size(),
                'global_batch': self.images_per_step, 'scaled_lr': self.scaled_lr}

    def log_rate(self):
        """Log the learning rate; warn of a tiny rate."""
        log(f'Learning rate {self.scaled_lr:.3g} at its peak: --lr {self.lr:g} x '
            f'{counted(self.images_per_step, "image")} a step / {self.reference_batch or self.images_per_step}')
        if self.scaled_lr < LOW_LR <= self.lr:
            log(f'Warning: --lr {self.lr:g} is scaled to {self.scaled_lr:.3g}, because a step has '
                f'{counted(self.images_per_step, "image")}, not {self.reference_batch}; for a learning rate of '
                f'{self.lr:g}, give --lr {self.lr * self.reference_batch / self.images_per_step:.3g}')

    def log(self, *, batches: int, warmup_epochs: int, epochs: int, images: Optional[int] = None,
            min_lr: float = 0.):
        """Log learning rate and steps of a run in epochs; warn of a tiny or rising rate, and of an endless warm-up.

        Args:
            batches, images: batches and images of an epoch on this process; the last images may not fill a batch.
        """
        steps = -(-batches // self.accum_iter)
        dropped = 0 if images is None else (images - batches * self.batch_size) * get_world_size()
        left_out = (f'; the last {dropped} of {counted(images * get_world_size(), "image")} of an epoch do not fill a '
                    f'batch and are left out' if dropped > 0 else '')
        self.log_rate()
        log(f'An epoch has {counted(steps, "step")}, the warm-up {steps * warmup_epochs}{left_out}')
        if min_lr > self.scaled_lr:
            log(f'Warning: --min-lr {min_lr:g}, the final learning rate, is above the peak, {self.scaled_lr:.3g}: the '
                f'rate rises; to let it fall, give --min-lr 0')
        if warmup_epochs >= epochs:
            log(f'Warning: the warm-up (--warmup-epochs {warmup_epochs}) is as long as the run (--epochs {epochs}): '
                f'the learning rate never reaches its peak')
