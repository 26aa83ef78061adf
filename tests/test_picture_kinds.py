"""Kinds of pictures that are reported: channels, depth, pages, too many pixels, and files that can't be read."""
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import small_dino
from conftest import ROOT, tiniest, write_folders, write_image
from PIL import Image, features
from tiffs import write_tiff

import main
from dino import knn
from loaders import pictures, workers
from run.settings import MostPixels
from tools import extract_features, predict, report, visualize_attention, visualize_features
from utils import InputError, RunStopped, UnreadableImage


def pixels(channels: int, dtype=np.uint8, most: int = 256) -> np.ndarray:
    """Return values below `most`, of which the largest occurs: (6, 5, channels)."""
    return (np.arange(30 * channels).reshape(6, 5, channels)[::-1, ::-1] % most * (most // 30) % most).astype(dtype)


def twelve_bits(channels: int) -> np.ndarray:
    return np.linspace(0, 4095, 30 * channels).astype(np.uint16).reshape(6, 5, channels)


def lines_of(path: Path, capsys) -> list:
    """Return what is logged of a picture."""
    pictures.log_peculiarities([str(path)])
    return capsys.readouterr().out.splitlines()


# ----- channels

@pytest.mark.parametrize(('channels', 'photometric', 'used'), [
    (2, 1, 'the first is used as grey'), (4, 2, 'the first 3 are used as red, green and blue'),
    (5, 2, 'the first 3 are used as red, green and blue'), (5, 5, 'the first 4 are used as CMYK')])
def test_channels_are_counted(tmp_path, capsys, channels, photometric, used):
    """A line has the number of channels, the used ones, and a way to use others."""
    array = pixels(channels)
    write_tiff(tmp_path / 'x.tif', array, photometric=photometric)
    line, = lines_of(tmp_path / 'x.tif', capsys)
    assert f'x.tif) have channels that are ignored: this one has {channels}, of which {used}. To use others' in line
    assert 'gdal_translate -b' in line
    if photometric == 2:
        assert (np.asarray(pictures.load_rgb(tmp_path / 'x.tif')) == array[..., :3]).all()


def test_transparent_tiff(tmp_path, capsys):
    """A last channel that the file declares as transparency is named as ignored."""
    write_tiff(tmp_path / 'x.tif', pixels(4), extra=[2])
    line, = lines_of(tmp_path / 'x.tif', capsys)
    assert 'are transparent: ' in line
    assert line.endswith('This one has 4 channels, of which the last is ignored')


def test_plain_pictures_are_not_reported(tmp_path, capsys):
    """Plain grey and RGB pictures have no line."""
    write_tiff(tmp_path / 'x.tif', pixels(3))
    write_tiff(tmp_path / 'y.tif', pixels(1), photometric=1)
    write_image(tmp_path / 'z.jpg')
    pictures.log_peculiarities(sorted(tmp_path.iterdir()))
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize(('array', 'options', 'description'), [
    (pixels(13), {}, '13 channels with 8 bits, '), (pixels(13, np.uint16), {}, '13 channels with 16 bits, '),
    (pixels(4), {'photometric': 1}, '4 channels with 8 bits, '),
    (pixels(5, np.uint16), {}, '5 channels with 16 bits, '),
    (pixels(2, np.uint16), {'photometric': 1}, '2 channels with 16 bits, '),
    (pixels(3, np.float32), {}, r'3 channels with 32 bits \(floats\), '),
    (pixels(4), {'planes': True}, '4 channels with 8 bits in separate planes, '),
    (pixels(3, np.uint16), {'planes': True}, '3 channels with 16 bits in separate planes, '),
    (pixels(3), {'compression': 34712}, '3 channels with 8 bits and compression 34712, ')], ids=str)
@pytest.mark.parametrize('order', ['<', '>'])
def test_unreadable_tiffs_are_named(tmp_path, caplog, array, options, description, order):
    """The only line about a TIFF that Pillow can't read, or reads wrongly, describes the TIFF, with a remedy."""
    write_tiff(tmp_path / 'x.tif', array, order=order, **options)
    pictures.log_peculiarities([tmp_path / 'x.tif'])
    with pytest.raises(UnreadableImage, match=f'x.tif: a TIFF of {description}which Pillow can\'t read: .* gdal'):
        pictures.load_rgb(tmp_path / 'x.tif')
    assert caplog.records == []  # Pillow's own line has no name


@pytest.mark.parametrize(('content', 'description'), [
    (b'', 'an empty file'), (b'\n<!DOCTYPE html>', 'a web page'), (b'%PDF-1.4', 'a PDF'),
    (b'\0\0\0\x18ftypheic\0\0\0\0', 'a HEIC picture, which needs pip install pillow-heif'),
    (b'version https://git-lfs.github.com/spec/v1', 'a Git-LFS pointer; git lfs pull downloads the file'),
    (b'junk', 'damaged, or not a picture that Pillow reads'),
    (b'II*\0\xff\0\0\0', 'damaged, or not a picture that Pillow reads')], ids=lambda value: repr(value)[:20])
def test_files_are_named_for_what_they_are(tmp_path, content, description):
    """The error about a file that is no picture names its kind."""
    (tmp_path / 'x.jpg').write_bytes(content)
    with pytest.raises(UnreadableImage, match=f'unreadable image {tmp_path}/x.jpg: {description}$'):
        pictures.load_rgb(tmp_path / 'x.jpg')


# ----- depth

def write_png(path: Path, array: np.ndarray):
    """Write 16 bits per channel, which Pillow can't write."""
    height, width, channels = array.shape
    header = struct.pack('>IIBBBBB', width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in array)
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))
        for name, body in ((b'IHDR', header), (b'IDAT', zlib.compress(rows)), (b'IEND', b''))))


