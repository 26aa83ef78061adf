"""Data sets in their own formats on disk, both transforms, and the way from samples to batches."""
import gzip
import hashlib
import itertools
import json
import pickle
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import REFERENCE, tiny, write_image
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader
from torchvision import transforms

import datasets
import main
import utils
from classification import recipe
from loaders import pictures, samples
from loaders.batches import build_eval_loader, build_train_loader
from loaders.class_folders import ClassFolders
from loaders.samples import CleanHalfErasing, SeededSamples, collate
from loaders.source import Source
from loaders.transforms import SMALL, ToNormalizedTensor, View, augment_ops
from run.settings import Loading
from utils import InputError, UnreadableImage

CPU = torch.device('cpu')


def build(data_set: str, path='', *, is_train: bool = True, **options):
    return datasets.load(Source(data_set, str(path), **options), is_train)


def refusal(data_set: str, path, *, is_train: bool = True) -> str:
    """Return the line that a data set is refused with."""
    with pytest.raises(InputError) as caught:
        build(data_set, path, is_train=is_train)
    message, = str(caught.value).splitlines()
    return message


def train_transform(*flags: str, size: int = 32):
    """Build the training transform of main.py's flags."""
    args = main.parse_args(['--data-set', 'SAMPLE', '--input-size', str(size), '--device', 'cpu', *flags])
    return recipe.build_transform(args, resize=size > SMALL)


def undecorated(dataset) -> list:
    """Return (bytes (img_h, img_w, 3), target) of every sample, without a transform."""
    samples = list(map(dataset.__getitem__, range(len(dataset))))
    assert {image.mode for image, _ in samples} == {'RGB'}
    return [(np.asarray(image), target) for image, target in samples]


def write_classes(folder: Path, names: list):
    """Write a class folder for each name, all with the same image of 4 x 4 pixels."""
    write_image(folder / names[0] / '0.png', size=(4, 4))
    content = (folder / names[0] / '0.png').read_bytes()
    for name in names[1:]:
        (folder / name).mkdir()
        (folder / name / '0.png').write_bytes(content)


def targets_by_folder(dataset) -> dict:
    return {Path(path).parent.name: target for path, target in dataset.samples}


def test_missing_data_path(tmp_path):
    """A data path that does not exist is refused with its name."""
    assert f'{tmp_path}/nowhere' in refusal('FOLDER', tmp_path / 'nowhere')


def test_split_decides_transform(folders):
    """The training split gets the training transform, the other one the evaluation transform."""
    args = main.parse_args(tiny(folders))
    train, held_out = (dataset.transform for dataset in main.build_datasets(args)[:2])
    assert str(train) == str(recipe.build_transform(args, resize=False))
    assert str(held_out) == str(main.build_view(args).transform())
    assert str(train) != str(held_out)


# ----- ImageNet

# Number of classes and some indices: of the published list of ImageNet-1k, and of the release of fall 2011.
STANDARD = {
    'IMNET': (1000, {'n01440764': 0, 'n02123045': 281, 'n02504458': 386, 'n15075141': 999}),
    'IMNET22k': (21841, {'n00004475': 0, 'n15102894': 21840}),
}


@pytest.mark.parametrize('data_set', STANDARD)
@pytest.mark.parametrize('is_train', [True, False])
def test_imagenet_subset(tmp_path, data_set, is_train):
    """A subset of the WordNet ids keeps its standard indices, among the standard number of classes."""
    num_standard, index = STANDARD[data_set]
    write_classes(tmp_path / ('train' if is_train else 'val'), list(index))
    dataset, num_classes = build(data_set, tmp_path, is_train=is_train)
    assert num_classes == num_standard
    assert targets_by_folder(dataset) == index


def test_imagenet_own_names(tmp_path):
    """1000 folders, none named by a WordNet id, are numbered in sorted order."""
    names = [f'class {i:03}' for i in range(1000)]
    write_classes(tmp_path / 'train', names[::-1])
    dataset, num_classes = build('IMNET', tmp_path)
    assert num_classes == 1000
    assert targets_by_folder(dataset) == {name: i for i, name in enumerate(names)}


