"""Pictures of a report: confusion matrix, curves of a run, and the worst mistakes."""
import contextlib
import json
import math
import textwrap
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
from PIL import Image

from reports import lettering, maps, tables
from reports.page import Tile
from run.output import log
from utils import InputError, counted, first_line, whole_file

CONFUSION, CURVES, MISTAKES = 'confusion.png', 'curves.png', 'mistakes.png'
MOST_CLASSES = 50  # largest number of classes of a whole matrix; of more classes, the most confused are shown
NUM_CONFUSED = 24  # largest number of these classes
OTHERS = 'all others'
NUM_MISTAKES = 24
COLUMNS, SIDE = 6, 176  # columns of the sheet of mistakes, and longer side of a picture in pixels
LONGEST = 32  # characters of a name beside a matrix
Curves = Dict[str, Dict[str, str]]  # for each panel by its title: label of each curve by its key in log.txt


def draw(folder: Path, log_file: Path, tiles: Sequence[Tile], *, curves: Curves, unit: str = 'epoch',
         best: Sequence[str] = (), objects: str = 'pictures'):
    """Draw the pictures of the tables in `folder` and of a run's log.txt, as far as these exist.

    Args:
        tiles: result of `mistakes`.
        unit: key of the horizontal axis in log.txt.
        best: keys of log.txt whose highest value marks the best epoch.
        objects: plural of the objects that the confusion matrix counts.
    """
    if tiles:
        draw_tiles(tiles, folder / MISTAKES)
    else:
        (folder / MISTAKES).unlink(missing_ok=True)
    if error := missing_matplotlib():
        log(f'{folder}: without {CONFUSION} and {CURVES}, which need {error}')
        return
    if (folder / tables.CONFUSION).exists():
        draw_confusion(folder, objects=objects)
    if log_file.exists():
        draw_curves(log_file, folder / CURVES, curves=curves, unit=unit, best=best)


def missing_matplotlib() -> Optional[str]:
    """Return the need for matplotlib as text if it can't be imported, else None."""
    try:
        import matplotlib
        matplotlib.use('agg')
        import matplotlib.pyplot
    except Exception as error:  # not installed, or built for another NumPy
        return f'matplotlib (pip install matplotlib; {first_line(error)})'
    return None


def log_missing():
    """Log the pictures that a report will lack, before a training."""
    if error := missing_matplotlib():
        log(f'The report will be without {CONFUSION} and {CURVES}, which need {error}')


def save(figure, path: Path):
    from matplotlib import pyplot
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=120)
    pyplot.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# Confusion matrix

def draw_confusion(folder: Path, *, objects: str = 'pictures'):
    """Draw the confusion matrix with counts and percents of the rows; for many classes, that of the most confused."""
    classes, counts = tables.read_confusion(folder / tables.CONFUSION)
    names, title = lettering.distinct(classes), f'{counted(len(classes), "class")}'
    if len(classes) > MOST_CLASSES:
        chosen = tables.most_confused_classes(counts, NUM_CONFUSED)
        title = f'the {len(chosen)} most confused of {counted(len(classes), "class")}'
        names, counts = [names[i] for i in chosen], tables.part_of(counts, chosen)
    draw_matrix(folder / CONFUSION, names, counts,
                title=f'Confusion of {title}: {objects}, and percent of the true class (row)', objects=objects)


def draw_matrix(path: Path, names: List[str], counts: np.ndarray, *, title: str,
                objects: str = 'pictures'):
    """Draw counts of true classes (rows) by predicted class; a further column, if any, is of all other classes."""
    from matplotlib import pyplot
    names = lettering.all_abridged(list(map(lettering.drawable, names)), LONGEST)
    labels = list(map(math_free, names))
    columns = labels + [OTHERS] * (counts.shape[1] - len(labels))
    cell, font = (.8, 10) if len(labels) <= 10 else (.48, 8)
    longest = max(map(len, columns)) * .1
    size = (max(5., cell * len(columns) + longest + 2.2), cell * len(labels) + longest + 1.4)
    with pyplot.rc_context({'font.family': lettering.families(labels)}):
        figure, axes = pyplot.subplots(figsize=size, layout='constrained')
        percents = 100 * counts / counts.sum(axis=1, keepdims=True).clip(1)
        image = axes.imshow(percents, cmap='Blues', vmin=0, vmax=100, aspect='auto')
        figure.colorbar(image, label='percent of the true class', shrink=min(1, 6 / size[1]), aspect=20)
        axes.set_xticks(range(len(columns)), columns, rotation=90)
        axes.set_yticks(range(len(labels)), [f'{label} ({total})' for label, total in zip(labels, counts.sum(axis=1))])
        axes.set_xlabel('predicted class')
        axes.set_ylabel(f'true class ({objects})')
        figure.suptitle(textwrap.fill(title, int(9 * size[0])), fontsize=min(18, 9 + size[0] / 2))
        for i, j in [(i, j) for i, j in np.ndindex(counts.shape) if counts[i, j]]:
            axes.text(j, i, f'{counts[i, j]}\n{percent(percents[i, j])}', ha='center', va='center', fontsize=font,
                      color='white' if percents[i, j] > 55 else 'black')
        save(figure, path)


