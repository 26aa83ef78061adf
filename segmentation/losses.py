"""Losses of segmentation, of logits at any size against labels at the size of the image."""
from typing import Dict, Optional

import torch
import torch.nn.functional as F

IGNORED = 255  # label of pixels without a class
AUXILIARY_WEIGHT = .4


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the mean cross-entropy of logits (B, K, height, width) against labels (B, img_h, img_w)."""
    logits = F.interpolate(logits, size=labels.shape[-2:], mode='bilinear', align_corners=False)
    losses = F.cross_entropy(logits.float(), labels.long(), ignore_index=IGNORED, reduction='none')
    # faithful: the mean is over all pixels, the ignored ones too (mmseg 0.11 models/losses/cross_entropy_loss.py)
    return losses.mean()


def segmentation_losses(logits: torch.Tensor, auxiliary: Optional[torch.Tensor], labels: torch.Tensor
                        ) -> Dict[str, torch.Tensor]:
    """Compute the weighted losses by name, to be added up.

    Args:
        logits: (B, K, height, width).
        auxiliary: logits of the auxiliary head; None: there is none.
        labels: (B, img_h, img_w), integers; IGNORED: no class.
    """
    losses = {'loss_seg': cross_entropy(logits, labels)}
    if auxiliary is not None:
        losses['loss_aux'] = AUXILIARY_WEIGHT * cross_entropy(auxiliary, labels)
    return losses