@pytest.mark.parametrize('data_set', STANDARD)
def test_imagenet_unknown_names(tmp_path, data_set):
    """The refusal names the folders that are not named by a WordNet id, and no others."""
    known = list(STANDARD[data_set][1])[-1]
    write_classes(tmp_path / 'train', [known, 'cat', 'n99999999'])
    message = refusal(data_set, tmp_path)
    assert message.endswith('cat, n99999999')
    assert known not in message


# ----- CIFAR

# Class of torchvision, number of classes, key of the labels in the pickles.
CIFAR = {
    'CIFAR10': (torchvision.datasets.CIFAR10, 10, 'labels'),
    'CIFAR100': (torchvision.datasets.CIFAR100, 100, 'fine_labels'),
}


def write_cifar(root: Path, data_set: str) -> dict:
    """Write the pickles of the data set with two random images in each; return their content by file name."""
    cls, num_classes, labels = CIFAR[data_set]
    rng = np.random.default_rng(0)
    contents = {cls.meta['filename']: {cls.meta['key']: [f'class {i}' for i in range(num_classes)]}}
    for name, _ in cls.train_list + cls.test_list:
        contents[name] = {'data': rng.integers(0, 256, (2, 3072), dtype=np.uint8),
                          labels: rng.integers(0, num_classes, 2).tolist()}
    (root / cls.base_folder).mkdir()
    for name, content in contents.items():
        (root / cls.base_folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return contents


def accept_files(monkeypatch, root: Path, cls: type):
    """Make torchvision accept the files in `root` instead of those with the published MD5 sums."""
    def md5(name: str) -> str:
        return hashlib.md5((root / cls.base_folder / name).read_bytes()).hexdigest()

    for attribute in ('train_list', 'test_list'):
        monkeypatch.setattr(cls, attribute, [[name, md5(name)] for name, _ in getattr(cls, attribute)])
    monkeypatch.setattr(cls, 'meta', {**cls.meta, 'md5': md5(cls.meta['filename'])})


@pytest.mark.parametrize('data_set', CIFAR)
@pytest.mark.parametrize('is_train', [True, False])
def test_cifar(tmp_path, monkeypatch, data_set, is_train):
    """Images and labels are those of the split's pickles: a red, a green and a blue plane of 32 x 32 bytes."""
    cls, num_standard, labels = CIFAR[data_set]
    contents = write_cifar(tmp_path, data_set)
    accept_files(monkeypatch, tmp_path, cls)
    dataset, num_classes = build(data_set, tmp_path, is_train=is_train)
    assert num_classes == num_standard
    batches = [contents[name] for name, _ in (cls.train_list if is_train else cls.test_list)]
    samples = undecorated(dataset)
    assert [target for _, target in samples] == list(itertools.chain(*(batch[labels] for batch in batches)))
    planes = np.concatenate([batch['data'] for batch in batches]).reshape(-1, 3, 32, 32)
    assert np.array_equal(np.stack([image for image, _ in samples]), planes.transpose(0, 2, 3, 1))


@pytest.mark.parametrize('data_set', CIFAR)
def test_cifar_missing(tmp_path, data_set):
    """A directory without the data set is refused, with its path and what should be there."""
    message = refusal(data_set, tmp_path)
    assert str(tmp_path) in message
    assert CIFAR[data_set][0].base_folder in message


def test_cifar_damaged(tmp_path):
    """Files of other contents than the published ones are refused, with their path."""
    write_cifar(tmp_path, 'CIFAR10')
    assert str(tmp_path) in refusal('CIFAR10', tmp_path)


# ----- Fashion-MNIST

def write_idx(path: Path, array: np.ndarray):
    content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, '>u4').tobytes() + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == '.gz' else content)


