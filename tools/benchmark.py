"""Measure time and memory of the models, always against each other in one run; weights are random.

speed: one model. scaling: models at growing resolution, with two plots. compare: models side by side (`--suite`: this
XCiT against timm's in the settings of RESULTS.md). xca: cross-covariance attention alone, in both its forms. linear:
linear layers by MKL and by oneDNN, on a CPU. data: how fast training images are loaded, against timm's loader. dino: a
training step of DINO, student and teacher, against the same with timm's model.

A figure is the median of rounds in which the candidates take turns, after a warm-up. Memory is the peak of one step
beyond what was in use before it: weights, the optimizer's state and the position that a fused model keeps for the next
image of the same size don't count.
"""
import run.startup  # noqa: F401  first of all

import argparse
import csv
import datetime
import functools
import math
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Dict, List, Optional, Tuple

import numpy as np
import timm
import timm.models.xcit
import torch
from PIL import Image
from timm.data import ImageDataset, auto_augment, create_loader

import datasets
import main as classification
import utils
import xca
import xca_gram
import xcit
import xcit_linear
import xcit_zoo
from dino import speed as dino_speed
from loaders.batches import build_train_loader
from run import commandline, folder, logs, processes
from run.commandline import COUNT, COUNT_OR_0, PATH_OBJECT
from run.flags import add_device_flag
from run.processes import notice
from tools.measuring import (
    PRECISIONS,
    fails_for_memory,
    known,
    least_of,
    matrix_peak,
    operations,
    peak_memory,
    ratio,
    shown,
    table,
    take_turns,
)
from utils import InputError, similar

TIMM = 'timm:'  # in front of a model's name: timm's implementation of XCiT
OTHERS = ('deit_small_patch16_224', 'swin_tiny_patch4_window7_224', 'resnet50')
RESOLUTIONS = (224, 384, 512, 768, 1024, 1344, 1792, 2240)
# What `compare --suite` measures: inference or training, model, height, width, images on a CPU and on a GPU
SUITE = (
    ('inference', 'xcit_small_12_p16', 224, 224, 8, 256),
    ('inference', 'xcit_small_12_p8', 224, 224, 4, 128),
    ('inference', 'xcit_small_12_p8', 800, 1333, 1, 8),
    ('inference', 'xcit_small_12_p16', 1600, 1600, 1, 8),
    ('training', 'xcit_small_12_p16', 224, 224, 8, 128),
    ('training', 'xcit_small_12_p8', 384, 384, 2, 32),
)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments

def size(text: str) -> Tuple[int, int]:
    """An argparse type: pixels of a square image, or HEIGHTxWIDTH."""
    numbers = re.fullmatch(r'(\d+)(?:x(\d+))?', text)
    if numbers is None or not all(int(n) for n in numbers.groups('1')):
        raise argparse.ArgumentTypeError(f'{text!r} is not allowed: it must be pixels, as 224 or 800x1333')
    return int(numbers[1]), int(numbers[2] or numbers[1])


def model_name(text: str) -> str:
    """An argparse type: a model of this repository or of timm, or timm's version of one of ours."""
    name = text.removeprefix(TIMM)
    if name not in xcit.MODELS if text.startswith(TIMM) else not timm.is_model(name):
        names = xcit.MODELS + timm.list_models()
        raise argparse.ArgumentTypeError(f'no model {text}{similar(name, names)}')
    return text


