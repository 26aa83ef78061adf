"""Draw where a model looks: the attention of its CLS token over a picture, head by head, or over a video.

For each picture: STEM_head0.png, ... and STEM_mean.png, the attention of each head and its mean over the heads drawn,
as colours over the grey picture; and STEM_sheet.png, all of them on one page. A map has one value for each patch, so
that a larger --input-size gives a finer one.
"""
import run.startup  # noqa: F401  first of all

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Iterable, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import datasets
import utils
from loaders import pictures
from reports.maps import color_scale, color_table, paint, scale_to
from run import commandline, folder, processes
from run.commandline import COUNT, PATH, PATH_OBJECT, Parser
from run.processes import notice
from tools import common
from utils import InputError, RunStopped, first_line

SMOOTHING = .95  # of a video's colour scale: the part that each frame keeps of the scale before


# ---------------------------------------------------------------------------------------------------------------------
# Arguments

def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(
        'python -m tools.visualize_attention', description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog='Colours run from black (little) over red to light yellow (much), from the 1st to the 99th percentile '
        'of each map, so that single patches can\'t darken the rest. Each map thus has its own scale, whose ends the '
        'sheet gives in multiples of uniform attention (the same to every token). In a video the scale follows '
        'slowly, so that it does not flicker. Sound is left out.')
    group = parser.add_argument_group('pictures')
    group.add_argument('images', nargs='*', type=PATH, metavar='IMAGE', help='files, or folders with images in them')
    group.add_argument('--video', type=PATH_OBJECT, metavar='FILE',
                       help='instead of images: writes STEM_attention.mp4, each frame beside its mean attention; needs '
                       'PyAV (requirements-video.txt)')
    group.add_argument('--output-dir', required=True, type=PATH, metavar='DIR', help='where the maps go')
    group.add_argument('--input-size', default=1024, type=COUNT, metavar='PIXELS',
                       help='longer side that a picture is scaled to, up or down; it keeps its shape, uncropped')
    common.add_weights_arguments(parser)
    common.add_device_arguments(parser)
    parser.set_defaults(full_crop=None)  # nothing is cropped
    group = parser.add_argument_group('attention')
    group.add_argument('--heads', default='all', type=head_numbers, metavar='all|N,N,...',
                       help='heads to draw, and to take the mean of, counted from 0')
    group.add_argument('--layer', default=-1, type=int, metavar='N',
                       help='class-attention block, counted from 0, or from the end: -1 is the last')
    group.add_argument('--save-raw', action=argparse.BooleanOptionalAction, default=False,
                       help='also write STEM_attention.npy: (heads, H, W) in patches, float32, each head\'s attention '
                       'to the patches; with that to the CLS token itself, it sums to 1')
    return parser


def head_numbers(text: str) -> Optional[List[int]]:
    """An argparse type: `all` (None) or numbers with commas between them."""
    numbers = text.split(',')
    if text != 'all' and not all(number.isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f'{text!r} is not allowed: it must be all, or numbers such as 0,3,5')
    return None if text == 'all' else list(dict.fromkeys(map(int, numbers)))


def parse_args(argv: Optional[list] = None) -> argparse.Namespace:
    args = get_args_parser().parse_args(argv)
    if bool(args.images) == bool(args.video):
        raise InputError('give either images or --video FILE')
    if args.video and args.save_raw:
        raise InputError('--save-raw: has no effect with --video')
    if args.model:
        common.check_xcit(args.model)
    folder.check_output_dir(args.output_dir)
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Attention