def write_fashion(folder: Path, suffix: str) -> dict:
    """Write the four files with six and three random images; return (images, labels) by split."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    splits = {split: (rng.integers(0, 256, (count, 28, 28), dtype=np.uint8),
                      rng.integers(0, 10, count, dtype=np.uint8)) for split, count in (('train', 6), ('t10k', 3))}
    for split, (images, labels) in splits.items():
        write_idx(folder / f'{split}-images-idx3-ubyte{suffix}', images)
        write_idx(folder / f'{split}-labels-idx1-ubyte{suffix}', labels)
    return splits


@pytest.mark.parametrize('is_train', [True, False])
@pytest.mark.parametrize('suffix', ['', '.gz'])
@pytest.mark.parametrize('folder', ['', 'FashionMNIST/raw'])
def test_fashion(tmp_path, folder, suffix, is_train):
    """The IDX files are found in the folder and in torchvision's, gzipped or not; their grey images become RGB."""
    images, labels = write_fashion(tmp_path / folder, suffix)['train' if is_train else 't10k']
    dataset, num_classes = build('FASHION', tmp_path, is_train=is_train)
    assert num_classes == 10
    samples = undecorated(dataset)
    assert [target for _, target in samples] == labels.tolist()
    assert np.array_equal(np.stack([image for image, _ in samples]), np.stack([images] * 3, axis=-1))


@pytest.mark.parametrize('suffix', ['', '.gz'])
@pytest.mark.parametrize('kind', ['images-idx3', 'labels-idx1'])
@pytest.mark.parametrize('left', [0, .5], ids=['empty', 'half'])
def test_fashion_truncated(tmp_path, kind, suffix, left):
    """A truncated file is refused with its name."""
    write_fashion(tmp_path, suffix)
    path = tmp_path / f't10k-{kind}-ubyte{suffix}'
    content = path.read_bytes()
    path.write_bytes(content[:int(left * len(content))])
    assert str(path) in refusal('FASHION', tmp_path, is_train=False)


def test_fashion_missing(tmp_path):
    """A missing file is refused with its name."""
    write_fashion(tmp_path, '.gz')
    (tmp_path / 'train-labels-idx1-ubyte.gz').unlink()
    assert 'train-labels-idx1-ubyte' in refusal('FASHION', tmp_path)


def test_fashion_counts_differ(tmp_path):
    """Images and labels of different numbers are refused."""
    write_fashion(tmp_path, '')
    write_idx(tmp_path / 'train-labels-idx1-ubyte', np.zeros(5, np.uint8))
    assert '6 train images but 5 labels' in refusal('FASHION', tmp_path)


def test_sample(tmp_path, monkeypatch):
    """SAMPLE has 6,000 and 1,000 images of 10 classes, wherever the program is started, without a path."""
    monkeypatch.chdir(tmp_path)
    for is_train, count in ((True, 6000), (False, 1000)):
        dataset, num_classes = build('SAMPLE', is_train=is_train)
        assert (len(dataset), num_classes) == (count, 10)
        assert np.unique(dataset.labels).tolist() == list(range(10))


def test_sample_size():
    """The repository's sample data take at most 4 MB."""
    folder = Path(datasets.__file__).parent / 'sample_data'
    assert 1e6 < sum(path.stat().st_size for path in folder.iterdir()) <= 4e6


# ----- iNaturalist

LEVELS = ('kingdom', 'phylum', 'class', 'order', 'family', 'genus', 'name')
TAXA = (  # the position in categories.json is the category's id
    ('Animalia', 'Chordata', 'Aves', 'Passeriformes', 'Corvidae', 'Corvus', 'Corvus corax'),
    ('Animalia', 'Chordata', 'Aves', 'Passeriformes', 'Corvidae', 'Corvus', 'Corvus corone'),
    ('Plantae', 'Tracheophyta', 'Magnoliopsida', 'Fagales', 'Fagaceae', 'Quercus', 'Quercus robur'),
    ('Plantae', 'Tracheophyta', 'Magnoliopsida', 'Fagales', 'Fagaceae', 'Quercus', 'Quercus rubra'),
    ('Animalia', 'Chordata', 'Aves', 'Passeriformes', 'Paridae', 'Parus', 'Parus major'),
)
SUPERCATEGORIES = {'Animalia': 'Aves', 'Plantae': 'Plantae'}
ANNOTATED = {'train': (2, 4, 3, 0, 1), 'val': (0, 2)}  # category ids in the order of the annotations
NUMBERED = {  # target of each category id, numbered as the training annotations first name the class
    'name': {'2': 0, '4': 1, '3': 2, '0': 3, '1': 4},
    'genus': {'2': 0, '4': 1, '3': 0, '0': 2, '1': 2},
    'supercategory': {'2': 0, '4': 1, '3': 0, '0': 1, '1': 1},
}


