"""timm's data readers: `--data-set hfds/NAME`, `torch/NAME`, `wds/NAME` and `tfds/NAME`.

The first two give samples by their number, and so all that the built-in data sets have. The last two are streams: no
repeated augmentation, and a training that goes on in the middle of an epoch sees other images in the rest of it.
"""
import importlib
import itertools
import numbers
import sys
from pathlib import Path
from typing import Callable, Iterator, List, Optional, Tuple

import torch
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torchvision.datasets import ImageFolder

import utils
from utils import InputError, UnreadableImage, notice

PACKAGES = {'hfds': 'datasets', 'wds': 'webdataset', 'tfds': 'tensorflow_datasets', 'torch': 'torchvision'}  # they need
INSTALL = {'tfds': 'tensorflow tensorflow-datasets'}  # what pip is to install; else what the requirements file names
STREAMS = ('wds', 'tfds')
TRAIN_OR_NOT = ('train', 'training', 'val', 'valid', 'validation', 'eval', 'evaluation', 'test')  # splits of torch/NAME


def prefix_of(data_set: str) -> Optional[str]:
    """Which of timm's readers a --data-set asks for, None for a built-in data set."""
    prefix = data_set.partition('/')[0]
    return prefix if '/' in data_set and prefix in PACKAGES else None


def build_dataset(args, is_train: bool) -> Tuple[Dataset, int]:
    """A split of the data set, without its transform, and the number of classes.

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
        columns = columns_of(args.data_set.removeprefix('hfds/'), split, cache) if prefix == 'hfds' else {}
        source = create_dataset(args.data_set, root=cache and str(cache), split=split,
                                is_training=is_train, batch_size=args.batch_size, seed=args.seed, **columns)
        if prefix == 'torch':
            check_split(source, split, root)
        elif prefix == 'wds':
            check_shards(source.reader, split)
    except InputError:
        raise
    except Exception as error:  # of whichever library reads it; timm has no better for one that is missing
        if not utils.is_installed(PACKAGES[prefix]):
            raise InputError(f'--data-set {args.data_set}: needs the package {PACKAGES[prefix]}; pip install '
                             f'{INSTALL.get(prefix, "-r requirements-readers.txt")}') from None
        raise InputError(f'--data-set {args.data_set}: timm can\'t read its split {split} with --data-path '
                         f'{args.data_path} ({type(error).__name__}: {utils.first_line(error)})') from None
    if prefix in STREAMS:
        files = len(source.reader.split_info.filenames) if prefix == 'wds' else None
        dataset = Stream(source, seed=args.seed, is_train=is_train, files=files)
    else:
        dataset = Readable(source)
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
    own, here = sys.modules['datasets'], Path(__file__).parent.resolve()
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


def columns_of(name: str, split: str, root: Optional[Path]) -> dict:
    """Which columns of a Hugging Face data set hold the images and their classes, as options of timm's reader.

    Raises:
        InputError: it does not have one of each.
    """
    features = sys.modules['datasets'].load_dataset(name, split=split, cache_dir=root and str(root)).features
    kinds = {column: type(feature).__name__ for column, feature in features.items()}
    images = [column for column, kind in kinds.items() if kind == 'Image']
    labels = [column for column, kind in kinds.items() if kind == 'ClassLabel']
    labels = [column for column in ('label', 'fine_label') if column in kinds] or labels  # numbers without names do
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
                         f'{utils.abridge(missing, 3)}')
    if not reader.num_samples:
        raise InputError(f'split {split}: its number of images is not known; add it, as in "{split}|1000"')
    shard = webdataset.DataPipeline(webdataset.SimpleShardList([str(files[0])]), webdataset.tarfile_to_samples())
    sample = [key for key in next(iter(shard), {}) if not key.startswith('__')]
    images, label = reader.input_key.split(';'), 'json' if reader.split_info.alt_label else 'cls'
    if label not in sample or not set(images) & set(sample):
        raise InputError(f'{files[0]}: a sample needs a file .{label} and one of .{", .".join(images)}; the first has '
                         f'{", ".join(f".{key}" for key in sample) or "none"}')


def check_label(label, num_classes: int) -> int:
    """A class index, or InputError."""
    if not isinstance(label, numbers.Integral) or not 0 <= label < num_classes:
        raise InputError(f'an image has the label {label!r}: must be a number from 0 to {num_classes - 1}')
    return int(label)


def is_file_of(module, folder: Path) -> bool:
    return Path(getattr(module, '__file__', None) or '/').resolve().parent == folder


def names_of(source) -> List[str]:
    """The classes' names in the order of their indices, if the data set knows them."""
    names = getattr(source, 'classes', None) or getattr(source, 'all_categories', None)  # torchvision's; iNaturalist's
    if names:  # ImageNet's are tuples of synonyms
        return [name if isinstance(name, str) else ', '.join(name) for name in names]
    index = getattr(getattr(source, 'reader', None), 'class_to_idx', None) or {}
    return [str(name) for name in sorted(index, key=index.get)]


# ---------------------------------------------------------------------------------------------------------------------
# Samples by their number

