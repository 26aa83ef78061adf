"""Pictures of users: files that count, orientation, and conversion of any kind to RGB."""
import io
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiniest, write_folders, write_image
from PIL import ExifTags, Image, features

import datasets
from inference.pictures import find_images
from loaders import pictures
from loaders.source import Source
from loaders.transforms import ToNormalizedTensor, View
from main import build_datasets, main, parse_args
from tools.extract_features import class_folders
from utils import InputError, UnreadableImage

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.stack([GREY, GREY.T, 255 - GREY], axis=2)


def load(folder: Path, *, is_train: bool, **options):
    dataset, _ = datasets.load(Source('FOLDER', str(folder), **options), is_train)
    return dataset


def decoded(image: Image.Image, format: str, **options) -> np.ndarray:
    """Return a picture as it is read after being stored in a format."""
    file = io.BytesIO()
    image.save(file, format, **options)
    file.seek(0)
    return np.asarray(pictures.decode(file, 'picture', upright=True))


# ----- modes

@pytest.mark.parametrize(('image', 'format'), [
    (Image.fromarray(GREY.astype(np.uint16) * 257), 'PNG'), (Image.fromarray(GREY.astype(np.uint16) * 257), 'TIFF'),
    (Image.fromarray((GREY.astype(np.uint16) * 257).astype('>u2')), 'TIFF'),
    (Image.fromarray(GREY.astype(np.int32) * 1000 - 5), 'TIFF'), (Image.fromarray(GREY / np.float32(100)), 'TIFF'),
    (Image.fromarray(GREY.astype(np.int32) * 257), 'PPM'), (Image.fromarray(GREY), 'PNG')],
    ids=['16-bit PNG', '16-bit TIFF', 'big-endian TIFF', '32-bit', 'float', '16-bit PPM', '8-bit'])
def test_grey_pictures_of_any_depth(image, format):
    """The whole range of a depth is scaled to 8 bits."""
    assert (decoded(image, format) == GREY[:, :, None]).all()


def test_modes_of_16_bits():
    """16-bit modes are read in both byte orders."""
    for mode in ('I;16', 'I;16L', 'I;16B'):
        image = Image.frombytes(mode, (16, 16), (GREY.astype('>u2' if mode == 'I;16B' else '<u2') * 257).astype(
            '>u2' if mode == 'I;16B' else '<u2').tobytes())
        assert (np.asarray(pictures.to_rgb(image)) == GREY[:, :, None]).all(), mode


@pytest.mark.parametrize('values', [[[np.nan, 0, 1]], [[-np.inf, 0, 1]], [[0, 0, 0]], [[np.nan] * 3]], ids=str)
def test_floats_without_a_range(values):
    """Values that are not finite do not affect the others, and pictures of one value are black."""
    rgb = np.asarray(pictures.to_rgb(Image.fromarray(np.array(values, np.float32))))
    assert rgb[0, :, 0].tolist() == ([0, 0, 255] if values[0][2] == 1 else [0, 0, 0])


def transparent(mode: str) -> Image.Image:
    """Return COLOURS, or their grey, with every second column transparent."""
    alpha = np.zeros((16, 16), np.uint8)
    alpha[:, ::2] = 255
    image = Image.fromarray(np.dstack([COLOURS if mode == 'RGBA' else GREY, alpha]))
    assert image.mode == mode
    return image


def test_transparency_is_ignored():
    """The stored colours count, in every mode that has transparency."""
    assert (decoded(transparent('RGBA'), 'PNG') == COLOURS).all()
    assert (decoded(transparent('LA'), 'PNG') == GREY[:, :, None]).all()
    palette = Image.fromarray(GREY).convert('P')
    expected = np.asarray(palette.convert('RGB'))
    assert (decoded(palette, 'PNG', transparency=3) == expected).all()
    assert (decoded(palette, 'PNG', transparency=bytes(range(256))) == expected).all()
    assert (decoded(palette, 'GIF', transparency=3) == expected).all()
    with_alpha = palette.convert('PA')
    assert (np.asarray(pictures.to_rgb(with_alpha)) == expected).all()
    assert (decoded(Image.fromarray(COLOURS), 'PNG', transparency=(0, 0, 255)) == COLOURS).all()


