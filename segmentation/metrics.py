"""Metrics of segmentation from one confusion matrix of all pixels of all pictures."""
from typing import Dict, List, Optional

import torch

from run import processes
from segmentation.losses import IGNORED


class Confusion:
    """Confusion matrix (K, K + 1): pixels by true and by predicted class, of all pictures added so far.

    The last column is of predictions without a class, in label pictures of other programs.

    Args:
        num_classes: K.
        device: device of the matrix; None: the CPU.
    """

    def __init__(self, num_classes: int, device: Optional[torch.device] = None):
        self.counts = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64, device=device)

    def add(self, predicted: torch.Tensor, truth: torch.Tensor):
        """Add pixels: classes 0 to K - 1 of equal shape; IGNORED in `truth`: the pixel does not count.

        A predicted IGNORED is wrong: the pixel counts for accuracy and union of the true class.
        """
        K = len(self.counts)
        counts = truth != IGNORED
        pairs = truth[counts].long() * (K + 1) + predicted[counts].long().clamp_max(K)
        self.counts += torch.bincount(pairs, minlength=K * (K + 1)).view(K, K + 1)

    def gather(self):
        """Add up the matrices of all processes, on each."""
        self.counts = processes.reduce_over_processes(self.counts)

    def metrics(self) -> Dict[str, float]:
        """Return mIoU, mAcc and aAcc in percent.

        Classes that are neither in the truth nor predicted do not count. A class that is only predicted has the IoU 0,
        and no accuracy.
        """
        return {'mIoU': mean_of(self.iou()), 'mAcc': mean_of(self.accuracy()), 'aAcc': 100 * float(
            self.counts.diagonal().sum().double() / self.counts.sum().clamp_min(1))}

    def iou(self) -> List[Optional[float]]:
        """Return the intersection over union of each class in percent; None: neither in the truth nor predicted."""
        right = self.counts.diagonal()
        return fractions(right, self.counts.sum(0)[:-1] + self.counts.sum(1) - right)

    def accuracy(self) -> List[Optional[float]]:
        """Return the recall of each class in percent; None: not in the truth."""
        return fractions(self.counts.diagonal(), self.counts.sum(1))

    def rows(self, names: List[str]) -> List[dict]:
        """Return a row for each class: name, IoU and accuracy in percent, true and predicted pixels."""
        values = zip(names, self.iou(), self.accuracy(), self.counts.sum(1).tolist(), self.counts.sum(0).tolist())
        return [dict(name=name, IoU=iou, Acc=accuracy, pixels=pixels, predicted=predicted)
                for name, iou, accuracy, pixels, predicted in values]


def fractions(part: torch.Tensor, whole: torch.Tensor) -> List[Optional[float]]:
    return [100 * p / w if w else None for p, w in zip(part.tolist(), whole.tolist())]


def mean_of(values: List[Optional[float]]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.