def write_inat(root: Path, year: int, *, supercategory_folders: bool = True) -> Path:
    """Write one image of each annotated category; images are listed in another order than annotations."""
    categories = [{'id': i, 'supercategory': SUPERCATEGORIES[taxa[0]], **dict(zip(LEVELS, taxa))}
                  for i, taxa in enumerate(TAXA)]
    root.mkdir(parents=True, exist_ok=True)
    (root / 'categories.json').write_text(json.dumps(categories))
    for split, ids in ANNOTATED.items():
        images = []
        for i in sorted(ids):
            folder, name = f'train_val{year}', f'{split}{i}.jpg'
            supercategory = categories[i]['supercategory']
            images.append({'id': i, 'width': 32, 'height': 32, 'file_name': f'{folder}/{supercategory}/{i}/{name}'})
            write_image(root / folder / (supercategory if supercategory_folders else '') / str(i) / name, seed=i)
        annotations = [{'id': i, 'image_id': i, 'category_id': i} for i in ids]
        (root / f'{split}{year}.json').write_text(json.dumps({'images': images, 'annotations': annotations}))
    return root


@pytest.mark.parametrize(('data_set', 'year'), [('INAT', 2018), ('INAT19', 2019)])
@pytest.mark.parametrize('category', NUMBERED)
def test_inat_classes(tmp_path, data_set, year, category):
    """Classes of the chosen level are numbered in the order of the training annotations."""
    dataset, num_classes = build(data_set, write_inat(tmp_path, year), inat_category=category)
    assert num_classes == len(set(NUMBERED[category].values()))
    assert targets_by_folder(dataset) == NUMBERED[category]


@pytest.mark.parametrize('category', NUMBERED)
def test_inat_evaluation_classes(tmp_path, category):
    """Evaluation images have the class numbers of the training, and its number of classes."""
    dataset, num_classes = build('INAT', write_inat(tmp_path, 2018), inat_category=category, is_train=False)
    assert num_classes == len(set(NUMBERED[category].values()))
    assert targets_by_folder(dataset) == {str(i): NUMBERED[category][str(i)] for i in ANNOTATED['val']}


@pytest.mark.parametrize('supercategory_folders', [True, False])
def test_inat_layouts(tmp_path, supercategory_folders):
    """Images are read from YEAR/SUPERCATEGORY/ID/, as the archives have them, and from YEAR/ID/, as the original."""
    root = write_inat(tmp_path, 2018, supercategory_folders=supercategory_folders)
    for image, target in undecorated(build('INAT', root)[0]):
        category, = (i for i, number in NUMBERED['name'].items() if number == target)
        path, = root.glob(f'train_val2018/**/{category}/train{category}.jpg')
        assert np.array_equal(image, np.asarray(Image.open(path)))


@pytest.mark.parametrize('name', ['categories.json', 'train2018.json', 'val2018.json'])
def test_inat_missing_json(tmp_path, name):
    """A missing annotation file is refused with its name."""
    (write_inat(tmp_path, 2018) / name).unlink()
    assert f'{tmp_path / name} is missing' in refusal('INAT', tmp_path, is_train=False)


@pytest.mark.parametrize('content', ['{"images": [', '{"images": []}', '[]'])
def test_inat_wrong_json(tmp_path, content):
    """Annotations that are truncated or of another format are refused with their folder."""
    (write_inat(tmp_path, 2018) / 'train2018.json').write_text(content)
    assert str(tmp_path) in refusal('INAT', tmp_path)


# ----- Class folders

