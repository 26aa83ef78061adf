"""Division of a folder without `val` into training and evaluation."""
import json
from pathlib import Path

import pytest
from conftest import tiniest, write_image

from loaders import split
from main import main
from utils import InputError

NAMES = [f'{name}/{i}.jpg' for name in ('a', 'b') for i in range(500)]


def write_class_folders(root: Path, per_class: int):
    for name in ('cat', 'dog'):
        for i in range(per_class):
            write_image(root / name / f'{i}.png', seed=i)


def test_split_is_of_each_class_and_seeded():
    """Each class is divided by the fraction, in another way with another seed, without overlap."""
    division, other = (split.Split(NAMES, fraction=.2, seed=seed) for seed in (0, 1))
    assert division.val | division.train == set(NAMES)
    assert not division.val & division.train
    for name in ('a', 'b'):
        assert sum(image.startswith(name) for image in division.val) == 100
    assert division.val != other.val
    assert division.val == split.Split(reversed(NAMES), fraction=.2, seed=0).val


@pytest.mark.parametrize(('count', 'fraction', 'held_out'), [(7, .2, 1), (8, .2, 2), (13, .5, 7), (40, .01, 1)])
def test_fraction_is_exact_to_the_nearest_picture(count, fraction, held_out):
    """A small class has the share of a large one, as far as whole pictures allow."""
    assert len(split.Split([f'a/{i}' for i in range(count)], fraction=fraction, seed=0).val) == held_out


def test_pictures_keep_their_side():
    """A new picture changes the side of at most one other picture."""
    for last in range(10, 200):
        before, after = (split.Split([f'a/{i}' for i in range(n)], fraction=.2, seed=0) for n in (last, last + 1))
        assert len((before.val & after.train) | (before.train & after.val)) <= 1


def test_stored_pictures_keep_their_side():
    """Pictures of a resumed run never change sides; new pictures fill the fraction."""
    stored = {'train': [f'a/{i}' for i in range(10)], 'val': [f'a/{i}' for i in range(10, 13)]}
    division = split.Split([f'a/{i}' for i in range(30)], fraction=.2, seed=0, stored=stored)
    assert set(stored['train']) <= division.train
    assert set(stored['val']) <= division.val
    assert len(division.val) == 6


@pytest.mark.parametrize('fraction', [.001, .999])
def test_split_leaves_each_side_a_picture(fraction):
    """A class with two pictures has one on each side; a single picture is for training."""
    for count in (2, 3, 10):
        division = split.Split([f'a/{i}' for i in range(count)], fraction=fraction, seed=0)
        assert division.val
        assert division.train
    assert split.Split(['a/0'], fraction=.999, seed=0).val == set()


@pytest.mark.parametrize('folder', ['train', '.'])
def test_folder_without_val(tmp_path, folder):
    """A run stores its division, keeps it on resume, and is evaluated on it without the flag."""
    data, run = tmp_path / 'data', tmp_path / 'run'
    write_class_folders(data / folder, 10)
    flags = tiniest(data, '--val-fraction', '.3', '--output-dir', str(run), '--epochs', '1')
    main(flags)
    stored = json.loads((run / 'split.json').read_text())
    assert stored['val_fraction'] == .3
    assert len(stored['train']) + len(stored['val']) == 20
    stored['val'], stored['train'] = stored['val'][1:], [*stored['train'], stored['val'][0]]
    (run / 'split.json').write_text(json.dumps(stored))
    main([*flags, '--epochs', '2', '--resume', 'auto'])
    assert json.loads((run / 'split.json').read_text()) == {**stored, 'train': sorted(stored['train'])}
    evaluated = main(tiniest(data, '--eval', '--resume', str(run / 'best_model.pth')))
    assert evaluated['images'] == len(stored['val'])


@pytest.mark.parametrize(('flags', 'message'), [
    (['--val-fraction', '.2'], '--val-fraction 0.2: .* has a val/ folder of its own'),
    (['--val-fraction', '1'], 'not allowed'), (['--val-fraction', '0'], 'not allowed'),
    (['--val-fraction', '.2', '--data-set', 'SAMPLE'],
     '--val-fraction 0.2: only works with --data-set FOLDER, not SAMPLE')])
def test_invalid_val_fraction(folders, flags, message):
    """--val-fraction is refused for a folder with `val`, for other data sets, and outside of 0 to 1."""
    with pytest.raises(InputError, match=message):
        main(tiniest(folders, *flags))


def test_refused_folder_without_val_names_the_flag(tmp_path):
    """The refusal of a folder without `val` contains --val-fraction."""
    write_class_folders(tmp_path / 'train', 4)
    with pytest.raises(InputError, match=r'no val/ or test/ folder there.*--val-fraction'):
        main(tiniest(tmp_path))


def test_damaged_split(tmp_path):
    """A damaged split.json is refused in one line."""
    (tmp_path / 'split.json').write_text('{"train": 3}')
    with pytest.raises(InputError, match=r'split\.json: is not a split of pictures'):
        split.read(tmp_path)
