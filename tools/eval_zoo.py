"""Evaluate the published ImageNet checkpoints, each at its resolution and crop, and compare with the published top-1.

Backbones trained without labels (DINO) have two results: fb_dino by 20 nearest neighbours, which also needs the
training images, and fb_dino_linear by the published linear classifier.

Each result is written at once to zoo.csv and zoo.md of the output directory, and the log lines of all evaluations to
zoo.log. A further call continues with the missing results.
"""
import argparse
import contextlib
import csv
import dataclasses
import io
import os
import sys
import time
from pathlib import Path
from typing import Dict, List, Optional, Tuple

if not __package__:  # started as a file
    sys.path[0] = os.path.realpath(f'{__file__}/../..')

import torch

import datasets
import utils
import xcit
import xcit_zoo
from classification.evaluation import evaluate_classifier
from dino import classifiers, features, frozen, neighbours
from engine import accuracy_line
from inference.loaded import load
from loaders.samples import inspect
from loaders.source import Source
from loaders.transforms import View
from run import commandline, flags, folder, session
from run.commandline import COUNT, PATH, PATH_OBJECT, Parser
from run.output import log
from run.settings import Loading
from utils import InputError, RunStopped, UnreadableImage, counted

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
TOLERANCE = .1  # percent by which a measured top-1 may differ from the published top-1
COLUMNS = ('model', 'tag', 'resolution', 'crop', 'published_top1', 'top1', 'top5', 'loss', 'images_per_s', 'images',
           'data_path', 'weights', 'device', 'dtype', 'error')


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser('python -m tools.eval_zoo', description=__doc__,
                    example='--data-path imagenet --tags fb_in1k --output-dir runs/zoo')
    parser.add_argument('--data-path', required=True, type=PATH, metavar='DIR', help='folder of ImageNet, with val/')
    parser.add_argument('--models', nargs='+', choices=xcit.MODELS, metavar='NAME', help='model names; all if unset')
    parser.add_argument('--tags', nargs='+', choices=TAGS, metavar='TAG',
                        help=f'tags of checkpoints, some of {", ".join(TAGS)}; all if unset')
    parser.add_argument('--checkpoints', type=PATH_OBJECT, metavar='DIR',
                        help='folder of the checkpoints under their published names; if set, nothing is downloaded')
    parser.add_argument('--output-dir', type=PATH_OBJECT, default=Path('runs/zoo'), metavar='DIR',
                        help='folder for the tables')
    parser.add_argument('--batch-size', default=64, type=COUNT, metavar='IMAGES',
                        help='two thirds of the images per forward pass, as in main.py')
    flags.add_workers_flag(parser)
    flags.add_pixels_flag(parser)
    flags.add_device_flag(parser)
    flags.add_amp_flag(parser)
    return parser


def check(args) -> int:
    """Raise InputError for flags that would fail for every checkpoint; return the number of evaluation images."""
    if args.tags is None:
        has_train = Path(args.data_path, 'train').is_dir()
        args.tags = [tag for tag in TAGS if tag != KNN or has_train]
        if not has_train:
            log(f'--data-path {args.data_path}: has no train/, so {KNN} is left out')
    if not chosen(args):
        raise InputError(f'--models {" ".join(args.models)}: have none of the tags {", ".join(args.tags)}')
    if args.checkpoints is not None and not args.checkpoints.is_dir():
        raise InputError(f'--checkpoints {args.checkpoints}: no such directory')
    flags.choose_device(args)
    source = Source('IMNET', args.data_path)
    if KNN in args.tags:
        datasets.load_classes(source, is_train=True)
    dataset, _ = datasets.load(source, is_train=False)
    inspect(None, dataset)
    return len(dataset)


def chosen(args) -> List[xcit_zoo.Published]:
    return [published for published in ENTRIES.values()
            if published.model in (args.models or xcit.MODELS) and published.tag in args.tags]


def name_of(row: dict) -> str:
    return f'{row["model"]}.{row["tag"]}'


def read_rows(path: Path) -> Dict[str, dict]:
    """Read the rows of earlier calls by name, without damaged rows."""
    text = path.read_text(encoding='utf-8-sig', errors='replace') if path.exists() else ''
    reader = csv.DictReader(io.StringIO(text))
    if text and tuple(reader.fieldnames or ()) != COLUMNS:
        raise InputError(f'{path}: not a table of this program; choose another --output-dir')
    rows = list(reader)
    intact = {name_of(row): row for row in rows if None not in row and name_of(row) in ENTRIES
              and (is_measured(row) or row['error'])}
    if len(intact) < len(rows):
        log(f'{path}: {counted(len(rows) - len(intact), "damaged row", "are")} left out')
    return intact


