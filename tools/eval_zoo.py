"""Evaluate the published ImageNet checkpoints, each at its resolution and crop, and compare with the published top-1.

Those trained without labels (DINO) have two: fb_dino by 20 nearest neighbours, which needs the training images, too;
fb_dino_linear by the published linear classifier.

Goes through them one after another. What is measured stands in zoo.csv and zoo.md of the output directory as soon as it
is known, and what main.py says meanwhile in zoo.log; called again, the program goes on with what is missing.
"""
import run.startup  # noqa: F401  first of all

import argparse
import contextlib
import csv
import dataclasses
import io
import time
from pathlib import Path
from typing import Dict, Iterable, List, Optional

import torch

import datasets
import main as classification
import utils
import xcit
import xcit_zoo
from dino import classifiers, knn, linear
from run import commandline, flags, folder
from run.commandline import COUNT, COUNT_OR_0, PATH, PATH_OBJECT, Parser
from run.processes import notice
from utils import InputError, RunStopped

CLASSIFIERS = [published for published in xcit_zoo.ZOO.values() if published.num_classes]
BACKBONES = [published for published in xcit_zoo.ZOO.values() if not published.num_classes]
KNN, LINEAR = 'fb_dino', classifiers.TAG
ENTRIES = {f'{entry.model}.{entry.tag}': entry for entry in [*CLASSIFIERS, *(
    entry for backbone in BACKBONES for entry in (
        dataclasses.replace(backbone, top1=backbone.knn),
        dataclasses.replace(backbone, tag=LINEAR, url=xcit_zoo.DINO_LINEAR[backbone.model])))]}
TAGS = list(dict.fromkeys(entry.tag for entry in ENTRIES.values()))
NEIGHBOURS = 20
VAL_IMAGES = 50000  # of ImageNet
TOLERANCE = .1  # percent, that a measured top-1 may be away from the published one
COLUMNS = ('model', 'tag', 'resolution', 'crop', 'published_top1', 'top1', 'top5', 'loss', 'images_per_s', 'images',
           'data_path', 'weights', 'device', 'dtype', 'error')


# ---------------------------------------------------------------------------------------------------------------------
# Arguments

def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser('python -m tools.eval_zoo', description=__doc__,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--data-path', required=True, type=PATH, metavar='DIR',
                        help='ImageNet: val/ with its class folders')
    parser.add_argument('--models', nargs='+', choices=xcit.MODELS, metavar='NAME',
                        help='some of the 14 models; all if unset')
    parser.add_argument('--tags', nargs='+', choices=TAGS, metavar='TAG',
                        help=f'some of {", ".join(TAGS)}; all if unset')
    parser.add_argument('--checkpoints', type=PATH_OBJECT, metavar='DIR',
                        help='take the files from here, by their published names, and download nothing')
    parser.add_argument('--output-dir', type=PATH_OBJECT, default=Path('runs/zoo'), metavar='DIR',
                        help='where the tables go')
    parser.add_argument('--batch-size', default=64, type=COUNT, metavar='IMAGES',
                        help='as for main.py, which evaluates 1.5 times as many at once')
    parser.add_argument('--num-workers', default=10, type=COUNT_OR_0, metavar='N', help='as for main.py')
    flags.add_device_flag(parser)
    flags.add_amp_flag(parser)
    return parser


def evaluation_flags(args, published: xcit_zoo.Published) -> list:
    """main.py's command line for a checkpoint, without the weights."""
    return ['--eval', '--model', published.model, '--input-size', str(published.resolution),
            '--full-crop' if published.crop == 1. else '--no-full-crop', '--data-path', args.data_path,
            '--batch-size', str(args.batch_size), '--num-workers', str(args.num_workers), '--device', args.device,
            *(['--amp', args.amp] if args.amp else [])]


def check(args) -> int:
    """Refuse what would fail for every checkpoint; returns the number of evaluation images."""
    if args.tags is None:
        has_train = Path(args.data_path, 'train').is_dir()
        args.tags = [tag for tag in TAGS if tag != KNN or has_train]
        if not has_train:
            notice(f'--data-path {args.data_path}: has no train/, so that {KNN} is left out')
    if not chosen(args):
        raise InputError(f'--models {" ".join(args.models)}: have none of the tags {", ".join(args.tags)}')
    if args.checkpoints is not None and not args.checkpoints.is_dir():
        raise InputError(f'--checkpoints {args.checkpoints}: no such directory')
    parsed = classification.parse_args(evaluation_flags(args, CLASSIFIERS[0]))
    dataset, _ = datasets.build_dataset(parsed, is_train=False)
    datasets.probe_images(dataset)
    return len(dataset)


