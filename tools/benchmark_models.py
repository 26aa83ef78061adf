"""Time and memory of whole models (tools.benchmark speed, scaling, compare); weights are random."""
import dataclasses
import math
from pathlib import Path
from typing import Callable, List, Optional, Sequence, Tuple

import numpy as np
import timm
import torch

import utils
import xcit
from run import cpu
from run.output import log
from tools import measuring
from tools.measuring import or_dash, peak_memory, ratio, shown, table, take_turns

TIMM = 'timm:'  # prefix of a model's name: timm's implementation of XCiT
# Settings of `compare --suite`: inference or training, model, height, width, images on a CPU and on a GPU
SUITE = (
    ('inference', 'xcit_small_12_p16', 224, 224, 8, 256),
    ('inference', 'xcit_small_12_p8', 224, 224, 4, 128),
    ('inference', 'xcit_small_12_p8', 800, 1333, 1, 8),
    ('inference', 'xcit_small_12_p16', 1600, 1600, 1, 8),
    ('training', 'xcit_small_12_p16', 224, 224, 8, 128),
    ('training', 'xcit_small_12_p8', 384, 384, 2, 32),
)
Size = Tuple[int, int]  # height and width in pixels


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """Settings of a measured step."""
    device: torch.device
    training: bool = False  # training step with AdamW; False: forward pass
    precision: str = 'fp32'  # name in measuring.PRECISIONS
    compiled: bool = False
    compile_mode: str = 'default'  # mode of torch.compile
    form: str = 'auto'  # form of XCA in this repository's models


def build(name: str, resolution: Size, *, training: bool, form: str) -> torch.nn.Module:
    """Build a model with random weights, equal for both implementations, prepared for training or inference."""
    torch.manual_seed(0)
    if name.startswith(TIMM):
        return measuring.timm_twin(name.removeprefix(TIMM)).train(training)
    if name not in xcit.MODELS:
        try:
            return timm.create_model(name, img_size=resolution).train(training)
        except TypeError:  # a convolutional model, for any size
            return timm.create_model(name).train(training)
    model = timm.create_model(name).train(training)
    model.xca_form = form
    return xcit.speed_up_training(model) if training else xcit.fuse(model)


def build_step(name: str, resolution: Size, batch_size: int, settings: StepSettings) -> Callable:
    """Return a function that starts a training step or a forward pass, or raises if memory does not suffice."""
    device = settings.device
    try:
        model = build(name, resolution, training=settings.training, form=settings.form).to(device)
        images = torch.randn(batch_size, 3, *resolution, device=device)
    except RuntimeError as error:
        return measuring.fails_for_memory(error)
    if settings.compiled:
        model.compile(mode=settings.compile_mode, dynamic=False)

    @torch.inference_mode()
    def infer():
        with measuring.autocast(device, settings.precision):
            model(images)

    if not settings.training:
        return infer
    if device.type == 'cpu':
        cpu.keep_freed_memory()  # as main.py does
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    targets = torch.randint(1000, (batch_size,), device=device)

    def train():
        with measuring.autocast(device, settings.precision):
            loss = torch.nn.functional.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train


def pixels(resolution: Size) -> str:
    return f'{resolution[0]}x{resolution[1]}'


def speed(name: str, resolution: Size, batch_size: int, settings: StepSettings, *, rounds: int) -> dict:
    """Measure one model: time, memory, and operations relative to the device's peak."""
    # In eager mode, because a compiled step hides its operations; first, because memory may not suffice for two steps
    eager = dataclasses.replace(settings, compiled=False)
    flops = measuring.operations(build_step(name, resolution, batch_size, eager))
    step = build_step(name, resolution, batch_size, settings)
    elapsed = take_turns({name: step}, settings.device, rounds)[name]
    if elapsed is None:
        log(f'{name} at {pixels(resolution)}, batch {batch_size}: out of memory')
        return dict(model=name)
    memory = peak_memory(step, settings.device)
    peak = measuring.matrix_peak(settings.device, settings.precision)
    result = dict(model=name, ms_per_image=1e3 * elapsed / batch_size, images_per_s=batch_size / elapsed,
                  memory_mb=memory, gflops_per_image=flops and flops / 1e9 / batch_size,
                  share_of_peak=flops and peak and flops / elapsed / peak)
    table(['model', 'pixels', 'images', 'ms/image', 'images/s', 'peak memory', 'GFLOP/image', 'of the matrix peak'],
          [[name, pixels(resolution), batch_size, f'{result["ms_per_image"]:.1f}', f'{result["images_per_s"]:.1f}',
            or_dash(memory, 0, ' MB'), or_dash(result['gflops_per_image'], 2),
            or_dash(flops and peak and 100 * result['share_of_peak'], 0, f' % of {(peak or 0) / 1e9:.0f} GFLOP/s')]])
    return result


def exponent(resolutions: List[Size], values: List[Optional[float]]) -> Optional[float]:
    """Fit the slope of log(value) against log(pixels) by least squares; None: less than two values."""
    points = [(math.log(h * w), math.log(value)) for (h, w), value in zip(resolutions, values) if value]
    return float(np.polyfit(*zip(*points), 1)[0]) if len(points) > 1 else None


