"""Make the report of a run, in its folder `report`: figures of each class, confusions, curves, the worst mistakes.

A training and an evaluation with --output-dir make it themselves. This program makes it later, or again: of a run that
was interrupted, or for another folder of pictures. It evaluates best_model.pth as main.py does, where the predictions
are not there yet.
"""
import run.startup  # noqa: F401  first of all

import argparse
import json
from pathlib import Path
from typing import Optional

import datasets
import main as classification
from reports import predictions, tables
from run import commandline, flags
from run.commandline import COUNT_OR_0, PATH, PATH_OBJECT, Parser
from run.folder import BEST, CHECKPOINT
from utils import InputError, first_line

# Of a run's flags, those that an evaluation has
KEPT = ('model', 'data_set', 'data_path', 'input_size', 'full_crop', 'mean', 'std', 'resize', 'exif', 'inat_category',
        'val_split', 'num_classes', 'val_fraction', 'seed', 'batch_size', 'xca')


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser('python -m tools.report', description=__doc__,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('folder', type=PATH_OBJECT, metavar='DIR', help='of a run: with args.json or eval.json')
    parser.add_argument('--data-path', type=PATH, metavar='DIR', help='evaluate these pictures; the run\'s if unset')
    parser.add_argument('--num-workers', default=10, type=COUNT_OR_0, metavar='N', help='as for main.py')
    flags.add_device_flag(parser)
    return parser


def flags_of(folder: Path) -> dict:
    """The flags of the run in a folder.

    Raises:
        InputError: it holds no run.
    """
    for name in ('args.json', 'eval.json'):
        if (folder / name).is_file():
            try:
                return dict(json.loads((folder / name).read_text())['args'])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise InputError(f'{folder / name}: can\'t be read ({type(error).__name__}: {first_line(error)})'
                                 ) from None
    raise InputError(f'DIR {folder}: has no args.json and no eval.json, and so is no folder of a run' if folder.is_dir()
                     else f'DIR {folder}: no such folder')


def evaluation(args, run: dict) -> list:
    """main.py's command line that evaluates the best model of a run."""
    kept = {**{name: run.get(name) for name in KEPT}, **({'data_path': args.data_path} if args.data_path else {})}
    words = []
    for name, value in kept.items():
        flag = f'--{name.replace("_", "-")}'
        if isinstance(value, bool):
            words.append(flag if value else f'--no-{flag[2:]}')
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        elif value is not None:
            words.append(f'{flag}={value}')
    files = [args.folder / name for name in (BEST, CHECKPOINT)]
    weights = next((str(file) for file in files if file.exists()), None)
    if weights:
        words += ['--resume', weights]
    elif run.get('pretrained') or run.get('resume'):
        words += ['--pretrained', run['pretrained'] or run['resume']]
    else:
        raise InputError(f'DIR {args.folder}: has neither {BEST} nor {CHECKPOINT} to evaluate')
    return [*words, '--eval', '--output-dir', str(args.folder), '--device', args.device, '--num-workers',
            str(args.num_workers)]


def main(argv: Optional[list] = None):
    """Make the report, with a command line (`sys.argv` if None)."""
    args = get_args_parser().parse_args(argv)
    run = flags_of(args.folder)
    if args.data_path or not (args.folder / tables.FOLDER / predictions.FILE).exists():
        classification.main(evaluation(args, run))
        return
    parsed = classification.parse_args([*evaluation(args, run), '--no-report'])
    dataset, _ = datasets.build_dataset(parsed, is_train=False)
    classification.draw_report(str(args.folder), dataset)


if __name__ == '__main__':
    commandline.run_program(main)
