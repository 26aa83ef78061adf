"""Segmentation against the numbers of mmsegmentation, and its pieces: labels, transforms, rows, windows, metrics."""
import functools
import json

import dense_weights
import make_checkpoint
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REFERENCE
from PIL import Image

from dense import backbone, shapes
from dense.resize import ResizedRows, resize, rows_of, scaled_size
from dense.training import build_optimizer
from run.schedules import poly
from segmentation import data, labels, models, predictor, transforms
from segmentation.losses import IGNORED, segmentation_losses
from segmentation.metrics import Confusion
from segmentation.predictor import Predictor
from segmentation.rows import head_rows
from segmentation.transforms import EvalTransform, TrainTransform
from utils import InputError

DENSE = REFERENCE / 'dense'
FIXTURE = json.loads((DENSE / 'segmentation.json').read_text())
ARRAYS = np.load(DENSE / 'segmentation.npz')
NAMES = {name: name.replace('_tiny', '_xcit_tiny') for name in FIXTURE['models']}
NANO = 'sem_fpn_xcit_nano_12_p16'


@functools.cache
def chelsea() -> np.ndarray:
    return np.asarray(Image.open(DENSE / 'chelsea.png').convert('RGB'))


@functools.cache
def published(name: str) -> dict:
    return make_checkpoint.state_dict('segmentation', name)


@functools.cache
def reference_model(name: str) -> models.Segmenter:
    """Build a model in eval mode with the weights of the reference; not to be changed."""
    model = models.build(NAMES[name])
    models.load_weights(model, published(name))
    return model.eval()


def scene(case: dict) -> torch.Tensor:
    return torch.from_numpy(dense_weights.scene(tuple(case['input']['scene']), case['input']['seed']))


def assert_near(actual: torch.Tensor, key: str, bound: float, *grid: int):
    difference = np.abs(dense_weights.grid(actual.numpy(), *grid)[0] - ARRAYS[key]).max()
    assert difference < bound, key


# ----- numbers of the original

@pytest.mark.parametrize('name', NAMES)
def test_published_files_load(name):
    """The names and shapes of a model are those of the published file, whose name is found by them."""
    with torch.device('meta'):
        model = models.build(NAMES[name])
    keys = FIXTURE['models'][name]['keys']
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == keys
    assert models.name_in({key: torch.empty(shape, device='meta') for key, shape in keys.items()}) == NAMES[name]


@pytest.mark.parametrize(('name', 'case'), [
    (name, case) for name, model in FIXTURE['models'].items() for case in model['cases']])
@torch.no_grad()
def test_maps_logits_and_labels(name, case):
    """Pyramid, neck, logits and label maps are mmsegmentation's, of a scene and, by the test pipeline, of a photo."""
    model, wanted, key = reference_model(name), FIXTURE['models'][name]['cases'][case], f'{name}/{case}'
    image = (EvalTransform()(chelsea())[None] if 'photo' in wanted['input'] else scene(wanted))
    assert list(image.shape) == wanted['tensor_shape']
    maps = model.backbone(image)
    for i, level in enumerate(maps):
        assert_near(level, f'{key}/fpn_in{i}', 5e-5)
    if 'head_logits' not in wanted:
        return
    if 'neck' in wanted:
        for i, level in enumerate(model.neck(maps)):
            assert_near(level, f'{key}/neck{i}', 5e-5)
    logits, auxiliary = model(image, auxiliary=True)
    assert_near(logits, f'{key}/head_logits', 2e-4, 15, 8, 8)
    if 'aux_logits' in wanted:
        assert_near(auxiliary, f'{key}/aux_logits', 2e-4, 15, 8, 8)
    size = tuple(wanted['ori_shape'])
    resized = Predictor(model, EvalTransform()).rows(image[0], size)(0, size[0])
    assert_near(resized[None], f'{key}/logits', 2e-4, 15, 12, 12)
    assert (resized.argmax(0).numpy() != ARRAYS[f'{key}/argmax']).sum() <= 20


