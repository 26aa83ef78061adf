"""Report of a classifier: a summary of its accuracy, and the page with its sections."""
import datetime
import json
from pathlib import Path
from typing import List

import datasets
from loaders.samples import PictureSet, picture_of
from loaders.source import Source
from loaders.transforms import View
from reports import drawings, lettering, page, predictions, tables
from reports.page import Section, Tile
from reports.predictions import Predictions
from utils import InputError, counted, decodable, first_line, write_json

SUMMARY = 'summary.json'
# Panels of the curves: label of each metric by its key
CURVES = {'loss': {'train_loss': 'training', 'test_loss': 'evaluation', 'test_ema_loss': 'EMA, evaluation'},
          'Acc@1 in %': {'test_acc1': 'model', 'test_ema_acc1': 'EMA'},
          'learning rate': {'train_lr': 'learning rate'}}
BEST = ('test_acc1', 'test_ema_acc1')  # metrics whose highest value is that of the best epoch
DRAWN = (page.HTML, page.MARKDOWN, drawings.CONFUSION, drawings.MISTAKES)
NUM_PAIRS = 30


def setting(*, model: str, weights: str, source: Source, view: View) -> dict:
    """Return the facts of an evaluation for its summary."""
    data = ' '.join(filter(None, datasets.flags_of(source.name, source.path).values()))
    if source.val_fraction:
        data += f', a held-out fraction of {source.val_fraction:g}'
    return {'model': model, 'weights': weights, 'data': data, 'input_size': view.input_size, 'crop': view.crop}


def write_tables(folder: Path, dataset: PictureSet, predicted: Predictions, facts: dict):
    """Write tables and summary.json to a folder, and remove the page of earlier predictions; `facts`: see `setting`."""
    classes = dataset.class_names()
    tables.write(folder, predicted, classes, dataset.files() or None)
    write_json(folder / SUMMARY, {**facts, **accuracy_of(predicted), 'classes': len(classes), 'date': now()})
    for name in DRAWN:
        (folder / name).unlink(missing_ok=True)


def now() -> str:
    return datetime.datetime.now().astimezone().strftime('%Y-%m-%d %H:%M %z')


def accuracy_of(predicted: Predictions) -> dict:
    """Return the number of images, and top-1 and top-5 accuracy with its 95 % confidence interval, in percent."""
    right, count = predicted.top == predicted.truth[:, None], len(predicted.truth)
    values = {'images': count}
    for name, hits in (('top1', int(right[:, 0].sum())), ('top5', int(right.any(axis=1).sum()))):
        values[name] = 100 * hits / max(count, 1)
        values[f'{name}_interval'] = [100 * end for end in tables.wilson(hits, count)]
    return values


def read_summary(folder: Path) -> dict:
    """Return the content of summary.json, {} if there is none; raise InputError if it can't be read."""
    path = folder / SUMMARY
    try:
        return dict(json.loads(path.read_text(encoding='utf-8'))) if path.exists() else {}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f'{path}: can\'t be read ({first_line(error)})') from None


def draw(run_folder: Path, dataset: PictureSet) -> Path:
    """Draw the pictures of a report and its page, from the tables in a run's folder and its log; return the page."""
    folder = run_folder / tables.FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    rows = predictions.read(folder / predictions.FILE) if (folder / predictions.FILE).exists() else []
    wrong = drawings.mistakes(rows)
    tiles = mistaken(dataset, rows, wrong)
    drawings.draw(folder, run_folder / 'log.txt', tiles, curves=CURVES, best=BEST)
    summary = read_summary(folder)
    sections = [summarized(summary), Section('Curves', 'The dashed line is at the best epoch, by Acc@1 of the model or '
                                             'its EMA.', picture=drawings.CURVES)]
    if rows:
        classes, counts = tables.read_confusion(folder / tables.CONFUSION)
        names = lettering.distinct(classes)
        sections += [per_class(names, counts), confused(names, counts), shown_mistakes(rows, wrong, tiles)]
    page.write(folder, f'Report of {summary.get("model", run_folder.resolve().name)}', sections)
    return folder / page.HTML


