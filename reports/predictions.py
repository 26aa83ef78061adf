"""What a classifier predicted for each image of an evaluation, of all processes together."""
import csv
import io
from pathlib import Path
from typing import List, Optional

import numpy as np
import torch

from run import processes
from utils import InputError, first_line, write_text

TOP = 5  # classes that are kept for each image
FILE = 'predictions.csv'


class Predictions:
    """Collects the most probable classes of every image; for `engine.evaluate`.

    After `gather`, on every process and in the order of the data set:

    Attributes:
        truth: (n,) class indices.
        top: (n, 5) class indices, the most probable first; fewer where there are fewer classes.
        probability: (n, 5) of them.
    """

    def __init__(self):
        self.batches = []

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor):
        """Note a batch: logits (B, K) and class indices (B,)."""
        top = logits.float().softmax(dim=1).topk(min(TOP, logits.shape[1]))
        self.batches.append(torch.cat([targets[:, None].float(), top.indices.float(), top.values], dim=1).cpu())

    def gather(self, loader):
        """Put together what the processes have got from a loader of `loaders.batches`."""
        rows = torch.cat(self.batches).double() if self.batches else torch.zeros(0, 1 + 2 * TOP, dtype=torch.float64)
        if loader.shares_images and processes.get_world_size() > 1:
            rows = processes.gather_rows(rows, in_turn=loader.counts_batches)
        kept = (rows.shape[1] - 1) // 2
        self.truth = rows[:, 0].long().numpy()
        self.top, self.probability = rows[:, 1:1 + kept].long().numpy(), rows[:, 1 + kept:].numpy()

    def __len__(self) -> int:
        return len(self.truth)


def write(path: Path, predictions: Predictions, classes: List[str], files: Optional[List[str]]):
    """predictions.csv: of each image its file (or number), its class, and the most probable classes."""
    kept = predictions.top.shape[1]
    text = io.StringIO()
    table = csv.writer(text, lineterminator='\n')
    table.writerow(['file', 'truth', *(f'{what}_{i + 1}' for i in range(kept) for what in ('class', 'probability'))])
    for i in range(len(predictions)):
        pairs = zip(predictions.top[i], predictions.probability[i])
        table.writerow([files[i] if files else i, classes[predictions.truth[i]],
                        *(word for index, p in pairs for word in (classes[index], f'{p:.6f}'))])
    write_text(path, text.getvalue())


def read(path: Path) -> List[dict]:
    """The rows of predictions.csv; raises InputError where they can't be read."""
    try:
        with open(path, newline='') as file:
            rows = list(csv.DictReader(file))
        return [{**row, 'probability_1': float(row['probability_1']), 'truth': row['truth'], 'class_1': row['class_1']}
                for row in rows]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f'{path}: is not a table of predictions ({type(error).__name__}: {first_line(error)})'
                         ) from None


def confusion(predictions: Predictions, num_classes: int) -> np.ndarray:
    """(K, K) counts: of the images of class i, how many are taken for class j."""
    counts = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(counts, (predictions.truth, predictions.top[:, 0]), 1)
    return counts
