"""timm's data readers: `--data-set hfds/NAME`, `torch/NAME`, `wds/NAME` and `tfds/NAME`.

The first two give samples by their number, and so all that the built-in data sets have. The last two are streams: no
repeated augmentation, and a training that goes on in the middle of an epoch sees other images in the rest of it.
"""
import functools
import importlib
import sys
from pathlib import Path
from typing import Optional, Tuple

from timm.data import create_dataset
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from loaders import pictures
from loaders.streams import Stream, check_label, names_of
from utils import InputError, UnreadableImage, abridge, first_line, is_installed

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {'hfds': 'datasets', 'wds': 'webdataset', 'tfds': 'tensorflow_datasets', 'torch': 'torchvision'}  # they need
INSTALL = {'tfds': 'tensorflow tensorflow-datasets'}  # what pip is to install; else what the requirements file names
STREAMS = ('wds', 'tfds')
TRAIN_OR_NOT = ('train', 'training', 'val', 'valid', 'validation', 'eval', 'evaluation', 'test')  # splits of torch/NAME


def prefix_of(data_set: str) -> Optional[str]:
    """Which of timm's readers a --data-set asks for, None for a built-in data set."""
    prefix = data_set.partition('/')[0]
    return prefix if '/' in data_set and prefix in PACKAGES else None


def is_stream(data_set: str) -> bool:
    return prefix_of(data_set) in STREAMS


def build_dataset(args, is_train: bool, *, upright: bool, labelled: bool) -> Tuple[Dataset, int]:
    """A split of the data set, without its transform, and the number of classes.

    Args:
        upright: turn pictures as their EXIF orientation says.
        labelled: whether the classes matter; else every sample is of class 0, whatever the data say.

    Raises:
        InputError: the package or the data are not there, or the number of classes is not known.
    """
    prefix = prefix_of(args.data_set)
    if prefix == 'hfds':
        import_hugging_face_datasets()
    root = Path(args.data_path)
    if prefix in ('torch', 'wds') and not root.is_dir():
        raise InputError(f'--data-path {args.data_path}: no such directory')
    split = args.train_split if is_train else args.val_split
    cache = root if root.is_dir() else None
    try:
        columns = columns_of(args.data_set.removeprefix('hfds/'), split, cache, labelled=labelled) if (
            prefix == 'hfds') else {}
        mode = {'input_img_mode': ''} if prefix == 'wds' else {}  # as it is stored: pictures.py converts it
        source = create_dataset(args.data_set, root=cache and str(cache), split=split, is_training=is_train,
                                batch_size=args.batch_size, seed=args.seed, **columns, **mode)
        if prefix == 'torch':
            check_split(source, split, root)
        elif prefix == 'wds':
            check_shards(source.reader, split)
    except InputError:
        raise
    except Exception as error:  # of whichever library reads it; timm has no better for one that is missing
        if not is_installed(PACKAGES[prefix]):
            raise InputError(f'--data-set {args.data_set}: needs the package {PACKAGES[prefix]}; pip install '
                             f'{INSTALL.get(prefix, "-r requirements-readers.txt")}') from None
        raise InputError(f'--data-set {args.data_set}: timm can\'t read its split {split} with --data-path '
                         f'{args.data_path} ({type(error).__name__}: {first_line(error)})') from None
    if prefix in STREAMS:
        files = len(source.reader.split_info.filenames) if prefix == 'wds' else None
        dataset = Stream(source, seed=args.seed, is_train=is_train, files=files, upright=upright, labelled=labelled)
    else:
        dataset = Readable(source, upright=upright, labelled=labelled)
    if not labelled:
        dataset.classes = ['']
        return dataset, 1
    if not dataset.classes and not args.num_classes:
        raise InputError(f'--data-set {args.data_set}: does not say how many classes it has: add --num-classes')
    if dataset.classes and args.num_classes not in (None, len(dataset.classes)):
        raise InputError(f'--num-classes {args.num_classes}: {args.data_set} has {len(dataset.classes)} classes')
    dataset.classes = dataset.classes or [str(i) for i in range(args.num_classes)]
    return dataset, len(dataset.classes)


def import_hugging_face_datasets():
    """Let `import datasets` mean Hugging Face's package, which has the name of a file of this repository.

    Every file here has imported that one before, and keeps it.

    Raises:
        InputError: it is not installed.
    """
    own, here = sys.modules['datasets'], ROOT
    if not is_file_of(own, here):
        return
    paths = sys.path[:]
    del sys.modules['datasets']
    sys.path[:] = [path for path in paths if Path(path or '.').resolve() != here]
    try:
        importlib.import_module('datasets')
    except ImportError:
        sys.modules['datasets'] = own
        raise InputError('--data-set hfds/...: needs the package datasets; pip install -r requirements-readers.txt'
                         ) from None
    finally:
        sys.path[:] = paths


