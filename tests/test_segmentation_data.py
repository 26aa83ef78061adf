"""Data sets with label pictures in their layouts on disk, programs of segmentation, and their refusals."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dense import backbone
from run.settings import Loading
from segmentation import data, evaluate, labels, models, patches, predict
from segmentation.data import ADE, MASKS, SAMPLE, Drawn, Source
from segmentation.main import main
from segmentation.predictor import Predictor
from segmentation.transforms import EvalTransform
from utils import InputError, RunStopped

NANO = 'sem_fpn_xcit_nano_12_p16'
TINY = ['--device', 'cpu', '--num-workers', '0', '--short', '48', '--long', '96']


def write_pairs(images: Path, masks: Path, count: int, *, first: int = 1):
    """Write pictures with label pictures of the numbers 0 (few), `first` and `first + 1`."""
    for folder in (images, masks):
        folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        numbers = np.full((40, 60), first, dtype=np.uint8)
        numbers[:, 30:], numbers[0, 0] = first + 1, 0
        Image.fromarray(np.repeat(numbers[..., None] * 80 + i, 3, axis=2)).save(images / f'{i} é.png')
        Image.fromarray(numbers).save(masks / f'{i} é.png')


@pytest.fixture
def mine(tmp_path) -> Path:
    """Five pictures of 60 x 40 pixels in images/ and masks/."""
    write_pairs(tmp_path / 'mine' / 'images', tmp_path / 'mine' / 'masks', 5)
    return tmp_path / 'mine'


def test_masks_are_divided(mine, capsys):
    """Without val/, a fifth of the pictures is held out; the log names the division and the numbers."""
    train, val = data.build(Source(MASKS, str(mine)))
    assert (len(train), len(val)) == (4, 1)
    assert train.classes == ['1', '2']
    picture, classes = train[0]
    assert picture.shape == (40, 60, 3)
    assert np.unique(classes).tolist() == [0, 1, 255]
    out = capsys.readouterr().out
    assert '1 of 5 pictures are held out' in out
    assert '0 covers 0.0 % of the pixels, so 0 is no class' in out


def test_masks_with_val(tmp_path):
    """images/train and images/val are used; names may come from a file."""
    for part, count in (('train', 3), ('val', 2)):
        write_pairs(tmp_path / 'images' / part, tmp_path / 'masks' / part, count, first=0)
    (tmp_path / 'names.txt').write_text('sky\nsea\n')
    train, val = data.build(Source(MASKS, str(tmp_path), classes=str(tmp_path / 'names.txt')))
    assert (len(train), len(val), train.classes) == (3, 2, ['sky', 'sea'])


def test_ade_layout(tmp_path):
    """ADE20k's folders are read; 0 is no class; objectInfo150.txt names the classes."""
    for part, count in (('training', 2), ('validation', 1)):
        write_pairs(tmp_path / 'images' / part, tmp_path / 'annotations' / part, count)
    (tmp_path / 'objectInfo150.txt').write_text('Idx\tName\n1\twall\n2\tbuilding, edifice\n')
    train, val = data.build(Source(ADE, str(tmp_path)))
    assert (len(train), len(val), val.classes) == (2, 1, ['wall', 'building'])


@pytest.mark.parametrize(('spoil', 'message'), [
    (lambda folder: Image.new('RGB', (60, 40)).save(folder / 'masks' / '0 é.png'), r'0 é\.png: a label picture has'),
    (lambda folder: (folder / 'masks' / '0 é.png').unlink(), r'masks: no label picture for 1 of 5 pictures: 0 é'),
    (lambda folder: shutil.rmtree(folder / 'images'), r'no folder .*images'),
    (lambda folder: Image.fromarray(np.full((40, 60), 9, np.uint8)).save(folder / 'masks' / '0 é.png'),
     r'0 é\.png: contains the label 9; allowed are 1 to 2 for 2 classes')])
def test_bad_masks_are_named(mine, spoil, message):
    """A label picture with colours, a missing one, missing pictures, and a number above the classes are refused."""
    spoil(mine)
    with pytest.raises(InputError, match=message):
        data.build(Source(MASKS, str(mine), num_classes=2, zero_is_a_class=False))


def test_other_size_is_named(mine):
    """A label picture of another size than its picture is refused with both sizes."""
    Image.new('L', (10, 20), 1).save(mine / 'masks' / '0 é.png')
    with pytest.raises(InputError, match=r'0 é\.png: has 10 x 20 pixels, but its picture .* has 60 x 40'):
        data.build(Source(MASKS, str(mine)))


@pytest.mark.parametrize('turned', [True, False])
def test_exif_of_picture_and_labels(tmp_path, turned):
    """Labels belong to the picture turned by EXIF, or, if only its stored size fits, to the stored picture."""
    pixels = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(4, 6, 3)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels).save(tmp_path / 'x.png', exif=exif)
    Image.new('L', (4, 6) if turned else (6, 4), 1).save(tmp_path / 'y.png')
    dataset = data.LabelledPictures([(tmp_path / 'x.png', tmp_path / 'y.png')], ['a'], labels.numbering(1))
    picture, classes = dataset[0]
    assert picture.shape[:2] == classes.shape
    assert np.array_equal(picture, np.rot90(pixels, -1) if turned else pixels)


