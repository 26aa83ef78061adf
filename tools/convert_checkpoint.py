"""Convert XCiT weights between the published naming and timm's, bit by bit.

Reads whatever the other programs read: a training's checkpoint, a published file, timm's copy. The model's name, the
classes, the resolution and the crop go with the weights: beside them in a .pth file in the original's naming, in the
metadata of a .safetensors file. In timm's naming, a config.json beside the file says the same to timm.
"""
import run.startup  # noqa: F401  first of all

import argparse
import json
from pathlib import Path
from typing import Optional

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import utils
import weights
import xcit
import xcit_zoo
from run import checkpoints, commandline
from run.commandline import PATH, PATH_OBJECT, Parser
from run.descriptions import evaluation_crop, names_of, side_of, trained_with
from run.processes import notice
from tools import common
from utils import InputError, write_json
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
    common.add_choice_of_weights(parser)
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


def describe(given: weights.Weights, name: str, published: Optional[xcit_zoo.Published]) -> dict:
    """What a training's checkpoint says beside its weights, in plain values; of a published file, what is known."""
    trained = trained_with(given.checkpoint)
    known = {'input_size': published.resolution, 'full_crop': published.crop == 1.} if published else {}
    names = names_of(given.checkpoint.get('classes'))
    kept = {key: given.checkpoint[key] for key in ('accuracy', 'epoch') if key in given.checkpoint}
    return {'args': {**trained, **known, 'model': name}, **({'classes': names} if names else {}), **kept}


def check_config(path: Path):
    """Refuse to replace a config.json that is not about a timm model."""
    try:
        if path.exists() and 'architecture' not in json.loads(path.read_text()):
            raise ValueError
    except (OSError, ValueError, TypeError):
        raise InputError(f'OUT: {path} is there, and is not timm\'s; choose another folder') from None


def timm_config(name: str, described: dict, model: torch.nn.Module, published: Optional[xcit_zoo.Published]) -> dict:
    """What timm reads beside weights in its naming, to open them as its own model with the right images and classes."""
    trained, num_classes, own = described['args'], model.num_classes, getattr(model, 'default_cfg', {})
    side = side_of(trained.get('input_size')) or 224
    architecture = f'{name}_{published.resolution if published else 224}' if name in xcit.MODELS else name
    config = {'architecture': architecture, 'num_classes': num_classes, 'num_features': model.num_features,
              'pretrained_cfg': {
                  'tag': published.tag if published else 'trained', 'num_classes': num_classes,
                  'input_size': [3, side, side], 'mean': list(trained.get('mean') or IMAGENET_DEFAULT_MEAN),
                  'std': list(trained.get('std') or IMAGENET_DEFAULT_STD), 'interpolation': 'bicubic',
                  'fixed_input_size': False, 'crop_pct': evaluation_crop(trained), 'crop_mode': 'center',
                  'pool_size': None, 'first_conv': own.get('first_conv'), 'classifier': own.get('classifier', 'head')}}
    if len(described.get('classes', [])) == num_classes > 0:
        config['label_names'] = described['classes']
    return config


def main(argv: Optional[list] = None) -> dict:
    """Convert; returns the weights as they were written, by name.

    Raises:
        InputError: there are no weights, they are no XCiT's, or OUT can't be written.
    """
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
        raise InputError(f'--model {args.model}: {given.source} has the weights of {name}')
    model = weights.build_without_storage(name, given)
    weights.check(model, given)
    published = weights.published(args.model or '', args.source) or weights.published_as(args.source)
    num_classes = weights.num_classes(name, given)
    # As files of their own: without what a tensor may share with others, and in one piece.
    tensors = {key: value.clone(memory_format=torch.contiguous_format) for key, value in given.tensors.items()}
    tensors = xcit_zoo.to_timm_names(tensors) if args.to == 'timm' else tensors
    described = describe(given, name, published)
    if args.target.suffix == '.safetensors':
        checkpoints.save_checkpoint(tensors, args.target, metadata=checkpoints.metadata_of(described))
    else:
        checkpoints.save_checkpoint(tensors if args.to == 'timm' else {'model': tensors, **described}, args.target)
    notice(f'{given.source}: {given.description}')
    notice(f'{args.target}: {name}, {num_classes} classes, {len(tensors)} tensors in {args.to} naming')
    if args.to == 'timm':
        write_json(config, timm_config(name, described, model, published))
        notice(f'{config}: for timm.create_model(\'local-dir:{config.absolute().parent}\')')
    return tensors


if __name__ == '__main__':
    commandline.run_program(main)
