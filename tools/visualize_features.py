"""Draw what a model makes of pictures: the first three principal components of its patch tokens as colours.

The components are common to all pictures given, so that what looks alike to the model has the same colour in each of
them. For each picture STEM_features.png, and features.png with all pictures beside their colours.
"""
import run.startup  # noqa: F401  first of all

import argparse
import math
from pathlib import Path
from typing import List, Optional

import torch
from PIL import Image
from tqdm import tqdm

import datasets
import utils
from loaders import pictures
from reports import maps
from run import commandline, folder, processes
from run.commandline import COUNT, PATH, Parser
from run.processes import notice
from tools import common
from utils import RunStopped

LONGER_SIDE = 512  # pixels, of pictures that are shown to a model for large ones
SHEET_WIDTH = 2000  # pixels, about
LEAST_SIDE = 128  # pixels, of a picture on the sheet


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser('python -m tools.visualize_features', description=__doc__,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group('pictures')
    group.add_argument('images', nargs='+', type=PATH, metavar='PICTURE', help='files, or folders with images in them')
    group.add_argument('--output-dir', default='runs/features', type=PATH, metavar='DIR',
                       help='where the drawings go')
    group.add_argument('--input-size', type=COUNT, metavar='PIXELS',
                       help=f'longer side that a picture is scaled to, up or down; it keeps its shape, uncropped; if '
                       f'unset {LONGER_SIDE}, or for a model of small pictures the size that it was trained with')
    group.add_argument('--remove-background', action=argparse.BooleanOptionalAction, default=False,
                       help='leave black what the first component tells from the rest and is more at the edges; the '
                       'colours are then the components of the rest')
    common.add_weights_arguments(parser)
    common.add_device_arguments(parser)
    parser.set_defaults(full_crop=None)  # nothing is cropped
    return parser


@torch.no_grad()
def tokens_of(loaded: common.LoadedModel, picture: Image.Image) -> torch.Tensor:
    """A picture of any size -> its patch tokens (H, W, C), float32, on the CPU."""
    patch_size = common.patch_size(loaded)
    pixels = datasets.build_normalisation(loaded)(picture)[None].to(loaded.device)
    tokens = common.forward(loaded, loaded.model.forward_features, pixels)[0, 1:]
    return tokens.unflatten(0, (math.ceil(picture.height / patch_size), math.ceil(picture.width / patch_size)))


def sheet(shown: List[Image.Image], colored: List[Image.Image]) -> Image.Image:
    """Pictures beside their colours on one page, which is about square."""
    columns = math.ceil(math.sqrt(len(shown) / 2))
    longer = max(max(picture.size) for picture in shown)
    side = max(LEAST_SIDE, min(longer, SHEET_WIDTH // (2 * columns)))
    how = Image.Resampling.NEAREST if longer < side else Image.Resampling.LANCZOS
    pairs = [picture.resize([max(1, round(length * side / longer)) for length in picture.size], how)
             for pair in zip(shown, colored) for picture in pair]
    return maps.side_by_side(pairs, columns=2 * columns)


def main(argv: Optional[list] = None) -> List[Path]:
    """Draw, with a command line (`sys.argv` if None); returns the files, the sheet last.

    Raises:
        InputError: the pictures, the weights or the folder can't be used.
    """
    args = get_args_parser().parse_args(argv)
    folder.check_output_dir(args.output_dir)
    paths = common.find_images(args.images)
    for path in paths:
        pictures.load_rgb(path)  # what can't be read is refused before the work
    loaded = common.load_model(args)
    patch_size = common.patch_size(loaded)
    side = args.input_size or (LONGER_SIDE if loaded.input_size > datasets.SMALL else loaded.input_size)
    files = [Path(args.output_dir, f'{stem}_features.png') for stem in common.unique_stems(paths)]
    files.append(Path(args.output_dir, 'features.png'))
    common.check_inputs_are_kept(paths, files)
    shown, tokens = [], []
    for path in tqdm(paths, unit=' images', disable=not processes.shows_bar()):
        shown.append(maps.scale_to(pictures.load_rgb(path), side))
        tokens.append(tokens_of(loaded, shown[-1]))
        if not bool(tokens[-1].isfinite().all()):
            raise RunStopped(f'{path}: the model gives numbers that are not finite'
                             + ('; try --amp off' if loaded.amp_dtype is not None else ''))
    colors = maps.component_colors(tokens, remove_background=args.remove_background)
    colored = [maps.color_picture(values, picture.size, patch_size) for values, picture in zip(colors, shown)]
    with utils.writing(Path(args.output_dir)):
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    for picture, file in zip([*colored, sheet(shown, colored)], files):
        common.save_picture(picture, file)
    notice(f'{files[-1]}: {len(paths)} pictures beside their features, of {tokens[0].shape[2]} numbers a patch')
    return files


if __name__ == '__main__':
    commandline.run_program(main)
