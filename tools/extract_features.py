"""Extract the features of pictures to a file: the input of the model's classifier.

The file contains `features` (n, C) float32 and `paths`, relative to DATA if DATA is one folder; for class folders also
`labels` (n,) int64 and the names `classes`; with --patch-tokens normalised `tokens` (n, H, W, C) float32. `made_of` is
JSON: the model, and a fingerprint of its weights. In a .safetensors file, arrays are tensors, and the rest is JSON in
the metadata.
"""
import argparse
import json
import os
import sys
from pathlib import Path
from typing import Callable, Dict, List, Optional, Tuple

if not __package__:  # started as a file
    sys.path[0] = os.path.realpath(f'{__file__}/../..')

import numpy as np
import safetensors.numpy
import torch

import utils
import weights
import xcit
from inference import flags, pictures
from inference.loaded import LoadedModel, load
from run.commandline import COUNT_OR_0, PATH, Parser, run_program
from run.output import log
from utils import InputError, counted


def get_args_parser() -> Parser:
    parser = Parser('python -m tools.extract_features', description=__doc__,
                    example='pictures --model xcit_small_12_p16 --pretrained fb_dino --output features.npz')
    parser.add_argument('data', nargs='+', type=PATH, metavar='DATA', help='image files, or folders with images')
    parser.add_argument('--output', required=True, type=PATH, metavar='FILE', help='.npz or .safetensors file to write')
    parser.add_argument('--pool', choices=('token', 'avg'),
                        help='features of an XCiT: CLS token, or mean of the patches; the model\'s own if unset')
    parser.add_argument('--patch-tokens', action=argparse.BooleanOptionalAction, default=False,
                        help='patch tokens of an XCiT in addition; all tokens are held in memory')
    parser.add_argument('--skip-bad-images', default=0, type=COUNT_OR_0, metavar='N',
                        help='maximum number of unreadable images that are left out')
    flags.add_weights_flags(parser)
    flags.add_square_flags(parser)
    flags.add_device_flags(parser)
    flags.add_loading_flags(parser)
    return parser


def class_folders(data: List[str], paths: List[Path]) -> Optional[Tuple[List[str], List[int]]]:
    """Return (names, label of each path) if `data` is one folder with images in subfolders only; else None."""
    if len(data) > 1 or not Path(data[0]).is_dir() or any(path.parent == Path(data[0]) for path in paths):
        return None
    folders = [path.relative_to(data[0]).parts[0] for path in paths]
    names = sorted(set(folders))
    return names, [names.index(folder) for folder in folders]


def choose_outputs(loaded: LoadedModel, *, pool: Optional[str], patch_tokens: bool
                   ) -> Callable[[torch.Tensor], Dict[str, torch.Tensor]]:
    """Return a function from images (B, 3, img_h, img_w) to features (B, C), and perhaps tokens (B, H, W, C)."""
    model = loaded.model
    for flag, value in ((f'--pool {pool}', pool), ('--patch-tokens', patch_tokens)):
        if value and not isinstance(model, xcit.Xcit):
            raise InputError(f'{flag}: only works with XCiT models, not {loaded.name}')
    if pool:
        model.global_pool = pool

    def outputs(images: torch.Tensor) -> Dict[str, torch.Tensor]:
        tokens = model.forward_features(images)
        features = {'features': model.forward_head(tokens, pre_logits=True)}
        if not patch_tokens:
            return features
        grid = [-(-side // model.patch_size) for side in images.shape[-2:]]
        return {**features, 'tokens': tokens[:, 1:].unflatten(1, grid)}

    return outputs


def extract(paths: List[Path], loaded: LoadedModel, outputs: Callable, *, batch_size: int, num_workers: int,
            skip_bad_images: int) -> Tuple[dict, List[int]]:
    """Return arrays (n, ...) of the outputs of all readable images by name, and the images' indices in `paths`."""
    arrays, unreadable, kept = {}, [], []
    for images, indices in pictures.batches(paths, loaded, batch_size=batch_size, num_workers=num_workers,
                                            unreadable=unreadable):
        if len(unreadable) > skip_bad_images:
            raise unreadable[0]
        for name, rows in pictures.forward(loaded, outputs, images).items():
            rows = rows.numpy()
            whole = arrays.setdefault(name, np.empty((len(paths), *rows.shape[1:]), np.float32))
            if rows.shape[1:] != whole.shape[1:]:
                raise InputError(f'--patch-tokens: {paths[indices[0]]} has {rows.shape[1]} x {rows.shape[2]} patches, '
                                 f'and pictures before it {whole.shape[1]} x {whole.shape[2]}')
            whole[len(kept):len(kept) + len(indices)] = rows
        kept += indices
    if len(unreadable) > skip_bad_images or not kept:
        raise unreadable[0]
    return {name: whole[:len(kept)] for name, whole in arrays.items()}, kept


def write(path: Path, arrays: dict, names: dict, made_of: dict):
    """Write arrays, lists of strings by name, and a description of the model."""
    with utils.whole_file(path) as unfinished:
        if path.suffix == '.npz':
            np.savez(unfinished, **arrays, **{name: np.array(texts) for name, texts in names.items()},
                     made_of=json.dumps(made_of))
        else:
            metadata = {name: json.dumps(texts) for name, texts in {**names, 'made_of': made_of}.items()}
            safetensors.numpy.save_file(arrays, unfinished, metadata=metadata)


def main(argv: Optional[list] = None) -> dict:
    """Extract, with a command line (`sys.argv` if None); return the arrays of the file by name."""
    args = get_args_parser().parse_args(argv)
    output = Path(args.output)
    if output.suffix not in ('.npz', '.safetensors'):
        raise InputError(f'--output {output}: must end in .npz or .safetensors')
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise InputError(f'--output {output}: {"is a folder" if output.is_dir() else "its folder is missing"}')
    paths = pictures.find_images(args.data)
    loaded = load(**flags.weights(args), **flags.squares(args), **flags.device(args), fuse=False)
    made_of = {'model': loaded.name, 'fingerprint': weights.fingerprint(loaded.model)}
    if isinstance(loaded.model, xcit.Xcit):
        xcit.fuse(loaded.model)
    outputs = choose_outputs(loaded, pool=args.pool, patch_tokens=args.patch_tokens)
    arrays, kept = extract(paths, loaded, outputs, batch_size=args.batch_size, num_workers=args.num_workers,
                           skip_bad_images=args.skip_bad_images)
    shapes = ', '.join(f'{name} {array.shape}' for name, array in arrays.items())
    message = f'{output}: {shapes} of {len(kept)} of {counted(len(paths), "image")}'
    root = args.data[0] if len(args.data) == 1 and Path(args.data[0]).is_dir() else None
    names = {'paths': [str(paths[i].relative_to(root) if root else paths[i]) for i in kept]}
    labelled = class_folders(args.data, paths)
    if labelled:
        names['classes'], labels = labelled
        arrays['labels'] = np.array(labels)[kept]
        message += f', {counted(len(names["classes"]), "class")}'
    write(output, arrays, names, made_of)
    log(message)
    return {**arrays, **names}


if __name__ == '__main__':
    run_program(main)