@pytest.mark.parametrize(('data_set', 'required'), [('CARS', 196), ('FLOWERS', 102)])
def test_cars_and_flowers(tmp_path, data_set, required):
    """CARS and FLOWERS read train/ and test/ with their 196 and 102 class folders."""
    names = [f'{i:03}' for i in range(required)]
    for split in ('train', 'test'):
        write_classes(tmp_path / split, names)
    for is_train, split in ((True, 'train'), (False, 'test')):
        dataset, num_classes = build(data_set, tmp_path, is_train=is_train)
        assert num_classes == required
        assert targets_by_folder(dataset) == {name: i for i, name in enumerate(names)}
        assert {Path(path).parts[-3] for path, _ in dataset.samples} == {split}


@pytest.mark.parametrize(('data_set', 'required'), [('CARS', 196), ('FLOWERS', 102)])
@pytest.mark.parametrize('excess', [-1, 1])
def test_cars_and_flowers_wrong_number(tmp_path, data_set, required, excess):
    """Another number of class folders is refused, with both numbers."""
    for split in ('train', 'test'):
        write_classes(tmp_path / split, [f'{i:03}' for i in range(required + excess)])
    assert f'has {required + excess} class folders, not {required}' in refusal(data_set, tmp_path)


@pytest.mark.parametrize('held_out', ['val', 'test'])
def test_folder(folders, held_out):
    """FOLDER trains on train/ and evaluates on val/ or test/, with sorted classes."""
    (folders / 'val').rename(folders / held_out)
    for is_train, split, count in ((True, 'train', 16), (False, held_out, 8)):
        dataset, num_classes = build('FOLDER', folders, is_train=is_train)
        assert (len(dataset), num_classes) == (count, 2)
        assert targets_by_folder(dataset) == {'cat': 0, 'dog': 1}
        assert {Path(path).parts[-3] for path, _ in dataset.samples} == {split}


@pytest.mark.parametrize('is_train', [True, False])
@pytest.mark.parametrize(('here', 'there'), [('train', 'val'), ('val', 'train')])
def test_folder_lonely_class(folders, here, there, is_train):
    """A class that only one split has is refused with both folders."""
    write_classes(folders / here, ['emu'])
    message = refusal('FOLDER', folders, is_train=is_train)
    assert f'in {folders / here}, but not in {folders / there}: emu' in message


@pytest.mark.parametrize('file', [None, 'notes.txt'])
def test_folder_empty_class(folders, file):
    """A class folder without images is refused with its name."""
    for split in ('train', 'val'):
        (folders / split / 'emu').mkdir()
        if file:
            (folders / split / 'emu' / file).touch()
    message = refusal('FOLDER', folders)
    assert str(folders / 'train') in message
    assert 'emu' in message


def test_folder_evaluation_alone(folders):
    """The evaluation split of a FOLDER data set can be built without train/."""
    (folders / 'train').rename(folders.parent / 'elsewhere')
    dataset, num_classes = build('FOLDER', folders, is_train=False)
    assert (len(dataset), num_classes) == (8, 2)


@pytest.mark.parametrize('is_train', [True, False])
def test_folder_wrong_folders(tmp_path, is_train):
    """Folders of other names are refused with their names and the expected ones."""
    for name in ('training', 'validation'):
        (tmp_path / name).mkdir()
    message = refusal('FOLDER', tmp_path, is_train=is_train)
    assert 'no train/ folder' in message if is_train else 'no val/ or test/ folder' in message
    assert 'training, validation' in message


# ----- Reading images

def write_text(path: Path):
    path.write_text('not an image')


def write_truncated(path: Path):
    write_image(path, size=(64, 64))
    path.write_bytes(path.read_bytes()[:-200])


@pytest.fixture(params=[write_text, write_truncated])
def unreadable(request, folders) -> Path:
    """An evaluation image named .jpg that can't be decoded."""
    path = folders / 'val' / 'dog' / 'bad.jpg'
    request.param(path)
    return path


def test_unreadable_image(unreadable):
    """An image that can't be decoded raises an error with its name."""
    with pytest.raises(UnreadableImage, match=f'^unreadable image {re.escape(str(unreadable))}: '):
        pictures.load_rgb(unreadable)