def get_args_parser() -> argparse.ArgumentParser:
    parser = commandline.Parser('python -m tools.benchmark', description=__doc__,
                          formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest='what', required=True, metavar='{speed,scaling,compare,xca,linear,data,dino}')
    command = functools.partial(what.add_parser,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    speed = command('speed', help='time, memory and operations of one model')
    speed.add_argument('--model', type=model_name, default='xcit_small_12_p16', help='timm:NAME: as in timm')
    speed.add_argument('--resolution', type=size, default=(224, 224), metavar='PIXELS|HxW', help='of the images')
    speed.add_argument('--batch-size', type=COUNT, default=8, metavar='IMAGES', help='of a step')

    scaling = command('scaling', help='time and memory of models against resolution')
    scaling.add_argument('--models', type=model_name, nargs='+',
                         default=['xcit_small_12_p16', TIMM + 'xcit_small_12_p16'], help='one plot for all')
    scaling.add_argument('--resolutions', type=size, nargs='+', default=[(n, n) for n in RESOLUTIONS],
                         metavar='PIXELS|HxW', help='of the images, from small to large')
    scaling.add_argument('--batch-size', type=COUNT, default=1, metavar='IMAGES', help='of a step')
    scaling.add_argument('--output-dir', type=PATH_OBJECT, default=Path('runs/scaling'), metavar='DIR',
                         help='for scaling.csv, time.png and memory.png')

    compare = command('compare', help='several models side by side')
    compare.add_argument('--models', type=model_name, nargs='+',
                         default=['xcit_small_12_p16', TIMM + 'xcit_small_12_p16', *OTHERS],
                         help='ratios are to the second of them')
    compare.add_argument('--resolution', type=size, default=(224, 224), metavar='PIXELS|HxW', help='of the images')
    compare.add_argument('--batch-size', type=COUNT, default=8, metavar='IMAGES', help='of a step')
    instead = compare.add_mutually_exclusive_group()
    instead.add_argument('--suite', action='store_true',
                         help='this XCiT against timm\'s in fixed settings, eager and compiled, the better of each')
    instead.add_argument('--against-timm', nargs='*', choices=xcit.MODELS, metavar='MODEL',
                         help='the same for these models (none given: all 14) at --resolution and --batch-size')

    alone = command('xca', help='cross-covariance attention alone')
    alone.add_argument('--dim', type=COUNT, nargs='+', default=[384], metavar='C', help='channels')
    alone.add_argument('--tokens', type=COUNT, nargs='+', default=[196, 400, 784, 1200, 2304, 4096, 10000], metavar='N',
                       help='of an image')
    alone.add_argument('--batch-size', type=COUNT, default=1, metavar='IMAGES', help='of a step')

    layers = command('linear', help='linear layers by the two libraries of a CPU')
    layers.add_argument('--dim', type=COUNT, nargs='+', default=[384], metavar='C', help='channels')
    layers.add_argument('--tokens', type=COUNT, nargs='+', default=[49, 196, 784, 1568, 10000], metavar='M',
                        help='of all images together')
    layers.add_argument('--rounds', type=COUNT, default=15, metavar='N', help='of which the median counts')

    dino = command('dino', help='a training step without labels')
    dino.add_argument('--model', choices=xcit.MODELS, default='xcit_small_12_p16', metavar='NAME', help='an XCiT')
    dino.add_argument('--batch-size', type=COUNT, default=4, metavar='IMAGES', help='of a step')
    dino.add_argument('--global-crops-size', type=COUNT, default=224, metavar='PIXELS', help='of two crops')
    dino.add_argument('--local-crops-size', type=COUNT, default=96, metavar='PIXELS', help='of the others')
    dino.add_argument('--local-crops-number', type=COUNT_OR_0, default=8, metavar='N', help='of an image')
    dino.add_argument('--out-dim', type=COUNT, default=65536, metavar='N', help='prototypes of the head')
    dino.add_argument('--compile', action=argparse.BooleanOptionalAction, default=True, help='also by torch.compile')
    dino.add_argument('--compile-mode', choices=['default', 'reduce-overhead', 'max-autotune'], default='default',
                      help='of torch.compile; the last two use CUDA graphs')

    for parser_of in (speed, scaling, compare):
        parser_of.add_argument('--training', action=argparse.BooleanOptionalAction, default=False,
                               help='steps with AdamW instead of inference')
        parser_of.add_argument('--compile', action=argparse.BooleanOptionalAction, default=False,
                               help='torch.compile')
        parser_of.add_argument('--compile-mode', choices=['default', 'reduce-overhead', 'max-autotune'],
                               default='default', help='of torch.compile; the last two use CUDA graphs')
        parser_of.add_argument('--xca', choices=xca_gram.FORMS, default='auto', help='form of XCA, of the models here')
    for parser_of in (speed, scaling, compare, alone, dino):
        parser_of.add_argument('--precision', choices=list(PRECISIONS), default='fp32',
                               help='autocast type; fp32: no autocast')
        add_device_flag(parser_of)
        parser_of.add_argument('--rounds', type=COUNT, default=7, metavar='N', help='of which the median counts')

    data = command('data', help='images/s of one core that loads training images')
    data.add_argument('--data-path', type=PATH_OBJECT, metavar='DIR',
                      help='pictures in class folders; unset: made ones')
    data.add_argument('--images', type=COUNT, default=256, metavar='N', help='how many to make, of 500 x 375 pixels')
    data.add_argument('--num-workers', type=COUNT_OR_0, default=0, metavar='N', help='loading processes; 0: this one')
    data.add_argument('--rounds', type=COUNT, default=5, metavar='N', help='of which the median counts')
    return parser


def is_two_sided(args) -> bool:
    """Whether each model here is set against timm's."""
    return args.what == 'compare' and (args.suite or args.against_timm is not None)


def check_effect(args):
    """Refuse options that have no effect beside the others.

    Raises:
        InputError: there is one.
    """
    if is_two_sided(args):
        flag, fixed = '--against-timm', ['models', 'compile']
        if args.suite:
            flag, fixed = '--suite', [*fixed, 'resolution', 'batch_size', 'training']
        default = get_args_parser().parse_args(['compare'])
        for name in fixed:
            if getattr(args, name) != getattr(default, name):
                raise InputError(f'--{name.replace("_", "-")}: has no effect with {flag}')
    if not is_two_sided(args) and getattr(args, 'compile_mode', 'default') != 'default' and not args.compile:
        raise InputError(f'--compile-mode {args.compile_mode}: has no effect without --compile')
    if args.what in ('speed', 'scaling', 'compare') and not is_two_sided(args):
        models = [args.model] if args.what == 'speed' else args.models
        if args.xca != 'auto' and not set(models) & set(xcit.MODELS):
            raise InputError(f'--xca {args.xca}: has no effect on {", ".join(models)}')
        if args.xca == 'gram' and args.precision != 'fp32':
            raise InputError(f'--xca gram: needs --precision fp32, not {args.precision}')


# ---------------------------------------------------------------------------------------------------------------------
# What is measured

def build(name: str, resolution: Tuple[int, int], *, training: bool, form: str) -> torch.nn.Module:
    """A model with random weights, the same for both implementations, prepared for its use."""
    torch.manual_seed(0)
    if name.startswith(TIMM):
        weights = timm.create_model(name.removeprefix(TIMM)).state_dict()
        model = timm.create_model(f'{name.removeprefix(TIMM)}_224')
        model.load_state_dict(xcit_zoo.to_timm_names(weights))
        return model.train(training)
    if name not in xcit.MODELS:
        try:
            return timm.create_model(name, img_size=resolution).train(training)
        except TypeError:  # convolutional: any size
            return timm.create_model(name).train(training)
    model = timm.create_model(name).train(training)
    model.xca_form = form
    return xcit.speed_up_training(model) if training else xcit.fuse(model)


def build_step(name: str, resolution: Tuple[int, int], batch_size: int, *, training: bool, precision: str,
               device: torch.device, compiled: bool = False, compile_mode: str = 'default',
               form: str = 'auto') -> Callable:
    """A function that does one training step, or one forward pass, and waits for nothing.

    A model that memory does not suffice for gives a step that fails for it.
    """
    try:
        model = build(name, resolution, training=training, form=form).to(device)
        images = torch.randn(batch_size, 3, *resolution, device=device)
    except RuntimeError as error:
        return fails_for_memory(error)
    if compiled:
        model.compile(mode=compile_mode, dynamic=False)
    autocast = functools.partial(torch.autocast, device.type, PRECISIONS[precision], enabled=precision != 'fp32')

    @torch.inference_mode()
    def infer():
        with autocast():
            model(images)

    if not training:
        return infer
    if device.type == 'cpu':
        processes.keep_freed_memory()  # as main.py does
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    targets = torch.randint(1000, (batch_size,), device=device)

    def train():
        with autocast():
            loss = torch.nn.functional.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train


def step_builder(args, device: torch.device) -> Callable:
    """`build_step` with the settings of the command line."""
    return functools.partial(build_step, training=args.training, precision=args.precision, device=device,
                             compiled=args.compile, compile_mode=args.compile_mode, form=args.xca)


def pixels(resolution: Tuple[int, int]) -> str:
    return f'{resolution[0]}x{resolution[1]}'


def speed(args, device: torch.device) -> dict:
    build_one = functools.partial(step_builder(args, device), args.model, args.resolution, args.batch_size)
    # Compiled, a step does not show its operations. Counted first, since memory may not suffice for both at once.
    flops = operations(build_one(compiled=False)) if args.compile else None
    step = build_one()
    elapsed = take_turns({args.model: step}, device, args.rounds)[args.model]
    if elapsed is None:
        notice(f'{args.model} at {pixels(args.resolution)}, batch {args.batch_size}: out of memory')
        return dict(model=args.model)
    memory = peak_memory(step, device)
    if not args.compile:
        flops = operations(step)
    peak = matrix_peak(device, args.precision)
    result = dict(model=args.model, ms_per_image=1e3 * elapsed / args.batch_size,
                  images_per_s=args.batch_size / elapsed, memory_mb=memory,
                  gflops_per_image=flops and flops / 1e9 / args.batch_size,
                  share_of_peak=flops and peak and flops / elapsed / peak)
    table(['model', 'pixels', 'images', 'ms/image', 'images/s', 'peak memory', 'GFLOP/image', 'of the matrix peak'],
          [[args.model, pixels(args.resolution), args.batch_size, f'{result["ms_per_image"]:.1f}',
            f'{result["images_per_s"]:.1f}', known(memory, 0, ' MB'), known(result['gflops_per_image'], 2),
            known(flops and peak and 100 * result['share_of_peak'], 0, f' % of {(peak or 0) / 1e9:.0f} GFLOP/s')]])
    return result


def exponent(resolutions: List[Tuple[int, int]], values: List[Optional[float]]) -> Optional[float]:
    """Slope of log(value) against log(pixels), by least squares over the values there are; None: less than two."""
    points = [(math.log(h * w), math.log(value)) for (h, w), value in zip(resolutions, values) if value]
    return float(np.polyfit(*zip(*points), 1)[0]) if len(points) > 1 else None


def scaling(args, device: torch.device) -> List[dict]:
    rows = []
    for resolution in args.resolutions:
        torch.compiler.reset()
        build_one = step_builder(args, device)
        steps = {name: build_one(name, resolution, args.batch_size) for name in args.models}
        times = take_turns(steps, device, args.rounds)
        for name, step in steps.items():
            elapsed = times[name]
            rows.append(dict(model=name, height=resolution[0], width=resolution[1],
                             ms_per_image=elapsed and 1e3 * elapsed / args.batch_size,
                             memory_mb=elapsed and peak_memory(step, device)))
            notice(f'{name} {pixels(resolution)}: {shown(rows[-1]["ms_per_image"], unit=" ms/image")}, '
                   f'{known(rows[-1]["memory_mb"], 0, " MB")}')
    with utils.whole_file(args.output_dir / 'scaling.csv') as path, open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    exponents = []
    for name in args.models:
        own = [row for row in rows if row['model'] == name]
        exponents.append(dict(model=name, **{what: exponent(args.resolutions, [row[what] for row in own])
                                             for what in ('ms_per_image', 'memory_mb')}))
    table(['model', 'exponent of time in the number of pixels', 'of peak memory'],
          [[e['model'], *(known(e[what], 2) for what in ('ms_per_image', 'memory_mb'))]
           for e in exponents])
    for what, label, file_name in (
            ('ms_per_image', 'ms/image', 'time.png'), ('memory_mb', 'peak memory, MB', 'memory.png')):
        plot(rows, args, what, label, args.output_dir / file_name)
    notice(f'scaling.csv, time.png and memory.png are in {args.output_dir}')
    return exponents


def plot(rows: List[dict], args, what: str, label: str, path: Path):
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(6, 4), layout='constrained')
    for name in args.models:
        points = [((row['height'] * row['width']) ** .5, row[what])
                  for row in rows if row['model'] == name and row[what]]
        if points:
            axes.plot(*zip(*points), marker='o', label=name)
    axes.set(xlabel='resolution, pixels (square root of their number)', ylabel=label, ylim=(0, None),
             title=f'{"Training" if args.training else "Inference"}, {args.precision}, batch {args.batch_size}')
    axes.grid(alpha=.3)
    if axes.lines:
        axes.legend()
    with utils.whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=150)
    pyplot.close(figure)


