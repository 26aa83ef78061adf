"""Speed of the loading of training images, against timm's loader (tools.benchmark data)."""
import tempfile
import time
from pathlib import Path
from typing import Dict, Optional

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, auto_augment, create_loader

import utils
from loaders import transforms
from loaders.batches import build_train_loader
from loaders.class_folders import ClassFolders
from run.settings import Loading
from tools.measuring import table, take_turns
from utils import InputError, counted

BATCH_SIZE = 32
# Augmentation of main.py by default: arguments of transforms.train_transform
RECIPE = dict(input_size=224, resize=True, color_jitter=.4, auto_augment_policy='rand-m9-mstd0.5-inc1',
              interpolation='bicubic', erasing=.25, erasing_mode='pixel', erasing_count=1)


def measure(folder: Optional[Path], *, images: int, num_workers: int, rounds: int) -> dict:
    """Measure both loaders and the stages of a sample, on class folders or, without, on `images` synthetic pictures."""
    if folder is not None and not folder.is_dir():
        raise InputError(f'--data-path {folder}: no such folder')
    with tempfile.TemporaryDirectory() as temporary:
        if folder is None:
            make_pictures(Path(temporary), images)
        return measure_folder(folder or Path(temporary), num_workers=num_workers, rounds=rounds)


def make_pictures(folder: Path, number: int):
    """Write JPEGs of 500 x 375 pixels with about the detail of photographs, in two class folders."""
    random = np.random.default_rng(0)
    for i in range(number):
        picture = np.zeros((375, 500, 3))
        for cells, weight in ((4, 90), (16, 50), (64, 25), (256, 10)):  # large shapes are stronger than small shapes
            noise = Image.fromarray(random.integers(0, 255, (cells, cells, 3), dtype=np.uint8))
            picture += weight / 128 * (np.asarray(noise.resize((500, 375), Image.BICUBIC), dtype=float) - 128)
        path = folder / f'class{i % 2}' / f'{i}.jpg'
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((picture + 128).clip(0, 255).astype(np.uint8)).save(path, quality=90)


def measure_folder(folder: Path, *, num_workers: int, rounds: int) -> dict:
    cpu = torch.device('cpu')
    dataset = ClassFolders(folder, transforms.train_transform(**RECIPE))
    if len(dataset) < BATCH_SIZE:
        raise InputError(f'--data-path {folder}: has {counted(len(dataset), "image")}, fewer than a batch of '
                         f'{BATCH_SIZE}')
    loaders = {
        'here': build_train_loader(dataset, Loading(BATCH_SIZE, cpu, num_workers=num_workers)),
        'timm': create_loader(
            ImageDataset(str(folder)), input_size=(3, RECIPE['input_size'], RECIPE['input_size']),
            batch_size=BATCH_SIZE, is_training=True, use_prefetcher=False, num_workers=num_workers, device=cpu,
            persistent_workers=num_workers > 0, re_prob=RECIPE['erasing'], re_mode=RECIPE['erasing_mode'],
            color_jitter=RECIPE['color_jitter'], auto_augment=RECIPE['auto_augment_policy'],
            interpolation=RECIPE['interpolation'])}
    for op in transforms.augment_ops(loaders['timm'].dataset.transform):
        if op.aug_fn is auto_augment.posterize:
            op.aug_fn = transforms.posterize  # timm's function fails for 0 bits with current Pillow
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    try:
        times = take_turns({name: lambda loader=loader: [None for _ in loader] for name, loader in loaders.items()},
                           cpu, rounds)
        stages = stage_times(dataset)
    finally:
        torch.set_num_threads(threads)
    images_per_core = len(dataset) // BATCH_SIZE * BATCH_SIZE / max(1, num_workers)
    result = {name: images_per_core / elapsed for name, elapsed in times.items()}
    table(['loader', 'images/s of one core', 'timm = 1'],
          [[name, f'{rate:.1f}', f'{rate / result["timm"]:.2f}'] for name, rate in result.items()])
    total = sum(stages.values())
    table(['stage', 'ms/image', 'share'],
          [[name, f'{1e3 * t:.2f}', f'{100 * t / total:.0f} %'] for name, t in stages.items()])
    return {**result, 'stages': stages}


def stage_times(dataset: ClassFolders) -> Dict[str, float]:
    """Measure the mean seconds per image of decoding and of each transform."""
    steps = dataset.transform.transforms
    names = ['decode', *(type(step).__name__ for step in steps)]
    sums = dict.fromkeys(names, 0.)
    for i, (path, _) in enumerate(dataset.samples):
        utils.seed_everything(i)
        start = time.perf_counter()
        value = dataset.loader(path)
        for name, step in zip(names, [None, *steps]):
            value = value if step is None else step(value)
            now = time.perf_counter()
            sums[name] += now - start
            start = now
    return {name: total / len(dataset) for name, total in sums.items()}