def chosen(args) -> List[xcit_zoo.Published]:
    return [published for published in ENTRIES.values()
            if published.model in (args.models or xcit.MODELS) and published.tag in args.tags]


# ---------------------------------------------------------------------------------------------------------------------
# The table

def name_of(row: dict) -> str:
    return f'{row["model"]}.{row["tag"]}'


def read_rows(path: Path) -> Dict[str, dict]:
    """The rows of earlier calls by name; those cut short are left out."""
    text = path.read_text(errors='replace') if path.exists() else ''
    reader = csv.DictReader(io.StringIO(text))
    if text and tuple(reader.fieldnames or ()) != COLUMNS:
        raise InputError(f'{path}: is not a table of this program; choose another --output-dir')
    rows = list(reader)
    whole = {name_of(row): row for row in rows if None not in row and name_of(row) in ENTRIES
             and (is_measured(row) or row['error'])}
    if len(whole) < len(rows):
        notice(f'{path}: {len(rows) - len(whole)} damaged rows are left out')
    return whole


def is_measured(row: dict) -> bool:
    try:
        float(row['top1']), float(row['top5']), float(row['images_per_s'])
    except (TypeError, ValueError):
        return False
    return row['error'] == ''  # the last column


def check_same_images(rows: Iterable[dict], path: Path, *, data_path: str, images: int):
    """Refuse to mix measurements on different images."""
    for row in rows:
        if (row['data_path'], row['images']) != (data_path, str(images)):
            raise InputError(f'{path}: was measured on {row["images"]} images of {row["data_path"]}, these are '
                             f'{images} of {data_path}; choose another --output-dir')


def write_tables(rows: Dict[str, dict], folder: Path):
    """zoo.csv and zoo.md, each whole or as before, in the order of the zoo."""
    in_order = [rows[name] for name in ENTRIES if name in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator='\n')
    writer.writeheader()
    writer.writerows(in_order)
    for name, content in (('zoo.csv', text.getvalue()), ('zoo.md', markdown(in_order))):
        utils.write_text(folder / name, content)


def markdown(rows: List[dict]) -> str:
    lines = ['| model | weights | resolution | published top-1 | top-1 | deviation | top-5 | images/s |',
             '|---|---|---|---|---|---|---|---|']
    for row in rows:
        cells = [f'`{row["model"]}`', f'`{row["tag"]}`', row['resolution'], row['published_top1']]
        if row['error']:
            cells += ['not measured', '', '', '']
        else:
            cells += [f'{float(row["top1"]):.3f}', deviation(row), f'{float(row["top5"]):.3f}',
                      f'{float(row["images_per_s"]):.0f}']
        lines.append(f'| {" | ".join(map(str, cells))} |')
    measured = [row for row in rows if not row['error']]
    if measured:
        row = measured[0]
        lines += ['', f'Measured on {row["images"]} images of `{row["data_path"]}`; deviations '
                  f'above {TOLERANCE} are marked with an exclamation mark.']
    lines += [''] * any(row['error'] for row in rows)
    lines += [f'- not measured: `{name_of(row)}`: {row["error"]}' for row in rows if row['error']]
    return '\n'.join(lines) + '\n'


def deviation(row: dict) -> str:
    """Measured minus published top-1, percent, marked if it is too large."""
    difference = round(float(row['top1']) - float(row['published_top1']), 3)
    return f'{difference:+.3f}' + ' !' * (abs(difference) > TOLERANCE)


# ---------------------------------------------------------------------------------------------------------------------
# The program

def measure(args, published: xcit_zoo.Published, images: int) -> dict:
    """Evaluate a checkpoint; returns its row, with the reason in `error` if the weights can't be had."""
    row = dict.fromkeys(COLUMNS, '') | {
        'model': published.model, 'tag': published.tag, 'resolution': published.resolution, 'crop': published.crop,
        'published_top1': published.top1, 'images': images, 'data_path': data_path(args), **setting(args, published)}
    try:
        with open(args.output_dir / 'zoo.log', 'a') as log, contextlib.redirect_stdout(log):
            return row | MEASURES.get(published.tag, by_classifier)(args, published)
    except datasets.UnreadableImage:  # the fault of the data, not of the weights
        raise
    except InputError as error:
        return row | {'error': error}


