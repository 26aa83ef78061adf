"""The training loss: classification, and distillation from a teacher.

Source: DeiT (https://arxiv.org/abs/2012.12877) section 4; original losses.py and main.py.
"""
from typing import Optional, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

DISTILLATION_TYPES = ('none', 'soft', 'hard')


def classification_loss(*, soft_targets: bool, smoothing: float) -> nn.Module:
    """The criterion for class indices (B,), or for probabilities (B, K), which are smoothed where they are made."""
    if soft_targets:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()


class TeacherOfOtherImages(nn.Module):
    """A teacher that sees the student's images as it is used to: normalised its own way, and at a size of its own.

    Args:
        teacher: the model.
        student: the mean and the standard deviation of each channel by which the images come normalised.
        own: those that the teacher was trained with.
        size: (img_h, img_w) that they are resized to; None: as they come.
    """

    def __init__(self, teacher: nn.Module, *, student: Tuple[tuple, tuple], own: Tuple[tuple, tuple],
                 size: Optional[Tuple[int, int]] = None):
        super().__init__()
        self.teacher, self.size = teacher, size
        (mean, std), (own_mean, own_std) = (map(torch.tensor, pair) for pair in (student, own))
        self.register_buffer('scale', (std / own_std)[:, None, None])
        self.register_buffer('shift', ((mean - own_mean) / own_std)[:, None, None])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = images * self.scale + self.shift
        if self.size is not None:
            images = F.interpolate(images, self.size, mode='bicubic', antialias=True)
        return self.teacher(images)


class DistillationLoss(nn.Module):
    """Weighted sum of a classification loss and of the distance to a teacher's prediction.

    Args:
        base_criterion: loss of (logits, targets).
        teacher: a model in eval mode; None with type 'none'.
        distillation_type: 'none', 'soft' (KL divergence of softened predictions) or 'hard' (the teacher's class).
        alpha: weight of the distillation term, fraction.
        tau: softening temperature of type 'soft'.
    """

    def __init__(self, base_criterion: nn.Module, teacher: Optional[nn.Module] = None,
                 distillation_type: str = 'none', *, alpha: float = .5, tau: float = 1.):
        super().__init__()
        if distillation_type not in DISTILLATION_TYPES:
            raise ValueError(f'distillation_type {distillation_type!r} is not one of {DISTILLATION_TYPES}')
        self.base_criterion = base_criterion
        self.teacher = teacher
        self.distillation_type = distillation_type
        self.alpha = alpha
        self.tau = tau

    def forward(self, images: torch.Tensor, outputs: Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]],
                targets: torch.Tensor) -> torch.Tensor:
        """Scalar loss.

        Args:
            images: (B, 3, img_h, img_w), what the teacher sees.
            outputs: logits (B, K), or a pair where the model has a second head for distillation.
            targets: (B,) or (B, K), as the base criterion takes them.
        """
        # faithful: XCiT has no distillation token, its one output feeds both terms (original xcit.py, XCiT.forward)
        outputs, outputs_kd = (outputs, outputs) if isinstance(outputs, torch.Tensor) else outputs
        loss = self.base_criterion(outputs, targets)
        if self.distillation_type == 'none':
            return loss
        with torch.no_grad():
            teacher_outputs = self.teacher(images)
        if self.distillation_type == 'soft':
            # faithful: averaged over B * K, not over B (original losses.py, DistillationLoss)
            distillation = F.kl_div(
                F.log_softmax(outputs_kd / self.tau, dim=1), F.log_softmax(teacher_outputs / self.tau, dim=1),
                reduction='sum', log_target=True) * self.tau ** 2 / outputs_kd.numel()
        else:
            distillation = F.cross_entropy(outputs_kd, teacher_outputs.argmax(dim=1))
        return loss * (1 - self.alpha) + distillation * self.alpha