def is_measured(row: dict) -> bool:
    try:
        float(row['top1']), float(row['top5']), float(row['images_per_s'])
    except (TypeError, ValueError):
        return False
    return row['error'] == ''  # the last column


def write_tables(rows: Dict[str, dict], output_dir: Path):
    """Write zoo.csv and zoo.md, in the order of the zoo."""
    in_order = [rows[name] for name in ENTRIES if name in rows]
    cells = [[row.get(column, '') for column in COLUMNS] for row in in_order]
    utils.write_csv(output_dir / 'zoo.csv', [COLUMNS, *cells])
    utils.write_text(output_dir / 'zoo.md', markdown(in_order))


def markdown(rows: List[dict]) -> str:
    lines = ['| model | weights | resolution | published top-1 | top-1 | deviation | top-5 | images/s |',
             '|---|---|---|---|---|---|---|---|']
    for row in rows:
        cells = [f'`{row["model"]}`', f'`{row["tag"]}`', row['resolution'], row['published_top1']]
        cells += ['not measured', '', '', ''] if row['error'] else [
            f'{float(row["top1"]):.3f}', deviation(row), f'{float(row["top5"]):.3f}',
            f'{float(row["images_per_s"]):.0f}']
        lines.append(f'| {" | ".join(map(str, cells))} |')
    if measured := [row for row in rows if not row['error']]:
        lines += ['', f'Measured on {measured[0]["images"]} images of `{measured[0]["data_path"]}`; deviations above '
                  f'{TOLERANCE} are marked with an exclamation mark.']
    if errors := [f'- not measured: `{name_of(row)}`: {row["error"]}' for row in rows if row['error']]:
        lines += ['', *errors]
    return '\n'.join(lines) + '\n'


def deviation(row: dict) -> str:
    """Format measured minus published top-1, in percent, with a mark above TOLERANCE."""
    difference = round(float(row['top1']) - float(row['published_top1']), 3)
    return f'{difference:+.3f}' + ' !' * (abs(difference) > TOLERANCE)


def measure(args, published: xcit_zoo.Published) -> dict:
    """Evaluate a checkpoint; return its row, with the reason in `error` if the weights can't be used."""
    row = dict.fromkeys(COLUMNS, '') | {
        'model': published.model, 'tag': published.tag, 'resolution': published.resolution, 'crop': published.crop,
        'published_top1': published.top1, **setting(args, published)}
    loading = Loading(args.batch_size, flags.choose_device(args), num_workers=args.num_workers)
    source, amp_dtype = Source('IMNET', args.data_path), amp_dtype_of(args, published)
    try:
        with open(args.output_dir / 'zoo.log', 'a') as log_file, contextlib.redirect_stdout(log_file), session.joined(
                args.device, threads=args.threads):
            file = file_of(args, published)
            if published.tag not in (KNN, LINEAR):
                return row | by_classifier(published, file, source, loading, amp_dtype)
            start = time.perf_counter()
            backbone_file = file_of(args, ENTRIES[f'{published.model}.{KNN}'])
            backbone = frozen.load(backbone_file, model=published.model, device=loading.device, amp_dtype=amp_dtype)
            results, count = (by_neighbours(backbone, source, loading) if published.tag == KNN else
                              by_linear(backbone, file, source, loading))
            return row | results | {'images_per_s': count / (time.perf_counter() - start)}
    except UnreadableImage:  # an error of the data, not of the weights
        raise
    except InputError as error:
        return row | {'error': error}


def file_of(args, published: xcit_zoo.Published) -> str:
    """Return the path of a checkpoint in --checkpoints, or its tag."""
    return str(args.checkpoints / Path(published.url).name) if args.checkpoints else published.tag


def by_classifier(published: xcit_zoo.Published, file: str, source: Source, loading: Loading,
                  amp_dtype: Optional[torch.dtype]) -> dict:
    model = load(file, model=published.model, device=loading.device, fuse=False).model
    if model.num_classes != published.num_classes:
        raise InputError(f'--pretrained {file}: is for {counted(model.num_classes, "class")}, not '
                         f'{published.num_classes}')
    dataset, _ = datasets.load(source, is_train=False)
    view = View(published.resolution, full_crop=published.crop == 1., resize=True)
    stats, _ = evaluate_classifier(model, dataset, view, loading, amp_dtype=amp_dtype, name=published.model)
    return {'top1': stats['acc1'], 'top5': stats['acc5'], 'loss': stats['loss'], 'images_per_s': stats['images_per_s']}