@pytest.mark.parametrize('name', FIXTURE['train']['models'])
def test_losses_and_gradients(name):
    """Losses of a batch with ignored pixels, and the norm of each gradient, are mmsegmentation's."""
    fixture = FIXTURE['train']
    model = models.build(NAMES[name], drop_path=0.)
    models.load_weights(model, published(name))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.
    images = torch.from_numpy(dense_weights.scene(tuple(fixture['scene']), fixture['scene_seed']))
    losses = segmentation_losses(*model.train()(images, auxiliary=True), torch.from_numpy(ARRAYS['train/labels']))
    wanted = fixture['models'][name]
    assert losses['loss_seg'].item() == pytest.approx(wanted['losses']['decode.loss_seg'], rel=1e-5)
    assert sum(losses.values()).item() == pytest.approx(wanted['total'], rel=1e-5)
    if 'gradient_norm' in wanted:
        sum(losses.values()).backward()
        for key, parameter in model.named_parameters():
            norm = wanted['gradient_norm'][key]
            assert float(parameter.grad.norm()) == pytest.approx(norm, rel=.01, abs=1e-6), key


def test_weight_decay_of_each_parameter():
    """The parameters with and without weight decay are the original's."""
    with torch.device('meta'):
        model = models.build('upernet_xcit_tiny_12_p16')
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, spared = build_optimizer(model, lr=1., weight_decay=.01).param_groups
    assert (decayed['weight_decay'], spared['weight_decay']) == (.01, 0)
    assert sorted(names[id(p)] for p in decayed['params']) == sorted(FIXTURE['optimizer']['decay'])
    assert sorted(names[id(p)] for p in spared['params']) == sorted(FIXTURE['optimizer']['no_decay'])


@pytest.mark.parametrize('schedule', FIXTURE['schedule'])
def test_learning_rates(schedule):
    """The learning rate of each iteration is mmcv's."""
    wanted = FIXTURE['schedule'][schedule]
    rates = poly(6e-5, 0., steps=wanted['total_iterations'], warmup_steps=1500, warmup_factor=1e-6)
    assert len(rates) == wanted['total_iterations']
    for iteration, rate in wanted['lr'].items():
        assert rates[int(iteration)] == pytest.approx(rate, rel=1e-9)


@pytest.mark.parametrize('case', FIXTURE['preprocess'])
def test_preprocessing(case):
    """Sizes and pixels of the test pipeline are those of OpenCV's resizing."""
    wanted = FIXTURE['preprocess'][case]
    picture = dense_weights.photo(chelsea(), **{key: tuple(value) for key, value in wanted['photo'].items()})
    image = EvalTransform()(picture)
    assert list(image.shape[1:]) == wanted['img_shape']
    np.testing.assert_allclose(dense_weights.grid(image.numpy(), 3, 16, 16), ARRAYS[f'preprocess/{case}'], atol=1e-5)


def test_opencv_rounding_at_borders():
    """Pixels are cv2.resize's; in the first and last rows, its arithmetic rounds the weights of rows outside."""
    picture = np.array([[254, 130, 238], [113, 145, 35], [197, 137, 223]], dtype=np.uint8)[..., None]
    assert resize(picture, (7, 4))[..., 0].tolist() == [
        [254, 176, 170, 238], [234, 170, 161, 209], [173, 151, 132, 122], [113, 133, 104, 35], [149, 144, 132, 115],
        [185, 156, 160, 196], [197, 159, 169, 223]]
    assert scaled_size((300, 451), 512, 2048) == (512, 770)


@pytest.mark.parametrize('stored', ['truth', 'truth_as_stored'])
def test_metrics(stored):
    """mIoU, mAcc and aAcc are mmsegmentation's, with absent and with only predicted classes."""
    wanted, numbering = FIXTURE['metrics'], labels.numbering(6, zero_is_a_class=stored == 'truth')
    confusion = Confusion(6)
    for predicted, truth in zip(ARRAYS['metrics/prediction'], ARRAYS[f'metrics/{stored}']):
        classes = numbering.to_classes(truth.astype(np.int32), 'truth')
        confusion.add(torch.from_numpy(predicted), torch.from_numpy(classes))
    for name, value in confusion.metrics().items():
        assert value == pytest.approx(100 * wanted[stored][name], rel=1e-6)
    expected = [iou and 100 * iou for iou in wanted[stored]['class_iou']]
    assert confusion.iou() == [iou if iou is None else pytest.approx(iou, rel=1e-6) for iou in expected]


# ----- metrics

