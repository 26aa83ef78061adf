"""Classification by nearest neighbours among the features of labelled images.

Shapes: `n` training features, `m` test features, `C` channels, `K` classes.

Source: original eval_knn.py, knn_classifier.
"""
from typing import Dict, Sequence, Tuple

import torch
import torch.nn.functional as F

from dino.features import Features
from run import processes
from utils import InputError

TEST_BLOCK, TRAIN_BLOCK = 256, 2 ** 16  # features that are compared with each other at a time
TOP = 5
CPU = torch.device('cpu')


def accuracies(train: torch.Tensor, train_labels: torch.Tensor, test: torch.Tensor, test_labels: torch.Tensor, *,
               ks: Sequence[int], temperature: float, num_classes: int, device: torch.device = CPU
               ) -> Dict[int, Tuple[int, int]]:
    """How many test features get their class, and how many have it among the first five.

    Args:
        train, test: (n, C) and (m, C), of any length.
        train_labels, test_labels: (n,) and (m,) class indices.
        ks: numbers of neighbours, each at most n.
        num_classes: K.
        device: that is to compare the features; the training ones are there once.

    Returns:
        By k: right, and right among min(5, k).
    """
    unit, hits = torch.empty(train.shape, device=device), {k: [0, 0] for k in ks}
    for rows, place in zip(train.split(TRAIN_BLOCK), unit.split(TRAIN_BLOCK)):
        place.copy_(F.normalize(rows.float(), dim=1))
    for rows, labels in zip(test.split(TEST_BLOCK), test_labels.split(TEST_BLOCK)):
        similarities, places = (found.cpu() for found in nearest(
            unit, F.normalize(rows.to(device).float(), dim=1), max(ks)))
        # Relative to the largest, which leaves the order as it is, and no temperature makes infinite
        votes = ((similarities - similarities[:, :1]).double() / temperature).exp()
        for k in ks:
            ranked = rank(votes[:, :k], train_labels[places[:, :k]], num_classes)[:, :min(TOP, k)]
            right = ranked == labels[:, None]
            hits[k][0] += int(right[:, 0].sum())
            hits[k][1] += int(right.sum())
    return {k: tuple(counts) for k, counts in hits.items()}


def nearest(train: torch.Tensor, rows: torch.Tensor, k: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """The k training features nearest to each row; of those that are equally near, the first ones.

    Args:
        train: (n, C), of length 1.
        rows: (b, C), likewise.

    Returns:
        Similarities (b, k), the largest first, and places in `train` (b, k).
    """
    best, places = [], []
    for first in range(0, len(train), TRAIN_BLOCK):
        similarities = rows @ train[first:first + TRAIN_BLOCK].t()
        values, where = first_largest(similarities, min(k, similarities.shape[1]))
        best, places = [*best, values], [*places, where + first]
        if len(best) > 1:
            values, where = first_largest(torch.cat(best, dim=1), min(k, sum(part.shape[1] for part in best)))
            best, places = [values], [torch.cat(places, dim=1).gather(1, where)]
    return best[0], places[0]


def first_largest(values: torch.Tensor, k: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """The k largest in each row (b, n) and their places; of equal ones the first, which topk does not promise."""
    found, places = values.topk(min(k + 1, values.shape[1]), dim=1)
    tied = (found[:, 1:] == found[:, :-1]).any(dim=1)
    if bool(tied.any()):
        again, where = values[tied].sort(dim=1, descending=True, stable=True)
        found[tied], places[tied] = again[:, :found.shape[1]], where[:, :found.shape[1]]
    return found[:, :k], places[:, :k]


def rank(votes: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Classes by the sum of their votes, the largest first; of equal sums the lower class.

    Args:
        votes, labels: (b, k), of each neighbour.

    Returns:
        (b, K) class indices.
    """
    # differs: nearest neighbours - of classes with equal votes, as those without any, the lower one comes first; in
    # the original their order is that of an unstable sort
    sums = torch.zeros(len(votes), num_classes, dtype=votes.dtype).scatter_add_(1, labels, votes)
    return sums.sort(dim=1, descending=True, stable=True)[1]


def classify(train: Features, test: Features, *, ks: Sequence[int], temperature: float, device: torch.device
             ) -> Dict[int, Tuple[float, float]]:
    """Top-1 and top-5 in percent by k; each process compares its share of the test features.

    Raises:
        InputError: a number of neighbours is above that of the training images.
    """
    check(ks, len(train))
    mine = slice(processes.get_rank(), None, processes.get_world_size())
    hits = accuracies(train.features, train.labels, test.features[mine], test.labels[mine], ks=ks,
                      temperature=temperature, num_classes=len(train.classes), device=device)
    counts = processes.reduce_over_processes(torch.tensor([hits[k] for k in ks]))
    return {k: tuple((100 * row / len(test)).tolist()) for k, row in zip(ks, counts.double())}


def check(ks: Sequence[int], images: int):
    """Refuse more neighbours than there are training images.

    Raises:
        InputError: so it is.
    """
    if max(ks) > images:
        raise InputError(f'--nb-knn {" ".join(map(str, ks))}: there are {images} training images, less than {max(ks)} '
                         f'neighbours')


def line(k: int, top1: float, top5: float) -> str:
    """A result as the original prints it (eval_knn.py)."""
    return f'{k}-NN classifier result: Top1: {top1}, Top5: {top5}'
