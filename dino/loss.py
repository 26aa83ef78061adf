"""DINO loss: cross-entropy between the teacher's output for global crops and the student's output for all crops.

Shapes: `B` images of this process, `K` prototypes (--out-dim).
"""
from typing import Callable, Dict, List, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from dino.collapse import spread
from run.processes import mean_over_processes

GLOBAL = 2  # crops of an image that the teacher receives
STUDENT_TEMPERATURE = .1
CENTRE_MOMENTUM = .9


class DinoLoss(nn.Module):
    """Cross-entropy between the teacher's and the student's probabilities, over all pairs of different crops.

    The buffer `center`, (1, K), is the moving average of the teacher's logits over the batches of all processes.

    Args:
        out_dim: K.
        crops: crops per image; the teacher receives the first two.

    Source: paper section 3.1; original main_dino.py, DINOLoss.
    """

    def __init__(self, out_dim: int, crops: int):
        super().__init__()
        self.crops = crops
        self.register_buffer('center', torch.zeros(1, out_dim))

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, temperature: float
                ) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        """Compute the loss, and update the centre.

        Args:
            student: logits (crops * B, K), all images of the first crop first.
            teacher: logits (2 * B, K) in the same order.
            temperature: temperature of the teacher.

        Returns:
            The loss, and metrics without a gradient: `teacher_entropy`, mean entropy of the teacher's probabilities for
            an image; `mean_entropy`, entropy of the mean probabilities over the batches of all processes.
        """
        # In full precision: division by a temperature of .04 amplifies the rounding errors of half precision
        with torch.autocast(student.device.type, enabled=False):
            log_p = F.log_softmax(student.float() / STUDENT_TEMPERATURE, dim=-1)
            teacher = teacher.detach().float()
            probabilities = F.softmax((teacher - self.center) / temperature, dim=-1)
            terms = [-(q * p).sum(dim=-1).mean() for i, q in enumerate(probabilities.chunk(GLOBAL))
                     for j, p in enumerate(log_p.chunk(self.crops)) if i != j]
            means = mean_over_processes(torch.stack([teacher.mean(dim=0), probabilities.mean(dim=0)]))
            # After the loss: a batch is centred by earlier batches only
            self.center.lerp_(means[:1], 1 - CENTRE_MOMENTUM)
            return torch.stack(terms).mean(), {'teacher_entropy': entropy(probabilities).mean(),
                                               'mean_entropy': entropy(means[1])}


def entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Compute the entropy in nats, (..., K) -> (...)."""
    return torch.special.entr(probabilities).sum(dim=-1)


def losses_of(ddp_student: nn.Module, teacher: nn.Module, criterion: DinoLoss, temperature: float
              ) -> Callable[[List[torch.Tensor]], Dict[str, torch.Tensor]]:
    """Return a function for engine.train_one_epoch, from the crops of a batch to the loss `dino` and metrics.

    Args:
        ddp_student, teacher: networks that return logits and features, see `dino.networks.MultiCrop`.
        temperature: temperature of the teacher.
    """
    def losses(crops: List[torch.Tensor]) -> Dict[str, torch.Tensor]:
        with torch.no_grad():
            teacher_out, teacher_features = teacher(crops[:GLOBAL])
        student_out, _ = ddp_student(crops)
        loss, metrics = criterion(student_out, teacher_out, temperature)
        return {'dino': loss, **metrics, 'feature_spread': spread(teacher_features)}
    return losses
