"""Training loss: classification, and distillation from a teacher.

Source: DeiT (https://arxiv.org/abs/2012.12877) section 4; original losses.py and main.py.
"""
from typing import Optional, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

DISTILLATION_TYPES = ('none', 'soft', 'hard')


def classification_loss(*, soft_targets: bool, smoothing: float) -> nn.Module:
    """Return the criterion for class indices (B,), or for probabilities (B, K), which mixup has already smoothed."""
    if soft_targets:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()


class AdaptedTeacher(nn.Module):
    """Teacher whose input gets the normalisation and size that the teacher was trained with.

    Args:
        student: mean and standard deviation of each channel in the normalisation of the images.
        own: mean and standard deviation of each channel in the teacher's training.
        size: (img_h, img_w) after resizing; None: the images are not resized.
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
    """Weighted sum of a classification loss and the distance to the teacher output.

    Args:
        base_criterion: function of (logits, targets).
        teacher: model in eval mode; None with type 'none'.
        distillation_type: 'none', 'soft' (KL divergence of softened predictions) or 'hard' (the teacher's class).
        alpha: weight of the distillation term, fraction.
        tau: softening temperature of type 'soft'.
    """

    def __init__(self, base_criterion: nn.Module, teacher: Optional[nn.Module] = None,
                 distillation_type: str = 'none', *, alpha: float = .5, tau: float = 1.):
        super().__init__()
        if distillation_type not in DISTILLATION_TYPES:
            raise ValueError(f'distillation_type {distillation_type!r} is not one of {DISTILLATION_TYPES}')
        self.base_criterion, self.teacher = base_criterion, teacher
        self.distillation_type, self.alpha, self.tau = distillation_type, alpha, tau

    def forward(self, images: torch.Tensor, outputs: Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]],
                targets: torch.Tensor) -> torch.Tensor:
        """Compute the scalar loss.

        Args:
            images: input of the teacher (B, 3, img_h, img_w).
            outputs: logits (B, K), or a pair of logits if the model has a second head for distillation.
            targets: targets (B,) or (B, K) of the base criterion.
        """
        # faithful: XCiT has no distillation token: both terms use its single output (original xcit.py, XCiT.forward)
        outputs, outputs_kd = (outputs, outputs) if isinstance(outputs, torch.Tensor) else outputs
        loss = self.base_criterion(outputs, targets)
        if self.distillation_type == 'none':
            return loss
        with torch.no_grad():
            teacher_outputs = self.teacher(images)
        if self.distillation_type == 'soft':
            # faithful: averaged over B * K, not over B (original losses.py, DistillationLoss)
            student, teacher = (F.log_softmax(logits / self.tau, dim=1) for logits in (outputs_kd, teacher_outputs))
            divergence = F.kl_div(student, teacher, reduction='sum', log_target=True)
            distillation = divergence * self.tau ** 2 / student.numel()
        else:
            distillation = F.cross_entropy(outputs_kd, teacher_outputs.argmax(dim=1))
        return loss * (1 - self.alpha) + distillation * self.alpha