def columns_of(name: str, split: str, root: Optional[Path], *, labelled: bool) -> dict:
    """Which columns of a Hugging Face data set hold the images and their classes, as options of timm's reader.

    Args:
        labelled: whether the classes matter; else any column stands for them.

    Raises:
        InputError: it does not have one of each.
    """
    features = sys.modules['datasets'].load_dataset(name, split=split, cache_dir=root and str(root)).features
    kinds = {column: type(feature).__name__ for column, feature in features.items()}
    images = [column for column, kind in kinds.items() if kind == 'Image']
    labels = [column for column, kind in kinds.items() if kind == 'ClassLabel']
    labels = [column for column in ('label', 'fine_label') if column in kinds] or labels  # numbers without names do
    labels = labels if labelled else list(kinds)
    if len(images) != 1 or not labels:
        raise InputError(f'--data-set hfds/{name}: needs one column of images and one of classes; it has: '
                         f'{", ".join(f"{column} ({kind})" for column, kind in kinds.items())}')
    return {'input_key': images[0], 'target_key': labels[0]}


def check_split(source: Dataset, split: str, root: Path):
    """Refuse a split of torchvision's that is not there: timm takes the evaluation's, or the whole folder, for it."""
    if type(source) is ImageFolder and Path(source.root) == root:
        raise InputError(f'--data-path {root}: has no folder of the split {split}')
    if isinstance(getattr(source, 'train', None), bool) and split not in TRAIN_OR_NOT:
        raise InputError(f'no split {split}: must be one of {", ".join(TRAIN_OR_NOT)}')


def check_shards(reader, split: str):
    """Refuse shards in which timm would find nothing: in training it would look for ever.

    Raises:
        InputError: files are not there, their number of images is not known, or the first has no image or label.
    """
    import webdataset
    files = [Path(reader.root, name) for name in reader.split_info.filenames]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise InputError(f'split {split}: {len(missing)} of {len(files)} files are not there: '
                         f'{abridge(missing, 3)}')
    if not reader.num_samples:
        raise InputError(f'split {split}: its number of images is not known; add it, as in "{split}|1000"')
    shard = webdataset.DataPipeline(webdataset.SimpleShardList([str(files[0])]), webdataset.tarfile_to_samples())
    sample = [key for key in next(iter(shard), {}) if not key.startswith('__')]
    images, label = reader.input_key.split(';'), 'json' if reader.split_info.alt_label else 'cls'
    if label not in sample or not set(images) & set(sample):
        raise InputError(f'{files[0]}: a sample needs a file .{label} and one of .{", .".join(images)}; the first has '
                         f'{", ".join(f".{key}" for key in sample) or "none"}')


def means_hugging_face_datasets() -> bool:
    """Whether `import datasets` is Hugging Face's package now."""
    return 'datasets' in sys.modules and not is_file_of(sys.modules['datasets'], ROOT)


def is_file_of(module, folder: Path) -> bool:
    return Path(getattr(module, '__file__', None) or '/').resolve().parent == folder


# ---------------------------------------------------------------------------------------------------------------------
# Samples by their number

class Readable(Dataset):
    """A data set of timm or torchvision that gives a sample for its number.

    Args:
        upright: turn pictures as their EXIF orientation says.
        labelled: whether the classes matter.
    """

    def __init__(self, source: Dataset, *, upright: bool, labelled: bool = True):
        self.source, self.upright, self.labelled, self.transform = source, upright, labelled, None
        if hasattr(source, 'loader'):  # torchvision's own knows 8 bits only
            source.loader = functools.partial(pictures.load_rgb, upright=upright)
        self.classes = names_of(source)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int):
        name = f'image number {index}'
        try:
            if hasattr(self.source, 'reader'):  # not by timm's data set, which goes on to the next if one is unreadable
                file, target = self.source.reader[index]
                image = pictures.decode(file, name, upright=self.upright)
            else:
                image, target = self.source[index]
                if not hasattr(self.source, 'loader'):
                    image = pictures.finish(image, name, upright=self.upright)
        except UnreadableImage:
            raise
        except Exception as error:  # Pillow has many
            raise UnreadableImage(f'unreadable {name}: {first_line(error)}') from None
        label = check_label(target, len(self.classes)) if self.labelled else 0
        return self.transform(image) if self.transform else image, label
