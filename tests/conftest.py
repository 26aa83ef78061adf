"""Shared parts of the tests: reference numbers of the original, seeded weights and tiny data sets."""
import json
import os
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')  # pytest runs as many processes as there are cores

import numpy as np
import pytest
import small_model  # noqa: F401  registers xcit_test
import timm
import torch
from PIL import Image
from seeded_weights import image as seeded_image
from seeded_weights import tensor as seeded_tensor
from tensorboard.summary.writer import event_file_writer

import xcit

ROOT = Path(__file__).parent.parent
REFERENCE = Path(__file__).parent / 'reference'


def pytest_xdist_auto_num_workers() -> int:
    """Return two more than the number of cores: many tests wait for other processes."""
    return (os.cpu_count() or 1) + 2


def pytest_collection_modifyitems(items):
    for item in items:
        if 'gpu' in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))


@pytest.fixture
def ordered_events():
    """Number the event files of this process from 100: TensorBoard reads files of one second in the order of names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(event_file_writer, '_global_uid', event_file_writer.AtomicCounter(100))
        yield


@pytest.fixture(scope='session')
def reference() -> dict:
    """Numbers of the original implementation, see reference.json."""
    return json.loads((REFERENCE / 'reference.json').read_text())


def seeded_model(name: str, **kwargs) -> torch.nn.Module:
    """Build a model with all weights of the reference."""
    with torch.device('meta'):  # no initial weights, which take a third of the time
        model = timm.create_model(name, **kwargs)
    state = model.state_dict()
    model.load_state_dict({key: torch.from_numpy(np.asarray(seeded_tensor(key, tuple(value.shape))))
                           for key, value in state.items()}, assign=True)
    return model


def shallow_xcit() -> xcit.Xcit:
    """Build a model of two blocks and 32 channels in eval mode, with the Gram form from 80 patches on."""
    torch.manual_seed(0)
    return xcit.Xcit(patch_size=8, embed_dim=32, num_heads=4, depth=2, num_classes=10).eval()


def seeded_images(*shape: int) -> torch.Tensor:
    return torch.from_numpy(seeded_image(shape))


def write_image(path: Path, *, size=(32, 32), seed: int = 0):
    """Write a picture of smooth random colours; `size` is (width, height) in pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.BICUBIC).save(path)


def write_folders(root: Path, *, classes=('cat', 'dog'), per_class: int = 8, size=(32, 32), suffix='.png') -> Path:
    """Write train/ and val/ with class folders; return `root`."""
    for split, count in (('train', per_class), ('val', max(1, per_class // 2))):
        for label, name in enumerate(classes):
            for i in range(count):
                write_image(root / split / name / f'{i}{suffix}', size=size, seed=1000 * label + i)
    return root


@pytest.fixture
def folders(tmp_path) -> Path:
    """A data set of 2 classes with 8 training and 4 validation images each, 32 x 32 pixels."""
    return write_folders(tmp_path / 'data')


TINY = ['--model', 'xcit_nano_12_p16', '--input-size', '32', '--device', 'cpu', '--num-workers', '0',
        '--batch-size', '4', '--epochs', '2', '--warmup-epochs', '0', '--lr', '1e-2']


def tiny(data: Path, *more: str) -> list:
    """Return the command line of a run that takes two seconds: nano, on class folders of 32 x 32 pixels."""
    return [*TINY, '--data-set', 'FOLDER', '--data-path', str(data), *more]


def tiniest(data: Path, *more: str) -> list:
    """Return the command line of a run that takes half a second, for this process and those of processes.py."""
    return tiny(data, '--model', 'xcit_test', *more)
