"""Parts of a run: metrics, class names and images."""
import math

import pytest

from run import parts
from utils import InputError


@pytest.mark.parametrize(('larger', 'best'), [(True, [True, False, True, True, False]),
                                              (False, [True, True, False, False, False])])
def test_best_value(larger, best):
    """Larger or smaller is better. An equal value counts as best, NaN never does."""
    metrics = parts.Metrics()
    names = [metrics.update_best({'x': value}, larger=larger) for value in (2., 1., 3., 3., math.nan)]
    assert names == ['x' if is_best else None for is_best in best]
    assert metrics == {'x': 3. if larger else 1.}


def test_best_of_two_values():
    """The better one of a round's values is named if no value of an earlier round, of either name, was better."""
    metrics = parts.Metrics()
    names = [metrics.update_best(dict(model=model, ema=ema), epoch=epoch)
             for epoch, (model, ema) in enumerate([(5., 3.), (4., 4.5), (2., 6.), (math.nan, 6.), (6., math.nan)])]
    assert names == ['model', None, 'ema', 'ema', 'model']
    assert metrics == {'model': 6., 'ema': 6., 'best_epoch': 4.}


def test_first_values_that_are_not_finite_are_not_best():
    """NaN alone is neither stored nor best."""
    metrics = parts.Metrics()
    assert metrics.update_best({'x': math.nan}) is None
    assert metrics == {}


def test_other_classes_are_refused():
    """Names in another order are other classes."""
    parts.Classes(['a', 'b']).load_state_dict(['a', 'b'])
    with pytest.raises(InputError, match='its classes'):
        parts.Classes(['a', 'b']).load_state_dict(['b', 'a'])


def test_images_may_move_with_their_folder():
    """The paths count relative to their common folder."""
    before = parts.Images(2, ['/data/x/1.png', '/data/y/2.png']).state_dict()
    parts.Images(2, ['/home/me/x/1.png', '/home/me/y/2.png']).load_state_dict(before)


@pytest.mark.parametrize(('count', 'files', 'message'), [
    (3, ['/d/x/1.png', '/d/y/2.png', '/d/y/3.png'], 'was trained on 2 images; --data-path contains 3'),
    (2, ['/d/x/1.png', '/d/y/3.png'], 'with other names')])
def test_other_images_are_refused(count, files, message):
    """Another number of images, or other names, end in an error."""
    before = parts.Images(2, ['/d/x/1.png', '/d/y/2.png']).state_dict()
    with pytest.raises(InputError, match=message):
        parts.Images(count, files).load_state_dict(before)
