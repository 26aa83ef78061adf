"""Flags of the programs that apply a trained model, and their values as arguments of `loaded.load`."""
import argparse

from run import cpu, flags
from run.commandline import COUNT, PATH, PATH_OBJECT
from utils import InputError


def add_media_flags(group, *, video: str):
    """Add the flags of pictures, or of a video instead; `video`: result of the latter, for the help."""
    group.add_argument('images', nargs='*', type=PATH, metavar='IMAGE', help='image files, or folders with images')
    group.add_argument('--video', type=PATH_OBJECT, metavar='FILE',
                       help=f'video instead of images: {video}; needs PyAV (requirements-video.txt)')


def check_media(args):
    """Raise InputError unless there are either pictures or a video."""
    if bool(args.images) == bool(args.video):
        raise InputError('give either images or --video FILE')


def add_weights_flags(parser: argparse.ArgumentParser):
    """Add the flags of a model and its weights."""
    group = parser.add_argument_group('model')
    flags.add_model_flag(group)
    group.add_argument('--pretrained', required=True, type=PATH, metavar=flags.WEIGHTS,
                       help='tag of published weights (see the README), or a file')
    add_choice_of_weights(group)


def add_choice_of_weights(group):
    """Add the flags that choose one of several sets of weights in a file."""
    group.add_argument('--use-ema', action=argparse.BooleanOptionalAction, default=False,
                       help='EMA weights of a training checkpoint instead of the model\'s')
    group.add_argument('--checkpoint-key', default='', metavar='KEY',
                       help='place of the weights in a file with several sets, e.g. state_dict.student')


def add_square_flags(parser: argparse.ArgumentParser):
    """Add the flags of the square images that are cropped from pictures."""
    group = parser.add_argument_group('images')
    group.add_argument('--input-size', type=COUNT, metavar='PIXELS',
                       help='side of the square images; if unset, as in the model\'s own evaluation')
    group.add_argument('--full-crop', action=argparse.BooleanOptionalAction,
                       help='crop of the whole shorter side, not of 0.875; if unset, as in the model\'s own evaluation')


def add_device_flags(parser: argparse.ArgumentParser):
    group = parser.add_argument_group('device')
    flags.add_device_flag(group)
    flags.add_amp_flag(group)


def add_loading_flags(parser: argparse.ArgumentParser):
    """Add the flags of `pictures.batches`."""
    group = parser.add_argument_group('data')
    flags.add_batch_flags(group, trains=False)
    flags.add_workers_flag(group)
    flags.add_pixels_flag(group)


def weights(args) -> dict:
    """Return the flags of add_weights_flags as arguments."""
    return dict(pretrained=args.pretrained, model=args.model or '', use_ema=args.use_ema,
                checkpoint_key=args.checkpoint_key)


def squares(args) -> dict:
    """Return the flags of add_square_flags as arguments."""
    return dict(input_size=args.input_size, full_crop=args.full_crop)


def device(args) -> dict:
    """Return the flags of add_device_flags as arguments; raise InputError if the device does not support a flag."""
    chosen = flags.choose_device(args)
    if chosen.type == 'cpu':
        cpu.set_threads(args.threads)
    return dict(device=chosen, amp_dtype=flags.amp_dtype(args, chosen))
