"""Command python -m tools.extract_features."""
import json

import numpy as np
import pytest
import safetensors
import timm
import torch
from conftest import seeded_model, write_folders, write_image

from loaders.pictures import load_rgb
from loaders.transforms import View
from tools.extract_features import main
from utils import InputError, UnreadableImage


@pytest.fixture(scope='module')
def backbone(tmp_path_factory):
    """Weights without a head, like published ones of DINO."""
    path = tmp_path_factory.mktemp('weights') / 'backbone.pth'
    torch.save(seeded_model('xcit_nano_12_p16', num_classes=0).state_dict(), path)
    return path


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp('data'), size=(70, 50)) / 'train'


def extract(backbone, *argv) -> dict:
    return main([*map(str, argv), '--model', 'xcit_nano_12_p16', '--pretrained', str(backbone), '--input-size', '48',
                 '--num-workers', '0', '--device', 'cpu', '--batch-size', '3'])


@pytest.mark.parametrize('pool', ['token', 'avg'])
def test_features_are_the_models(tmp_path, data, backbone, pool):
    """Each row is the pooled, normalised output for the picture after the evaluation transform."""
    extract(backbone, data, '--output', tmp_path / 'f.npz', '--pool', pool)
    with np.load(tmp_path / 'f.npz') as arrays:
        features, paths = arrays['features'], arrays['paths']
    model = seeded_model('xcit_nano_12_p16', num_classes=0, global_pool=pool).eval()
    transform = View(48, full_crop=True, resize=True).transform()
    image = transform(load_rgb(str(data / paths[5])))[None]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(features[5:6]), model(image), rtol=1e-4, atol=1e-4)


def test_labels_and_classes_of_class_folders(tmp_path, data, backbone):
    """The label is the index of the folder's name among the sorted names."""
    extract(backbone, data, '--output', tmp_path / 'f.npz')
    with np.load(tmp_path / 'f.npz') as arrays:
        assert arrays['classes'].tolist() == ['cat', 'dog']
        assert [arrays['classes'][label] for label in arrays['labels']] == [p.split('/')[0] for p in arrays['paths']]
        assert arrays['features'].shape == (16, 128)


def test_safetensors_holds_the_same(tmp_path, data, backbone):
    """A .safetensors file has arrays as tensors, and strings as JSON in its metadata."""
    expected = extract(backbone, data, '--output', tmp_path / 'f.npz')
    extract(backbone, data, '--output', tmp_path / 'f.safetensors')
    with safetensors.safe_open(tmp_path / 'f.safetensors', 'np') as file:
        np.testing.assert_array_equal(file.get_tensor('features'), expected['features'])
        np.testing.assert_array_equal(file.get_tensor('labels'), expected['labels'])
        assert json.loads(file.metadata()['paths']) == expected['paths']


def test_plain_folder_has_no_labels(tmp_path, data, backbone):
    """Pictures outside class folders have no labels."""
    assert set(extract(backbone, data / 'cat', '--output', tmp_path / 'f.npz')) == {'features', 'paths'}


def test_unreadable_picture(tmp_path, backbone):
    """An unreadable picture ends the program before a file is written, or is left out by --skip-bad-images."""
    for i in range(5):
        write_image(tmp_path / 'data' / f'{i}.png')
    (tmp_path / 'data' / '1.png').write_bytes(b'')
    with pytest.raises(UnreadableImage, match=r'1\.png'):
        extract(backbone, tmp_path / 'data', '--output', tmp_path / 'f.npz')
    assert not (tmp_path / 'f.npz').exists()
    arrays = extract(backbone, tmp_path / 'data', '--output', tmp_path / 'f.npz', '--skip-bad-images', '1')
    assert arrays['paths'] == ['0.png', '2.png', '3.png', '4.png']
    assert np.isfinite(arrays['features']).all()


@pytest.mark.parametrize(('output', 'message'), [
    ('f.txt', r'f\.txt: must end in \.npz or \.safetensors'),
    ('folder.npz', 'is a folder'),
])
def test_bad_output(tmp_path, data, backbone, output, message):
    """--output with another suffix, or with the name of a folder, is refused."""
    (tmp_path / 'folder.npz').mkdir()
    with pytest.raises(InputError, match=message):
        extract(backbone, data, '--output', tmp_path / output)


def test_patch_tokens_are_the_models(tmp_path, data, backbone):
    """--patch-tokens adds a grid of normalised tokens per picture."""
    extract(backbone, data, '--output', tmp_path / 'f.npz', '--patch-tokens')
    with np.load(tmp_path / 'f.npz') as arrays:
        tokens, features, paths = arrays['tokens'], arrays['features'], arrays['paths']
    assert tokens.shape == (16, 3, 3, 128)
    model = seeded_model('xcit_nano_12_p16', num_classes=0).eval()
    transform = View(48, full_crop=True, resize=True).transform()
    image = transform(load_rgb(str(data / paths[5])))[None]
    with torch.no_grad():
        expected = model.forward_features(image)[0]
    torch.testing.assert_close(torch.from_numpy(tokens[5]).flatten(0, 1), expected[1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(features[5]), expected[0], rtol=1e-4, atol=1e-4)


def test_patch_tokens_of_another_model_are_refused(tmp_path, data):
    """--patch-tokens is refused for a model that is not an XCiT."""
    torch.save(timm.create_model('resnet10t', num_classes=0).state_dict(), tmp_path / 'resnet.pth')
    with pytest.raises(InputError, match='--patch-tokens: only works with XCiT models, not resnet10t'):
        main([str(data), '--output', str(tmp_path / 'f.npz'), '--model', 'resnet10t', '--pretrained',
              str(tmp_path / 'resnet.pth'), '--patch-tokens', '--device', 'cpu', '--num-workers', '0'])