def by_neighbours(backbone: frozen.Frozen, source: Source, loading: Loading) -> Tuple[dict, int]:
    """Return the accuracies by nearest neighbours, and the number of images of both splits."""
    images = features.Images(source, backbone.view())
    sets = features.build_datasets(images)
    neighbours.check([NEIGHBOURS], len(sets[0]))
    train, val = frozen.features_of_both(backbone, images, sets, loading)
    top1, top5 = neighbours.classify(train, val, ks=[NEIGHBOURS], temperature=neighbours.TEMPERATURE,
                                     device=loading.device)[NEIGHBOURS]
    log(neighbours.line(NEIGHBOURS, top1, top5))
    return {'top1': top1, 'top5': top5}, len(train) + len(val)


def by_linear(backbone: frozen.Frozen, file: str, source: Source, loading: Loading) -> Tuple[dict, int]:
    """Return the metrics of a linear classifier, and the number of images."""
    dataset = features.build_dataset(features.Images(source, backbone.view()), is_train=False)
    layer = classifiers.read_matching(file, width=backbone.loaded.model.num_features, classes=dataset.class_names(),
                                      backbone=backbone.identity)
    val = backbone.extract(dataset, loading, 'val')
    stats = classifiers.evaluate(layer.to(loading.device), val, loading.device)
    log(accuracy_line(stats))
    return {'top1': stats['acc1'], 'top5': stats['acc5'], 'loss': stats['loss']}, len(val)


def amp_dtype_of(args, published: xcit_zoo.Published) -> Optional[torch.dtype]:
    """Return the autocast dtype; frozen backbones are evaluated in full precision unless --amp is set."""
    is_backbone = published.tag in (KNN, LINEAR)
    return None if is_backbone and args.amp is None else flags.amp_dtype(args, flags.choose_device(args))


def setting(args, published: xcit_zoo.Published) -> dict:
    """Return further values that a row depends on: origin of the weights, device and dtype."""
    weights = Path(file_of(args, published)).resolve() if args.checkpoints else published.url
    return {'weights': str(weights), 'device': str(flags.choose_device(args)),
            'dtype': str(amp_dtype_of(args, published) or torch.float32)}


def is_current(args, published: xcit_zoo.Published, row: Optional[dict]) -> bool:
    """Return True if a row does not have to be measured again."""
    return row is not None and is_measured(row) and setting(args, published).items() <= row.items()


def summary(row: dict) -> str:
    if row['error']:
        return f'{name_of(row)}: not measured: {row["error"]}'
    return (f'{name_of(row)}: published {row["published_top1"]}, top-1 {row["top1"]:.3f} ({deviation(row)}), '
            f'top-5 {row["top5"]:.3f}, {row["images_per_s"]:.0f} images/s')


def main(argv: Optional[list] = None) -> List[dict]:
    """Evaluate the checkpoints that the table lacks; return its rows.

    Raises:
        InputError: a flag or the data are invalid, or the table contains results on other images.
        RunStopped: at the end, if checkpoints are missing or damaged.
    """
    args = get_args_parser().parse_args(argv)
    images = check(args)
    if images != VAL_IMAGES:
        log(f'--data-path {args.data_path}: {counted(images, "image")}, not the {VAL_IMAGES} of the published '
            'accuracies')
    table, data_path = args.output_dir / 'zoo.csv', str(Path(args.data_path).resolve())
    with folder.DirectoryLock(args.output_dir):
        rows = read_rows(table)
        for row in rows.values():
            if (row['data_path'], row['images']) != (data_path, str(images)):
                raise InputError(f'{table}: was measured on {counted(row["images"], "image")} of {row["data_path"]}, '
                                 f'not {images} of {data_path}; choose another --output-dir')
        remaining = [p for p in chosen(args) if not is_current(args, p, rows.get(f'{p.model}.{p.tag}'))]
        for number, published in enumerate(remaining, start=1):
            row = measure(args, published) | {'images': images, 'data_path': data_path}
            rows[name_of(row)] = row
            write_tables(rows, args.output_dir)
            log(f'[{number}/{len(remaining)}] {summary(row)}')
        rows = read_rows(table)
    rows = [rows[f'{p.model}.{p.tag}'] for p in chosen(args)]
    log(f'\n{markdown(rows)}\nIn {table} and {table.with_suffix(".md").name}.')
    failed = [name_of(row) for row in rows if row['error']]
    if failed:
        raise RunStopped(f'{len(failed)} of {counted(len(rows), "checkpoint")} could not be evaluated: '
                         f'{utils.abridge(failed)}')
    return rows


if __name__ == '__main__':
    commandline.run_program(main)