def write_ppm(path: Path, array: np.ndarray, *, maximum: int = 65535):
    path.write_bytes(b'P6 5 6 %d\n' % maximum + array.astype('>u2').tobytes())


def write_sgi(path: Path, array: np.ndarray):
    header = struct.pack('>hBBHHHHll', 474, 0, 2, 3, 5, 6, 3, 0, 65535).ljust(512, b'\0')
    path.write_bytes(header + np.moveaxis(array, 2, 0).astype('>u2').tobytes())


def opaque(array: np.ndarray) -> np.ndarray:
    return np.concatenate([array, np.full_like(array[..., :1], 65535)], axis=2)


@pytest.mark.parametrize(('name', 'write', 'array'), [
    ('x.tif', write_tiff, twelve_bits(3)), ('x.sgi', write_sgi, twelve_bits(3)),
    ('big-endian.tif', lambda *file: write_tiff(*file, order='>'), twelve_bits(3)),
    ('alpha.tif', lambda *file: write_tiff(*file, extra=[2]), opaque(twelve_bits(3))),
    ('four.tif', write_tiff, twelve_bits(4)), ('48.png', write_png, twelve_bits(3)),
    ('64.png', write_png, opaque(twelve_bits(3))), ('32.png', write_png, opaque(twelve_bits(1))),
    ('x.ppm', write_ppm, twelve_bits(3)),
    ('grey.tif', lambda *file: write_tiff(*file, photometric=1), twelve_bits(1)),
    ('grey.png', lambda path, array: Image.fromarray(array[..., 0]).save(path), twelve_bits(1))])
def test_depth_of_any_container(tmp_path, capsys, name, write, array):
    """Pictures of 16 bits are reported, with the factor for 12 bits; transparency does not count as brightness."""
    write(tmp_path / name, array)
    line = lines_of(tmp_path / name, capsys)[0]
    assert f'(such as {tmp_path}/{name}) are 16-bit: values from 0 to 65535 are scaled to 0 to 255' in line
    assert 'the pictures will be dark. If the values have 12 bits, multiply the values by 16' in line
    assert np.asarray(pictures.load_rgb(tmp_path / name)).max() in (15, 16)
    write(tmp_path / name, np.minimum(array, 4095) * 16)
    assert 'dark' not in lines_of(tmp_path / name, capsys)[0]


def test_declared_maximum_of_ppm(tmp_path, capsys):
    """A PPM file that declares 12 bits uses the whole range, and has no line."""
    write_ppm(tmp_path / 'x.ppm', twelve_bits(3), maximum=4095)
    assert lines_of(tmp_path / 'x.ppm', capsys) == []
    assert np.asarray(pictures.load_rgb(tmp_path / 'x.ppm')).max() == 255


# ----- pages

@pytest.mark.parametrize('name', ['x.gif', 'x.webp', 'x.png', 'x.tif'])
def test_pages_are_counted(tmp_path, capsys, name):
    """A line has the number of pages or frames, and a way to split them."""
    if name == 'x.webp' and not features.check('webp'):
        pytest.skip('Pillow without WebP')
    first, *others = (Image.fromarray(np.roll(pixels(3), i)) for i in range(3))
    first.save(tmp_path / name, save_all=True, append_images=others)
    line, = lines_of(tmp_path / name, capsys)
    assert 'have several pages or frames: this one has 3, of which the first is used. To use all, write each' in line


def test_reduced_pages_do_not_count(tmp_path, capsys):
    """Smaller versions of a picture in its TIFF, and gain maps of telephones, are no further pages."""
    write_tiff(tmp_path / 'x.tif', pixels(3), pixels(3), reduced=[1])
    Image.fromarray(pixels(3)).save(tmp_path / 'x.mpo', save_all=True, append_images=[Image.fromarray(pixels(3))])
    assert Image.open(tmp_path / 'x.mpo').n_frames == 2
    pictures.log_peculiarities(sorted(tmp_path.iterdir()))
    assert capsys.readouterr().out == ''


