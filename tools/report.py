"""Make the report of a run, in its folder `report`: the page report.html, its tables and pictures.

main.py makes the report of a run with --output-dir itself. This program makes it later or again: for a run that was
interrupted, or for another folder of pictures. Without predictions in the folder, best_model.pth is evaluated first.
"""
import json
import os
import sys
from pathlib import Path
from typing import Optional

if not __package__:  # started as a file
    sys.path[0] = os.path.realpath(f'{__file__}/../..')

import datasets
import xcit
from classification import evaluation, report
from inference.loaded import in_words, load
from loaders import samples
from loaders.samples import PictureSet
from loaders.source import Source
from loaders.transforms import View
from reports import predictions, tables
from run import devices, flags, logs, session
from run.commandline import PATH, PATH_OBJECT, Parser, run_program
from run.folder import ARGS, BEST, CHECKPOINT
from run.settings import Loading
from utils import InputError, counted, first_line
from weights import check_input_size

NEEDED = ('model', 'data_set', 'data_path', 'input_size')  # flags of every run of main.py
SOURCE = ('val_fraction', 'exif', 'inat_category', 'val_split', 'num_classes', 'seed', 'batch_size')


def get_args_parser() -> Parser:
    parser = Parser('python -m tools.report', description=__doc__, example='runs/mine')
    parser.add_argument('folder', type=PATH_OBJECT, metavar='DIR', help='folder of a run, with args.json or eval.json')
    parser.add_argument('--data-path', type=PATH, metavar='DIR',
                        help='pictures to evaluate; the run\'s pictures if unset')
    flags.add_workers_flag(parser)
    flags.add_pixels_flag(parser)
    flags.add_device_flag(parser)
    return parser


def flags_of(folder: Path) -> dict:
    """Return the flags of the run in a folder."""
    for name in (ARGS, 'eval.json'):
        if (folder / name).is_file():
            try:
                return dict(json.loads((folder / name).read_text())['args'])
            except (OSError, ValueError, KeyError, TypeError) as error:
                reason = f'{type(error).__name__}: {first_line(error)}'
                raise InputError(f'{folder / name}: can\'t be read ({reason})') from None
    problem = 'has no args.json and no eval.json of a run' if folder.is_dir() else 'no such folder'
    raise InputError(f'DIR {folder}: {problem}')


def weights_of(folder: Path, run: dict) -> str:
    """Return the weights of a run with these flags: its best model, or the weights that it evaluated."""
    files = [str(folder / name) for name in (BEST, CHECKPOINT) if (folder / name).exists()]
    weights = [*files, run.get('pretrained'), run.get('resume')]
    if not any(weights):
        raise InputError(f'DIR {folder}: has neither {BEST} nor {CHECKPOINT} to evaluate')
    missing = [name for name in NEEDED if name not in run]
    if missing:
        raise InputError(f'DIR {folder}: not a run of main.py, its flags lack {", ".join(missing)}')
    return next(filter(None, weights))


def evaluate(folder: Path, run: dict, weights: str, dataset: PictureSet, source: Source, loading: Loading):
    """Evaluate a run's model, and write eval.json and the tables of its report."""
    loaded = load(weights, model=run['model'], fuse=False)
    names = dataset.class_names()
    if loaded.model.num_classes != len(names):
        raise InputError(f'{weights}: the weights are for {counted(loaded.model.num_classes, "class")}, not '
                         f'{len(names)}')
    size = run['input_size']
    if isinstance(loaded.model, xcit.Xcit):
        loaded.model.xca_form = run.get('xca', 'auto')
    else:
        check_input_size(loaded.model, size, loaded.name)
    view = datasets.decide_resize(source, dataset, View(
        size, run.get('full_crop', False), run.get('resize'), run.get('mean'), run.get('std')))
    samples.inspect(None, dataset, same_size=not view.resizes)
    stats, predicted = evaluation.evaluate_classifier(
        loaded.model, dataset, view, loading, amp_dtype=devices.amp_dtype_of(None, loading.device), name=loaded.name,
        classes=names if loaded.classes in (None, in_words(names)) else loaded.classes, weights=weights)
    logs.write_result(folder / 'eval.json', {**stats, 'model': loaded.name, 'weights': weights, 'crop': view.crop},
                      {**run, 'eval': True, 'resume': weights, 'data_path': source.path, 'device': str(loading.device)})
    evaluation.write_tables(folder, dataset, predicted, report.setting(
        model=loaded.name, weights=weights, source=source, view=view))


def main(argv: Optional[list] = None):
    """Make the report, with a command line (`sys.argv` if None)."""
    args = get_args_parser().parse_args(argv)
    run = flags_of(args.folder)
    weights = weights_of(args.folder, run)
    source = Source(run['data_set'], args.data_path or run['data_path'],
                    run_folder=args.folder if Path(weights).parent == args.folder else None,
                    **{name: run[name] for name in SOURCE if run.get(name) is not None})
    dataset, _ = datasets.load_classes(source, is_train=False)
    if args.data_path or not all((args.folder / tables.FOLDER / name).exists()
                                 for name in (predictions.FILE, report.SUMMARY)):
        with session.joined(args.device, threads=args.threads) as device:
            evaluate(args.folder, run, weights, dataset, source,
                     Loading(source.batch_size, device, num_workers=args.num_workers))
    evaluation.draw_report(args.folder, dataset)


if __name__ == '__main__':
    run_program(main)
