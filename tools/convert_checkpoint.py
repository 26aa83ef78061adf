"""Convert XCiT weights between the published naming and timm's, bit by bit.

Reads whatever the other programs read: a training's checkpoint, a published file, timm's copy. Writes a bare state dict
to a .safetensors file and in timm's naming; `{'model': ...}` in the original's to a .pth file, with the classes and
flags that a training's checkpoint has. Resolution and crop of published weights are in their name alone: repeat them.
"""
import run.startup  # noqa: F401  first of all

import argparse
from pathlib import Path
from typing import Optional

import torch

import utils
import weights
import xcit
import xcit_zoo
from run import checkpoints, commandline
from run.commandline import PATH, PATH_OBJECT, Parser
from run.processes import notice
from utils import InputError
from weights import check_model

SUFFIXES = ('.pth', '.safetensors')


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser('python -m tools.convert_checkpoint', description=__doc__,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('source', type=PATH, metavar='IN',
                        help='weights: path, URL, hf-hub:NAME, or with --model a tag')
    parser.add_argument('target', metavar='OUT', type=PATH_OBJECT, help=f'file to write: {" or ".join(SUFFIXES)}')
    parser.add_argument('--to', required=True, choices=['original', 'timm'], help='whose names the weights get')
    parser.add_argument('--model', metavar='NAME', help='which of the 14 models a tag is of')
    parser.add_argument('--use-ema', action=argparse.BooleanOptionalAction, default=False,
                        help='take the moving average that a training\'s checkpoint holds beside the weights')
    return parser


def check_target(source: str, target: Path):
    """Refuse a file that can't be written, or is the one to be read."""
    if target.suffix not in SUFFIXES:
        raise InputError(f'OUT {target}: must end in {" or ".join(SUFFIXES)}')
    if target.is_dir() or not target.parent.is_dir():
        raise InputError(f'OUT {target}: {"is a directory" if target.is_dir() else "no such directory to write to"}')
    if target.exists() and Path(source).exists() and target.samefile(source):
        raise InputError(f'OUT {target}: is IN itself; choose another name')


def model_of(given: weights.Weights) -> str:
    """Which of the 14 models weights are of, by their sizes.

    Raises:
        InputError: none of them.
    """
    depth = len({key.split('.')[1] for key in given.tensors if key.startswith('blocks.')})
    patch = 2 ** len({key.split('.')[2] for key in given.tensors if key.startswith('patch_embed.proj.')})
    width = getattr(given.tensors.get('cls_token'), 'shape', ())[-1:]
    for size, config in xcit.SIZES.items():
        if ((config['embed_dim'],), config['depth']) == (width, depth) and patch in xcit.STEM_CONVOLUTIONS:
            return f'xcit_{size}_p{patch}'
    raise InputError(f'{given.source}: not the weights of an XCiT model; it has: {utils.abridge(list(given.tensors))}')


def main(argv: Optional[list] = None) -> dict:
    """Convert; returns the weights as they were written, by name.

    Raises:
        InputError: there are no weights, they are no XCiT's, or OUT can't be written.
    """
    args = get_args_parser().parse_args(argv)
    if args.model:
        check_model('--model', args.model)
    check_target(args.source, args.target)
    weights.check_exists(args.source, 'IN', args.model or '')
    given = weights.read(args.source, 'IN', args.model or '', use_ema=args.use_ema)
    name = model_of(given)
    if args.model and args.model.split('.')[0] != name:
        raise InputError(f'--model {args.model}: {given.source} has the weights of {name}')
    weights.check(weights.build_without_storage(name, given), given)
    num_classes = weights.num_classes(name, given)
    # As files of their own: without what a tensor may share with others, and in one piece.
    tensors = {key: value.clone(memory_format=torch.contiguous_format) for key, value in given.tensors.items()}
    tensors = xcit_zoo.to_timm_names(tensors) if args.to == 'timm' else tensors
    bare = args.to == 'timm' or args.target.suffix == '.safetensors'
    kept = {key: given.checkpoint[key] for key in ('classes', 'args') if key in given.checkpoint}
    checkpoints.save_checkpoint(tensors if bare else {'model': tensors, **kept}, args.target)
    notice(f'{given.source}: {given.description}')
    notice(f'{args.target}: {name}, {num_classes} classes, {len(tensors)} tensors in {args.to} naming')
    return tensors


if __name__ == '__main__':
    commandline.run_program(main)