def compare(args, device: torch.device) -> List[dict]:
    build_one = step_builder(args, device)
    steps = {name: build_one(name, args.resolution, args.batch_size) for name in args.models}
    times = take_turns(steps, device, args.rounds)
    memory = {name: times[name] and peak_memory(step, device) for name, step in steps.items()}
    base = args.models[min(1, len(args.models) - 1)]
    table(['model', 'ms/image', 'images/s', f'speed, {base} = 1', 'peak memory, MB'],
          [[name, shown(t and 1e3 * t / args.batch_size), shown(t and args.batch_size / t), ratio(t, times[base]),
            known(memory[name], 0)] for name, t in times.items()])
    return [dict(model=name, seconds=times[name], memory_mb=memory[name]) for name in args.models]


def against_timm(args, device: torch.device) -> List[dict]:
    """This XCiT against timm's: of eager and compiled the faster of each, and in the suite that with less memory."""
    rows, results = [], []
    build_one = step_builder(args, device)
    what = 'training' if args.training else 'inference'
    settings = SUITE if args.suite else [
        (what, name, *args.resolution, args.batch_size, args.batch_size) for name in args.against_timm or xcit.MODELS]
    for what, name, height, width, cpu_images, gpu_images in settings:
        torch.compiler.reset()  # or it would take sizes that change between settings for free ones
        images = cpu_images if device.type == 'cpu' else gpu_images
        steps = {(source, compiled): build_one(
            prefix + name, (height, width), images, training=what == 'training', compiled=compiled)
            for source, prefix in (('here', ''), ('timm', TIMM)) for compiled in (False, True)}
        times = take_turns(steps, device, args.rounds)
        memory = {key: times[key] and peak_memory(step, device) for key, step in steps.items()} if args.suite else {}
        best, least = least_of(times), least_of(memory)
        result = dict(what=what, model=name, height=height, width=width, images=images,
                      speed=best['here'] and best['timm'] and best['timm'] / best['here'],
                      memory=least['here'] / least['timm'] if args.suite and all(least.values()) else None)
        results.append(result)
        rows.append([f'{what} {name} at {pixels((height, width))}, batch {images}',
                     *(shown(times[key] and 1e3 * times[key]) for key in
                       (('here', False), ('here', True), ('timm', False), ('timm', True))),
                     ratio(best['here'], best['timm'])])
        if args.suite:
            rows[-1] += [known(least['here'], 0), known(least['timm'], 0), known(result['memory'], 2)]
        notice(' | '.join(rows[-1]))
    table(['', 'here, ms', 'compiled', 'timm, ms', 'compiled', 'speed, timm = 1',
           *(['memory, MB', 'timm', 'timm = 1'] if args.suite else [])], rows)
    return results