class Readable(Dataset):
    """A data set of timm or torchvision that gives a sample for its number."""

    def __init__(self, source: Dataset):
        self.source, self.transform = source, None
        self.classes = names_of(source)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int):
        try:
            if hasattr(self.source, 'reader'):  # not by timm's data set, which goes on to the next if one is unreadable
                file, target = self.source.reader[index]
                image = Image.open(file).convert('RGB')
            else:
                image, target = self.source[index]
                image = image.convert('RGB')
        except Exception as error:  # Pillow has many
            raise UnreadableImage(f'unreadable image number {index}: {utils.first_line(error)}') from None
        return self.transform(image) if self.transform else image, check_label(target, len(self.classes))


# ---------------------------------------------------------------------------------------------------------------------
# Streams

class Stream(IterableDataset):
    """A reader of timm that gives one sample after another, in an order of its own.

    Args:
        source: timm's data set.
        seed: with the epoch, the process and the position it decides the augmentation.
        is_train: each process gets other samples by timm's rules, some of them twice; else all of them exactly once.
        files: of the split, if each can be read by one process only.
    """

    def __init__(self, source: IterableDataset, *, seed: int, is_train: bool, files: Optional[int]):
        self.source, self.seed, self.is_train, self.files = source, seed, is_train, files
        self.transform = None
        self.classes = names_of(source)
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # known to loading processes that are running
        if not is_train:  # every process reads all of it, and keeps its share: timm's own division repeats samples
            source.reader.dist_rank, source.reader.dist_num_replicas = 0, 1

    def __len__(self) -> int:
        """Samples of all processes together, as the data set's description says."""
        return self.source.reader.num_samples

    def __iter__(self) -> Iterator[tuple]:
        worker = get_worker_info()
        rank, world = utils.get_rank(), utils.get_world_size()
        for position, (image, target) in enumerate(self.source):
            if not self.is_train and position % world != rank:
                continue
            if self.is_train:
                utils.seed_everything(self.seed, int(self.epoch), rank, worker.id if worker else 0, position)
            yield self.transform(image.convert('RGB')), check_label(target, len(self.classes))

    def refuse_losses(self, images: int):
        """timm's readers leave unreadable images out; raises InputError where an evaluation has lost some."""
        if images != len(self):
            raise InputError(f'{images} images of {len(self)} that the data set should have could be evaluated')


class StreamLoader:
    """Batches of a stream; in training, equally many on every process.

    Args:
        loader: of a `Stream`; in training its processes start anew each epoch, so that their seeds are the epoch's.
        steps: batches of an epoch in training; in evaluation, about as many as there will be.
    """

    def __init__(self, loader: DataLoader, steps: int):
        self.loader, self.steps, self.first = loader, steps, 0

    def set_epoch(self, epoch: int, first_step: int):
        self.first = first_step
        dataset, reader = self.loader.dataset, self.loader.dataset.source.reader
        dataset.epoch.fill_(epoch)
        dataset.source.set_epoch(epoch)
        seed = utils.derive_seed(dataset.seed, epoch, utils.get_rank()) % 2 ** 62
        self.loader.generator.manual_seed(seed)  # of timm's shuffling, which else ran on, or were the same each epoch
        reader.worker_seed, reader.ds = seed, None  # without loading processes
        if 0 < first_step < self.steps:
            notice('A stream can\'t be entered in its middle: the rest of this epoch has about the same images')

    def __len__(self) -> int:
        return self.steps - self.first

    def __iter__(self) -> Iterator:
        if not self.loader.dataset.is_train:
            return iter(self.loader)
        return itertools.islice(self.passes(), len(self))

    def passes(self) -> Iterator:
        """Batches of one pass after another; raises InputError where a pass has none."""
        while True:
            batches = 0
            for batch in self.loader:
                batches += 1
                yield batch
            if not batches:
                raise InputError('--data-set: no batch of readable samples comes from the stream')


def build_loader(dataset: Stream, args, *, batch_size: int, build: Callable[..., DataLoader]) -> StreamLoader:
    """A loader of a stream.

    Args:
        build: makes a DataLoader of a data set; takes the number of loading processes and DataLoader's options.

    Raises:
        InputError: there is less than a batch, or less than a file, for each process.
    """
    world, workers = utils.get_world_size(), utils.usable_workers(args.num_workers)
    if dataset.files is not None:
        if dataset.is_train and dataset.files < world:
            raise InputError(f'--data-set {args.data_set}: its {dataset.files} files can\'t be shared by {world} '
                             f'processes')
        workers = min(workers, dataset.files // world if dataset.is_train else dataset.files)
    steps = len(dataset) // (batch_size * world)
    if dataset.is_train and not steps:
        raise InputError(f'--batch-size {batch_size}: an epoch has {len(dataset) // world} images for each process, '
                         f'less than one batch')
    if dataset.is_train and args.accum_iter > steps:
        raise InputError(f'--accum-iter {args.accum_iter}: an epoch has {steps} batches')
    dataset.source.set_loader_cfg(num_workers=workers)
    loader = build(dataset, workers=workers, persistent=not dataset.is_train, batch_size=batch_size,
                   drop_last=dataset.is_train, generator=torch.Generator())
    return StreamLoader(loader, steps if dataset.is_train else -(-len(dataset) // (batch_size * world)))
