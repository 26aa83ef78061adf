"""Predictions of a classifier for each image of an evaluation, gathered from all processes."""
from pathlib import Path
from typing import List, Optional

import numpy as np
import torch

from run import processes
from utils import InputError, first_line, read_csv, write_csv

TOP = 5  # number of most probable classes that are kept for each image
FILE = 'predictions.csv'


class Predictions:
    """Collector of the most probable classes of every image, for `engine.evaluate`.

    Attributes, after `gather`, on every process, in the order of the data set:
        truth: class indices (n,).
        top: indices (n, 5) of the most probable classes, in descending order; fewer columns for fewer classes.
        probability: probabilities (n, 5) of `top`.
    """

    def __init__(self):
        self.batches = []

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor):
        """Add a batch: logits (B, K) and class indices (B,)."""
        top = logits.float().softmax(dim=1).topk(min(TOP, logits.shape[1]))
        self.batches.append(torch.cat([targets[:, None].float(), top.indices.float(), top.values], dim=1).cpu())

    def gather(self, loader):
        """Gather the batches of all processes, which come from a loader of `loaders.batches`."""
        rows = torch.cat(self.batches).double() if self.batches else torch.zeros(0, 1 + 2 * TOP, dtype=torch.float64)
        if loader.shares_images and processes.get_world_size() > 1:
            rows = processes.gather_rows(rows, in_turn=loader.counts_batches)
        kept = (rows.shape[1] - 1) // 2
        self.truth = rows[:, 0].long().numpy()
        self.top, self.probability = rows[:, 1:1 + kept].long().numpy(), rows[:, 1 + kept:].numpy()


def write(path: Path, predictions: Predictions, classes: List[str], files: Optional[List[str]]):
    """Write a table of the images: file (or number), class, and most probable classes with their probabilities."""
    ranks = range(1, predictions.top.shape[1] + 1)
    rows = [['file', 'truth', *(f'{kind}_{i}' for i in ranks for kind in ('class', 'probability'))]]
    for i, (truth, top, probability) in enumerate(zip(predictions.truth, predictions.top, predictions.probability)):
        rows.append([files[i] if files else i, classes[truth],
                     *(cell for index, p in zip(top, probability) for cell in (classes[index], f'{p:.6f}'))])
    write_csv(path, rows)


def read(path: Path) -> List[dict]:
    """Return the rows of a table that `write` has written; raise InputError if the file can't be read."""
    try:
        header, *rows = read_csv(path)
        rows = [dict(zip(header, row)) for row in rows]
        return [{**row, 'probability_1': float(row['probability_1']), 'truth': row['truth'], 'class_1': row['class_1']}
                for row in rows]
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = f'{type(error).__name__}: {first_line(error)}'
        raise InputError(f'{path}: not a table of predictions ({reason})') from None


def confusion(predictions: Predictions, num_classes: int) -> np.ndarray:
    """Count the images of class i that are predicted as class j: (K, K)."""
    counts = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(counts, (predictions.truth, predictions.top[:, 0]), 1)
    return counts
