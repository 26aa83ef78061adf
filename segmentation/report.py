"""Report of a segmenter: tables of classes and confusions, pictures with truth and prediction, and the page."""
import json
from pathlib import Path
from typing import List

import numpy as np
from PIL import Image

from dense.drawing import overlay
from loaders.pictures import evenly_spread
from reports import drawings, page, tables
from reports.page import Section
from run.folder import CHECKPOINT
from run.logs import write_result
from run.output import log
from run.processes import is_main_process
from run.training import Run
from segmentation import labels
from segmentation.data import LabelledPictures
from segmentation.metrics import Confusion
from segmentation.predictor import Predictor
from utils import InputError, whole_file, write_csv

PICTURES = 'pictures.png'  # in the report
SUMMARY = 'summary.json'
NUM_PICTURES, SIDE, GAP = 6, 320, 8  # pictures of the sheet, their longer side and the gaps in pixels
CURVES = {'loss': {'train_loss': 'training'}, 'mIoU and accuracies in %': {
    'test_mIoU': 'mIoU', 'test_mAcc': 'mean accuracy', 'test_aAcc': 'accuracy of all pixels'},
    'learning rate': {'train_lr': 'learning rate'}}
COLUMNS = ('class', 'IoU %', 'accuracy %', 'pixels', 'predicted pixels')


def log_result(stats: dict):
    """Log the metrics, and the classes that do not occur."""
    log(f'* mIoU {stats["mIoU"]:.2f} mAcc {stats["mAcc"]:.2f} aAcc {stats["aAcc"]:.2f}')
    absent = [row['name'] for row in stats['classes'] if not row['pixels']]
    if absent:
        log(f'{len(absent)} of {len(stats["classes"])} classes are not in the labels: {", ".join(absent[:8])}'
            + ', ...' * (len(absent) > 8))


def after_round(run: Run, predictor: Predictor, dataset: LabelledPictures, confusion: Confusion, *, iteration: int):
    """Write the tables of an evaluation within a run, and its pictures also to TensorBoard, on the main process."""
    if run.folder is None or not is_main_process():
        return
    sheet = write_tables(run.folder, predictor, dataset, confusion, iteration=iteration)
    if run.log is not None:
        run.log.tensorboard.do('add_image', 'test/pictures', sheet, iteration, None, 'HWC')


def write_tables(run_folder: Path, predictor: Predictor, dataset: LabelledPictures, confusion: Confusion,
                 **facts) -> np.ndarray:
    """Write per_class.csv, confusion.csv, summary.json and a sheet of pictures; return the sheet (height, width, 3)."""
    folder = run_folder / tables.FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    rows = confusion.rows(dataset.classes)
    write_csv(folder / tables.PER_CLASS, [COLUMNS, *map(cells, rows)])
    counts = confusion.counts[:, :-1].tolist()
    write_csv(folder / tables.CONFUSION, [['truth', *dataset.classes], *([name, *row] for name, row in
                                                                        zip(dataset.classes, counts))])
    write_result(folder / SUMMARY, {**confusion.metrics(), 'pictures': len(dataset), 'classes': rows,
                                    'model': predictor.model.name, **facts}, {})
    sheet = sheet_of(predictor, dataset)
    with whole_file(folder / PICTURES) as unfinished:
        Image.fromarray(sheet).save(unfinished, format='PNG')
    return sheet


def cells(row: dict) -> List[str]:
    return [row['name'], *('-' if row[key] is None else f'{row[key]:.2f}' for key in ('IoU', 'Acc')),
            str(row['pixels']), str(row['predicted'])]


def sheet_of(predictor: Predictor, dataset: LabelledPictures) -> np.ndarray:
    """Draw some pictures of a data set, a row each: the picture, and over it the truth and the prediction."""
    colors, plain, rows = labels.palette(len(dataset.classes)), dataset.with_transform(None), []
    for index in evenly_spread(range(len(dataset)), NUM_PICTURES):
        picture, truth = plain[index]
        predicted = predictor(picture).cpu().numpy()
        tiles = [picture, overlay(picture, truth, colors), overlay(picture, predicted, colors)]
        step = -(-max(truth.shape) // SIDE)
        rows.append(np.concatenate([padded(tile[::step, ::step], GAP, GAP) for tile in tiles], axis=1))
    widest = max(row.shape[1] for row in rows)
    return np.concatenate([padded(row, 0, widest - row.shape[1]) for row in rows])


def padded(picture: np.ndarray, below: int, right: int) -> np.ndarray:
    return np.pad(picture, ((0, below), (0, right), (0, 0)), constant_values=255)


def draw(run_folder: Path):
    """Draw confusions and curves, and write the page, from the tables and the log of a run."""
    folder, log_file = run_folder / tables.FOLDER, run_folder / 'log.txt'
    if not (folder / SUMMARY).is_file():
        return
    summary = json.loads((folder / SUMMARY).read_text())
    drawings.draw(folder, log_file, (), curves=CURVES, unit='iteration', best=('test_mIoU',), objects='pixels')
    rows = sorted(summary['classes'], key=lambda row: (row['IoU'] is None, row['IoU'] or 0.))
    facts = {name: str(summary[name]) for name in ('model', 'weights', 'data', 'pictures', 'iteration')
             if name in summary}
    facts.update({name: f'{summary[name]:.2f} %' for name in ('mIoU', 'mAcc', 'aAcc')})
    page.write(folder, f'Segmentation by {summary["model"]}', [
        Section('Summary', facts=facts),
        Section('Pictures', 'The picture, the labels, and the prediction.', picture=PICTURES),
        Section('Classes', 'Worst first. IoU is the intersection over union of predicted and labelled pixels.',
                header=COLUMNS, rows=list(map(cells, rows))),
        Section('Confusion', 'Pixels of each labelled class (row) by predicted class.', picture=drawings.CONFUSION),
        Section('Curves', picture=drawings.CURVES)])
    log(f'Report: {folder / page.HTML}')


def resumed_file(resume: str, output_dir: str) -> Path:
    """Return the checkpoint of --resume; raise InputError if `auto` has none."""
    path = Path(output_dir, CHECKPOINT) if resume == 'auto' else Path(resume)
    if not path.exists():
        raise InputError(f'--resume {resume}: no {path}')
    return path