def test_confusion_by_hand():
    """Classes that are absent do not count; a class that is only predicted has IoU 0; predictions of no class fail."""
    confusion = Confusion(4)
    confusion.add(torch.tensor([0, 1, IGNORED, 2, 0]), torch.tensor([0, 0, 0, IGNORED, 0]))
    assert confusion.iou() == [50., 0., None, None]
    assert confusion.accuracy() == [50., None, None, None]
    assert confusion.metrics() == {'mIoU': 25., 'mAcc': 50., 'aAcc': 50.}


# ----- rows and windows

@pytest.mark.parametrize('size', [(37, 50), (9, 13), (64, 20), (16, 24)])
def test_resized_rows(size):
    """Bands of rows equal the whole bitwise, and F.interpolate up to rounding."""
    x = torch.randn(3, 16, 24)
    rows = ResizedRows(rows_of(x), (16, 24), size)
    whole = rows(0, size[0])
    expected = F.interpolate(x[None], size=size, mode='bilinear', align_corners=False)[0]
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-5)
    for band in (1, 5):
        bands = [rows(start, min(start + band, size[0])) for start in range(0, size[0], band)]
        assert torch.equal(torch.cat(bands, dim=1), whole)


@pytest.mark.parametrize('head', ['sem_fpn', 'upernet'])
@pytest.mark.parametrize('patch_size', [16, 8])
@torch.no_grad()
def test_head_by_rows(head, patch_size):
    """Rows of logits, the finest level being computed by rows, equal those of the model at odd sizes."""
    model = models.build(f'{head}_xcit_nano_12_p{patch_size}', num_classes=7).eval()
    image = torch.randn(1, 3, 90, 75)
    expected = model(image)[0]
    rows, size = head_rows(model, image)
    assert size == tuple(expected.shape[-2:])
    for band in (1, 9, size[0]):
        bands = [rows(start, min(start + band, size[0])) for start in range(0, size[0], band)]
        torch.testing.assert_close(torch.cat(bands, dim=1), expected, rtol=0, atol=1e-5)


class PixelModel(torch.nn.Module):
    """Model whose logits are a function of each 4 x 4 pixels alone."""
    num_classes = 3

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 3, 4, stride=4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images)


def test_one_window_is_the_whole():
    """--test slide equals whole if one window covers the picture; both end at the border."""
    torch.manual_seed(0)
    model, picture = PixelModel(), chelsea()[:200, :260]
    whole, slide = (Predictor(model, EvalTransform(short=200), slide=slide)(picture) for slide in (False, True))
    assert torch.equal(whole, slide)
    assert predictor.window_starts(512) == [0]
    assert predictor.window_starts(513) == [0, 1]
    assert predictor.window_starts(1000) == [0, 341, 488]


def test_windows_are_averaged():
    """Logits of overlapping windows are averaged; rows do not depend on the band."""
    torch.manual_seed(0)
    model, image = PixelModel(), torch.randn(1, 3, 700, 600)

    def logits(window: torch.Tensor) -> torch.Tensor:
        return model(window)[0]

    with torch.no_grad():
        whole = predictor.Windows(logits, image)(0, 700)
        windows = predictor.Windows(logits, image)
        bands = torch.cat([windows(start, min(start + 90, 700)) for start in range(0, 700, 90)], dim=1)
    assert torch.equal(bands, whole)
    sums, counts = torch.zeros(3, 700, 600), torch.zeros(700, 600)
    for top in predictor.window_starts(700):
        for left in predictor.window_starts(600):
            place = (..., slice(top, top + 512), slice(left, left + 512))
            sums[place] += F.interpolate(model(image[place]), size=(512, 512), mode='bilinear')[0].detach()
            counts[place[1:]] += 1
    torch.testing.assert_close(whole, sums / counts, rtol=0, atol=1e-5)


def test_augmented_prediction():
    """--aug-test averages the probabilities of six scales and their mirror images."""
    torch.manual_seed(0)
    model, picture = PixelModel(), chelsea()[:64, :80]
    classes = Predictor(model, EvalTransform(short=64, longest=256), augmented=True)(picture)
    total = 0
    for ratio in predictor.AUG_RATIOS:
        image = EvalTransform(short=64, longest=256)(picture, ratio=ratio)[None]
        for flips in ((), (-1,)):
            logits = F.interpolate(model(image.flip(flips)), size=image.shape[-2:], mode='bilinear')
            total += F.interpolate(logits, size=(64, 80), mode='bilinear').softmax(1).flip(flips)
    assert (classes != total.argmax(1)[0]).sum() <= 5


