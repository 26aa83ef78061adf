"""ImageNet's other test sets and labels: their classes, and their accuracy."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, seeded_model, write_image
from processes import run
from timm.data import ImageNetInfo

import datasets
from engine import only_classes
from loaders import pictures
from loaders.source import Source
from loaders.transforms import ToNormalizedTensor
from main import main
from reports import real_labels
from utils import InputError

NAME = 'xcit_nano_12_p16'
SYNSETS = ImageNetInfo().label_names()
# Of them, those that ImageNet-A and -R have: by hand from the lists of their papers
IN_A, IN_R, NEITHER = 'n01498041', 'n01443537', 'n01440764'  # stingray (A and R), goldfish (R), tench


@pytest.fixture(scope='module')
def weights(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp('weights') / 'nano.pth'
    torch.save({'model': seeded_model(NAME).state_dict()}, path)
    return str(path)


@pytest.fixture(scope='module')
def model():
    return seeded_model(NAME).eval()


def flags(data_set: str, folder: Path, *more: str) -> list:
    return ['--eval', '--data-set', data_set, '--data-path', str(folder), '--model', NAME, '--input-size', '32',
            '--device', 'cpu', '--num-workers', '0', '--batch-size', '4', *more]


def write_classes(root: Path, names: list, per_class: int = 2):
    for number, name in enumerate(names):
        for i in range(per_class):
            write_image(root / name / f'{i}.png', seed=10 * number + i)
    return root


@torch.no_grad()
def logits_of(model, dataset) -> torch.Tensor:
    images = [ToNormalizedTensor()(pictures.load_rgb(path)) for path, _ in dataset.samples]
    return torch.cat([model(image[None]) for image in images])


# ----- classes

@pytest.mark.parametrize(('data_set', 'count', 'examples'), [
    ('IMNET_A', 200, {IN_A: 6}), ('IMNET_R', 200, {IN_R: 1, IN_A: 6}), ('IMNET_V2', None, {NEITHER: 0}),
    ('IMNET_SKETCH', None, {NEITHER: 0, IN_A: 6})])
def test_classes_have_imagenets_numbers(tmp_path, data_set, count, examples):
    """WordNet ids have ImageNet's numbers, whichever of them exist; A and R have 200 possible classes."""
    write_classes(tmp_path, list(examples))
    dataset, num_classes = datasets.load(Source(data_set, str(tmp_path)), is_train=False)
    assert num_classes == 1000
    assert {Path(path).parent.name: target for path, target in dataset.samples} == examples
    possible = dataset.possible
    assert (possible and len(possible)) == count
    assert possible is None or set(examples.values()) <= set(possible)


def test_folders_of_imagenet_v2_are_numbers(tmp_path):
    """Folders named by numbers are sorted as numbers, not as texts."""
    write_classes(tmp_path / 'imagenetv2-matched-frequency-format-val', ['0', '2', '10', '999'], per_class=1)
    dataset, _ = datasets.load(Source('IMNET_V2', str(tmp_path)), is_train=False)
    numbers = {Path(path).parent.name: target for path, target in dataset.samples}
    assert numbers == {'0': 0, '2': 2, '10': 10, '999': 999}


@pytest.mark.parametrize('inside', ['.', 'imagenet-a', 'val', 'anything'])
def test_folder_as_archives_unpack(tmp_path, inside):
    """The class folders are found in the folder or one level below."""
    write_classes(tmp_path / inside, [IN_A], per_class=1)
    assert len(datasets.load(Source('IMNET_A', str(tmp_path)), is_train=False)[0]) == 1


def test_missing_classes_are_logged(tmp_path, capsys):
    """An accuracy without all classes is not comparable, which is logged."""
    write_classes(tmp_path, [IN_A])
    datasets.load(Source('IMNET_A', str(tmp_path)), is_train=False)
    assert 'has 1 of the 200 classes of IMNET_A' in capsys.readouterr().out


@pytest.mark.parametrize(('data_set', 'names', 'message'), [
    ('IMNET_A', [IN_A, NEITHER], f'has 1 folder without a class of the test set: {NEITHER}'),
    ('IMNET_R', ['cat', 'dog'], 'no class folders .* existing: cat, dog'), ('IMNET_A', ['0', '1'], 'no class folders'),
    ('IMNET_V2', ['1000', '3'], 'without a class of the test set: 1000')])
def test_other_folders_are_refused(tmp_path, data_set, names, message):
    """Folders that are not classes of the test set are refused with their names."""
    write_classes(tmp_path, names)
    with pytest.raises(InputError, match=message):
        main(flags(data_set, tmp_path))


def test_test_sets_are_not_trained_on(tmp_path):
    """Test sets are refused without --eval."""
    write_classes(tmp_path, [IN_A])
    with pytest.raises(InputError, match='IMNET_A: is a test set, only for --eval'):
        main(flags('IMNET_A', tmp_path)[1:])


# ----- accuracy

def test_other_classes_are_impossible():
    """Probabilities are those of a model that only has the classes of the set."""
    logits = torch.tensor([[9., 1., 2., 8.]])
    assert only_classes(logits, [1, 2]).softmax(1).tolist()[0] == pytest.approx(
        [0, *torch.tensor([1., 2.]).softmax(0).tolist(), 0])


