"""timm's data readers: `--data-set hfds/NAME`, `torch/NAME`, `wds/NAME` and `tfds/NAME`.

The samples of `hfds/` and `torch/` have indices, and these data sets support all features. `wds/` and `tfds/` are
streams: docs/data.md, "Streams", lists their limits.
"""
import functools
import importlib
import sys
from pathlib import Path
from typing import List, Optional, Tuple

from timm.data import create_dataset
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from loaders import pictures
from loaders.samples import PictureSet
from loaders.source import Source
from loaders.streams import Stream, check_label
from utils import InputError, UnreadableImage, abridge, counted, first_line, is_installed

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {'hfds': 'datasets', 'wds': 'webdataset', 'tfds': 'tensorflow_datasets', 'torch': 'torchvision'}  # needed
STREAMS = ('wds', 'tfds')
TRAIN_OR_NOT = ('train', 'training', 'val', 'valid', 'validation', 'eval', 'evaluation', 'test')  # splits of torch/NAME


def prefix_of(data_set: str) -> Optional[str]:
    """Return the prefix of timm's reader in a --data-set; None for a built-in data set."""
    prefix = data_set.partition('/')[0]
    return prefix if '/' in data_set and prefix in PACKAGES else None


def is_stream(data_set: str) -> bool:
    return prefix_of(data_set) in STREAMS


def build_dataset(source: Source, is_train: bool, *, upright: bool, labelled: bool) -> Tuple[Dataset, int]:
    """Build a split of a data set, without a transform, and return it with the number of classes.

    Args:
        upright: pictures are rotated by their EXIF orientation.
        labelled: False: every sample has class 0.

    Raises:
        InputError: the package or the data do not exist, or the number of classes is unknown.
    """
    samples = read_split(source, is_train=is_train, labelled=labelled)
    classes = class_names(source, samples) if labelled else ['']
    if not is_stream(source.name):
        return Readable(samples, classes, upright=upright, labelled=labelled), len(classes)
    num_files = len(samples.reader.split_info.filenames) if prefix_of(source.name) == 'wds' else None
    return Stream(samples, source.name, classes, seed=source.seed, is_train=is_train, num_files=num_files,
                  upright=upright, labelled=labelled), len(classes)


def read_split(source: Source, *, is_train: bool, labelled: bool) -> Dataset:
    """Open a split by timm; raise InputError if timm can't."""
    prefix, is_folder = prefix_of(source.name), Path(source.path).is_dir()
    if prefix == 'hfds':
        import_hugging_face_datasets()
    if prefix in ('torch', 'wds') and not is_folder:
        raise InputError(f'{source.flag} {source.path}: no such directory')
    split, root = source.train_split if is_train else source.val_split, str(Path(source.path)) if is_folder else None
    options = {'input_img_mode': ''} if prefix == 'wds' else {}  # the stored mode: pictures.py converts it
    try:
        if prefix == 'hfds':
            options = columns_of(source.name.removeprefix('hfds/'), split, root, labelled=labelled)
        dataset = create_dataset(source.name, root=root, split=split, is_training=is_train,
                                 batch_size=source.batch_size, seed=source.seed, **options)
        if prefix == 'torch':
            check_split(dataset, split, source)
        elif prefix == 'wds':
            check_shards(dataset.reader, split)
    except InputError:
        raise
    except Exception as error:  # of any library; timm has no better error for a missing package
        if not is_installed(PACKAGES[prefix]):
            to_install = 'tensorflow tensorflow-datasets' if prefix == 'tfds' else '-r requirements-readers.txt'
            raise InputError(f'--data-set {source.name}: needs the package {PACKAGES[prefix]}; pip install '
                             f'{to_install}') from None
        raise InputError(f'--data-set {source.name}: timm can\'t read its split {split} with {source.flag} '
                         f'{source.path} ({type(error).__name__}: {first_line(error)})') from None
    return dataset


def class_names(source: Source, dataset: Dataset) -> List[str]:
    """Return the class names by index, or numbers; raise InputError if their number is unknown or not --num-classes."""
    names = getattr(dataset, 'classes', None) or getattr(dataset, 'all_categories', None)  # of torchvision; iNaturalist
    if not names:
        index = getattr(getattr(dataset, 'reader', None), 'class_to_idx', None) or {}
        names = [str(name) for name in sorted(index, key=index.get)]
    names = [name if isinstance(name, str) else ', '.join(name) for name in names]  # ImageNet's are tuples of synonyms
    if not names and not source.num_classes:
        raise InputError(f'--data-set {source.name}: has no class names: add --num-classes')
    if names and source.num_classes not in (None, len(names)):
        raise InputError(f'--num-classes {source.num_classes}: {source.name} has {counted(len(names), "class")}')
    return names or [str(i) for i in range(source.num_classes)]