def percent(value: float) -> str:
    """Format a percentage in few characters; 0 and 100 are exact."""
    return '<1%' if 0 < value < 1 else '>99%' if 99 < value < 100 else f'{value:.0f}%'


def math_free(text: str) -> str:
    return text.replace('$', r'\$')  # matplotlib would read $ as mathematics


# ---------------------------------------------------------------------------------------------------------------------
# Curves

def read_log(log_file: Path) -> List[dict]:
    """Return the lines of log.txt, without lines that are cut short."""
    lines = []
    for line in log_file.read_text(encoding='utf-8', errors='replace').splitlines():
        with contextlib.suppress(ValueError, TypeError):
            lines.append(dict(json.loads(line)))
    return lines


def best_point(lines: List[dict], keys: Sequence[str], *, unit: str) -> Optional[Tuple[float, str, float]]:
    """Return (epoch or another unit, key, value) of the highest value; None: no value.

    Of equal values the last counts, and of one epoch the first key, as in `run.parts.Metrics.update_best`.
    """
    points = [(line.get(unit, i), key, line[key]) for i, line in enumerate(lines) for key in reversed(keys)
              if is_number(line, key)]
    return max(reversed(points), key=lambda point: point[2], default=None)


def is_number(line: dict, key: str) -> bool:
    return isinstance(line.get(key), (int, float)) and math.isfinite(line[key])


def draw_curves(log_file: Path, path: Path, *, curves: Curves, unit: str, best: Sequence[str] = ()):
    """Draw metrics of log.txt over the epochs or another unit, with a line at the best epoch; see `draw`."""
    from matplotlib import pyplot
    lines = read_log(log_file)
    marked = best_point(lines, best, unit=unit)
    size = (13 / 3 * len(curves), 4)
    figure, axes = pyplot.subplots(1, len(curves), figsize=size, layout='constrained', squeeze=False)
    for axis, (title, labels) in zip(axes[0], curves.items()):
        for key, label in labels.items():
            points = [(line.get(unit, i), line[key]) for i, line in enumerate(lines) if is_number(line, key)]
            if points:
                axis.plot(*zip(*points), label=label, marker='.' if len(points) < 40 else None)
        axis.set_title(title)
        axis.set_xlabel(unit)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if marked:
            place, key, value = marked
            axis.axvline(place, color='grey', linestyle='--', linewidth=1, label=f'best {unit}: {place}')
            if key in labels:
                axis.plot(place, value, 'o', color='black', fillstyle='none', markersize=9)
        if len(axis.lines) > 1:
            axis.legend()
    save(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes

def mistakes(rows: List[dict]) -> List[int]:
    """Return the numbers of the pictures whose wrong class has the highest probability; see `predictions.read`."""
    wrong = [i for i, row in enumerate(rows) if row['class_1'] != row['truth']]
    return sorted(wrong, key=lambda i: -rows[i]['probability_1'])[:NUM_MISTAKES]


def lines_of(row: dict) -> List[str]:
    """Return the file name, the class and the predicted class of a picture, as visible texts."""
    name = f'image {row["file"]}' if row['file'].isdecimal() else lettering.visible(Path(row['file']).name)
    return [name, f'is {lettering.visible(row["truth"])}',
            f'{100 * row["probability_1"]:.0f} % {lettering.visible(row["class_1"])}']


def tile(picture: Callable[[int], Image.Image], index: int, row: dict) -> Tile:
    """Return the picture of an index, scaled, with its texts; an empty picture if it can't be read any more."""
    try:
        image = picture(index)
        scale = SIDE / max(image.size)
        image = image.convert('RGB').resize([max(1, round(side * scale)) for side in image.size])
    except (InputError, OSError):
        image = Image.new('RGB', (SIDE, SIDE), 'lightgrey')
    return Tile(image, lines_of(row))


def draw_tiles(tiles: Sequence[Tile], path: Path):
    """Draw pictures above their texts on a sheet."""
    pages = []
    for one in tiles:
        picture = Image.new('RGB', (SIDE, one.picture.height), 'white')
        picture.paste(one.picture, (0, 0))
        pages.append(lettering.captioned(picture, one.lines))
    with whole_file(path) as unfinished:
        maps.side_by_side(pages, columns=COLUMNS).save(unfinished)