def attention_alone(args, device: torch.device) -> List[dict]:
    """XCA in both forms against timm's, for each number of tokens; ratios are of the faster of eager and compiled."""
    rows, results = [], []
    for dim in args.dim:
        heads = next((row['num_heads'] for row in xcit.SIZES.values() if row['embed_dim'] == dim), 8)
        if dim % heads:
            raise InputError(f'--dim {dim}: must be a multiple of {heads}, the number of heads')
        modules = {'timm': timm.models.xcit.XCA(dim, heads, qkv_bias=True), 'plain': xca.XCA(dim, heads),
                   'gram': xca.XCA(dim, heads)}
        for name, module in modules.items():
            module.to(device).load_state_dict(modules['timm'].state_dict())
            if name != 'timm':
                module.form = name
        for tokens in args.tokens:
            for backward in (False, True):
                torch.compiler.reset()
                steps = {(name, compiled): attention_step(module, (args.batch_size, tokens, dim), backward=backward,
                                                          precision=args.precision, compiled=compiled)
                         for name, module in modules.items() for compiled in (False, True)}
                times = take_turns(steps, device, args.rounds)
                least = least_of(times)
                results.append(dict(dim=dim, tokens=tokens, backward=backward, **least))
                rows.append([dim, tokens, 'forward+backward' if backward else 'forward',
                             *(shown(value and 1e3 * value, 2) for value in times.values()),
                             ratio(least['plain'], least['timm']), ratio(least['gram'], least['timm'])])
    table(['C', 'N', '', 'timm, ms', 'compiled', 'plain, ms', 'compiled', 'gram, ms', 'compiled', 'plain, timm = 1',
           'gram, timm = 1'], rows)
    return results


