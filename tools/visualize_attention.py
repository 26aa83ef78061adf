"""Draw class attention: the attention of a model's CLS token over a picture, per head, or over a video.

Writes for each picture STEM_head0.png, ... and STEM_mean.png, the attention of each head and the mean of the drawn
heads as colours over the grey picture; and STEM_sheet.png, all of these pictures on one page. A map has one value per
patch: a larger --input-size gives a finer map.
"""
import argparse
import dataclasses
import math
import os
import sys
from pathlib import Path
from typing import Iterable, Iterator, List, Optional, Sequence, Tuple

if not __package__:  # started as a file
    sys.path[0] = os.path.realpath(f'{__file__}/../..')

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import utils
from inference import flags, pictures, video
from inference.loaded import LoadedModel, check_xcit, load
from loaders.pictures import load_rgb
from loaders.transforms import ToNormalizedTensor
from reports import lettering
from reports.maps import BRIGHTEST, color_scale, extent, in_multiples, legend, paint, scale_to, side_by_side
from run.commandline import COUNT, PATH_OBJECT, Parser, run_program
from run.flags import add_pixels_flag
from run.folder import check_output_dir
from run.output import log, shows_bar
from utils import InputError

LONGER_SIDE = 1024  # pixels, of a picture for a model of large pictures
SMOOTHING = .95  # part of a video's colour scale that each frame keeps from the frame before
SHEET = 2000  # approximate longer side of a sheet in pixels
GAP, LINE = 28, 30  # gap between the pictures of a sheet, and height of a line of text, in pixels
FONT = 22
INK = (20, 20, 20)
LONGEST = 40  # characters of a file name


def get_args_parser() -> Parser:
    parser = Parser(
        'python -m tools.visualize_attention', description=__doc__,
        epilog='Colours run from black (no attention) over red to light yellow (most attention). All maps of a picture '
        'have one scale. It ends at the 99th percentile of all maps, because single patches would darken the rest, '
        f'but not below {BRIGHTEST:g} times uniform attention (equal for every token): a nearly uniform map has nearly '
        'one colour. The sheet has the values. In a video the scale changes slowly against flicker. Sound is left '
        'out.',
        example='photo.jpg --model xcit_small_12_p8 --pretrained fb_dino --output-dir maps')
    group = parser.add_argument_group('pictures')
    flags.add_media_flags(group, video='writes STEM_attention.mp4, each frame beside its mean attention')
    group.add_argument('--output-dir', required=True, type=PATH_OBJECT, metavar='DIR', help='folder of the maps')
    group.add_argument('--input-size', type=COUNT, metavar='PIXELS',
                       help=f'longer side that a picture is scaled to, up or down, uncropped; if unset, {LONGER_SIDE} '
                       f'for models of 224 pixels and more, and less for models of smaller pictures')
    add_pixels_flag(group)
    flags.add_weights_flags(parser)
    flags.add_device_flags(parser)
    group = parser.add_argument_group('attention')
    group.add_argument('--heads', default='all', type=head_numbers, metavar='all|N,N,...',
                       help='heads to draw and to average, counted from 0')
    group.add_argument('--layer', default=-1, type=int, metavar='N',
                       help='class-attention block, counted from 0, or from the end: -1 is the last')
    group.add_argument('--save-raw', action=argparse.BooleanOptionalAction, default=False,
                       help='STEM_attention.npy in addition: (heads, H, W) in patches, float32, the attention of each '
                       'head to the patches; with the attention to the CLS token itself, its sum is 1')
    return parser


def head_numbers(text: str) -> Optional[List[int]]:
    """Parse `all` (None) or numbers separated by commas (an argparse type)."""
    numbers = text.split(',')
    if text != 'all' and not all(number.isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f'{text!r} is not allowed: must be all, or numbers such as 0,3,5')
    return None if text == 'all' else list(dict.fromkeys(map(int, numbers)))


def parse_args(argv: Optional[list] = None) -> argparse.Namespace:
    args = get_args_parser().parse_args(argv)
    flags.check_media(args)
    if args.video and args.save_raw:
        raise InputError('--save-raw: has no effect with --video')
    if args.model:
        check_xcit(args.model)
    check_output_dir(str(args.output_dir))
    return args