@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'CMYK', 'YCbCr', 'HSV', 'LAB', 'RGBX', 'RGBa', 'La', 'PA', 'I', 'F'])
def test_any_mode_becomes_rgb(mode):
    """Every mode of Pillow is converted."""
    source = Image.fromarray(COLOURS)
    image = Image.new('LAB', (16, 16)) if mode == 'LAB' else (
        source.convert({'RGBa': 'RGBA', 'La': 'LA'}.get(mode, mode)).convert(mode))
    assert image.mode == mode
    assert pictures.to_rgb(image).mode == 'RGB'


def test_sixteen_bits_train_like_eight(tmp_path):
    """Pictures of 16 bits give the tensors of the same pictures with 8 bits."""
    for bits, scale in ((8, 1), (16, 257)):
        for split in ('train', 'val'):
            for name, low in (('dark', 0), ('light', 200)):
                folder = tmp_path / str(bits) / split / name
                folder.mkdir(parents=True)
                values = (GREY // 8 + low).astype(np.uint16) * scale
                Image.fromarray(values.astype(np.uint8) if bits == 8 else values).save(folder / '0.png')
    eight, sixteen = (load(tmp_path / bits, is_train=False).with_transform(ToNormalizedTensor())
                      for bits in ('8', '16'))
    for i in range(2):
        torch.testing.assert_close(eight[i][0], sixteen[i][0], rtol=0, atol=0)


def test_peculiar_pictures_are_logged(tmp_path, capsys):
    """The log has number, example and conversion of each kind, and a remark on 16-bit pictures with fewer bits."""
    Image.fromarray(GREY.astype(np.uint16) * 16).save(tmp_path / 'a.png')
    Image.fromarray(GREY.astype(np.float32)).save(tmp_path / 'b.tif')
    write_image(tmp_path / 'c.png')
    find_images([str(tmp_path)])
    out = capsys.readouterr().out
    assert (f'1 of 3 probed pictures (such as {tmp_path}/a.png) are 16-bit: values from 0 to 65535 are scaled to 0 to '
            f'255') in out
    assert 'If the values have 12 bits, multiply the values by 16' in out
    assert f'(such as {tmp_path}/b.tif) are 32-bit: each is scaled by its own range' in out


# ----- orientation

def turned_file(folder: Path, orientation: int, format: str = 'JPEG') -> Path:
    """Write COLOURS as a camera stores them with an EXIF orientation."""
    back = {6: 8, 8: 6}.get(orientation, orientation)
    stored = Image.fromarray(COLOURS[:, :8])
    stored = stored.transpose(pictures.TURNS[back]) if back in pictures.TURNS else stored
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = folder / f'{orientation}.{format.lower()}'
    stored.save(path, format, exif=exif, **({'quality': 100, 'subsampling': 0} if format == 'JPEG' else {}))
    return path


@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'WEBP'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_all_orientations(tmp_path, orientation, format):
    """Each of the eight is turned upright, in each format that has EXIF."""
    if format == 'WEBP' and not features.check('webp'):
        pytest.skip('Pillow without WebP')
    image = np.asarray(pictures.load_rgb(turned_file(tmp_path, orientation, format))).astype(int)
    assert image.shape == (16, 8, 3)
    assert abs(image - COLOURS[:, :8]).mean() < 8
    as_stored = np.asarray(pictures.load_rgb(turned_file(tmp_path, orientation, format), upright=False))
    assert (as_stored.shape == (16, 8, 3)) == (orientation < 5)


@pytest.mark.parametrize(('name', 'flags', 'upright'), [
    ('FOLDER', [], True), ('FOLDER', ['--no-exif'], False), ('CARS', [], True), ('IMNET', [], False),
    ('IMNET', ['--exif'], True), ('IMNET22k', [], False), ('INAT', [], False), ('INAT19', [], False),
    ('hfds/imagenet-1k', [], False), ('hfds//my/phone', [], True)])
def test_whose_pictures_are_turned(name, flags, upright):
    """Pictures of users are turned, published data sets are not; --exif and --no-exif have priority."""
    source = datasets.source(parse_args(['--device', 'cpu', '--data-set', name, *flags]))
    assert datasets.turns_upright(source) is upright


@pytest.mark.parametrize('exif', [None, False])
def test_training_and_evaluation_turn_alike(tmp_path, exif):
    """Pictures of both splits have the same orientation."""
    for split in ('train', 'val'):
        for name in ('a', 'b'):
            (tmp_path / split / name).mkdir(parents=True)
            turned_file(tmp_path / split / name, 6)
    for is_train in (True, False):
        picture, _ = load(tmp_path, is_train=is_train, exif=exif)[0]
        assert picture.size == ((8, 16) if exif is None else (16, 8))


@pytest.mark.parametrize('error', [SyntaxError, struct.error, ValueError, KeyError, TypeError, ZeroDivisionError])
def test_broken_exif_is_ignored(tmp_path, monkeypatch, capsys, error):
    """A picture is read without its broken EXIF data, whatever Pillow raises, and this is reported once."""
    path = tmp_path / f'{error.__name__}.png'
    write_image(path)

    def getexif(self):
        raise error('broken')

    monkeypatch.setattr(Image.Image, 'getexif', getexif)
    pictures.report_broken_exif.cache_clear()
    for _ in range(2):
        assert pictures.load_rgb(path).size == (32, 32)
    assert capsys.readouterr().err.count(f'{path}: broken EXIF data are ignored ({error.__name__}: ') == 1


def test_exif_of_garbage(tmp_path):
    """A picture whose EXIF block is garbage is read."""
    path = tmp_path / 'a.jpg'
    Image.fromarray(COLOURS).save(path, exif=b'Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0\x01\0\0\0\x06')
    assert pictures.load_rgb(path).size == (16, 16)


@pytest.mark.parametrize('make', [
    lambda path: path.write_bytes(b''), lambda path: path.write_bytes(b'\xff\xd8\xff\xe0junk'),
    lambda path: path.mkdir(), lambda path: path.symlink_to('nowhere')],
    ids=['empty', 'damaged', 'folder', 'dangling link'])
def test_files_that_are_not_pictures_are_unreadable(tmp_path, make):
    """The error contains the name of the file."""
    make(tmp_path / 'x.jpg')
    with pytest.raises(UnreadableImage, match=f'unreadable image {tmp_path}/x.jpg: '):
        pictures.load_rgb(tmp_path / 'x.jpg')


# ----- files and folders

def cluttered(root: Path) -> Path:
    """Write two classes with 2 pictures each among files and folders of systems and programs."""
    write_folders(root, per_class=2)
    for split in ('train', 'val'):
        for name in ('.ipynb_checkpoints', '__MACOSX', '@eaDir', '.hidden', '$RECYCLE.BIN', '#recycle', '.thumbnails'):
            write_image(root / split / name / '0.png')
            write_image(root / split / 'cat' / name / '0.png')
        for name in ('._0.jpg', '.DS_Store', '.0.png'):
            (root / split / 'cat' / name).write_bytes(b'\0\5\x16\7')
            (root / split / name).write_bytes(b'\0\5\x16\7')
    return root


def test_hidden_files_and_folders_are_skipped(tmp_path, capsys):
    """Hidden files and folders are neither classes nor pictures, and are not logged."""
    source = Source('FOLDER', str(cluttered(tmp_path)))
    for is_train, count in ((True, 4), (False, 2)):
        dataset, num_classes = datasets.load(source, is_train)
        assert (len(dataset), num_classes) == (count, 2)
    assert 'left out' not in capsys.readouterr().out
    paths = find_images([str(tmp_path / 'train')])
    assert len(paths) == 4
    assert class_folders([str(tmp_path / 'train')], paths)[0] == ['cat', 'dog']


def test_every_suffix_that_pillow_reads_counts(tmp_path):
    """Suffixes count in upper case too, but not those of formats that Pillow can't decode."""
    names = ['a.jfif', 'b.GIF', 'c.JPEG', 'd.tif', 'e.bmp', 'f.webp', 'g.jpe', 'h.Png', 'i.ppm', 'j.jp2', 'k.tga',
             'l.mpo']
    for name in names:
        (tmp_path / name).write_bytes(b'')
    for name in ('a.h5', 'b.mpg', 'c.pdf', 'd.eps', 'e.txt', 'f'):
        (tmp_path / name).write_bytes(b'')
    left_out = Counter()
    assert [Path(path).name for path in pictures.find(tmp_path, left_out)] == sorted(names)
    assert left_out == Counter({'.h5': 1, '.mpg': 1, '.pdf': 1, '.eps': 1, '.txt': 1, 'no suffix': 1})


def test_files_left_out_are_counted(folders, capsys):
    """Files that are not pictures are logged by suffix in one line."""
    for name in ('a.txt', 'b.txt', 'c.csv'):
        (folders / 'train' / 'cat' / name).write_text('')
    load(folders, is_train=True)
    assert ('/train: 3 files are left out, which Pillow does not read: 2 .txt, 1 .csv\n'
            in capsys.readouterr().out)


def test_links_that_lead_back_are_not_followed(tmp_path):
    """A link to a folder above is skipped, another link is followed."""
    write_image(tmp_path / 'a' / '0.png')
    (tmp_path / 'a' / 'loop').symlink_to(tmp_path)
    write_image(tmp_path / 'elsewhere' / '1.png')
    (tmp_path / 'a' / 'link').symlink_to(tmp_path / 'elsewhere')
    assert [Path(path).name for path in pictures.find(tmp_path / 'a', Counter())] == ['0.png', '1.png']


def test_one_class_is_refused(tmp_path):
    """A data set with one class is refused: every prediction would be right."""
    write_folders(tmp_path / 'data', classes=('cat',))
    with pytest.raises(InputError, match=r'has one class \(cat\); a classifier needs two'):
        main(tiniest(tmp_path / 'data'))


def test_class_sizes_are_logged(folders, capsys):
    """Class sizes are logged once, with a warning about classes without enough pictures."""
    for path in [*(folders / 'val' / 'dog').iterdir(), *list((folders / 'train' / 'cat').iterdir())[1:]]:
        path.unlink()
    main(tiniest(folders, '--epochs', '1', '--batch-size', '2'))
    out = capsys.readouterr().out
    assert out.count('Pictures of each class for training/evaluation: cat 1/4, dog 8/0\n') == 1
    assert 'Warning: fewer than 10 pictures for training in 2 of 2 classes: cat 1, dog 8\n' in out
    assert 'Warning: fewer than 10 pictures for evaluation in 2 of 2 classes: cat 4, dog 0\n' in out


def test_long_pictures_are_counted(folders, capsys):
    """A line at the start of training counts the pictures with sides of 2 : 1 or more; evaluation alone has no line."""
    for name, size in (('train/cat/0', (64, 32)), ('train/dog/1', (30, 90)), ('val/dog/0', (63, 32))):
        write_image(folders / f'{name}.png', size=size)
    build_datasets(parse_args(tiniest(folders)))
    out = capsys.readouterr().out
    assert '2 of 24 probed pictures (such as ' in out
    assert 'train/cat/0.png, 64 x 32 pixels) are at least 2 times as long as wide: evaluation uses the central' in out
    main(tiniest(folders, '--eval'))
    assert 'as long as wide' not in capsys.readouterr().out


# ----- small pictures of different sizes

@pytest.mark.parametrize(('sizes', 'resizes'), [
    ([(32, 32)], False), ([(28, 28)], False), ([(32, 32), (28, 28)], True), ([(60, 40), (50, 90)], True),
    ([(64, 64)], True)], ids=str)
def test_small_inputs_of_own_pictures(tmp_path, sizes, resizes):
    """At 32 pixels, small pictures of one size are padded and cropped as CIFAR's are; all others are resized."""
    for split in ('train', 'val'):
        for i, size in enumerate(sizes * 2):
            for name in ('cat', 'dog'):
                write_image(tmp_path / split / name / f'{i}.png', size=size)
    source = Source('FOLDER', str(tmp_path))
    dataset, _ = datasets.load(source, is_train=True)
    assert datasets.decide_resize(source, dataset, View(32)).resize is resizes
    assert datasets.decide_resize(source, dataset, View(32, resize=True)).resize
    assert not datasets.decide_resize(source, dataset, View(32, resize=False)).resize


@pytest.mark.parametrize(('resize', 'train_step', 'eval_step'), [
    ('--resize', 'RandomResizedCropAndInterpolation', 'Resize'), ('--no-resize', 'RandomCrop', 'ToNormalizedTensor')])
def test_both_transforms_resize_or_neither(folders, resize, train_step, eval_step):
    """--resize reaches the transforms of training and evaluation."""
    train, evaluated, _ = build_datasets(parse_args(tiniest(folders, resize)))
    assert type(train.transform.transforms[0]).__name__ == train_step
    assert type(evaluated.transform.transforms[0]).__name__ == eval_step
