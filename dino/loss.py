"""The loss of DINO: what the student says of each crop against what the teacher says of the global ones.

Shapes: `B` images of this process, `K` prototypes (--out-dim).
"""
from typing import Dict, List, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from run.processes import mean_over_processes

GLOBAL = 2  # crops that the teacher sees
STUDENT_TEMPERATURE = .1
CENTRE_MOMENTUM = .9


class DinoLoss(nn.Module):
    """Cross-entropy between the teacher's probabilities and the student's, over all pairs of different crops.

    Args:
        out_dim: K.
        crops: of each image, of which the first two are the teacher's.

    Attributes:
        center: moving average (1, K) of the teacher's logits, over the batches of all processes.

    Source: paper section 3.1; original main_dino.py, DINOLoss.
    """

    def __init__(self, out_dim: int, crops: int):
        super().__init__()
        self.crops = crops
        self.register_buffer('center', torch.zeros(1, out_dim))

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, temperature: float
                ) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        """The loss; moves the centre.

        Args:
            student: logits (crops * B, K), all images of the first crop first.
            teacher: logits (2 * B, K), likewise.
            temperature: of the teacher.

        Returns:
            The loss, and figures without a gradient: `teacher_entropy`, the mean entropy of the teacher's
            probabilities for an image; `mean_entropy`, that of their mean over the batches of all processes.
        """
        # Never in half precision, whatever autocast is: divided by .04, logits have no digits to lose
        with torch.autocast(student.device.type, enabled=False):
            log_p = F.log_softmax(student.float() / STUDENT_TEMPERATURE, dim=-1).chunk(self.crops)
            teacher = teacher.detach().float()
            probabilities = F.softmax((teacher - self.center) / temperature, dim=-1)
            loss = self.cross_entropy(probabilities.chunk(GLOBAL), log_p)
            means = mean_over_processes(torch.stack([teacher.mean(dim=0), probabilities.mean(dim=0)]))
            # After the loss: a batch is centred by those before it
            self.center.lerp_(means[:1], 1 - CENTRE_MOMENTUM)
            return loss, {'teacher_entropy': entropy(probabilities).mean(), 'mean_entropy': entropy(means[1])}

    def cross_entropy(self, probabilities: List[torch.Tensor], log_p: List[torch.Tensor]) -> torch.Tensor:
        """Mean over the pairs of a teacher's crop and another one of the student."""
        terms = [-(q * p).sum(dim=-1).mean() for i, q in enumerate(probabilities) for j, p in enumerate(log_p)
                 if i != j]
        return torch.stack(terms).mean()


def entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """(..., K) -> (...), in nats."""
    return torch.special.entr(probabilities).sum(dim=-1)