@dataclasses.dataclass
class Attention:
    """Attention of some heads of a class-attention block, as a function of a picture."""
    loaded: LoadedModel
    layer: int
    heads: List[int]

    @property
    def patch_size(self) -> int:
        return self.loaded.model.patch_size

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        """Compute the attention of CLS to the patches of a picture of any size: (heads, H, W), float32, on the CPU."""
        pixels = ToNormalizedTensor(self.loaded.view.mean, self.loaded.view.std)(picture)[None].to(self.loaded.device)
        weights = pictures.forward(
            self.loaded, lambda images: self.loaded.model.forward_attention(images, layer=self.layer)[0], pixels)
        return weights[0, self.heads].unflatten(1, (-1, math.ceil(picture.width / self.patch_size)))


def build_attention(args) -> Attention:
    """Load the model, and check the block and the heads that the flags choose."""
    loaded = load(**flags.weights(args), **flags.device(args))
    check_xcit(loaded.name)
    blocks = loaded.model.cls_attn_blocks
    if not -len(blocks) <= args.layer < len(blocks):
        raise InputError(f'--layer {args.layer}: {loaded.name} has class-attention blocks 0 to {len(blocks) - 1}')
    count = blocks[args.layer].attn.num_heads
    heads = list(range(count)) if args.heads is None else args.heads
    if max(heads) >= count:
        raise InputError(f'--heads {",".join(map(str, heads))}: {loaded.name} has heads 0 to {count - 1}')
    return Attention(loaded, args.layer, heads)


@dataclasses.dataclass
class Tile:
    """Picture on a sheet with two lines below: name and description."""
    picture: Image.Image
    name: str
    description: str

    def width(self) -> int:
        return max(lettering.width_of(text, FONT) for text in (self.name, self.description))

    def draw(self, page: Image.Image, x: int, y: int, size: Tuple[int, int]):
        page.paste(self.picture.resize(size, Image.Resampling.LANCZOS), (x, y))
        lettering.write(page, x, y + size[1] + 6, self.name, FONT, INK)
        lettering.write(page, x, y + size[1] + 6 + LINE, self.description, FONT, lettering.GREY)


def choose_columns(size: Tuple[int, int], heads: int) -> int:
    """Return the number of columns of heads that brings a sheet of pictures of this size closest to 3:2."""
    def distance(columns: int) -> float:
        rows = columns // 2 + math.ceil(heads / columns)
        return abs(math.log(columns * size[0] / (rows * size[1]) / 1.5))

    return min((2, 4) if heads > 2 else (2,), key=distance)


