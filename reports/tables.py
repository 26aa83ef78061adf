"""The tables of a report: predictions, figures of each class, and which classes are taken for which."""
import csv
import io
from pathlib import Path
from typing import List, Optional, Tuple

import numpy as np

from reports import predictions
from utils import InputError, first_line, write_text

FOLDER = 'report'  # in a run's folder
PER_CLASS, CONFUSION = 'per_class.csv', 'confusion.csv'


def figures_of_classes(counts: np.ndarray) -> List[Tuple[float, float, float, int]]:
    """(precision, recall, F1, support) of each class; 0 where there is nothing to divide by.

    Args:
        counts: (K, K), of the images of class i, how many are taken for class j.
    """
    right, support, taken = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    precision = right / np.maximum(taken, 1)
    recall = right / np.maximum(support, 1)
    f1 = 2 * right / np.maximum(taken + support, 1)
    return list(zip(precision.tolist(), recall.tolist(), f1.tolist(), support.tolist()))


def write(folder: Path, found: predictions.Predictions, classes: List[str], files: Optional[List[str]]):
    """All three tables; each is whole or as it was before.

    Args:
        folder: made if it is not there.
        found: gathered predictions.
        classes: the names of classes 0, 1, ...
        files: of the images; None where they have no files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    predictions.write(folder / predictions.FILE, found, classes, files)
    counts = predictions.confusion(found, len(classes))
    write_csv(folder / PER_CLASS, ['class', 'precision', 'recall', 'f1', 'support'], [
        [name, *(f'{figure:.4f}' for figure in figures[:3]), figures[3]]
        for name, figures in zip(classes, figures_of_classes(counts))])
    write_csv(folder / CONFUSION, ['truth', *classes], [[name, *row] for name, row in zip(classes, counts.tolist())])


def write_csv(path: Path, header: list, rows: list):
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows([header, *rows])
    write_text(path, text.getvalue())


def read_confusion(path: Path) -> Tuple[List[str], np.ndarray]:
    """The names of the classes, and the counts (K, K), of confusion.csv; raises InputError where it can't be read."""
    try:
        with open(path, newline='') as file:
            header, *rows = csv.reader(file)
        counts = np.array([list(map(int, row[1:])) for row in rows], np.int64)
        if counts.shape != (len(header) - 1,) * 2:
            raise ValueError(f'{len(rows)} rows of {len(header) - 1} classes')
        return header[1:], counts
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f'{path}: is not a table of confusions ({first_line(error)})') from None


def most_confused(counts: np.ndarray, most: int) -> List[Tuple[int, int, int]]:
    """(class, what it is taken for, how often) of the most confused pairs."""
    wrong = counts * (1 - np.eye(len(counts), dtype=np.int64))
    pairs = np.argsort(-wrong, axis=None, kind='stable')[:most]
    return [(int(i), int(j), int(wrong[i, j])) for i, j in zip(*np.unravel_index(pairs, wrong.shape)) if wrong[i, j]]
