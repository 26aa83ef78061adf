"""Programs around a model in a row, from a checkpoint of a run on SAMPLE and with pictures of SAMPLE."""
import numpy as np
import onnxruntime
import pytest
import timm
import torch
from conftest import TINY
from PIL import Image

import datasets
from loaders.pictures import load_rgb
from loaders.transforms import View
from main import main as train
from tools.convert_checkpoint import main as convert
from tools.export import main as export
from tools.extract_features import main as extract
from tools.predict import main as predict
from tools.visualize_attention import main as visualize

COUNT = 60  # pictures


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """Real pictures: some of SAMPLE's evaluation images, as files in class folders."""
    root = tmp_path_factory.mktemp('pictures')
    dataset = datasets.FashionMNIST(datasets.SAMPLE_DATA, train=False)
    for i in range(COUNT):
        folder = root / dataset.classes[dataset.labels[i]].replace('/', '-')
        folder.mkdir(exist_ok=True)
        Image.fromarray(dataset.images[i]).save(folder / f'{i}.png')
    return root


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """An epoch of a nano model on SAMPLE."""
    run = tmp_path_factory.mktemp('run')
    stats = train([*TINY, '--data-set', 'SAMPLE', '--epochs', '1', '--batch-size', '64', '--lr', '6e-3', '--aa', 'none',
                   '--mixup', '0', '--cutmix', '0', '--reprob', '0', '--no-repeated-aug', '--no-model-ema',
                   '--output-dir', str(run)])
    assert stats['test_acc1'] > 40
    return str(run / 'best_model.pth')


def labels(pictures) -> list:
    """Return the labels of the pictures in the order of their paths."""
    dataset = datasets.FashionMNIST(datasets.SAMPLE_DATA, train=False)
    return [int(dataset.labels[int(path.stem)]) for path in sorted(pictures.rglob('*.png'))]


def predicted(pictures, weights, *more) -> list:
    return [result[0]['index'] for result in predict([str(pictures), '--pretrained', weights, '--num-workers', '0',
                                                      '--device', 'cpu', *more])]


def test_predictions_are_mostly_right(pictures, trained):
    """The classes have Fashion-MNIST's names, and the accuracy is that of a trained model."""
    results = predict([str(pictures), '--pretrained', trained, '--num-workers', '0', '--device', 'cpu'])
    assert results[0][0]['class'] in datasets.datasets.FashionMNIST.classes
    right = sum(result[0]['index'] == label for result, label in zip(results, labels(pictures)))
    assert right > .4 * COUNT


def test_larger_pictures_are_resized(pictures, trained, tmp_path):
    """A larger copy of a small picture is predicted about as the original."""
    path = sorted(pictures.rglob('*.png'))[0]
    Image.open(path).resize((280, 280), Image.BICUBIC).save(tmp_path / 'large.png')
    flags = ['--pretrained', trained, '--topk', '10', '--input-size', '28', '--num-workers', '0', '--device', 'cpu']
    small, large = (predict([str(p), *flags])[0] for p in (path, tmp_path / 'large.png'))
    probability = [{entry['index']: entry['probability'] for entry in entries} for entries in (small, large)]
    assert all(abs(probability[0][i] - probability[1][i]) < .1 for i in range(10))


def test_features_tell_classes_apart(pictures, trained, tmp_path):
    """The nearest other picture by its features is of the same class more often than by chance."""
    arrays = extract([str(pictures), '--pretrained', trained, '--output', str(tmp_path / 'f.npz'), '--num-workers', '0',
                      '--device', 'cpu'])
    features = arrays['features'] / np.linalg.norm(arrays['features'], axis=1, keepdims=True)
    similarity = features @ features.T - 2 * np.eye(COUNT)
    assert (arrays['labels'][similarity.argmax(axis=1)] == arrays['labels']).mean() > .3


def test_attention_is_drawn(pictures, trained, tmp_path):
    """The drawn attention of a trained model is not uniform: the sheet has varied colours."""
    picture = sorted(pictures.rglob('*.png'))[0]
    sheet, = visualize([str(picture), '--pretrained', trained, '--output-dir', str(tmp_path), '--input-size', '112',
                        '--device', 'cpu'])
    assert np.asarray(Image.open(sheet)).std() > 10


def test_exported_model_predicts_the_same(pictures, trained, tmp_path):
    """The ONNX file predicts the same classes."""
    export(['--format', 'onnx', '--pretrained', trained, '--dynamic', '--output', str(tmp_path / 'm.onnx')])
    session = onnxruntime.InferenceSession(tmp_path / 'm.onnx', providers=['CPUExecutionProvider'])
    transform = View(32, full_crop=False, resize=False).transform()
    images = torch.stack([transform(load_rgb(str(path))) for path in sorted(pictures.rglob('*.png'))])
    predictions = session.run(None, {'images': images.numpy()})[0].argmax(axis=1)
    assert predictions.tolist() == predicted(pictures, trained)


def test_converted_model_predicts_the_same(pictures, trained, tmp_path):
    """timm's model with converted weights, and weights converted back, predict the same classes."""
    convert([trained, str(tmp_path / 't.safetensors'), '--to', 'timm'])
    model = timm.create_model('xcit_nano_12_p16_224', num_classes=10, checkpoint_path=str(tmp_path / 't.safetensors'))
    transform = View(32, full_crop=False, resize=False).transform()
    images = torch.stack([transform(load_rgb(str(path))) for path in sorted(pictures.rglob('*.png'))])
    with torch.no_grad():
        assert model.eval()(images).argmax(dim=1).tolist() == predicted(pictures, trained)
    convert([str(tmp_path / 't.safetensors'), str(tmp_path / 'o.pth'), '--to', 'original'])
    flags = ['--model', 'xcit_nano_12_p16', '--input-size', '32', '--no-full-crop']
    assert predicted(pictures, str(tmp_path / 'o.pth'), *flags) == predicted(pictures, trained)
