"""Classification by nearest neighbours among the features of labelled images.

Shapes: `n` training features, `m` test features, `C` channels, `K` classes.

Source: original eval_knn.py, knn_classifier.
"""
from typing import Dict, List, Sequence, Tuple, Union

import torch
import torch.nn.functional as F

from dino.features import Features
from run import processes
from run.output import log
from utils import InputError, counted

TEST_BLOCK, TRAIN_BLOCK = 256, 2 ** 16  # features in one matrix product
TOP = 5
TEMPERATURE = .07  # of the votes, as in the original


def accuracies(train: torch.Tensor, train_labels: torch.Tensor, test: torch.Tensor, test_labels: torch.Tensor, *,
               ks: Sequence[int], temperature: float, num_classes: int, device: Union[torch.device, str] = 'cpu'
               ) -> Dict[int, Tuple[int, int]]:
    """Count the test features whose class is ranked first, and the test features whose class is among the first five.

    Args:
        train, test: (n, C) and (m, C), of any norm.
        train_labels, test_labels: (n,) and (m,) class indices.
        ks: numbers of neighbours, each at most n.
        num_classes: K.
        device: device of the comparison, which stores the training features once.

    Returns:
        By k: the two counts. Only classes of neighbours are ranked.
    """
    unit, hits = torch.empty(train.shape, device=device), {k: [0, 0] for k in ks}
    for rows, target in zip(train.split(TRAIN_BLOCK), unit.split(TRAIN_BLOCK)):
        target.copy_(F.normalize(rows.float(), dim=1))
    for rows, labels in zip(test.split(TEST_BLOCK), test_labels.split(TEST_BLOCK)):
        rows = F.normalize(rows.to(device).float(), dim=1)
        similarities, indices = (values.cpu() for values in nearest(unit, rows, max(ks)))
        # Relative to the largest similarity: the order is the same, and no temperature makes votes infinite
        votes = ((similarities - similarities[:, :1]).double() / temperature).exp()
        for k in ks:
            ranked = rank(votes[:, :k], train_labels[indices[:, :k]], num_classes)[:, :TOP]
            correct = ranked == labels[:, None]
            hits[k][0] += int(correct[:, 0].sum())
            hits[k][1] += int(correct.sum())
    return {k: tuple(counts) for k, counts in hits.items()}


def nearest(train: torch.Tensor, rows: torch.Tensor, k: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Find the k training features nearest to each row; among equally near features, the first.

    Args:
        train, rows: (n, C) and (b, C), of norm 1.

    Returns:
        Similarities (b, k), the largest first, and indices into `train` (b, k).
    """
    best = indices = None
    for first in range(0, len(train), TRAIN_BLOCK):
        values, columns = first_largest(rows @ train[first:first + TRAIN_BLOCK].t(), k)
        columns += first
        if best is not None:
            values, chosen = first_largest(torch.cat([best, values], dim=1), k)
            columns = torch.cat([indices, columns], dim=1).gather(1, chosen)
        best, indices = values, columns
    return best, indices


def first_largest(values: torch.Tensor, k: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return the k largest values of each row (b, n), or all, and their indices; equal values in their given order."""
    largest, indices = values.topk(min(k + 1, values.shape[1]), dim=1)  # topk alone returns any of several equal values
    tied = (largest[:, 1:] == largest[:, :-1]).any(dim=1)
    if bool(tied.any()):
        ordered, columns = values[tied].sort(dim=1, descending=True, stable=True)
        largest[tied], indices[tied] = ordered[:, :largest.shape[1]], columns[:, :largest.shape[1]]
    return largest[:, :k], indices[:, :k]


def rank(votes: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Rank class indices (b, K) by the sum of the votes (b, k) of the neighbours with `labels` (b, k).

    A class without neighbours is no prediction: -1 is in its place, after all others.
    """
    # differs: nearest neighbours - the original also counts classes without a vote among the first five, and its sort
    # of equal votes is unstable; here the lower index comes first
    sums = torch.full((len(votes), num_classes), -1., dtype=votes.dtype)
    sums, ranked = sums.scatter_(1, labels, 0.).scatter_add_(1, labels, votes).sort(dim=1, descending=True, stable=True)
    return ranked.where(sums >= 0, -1)


def classify(train: Features, test: Features, *, ks: Sequence[int], temperature: float, device: torch.device
             ) -> Dict[int, Tuple[float, float]]:
    """Compute top-1 and top-5 accuracy in percent by k; each process compares its share of the test features."""
    check(ks, len(train))
    share = slice(processes.get_rank(), None, processes.get_world_size())
    hits = accuracies(train.features, train.labels, test.features[share], test.labels[share], ks=ks,
                      temperature=temperature, num_classes=len(train.classes), device=device)
    counts = processes.reduce_over_processes(torch.tensor([hits[k] for k in ks]))
    return {k: tuple((100 * row / len(test)).tolist()) for k, row in zip(ks, counts.double())}


def fitting(ks: List[int], images: int, default: List[int]) -> List[int]:
    """Return the numbers of neighbours for a number of training images: the default is reduced to these, and logged.

    Raises:
        InputError: other numbers than the default exceed the images.
    """
    if ks != default or max(ks) <= images:
        check(ks, images)
        return ks
    fewer = [k for k in ks if k <= images] or [images]
    log(f'--nb-knn {" ".join(map(str, fewer))} is used, because the default, {" ".join(map(str, ks))}, does not fit '
        f'{counted(images, "training image")}')
    return fewer


def check(ks: Sequence[int], images: int):
    """Raise InputError if there are fewer training images than neighbours."""
    if max(ks) > images:
        raise InputError(f'--nb-knn {" ".join(map(str, ks))}: there are {counted(images, "training image")}, less '
                         f'than {max(ks)} neighbours')


def line(k: int, top1: float, top5: float) -> str:
    """Format a result as the original prints it (eval_knn.py)."""
    return f'{k}-NN classifier result: Top1: {top1}, Top5: {top5}'