def test_inspection_finds_unreadable_image(unreadable, folders):
    """The inspection of a data set finds the image that can't be decoded, and names it with a remedy."""
    dataset, _ = build('FOLDER', folders, is_train=False)
    with pytest.raises(UnreadableImage, match=f'^unreadable image {re.escape(str(unreadable))}: .*; repair or remove'):
        samples.inspect(None, dataset)


def test_unreadable_image_in_worker(unreadable, folders):
    """The error is of its own type and one line from a worker too."""
    dataset, _ = build('FOLDER', folders, is_train=False)
    batches = iter(DataLoader(dataset, batch_size=len(dataset), num_workers=1, collate_fn=collate))
    with pytest.raises(UnreadableImage) as caught:
        next(batches)
    assert list(batches) == []  # ends the worker; torch waits for it in vain during garbage collection
    message, = str(caught.value).splitlines()
    assert message.startswith(f'unreadable image {unreadable}: ')


@pytest.mark.parametrize(('mode', 'color', 'expected'), [
    ('L', 100, (100, 100, 100)), ('P', (200, 10, 30), (200, 10, 30)), ('RGBA', (200, 10, 30, 99), (200, 10, 30))])
def test_load_rgb(tmp_path, mode, color, expected):
    """Grey, palette and RGBA pictures become RGB of the same colour."""
    image = Image.new('RGB', (4, 4), color).quantize() if mode == 'P' else Image.new(mode, (4, 4), color)
    image.save(tmp_path / 'image.png')
    assert Image.open(tmp_path / 'image.png').mode == mode
    loaded = pictures.load_rgb(tmp_path / 'image.png')
    assert loaded.mode == 'RGB'
    assert loaded.getcolors() == [(16, expected)]


# ----- Transforms

@pytest.mark.parametrize('crop', ['crop0875', 'full_crop'])
@pytest.mark.parametrize('size', [224, 384, 32])
def test_eval_transform(reference, crop, size):
    """Agrees with the original's: shape, mean, standard deviation, and the values of a grid, to 1e-6."""
    transform = View(size, full_crop=crop == 'full_crop', resize=size > SMALL).transform()
    image = transform(pictures.load_rgb(REFERENCE / 'pattern.png'))
    key, step = f'eval_transform/{crop}/{size}', max(1, size // 16)
    assert list(image.shape) == reference[key]['shape']
    assert image.mean().item() == pytest.approx(reference[key]['mean'], rel=0, abs=1e-6)
    assert image.std().item() == pytest.approx(reference[key]['std'], rel=0, abs=1e-6)
    grid = np.load(REFERENCE / 'transforms.npz')[key]
    np.testing.assert_allclose(image[:, ::step, ::step].numpy(), grid, rtol=0, atol=1e-6)


def plain(step: str) -> str:
    """Return a printed step without addresses and without changes of timm's since 0.4.9."""
    step = re.sub(r'^<.*\.(\w+) object at 0x\w+>$', r'\1', step)
    step = re.sub(r'^(RandAugment|RandomErasing)\(.*', r'\1', step, flags=re.DOTALL)
    return step.replace('MaybeToTensor', 'ToTensor').replace('PIL.Image.BICUBIC', 'bicubic')


@pytest.mark.parametrize('size', [224, 32])
def test_train_transform(reference, size):
    """The steps, in order, and all the parameters that the original's prints: of crop, flip and normalisation."""
    transform = train_transform(size=size)
    place = [type(step).__name__ for step in transform.transforms].index('ToNormalizedTensor')
    transform.transforms[place:place + 1] = [transforms.ToTensor(), transforms.Normalize(
        torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD))]  # which it is, by the next test
    original = reference[f'train_transform_{size}'].splitlines()[1:-1]
    assert [plain(str(step)) for step in transform.transforms] == [plain(line.strip()) for line in original]


