"""Say what is in pictures: the most probable classes of each.

Prints a block for each picture, or with --json a line: {"path", "predictions": [{"class", "index", "probability"}]}.
A picture that is not there or can't be read is named on stderr, and makes the exit code 1; the others are predicted.
"""
import run.startup  # noqa: F401  first of all

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import List, Optional

import torch

from run import commandline
from run.commandline import COUNT, PATH, Parser
from tools import common
from utils import InputError


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser('python -m tools.predict', description=__doc__,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('images', nargs='+', type=PATH, metavar='IMAGE',
                        help='image files, and folders with all that is in them')
    parser.add_argument('--topk', default=5, type=COUNT, metavar='K', help='classes to name for each picture')
    parser.add_argument('--json', action='store_true', help='print a line of JSON for each picture')
    common.add_weights_arguments(parser)
    common.add_square_arguments(parser)
    common.add_device_arguments(parser)
    common.add_loading_arguments(parser)
    return parser


def describe(probabilities: torch.Tensor, classes: Optional[List[str]], topk: int) -> List[dict]:
    """The most probable classes of one picture, from its probabilities (K,)."""
    top = probabilities.topk(min(topk, len(probabilities)))
    return [{'class': classes[index] if classes else None, 'index': index, 'probability': round(probability, 6)}
            for probability, index in zip(top.values.tolist(), top.indices.tolist())]


def print_prediction(path: Path, predictions: List[dict], *, as_json: bool):
    if as_json:
        print(json.dumps({'path': str(path), 'predictions': predictions}), flush=True)
        return
    print(path)
    for prediction in predictions:
        name = f'class {prediction["index"]}' if prediction['class'] is None else prediction['class']
        print(f'  {100 * prediction["probability"]:6.2f} %  {name}', flush=True)


def main(argv: Optional[list] = None) -> List[List[dict]]:
    """Predict, with a command line (`sys.argv` if None); returns what was printed of each readable picture."""
    args = get_args_parser().parse_args(argv)
    unreadable, results = [], []
    with contextlib.redirect_stdout(sys.stderr):  # what is said of pictures and weights is no part of the output
        paths = common.find_images(args.images, missing=unreadable)
        loaded = common.load_model(args)
    if loaded.model.num_classes == 0:
        raise InputError(f'--pretrained {args.pretrained}: has no head to predict classes with')
    for images, indices in common.batches(paths, loaded, batch_size=args.batch_size, num_workers=args.num_workers,
                                          unreadable=unreadable):
        logits = common.forward(loaded, loaded.model, images)
        for index, probabilities in zip(indices, logits.softmax(dim=1)):
            results.append(describe(probabilities, loaded.classes, args.topk))
            print_prediction(paths[index], results[-1], as_json=args.json)
    common.report_unreadable(unreadable, len(results) + len(unreadable))
    return results


if __name__ == '__main__':
    commandline.run_program(main)