def attention_step(module: torch.nn.Module, shape: Tuple[int, int, int], *, backward: bool, precision: str,
                   compiled: bool) -> Callable:
    device = module.proj.weight.device
    autocast = functools.partial(torch.autocast, device.type, PRECISIONS[precision], enabled=precision != 'fp32')
    attention = torch.compile(module, dynamic=False) if compiled else module
    try:
        x = torch.randn(shape, device=device, requires_grad=backward)
    except RuntimeError as error:
        return fails_for_memory(error)

    def step():
        with torch.inference_mode(not backward), autocast():
            y = attention(x)
        if backward:
            y.sum().backward()
            module.zero_grad()
            x.grad = None

    return step


@torch.inference_mode()
def linear_layers(args, device: torch.device) -> List[dict]:
    """The four linear layers of a block, with what follows them, by MKL and by oneDNN."""
    rows, results = [], []
    for dim in args.dim:
        for tokens in args.tokens:
            for what, width, out_width in (('qkv', dim, 3 * dim), ('proj, residual', dim, dim),
                                           ('fc1, GELU', dim, 4 * dim), ('fc2, residual', 4 * dim, dim)):
                x, bias = torch.randn(tokens, width), torch.randn(out_width)
                weight = torch.randn(width, out_width).t()  # as in a fused model
                residual = torch.randn(tokens, out_width) if 'residual' in what else None
                steps = {name: functools.partial(by, x, weight, bias, residual, 'GELU' in what)
                         for name, by in (('mkl', xcit_linear.by_blas), ('onednn', xcit_linear.by_onednn))}
                times = take_turns(steps, device, args.rounds)
                operations = 2 * x.numel() * out_width
                results.append(dict(dim=dim, tokens=tokens, what=what, operations=operations, **times))
                rows.append([dim, tokens, what, *(shown(t and operations / t / 1e9, 0) for t in times.values()),
                             ratio(times['onednn'], times['mkl'])])
    table(['C', 'tokens', 'layer', 'MKL, GFLOP/s', 'oneDNN', 'speed, MKL = 1'], rows)
    library = 'oneDNN' if xcit_linear.prefers_onednn() else 'MKL'
    notice(f'models take {library} here, from {xcit_linear.LEAST} multiplications on')
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Loading