@pytest.mark.parametrize(('data_set', 'names'), [('IMNET_R', [IN_A, IN_R]), ('IMNET_V2', ['0', '9', '10', '500'])])
def test_accuracy_by_hand(tmp_path, weights, model, data_set, names):
    """Top-1, top-5 and loss among the set's classes, from the model's own logits."""
    write_classes(tmp_path, names, per_class=5)
    stats = main(flags(data_set, tmp_path, '--pretrained', weights))
    dataset, _ = datasets.load(Source(data_set, str(tmp_path)), is_train=False)
    possible = dataset.possible or list(range(1000))
    logits = logits_of(model, dataset)[:, possible]
    targets = torch.tensor([possible.index(target) for _, target in dataset.samples])
    ranks = (logits > logits.gather(1, targets[:, None])).sum(1)
    assert stats['acc1'] == pytest.approx(100 * (ranks < 1).float().mean().item())
    assert stats['acc5'] == pytest.approx(100 * (ranks < 5).float().mean().item())
    assert stats['loss'] == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-4)


# ----- ReaL

@pytest.fixture(scope='module')
def imagenet(tmp_path_factory) -> Path:
    """Six images of ImageNet's validation set by name, in two classes."""
    root = tmp_path_factory.mktemp('imagenet')
    for number in range(1, 7):
        write_image(root / 'val' / SYNSETS[number % 2] / f'ILSVRC2012_val_{number:08}.JPEG', seed=number, size=(48, 48))
    return root


def real_flags(folder: Path, weights: str, labels: Path, *more: str) -> list:
    return flags('IMNET', folder, '--pretrained', weights, '--real-labels', str(labels), '--no-resize',
                 '--input-size', '48', *more)


@pytest.fixture(scope='module')
def labels(imagenet, model, tmp_path_factory) -> tuple:
    """A file of labels and their accuracies by hand: two images have no label, one has two, of which one is right."""
    dataset, _ = datasets.load(Source('IMNET', str(imagenet)), is_train=False)
    best = logits_of(model, dataset).topk(5).indices.tolist()
    top = dict(zip((Path(path).name for path, _ in dataset.samples), best))
    top = [top[f'ILSVRC2012_val_{number:08}.JPEG'] for number in range(1, 7)]
    others = [next(i for i in range(1000) if i not in row) for row in top]
    real = [[], [top[1][0]], [others[2], top[2][3]], [others[3]], [], [top[5][4], top[5][0]]]
    path = tmp_path_factory.mktemp('labels') / 'real.json'
    path.write_text(json.dumps(real + [[1]] * (real_labels.IMAGES - 6)))
    return path, 100 * 2 / 4, 100 * 3 / 4


def test_real_labels(imagenet, weights, labels, tmp_path, capsys):
    """A prediction is right if it is among an image's labels; the accuracies are printed and stored."""
    path, top1, top5 = labels
    stats = main(real_flags(imagenet, weights, path, '--output-dir', str(tmp_path)))
    assert (stats['real_acc1'], stats['real_acc5'], stats['real_images']) == (top1, top5, 4)
    assert '* ReaL Acc@1 50.000 Acc@5 75.000 of 4 images\n' in capsys.readouterr().out
    assert json.loads((tmp_path / 'eval.json').read_text())['real_acc1'] == top1


def test_real_labels_of_two_processes(imagenet, weights, labels):
    """Two processes have the accuracies of one."""
    out = run([ROOT / 'main.py', *real_flags(imagenet, weights, labels[0])], 2)[0]
    assert '* ReaL Acc@1 50.000 Acc@5 75.000 of 4 images\n' in out


def test_real_labels_of_timm():
    """The file that comes with timm has a list for each image."""
    labels = real_labels.read('timm')
    assert len(labels) == 50000
    assert np.mean([not classes for classes in labels]) == pytest.approx(.0633, abs=.001)  # the paper: 46,837 have some


@pytest.mark.parametrize(('content', 'message'), [
    ('[[1], [2]]', 'must be a list of 50000 lists'), ('{"a": 1}', 'must be a list'), ('nonsense', 'as JSON')])
def test_invalid_files_of_labels(tmp_path, imagenet, weights, content, message):
    """A file of another format is refused."""
    (tmp_path / 'real.json').write_text(content)
    with pytest.raises(InputError, match=message):
        main(real_flags(imagenet, weights, tmp_path / 'real.json'))


def test_real_labels_of_other_images(tmp_path, weights):
    """Images whose file names do not contain ImageNet's numbers are refused."""
    write_classes(tmp_path / 'val', [NEITHER])
    with pytest.raises(InputError, match=r'named as ILSVRC2012_val_00000001\.JPEG, not 0\.png'):
        main(real_flags(tmp_path, weights, 'timm'))
    with pytest.raises(InputError, match='--real-labels timm: needs --eval and --data-set IMNET'):
        main(['--data-set', 'SAMPLE', '--eval', '--device', 'cpu', '--real-labels', 'timm'])