def test_normalized_tensor_is_torchvisions():
    """Bit by bit what ToTensor and Normalize give, for each of the 256 values of a channel."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 50, 3), dtype=np.uint8))
    expected = transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)(transforms.ToTensor()(image))
    assert torch.equal(ToNormalizedTensor()(image), expected)


def test_train_transform_augmentation():
    """By default two operations of magnitude 9 +- 0.5 are drawn, and a quarter of the images gets one noisy patch."""
    *_, augment, _, erase = train_transform().transforms
    assert augment.num_layers == 2
    assert {(op.magnitude, op.magnitude_std, op.prob) for op in augment.ops} == {(9, .5, .5)}
    assert (erase.probability, erase.mode, erase.min_count, erase.max_count) == (.25, 'pixel', 1, 1)


@pytest.mark.parametrize('aa', ['', 'none'])
def test_train_transform_without_policy(aa):
    """Without a policy the colours are jittered instead, by --color-jitter."""
    transform = train_transform('--aa', aa, '--color-jitter', '.3')
    names = [type(step).__name__ for step in transform.transforms]
    assert names == ['RandomCrop', 'RandomHorizontalFlip', 'ColorJitter', 'ToNormalizedTensor', 'RandomErasing']
    assert transform.transforms[2].brightness == pytest.approx((.7, 1.3))


@pytest.mark.parametrize('aa', ['rand-m9-mstd0.5-inc1', 'rand-m9', 'v0', 'original', '3a', 'augmix-m3'])
@pytest.mark.parametrize('magnitude', [0, 10])
def test_policy_operations(aa, magnitude):
    """Every operation of a policy works at both ends of the magnitudes, which random magnitudes can reach."""
    operations = list(augment_ops(train_transform('--aa', aa)))
    assert operations
    for operation in operations:
        operation.magnitude, operation.magnitude_std, operation.prob = magnitude, 0, 1
        assert operation(Image.new('RGB', (8, 8), 'white')).size == (8, 8)


def test_posterize_to_no_bits():
    """PosterizeIncreasing at magnitude 10 leaves no bits: a black image, as the original's Pillow made it."""
    transform = train_transform('--aa', 'rand-m10-inc1')
    operation, = (op for op in augment_ops(transform) if op.name == 'PosterizeIncreasing')
    operation.prob = 1
    assert operation(Image.new('RGB', (8, 8), 'white')).getcolors() == [(64, (0, 0, 0))]


@pytest.mark.parametrize('size', [(20, 20), (28, 28), (300, 420)])
def test_train_transform_small_input(size):
    """Up to 32 pixels, images of any size give crops of the input size."""
    assert train_transform()(Image.new('RGB', size)).shape == (3, 32, 32)


# ----- From samples to batches

def test_seeded_sample_is_function_of_key(folders):
    """A key determines its sample bitwise, whatever was drawn and loaded before."""
    samples = SeededSamples(build('FOLDER', folders)[0].with_transform(train_transform()))
    keys = [(3, seed) for seed in range(8)]
    first = [samples[key][0] for key in keys]
    utils.seed_everything(1)
    random.random(), np.random.rand(), torch.rand(1)
    again = [samples[key][0] for key in reversed(keys)]
    assert torch.equal(torch.stack(first), torch.stack(again[::-1]))


def test_seeds_give_other_samples(folders):
    """Each seed gives another version of an image."""
    samples = SeededSamples(build('FOLDER', folders)[0].with_transform(train_transform()))
    versions = [samples[3, seed][0] for seed in range(4)]
    assert not any(torch.equal(versions[i], versions[j]) for i in range(4) for j in range(i))


@pytest.mark.parametrize('flag', ['--no-resplit', '--resplit'])
def test_batches_do_not_depend_on_workers(folders, flag):
    """Loaders with 0 and with 2 workers give bitwise equal batches of an epoch, under both ways of erasing."""
    epochs = []
    for workers in (0, 2):
        args = main.parse_args(tiny(folders, '--reprob', '1', flag))
        loader = build_train_loader(main.build_datasets(args)[0], Loading(4, CPU, num_workers=workers),
                                    collate_fn=recipe.build_collate(args), repeated_aug=True)
        loader.set_position(1, 0)
        epochs.append(list(loader))
    assert [len(epoch) for epoch in epochs] == [4, 4]
    for (images, targets), (images_2, targets_2) in zip(*epochs):
        assert torch.equal(images, images_2)
        assert torch.equal(targets, targets_2)