# ----- labels

@pytest.mark.parametrize(('zero_is_a_class', 'numbers', 'classes'), [
    (False, [0, 1, 5, 255], [255, 0, 4, 255]), (True, [0, 1, 4, 255], [0, 1, 4, 255])])
def test_label_numbers(zero_is_a_class, numbers, classes):
    """Numbers of files become classes; 0 (unless a class) and 255 are ignored; larger numbers are named."""
    numbering = labels.numbering(5, zero_is_a_class=zero_is_a_class)
    assert numbering.to_classes(np.array(numbers), 'x.png').tolist() == classes
    assert numbering.to_numbers(np.arange(5)).tolist() == list(range(not zero_is_a_class, 5 + (not zero_is_a_class)))
    with pytest.raises(InputError, match=r'x\.png: contains the label 6; allowed are .* for 5 classes'):
        numbering.to_classes(np.array([6]), 'x.png')


@pytest.mark.parametrize(('counts', 'values', 'ignored'), [
    ({0: 9, 1: 5, 2: 3}, (0, 1, 2), (255,)), ({0: 1, 1: 50, 2: 3}, (1, 2), (0, 255)), ({1: 5, 2: 3}, (1, 2), (0, 255)),
    ({0: 1, 1: 50, 255: 3}, (0, 1), (255,)), ({0: 9, 255: 2}, (0, 255), ())])
def test_numbering_by_looking(counts, values, ignored):
    """Zero is a class if it is frequent, or if 255 is used for no class; masks of 0 and 255 have two classes."""
    found, reason = labels.numbering_of(counts, zero_is_a_class=None)
    assert (found.values, found.ignored) == (values, ignored)
    assert reason


@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'I;16', 'I'])
def test_label_modes(tmp_path, mode):
    """Label pictures of every mode with one number per pixel are read by their numbers."""
    numbers = np.array([[0, 1], [1, 0]], dtype=np.uint8)
    picture = Image.fromarray(numbers, 'P') if mode == 'P' else Image.fromarray(numbers * 255).convert('1') if (
        mode == '1') else Image.fromarray(numbers.astype({'L': np.uint8, 'I;16': np.uint16, 'I': np.int32}[mode]))
    if mode == 'P':
        picture.putpalette([9, 9, 9, 200, 0, 0])
    path = tmp_path / ('x.tif' if mode == 'I' else 'x.png')
    picture.save(path)
    assert labels.read(str(path)).tolist() == numbers.tolist()


@pytest.mark.parametrize(('content', 'message'), [
    ('RGB', r'has one number for each pixel, not the mode RGB'), (None, 'no such label picture'),
    (b'\x89PNG broken', "can't be decoded as a label picture")])