@dataclasses.dataclass
class Attention:
    """The class attention of a model that is looked at.

    Args:
        loaded: an XCiT.
        layer: which class-attention block.
        heads: which of its heads.
    """
    loaded: common.LoadedModel
    layer: int
    heads: List[int]

    @property
    def patch_size(self) -> int:
        return common.patch_size(self.loaded)

    @torch.no_grad()
    def __call__(self, picture: Image.Image) -> torch.Tensor:
        """A picture of any size -> attention of CLS to its patches, (heads, H, W), float32, on the CPU."""
        pixels = datasets.build_normalisation(self.loaded)(picture)
        amp_dtype = self.loaded.amp_dtype
        with torch.autocast(self.loaded.device.type, amp_dtype, enabled=amp_dtype is not None):
            weights, _ = self.loaded.model.forward_attention(pixels[None].to(self.loaded.device), layer=self.layer)
        weights = weights[0].cpu()
        W = math.ceil(picture.width / self.patch_size)
        return weights[self.heads].unflatten(1, (-1, W))


def build_attention(args) -> Attention:
    """The model, and the block and heads that the flags choose.

    Raises:
        InputError: it is no XCiT, or has no such block or head.
    """
    loaded = common.load_model(args)
    common.check_xcit(loaded.name)
    blocks = loaded.model.cls_attn_blocks
    if not -len(blocks) <= args.layer < len(blocks):
        raise InputError(f'--layer {args.layer}: {loaded.name} has class-attention blocks 0 to {len(blocks) - 1}')
    count = blocks[args.layer].attn.num_heads
    heads = list(range(count)) if args.heads is None else args.heads
    if max(heads) >= count:
        raise InputError(f'--heads {",".join(map(str, heads))}: {loaded.name} has heads 0 to {count - 1}')
    return Attention(loaded, args.layer, heads)


# ---------------------------------------------------------------------------------------------------------------------
# Sheets

SHEET = 2000  # longer side, about, in pixels
GAP, LINE = 28, 30  # between pictures, and of a line of text, in pixels
FONT = 22
INK, GREY = (20, 20, 20), (110, 110, 110)


@dataclasses.dataclass
class Tile:
    """A picture on a sheet, its name, and a line about it."""
    picture: Image.Image
    name: str
    about: str

    def width(self) -> int:
        return math.ceil(max(text_width(self.name), text_width(self.about)))

    def draw(self, page: Image.Image, x: int, y: int, size: Tuple[int, int]):
        page.paste(self.picture.resize(size, Image.Resampling.LANCZOS), (x, y))
        text(page, x, y + size[1] + 6, self.name, INK)
        text(page, x, y + size[1] + 6 + LINE, self.about, GREY)


def font() -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(FONT)


def text_width(words: str) -> float:
    return font().getlength(words)


def text(page: Image.Image, x: int, y: int, words: str, color: Tuple[int, int, int]):
    ImageDraw.Draw(page).text((x, y), words, color, font())