@pytest.fixture
def mixed_sizes(folders) -> Path:
    write_image(folders / 'val' / 'cat' / 'wide.png', size=(48, 40))
    return folders


def first_eval_batch(folders: Path, *, full_crop: bool):
    dataset, _ = build('FOLDER', folders, is_train=False)
    transform = View(32, full_crop=full_crop, resize=False).transform()
    return next(iter(build_eval_loader(dataset.with_transform(transform), Loading(8, CPU))))


def test_collate_mixed_sizes(mixed_sizes):
    """Images of several sizes can't be stacked; the error contains the sizes and a remedy."""
    with pytest.raises(InputError, match=r'sizes \(\(32, 32\), \(40, 48\) pixels\): add --resize$'):
        first_eval_batch(mixed_sizes, full_crop=False)


def test_full_crop_mixed_sizes(mixed_sizes):
    """With --full_crop images of several sizes make a batch."""
    images, targets = first_eval_batch(mixed_sizes, full_crop=True)
    assert images.shape == (9, 3, 32, 32)
    assert targets.tolist() == [0] * 5 + [1] * 4


def test_clean_half_erasing():
    """--resplit leaves the first half of a batch as it is, and with probability 1 erases in each of the other half."""
    utils.seed_everything(0)
    images, targets = CleanHalfErasing(1., 'pixel', 1)([(torch.full((3, 32, 32), 7.), i) for i in range(8)])
    touched = (images != 7).flatten(1).any(dim=1)
    assert touched.tolist() == [False] * 4 + [True] * 4
    assert targets.tolist() == list(range(8))


def test_resplit_erases_batches_only():
    """Under --resplit no single sample is erased, which would reach the clean half."""
    assert 'RandomErasing' not in str(train_transform('--resplit', '--reprob', '1'))
    assert 'RandomErasing' in str(train_transform())


def test_inspection_reaches_every_part(tmp_path, monkeypatch):
    """Damage in the last tenth is found although only half of the images are inspected."""
    monkeypatch.setattr(pictures, 'NUM_PROBED', 10)
    write_classes(tmp_path / 'train', [f'{i:02}' for i in range(20)])
    for name in ('18', '19'):
        (tmp_path / 'train' / name / '0.png').write_bytes(b'')
    with pytest.raises(UnreadableImage, match='unreadable image'):
        samples.inspect(ClassFolders(tmp_path / 'train'))


def test_mixed_sizes_in_worker(tmp_path):
    """The refusal is one line from a worker too."""
    for i, size in enumerate([(32, 32), (40, 30)]):
        write_image(tmp_path / 'val' / 'cat' / f'{i}.png', size=size)
    write_image(tmp_path / 'val' / 'dog' / '0.png')
    dataset = build('FOLDER', tmp_path, is_train=False)[0].with_transform(ToNormalizedTensor())
    with pytest.raises(InputError) as caught:
        list(DataLoader(dataset, batch_size=2, num_workers=1, collate_fn=collate))
    message, = str(caught.value).splitlines()
    assert message.startswith('without --resize')


@pytest.mark.parametrize('workers', [0, 1])
def test_bad_images_are_skipped_up_to_a_number(folders, workers, capfd):
    """One unreadable image is replaced by its neighbour, and reported once; a second one is an error."""
    paths = sorted((folders / 'train').rglob('*.png'))
    paths[3].write_bytes(b'')
    dataset = build('FOLDER', folders)[0].with_transform(train_transform())
    keys = [(3, 1), (4, 1), (3, 2)]

    def loaded(dataset) -> list:
        loader = DataLoader(dataset, sampler=keys, batch_size=3, num_workers=workers, collate_fn=collate)
        return [batch for _ in range(2) for batch in loader]

    images, targets = loaded(SeededSamples(dataset, most_bad=1))[0]
    assert torch.equal(images[0], images[1])
    assert targets.tolist() == [0, 0, 0]
    assert capfd.readouterr().err.count(f'unreadable image {paths[3]}') == 1
    paths[4].write_bytes(b'')
    with pytest.raises(UnreadableImage, match='more than --skip-bad-images 1 allows'):
        loaded(SeededSamples(dataset, most_bad=1))
