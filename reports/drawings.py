"""The pictures of a report: confusions, the course of a training, and the worst mistakes."""
import json
from pathlib import Path
from typing import Callable, List, Optional

from PIL import Image, ImageDraw, ImageFont

from reports import predictions, tables
from run.processes import notice
from utils import first_line, whole_file

CONFUSION, CURVES, MISTAKES = 'confusion.png', 'curves.png', 'mistakes.png'
MOST_CLASSES = 50  # that a matrix shows; of more, the most confused pairs are shown
NUM_PAIRS, NUM_MISTAKES = 30, 24
COLUMNS, SIDE, LINE = 6, 176, 14  # of the sheet of mistakes, in pictures and pixels


def draw(folder: Path, log: Path, picture: Optional[Callable[[int], Image.Image]]):
    """All pictures that the tables in `folder`, and a log, are there for.

    Args:
        log: log.txt of a training.
        picture: gives the evaluation image of a number, for the sheet; None: there is none.
    """
    if picture is not None and (folder / predictions.FILE).exists():
        draw_mistakes(folder, picture)
    try:
        import matplotlib
        matplotlib.use('agg')
        import matplotlib.pyplot
    except Exception as error:  # not installed, or built for another NumPy
        notice(f'{folder}: without {CONFUSION} and {CURVES}, which need matplotlib (pip install matplotlib; '
               f'{first_line(error)})')
        return
    if (folder / tables.CONFUSION).exists():
        draw_confusion(folder)
    if log.exists():
        draw_curves(log, folder / CURVES)


def save(figure, path: Path):
    from matplotlib import pyplot
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=120)
    pyplot.close(figure)


def draw_confusion(folder: Path):
    """A matrix of shares of each class; of many classes, bars of the pairs that are confused most."""
    from matplotlib import pyplot
    classes, counts = tables.read_confusion(folder / tables.CONFUSION)
    classes = [name.replace('$', r'\$') for name in classes]  # matplotlib would take it for mathematics
    if len(classes) > MOST_CLASSES:
        pairs = tables.most_confused(counts, NUM_PAIRS)
        figure, axes = pyplot.subplots(figsize=(9, 2 + .28 * len(pairs)), layout='constrained')
        axes.barh([f'{classes[i]} as {classes[j]}' for i, j, _ in pairs], [count for *_, count in pairs])
        axes.invert_yaxis()
        axes.set_xlabel('pictures')
        axes.set_title(f'The {len(pairs)} pairs of classes that are confused most')
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


def read_log(path: Path) -> List[dict]:
    """The lines of log.txt; one that was cut short is left out."""
    lines = []
    for line in path.read_text(errors='replace').splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in lines if isinstance(line, dict)]


def draw_curves(log: Path, path: Path):
    """Loss, accuracy and learning rate by epoch."""
    from matplotlib import pyplot
    lines = read_log(log)
    panels = {'loss': {'train_loss': 'training', 'test_loss': 'evaluation', 'test_ema_loss': 'average, evaluation'},
              'Acc@1 in %': {'test_acc1': 'model', 'test_ema_acc1': 'average'},
              'learning rate': {'train_lr': 'learning rate'}}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(13, 4), layout='constrained')
    for axis, (title, curves) in zip(axes, panels.items()):
        for name, label in curves.items():
            points = [(line.get('epoch', i), line[name]) for i, line in enumerate(lines)
                      if isinstance(line.get(name), (int, float))]
            if points:
                axis.plot(*zip(*points), label=label, marker='.' if len(points) < 40 else None)
        axis.set_title(title)
        axis.set_xlabel('epoch')
        if len(curves) > 1 and axis.lines:
            axis.legend()
    save(figure, path)


def draw_mistakes(folder: Path, picture: Callable[[int], Image.Image]):
    """A sheet of the pictures whose wrong class has the highest probability, with their names."""
    rows = predictions.read(folder / predictions.FILE)
    wrong = sorted((i for i, row in enumerate(rows) if row['class_1'] != row['truth']),
                   key=lambda i: -rows[i]['probability_1'])[:NUM_MISTAKES]
    if not wrong:
        (folder / MISTAKES).unlink(missing_ok=True)
        notice(f'{folder}: no mistakes')
        return
    height = SIDE + 3 * LINE + 8
    sheet = Image.new('RGB', (COLUMNS * (SIDE + 8), -(-len(wrong) // COLUMNS) * height), 'white')
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for place, i in enumerate(wrong):
        left, top = place % COLUMNS * (SIDE + 8) + 4, place // COLUMNS * height + 4
        image = picture(i)
        scale = SIDE / max(image.size)
        image = image.resize([max(1, round(side * scale)) for side in image.size])
        sheet.paste(image, (left, top))
        row = rows[i]
        words = (Path(row['file']).name if not row['file'].isdecimal() else f'image {row["file"]}',
                 f'is {row["truth"]}', f'{100 * row["probability_1"]:.0f} % {row["class_1"]}')
        for line, text in enumerate(words):
            draw.text((left, top + SIDE + line * LINE), shortened(draw, font, text), fill='black', font=font)
    with whole_file(folder / MISTAKES) as unfinished:
        sheet.save(unfinished)


def shortened(draw: ImageDraw.ImageDraw, font, text: str) -> str:
    """What of a text fits under a picture; letters that the font does not have become question marks."""
    text = text.encode('latin-1', 'replace').decode('latin-1')
    if draw.textlength(text, font=font) <= SIDE:
        return text
    while draw.textlength(f'{text}...', font=font) > SIDE:
        text = text[:-1]
    return f'{text}...'
