"""Write the features of pictures to a file: for each, what the model's classifier sees of it.

In the file: `features` (n, C) float32 and `paths`, relative to a folder that was given; of a folder of class folders
also `labels` (n,) int64 and `classes`, their names; with --patch-tokens `tokens` (n, H, W, C) float32, normalised.
`made_of` is JSON: the model, and a fingerprint of its weights. In .safetensors, all but arrays is JSON in the metadata.
"""
import run.startup  # noqa: F401  first of all

import argparse
import json
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import numpy as np
import safetensors.numpy
import torch

import utils
import weights
import xcit
from run import commandline, processes
from run.commandline import COUNT_OR_0, PATH, Parser
from tools import common
from utils import InputError

POOLS = ('token', 'avg')


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser('python -m tools.extract_features', description=__doc__,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('data', nargs='+', type=PATH, metavar='DATA',
                        help='folders of images, with their subfolders, or files')
    parser.add_argument('--output', required=True, type=PATH, metavar='FILE', help='.npz or .safetensors')
    parser.add_argument('--pool', choices=POOLS,
                        help='of an XCiT: the CLS token, or the mean of the patches; what the classifier sees if unset')
    parser.add_argument('--patch-tokens', action=argparse.BooleanOptionalAction, default=False,
                        help='of an XCiT: also what it makes of each patch; all of them are held in memory')
    parser.add_argument('--skip-bad-images', default=0, type=COUNT_OR_0, metavar='N',
                        help='leave out up to N images that can\'t be read')
    common.add_weights_arguments(parser)
    common.add_square_arguments(parser)
    common.add_device_arguments(parser)
    common.add_loading_arguments(parser)
    return parser


def class_folders(data: List[str], paths: List[Path]) -> Optional[Tuple[List[str], List[int]]]:
    """(names, label of each path) where `data` is one folder with images in subfolders only, else None."""
    if len(data) > 1 or not Path(data[0]).is_dir() or any(path.parent == Path(data[0]) for path in paths):
        return None
    folders = [path.relative_to(data[0]).parts[0] for path in paths]
    names = sorted(set(folders))
    return names, [names.index(folder) for folder in folders]


def extract(args, paths: List[Path], loaded: common.LoadedModel) -> Tuple[dict, List[int]]:
    """Arrays by name of the readable images, features (n, C) and tokens (n, H, W, C), and their places in `paths`."""
    if args.pool:
        if not isinstance(loaded.model, xcit.Xcit):
            raise InputError(f'--pool {args.pool}: is for XCiT models only, not {loaded.name}')
        loaded.model.global_pool = args.pool
    if args.patch_tokens and not isinstance(loaded.model, xcit.Xcit):
        raise InputError(f'--patch-tokens: is for XCiT models only, not {loaded.name}')
    function = outputs(loaded, patch_tokens=args.patch_tokens)
    arrays, unreadable, places = {}, [], []
    for images, indices in common.batches(paths, loaded, batch_size=args.batch_size, num_workers=args.num_workers,
                                          unreadable=unreadable):
        if len(unreadable) > args.skip_bad_images:
            raise unreadable[0]
        for name, rows in common.forward(loaded, function, images).items():
            rows = rows.numpy()
            whole = arrays.setdefault(name, np.empty((len(paths), *rows.shape[1:]), np.float32))
            if rows.shape[1:] != whole.shape[1:]:
                raise InputError(f'--patch-tokens: {paths[indices[0]]} has {rows.shape[1]} x {rows.shape[2]} patches, '
                                 f'and pictures before it {whole.shape[1]} x {whole.shape[2]}')
            whole[len(places):len(places) + len(indices)] = rows
        places += indices
    if len(unreadable) > args.skip_bad_images or not places:
        raise unreadable[0]
    return {name: whole[:len(places)] for name, whole in arrays.items()}, places


def outputs(loaded: common.LoadedModel, *, patch_tokens: bool):
    """A function of images (B, 3, img_h, img_w): features (B, C) and, if they are asked for, tokens (B, H, W, C)."""
    model = loaded.model

    def function(images: torch.Tensor) -> Dict[str, torch.Tensor]:
        found = model.forward_features(images)
        features = {'features': model.forward_head(found, pre_logits=True)}
        if not patch_tokens:
            return features
        grid = [-(-side // model.feature_info[0]['reduction']) for side in images.shape[-2:]]
        return {**features, 'tokens': found[:, 1:].unflatten(1, grid)}

    return function


def write(path: Path, arrays: dict, names: dict, made_of: dict):
    """Write arrays and lists of strings, so that `path` is the old file or the whole new one.

    Args:
        made_of: by which model, in plain values.
    """
    with utils.whole_file(path) as unfinished:
        if path.suffix == '.npz':
            np.savez(unfinished, **arrays, **{name: np.array(words) for name, words in names.items()},
                     made_of=json.dumps(made_of))
        else:
            metadata = {name: json.dumps(words) for name, words in {**names, 'made_of': made_of}.items()}
            safetensors.numpy.save_file(arrays, unfinished, metadata=metadata)


def main(argv: Optional[list] = None) -> dict:
    """Extract, with a command line (`sys.argv` if None); returns the arrays of the file by name."""
    args = get_args_parser().parse_args(argv)
    output = Path(args.output)
    if output.suffix not in ('.npz', '.safetensors'):
        raise InputError(f'--output {output}: must end in .npz or .safetensors')
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise InputError(f'--output {output}: {"is a folder" if output.is_dir() else "its folder is missing"}')
    paths = common.find_images(args.data)
    loaded = common.load_model(args, fuse=False)
    made_of = {'model': loaded.name, 'fingerprint': weights.fingerprint(loaded.model)}
    if isinstance(loaded.model, xcit.Xcit):
        xcit.fuse(loaded.model)
    arrays, places = extract(args, paths, loaded)
    names = {}
    root = args.data[0] if len(args.data) == 1 and Path(args.data[0]).is_dir() else None
    names['paths'] = [str(paths[i].relative_to(root) if root else paths[i]) for i in places]
    labelled = class_folders(args.data, paths)
    if labelled:
        names['classes'], labels = labelled
        arrays['labels'] = np.array(labels)[places]
    write(output, arrays, names, made_of)
    shapes = ', '.join(f'{name} {array.shape}' for name, array in arrays.items() if name != 'labels')
    processes.notice(f'{output}: {shapes} of {len(places)} of {len(paths)} images'
                     + (f', {len(names["classes"])} classes' if labelled else ''))
    return {**arrays, **names}


if __name__ == '__main__':
    commandline.run_program(main)