def scaling(names: List[str], resolutions: List[Size], batch_size: int, settings: StepSettings, *, rounds: int,
            output_dir: Path) -> List[dict]:
    """Measure time and memory against resolution; write a table and two plots, and return the exponents."""
    rows = []
    for height, width in resolutions:
        torch.compiler.reset()
        steps = {name: build_step(name, (height, width), batch_size, settings) for name in names}
        for name, elapsed in take_turns(steps, settings.device, rounds).items():
            time = elapsed and 1e3 * elapsed / batch_size
            memory = elapsed and peak_memory(steps[name], settings.device)
            rows.append(dict(model=name, height=height, width=width, ms_per_image=time, memory_mb=memory))
            log(f'{name} {pixels((height, width))}: {shown(time, unit=" ms/image")}, {or_dash(memory, 0, " MB")}')
    utils.write_csv(output_dir / 'scaling.csv', [rows[0], *(row.values() for row in rows)])
    keys = ('ms_per_image', 'memory_mb')
    exponents = [{'model': name, **{key: exponent(resolutions, [row[key] for row in rows if row['model'] == name])
                                    for key in keys}} for name in names]
    table(['model', 'exponent of time in the number of pixels', 'of peak memory'],
          [[row['model'], *(or_dash(row[key], 2) for key in keys)] for row in exponents])
    title = f'{"Training" if settings.training else "Inference"}, {settings.precision}, batch {batch_size}'
    for key, label, file_name in zip(keys, ('ms/image', 'peak memory, MB'), ('time.png', 'memory.png')):
        plot(rows, key, output_dir / file_name, label=label, title=title)
    log(f'scaling.csv, time.png and memory.png are in {output_dir}')
    return exponents


def plot(rows: List[dict], key: str, path: Path, *, label: str, title: str):
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(6, 4), layout='constrained')
    for name in dict.fromkeys(row['model'] for row in rows):
        points = [((row['height'] * row['width']) ** .5, row[key]) for row in rows if row['model'] == name and row[key]]
        if points:
            axes.plot(*zip(*points), marker='o', label=name)
    axes.set(xlabel='resolution, pixels (square root of their number)', ylabel=label, ylim=(0, None), title=title)
    axes.grid(alpha=.3)
    if axes.lines:
        axes.legend()
    with utils.whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=150)
    pyplot.close(figure)


def compare(names: List[str], resolution: Size, batch_size: int, settings: StepSettings, *, rounds: int) -> List[dict]:
    """Measure several models side by side; ratios refer to the second model."""
    steps = {name: build_step(name, resolution, batch_size, settings) for name in names}
    times = take_turns(steps, settings.device, rounds)
    memory = {name: times[name] and peak_memory(step, settings.device) for name, step in steps.items()}
    base = names[min(1, len(names) - 1)]
    table(['model', 'ms/image', 'images/s', f'speed, {base} = 1', 'peak memory, MB'],
          [[name, shown(t and 1e3 * t / batch_size), shown(t and batch_size / t), ratio(t, times[base]),
            or_dash(memory[name], 0)] for name, t in times.items()])
    return [dict(model=name, seconds=times[name], memory_mb=memory[name]) for name in names]


def against_timm(cases: Sequence[tuple], settings: StepSettings, *, rounds: int, with_memory: bool) -> List[dict]:
    """Compare this XCiT with timm's in cases like the rows of SUITE: the minima of eager and compiled steps."""
    rows, results = [], []
    for mode, name, height, width, cpu_images, gpu_images in cases:
        torch.compiler.reset()  # else sizes that change between cases would be compiled as free sizes
        images = cpu_images if settings.device.type == 'cpu' else gpu_images
        steps = {(source, compiled): build_step(
            prefix + name, (height, width), images,
            dataclasses.replace(settings, training=mode == 'training', compiled=compiled))
            for source, prefix in (('here', ''), ('timm', TIMM)) for compiled in (False, True)}
        times = take_turns(steps, settings.device, rounds)
        memory = {key: times[key] and peak_memory(step, settings.device)
                  for key, step in steps.items()} if with_memory else {}
        best, least = measuring.least_of(times), measuring.least_of(memory)
        result = dict(what=mode, model=name, height=height, width=width, images=images,
                      speed=best['here'] and best['timm'] and best['timm'] / best['here'],
                      memory=least['here'] / least['timm'] if with_memory and all(least.values()) else None)
        results.append(result)
        rows.append([f'{mode} {name} at {pixels((height, width))}, batch {images}',
                     *(shown(seconds and 1e3 * seconds) for seconds in times.values()),
                     ratio(best['here'], best['timm'])])
        if with_memory:
            rows[-1] += [or_dash(least['here'], 0), or_dash(least['timm'], 0), or_dash(result['memory'], 2)]
        log(' | '.join(rows[-1]))
    table(['', 'here, ms', 'compiled', 'timm, ms', 'compiled', 'speed, timm = 1',
           *(['memory, MB', 'timm', 'timm = 1'] if with_memory else [])], rows)
    return results
