"""Compare label pictures, predicted by any program, with the true label pictures: mIoU and accuracies.

A predicted picture has the name of its true picture. Both have the same numbers of classes.
"""
import argparse
import os
import sys
from pathlib import Path
from typing import List, Optional

if not __package__:  # started as a file
    sys.path[0] = os.path.realpath(f'{__file__}/../..')

import torch
from tqdm import tqdm

from run import flags
from run.commandline import COUNT, PATH, PATH_OBJECT, Parser, run_program
from run.logs import write_result
from run.output import log, shows_bar
from segmentation import data, labels, report
from segmentation.metrics import Confusion
from utils import InputError, abridge


def get_args_parser() -> Parser:
    parser = Parser('python -m segmentation.evaluate', description=__doc__,
                    example='--predictions labels/ --annotations ADE/annotations/validation --num-classes 150')
    parser.add_argument('--predictions', required=True, type=PATH_OBJECT, metavar='DIR',
                        help='folder of the predicted label pictures')
    parser.add_argument('--annotations', required=True, type=PATH_OBJECT, metavar='DIR',
                        help='folder of the true label pictures')
    parser.add_argument('--num-classes', type=COUNT, metavar='K', help='number of classes; unset: as many as --classes')
    parser.add_argument('--classes', default='', type=PATH, metavar='FILE', help='file with a class name per line')
    parser.add_argument('--zero-is-a-class', action=argparse.BooleanOptionalAction, default=False,
                        help='number 0 of label pictures as a class')
    flags.add_pixels_flag(parser)
    parser.add_argument('--json', type=PATH_OBJECT, metavar='FILE', help='file for the metrics')
    return parser


def pairs(annotations: Path, predictions: Path) -> List[tuple]:
    """Return the true label pictures, each with the predicted picture; raise InputError for missing ones."""
    for flag, folder in (('--annotations', annotations), ('--predictions', predictions)):
        if not folder.is_dir():
            raise InputError(f'{flag} {folder}: no such directory')
    true, predicted = map(labels.files_by_name, (annotations, predictions))
    if not true:
        raise InputError(f'--annotations {annotations}: no label pictures')
    missing = [name for name in true if name not in predicted]
    if missing:
        raise InputError(f'--predictions {predictions}: no label picture for {len(missing)} of {len(true)} in '
                         f'{annotations}: {abridge(missing, 4)}')
    return [(true[name], predicted[name]) for name in true]


def main(argv: Optional[list] = None) -> dict:
    """Evaluate with a command line (`sys.argv` if None); return the metrics."""
    args = get_args_parser().parse_args(argv)
    names = data.class_names(data.Source(data.MASKS, '', classes=args.classes))
    count = args.num_classes or len(names or ())
    if not count or (names and len(names) != count):
        raise InputError(f'--num-classes: needed, or --classes with as many names; given: {count}, {len(names or ())}')
    numbering = labels.numbering(count, zero_is_a_class=args.zero_is_a_class)
    confusion = Confusion(count)
    for true_path, path in tqdm(pairs(args.annotations, args.predictions), disable=not shows_bar()):
        true = numbering.to_classes(labels.read(true_path), true_path)
        predicted = numbering.to_classes(labels.read(path), path)
        if true.shape != predicted.shape:
            raise InputError(f'{path}: has {predicted.shape[1]} x {predicted.shape[0]} pixels, but {true_path} has '
                             f'{true.shape[1]} x {true.shape[0]}')
        confusion.add(torch.from_numpy(predicted), torch.from_numpy(true))
    rows = confusion.rows(names or [str(value) for value in numbering.values])
    stats = {**confusion.metrics(), 'classes': rows}
    report.log_result(stats)
    if args.json is not None:
        write_result(args.json, stats, {name: str(value) for name, value in vars(args).items()})
        log(f'{args.json}: metrics of {len(rows)} classes')
    return stats


if __name__ == '__main__':
    run_program(main)