def make_pictures(folder: Path, number: int):
    """JPEGs of 500 x 375 pixels with about the detail of photographs, in two class folders."""
    random = np.random.default_rng(0)
    for i in range(number):
        picture = np.zeros((375, 500, 3))
        for cells, weight in ((4, 90), (16, 50), (64, 25), (256, 10)):  # large shapes are stronger than small ones
            noise = Image.fromarray(random.integers(0, 255, (cells, cells, 3), dtype=np.uint8))
            picture += weight / 128 * (np.asarray(noise.resize((500, 375), Image.BICUBIC), dtype=float) - 128)
        path = folder / f'class{i % 2}' / f'{i}.jpg'
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((picture + 128).clip(0, 255).astype(np.uint8)).save(path, quality=90)


def data(args, device: torch.device) -> dict:
    with tempfile.TemporaryDirectory() as made:
        if args.data_path is None:
            make_pictures(Path(made), args.images)
        folder = args.data_path or Path(made)
        if not folder.is_dir():
            raise InputError(f'--data-path {folder}: no such folder')
        return loading(args, folder)


def loading(args, folder: Path) -> dict:
    flags = classification.get_args_parser().parse_args(
        ['--num-workers', str(args.num_workers), '--batch-size', '32', '--no-repeated-aug'])
    cpu = torch.device('cpu')
    transform = datasets.build_train_transform(flags)
    dataset = datasets.ClassFolders(folder, transform)
    if len(dataset) < flags.batch_size:
        raise InputError(f'--data-path {folder}: has {len(dataset)} images, fewer than a batch of {flags.batch_size}')
    ours = build_train_loader(dataset, flags, cpu)
    theirs = create_loader(
        ImageDataset(str(folder)), input_size=(3, 224, 224), batch_size=flags.batch_size, is_training=True,
        use_prefetcher=False, num_workers=args.num_workers, persistent_workers=args.num_workers > 0,
        re_prob=flags.reprob, re_mode=flags.remode, color_jitter=flags.color_jitter, auto_augment=flags.aa,
        interpolation=flags.train_interpolation, device=cpu)
    for op in datasets.augment_ops(theirs.dataset.transform):
        if op.aug_fn is auto_augment.posterize:
            op.aug_fn = datasets.posterize  # timm's own asks current Pillow for what it refuses
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loading process
    try:
        times = take_turns({'here': lambda: [None for _ in ours], 'timm': lambda: [None for _ in theirs]}, cpu,
                           args.rounds)
        stages = stage_times(dataset, transform)
    finally:
        torch.set_num_threads(threads)
    images = len(dataset) // flags.batch_size * flags.batch_size
    cores = max(1, args.num_workers)
    result = {name: images / elapsed / cores for name, elapsed in times.items()}
    table(['loader', 'images/s of one core', 'timm = 1'],
          [[name, f'{rate:.1f}', f'{rate / result["timm"]:.2f}'] for name, rate in result.items()])
    total = sum(stages.values())
    table(['stage', 'ms/image', 'share'],
          [[name, f'{1e3 * t:.2f}', f'{100 * t / total:.0f} %'] for name, t in stages.items()])
    return {**result, 'stages': stages}


