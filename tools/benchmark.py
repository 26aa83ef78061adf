"""Measure time and memory of models, always against each other in one run; weights are random.

speed: one model. scaling: models at growing resolution, with two plots. compare: models side by side (`--suite`: this
XCiT against timm's in the settings of RESULTS.md). xca: cross-covariance attention alone, in both its forms. data:
loading of training images, against timm's loader. dino: a training step of DINO, against the same step with timm's
model.

A measurement is the median of rounds in which the candidates take turns, after a warm-up. Memory is the peak of one
step beyond the memory in use before the step: weights, optimizer state and the position that a fused model keeps for
the next image of the same size do not count.
"""
import argparse
import datetime
import os
import re
import sys
from pathlib import Path
from typing import Optional, Tuple

if not __package__:  # started as a file
    sys.path[0] = os.path.realpath(f'{__file__}/../..')

import timm
import torch

import utils
import xca_gram
import xcit
from dino.loss import GLOBAL
from run import cpu, devices, flags, logs
from run.commandline import COUNT, COUNT_OR_0, PATH_OBJECT, Parser, run_program
from run.folder import check_output_dir
from run.output import log
from tools import benchmark_dino, benchmark_layers, benchmark_loading, benchmark_models
from tools.benchmark_models import TIMM, StepSettings
from tools.measuring import PRECISIONS
from utils import InputError, counted, dashed, similar

PAIR = ['xcit_small_12_p16', f'{TIMM}xcit_small_12_p16']
OTHERS = ('deit_small_patch16_224', 'swin_tiny_patch4_window7_224', 'resnet50')
RESOLUTIONS = (224, 384, 512, 768, 1024, 1344, 1792, 2240)
MODES = ('default', 'reduce-overhead', 'max-autotune')


def size(text: str) -> Tuple[int, int]:
    """Parse the pixels of a square image, or HEIGHTxWIDTH (an argparse type)."""
    numbers = re.fullmatch(r'(\d+)(?:x(\d+))?', text)
    if numbers is None or not all(int(n) for n in numbers.groups('1')):
        raise argparse.ArgumentTypeError(f'{text!r} is not allowed: must be pixels, as 224 or 800x1333')
    return int(numbers[1]), int(numbers[2] or numbers[1])


def model_name(text: str) -> str:
    """Parse the name of a model of this repository or timm, or of timm's version of ours (an argparse type)."""
    name = text.removeprefix(TIMM)
    if name not in xcit.MODELS if text.startswith(TIMM) else not timm.is_model(name):
        names = xcit.MODELS + timm.list_models()
        raise argparse.ArgumentTypeError(f'no model {text}{similar(name, names)}')
    return text


