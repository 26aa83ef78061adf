"""Predict the most probable classes of pictures.

Prints a block per picture, or with --json a line: {"path", "predictions": [{"class", "index", "probability"}]}.
A missing or unreadable picture is named on stderr and makes the exit code 1; the others are predicted.
"""
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import List, Optional

if not __package__:  # started as a file
    sys.path[0] = os.path.realpath(f'{__file__}/../..')

import torch

from inference import flags, pictures
from inference.loaded import load
from run.commandline import COUNT, PATH, Parser, run_program
from run.output import write_line
from utils import InputError, shown


def get_args_parser() -> Parser:
    parser = Parser('python -m tools.predict', description=__doc__,
                    example='photo.jpg pictures --model xcit_small_12_p16 --pretrained fb_dist_in1k')
    parser.add_argument('images', nargs='+', type=PATH, metavar='IMAGE', help='image files, or folders with images')
    parser.add_argument('--topk', default=5, type=COUNT, metavar='K', help='number of classes per picture')
    parser.add_argument('--json', action='store_true', help='a line of JSON per picture')
    flags.add_weights_flags(parser)
    flags.add_square_flags(parser)
    flags.add_device_flags(parser)
    flags.add_loading_flags(parser)
    return parser


def describe(probabilities: torch.Tensor, classes: Optional[List[str]], topk: int) -> List[dict]:
    """Return the most probable classes of a picture, from its probabilities (K,)."""
    top = probabilities.topk(min(topk, len(probabilities)))
    return [{'class': classes[index] if classes else None, 'index': index, 'probability': round(probability, 6)}
            for probability, index in zip(top.values.tolist(), top.indices.tolist())]


def print_prediction(path: Path, predictions: List[dict], *, as_json: bool):
    if as_json:
        write_line(json.dumps({'path': str(path), 'predictions': predictions}))
        return
    write_line(shown(path))
    for prediction in predictions:
        name = f'class {prediction["index"]}' if prediction['class'] is None else prediction['class']
        write_line(f'  {100 * prediction["probability"]:6.2f} %  {shown(name)}')


def main(argv: Optional[list] = None) -> List[List[dict]]:
    """Predict, with a command line (`sys.argv` if None); return the predictions of each readable picture."""
    args = get_args_parser().parse_args(argv)
    unreadable, results = [], []
    with contextlib.redirect_stdout(sys.stderr):  # log lines about pictures and weights are not results
        paths = pictures.find_images(args.images, missing=unreadable)
        loaded = load(**flags.weights(args), **flags.squares(args), **flags.device(args))
    if loaded.model.num_classes == 0:
        raise InputError(f'--pretrained {args.pretrained}: has no head to predict classes with')
    for images, indices in pictures.batches(paths, loaded, batch_size=args.batch_size,
                                            num_workers=args.num_workers, unreadable=unreadable):
        logits = pictures.forward(loaded, loaded.model, images)
        for index, probabilities in zip(indices, logits.softmax(dim=1)):
            results.append(describe(probabilities, loaded.classes, args.topk))
            print_prediction(paths[index], results[-1], as_json=args.json)
    pictures.report_unreadable(unreadable, len(results) + len(unreadable))
    return results


if __name__ == '__main__':
    run_program(main)
