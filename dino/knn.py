"""Classify images by their nearest neighbours among the features of labelled ones: what features are worth, untrained.

Each of the k nearest training images votes for its class with exp(similarity / temperature).
"""
import run.startup  # noqa: F401  first of all

import argparse
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import timm
import torch
import torch.nn.functional as F

from dino import features, frozen, neighbours
from dino.features import Features
from loaders import readers
from run import flags, processes
from run.commandline import COUNT, PATH, POSITIVE, Parser, run_program
from run.folder import check_output_dir
from run.logs import environment
from run.processes import notice
from utils import InputError, seed_everything, write_json

PIXELS_SIDE = 32  # to which larger pictures are brought, for the features that are their pixels
Results = Dict[int, Tuple[float, float]]  # top-1 and top-5 in percent by k


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser('python -m dino.knn', description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group('neighbours')
    group.add_argument('--nb-knn', default=[10, 20, 100, 200], type=COUNT, nargs='+', metavar='K',
                       help='numbers of neighbours')
    group.add_argument('--temperature', default=.07, type=POSITIVE, metavar='T', help='of the votes')
    group.add_argument('--baselines', action='store_true',
                       help='also by raw pixels, and by the features of an untrained network of the training\'s seed')
    group.add_argument('--output', type=PATH, metavar='FILE', help='write the results as JSON')
    frozen.add_flags(parser, trains=False)
    group = parser.add_argument_group('device')
    flags.add_device_flag(group)
    flags.add_amp_flag(group, default='off')
    parser.set_defaults(seed=0, deterministic=False, resume='')  # what shared code asks for
    return parser


def parse_args(argv: Optional[list] = None) -> argparse.Namespace:
    """Parse the command line and refuse what can't work before any work is done."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    args.amp = args.amp or 'off'
    frozen.check_flags(args, parser)
    if args.baselines and args.train_features:
        raise InputError('--baselines: needs images, and --train-features has none')
    if args.output:
        if Path(args.output).is_dir():
            raise InputError(f'--output {args.output}: is a folder')
        check_output_dir(str(Path(args.output).absolute().parent), '--output')
    return args


# ---------------------------------------------------------------------------------------------------------------------
# The program

def evaluate(args, device: torch.device) -> dict:
    """Returns what --output is to hold."""
    if args.train_features:
        train, val = frozen.read_both(args)
        neighbours.check(args.nb_knn, len(train))
        return {'results': words_by_k(classify(args, train, val, device)), 'train_features': args.train_features,
                'val_features': args.val_features, 'images': {'train': len(train), 'val': len(val)}}
    backbone = frozen.load(args, device)
    args = frozen.for_data(args, backbone)
    sets = frozen.build_datasets(args)
    if not readers.is_stream(args.data_set):
        neighbours.check(args.nb_knn, len(sets[0]))
    train, val = frozen.features_of_both(args, backbone, sets, device)
    found = {'model': backbone.loaded.name, 'weights': args.pretrained, 'fingerprint': backbone.fingerprint,
             'images': {'train': len(train), 'val': len(val)}, 'classes': len(train.classes)}
    if args.baselines:
        found['baselines'] = {}
        for name, function in (('raw pixels', pixels), (f'untrained, seed {backbone.seed}', untrained(backbone))):
            notice(f'{name}:')
            parts = [features.extract(args, function, dataset, device, header=f'Features, {split}, {name}')
                     for split, dataset in zip(frozen.SPLITS, sets)]
            if function is pixels:
                parts = centred(*parts)
            found['baselines'][name] = words_by_k(classify(args, *parts, device))
        notice(f'{args.pretrained}:')
    return {**found, 'results': words_by_k(classify(args, train, val, device))}


def classify(args, train: Features, val: Features, device: torch.device) -> Results:
    results = neighbours.classify(train, val, ks=args.nb_knn, temperature=args.temperature, device=device)
    for k, tops in results.items():
        notice(neighbours.line(k, *tops))
    return results


def words_by_k(results: Results) -> dict:
    return {str(k): {'top1': top1, 'top5': top5} for k, (top1, top5) in results.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Features to compare with

def pixels(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, img_h, img_w) -> (B, C): normalised pixels, of large pictures those of a small copy."""
    size = [min(side, PIXELS_SIDE) for side in images.shape[-2:]]
    return F.adaptive_avg_pool2d(images.float(), size).flatten(1)


def centred(train: Features, val: Features) -> List[Features]:
    """Without what all training images have in common, which would make all pixels similar."""
    mean = train.features.mean(dim=0)
    return [Features(found.features - mean, found.labels, found.classes) for found in (train, val)]


def untrained(backbone: frozen.Frozen) -> torch.nn.Module:
    """Images (B, 3, img_h, img_w) -> (B, C), as the training's network had it before its first step."""
    seed_everything(backbone.seed)
    model = timm.create_model(backbone.loaded.name, num_classes=0)
    return model.eval().requires_grad_(False).to(backbone.loaded.device)


def main(argv: Optional[list] = None) -> dict:
    """Evaluate with a command line (`sys.argv` if None); returns what --output holds.

    Raises:
        InputError: the arguments, or the data, weights or features they name, can't be used.
    """
    args = parse_args(argv)
    with processes.joined(args, trains=False) as device:
        found = {**evaluate(args, device), 'temperature': args.temperature, 'args': vars(args),
                 'environment': environment()}
        if args.output and processes.is_main_process():
            Path(args.output).parent.mkdir(parents=True, exist_ok=True)
            write_json(Path(args.output), found)
    return found


if __name__ == '__main__':
    run_program(main)