def test_picture_behind_its_thumbnail(tmp_path, capsys):
    """A smaller version or a mask at the beginning of a TIFF is skipped."""
    large = np.repeat(np.repeat(pixels(3), 10, axis=0), 10, axis=1)
    write_tiff(tmp_path / 'x.tif', pixels(3), large, reduced=[0])
    assert np.array_equal(np.asarray(pictures.load_rgb(tmp_path / 'x.tif')), large)
    pictures.log_peculiarities([tmp_path / 'x.tif'])
    assert capsys.readouterr().out == ''
    assert pictures.header(tmp_path / 'x.tif')[1] == (60, 50)


# ----- number of pixels

@pytest.fixture
def limit(monkeypatch):
    """Restore the limits after a test."""
    monkeypatch.setattr(MostPixels, 'value', MostPixels.value)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', Image.MAX_IMAGE_PIXELS)


@pytest.mark.parametrize(('most', 'is_read'), [(30, True), (29, False)])
def test_limit_of_pixels(tmp_path, limit, most, is_read):
    """A picture of as many pixels as the limit is read, without a warning; a larger one is named with its pixels."""
    write_tiff(tmp_path / 'x.tif', pixels(3))
    MostPixels.value = most
    with warnings.catch_warnings(record=True) as caught:
        if is_read:
            assert pictures.load_rgb(tmp_path / 'x.tif').size == (5, 6)
        else:
            with pytest.raises(UnreadableImage, match=r'/x\.tif: 30 pixels, more than --max-pixels 29 allows$'):
                pictures.load_rgb(tmp_path / 'x.tif')
    assert caught == []


def test_default_limit(tmp_path, limit):
    """A gigapixel is allowed by default, where Pillow would refuse 179 million pixels."""
    main.parse_args(['--device', 'cpu', '--data-set', 'SAMPLE'])
    (tmp_path / 'x.ppm').write_bytes(b'P6 40000 40000 255 ')
    with pytest.raises(UnreadableImage, match=r'1600000000 pixels, more than --max-pixels 1000000000 allows$'):
        pictures.load_rgb(tmp_path / 'x.ppm')
    (tmp_path / 'x.ppm').write_bytes(b'P6 20000 10000 255 ')
    assert pictures.header(tmp_path / 'x.ppm') == ({}, (10000, 20000))


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('run')
    data = write_folders(folder / 'data', per_class=2)
    main.main(tiniest(data, '--epochs', '1', '--output-dir', str(folder / 'run')))
    return folder


@pytest.mark.parametrize('program', [predict, extract_features, visualize_attention, visualize_features, report, knn,
                                     main, small_dino], ids=lambda module: module.__name__)
def test_every_program_has_the_limit(tmp_path, trained, limit, capsys, program):
    """Every program that reads pictures has --max-pixels, in loading workers too, and names picture and limit."""
    data, run = trained / 'data', trained / 'run'
    of_tools = ['--device', 'cpu', '--pretrained', str(run / 'checkpoint.pth')]
    argv = {
        predict: [str(data), *of_tools, '--num-workers', '1'],
        extract_features: [str(data), *of_tools, '--output', str(tmp_path / 'x.npz'), '--num-workers', '0'],
        visualize_attention: [str(data), *of_tools, '--output-dir', str(tmp_path)],
        visualize_features: [str(data), *of_tools, '--output-dir', str(tmp_path)],
        report: [str(run), '--data-path', str(data), '--device', 'cpu'],
        knn: [*of_tools, '--data-set', 'FOLDER', '--data-path', str(data)], main: tiniest(data),
        small_dino: ['--arch', 'xcit_test', '--patch-size', '16', '--data-path', str(data), '--device', 'cpu',
                     '--output-dir', str(tmp_path)]}[program]
    with pytest.raises((InputError, RunStopped), match=r'0\.png: 1024 pixels, more than --max-pixels 1023 allows'):
        program.main([*argv, '--max-pixels', '1023'])


def test_limit_in_loading_workers(monkeypatch, limit):
    """A new worker process receives the limit of the main process."""
    monkeypatch.setattr(workers.signals, 'WorkerSignals', lambda: lambda worker_id: None)
    MostPixels.value = 7
    start = workers.WorkerStart()
    MostPixels.value = MostPixels.DEFAULT
    start(0)
    assert MostPixels.value == 7


@pytest.mark.slow
def test_limit_in_spawned_workers(tmp_path):
    """The limit reaches workers that are not forked."""
    write_image(tmp_path / 'x.png')
    code = ('if __name__ == "__main__":\n'
            ' import multiprocessing, sys; multiprocessing.set_start_method("spawn")\n'
            ' from tools import predict; from inference import pictures\n'
            ' from run.settings import MostPixels; MostPixels.value = 7\n'
            ' from loaders.workers import Loader\n'
            ' files = pictures.ImageFiles([sys.argv[1]], None)\n'
            ' print(next(iter(Loader(files, num_workers=1, collate_fn=list, batch_size=1)))[0][0])\n')
    (tmp_path / 'code.py').write_text(code)
    done = subprocess.run([sys.executable, tmp_path / 'code.py', tmp_path / 'x.png'], capture_output=True, text=True,
                          env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.stdout.endswith('x.png: 1024 pixels, more than --max-pixels 7 allows\n'), done.stderr