def file_of(args, published: xcit_zoo.Published) -> str:
    """Where a checkpoint is, or the tag that means it."""
    return str(args.checkpoints / Path(published.url).name) if args.checkpoints else published.tag


def by_classifier(args, published: xcit_zoo.Published) -> dict:
    stats = classification.main([*evaluation_flags(args, published), '--pretrained', file_of(args, published)])
    return {'top1': stats['acc1'], 'top5': stats['acc5'], 'loss': stats['loss'], 'images_per_s': stats['images_per_s']}


def by_neighbours(args, published: xcit_zoo.Published) -> dict:
    start = time.perf_counter()
    found = knn.main([*backbone_flags(args, published), '--nb-knn', str(NEIGHBOURS)])
    tops = found['results'][str(NEIGHBOURS)]
    return {**tops, 'images_per_s': sum(found['images'].values()) / (time.perf_counter() - start)}


def by_linear(args, published: xcit_zoo.Published) -> dict:
    start = time.perf_counter()
    stats = linear.main([*backbone_flags(args, published), '--evaluate', '--linear-weights', file_of(args, published)])
    return {'top1': stats['acc1'], 'top5': stats['acc5'], 'loss': stats['loss'],
            'images_per_s': stats['images'] / (time.perf_counter() - start)}


MEASURES = {KNN: by_neighbours, LINEAR: by_linear}


def backbone_flags(args, published: xcit_zoo.Published) -> list:
    """The command line of dino.knn and dino.linear."""
    return ['--arch', published.model, '--pretrained', file_of(args, ENTRIES[f'{published.model}.{KNN}']),
            '--data-path', args.data_path, '--batch-size', str(args.batch_size), '--num-workers',
            str(args.num_workers), '--device', args.device, *(['--amp', args.amp] if args.amp else [])]


def setting(args, published: xcit_zoo.Published) -> dict:
    """What else a row depends on: where the weights come from, and what they are run with."""
    device = flags.choose_device(args)
    file = args.checkpoints and (args.checkpoints / Path(published.url).name).resolve()
    amp_dtype = None if published.tag in MEASURES and args.amp is None else flags.amp_dtype(args, device)
    return {'weights': str(file or published.url), 'device': str(device), 'dtype': str(amp_dtype or torch.float32)}


def is_current(args, published: xcit_zoo.Published, row: Optional[dict]) -> bool:
    """Whether a row need not be measured again."""
    return row is not None and is_measured(row) and setting(args, published).items() <= row.items()


def data_path(args) -> str:
    return str(Path(args.data_path).resolve())


def summary(row: dict) -> str:
    if row['error']:
        return f'{name_of(row)}: not measured: {row["error"]}'
    return (f'{name_of(row)}: published {row["published_top1"]}, top-1 {row["top1"]:.3f} ({deviation(row)}), '
            f'top-5 {row["top5"]:.3f}, {row["images_per_s"]:.0f} images/s')


def main(argv: Optional[list] = None) -> List[dict]:
    """Evaluate what is not in the table yet; returns its rows as the table has them.

    Raises:
        InputError: bad arguments or data, or a table of other images.
        RunStopped: at the end, if some checkpoints are missing or damaged.
    """
    args = get_args_parser().parse_args(argv)
    images = check(args)
    if images != VAL_IMAGES:
        notice(f'--data-path {args.data_path}: {images} images, not the {VAL_IMAGES} of the published accuracies')
    table = args.output_dir / 'zoo.csv'
    with folder.DirectoryLock(args.output_dir):
        rows = read_rows(table)
        check_same_images(rows.values(), table, data_path=data_path(args), images=images)
        left = [p for p in chosen(args) if not is_current(args, p, rows.get(f'{p.model}.{p.tag}'))]
        for number, published in enumerate(left, start=1):
            row = measure(args, published, images)
            rows[name_of(row)] = row
            write_tables(rows, args.output_dir)
            notice(f'[{number}/{len(left)}] {summary(row)}')
        rows = read_rows(table)
    rows = [rows[f'{p.model}.{p.tag}'] for p in chosen(args)]
    notice(f'\n{markdown(rows)}\nIn {table} and {table.with_suffix(".md").name}.')
    failed = [name_of(row) for row in rows if row['error']]
    if failed:
        raise RunStopped(f'{len(failed)} of {len(rows)} checkpoints could not be evaluated: {utils.abridge(failed)}')
    return rows


if __name__ == '__main__':
    commandline.run_program(main)