def test_bad_label_pictures(tmp_path, content, message):
    """A label picture with colours, a missing one, or a damaged one is named."""
    path = tmp_path / 'x.png'
    if content == 'RGB':
        Image.new('RGB', (2, 2)).save(path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        labels.read(str(path))
    assert str(path) in str(caught.value)


def test_saved_labels_have_the_numbers_of_files(tmp_path):
    """A written label picture contains the numbers of the training's files, with a colour for each class."""
    classes = np.array([[0, 2], [1, 1]], dtype=np.uint8)
    numbering = labels.numbering(3)
    labels.save(tmp_path / 'x.png', classes, numbering)
    assert labels.read(str(tmp_path / 'x.png')).tolist() == [[1, 3], [2, 2]]
    colors = np.asarray(Image.open(tmp_path / 'x.png').convert('RGB'))
    assert np.array_equal(colors, labels.palette(3)[classes])
    assert len(np.unique(labels.palette(150), axis=0)) == 150


# ----- training pictures

def test_crops_without_a_dominant_class():
    """A crop is drawn again, up to ten times, if one class covers three quarters of its pixels with a class."""
    field = np.zeros((64, 64), dtype=np.uint8)
    field[:, 40:] = 1
    np.random.seed(0)
    shares = [np.mean(field[transforms.random_crop(field, 16)] == 0) for _ in range(50)]
    assert np.mean([.25 < share < .75 for share in shares]) > .6  # a single try: a fifth
    field[:] = IGNORED  # no class at all: the last try counts
    assert field[transforms.random_crop(field, 16)].shape == (16, 16)


def test_training_transform():
    """Crops are padded with 0 and IGNORED; equal seeds give equal crops."""
    transform, picture = TrainTransform(96, short=64, longest=256), chelsea()
    field = np.repeat(np.arange(picture.shape[0]) // 100, picture.shape[1]).reshape(picture.shape[:2]).astype(np.uint8)
    results = []
    for _ in range(2):
        np.random.seed(5)
        results.append(transform(picture, field))
    (image, classes), (again, _) = results
    assert torch.equal(image, again)
    assert image.shape == (3, 96, 96)
    assert set(classes.unique().tolist()) == {0, 1, 2, IGNORED}
    assert (image[:, classes == IGNORED] == 0).all()


def test_colours_stay_within_their_ranges():
    """Brightness changes by at most 32 levels; hue of a grey picture changes nothing; each distortion is drawn."""
    np.random.seed(0)
    grey = np.full((2, 2, 3), 100, dtype=np.uint8)
    means = [transforms.distort(grey).mean() for _ in range(400)]
    assert 34 <= min(means) < 55
    assert 175 < max(means) <= 198
    assert transforms.turn_hue(grey).tolist() == grey.tolist()
    red = np.tile(np.array([200, 10, 10], dtype=np.uint8), (2, 2, 1))
    assert len({tuple(transforms.turn_hue(red)[0, 0]) for _ in range(60)}) > 20


def test_batch_of_ignored_pixels_trains():
    """A batch without labelled pixels has the loss 0, and a finite gradient for every parameter."""
    model = models.build('upernet_xcit_nano_12_p16', num_classes=3)
    losses = segmentation_losses(*model(torch.randn(2, 3, 64, 64), auxiliary=True), torch.full((2, 64, 64), IGNORED))
    sum(losses.values()).backward()
    assert sum(losses.values()).item() == 0
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


# ----- models

def test_other_weights_are_refused():
    """Weights of another head, patch size, number of classes or task are named in one line."""
    def refused(name: str, state: dict) -> str:
        with torch.device('meta'):
            model = models.build(name, num_classes=150)
        with pytest.raises(InputError) as caught:
            models.load_weights(model, state)
        return str(caught.value)

    with torch.device('meta'):
        state = models.build(NANO, num_classes=150).state_dict()
        fewer = models.build(NANO, num_classes=4).state_dict()
    assert f'weights of {NANO}, not of upernet_xcit_nano_12_p16' in refused('upernet_xcit_nano_12_p16', state)
    assert f'weights of {NANO}, not of sem_fpn_xcit_nano_12_p8' in refused('sem_fpn_xcit_nano_12_p8', state)
    assert 'weights for 4 classes, not 150' in refused(NANO, fewer)
    plain = {key.removeprefix('backbone.'): value for key, value in state.items() if key.startswith('backbone.')}
    assert 'a classifier or a backbone' in refused(NANO, plain)
    assert 'such as a detector' in refused(NANO, {'roi_head.bbox_head.fc_cls.weight': torch.zeros(2, 2)})


def test_unknown_model():
    """A wrong name is refused with similar names."""
    with pytest.raises(InputError, match=r'no such model.*sem_fpn_xcit_nano_12_p16'):
        backbone.parse('sem_fpn_xcit_nano_12_p61', models.HEADS)


def test_drawn_scenes():
    """Drawn pictures depend on number and seed alone, and contain all classes and unlabelled edges."""
    scenes = [shapes.draw(i, seed=0) for i in range(60)]
    assert np.array_equal(scenes[7].picture, shapes.draw(7, seed=0).picture)
    assert not np.array_equal(scenes[7].picture, shapes.draw(7, seed=1).picture)
    numbers = np.unique(np.concatenate([scene.labels().ravel() for scene in scenes]))
    assert numbers.tolist() == list(range(len(shapes.CLASSES) + 1))
    train, val = data.build(data.Source(data.SAMPLE, ''))
    assert not np.array_equal(train[0][0], val[0][0])
