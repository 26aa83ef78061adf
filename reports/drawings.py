"""Pictures of a report: confusion matrix, curves of a run, and the worst mistakes."""
import contextlib
import json
from pathlib import Path
from typing import Callable, Dict, Optional

from PIL import Image, ImageDraw, ImageFont

from reports import maps, predictions, tables
from run.output import log
from utils import first_line, whole_file

CONFUSION, CURVES, MISTAKES = 'confusion.png', 'curves.png', 'mistakes.png'
MOST_CLASSES = 50  # largest number of classes of a matrix; for more classes, the most confused pairs are shown
NUM_PAIRS, NUM_MISTAKES = 30, 24
COLUMNS, SIDE, LINE = 6, 176, 14  # columns of the sheet of mistakes, and sizes of a picture and a line in pixels
Curves = Dict[str, Dict[str, str]]  # for each panel by its title: label of each curve by its key in log.txt


def draw(folder: Path, log_file: Path, picture: Optional[Callable[[int], Image.Image]], *, curves: Curves,
         unit: str = 'epoch'):
    """Draw the pictures of the tables in `folder` and of a run's log.txt, as far as these exist.

    Args:
        picture: function from an index to the evaluation image; None: no sheet of mistakes.
        unit: key of the horizontal axis in log.txt.
    """
    if picture is not None and (folder / predictions.FILE).exists():
        draw_mistakes(folder, picture)
    try:
        import matplotlib
        matplotlib.use('agg')
        import matplotlib.pyplot
    except Exception as error:  # not installed, or built for another NumPy
        needed = f'matplotlib (pip install matplotlib; {first_line(error)})'
        log(f'{folder}: without {CONFUSION} and {CURVES}, which need {needed}')
        return
    if (folder / tables.CONFUSION).exists():
        draw_confusion(folder)
    if log_file.exists():
        draw_curves(log_file, folder / CURVES, curves=curves, unit=unit)


def save(figure, path: Path):
    from matplotlib import pyplot
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=120)
    pyplot.close(figure)


def draw_confusion(folder: Path):
    """Draw the confusion matrix, with rows as fractions; for many classes, bars of the most confused pairs."""
    from matplotlib import pyplot
    classes, counts = tables.read_confusion(folder / tables.CONFUSION)
    classes = [name.replace('$', r'\$') for name in classes]  # matplotlib would read $ as mathematics
    if len(classes) > MOST_CLASSES:
        pairs = tables.most_confused(counts, NUM_PAIRS)
        figure, axes = pyplot.subplots(figsize=(9, 2 + .28 * len(pairs)), layout='constrained')
        axes.barh([f'{classes[i]} as {classes[j]}' for i, j, _ in pairs], [count for *_, count in pairs])
        axes.invert_yaxis()
        axes.set_xlabel('pictures')
        axes.set_title(f'{len(pairs)} most confused pairs of classes')
    else:
        side = 3 + .3 * len(classes)
        figure, axes = pyplot.subplots(figsize=(side + 1, side), layout='constrained')
        shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
        figure.colorbar(axes.imshow(shares, cmap='Blues', vmin=0, vmax=1), label='share of the class')
        places = range(len(classes))
        axes.set_xticks(places, classes, rotation=90)
        axes.set_yticks(places, classes)
        axes.set_xlabel('prediction')
        axes.set_ylabel('truth')
        for i, j in [(i, j) for i in places for j in places if counts[i, j] and len(classes) <= MOST_CLASSES // 2]:
            axes.text(j, i, counts[i, j], ha='center', va='center', fontsize=7,
                      color='white' if shares[i, j] > .5 else 'black')
    save(figure, folder / CONFUSION)


def draw_curves(log_file: Path, path: Path, *, curves: Curves, unit: str):
    """Draw metrics of log.txt, without lines that are cut short, over the epochs or another unit; see `draw`."""
    from matplotlib import pyplot
    lines = []
    for line in log_file.read_text(errors='replace').splitlines():
        with contextlib.suppress(ValueError, TypeError):
            lines.append(dict(json.loads(line)))
    size = (13 / 3 * len(curves), 4)
    figure, axes = pyplot.subplots(1, len(curves), figsize=size, layout='constrained', squeeze=False)
    for axis, (title, labels) in zip(axes[0], curves.items()):
        for key, label in labels.items():
            points = [(line.get(unit, i), line[key]) for i, line in enumerate(lines)
                      if isinstance(line.get(key), (int, float))]
            if points:
                axis.plot(*zip(*points), label=label, marker='.' if len(points) < 40 else None)
        axis.set_title(title)
        axis.set_xlabel(unit)
        if len(labels) > 1 and axis.lines:
            axis.legend()
    save(figure, path)


def draw_mistakes(folder: Path, picture: Callable[[int], Image.Image]):
    """Draw a sheet of the pictures whose wrong class has the highest probability, with their names."""
    rows = predictions.read(folder / predictions.FILE)
    wrong = sorted((i for i, row in enumerate(rows) if row['class_1'] != row['truth']),
                   key=lambda i: -rows[i]['probability_1'])[:NUM_MISTAKES]
    if not wrong:
        (folder / MISTAKES).unlink(missing_ok=True)
        log(f'{folder}: no mistakes')
        return
    sheet = maps.side_by_side([tile(picture(i), rows[i]) for i in wrong], gap=0, columns=COLUMNS)
    with whole_file(folder / MISTAKES) as unfinished:
        sheet.save(unfinished)


def tile(image: Image.Image, row: dict) -> Image.Image:
    """Draw an image above its file name, its class and its predicted class; `row`: see `predictions.read`."""
    page = Image.new('RGB', (SIDE + 8, SIDE + 3 * LINE + 8), 'white')
    scale = SIDE / max(image.size)
    font = ImageFont.load_default()
    page.paste(image.resize([max(1, round(side * scale)) for side in image.size]), (4, 4))
    name = f'image {row["file"]}' if row['file'].isdecimal() else Path(row['file']).name
    texts = (name, f'is {row["truth"]}', f'{100 * row["probability_1"]:.0f} % {row["class_1"]}')
    for line, text in enumerate(texts):
        ImageDraw.Draw(page).text((4, 4 + SIDE + line * LINE), shortened(text, font), fill='black', font=font)
    return page


def shortened(text: str, font: ImageFont.ImageFont) -> str:
    """Cut a text to the width of a picture, and replace letters that the font lacks by question marks."""
    text, end = text.encode('latin-1', 'replace').decode('latin-1'), ''
    while font.getlength(text + end) > SIDE:
        text, end = text[:-1], '...'
    return text + end