def contact_sheet(front: Sequence[Tile], heads: Sequence[Tile], scale: np.ndarray) -> Image.Image:
    """Draw a page: two tiles side by side, below them the heads in rows, and the scale of the colours.

    All pictures have one size.
    """
    size = front[0].picture.size
    columns = choose_columns(size, len(heads))
    half, rows = columns // 2, math.ceil(len(heads) / columns)
    unit = SHEET / max(columns * size[0], (half + rows) * size[1])
    width, height = (max(1, round(side * unit)) for side in size)
    zoom = half + min((half - 1) * GAP / width, .5)  # as wide as the heads below, unless these are slivers
    large_width, large_height = round(zoom * width), round(zoom * height)
    across = max(width, *(tile.width() for tile in heads), *(math.ceil(tile.width() / half) for tile in front)) + GAP
    down = height + 2 * LINE + GAP
    top = GAP + large_height + 2 * LINE + GAP
    colors = legend(scale, FONT)
    page_width = GAP + max(columns * across, colors.width + GAP)
    page = Image.new('RGB', (page_width, top + rows * down + LINE + GAP), 'white')
    for i, tile in enumerate(front):
        tile.draw(page, GAP + i * half * across, GAP, (large_width, large_height))
    for i, tile in enumerate(heads):
        tile.draw(page, GAP + i % columns * across, top + i // columns * down, (width, height))
    page.paste(colors, (GAP, page.height - GAP - LINE))
    return page


def map_path(stem: Path, name: str, suffix: str = '.png') -> Path:
    return stem.with_name(f'{stem.name}_{name}{suffix}')


def draw_picture(attention: Attention, picture: Image.Image, stem: Path, *, name: str, save_raw: bool):
    """Write the maps and the sheet of a picture of the file `name`, under names that begin with `stem`."""
    weights = attention(picture)
    maps = {'mean': weights.mean(dim=0), **{f'head{head}': w for head, w in zip(attention.heads, weights)}}
    maps = {key: in_multiples(values) for key, values in maps.items()}
    scale, tiles = color_scale(list(maps.values())), []
    for key, values in maps.items():
        painted = paint(picture, values, scale, attention.patch_size)
        pictures.save_picture(painted, map_path(stem, key))
        low, high = extent(values)
        tiles.append(Tile(painted, key.replace('head', 'head '), f'{low:.1f} to {high:.1f} x uniform'))
    mean, *heads = tiles
    mean.name = f'mean of {len(heads)} head{"s" * (len(heads) > 1)}'
    name = lettering.abridged(lettering.visible(name), LONGEST)
    original = Tile(picture, name, f'{picture.width} x {picture.height} pixels')
    pictures.save_picture(contact_sheet((original, mean), heads, scale), map_path(stem, 'sheet'))
    if save_raw:
        with utils.whole_file(map_path(stem, 'attention', '.npy')) as unfinished:
            np.save(unfinished, weights.numpy())


def side_of(args, attention: Attention) -> int:
    return args.input_size or pictures.drawing_side(attention.loaded.view.input_size, LONGER_SIDE)


def draw_pictures(args) -> List[Path]:
    """Draw the attention over images; return the contact sheets."""
    paths = pictures.find_images(args.images)
    stems = [args.output_dir / stem for stem in pictures.unique_stems(paths)]
    for path in paths:
        load_rgb(path)  # an unreadable picture ends the program before work starts
    attention = build_attention(args)
    names = ['mean', 'sheet', *(f'head{head}' for head in attention.heads)]
    pictures.check_inputs_are_kept(paths, [map_path(stem, name) for stem in stems for name in names])
    args.output_dir.mkdir(parents=True, exist_ok=True)
    side = side_of(args, attention)
    for path, stem in zip(tqdm(paths, unit=' images', disable=not shows_bar()), stems):
        draw_picture(attention, scale_to(load_rgb(path), side), stem, name=path.name, save_raw=args.save_raw)
    sheets = [map_path(stem, 'sheet') for stem in stems]
    for path, sheet in zip(paths, sheets):
        log(f'{path}: {sheet}')
    return sheets


def draw_frames(attention: Attention, frames: Iterable, input_size: int) -> Iterator[Tuple[Image.Image, int]]:
    """Yield each frame beside its mean attention, and its time; the colour scale changes slowly."""
    scale = None
    for frame, time in frames:
        picture = scale_to(frame, input_size, multiple_of=2)  # as the encoder needs
        weights = in_multiples(attention(picture).mean(dim=0))
        frame_scale = color_scale([weights])
        scale = frame_scale if scale is None else SMOOTHING * scale + (1 - SMOOTHING) * frame_scale
        yield side_by_side([picture, paint(picture, weights, scale, attention.patch_size)], gap=0), time


def draw_video(args) -> Path:
    """Draw the attention over a video; return the path of the new video."""
    video.check_video(args.video)
    path = args.output_dir / f'{args.video.stem}_attention.mp4'
    pictures.check_inputs_are_kept([args.video], [path])
    attention = build_attention(args)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    side = side_of(args, attention)
    video.convert_video(args.video, path, lambda frames: draw_frames(attention, frames, side))
    log(f'{args.video}: {path}')
    return path


def main(argv: Optional[list] = None):
    """Draw, with a command line (`sys.argv` if None); return the paths of the sheets, or of the video."""
    args = parse_args(argv)
    return draw_video(args) if args.video else draw_pictures(args)


if __name__ == '__main__':
    run_program(main)
