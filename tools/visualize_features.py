"""Draw the patch tokens of pictures: their first three principal components as colours.

The components are common to all pictures, so that equal colours are similar tokens. Writes STEM_features.png for each
picture, and features.png with all pictures beside their colours.
"""
import argparse
import math
import os
import sys
from pathlib import Path
from typing import List, Optional

if not __package__:  # started as a file
    sys.path[0] = os.path.realpath(f'{__file__}/../..')

import torch
from PIL import Image
from tqdm import tqdm

import utils
from inference import flags, pictures
from inference.loaded import LoadedModel, check_xcit, load
from loaders.pictures import load_rgb
from loaders.transforms import ToNormalizedTensor
from reports import lettering, maps
from run.commandline import COUNT, PATH, Parser, run_program
from run.flags import add_pixels_flag
from run.folder import check_output_dir
from run.output import log, shows_bar
from utils import RunStopped, counted

LONGER_SIDE = 512  # pixels, of a picture for a model of large pictures
SHEET_WIDTH = 2000  # approximate width in pixels
MIN_SIDE = 128  # pixels, of a picture on the sheet


def get_args_parser() -> Parser:
    parser = Parser('python -m tools.visualize_features', description=__doc__,
                    example='photo.jpg other.jpg --model xcit_small_12_p8 --pretrained fb_dino --output-dir maps')
    group = parser.add_argument_group('pictures')
    group.add_argument('images', nargs='+', type=PATH, metavar='PICTURE', help='image files, or folders with images')
    group.add_argument('--output-dir', default='runs/features', type=PATH, metavar='DIR', help='folder of the drawings')
    group.add_argument('--input-size', type=COUNT, metavar='PIXELS',
                       help=f'longer side that a picture is scaled to, up or down, uncropped; if unset, {LONGER_SIDE} '
                       f'for models of 224 pixels and more, and less for models of smaller pictures')
    group.add_argument('--remove-background', action=argparse.BooleanOptionalAction, default=False,
                       help='black background: patches separated by the first component that are mostly at the edges; '
                       'the colours are the components of the other patches')
    add_pixels_flag(group)
    flags.add_weights_flags(parser)
    flags.add_device_flags(parser)
    return parser


def tokens_of(loaded: LoadedModel, picture: Image.Image) -> torch.Tensor:
    """Compute the patch tokens (H, W, C) of a picture of any size: float32, on the CPU."""
    patch_size = loaded.model.patch_size
    pixels = ToNormalizedTensor(loaded.view.mean, loaded.view.std)(picture)[None].to(loaded.device)
    tokens = pictures.forward(loaded, loaded.model.forward_features, pixels)[0, 1:]
    return tokens.unflatten(0, (math.ceil(picture.height / patch_size), math.ceil(picture.width / patch_size)))


def sheet(originals: List[Image.Image], colored: List[Image.Image], names: List[str]) -> Image.Image:
    """Draw pictures with their names beside their colours on one page, which is about square."""
    columns = math.ceil(math.sqrt(len(originals) / 2))
    longer = max(max(picture.size) for picture in originals)
    side = max(MIN_SIDE, min(longer, SHEET_WIDTH // (2 * columns)))
    resampling = Image.Resampling.NEAREST if longer < side else Image.Resampling.LANCZOS
    pairs = [picture.resize([max(1, round(length * side / longer)) for length in picture.size], resampling)
             for pair in zip(originals, colored) for picture in pair]
    texts = [texts for name in names for texts in ([lettering.visible(name)], [])]
    return maps.side_by_side(list(map(lettering.captioned, pairs, texts)), columns=2 * columns)


def main(argv: Optional[list] = None) -> List[Path]:
    """Draw, with a command line (`sys.argv` if None); return the files, the sheet last."""
    args = get_args_parser().parse_args(argv)
    check_output_dir(args.output_dir)
    paths = pictures.find_images(args.images)
    for path in paths:
        load_rgb(path)  # an unreadable picture ends the program before work starts
    loaded = load(**flags.weights(args), **flags.device(args))
    check_xcit(loaded.name)
    side = args.input_size or pictures.drawing_side(loaded.view.input_size, LONGER_SIDE)
    folder = Path(args.output_dir)
    files = [*(folder / f'{stem}_features.png' for stem in pictures.unique_stems(paths)), folder / 'features.png']
    pictures.check_inputs_are_kept(paths, files)
    originals, tokens = [], []
    for path in tqdm(paths, unit=' images', disable=not shows_bar()):
        originals.append(maps.scale_to(load_rgb(path), side))
        tokens.append(tokens_of(loaded, originals[-1]))
        if not tokens[-1].isfinite().all():
            advice = '' if loaded.amp_dtype is None else '; try --amp off'
            raise RunStopped(f'{path}: the model\'s output is not finite{advice}')
    colors = maps.component_colors(tokens, remove_background=args.remove_background)
    colored = [maps.color_picture(values, picture.size, loaded.model.patch_size)
               for values, picture in zip(colors, originals)]
    with utils.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for picture, file in zip([*colored, sheet(originals, colored, [path.name for path in paths])], files):
        pictures.save_picture(picture, file)
    log(f'{files[-1]}: {counted(len(paths), "picture")} beside their features; a patch token has '
        f'{counted(tokens[0].shape[2], "channel")}')
    return files


if __name__ == '__main__':
    run_program(main)
