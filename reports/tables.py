"""Tables of a report: predictions, metrics of each class, and the confusion matrix."""
import math
from pathlib import Path
from typing import List, Optional, Tuple

import numpy as np

from reports import predictions
from utils import InputError, first_line, read_csv, write_csv

FOLDER = 'report'  # name in a run's folder
PER_CLASS, CONFUSION = 'per_class.csv', 'confusion.csv'


def metrics_of_classes(counts: np.ndarray) -> List[Tuple[float, float, float, int]]:
    """Return (precision, recall, F1, support) of each class from a confusion matrix; 0 instead of a division by 0."""
    right, support, predicted = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    precision = right / np.maximum(predicted, 1)
    recall = right / np.maximum(support, 1)
    f1 = 2 * right / np.maximum(predicted + support, 1)
    return list(zip(precision.tolist(), recall.tolist(), f1.tolist(), support.tolist()))


def write(folder: Path, predicted: predictions.Predictions, classes: List[str], files: Optional[List[str]]):
    """Write all three tables to a folder, which is made if needed.

    Args:
        classes: names of the classes 0, 1, ...
        files: files of the images; None if the images have no files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    predictions.write(folder / predictions.FILE, predicted, classes, files)
    counts = predictions.confusion(predicted, len(classes))
    write_csv(folder / PER_CLASS, [
        ['class', 'precision', 'recall', 'f1', 'support'],
        *([name, *(f'{metric:.4f}' for metric in metrics), support]
          for name, (*metrics, support) in zip(classes, metrics_of_classes(counts)))])
    rows = [[name, *row] for name, row in zip(classes, counts.tolist())]
    write_csv(folder / CONFUSION, [['truth', *classes], *rows])


def read_confusion(path: Path) -> Tuple[List[str], np.ndarray]:
    """Return the class names and the counts (K, K) of a confusion matrix; raise InputError if the file is invalid."""
    try:
        header, *rows = read_csv(path)
        counts = np.array([list(map(int, row[1:])) for row in rows], np.int64)
        if counts.shape != (len(header) - 1,) * 2:
            raise ValueError(f'{len(rows)} rows of {len(header) - 1} classes')
        return header[1:], counts
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f'{path}: not a confusion matrix ({first_line(error)})') from None


def most_confused(counts: np.ndarray, most: int) -> List[Tuple[int, int, int]]:
    """Return (class, predicted class, number of images) of the most confused pairs."""
    wrong = counts * (1 - np.eye(len(counts), dtype=np.int64))
    pairs = np.argsort(-wrong, axis=None, kind='stable')[:most]
    return [(int(i), int(j), int(wrong[i, j])) for i, j in zip(*np.unravel_index(pairs, wrong.shape)) if wrong[i, j]]


def most_confused_classes(counts: np.ndarray, most: int) -> List[int]:
    """Return up to `most` classes of the most confused pairs, in the order of the pairs."""
    chosen = []
    for i, j, _ in most_confused(counts, most * most):
        new = {i, j} - set(chosen)
        if len(chosen) + len(new) > most:
            break
        chosen += sorted(new)
    return chosen or list(range(min(most, len(counts))))


def part_of(counts: np.ndarray, classes: List[int]) -> np.ndarray:
    """Return the rows and columns of some classes, and a last column with the sum of all others: (n, n + 1)."""
    rows = counts[classes]
    return np.concatenate([rows[:, classes], np.delete(rows, classes, axis=1).sum(axis=1, keepdims=True)], axis=1)


def wilson(hits: int, count: int) -> Tuple[float, float]:
    """Return the 95 % confidence interval of a proportion, of `count` independent trials, as fractions.

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.
    """
    if not count:
        return 0., 1.
    z, p = 1.959964, hits / count
    center, spread = p + z * z / (2 * count), z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    low, high = ((center + sign * spread) / (1 + z * z / count) for sign in (-1, 1))
    return max(0., low) if hits else 0., min(1., high) if hits < count else 1.
