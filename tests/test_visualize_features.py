"""Command python -m tools.visualize_features, and principal components of tokens."""
import numpy as np
import pytest
import torch
from conftest import seeded_model, write_image
from PIL import Image

from reports import maps
from tools import visualize_features
from tools.visualize_features import main
from utils import InputError


@pytest.fixture(scope='module')
def backbone(tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'backbone.pth'
    torch.save(seeded_model('xcit_nano_12_p16', num_classes=0).state_dict(), path)
    return path


def draw(backbone, *argv) -> list:
    return main([*map(str, argv), '--model', 'xcit_nano_12_p16', '--pretrained', str(backbone), '--input-size', '96',
                 '--device', 'cpu'])


def test_pictures_are_drawn(tmp_path, backbone):
    """Pictures keep their shapes, also odd ones, and are all on the sheet."""
    for i, size in enumerate([(96, 96), (70, 50), (31, 97)]):
        write_image(tmp_path / 'in' / f'{i}.png', size=size, seed=i)
    files = draw(backbone, tmp_path / 'in', '--output-dir', tmp_path / 'out')
    assert [file.name for file in files] == ['0_features.png', '1_features.png', '2_features.png', 'features.png']
    assert [Image.open(file).size for file in files[:3]] == [(96, 96), (96, 69), (31, 96)]
    assert len(Image.open(files[-1]).getcolors(2 ** 24)) > 100


def test_sheet_has_the_names(monkeypatch):
    """Each picture on the sheet has its name."""
    captions = []
    monkeypatch.setattr(visualize_features.lettering, 'captioned', lambda picture, texts: (
        captions.append(texts), picture)[1])
    pictures = [Image.new('RGB', (9, 9))] * 2
    visualize_features.sheet(pictures, pictures, ['a.png', ' b.png'])
    assert captions == [['a.png'], [], ['␣b.png'], []]


def test_two_pictures_of_one_name_are_both_kept(tmp_path, backbone):
    """Drawings of pictures with equal names in two folders get different names."""
    for folder in 'ab':
        write_image(tmp_path / folder / 'x.png', seed=ord(folder))
    files = draw(backbone, tmp_path / 'a', tmp_path / 'b', '--output-dir', tmp_path / 'out')
    assert [file.name for file in files] == ['x_features.png', 'x-2_features.png', 'features.png']


@pytest.mark.parametrize(('picture', 'message'), [
    ('/nowhere.png', '/nowhere.png: no such file'),
    ('{folder}', 'unreadable image'),
])
def test_bad_pictures_are_refused(tmp_path, backbone, picture, message):
    """A missing picture, and a folder with an unreadable picture, are refused without an output folder."""
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in' / 'bad.png').write_text('no picture')
    with pytest.raises(InputError, match=message):
        draw(backbone, picture.format(folder=tmp_path / 'in'), '--output-dir', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_components_are_common_to_all_pictures():
    """Equal tokens have equal colours, whichever picture they are in."""
    torch.manual_seed(0)
    tokens = torch.randn(2, 3, 4, 8)
    tokens[1, 0] = tokens[0, 2]
    first, second = maps.component_colors(list(tokens))
    np.testing.assert_allclose(second[0], first[2])
    assert np.ptp(first) > .5


def test_background_is_what_lies_at_the_edges():
    """With remove_background, an object in the middle is coloured and the rest is black."""
    torch.manual_seed(0)
    tokens, object_ = .1 * torch.randn(1, 9, 9, 8), torch.zeros(9, 9, dtype=torch.bool)
    object_[3:6, 2:7] = True
    tokens[0, object_] += 5 * torch.randn(8)
    colors, = maps.component_colors(list(tokens), remove_background=True)
    assert not colors[~object_.numpy()].any()
    assert colors[object_.numpy()].any()


def test_threshold_divides_two_groups():
    """The threshold of values around 0 and around 10 is between the two groups."""
    assert 1 <= maps.threshold(torch.tensor([0., 1., 10., 11., .5])) < 10


def test_drawing_over_a_picture_is_refused(tmp_path, backbone):
    """An --output-dir in which a drawing would overwrite an input picture is refused."""
    write_image(tmp_path / 'features.png')
    with pytest.raises(InputError, match='would be overwritten'):
        draw(backbone, tmp_path / 'features.png', '--output-dir', tmp_path)