def get_args_parser() -> Parser:
    parser = Parser('python -m tools.benchmark', description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    example='speed --model xcit_small_12_p8 --resolution 800x1333 --batch-size 1')
    commands = parser.add_subparsers(dest='command', required=True, metavar='{speed,scaling,compare,xca,data,dino}')

    speed = commands.add_parser('speed', help='time, memory and operations of one model',
                                example='--model xcit_small_12_p8 --resolution 800x1333 --batch-size 1')
    speed.add_argument('--model', type=model_name, default='xcit_small_12_p16',
                       help='name of a model; timm:NAME: timm\'s implementation')

    scaling = commands.add_parser('scaling', help='time and memory of models against resolution',
                                  example='--models xcit_small_12_p16 timm:xcit_small_12_p16')
    scaling.add_argument('--models', type=model_name, nargs='+', default=PAIR, help='names of models')
    scaling.add_argument('--resolutions', type=size, nargs='+', default=[(n, n) for n in RESOLUTIONS],
                         metavar='PIXELS|HxW', help='sizes of the images, from small to large')
    scaling.add_argument('--output-dir', type=PATH_OBJECT, default=Path('runs/scaling'), metavar='DIR',
                         help='folder of scaling.csv, time.png and memory.png')

    compare = commands.add_parser('compare', help='several models side by side',
                                  example='--models xcit_small_12_p16 resnet50 --batch-size 8')
    compare.add_argument('--models', type=model_name, nargs='+', default=[*PAIR, *OTHERS],
                         help='names of models; ratios refer to the second')
    modes = compare.add_mutually_exclusive_group()
    modes.add_argument('--suite', action='store_true',
                       help='this XCiT against timm\'s in fixed settings, the better of eager and compiled')
    modes.add_argument('--against-timm', nargs='*', choices=xcit.MODELS, metavar='MODEL',
                       help='names of models against timm\'s at --resolution and --batch-size, the better of eager and '
                       'compiled; no names: all 14')

    attention = commands.add_parser('xca', help='cross-covariance attention alone',
                                    example='--dim 384 --tokens 196 784')
    attention.add_argument('--dim', type=COUNT, nargs='+', default=[384], metavar='C', help='numbers of channels')
    attention.add_argument('--tokens', type=COUNT, nargs='+', default=[196, 400, 784, 1200, 2304, 4096, 10000],
                           metavar='N', help='numbers of tokens of an image')

    dino = commands.add_parser('dino', help='training step without labels',
                               example='--model xcit_small_12_p16 --batch-size 4')
    dino.add_argument('--model', choices=xcit.MODELS, default='xcit_small_12_p16', metavar='NAME',
                      help='name of an XCiT model')
    dino.add_argument('--global-crops-size', type=COUNT, default=224, metavar='PIXELS',
                      help='side of the two global crops')
    dino.add_argument('--local-crops-size', type=COUNT, default=96, metavar='PIXELS', help='side of local crops')
    dino.add_argument('--local-crops-number', type=COUNT_OR_0, default=8, metavar='N',
                      help='number of local crops of an image')
    dino.add_argument('--out-dim', type=COUNT, default=65536, metavar='N', help='number of prototypes of the head')

    data = commands.add_parser('data', help='loading of training images, per core',
                               example='--data-path pictures --num-workers 2')
    data.add_argument('--data-path', type=PATH_OBJECT, metavar='DIR',
                      help='pictures in class folders; unset: synthetic pictures')
    data.add_argument('--images', type=COUNT, default=256, metavar='N',
                      help='number of synthetic pictures, of 500 x 375 pixels')
    data.add_argument('--num-workers', type=COUNT_OR_0, default=0, metavar='N',
                      help='loading workers; 0: load in the main process')

    for measured in (speed, compare):
        measured.add_argument('--resolution', type=size, default=(224, 224), metavar='PIXELS|HxW',
                              help='size of the images')
    for measured in (speed, scaling, compare):
        measured.add_argument('--training', action=argparse.BooleanOptionalAction, default=False,
                              help='training steps with AdamW instead of inference')
        measured.add_argument('--xca', choices=xca_gram.FORMS, default='auto',
                              help='form of XCA in this repository\'s models')
    for measured in (speed, scaling, compare, dino):
        measured.add_argument('--compile', action=argparse.BooleanOptionalAction, default=measured is dino,
                              help='torch.compile' + (' in addition to eager mode' if measured is dino else ''))
        measured.add_argument('--compile-mode', choices=MODES, default='default',
                              help='mode of torch.compile; the last two use CUDA graphs')
    for measured, batch_size in ((speed, 8), (scaling, 1), (compare, 8), (attention, 1), (dino, 4)):
        measured.add_argument('--batch-size', type=COUNT, default=batch_size, metavar='IMAGES', help='images of a step')
        measured.add_argument('--precision', choices=list(PRECISIONS), default='fp32',
                              help='autocast dtype; fp32: no autocast')
        flags.add_device_flag(measured)
    for measured in (speed, scaling, compare, attention, dino, data):
        measured.add_argument('--rounds', type=COUNT, default=5 if measured is data else 7, metavar='N',
                              help='rounds, whose median is shown')
    return parser


def is_against_timm(args) -> bool:
    return args.command == 'compare' and (args.suite or args.against_timm is not None)


