"""Classify images by their nearest neighbours among the features of labelled images, without training a classifier.

Each of the k nearest training images votes for its class with weight exp(similarity / temperature).
"""
import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Dict, Optional

if not __package__:  # started as a file
    sys.path[0] = os.path.realpath(f'{__file__}/../..')

import torch
import torch.nn.functional as F

import datasets
import weights
from dino import features, frozen, neighbours
from dino.features import Features
from loaders import readers
from run import flags, processes, session
from run.commandline import COUNT, PATH, POSITIVE, Parser, run_program
from run.folder import check_output_dir
from run.logs import write_result
from run.output import log
from run.settings import Loading
from utils import InputError, seed_everything

KS = [10, 20, 100, 200]  # default numbers of neighbours
PIXELS_SIDE = 32  # largest side of images whose features are their pixels


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser('python -m dino.knn', description=__doc__,
                    example='--pretrained runs/dino/checkpoint.pth --data-set FOLDER --data-path pictures --nb-knn 20')
    group = parser.add_argument_group('neighbours')
    group.add_argument('--nb-knn', default=KS, type=COUNT, nargs='+', metavar='K',
                       help='numbers of neighbours')
    group.add_argument('--temperature', default=neighbours.TEMPERATURE, type=POSITIVE, metavar='T',
                       help='temperature of the votes')
    group.add_argument('--baselines', action='store_true',
                       help='further results, for raw pixels and for an untrained network with the seed of the run')
    group.add_argument('--output', type=PATH, metavar='FILE', help='JSON file for the results')
    frozen.add_flags(parser, trains=False)
    group = parser.add_argument_group('device')
    flags.add_device_flag(group)
    flags.add_amp_flag(group, default='off')
    return parser


def parse_args(argv: Optional[list] = None) -> argparse.Namespace:
    """Parse the command line, and raise InputError for invalid flags before any work is done."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    frozen.check_flags(args, parser)
    if args.baselines and args.train_features:
        raise InputError('--baselines: needs images, and --train-features has none')
    if args.output:
        if Path(args.output).is_dir():
            raise InputError(f'--output {args.output}: is a folder')
        check_output_dir(str(Path(args.output).absolute().parent), '--output')
    return args


def evaluate(args, device: torch.device) -> dict:
    """Evaluate; return the results for --output."""
    def classify(train: Features, val: Features) -> Dict[str, dict]:
        accuracies = neighbours.classify(train, val, ks=args.nb_knn, temperature=args.temperature, device=device)
        for k, (top1, top5) in accuracies.items():
            log(neighbours.line(k, top1, top5))
        return {str(k): {'top1': top1, 'top5': top5} for k, (top1, top5) in accuracies.items()}

    backbone = frozen.build(args, device)
    if backbone is None:
        train, val = frozen.read_both(args.train_features, args.val_features)
        args.nb_knn = neighbours.fitting(args.nb_knn, len(train), KS)
        return {'results': classify(train, val), 'train_features': args.train_features,
                'val_features': args.val_features, 'images': {'train': len(train), 'val': len(val)}}
    loading = Loading(args.batch_size, device, num_workers=args.num_workers, pin_memory=args.pin_mem)
    images = features.Images(datasets.source(args, resumes=False), backbone.view(resize=args.resize))
    sets = features.build_datasets(images)
    if not readers.is_stream(args.data_set):
        args.nb_knn = neighbours.fitting(args.nb_knn, len(sets[0]), KS)
    train, val = frozen.features_of_both(backbone, images, sets, loading, folder=args.features_dir or '')
    results = {'model': backbone.loaded.name, 'weights': args.pretrained, 'fingerprint': backbone.fingerprint,
               'images': {'train': len(train), 'val': len(val)}, 'classes': len(train.classes)}
    if args.baselines:
        results['baselines'] = {}
        seed = backbone.loaded.seed or 0
        for name, function in (('raw pixels', pixels), (f'untrained, seed {seed}', untrained(backbone, seed))):
            log(f'{name}:')
            both = [features.extract(function, dataset, loading, amp_dtype=backbone.loaded.amp_dtype,
                                     header=f'Features, {split}, {name}')
                    for split, dataset in zip(frozen.SPLITS, sets)]
            if function is pixels:  # without their mean, which would make all pixels similar
                mean = both[0].features.mean(dim=0)
                both = [dataclasses.replace(split, features=split.features - mean) for split in both]
            results['baselines'][name] = classify(*both)
        log(f'{args.pretrained}:')
    return {**results, 'results': classify(train, val)}


def pixels(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, img_h, img_w) -> (B, C): normalised pixels; large images are scaled down."""
    size = [min(side, PIXELS_SIDE) for side in images.shape[-2:]]
    return F.adaptive_avg_pool2d(images.float(), size).flatten(1)


def untrained(backbone: frozen.Frozen, seed: int) -> torch.nn.Module:
    """Build the backbone with the initial weights of a run with this seed."""
    seed_everything(seed)
    model = weights.create_backbone(backbone.loaded.name)
    return model.eval().requires_grad_(False).to(backbone.loaded.device)


def main(argv: Optional[list] = None) -> dict:
    """Evaluate with a command line (`sys.argv` if None), see `parse_args`; return the content of --output."""
    args = parse_args(argv)
    with session.joined(args.device, threads=args.threads, world_size=args.world_size, dist_url=args.dist_url,
                        timeout_minutes=args.dist_timeout) as device:
        results = {**evaluate(args, device), 'temperature': args.temperature}
        if args.output and processes.is_main_process():
            write_result(Path(args.output), results, vars(args))
    return results


if __name__ == '__main__':
    run_program(main)
