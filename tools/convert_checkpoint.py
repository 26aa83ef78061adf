"""Convert XCiT weights between the published naming and timm's, bit by bit.

Reads the files that the other programs read: training checkpoints, published files, timm's copies. The model's name,
classes, resolution and crop are kept: in a .pth file beside the weights, in a .safetensors file in the metadata. In
timm's naming, a config.json beside the file contains this information for timm.
"""
import json
import os
import sys
from pathlib import Path
from typing import Optional

if not __package__:  # started as a file
    sys.path[0] = os.path.realpath(f'{__file__}/../..')

import utils
import weights
import xcit
import xcit_zoo
from inference import timm_files
from inference.flags import add_choice_of_weights
from run import checkpoints
from run.commandline import PATH, PATH_OBJECT, Parser, run_program
from run.output import detail, log
from utils import InputError, counted, write_json
from weights import check_model

SUFFIXES = ('.pth', '.safetensors')


def get_args_parser() -> Parser:
    parser = Parser('python -m tools.convert_checkpoint', description=__doc__,
                    example='runs/mine/best_model.pth model.safetensors --to timm')
    parser.add_argument('source', type=PATH, metavar='IN',
                        help='weights: path, URL, hf-hub:NAME, or with --model a tag')
    parser.add_argument('target', metavar='OUT', type=PATH_OBJECT, help=f'file to write: {" or ".join(SUFFIXES)}')
    parser.add_argument('--to', required=True, choices=['original', 'timm'], help='naming of the written weights')
    parser.add_argument('--model', metavar='NAME', help='name of the model, one of 14, that a tag belongs to')
    add_choice_of_weights(parser)
    return parser


def check_target(source: str, target: Path):
    """Raise InputError if the target can't be written, or is the source."""
    if target.suffix not in SUFFIXES:
        raise InputError(f'OUT {target}: must end in {" or ".join(SUFFIXES)}')
    if target.is_dir() or not target.parent.is_dir():
        raise InputError(f'OUT {target}: {"is a directory" if target.is_dir() else "no such directory to write to"}')
    if target.exists() and Path(source).exists() and target.samefile(source):
        raise InputError(f'OUT {target}: is IN itself; choose another name')


def model_of(given: weights.Weights) -> str:
    """Return the name of the model, one of 14, whose weights have these shapes; raise InputError if there is none."""
    if name := xcit.name_with(given.tensors):
        return name
    raise InputError(f'{given.source}: not the weights of an XCiT model; keys: {utils.abridge(list(given.tensors))}')


def check_config(path: Path):
    """Raise InputError if `path` exists and does not describe a timm model."""
    try:
        if path.exists() and 'architecture' not in json.loads(path.read_text()):
            raise ValueError
    except (OSError, ValueError, TypeError):
        raise InputError(f'OUT: {path} exists, and does not describe a timm model; choose another folder') from None


def main(argv: Optional[list] = None) -> dict:
    """Convert, with a command line (`sys.argv` if None); return the written weights by name."""
    args = get_args_parser().parse_args(argv)
    if args.model:
        check_model('--model', args.model)
    check_target(args.source, args.target)
    config = args.target.with_name('config.json')
    if args.to == 'timm':
        check_config(config)
    weights.check_exists(args.source, 'IN', args.model or '')
    given = weights.read(args.source, 'IN', args.model or '', use_ema=args.use_ema, key=args.checkpoint_key)
    name = model_of(given)
    if args.model and args.model.split('.')[0] != name:
        raise InputError(f'{given.source}: checkpoint is {name}, --model is {args.model}')
    model = weights.build_without_storage(name, given)
    weights.check(model, given)
    published = weights.published(args.model or '', args.source) or weights.published_as(args.source)
    tensors = timm_files.contiguous(xcit_zoo.to_timm_names(given.tensors) if args.to == 'timm' else given.tensors)
    described = timm_files.describe(given, name, published)
    checkpoints.save_weights(tensors, described, args.target)
    log(f'{given.source}: {given.description}')
    detail(given.details)
    log(f'{args.target}: {name}, {counted(model.num_classes, "class")}, {counted(len(tensors), "tensor")} in '
        f'{args.to} naming')
    if args.to == 'timm':
        write_json(config, timm_files.config(name, described, model, published))
        log(f'{config}: for timm.create_model(\'local-dir:{config.absolute().parent}\')')
    return tensors


if __name__ == '__main__':
    run_program(main)