def check_flags(args):
    """Raise InputError if a flag has no effect."""
    if is_against_timm(args):
        mode, fixed = '--against-timm', ['models', 'compile']
        if args.suite:
            mode, fixed = '--suite', [*fixed, 'resolution', 'batch_size', 'training']
        default = get_args_parser().parse_args(['compare'])
        for name in fixed:
            if vars(args)[name] != vars(default)[name]:
                raise InputError(f'{dashed(name)}: has no effect with {mode}')
        return
    if 'compile' in args:
        flags.check_compile_flags(args)
    if 'xca' in args:
        models = [args.model] if args.command == 'speed' else args.models
        if args.xca != 'auto' and not set(models) & set(xcit.MODELS):
            raise InputError(f'--xca {args.xca}: has no effect on {", ".join(models)}')
        if args.xca == 'gram' and args.precision != 'fp32':
            raise InputError(f'--xca gram: needs --precision fp32, not {args.precision}')


def measure(args, device: torch.device):
    """Run a command; return its measurements."""
    if args.command == 'data':
        return benchmark_loading.measure(args.data_path, images=args.images, num_workers=args.num_workers,
                                         rounds=args.rounds)
    if args.command == 'xca':
        return benchmark_layers.attention(args.dim, args.tokens, args.batch_size, precision=args.precision,
                                          device=device, rounds=args.rounds)
    if args.command == 'dino':
        sizes = [args.global_crops_size] * GLOBAL + [args.local_crops_size] * args.local_crops_number
        return benchmark_dino.measure(
            args.model, args.batch_size, sizes, args.out_dim, compile_mode=args.compile_mode if args.compile else None,
            precision=args.precision, device=device, rounds=args.rounds)
    settings = StepSettings(device, args.training, args.precision, args.compile, args.compile_mode, args.xca)
    if args.command == 'speed':
        return benchmark_models.speed(args.model, args.resolution, args.batch_size, settings, rounds=args.rounds)
    if args.command == 'scaling':
        return benchmark_models.scaling(args.models, args.resolutions, args.batch_size, settings, rounds=args.rounds,
                                        output_dir=args.output_dir)
    if not is_against_timm(args):
        return benchmark_models.compare(args.models, args.resolution, args.batch_size, settings, rounds=args.rounds)
    mode = 'training' if args.training else 'inference'
    cases = benchmark_models.SUITE if args.suite else [
        (mode, name, *args.resolution, args.batch_size, args.batch_size) for name in args.against_timm or xcit.MODELS]
    return benchmark_models.against_timm(cases, settings, rounds=args.rounds, with_memory=args.suite)


def main(argv: Optional[list] = None):
    """Run a command, with a command line (`sys.argv` if None); return its measurements."""
    args = get_args_parser().parse_args(argv)
    check_flags(args)
    device = torch.device('cpu') if args.command == 'data' else devices.choose_device(args.device)
    if args.command != 'data' and args.precision == 'fp16' and device.type == 'cpu':
        raise InputError('--precision fp16: does not work on CPUs; allowed: fp32, bf16')
    if args.command == 'scaling':
        if not utils.is_installed('matplotlib'):
            raise InputError('scaling: needs matplotlib: pip install -r requirements.txt')
        check_output_dir(str(args.output_dir))
        with utils.writing(args.output_dir):
            args.output_dir.mkdir(parents=True, exist_ok=True)
    machine = (torch.cuda.get_device_name(device) if device.type == 'cuda' else
               f'{device.type}, {counted(os.cpu_count() or 1, "core")}')
    log(f'{datetime.date.today()}: python -m tools.benchmark {" ".join(sys.argv[1:] if argv is None else argv)}')
    log(f'{machine}, {counted(torch.get_num_threads(), "thread")}; '
        + ', '.join(f'{name} {version}' for name, version in logs.environment().items()))
    if device.type == 'cpu':
        cpu.set_threads(None if args.command == 'data' else args.threads, only_warns=True)
    return measure(args, device)


if __name__ == '__main__':
    run_program(main)