def test_own_pictures_from_training_to_metrics(mine, tmp_path, capsys):
    """A model is trained, evaluated with its classes, and predicts label pictures with the files' numbers."""
    run, out = tmp_path / 'run', tmp_path / 'labels'
    main([*TINY, '--data-set', MASKS, '--data-path', str(mine), '--model', NANO, '--crop-size', '48', '--iterations',
          '2', '--every', '2', '--batch-size', '2', '--output-dir', str(run)])
    assert {'best_model.pth', 'split.json', 'report'} <= {path.name for path in run.iterdir()}
    assert (run / 'report' / 'report.html').is_file()
    weights = ['--weights', str(run / 'best_model.pth')]
    stats = main([*TINY, '--eval', *weights, '--data-set', MASKS, '--data-path', str(mine)])
    assert stats['pictures'] == 5
    (tmp_path / 'broken.png').write_bytes(b'x')
    with pytest.raises(RunStopped, match=r'broken\.png'):
        predict.main([str(mine / 'images'), str(tmp_path / 'broken.png'), *weights, '--out', str(out), '--overlay',
                      str(tmp_path / 'drawn'), '--short', '48', '--long', '96', '--device', 'cpu'])
    assert {int(value) for path in out.iterdir() for value in np.unique(labels.read(str(path)))} <= {1, 2}
    assert len(list((tmp_path / 'drawn').iterdir())) == len(list(out.iterdir())) == 5
    measured = evaluate.main(['--predictions', str(out), '--annotations', str(mine / 'masks'), '--num-classes', '2',
                              '--json', str(tmp_path / 'metrics.json')])
    for name in ('mIoU', 'mAcc', 'aAcc'):
        assert measured[name] == pytest.approx(stats[name], rel=1e-9)
    assert json.loads((tmp_path / 'metrics.json').read_text())['mIoU'] == measured['mIoU']


def test_nearest_patches():
    """A patch's nearest neighbour among all patches is the patch itself, with its class."""
    torch.manual_seed(0)
    model, transform = backbone.build('xcit_nano_12_p16', pyramid=False).eval(), EvalTransform(short=160)
    dataset = Drawn(2, seed=0)
    bank, classes = patches.collect(model, dataset, transform, Loading(1, torch.device('cpu'), num_workers=0),
                                    most=1000)
    assert len(bank) > 150
    network = patches.PatchNeighbours(model, bank, classes, k=1, num_classes=12, name='knn').eval()
    picture, truth = dataset[0]
    predicted = Predictor(network, transform)(picture).numpy()
    assert (predicted == truth)[truth != 255].mean() > .85


@pytest.mark.parametrize(('words', 'message'), [
    (['--data-set', MASKS], '--data-path: needed for --data-set MASKS'),
    (['--data-set', SAMPLE, '--num-classes', '3'], '--num-classes: has no effect with --data-set SAMPLE'),
    (['--data-set', SAMPLE, '--eval'], '--eval: needs --weights'),
    (['--data-set', SAMPLE, '--weights', 'x.pth'], '--weights: only works with --eval'),
    (['--data-set', SAMPLE, '--freeze-backbone'], '--freeze-backbone: needs trained weights'),
    (['--data-set', SAMPLE, '--model', 'linear_xcit_nano_12_p16'], 'so add --freeze-backbone'),
    (['--data-set', SAMPLE, '--model', 'resnet50'], '--model resnet50: no such model'),
    (['--data-set', SAMPLE, '--model', 'upernet_xcit_nano_12_p16', '--batch-size', '1'], '--batch-size 1: UPerNet'),
    (['--data-set', SAMPLE, '--batch-size', '1', '--crop-size', '63'], '--crop-size 64'),
    (['--data-set', SAMPLE, '--knn', '5'], '--knn 5: needs --eval'),
    (['--data-set', SAMPLE, '--eval', '--weights', 'fb_ade20k'], '--weights fb_ade20k: needs --model')])
def test_refusals(words, message):
    """Flags that do not fit together are refused before any work."""
    with pytest.raises(InputError, match=message):
        main(['--device', 'cpu', *words])


def test_classifier_and_other_classes(tmp_path, capsys):
    """A classifier's file is refused by --weights, and begins a training; other classes get a new last layer."""
    torch.manual_seed(0)
    path = tmp_path / 'segmenter.pth'
    torch.save({'state_dict': models.build(NANO, num_classes=4).state_dict()}, path)
    flags = [*TINY, '--data-set', SAMPLE, '--iterations', '1', '--every', '1', '--batch-size', '2', '--crop-size', '32',
             '--no-report', '--pretrained', str(path)]
    main(flags)
    assert 'for 4 classes, not 12; all weights but the classifiers\' are loaded' in capsys.readouterr().out