def mistaken(dataset: PictureSet, rows: List[dict], wrong: List[int]) -> List[Tile]:
    """Return the pictures of some rows with their texts; none for a stream."""
    load, files = picture_of(dataset), [decodable(str(file)) for file in dataset.files()]

    def picture(index: int):
        if files and files[index:index + 1] != [rows[index]['file']]:  # the tables are of other pictures
            raise InputError(f'{rows[index]["file"]}: not in the data set')
        return load(index)

    return [] if load is None else [drawings.tile(picture, index, rows[index]) for index in wrong]


# ---------------------------------------------------------------------------------------------------------------------
# Sections

def percents(value: float, interval: List[float]) -> str:
    low, high = interval
    return f'{value:.2f} % (95 % confidence interval: {low:.1f} to {high:.1f} %)'


def summarized(summary: dict) -> Section:
    if not summary:
        return Section('Summary')
    facts = {'top-1': percents(summary['top1'], summary['top1_interval']),
             'top-5': percents(summary['top5'], summary['top5_interval'])}
    if summary['classes'] <= predictions.TOP:
        facts['top-5'] = f'{summary["top5"]:.2f} %, because there are only {counted(summary["classes"], "class")}'
    facts.update({
        'pictures': f'{summary["images"]} at {summary["input_size"]} pixels, crop {summary["crop"]:g}',
        'classes': str(summary['classes']), 'data': lettering.visible(summary['data']), 'model': summary['model'],
        'weights': lettering.visible(summary['weights']), 'date of the evaluation': summary['date']})
    text = ('The confidence intervals (Wilson) are for new pictures of the same kind. They are too narrow if the '
            'pictures resemble each other, such as frames of a video.')
    return Section('Summary', text, facts=facts)


def per_class(names: List[str], counts) -> Section:
    """Return the metrics of each class, the lowest recall first, without classes that have no pictures."""
    metrics = tables.metrics_of_classes(counts)
    order = sorted((i for i, (*_, support) in enumerate(metrics) if support),
                   key=lambda i: (metrics[i][1], -metrics[i][3]))
    rows = []
    for i in order:
        precision, recall, f1, support = metrics[i]
        low, high = tables.wilson(int(counts[i, i]), support)
        rows.append((names[i], f'{100 * recall:.1f} %', f'{100 * low:.0f} to {100 * high:.0f} %',
                     f'{100 * precision:.1f} %', f'{f1:.3f}', str(support)))
    text = ('Lowest recall first. Recall is the part of the class that is recognised; precision is the part of the '
            'predictions of the class that is right.')
    if len(order) < len(names):
        text += f' {len(names) - len(order)} of {len(names)} classes have no pictures and are left out.'
    header = ('class', 'recall', '95 % interval of recall', 'precision', 'F1', 'pictures')
    return Section('Classes', text, header=header, rows=rows)


def confused(names: List[str], counts) -> Section:
    """Return the confusion matrix with the most confused pairs."""
    totals = counts.sum(axis=1)
    pairs = tables.most_confused(counts, NUM_PAIRS)
    rows = [(names[i], names[j], str(count), f'{100 * count / totals[i]:.1f} %') for i, j, count in pairs]
    text = f'The table has the {len(rows)} most confused pairs.' if rows else 'No picture is confused.'
    if len(names) > drawings.MOST_CLASSES:
        text = (f'The matrix has the most confused of {counted(len(names), "class")}; its last column adds up the '
                f'predictions of all other classes. {tables.CONFUSION} has all classes. {text}')
    return Section('Confusion', text, picture=drawings.CONFUSION, rows=rows, texts=2,
                   header=('true class', 'predicted class', 'pictures', 'percent of the true class'))


def shown_mistakes(rows: List[dict], wrong: List[int], tiles: List[Tile]) -> Section:
    """Return the mistakes with the highest probability of the wrong class."""
    count = sum(row['class_1'] != row['truth'] for row in rows)
    text = (f'{len(wrong)} of {count} mistakes: those with the highest probability of the wrong class.' if count else
            'There are no mistakes.')
    cells = [(lettering.visible(rows[i]['file']), lettering.visible(rows[i]['truth']),
              lettering.visible(rows[i]['class_1']), f'{100 * rows[i]["probability_1"]:.1f} %') for i in wrong]
    return Section('Most confident mistakes', text, picture=drawings.MISTAKES, tiles=tiles, rows=cells, texts=3,
                   header=('file', 'true class', 'predicted class', 'probability'))
