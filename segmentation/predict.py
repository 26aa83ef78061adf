"""Predict label pictures of pictures or of a video, and draw the classes over them.

Writes a palette PNG for each picture, with the numbers that the training's label pictures have (ADE20k: from 1); and
with --overlay drawings with a legend of the classes and their shares.
"""
import argparse
import os
import sys
from typing import Iterable, Iterator, List, Optional, Tuple

if not __package__:  # started as a file
    sys.path[0] = os.path.realpath(f'{__file__}/../..')

import numpy as np
from PIL import Image
from tqdm import tqdm

import xcit
from dense import drawing
from inference import pictures, video
from inference.flags import add_media_flags, check_media
from loaders.pictures import load_rgb
from run import flags
from run.commandline import PATH, PATH_OBJECT, Parser, run_program
from run.folder import check_output_dir
from run.output import log, shows_bar
from segmentation import files, labels, testing
from segmentation.files import Loaded
from segmentation.predictor import Predictor
from utils import InputError, UnreadableImage

FONT = 40  # a legend's letters, as a part of the longer side of a picture: 1 / FONT
LEAST_SHARE = .001  # of a picture, for a class in the legend


def get_args_parser() -> Parser:
    parser = Parser('python -m segmentation.predict', description=__doc__,
                    example='photos/ --weights runs/mine/best_model.pth --out labels/ --overlay drawn/')
    group = parser.add_argument_group('pictures')
    add_media_flags(group, video='writes STEM_classes.mp4 to --overlay, each frame with its classes')
    flags.add_pixels_flag(group)
    group.add_argument('--out', type=PATH_OBJECT, metavar='DIR', help='folder of the label pictures')
    group.add_argument('--overlay', type=PATH_OBJECT, metavar='DIR', help='folder of drawings')
    group = parser.add_argument_group('model')
    group.add_argument('--model', default='', metavar='NAME',
                       help='name of the model; if unset, as in the weights; needed for published weights by tag')
    group.add_argument('--weights', required=True, type=PATH, metavar=f'FILE|URL|{files.TAG}',
                       help='weights of a segmenter, published or trained here')
    group = parser.add_argument_group('prediction')
    testing.add_size_flags(group)
    testing.add_flags(group)
    flags.add_device_flag(group)
    flags.add_amp_flag(group, default='off')
    return parser


def parse_args(argv: Optional[list] = None) -> argparse.Namespace:
    """Parse the command line, and raise InputError for invalid flags before any work is done."""
    args = get_args_parser().parse_args(argv)
    args.amp = args.amp or 'off'
    check_media(args)
    if args.video and (args.out or not args.overlay):
        raise InputError('--video: needs --overlay DIR for the new video, and no --out')
    if not args.out and not args.overlay:
        raise InputError('--out DIR: needed, or --overlay DIR')
    for flag, folder in (('--out', args.out), ('--overlay', args.overlay)):
        if folder is not None:
            check_output_dir(str(folder), flag)
    if args.out and args.overlay and args.out.absolute() == args.overlay.absolute():
        raise InputError(f'--overlay {args.overlay}: the folder of --out; choose another folder')
    files.check_exists(args.weights, '--weights', args.model)
    return args


def describe(classes: np.ndarray, names: List[str]) -> List[Tuple[int, str]]:
    """Return the classes of a label map, the largest first, each with its name and share."""
    shares = np.bincount(classes.ravel(), minlength=len(names)) / classes.size
    order = np.argsort(-shares, kind='stable')
    return [(int(i), f'{names[i]} {100 * shares[i]:.1f} %') for i in order if shares[i] >= LEAST_SHARE]


def drawn(picture: np.ndarray, classes: np.ndarray, names: List[str]) -> Image.Image:
    """Draw the classes over a picture, with a legend below."""
    colors = labels.palette(len(names))
    painted = Image.fromarray(drawing.overlay(picture, classes, colors))
    entries = [(text, colors[i]) for i, text in describe(classes, names)]
    legend = drawing.legend(entries, painted.width, font=max(12, max(painted.size) // FONT))
    return drawing.stacked([painted, legend])


def predict_pictures(args, loaded: Loaded, predictor: Predictor, names: List[str]):
    """Predict the pictures of the command line; go on past unreadable pictures, which are reported at the end."""
    missing, unreadable = [], []
    paths = pictures.find_images(args.images, missing)
    stems = pictures.unique_stems(paths)
    outputs = [folder / f'{stem}.png' for folder in (args.out, args.overlay) if folder is not None for stem in stems]
    pictures.check_inputs_are_kept(paths, outputs)
    for path, stem in zip(tqdm(paths, unit=' images', disable=not shows_bar()), stems):
        try:
            picture = np.asarray(load_rgb(path))
        except UnreadableImage as error:
            unreadable.append(error)
            continue
        classes = predictor(picture).cpu().numpy()
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            labels.save(args.out / f'{stem}.png', classes, loaded.numbering)
        if args.overlay is not None:
            args.overlay.mkdir(parents=True, exist_ok=True)
            pictures.save_picture(drawn(picture, classes, names), args.overlay / f'{stem}.png')
        log(f'{path}: {", ".join(text for _, text in describe(classes, names)[:5])}')
    pictures.report_unreadable([*missing, *unreadable], len(paths) + len(missing))


def draw_frames(predictor: Predictor, names: List[str], frames: Iterable) -> Iterator[Tuple[Image.Image, int]]:
    """Yield each frame with its classes over it, and its time."""
    colors = labels.palette(len(names))
    for frame, time in frames:
        picture = np.asarray(frame.crop((0, 0, frame.width // 2 * 2, frame.height // 2 * 2)))  # as the encoder needs
        yield Image.fromarray(drawing.overlay(picture, predictor(picture).cpu().numpy(), colors)), time


def predict_video(args, predictor: Predictor, names: List[str]):
    path = args.overlay / f'{args.video.stem}_classes.mp4'
    pictures.check_inputs_are_kept([args.video], [path])
    args.overlay.mkdir(parents=True, exist_ok=True)
    video.convert_video(args.video, path, lambda frames: draw_frames(predictor, names, frames))
    log(f'{args.video}: {path}')


def main(argv: Optional[list] = None):
    """Predict, with a command line (`sys.argv` if None)."""
    args = parse_args(argv)
    device = flags.choose_device(args)
    if args.video:
        video.check_video(args.video)
    loaded = files.load(args.weights, '--weights', args.model)
    names = loaded.classes or [str(value) for value in loaded.numbering.values]
    model = loaded.model.to(device).eval()
    xcit.fuse(model.backbone)
    predictor = testing.build_predictor(args, model, flags.amp_dtype(args, device))
    if args.video:
        predict_video(args, predictor, names)
    else:
        predict_pictures(args, loaded, predictor, names)


if __name__ == '__main__':
    run_program(main)