def import_hugging_face_datasets():
    """Make `import datasets` import Hugging Face's package; files that have imported datasets.py keep this module."""
    if means_hugging_face_datasets():
        return
    own, paths = sys.modules.pop('datasets'), sys.path[:]
    sys.path[:] = [path for path in paths if Path(path or '.').resolve() != ROOT]
    try:
        importlib.import_module('datasets')
    except ImportError:
        sys.modules['datasets'] = own
        raise InputError('--data-set hfds/...: needs the package datasets; pip install -r requirements-readers.txt'
                         ) from None
    finally:
        sys.path[:] = paths


def columns_of(name: str, split: str, root: Optional[str], *, labelled: bool) -> dict:
    """Return timm's options for a Hugging Face data set: its columns of images and classes (any if not `labelled`)."""
    features = sys.modules['datasets'].load_dataset(name, split=split, cache_dir=root).features
    kinds = {column: type(feature).__name__ for column, feature in features.items()}
    images = [column for column, kind in kinds.items() if kind == 'Image']
    labels = ([column for column in ('label', 'fine_label') if column in kinds]  # also numbers without names
              or [column for column, kind in kinds.items() if kind == 'ClassLabel']) if labelled else list(kinds)
    if len(images) != 1 or not labels:
        raise InputError(f'--data-set hfds/{name}: needs one column of images and one of classes; its columns: '
                         f'{", ".join(f"{column} ({kind})" for column, kind in kinds.items())}')
    return {'input_key': images[0], 'target_key': labels[0]}


def check_split(dataset: Dataset, split: str, source: Source):
    """Refuse a missing split of a torchvision data set; timm would use the evaluation split or the whole folder."""
    if type(dataset) is ImageFolder and Path(dataset.root) == Path(source.path):
        raise InputError(f'{source.flag} {source.path}: has no folder of the split {split}')
    if isinstance(getattr(dataset, 'train', None), bool) and split not in TRAIN_OR_NOT:
        raise InputError(f'no split {split}: must be one of {", ".join(TRAIN_OR_NOT)}')


def check_shards(reader, split: str):
    """Refuse missing files, an unknown number of images, and a first sample without image or label."""
    import webdataset  # timm would search unusable shards endlessly in training
    files = [Path(reader.root, name) for name in reader.split_info.filenames]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise InputError(f'split {split}: {len(missing)} of {len(files)} files are missing: {abridge(missing, 3)}')
    if not reader.num_samples:
        raise InputError(f'split {split}: unknown number of images; add the number, as in "{split}|1000"')
    shard = webdataset.DataPipeline(webdataset.SimpleShardList([str(files[0])]), webdataset.tarfile_to_samples())
    sample = [key for key in next(iter(shard), {}) if not key.startswith('__')]
    images, label = reader.input_key.split(';'), 'json' if reader.split_info.alt_label else 'cls'
    if label not in sample or not set(images) & set(sample):
        raise InputError(f'{files[0]}: a sample needs a file .{label} and one of .{", .".join(images)}; the '
                         f'first sample has {", ".join(f".{key}" for key in sample) or "no files"}')


def means_hugging_face_datasets() -> bool:
    """Return True if `import datasets` imports Hugging Face's package now."""
    module = sys.modules.get('datasets')
    return module is not None and Path(getattr(module, '__file__', None) or '/').resolve().parent != ROOT


class Readable(PictureSet, Dataset):
    """Data set of timm or torchvision with indices; if not `labelled`, every sample has class 0."""

    def __init__(self, source: Dataset, classes: List[str], *, upright: bool, labelled: bool):
        self.source, self.classes, self.upright, self.labelled = source, classes, upright, labelled
        if hasattr(source, 'loader'):  # torchvision's own loader only supports 8 bits
            source.loader = functools.partial(pictures.load_rgb, upright=upright)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int):
        name = f'image number {index}'
        pictures.prepare_pillow()
        try:
            if hasattr(self.source, 'reader'):  # timm's data set would skip an unreadable image
                file, target = self.source.reader[index]
                image = pictures.decode(file, name, upright=self.upright)
            else:
                image, target = self.source[index]
                if not hasattr(self.source, 'loader'):
                    image = pictures.finish(image, name, upright=self.upright)
        except UnreadableImage:
            raise
        except Exception as error:  # Pillow raises many kinds
            raise UnreadableImage(f'unreadable {name}: {pictures.reason_of(error)}') from None
        return self.transformed(image), check_label(target, len(self.classes)) if self.labelled else 0