def grid(size: Tuple[int, int], heads: int) -> Tuple[int, int]:
    """Columns and rows of the heads that make a sheet nearest to 3:2, for pictures of this size."""
    def shape(columns):
        return columns, math.ceil(heads / columns)

    def elongation(shape):
        columns, rows = shape
        return abs(math.log(columns * size[0] / ((columns // 2 + rows) * size[1]) / 1.5))

    return min((shape(columns) for columns in (2, 4) if columns < heads + 2), key=elongation)


def contact_sheet(front: Sequence[Tile], heads: Sequence[Tile]) -> Image.Image:
    """One page: the two tiles in front side by side, and as wide as these the heads in rows; all of one size.

    Returns:
        RGB, about SHEET pixels long.
    """
    size = front[0].picture.size
    columns, rows = grid(size, len(heads))
    half = columns // 2
    unit = SHEET / max(columns * size[0], (half + rows) * size[1])
    width, height = (max(1, round(side * unit)) for side in size)
    zoom = half + min((half - 1) * GAP / width, .5)  # as wide as the heads below, unless these are slivers
    large_width, large_height = round(zoom * width), round(zoom * height)
    across = max(width, *(tile.width() for tile in heads), *(math.ceil(tile.width() / half) for tile in front)) + GAP
    down = height + 2 * LINE + GAP
    top = GAP + large_height + 2 * LINE + GAP
    colors = legend()
    page_width = GAP + max(columns * across, colors.width + GAP)
    page = Image.new('RGB', (page_width, top + rows * down + LINE + GAP), 'white')
    for i, tile in enumerate(front):
        tile.draw(page, GAP + i * half * across, GAP, (large_width, large_height))
    for i, tile in enumerate(heads):
        tile.draw(page, GAP + i % columns * across, top + i // columns * down, (width, height))
    page.paste(colors, (GAP, page.height - GAP - LINE))
    return page


def legend() -> Image.Image:
    """The colours and what they mean, one line high."""
    bar = Image.fromarray(color_table()[None]).resize((256, FONT))
    before, after = 'little', 'much attention; each map has its own scale, given in multiples of uniform attention'
    start, end = (math.ceil(text_width(words)) for words in (before, after))
    line = Image.new('RGB', (start + bar.width + end + 24, LINE), 'white')
    text(line, 0, 0, before, GREY)
    line.paste(bar, (start + 12, 3))
    text(line, start + bar.width + 24, 0, after, GREY)
    return line


def describe_scale(scale: np.ndarray, tokens: int) -> str:
    low, high = scale * tokens
    return f'{low:.1f} to {high:.1f} x uniform'


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def map_path(stem: Path, name: str, suffix: str = '.png') -> Path:
    return stem.with_name(f'{stem.name}_{name}{suffix}')


def output_files(stem: Path, heads: List[int]) -> List[Path]:
    """All that may be written for a picture."""
    names = ['mean', 'sheet', *(f'head{head}' for head in heads)]
    return [map_path(stem, 'attention', '.npy')] + [map_path(stem, name) for name in names]


def draw_picture(attention: Attention, picture: Image.Image, stem: Path, *, save_raw: bool):
    """Write a picture's maps and sheet, under names that begin with `stem`."""
    weights = attention(picture)
    tokens = 1 + weights[0].numel()
    maps = {'mean': weights.mean(dim=0), **{f'head{head}': w for head, w in zip(attention.heads, weights)}}
    tiles = []
    for name, values in maps.items():
        scale = color_scale(values)
        painted = paint(picture, values, scale, attention.patch_size)
        common.save_picture(painted, map_path(stem, name))
        tiles.append(Tile(painted, name.replace('head', 'head '), describe_scale(scale, tokens)))
    mean, *heads = tiles
    mean.name = f'mean of {len(heads)} head{"s" * (len(heads) > 1)}'
    original = Tile(picture, 'picture', f'{picture.width} x {picture.height} pixels')
    common.save_picture(contact_sheet((original, mean), heads), map_path(stem, 'sheet'))
    if save_raw:
        with utils.whole_file(map_path(stem, 'attention', '.npy')) as unfinished:
            np.save(unfinished, weights.numpy())


def draw_pictures(args) -> List[Path]:
    """The program for images.

    Returns:
        The contact sheets.
    """
    paths = common.find_images(args.images)
    stems = [Path(args.output_dir, stem) for stem in common.unique_stems(paths)]
    for path in paths:
        pictures.load_rgb(path)  # what can't be read is refused before the work
    attention = build_attention(args)
    common.check_inputs_are_kept(paths, [file for stem in stems for file in output_files(stem, attention.heads)])
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    for path, stem in zip(tqdm(paths, unit=' images', disable=not processes.shows_bar()), stems):
        draw_picture(attention, scale_to(pictures.load_rgb(path), args.input_size), stem, save_raw=args.save_raw)
    for path, stem in zip(paths, stems):
        notice(f'{path}: {map_path(stem, "sheet")}')
    return [map_path(stem, 'sheet') for stem in stems]


# ---------------------------------------------------------------------------------------------------------------------
# Video

def open_video(path: Path):
    """A video as a PyAV container, which is a context.

    Raises:
        InputError: PyAV is missing, or there is no such video.
    """
    if not path.exists():
        raise InputError(f'--video {path}: no such file')
    try:
        import av  # only videos need it
    except ImportError:
        raise InputError('--video: needs PyAV, which is not installed: pip install -r requirements-video.txt') from None
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError) as error:
        raise InputError(f'--video {path}: damaged, or not a video ({first_line(error)})') from None
    if not container.streams.video:
        raise InputError(f'--video {path}: has no pictures')
    container.streams.video[0].thread_type = 'AUTO'
    return container


def read_frames(container) -> Iterator[Tuple[Image.Image, int]]:
    """The frames of an open video, one after the other, upright, and when each is shown, in units of its time base.

    Raises:
        InputError: no frame, or a damaged one.
    """
    import av
    stream = container.streams.video[0]
    number = -1
    try:
        for number, frame in enumerate(container.decode(stream)):
            time = frame.pts
            if time is None:  # a bare stream of frames
                time = round(number / (stream.guessed_rate * stream.time_base))
            yield frame.to_image().rotate(frame.rotation, expand=True), time
    except av.FFmpegError as error:
        raise InputError(f'--video {container.name}: damaged at frame {number + 1} ({first_line(error)})') from None
    if number < 0:
        raise InputError(f'--video {container.name}: has no frames')


def write_video(path: Path, timed_pictures: Iterable[Tuple[Image.Image, int]], stream):
    """Encode pictures of one size at the times, time base and frame rate of the video `stream` that they come from."""
    import av
    with av.open(str(path), 'w') as container:
        encoder = None
        for picture, time in timed_pictures:
            if encoder is None:
                encoder = container.add_stream('libx264', stream.guessed_rate, {'crf': '18'})
                encoder.width, encoder.height, encoder.pix_fmt = *picture.size, 'yuv420p'
                encoder.time_base = encoder.codec_context.time_base = stream.time_base
            frame = av.VideoFrame.from_image(picture)
            frame.pts, frame.time_base = time, stream.time_base
            try:
                container.mux(encoder.encode(frame))
            except av.FFmpegError as error:
                raise RunStopped(f'a frame of the video can\'t be encoded ({first_line(error)})') from None
        container.mux(encoder.encode())


def draw_frames(attention: Attention, timed_frames: Iterable, input_size: int) -> Iterator[Tuple[Image.Image, int]]:
    """Each frame with its mean attention on its right; the colours' scale follows slowly."""
    scale = None
    for frame, time in timed_frames:
        picture = scale_to(frame, input_size, multiple_of=2)  # as the encoder needs
        weights = attention(picture).mean(dim=0)
        own_scale = color_scale(weights)
        scale = own_scale if scale is None else SMOOTHING * scale + (1 - SMOOTHING) * own_scale
        pair = Image.new('RGB', (2 * picture.width, picture.height))
        pair.paste(picture, (0, 0))
        pair.paste(paint(picture, weights, scale, attention.patch_size), (picture.width, 0))
        yield pair, time


def draw_video(args) -> Path:
    """The program for a video: frame by frame, so that a long one needs no more memory.

    Returns:
        The video written.
    """
    with open_video(args.video) as container:
        next(read_frames(container))  # what can't be read is refused before the work
    path = Path(args.output_dir, f'{args.video.stem}_attention.mp4')
    common.check_inputs_are_kept([args.video], [path])
    attention = build_attention(args)
    path.parent.mkdir(parents=True, exist_ok=True)
    with utils.whole_file(path) as unfinished, open_video(args.video) as container:
        stream = container.streams.video[0]
        bar = tqdm(read_frames(container), total=stream.frames or None, unit=' frames',
                   disable=not processes.shows_bar())
        write_video(unfinished, draw_frames(attention, bar, args.input_size), stream)
    notice(f'{args.video}: {path}')
    return path


def main(argv: Optional[list] = None):
    """Returns the paths of the sheets, or of the video."""
    args = parse_args(argv)
    return draw_video(args) if args.video else draw_pictures(args)


if __name__ == '__main__':
    commandline.run_program(main)