def stage_times(dataset: datasets.ClassFolders, transform) -> Dict[str, float]:
    """Seconds for an image that decoding and each transform take, as averages."""
    names = ['decode', *(type(t).__name__ for t in transform.transforms)]
    sums = dict.fromkeys(names, 0.)
    for i, (path, _) in enumerate(dataset.samples):
        utils.seed_everything(i)
        start = time.perf_counter()
        value = dataset.loader(path)
        for name, step in zip(names, [None, *transform.transforms]):
            value = value if step is None else step(value)
            now = time.perf_counter()
            sums[name] += now - start
            start = now
    return {name: total / len(dataset) for name, total in sums.items()}


# ---------------------------------------------------------------------------------------------------------------------

def main(argv: Optional[list] = None):
    """Run the command; returns what it measured."""
    args = get_args_parser().parse_args(argv)
    check_effect(args)
    on_cpu = args.what in ('linear', 'data')
    device = torch.device('cpu') if on_cpu else processes.choose_device(args.device)
    if not on_cpu and args.precision == 'fp16' and device.type == 'cpu':
        raise InputError('--precision fp16: is not for CPUs; allowed: fp32, bf16')
    if args.what == 'linear' and not xcit_linear.has_onednn():
        raise InputError('linear: torch has no oneDNN here')
    if args.what == 'scaling':
        if not utils.is_installed('matplotlib'):
            raise InputError('scaling: needs matplotlib: pip install -r requirements-benchmark.txt')
        folder.check_output_dir(str(args.output_dir))
        with utils.writing(args.output_dir):
            args.output_dir.mkdir(parents=True, exist_ok=True)
    where = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{device.type}, {os.cpu_count()} cores'
    notice(f'{datetime.date.today()}: python -m tools.benchmark {" ".join(sys.argv[1:] if argv is None else argv)}')
    notice(f'{where}, {torch.get_num_threads()} threads; '
           + ', '.join(f'{name} {version}' for name, version in logs.environment().items()))
    return (against_timm if is_two_sided(args) else COMMANDS[args.what])(args, device)


COMMANDS = {'speed': speed, 'scaling': scaling, 'compare': compare, 'xca': attention_alone, 'linear': linear_layers,
            'data': data, 'dino': dino_speed.measure}

if __name__ == '__main__':
    commandline.run_program(main)
