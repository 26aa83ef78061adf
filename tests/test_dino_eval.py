"""python -m dino.knn and dino.linear: the original's numbers, features in files, and errors."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import small_dino
import timm
import torch
from conftest import REFERENCE, write_folders, write_image
from processes import run
from test_dino import close, generator, knn_case

import main
import xcit_zoo
from dino import classifiers, features, frozen, knn, linear, train
from dino.classifiers import Linears
from dino.features import Features
from engine import train_one_epoch
from run import checkpoints
from run.pace import Pace
from run.schedules import Schedule, cosine
from tools import export, extract_features, predict
from utils import InputError

NUMBERS = json.loads((REFERENCE / 'dino.json').read_text())
CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    """Folder with 16 training and 8 test images of two classes."""
    return write_folders(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory) -> Path:
    """Checkpoint of a run of DINO; must not be changed."""
    folder = tmp_path_factory.mktemp('runs') / 'run'
    small_dino.main(['--device', 'cpu', '--num-workers', '0', '--batch-size', '8', '--epochs', '1', '--warmup-epochs',
                     '1', '--arch', 'xcit_test', '--out-dim', '16', '--global-crops-size', '32',
                     '--local-crops-number', '0', '--data-path', str(data), '--output-dir', str(folder), '--seed', '5'])
    return folder / 'checkpoint.pth'


def flags(data: Path, checkpoint: Path, *more: str) -> list:
    return ['--pretrained', str(checkpoint), '--data-set', 'FOLDER', '--data-path', str(data), '--device', 'cpu',
            '--num-workers', '0', *more]


@pytest.fixture(scope='module')
def saved(tmp_path_factory) -> tuple:
    """Files of the reference's features."""
    folder = tmp_path_factory.mktemp('features')
    train_, train_labels, test, test_labels = knn_case(5, classes=10, width=16, images=(500, 200), noise=1.6)
    names = [f'class {i}' for i in range(10)]
    features.write(folder / 'train.npz', Features(train_, train_labels, names))
    features.write(folder / 'val.npz', Features(test, test_labels, names))
    return str(folder / 'train.npz'), str(folder / 'val.npz')


def from_files(saved: tuple, *more: str) -> list:
    return ['--train-features', saved[0], '--val-features', saved[1], '--device', 'cpu', *more]


# ---------------------------------------------------------------------------------------------------------------------
# k-NN

def test_knn_prints_the_originals_lines(saved, capsys, tmp_path):
    """Results are printed as by the original, and written to --output."""
    knn.main(from_files(saved, '--nb_knn', '1', '20', '--output', str(tmp_path / 'knn.json')))
    assert capsys.readouterr().out.splitlines()[-2:] == ['1-NN classifier result: Top1: 49.5, Top5: 49.5',
                                                         '20-NN classifier result: Top1: 62.0, Top5: 95.0']
    assert json.loads((tmp_path / 'knn.json').read_text())['results']['20'] == {'top1': 62., 'top5': 95.}


def test_knn_evaluates_the_teacher_of_a_run(data, trained, capsys):
    """The teacher of a checkpoint is evaluated."""
    results = knn.main(flags(data, trained, '--nb-knn', '1', '3'))
    out = capsys.readouterr().out
    assert "'teacher'" in out
    assert '3-NN classifier result: Top1: ' in out
    assert results['images'] == {'train': 16, 'val': 8}


def test_default_neighbours_fit_few_images(data, trained, capsys):
    """Default numbers of neighbours above the number of training images are left out."""
    assert list(knn.main(flags(data, trained))['results']) == ['10']
    assert '--nb-knn 10 is used, because the default, 10 20 100 200, does not fit 16 tr' in capsys.readouterr().out


def test_seven_test_images_are_enough(trained, tmp_path):
    """Any number of test images is evaluated, each once."""
    few = write_folders(tmp_path / 'few')
    (few / 'val' / 'cat' / '0.png').unlink()
    assert knn.main(flags(few, trained, '--nb-knn', '1'))['images'] == {'train': 16, 'val': 7}


def test_knn_of_several_processes_is_that_of_one(data, trained, tmp_path):
    """Several processes, each with a share of the test images, find the result of one."""
    command = ['-c', 'import sys; from dino import knn; knn.main(sys.argv[1:])',
               *flags(data, trained, '--nb-knn', '1', '3')]
    for world in (1, 3):
        run([*command, '--output', str(tmp_path / f'{world}.json')], world)
    of_one, of_three = (json.loads((tmp_path / f'{world}.json').read_text()) for world in (1, 3))
    assert of_one['results'] == of_three['results']


def test_baselines_are_pixels_and_the_network_before_its_first_step(data, trained, capsys):
    """The untrained baseline has the initial weights of the run with the same seed."""
    results = knn.main(flags(data, trained, '--nb-knn', '3', '--baselines'))
    assert set(results['baselines']) == {'raw pixels', 'untrained, seed 5'}
    args = train.parse_args(['--arch', 'xcit_test', '--seed', '5', '--device', 'cpu'])
    args.epochs = 10
    with small_dino.mock.patch.object(small_dino.networks, 'HIDDEN', 16):
        student, *_ = train.build_networks(args, train.DinoLoss(65536, 10))
    backbone = frozen.build(knn.parse_args(flags(data, trained)), CPU)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(knn.untrained(backbone, 5)(images), student.backbone.eval()(images))


def test_stored_features_are_reused(data, trained, tmp_path, capsys, monkeypatch):
    """Stored features are reused without extraction."""
    first = knn.main(flags(data, trained, '--nb-knn', '3', '--features-dir', str(tmp_path / 'kept')))
    monkeypatch.setattr(features, 'extract', None)
    again = knn.main(flags(data, trained, '--nb-knn', '3', '--features-dir', str(tmp_path / 'kept')))
    assert first['results'] == again['results']


def test_stored_features_of_other_weights_or_images_are_refused(data, trained, tmp_path):
    """Stored features of other images, weights or sizes are an error that names the difference."""
    kept = ['--nb-knn', '3', '--features-dir', str(tmp_path / 'kept')]
    knn.main(flags(data, trained, *kept))
    other = write_folders(tmp_path / 'other', per_class=9)
    with pytest.raises(InputError, match=r'npz comes from other weights or images \(files: .*images: 16, now 18'):
        knn.main(flags(other, trained, *kept))
    content = torch.load(trained)
    content['teacher']['module.backbone.cls_token'] += 1
    torch.save(content, tmp_path / 'other.pth')
    with pytest.raises(InputError, match=r'train\.npz comes from other weights or images \(fingerprint: '):
        knn.main(flags(data, tmp_path / 'other.pth', *kept))
    with pytest.raises(InputError, match=r'input size: 32, now 48'):
        knn.main(flags(data, trained, *kept, '--input-size', '48'))


def test_files_of_extract_features_are_read(data, trained, tmp_path):
    """Files of tools.extract_features lead to the same result as images, and contain their model's name."""
    for split, suffix in (('train', 'npz'), ('val', 'safetensors')):
        extract_features.main([str(data / split), '--output', str(tmp_path / f'{split}.{suffix}'), '--pretrained',
                               str(trained), '--device', 'cpu', '--num-workers', '0'])
    assert features.read(str(tmp_path / 'val.safetensors'), '').made_of['model'] == 'xcit_test'
    results = knn.main(['--train-features', str(tmp_path / 'train.npz'), '--val-features',
                      str(tmp_path / 'val.safetensors'), '--nb-knn', '3', '--device', 'cpu'])
    assert results['results'] == knn.main(flags(data, trained, '--nb-knn', '3'))['results']


# ---------------------------------------------------------------------------------------------------------------------
# Linear

def linear_case() -> tuple:
    return knn_case(13, classes=20, width=32, images=(1000, 250), noise=2.2)


def test_linear_training_is_the_originals():
    """Losses, rates, accuracies and weights of two epochs equal the original's."""
    rows, labels, test, test_labels = linear_case()
    linears = Linears(32, 20, 1)
    with torch.no_grad():
        linears.layers[0].weight.copy_(torch.from_numpy(.01 * generator(14).standard_normal((20, 32))))
    optimizer = linear.build_optimizer(linears, [.5])
    schedule = Schedule(optimizer, cosine(Pace(1., 64, 1, linear.REFERENCE_BATCH).scaled_lr, 0., steps=2))
    loader = [[*batch] for batch in zip(rows.split(64), labels.split(64))]
    for epoch, expected in enumerate(NUMBERS['linear']['epochs']):
        schedule.set(epoch)
        stats = train_one_epoch(linears, linear.losses_of(linears, lambda x: x, [.5]), loader, optimizer=optimizer,
                                device=CPU, epoch=epoch, seed=0)
        close([stats['loss'], stats['lr']], [expected['train_loss'], expected['train_lr']], 1e-5)
        metrics = classifiers.evaluate(linears.layers[0], Features(test, test_labels, []), CPU)
        close([metrics['acc1'], metrics['acc5']], [expected['acc1'], expected['acc5']], 1e-6)
        batches = [classifiers.evaluate(linears.layers[0], Features(*part, []), CPU)['loss']
                   for part in zip(test.split(64), test_labels.split(64))]
        close(np.mean(batches), expected['test_loss_mean_of_batches'], 1e-5)
        layer = linears.layers[0]
        close([layer.weight.detach().norm(), layer.bias.detach().norm()],
              [expected['weight_norm'], expected['bias_norm']], 1e-5)


def test_learning_rate_is_the_originals():
    """The scaled learning rate of each epoch equals the original's."""
    optimizer = linear.build_optimizer(Linears(1, 2, 1), [.001])
    schedule = Schedule(optimizer, cosine(Pace(1., 1024, 1, linear.REFERENCE_BATCH).scaled_lr, 0., steps=100))
    for epoch, expected in NUMBERS['linear']['lr_of_100_epochs_8x128'].items():
        schedule.set(int(epoch))
        close(optimizer.param_groups[0]['lr'], expected, 1e-6)


def test_classifiers_begin_as_the_originals():
    """Initial weights have the original's distribution, and are equal for all classifiers."""
    torch.manual_seed(0)
    linears = Linears(384, 1000, 2)
    assert float(linears.layers[0].weight.detach().std()) == pytest.approx(.01, rel=.01)
    assert not linears.layers[0].bias.any()
    assert torch.equal(linears.layers[0].weight, linears.layers[1].weight)


def test_several_rates_learn_as_each_does_alone(saved, tmp_path, capsys):
    """A classifier among several ends with the accuracy of one alone."""
    together = linear.main(from_files(saved, '--lr', '.1', '1', '--epochs', '3', '--output-dir', str(tmp_path / 'two')))
    for lr in ('.1', '1'):
        alone = linear.main(from_files(saved, '--lr', lr, '--epochs', '3', '--output-dir', str(tmp_path / lr)))
        assert alone['test_acc1'] == together[f'test_acc1_lr{float(lr):g}']
    expected = f'Best in the last epoch: --lr {together["test_lr"]:g}\n* Acc@1 {together["test_acc1"]:.3f} Acc@5 '
    assert expected in capsys.readouterr().out


def test_stopped_linear_run_resumes(saved, tmp_path):
    """A run that is stopped after each epoch ends with bitwise the weights of an uninterrupted one."""
    flags_ = from_files(saved, '--lr', '.1', '1', '--epochs', '3', '--batch-size', '64', '--output-dir')
    linear.main([*flags_, str(tmp_path / 'whole')])
    for _ in range(2):
        with pytest.raises(RuntimeError, match='stopped at'):
            linear.main([*flags_, str(tmp_path / 'parts'), '--stop-after-epochs', '1', '--resume', 'auto'])
    linear.main([*flags_, str(tmp_path / 'parts'), '--resume', 'auto'])
    resumed, expected = (torch.load(tmp_path / name / 'checkpoint.pth')['linears'] for name in ('parts', 'whole'))
    assert all(torch.equal(resumed[key], expected[key]) for key in expected)


def test_classifier_of_another_backbone_is_refused(data, trained, tmp_path):
    """Evaluation and resume refuse a classifier of another backbone."""
    linear.main(flags(data, trained, '--epochs', '1', '--output-dir', str(tmp_path / 'run')))
    content = torch.load(trained)
    content['teacher']['module.backbone.cls_token'] += 1
    torch.save(content, tmp_path / 'other.pth')
    with pytest.raises(InputError, match='is for features of another backbone'):
        linear.main(flags(data, tmp_path / 'other.pth', '--evaluate', '--linear-weights',
                          str(tmp_path / 'run' / 'linear.pth')))
    with pytest.raises(InputError, match='is for features of another backbone'):
        linear.main(flags(data, tmp_path / 'other.pth', '--epochs', '1', '--resume',
                          str(tmp_path / 'run' / 'checkpoint.pth'), '--output-dir', str(tmp_path / 'new')))


def test_evaluation_reproduces_training(data, trained, tmp_path, capsys):
    """--evaluate reproduces the accuracy of training."""
    stats = linear.main(flags(data, trained, '--epochs', '2', '--lr', '.1', '--output-dir', str(tmp_path / 'run')))
    again = linear.main(flags(data, trained, '--evaluate', '--linear-weights', str(tmp_path / 'run' / 'linear.pth')))
    assert (again['acc1'], again['images']) == (stats['test_acc1'], 8)
    assert again['loss'] == pytest.approx(stats['test_loss'], rel=1e-6)


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_saved_classifier_is_a_model_for_every_program(data, trained, tmp_path, capsys, suffix):
    """main.py --eval, tools.predict and tools.export load the file of --save-classifier."""
    path = str(tmp_path / f'model.{suffix}')
    stats = linear.main(flags(data, trained, '--epochs', '2', '--lr', '.1', '--output-dir', str(tmp_path / 'run'),
                              '--save-classifier', path))
    again = main.main(['--eval', '--pretrained', path, '--model', 'xcit_test', '--input-size', '32', '--data-set',
                       'FOLDER', '--data-path', str(data), '--device', 'cpu', '--num-workers', '0'])
    assert again['acc1'] == stats['test_acc1']
    predict.main([str(data / 'val' / 'cat' / '0.png'), '--pretrained', path, '--device', 'cpu', '--num-workers', '0'])
    assert 'cat' in capsys.readouterr().out
    if suffix == 'pth':
        export.main(['--pretrained', path, '--output', str(tmp_path / 'model.pt2'), '--format', 'torch-export'])
        assert (tmp_path / 'model.pt2').exists()


def predicted(data: Path, weights: Path) -> list:
    return predict.main([str(data / 'val'), '--pretrained', str(weights), '--device', 'cpu', '--num-workers', '0'])


def test_training_writes_a_model(data, trained, tmp_path, capsys):
    """classifier.pth has the accuracy of training; linear.pth, and the run's checkpoint, are refused with a remedy."""
    run = tmp_path / 'run'
    stats = linear.main(flags(data, trained, '--epochs', '1', '--lr', '.1', '1', '--output-dir', str(run)))
    results = predicted(data, run / 'classifier.pth')
    hits = sum(result[0]['class'] == ('cat' if i < 4 else 'dog') for i, result in enumerate(results))
    assert 100 * hits / 8 == stats['test_acc1']
    for name in ('linear.pth', 'checkpoint.pth'):
        with pytest.raises(InputError, match=r'a linear classifier alone, .* classifier\.pth beside it, or python'):
            predicted(data, run / name)
    with pytest.raises(InputError, match='a linear classifier alone'):
        main.main(['--eval', '--resume', str(run / 'linear.pth'), '--model', 'xcit_test', '--data-set', 'FOLDER',
                   '--data-path', str(data), '--device', 'cpu', '--num-workers', '0'])


@pytest.mark.parametrize(('more', 'kept', 'message'), [
    ([], 2, 'linear.pth: epoch 2, the last, --lr 0.1, Acc@1 40.000; epoch 1 was better, with 90.000: --keep-best'),
    (['--keep-best'], 1, 'linear.pth: epoch 1, the best, --lr 0.1, Acc@1 90.000')])
def test_best_epoch_is_kept(saved, tmp_path, monkeypatch, capsys, more, kept, message):
    """linear.pth is of the last epoch, which a line names, or of the best with --keep-best; also after a resume."""
    weights, accuracy = [], iter([10., 90., 40.])

    def test(lrs, linears, val, device):
        weights.append(linears.layers[0].weight.detach().clone())
        return {.1: {'acc1': next(accuracy), 'acc5': 95., 'loss': 1.}}

    monkeypatch.setattr(linear, 'test', test)
    flags_ = from_files(saved, '--lr', '.1', '--epochs', '3', '--output-dir', str(tmp_path), *more)
    with pytest.raises(RuntimeError, match='stopped at'):
        linear.main([*flags_, '--stop-after-epochs', '2'])
    (tmp_path / 'linear.pth').unlink()
    linear.main([*flags_, '--resume', 'auto'])
    assert message in capsys.readouterr().out
    layer = torch.load(tmp_path / 'checkpoint.pth')['kept']['layer']
    assert torch.equal(layer['weight'], weights[kept])


def test_evaluation_needs_no_training_features(saved, tmp_path):
    """--evaluate with --val-features alone matches classes by name, for any order in either file."""
    linear.main(from_files(saved, '--epochs', '2', '--output-dir', str(tmp_path / 'run')))
    evaluate = ['--device', 'cpu', '--evaluate', '--linear-weights', str(tmp_path / 'run' / 'linear.pth')]
    expected = linear.main(from_files(saved, *evaluate))
    val = features.read(saved[1], '')
    features.write(tmp_path / 'val.npz', Features(val.features, 9 - val.labels, val.classes[::-1]))
    for path in (saved[1], str(tmp_path / 'val.npz')):
        assert linear.main([*evaluate, '--val-features', path]) == expected
    features.write(tmp_path / 'val.npz', Features(val.features, val.labels, [*val.classes[:9], 'emu']))
    with pytest.raises(InputError, match='has 1 class that the training images lack: emu'):
        linear.main([*evaluate, '--val-features', str(tmp_path / 'val.npz')])


def test_evaluation_takes_the_view_of_training(data, trained, tmp_path, capsys):
    """The size and normalisation of the images come from the classifier's file; a flag has priority, with a warning."""
    stats = linear.main(flags(data, trained, '--epochs', '1', '--input-size', '48', '--mean', '.1', '.2', '.3',
                              '--output-dir', str(tmp_path)))
    evaluate = flags(data, trained, '--evaluate', '--linear-weights', str(tmp_path / 'linear.pth'))
    assert linear.main(evaluate)['loss'] == pytest.approx(stats['test_loss'], rel=1e-6)
    assert 'Warning' not in capsys.readouterr().out
    linear.main([*evaluate, '--input-size', '32'])
    assert 'the classifier was trained with --input-size 48, not 32' in capsys.readouterr().out


def test_classes_in_another_order_are_refused(saved, tmp_path):
    """A classifier for another order of classes is an error."""
    linear.main(from_files(saved, '--epochs', '1', '--output-dir', str(tmp_path / 'run')))
    for path in saved:
        rows = features.read(path, '')
        features.write(tmp_path / Path(path).name, Features(rows.features, rows.labels, rows.classes[::-1]))
    with pytest.raises(InputError, match='is for other classes'):
        linear.main(from_files((str(tmp_path / 'train.npz'), str(tmp_path / 'val.npz')), '--evaluate',
                               '--linear-weights', str(tmp_path / 'run' / 'linear.pth')))


def test_classifier_of_a_finished_run_is_saved(data, trained, tmp_path):
    """--save-classifier works on a finished run."""
    flags_ = flags(data, trained, '--epochs', '1', '--output-dir', str(tmp_path / 'run'))
    stats = linear.main(flags_)
    again = linear.main([*flags_, '--resume', 'auto', '--save-classifier', str(tmp_path / 'model.pth')])
    assert again['test_acc1'] == stats['test_acc1']
    assert (tmp_path / 'model.pth').exists()


def test_subset_of_imagenet_keeps_its_labels(tmp_path):
    """k-NN works on a part of ImageNet's classes, whose labels are indices among all 1000."""
    for split, count in (('train', 3), ('val', 2)):
        for name in ('n02123045', 'n02504458'):
            for i in range(count):
                write_image(tmp_path / 'imagenet' / split / name / f'{i}.JPEG', seed=i)
    small_dino.main(['--device', 'cpu', '--num-workers', '0', '--batch-size', '2', '--epochs', '1', '--warmup-epochs',
                     '1', '--arch', 'xcit_test', '--out-dim', '16', '--global-crops-size', '32', '--output-dir',
                     str(tmp_path / 'run'), '--local-crops-number', '0', '--data-path',
                     str(tmp_path / 'imagenet' / 'train'), '--knn-every', '1', '--knn-data-set', 'IMNET',
                     '--knn-data-path', str(tmp_path / 'imagenet'), '--nb-knn', '2', '--knn-images', '4'])
    assert 'knn_top1' in json.loads((tmp_path / 'run' / 'log.txt').read_text())


def test_published_classifiers_are_read(tmp_path, monkeypatch, data):
    """The original's files are read; a model without a published classifier is an error."""
    model = 'xcit_small_12_p16'
    torch.save({'epoch': 100, 'state_dict': {'module.linear.weight': torch.randn(1000, 384),
                                             'module.linear.bias': torch.randn(1000)}, 'best_acc': 77.8,
                'optimizer': {'state': {0: {'momentum_buffer': torch.zeros(1000, 384)}}}}, tmp_path / 'linear.pth')
    monkeypatch.setitem(xcit_zoo.DINO_LINEAR, model, (tmp_path / 'linear.pth').as_uri())
    layer, content = classifiers.read(classifiers.TAG, model)
    assert torch.equal(layer.weight, content['state_dict']['module.linear.weight'])
    with pytest.raises(InputError, match='not published for xcit_nano_12_p8; published for xcit_small_12_p16'):
        classifiers.read(classifiers.TAG, 'xcit_nano_12_p8')


def test_published_addresses():
    """The URL of a published classifier is the original's."""
    assert xcit_zoo.DINO_LINEAR['xcit_small_12_p8'] == ('https://dl.fbaipublicfiles.com/dino/'
                                                        'dino_xcit_small_12_p8_pretrain/'
                                                        'dino_xcit_small_12_p8_linearweights.pth')


# ---------------------------------------------------------------------------------------------------------------------
# Bad input

def test_more_neighbours_than_images_are_refused(data, trained, saved, monkeypatch):
    """--nb-knn above the number of training images is an error, before any extraction."""
    with pytest.raises(InputError, match='--nb-knn 10 501: there are 500 training images, less than 501 neighbours'):
        knn.main(from_files(saved, '--nb-knn', '10', '501'))
    monkeypatch.setattr(features, 'extract', None)
    with pytest.raises(InputError, match='there are 16 training images, less than 17 neighbours'):
        knn.main(flags(data, trained, '--nb-knn', '17'))


@pytest.mark.parametrize('program', [knn, linear])
@pytest.mark.parametrize(('options', 'message'), [
    ([], '--pretrained: is needed, or --train-features'),
    (['--train-features', 'a.npz'], '--train-features a.npz: needs --val-features'),
    (['--val-features', 'a.npz'], '--val-features a.npz: needs --train-features'),
    (['--train-features', 'a.npz', '--val-features', 'b.npz'], '--train-features a.npz: no such file'),
    (['--train-features', 'a.txt', '--val-features', 'b.txt'], 'must end in .npz or .safetensors'),
    (['--train-features', 'a.npz', '--val-features', 'b.npz', '--pretrained', 'x.pth'], '--pretrained: has no'),
    (['--train-features', 'a.npz', '--val-features', 'b.npz', '--data-set', 'SAMPLE'], '--data-set: has no effect'),
    (['--pretrained', '/nowhere.pth'], '--pretrained /nowhere.pth: no such file'),
    (['--pretrained', 'fb_dino', '--amp', 'fp16'], '--amp fp16: needs cuda'),
    (['--pretrained', 'fb_dino', '--arch', 'xcit_nano_12_p8'], 'no such file; tags of xcit_nano_12_p8'),
    (['--pretrained', 'fb_dino', '--arch', 'xcit_smal_12_p8'], 'no such model'),
    (['--pretrained', 'fb_dino', '--arch', 'xcit_small_12_p8', '--data-set', 'X'], '--data-set X: must be one of'),
], ids=lambda value: ' '.join(value) if isinstance(value, list) else '')
def test_bad_input(tmp_path, monkeypatch, program, options, message):
    """An invalid flag is one line, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        program.main(['--device', 'cpu', *options])
    assert message in str(caught.value)
    assert '\n' not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(('options', 'message'), [
    (['--evaluate'], '--evaluate: needs --linear-weights'),
    (['--linear-weights', 'fb_dino_linear'], 'has no effect without --evaluate'),
    (['--evaluate', '--linear-weights', 'x.pth'], '--linear-weights x.pth: no such file'),
    (['--evaluate', '--linear-weights', __file__, '--keep-best'], '--keep-best: has no effect with --evaluate'),
    (['--lr', '.1', '.1'], '--lr 0.1 0.1: has a value twice'),
    (['--num-labels', '1000'], '--num-labels 1000: the data have 10 classes'),
    (['--save-classifier', 'x.pth'], '--save-classifier x.pth: needs a backbone'),
], ids=lambda value: ' '.join(value) if isinstance(value, list) else '')
def test_bad_input_of_linear(saved, tmp_path, monkeypatch, options, message):
    """An invalid flag of dino.linear is an error, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        linear.main(from_files(saved, *options))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(('change', 'message'), [
    (lambda f: f.update(labels=f['labels'][:-1]), "do not match"),
    (lambda f: f.update(features=f['features'] * np.nan), 'not finite'),
    (lambda f: f.pop('labels'), 'has no labels'),
    (lambda f: f.pop('features'), 'has no features'),
    (lambda f: f.update(labels=f['labels'] + 100), 'labels are from 100'),
    (lambda f: f.update(labels=f['labels'] + .5), 'some labels are not whole numbers'),
    (lambda f: f.update(labels=f['labels'] * 0), r'odd\.npz: has one class \(class 0\); a classifier needs two'),
    (lambda f: f.update(labels=np.array(['emu'] * 500)), r'not among its classes: emu'),
    (lambda f: f.update(labels=np.array(['emu'] * 500, dtype=object)), r'Python objects; .* dtype=str'),
])
def test_odd_files_of_features_are_refused(saved, tmp_path, change, message):
    """A file of features with missing or invalid arrays is refused with the problem."""
    arrays = dict(np.load(saved[0]))
    change(arrays)
    np.savez(tmp_path / 'odd.npz', **arrays)
    with pytest.raises(InputError, match=message):
        knn.main(from_files((str(tmp_path / 'odd.npz'), saved[1])))


@pytest.mark.parametrize('kind', ['U', 'S'])
def test_labels_may_be_words(saved, tmp_path, kind):
    """Labels as text, or as bytes, are the classes of both files."""
    for path, some in zip(saved, (slice(None), slice(1, None))):  # class 0 is not first among the test images
        arrays = dict(np.load(path))
        words = arrays.pop('classes')[arrays['labels']]
        np.savez(tmp_path / Path(path).name, features=arrays['features'][some], labels=words.astype(kind)[some])
    own, expected = (features.read(str(path), '') for path in (tmp_path / 'train.npz', saved[0]))
    assert own.classes == expected.classes
    assert torch.equal(own.labels, expected.labels)
    results = knn.main(from_files((str(tmp_path / 'train.npz'), str(tmp_path / 'val.npz')), '--nb-knn', '20'))
    assert results['results']['20']['top1'] == pytest.approx(62., abs=.5)


def test_truncated_file_of_features_is_refused(saved, tmp_path):
    """A truncated file of features is refused as damaged."""
    (tmp_path / 'cut.npz').write_bytes(Path(saved[0]).read_bytes()[:-100])
    with pytest.raises(InputError, match='damaged, or not a file of features'):
        knn.main(from_files((str(tmp_path / 'cut.npz'), saved[1])))


@pytest.mark.parametrize(('program', 'data_set'), [(knn, 'FOLDER'), (linear, 'FOLDER'), (knn, 'IMNET')])
def test_one_class_is_refused(tmp_path, trained, monkeypatch, program, data_set):
    """Pictures of one class are an error before any extraction, also as one of ImageNet's 1000 classes."""
    write_folders(tmp_path / 'data', classes=('n01440764',), per_class=2)
    monkeypatch.setattr(features, 'extract', None)
    with pytest.raises(InputError, match=r'data-path .*data: has one class \(n01440764\); a classifier needs two'):
        program.main([*flags(tmp_path / 'data', trained), '--data-set', data_set])


@pytest.mark.parametrize('folders', [['.'], ['train', 'val']])
def test_flat_folder_is_refused_with_a_remedy(tmp_path, trained, folders):
    """Pictures that are not in class folders are refused, without the advice of a flag that can't help."""
    for folder in folders:
        write_image(tmp_path / 'data' / folder / '0.png')
    with pytest.raises(InputError, match=r'labelled pictures are needed, in a folder for each class$') as caught:
        knn.main(flags(tmp_path / 'data', trained))
    assert 'val-fraction' not in str(caught.value)


def test_test_classes_that_training_lacks_are_refused(saved, tmp_path):
    """Test features of a class without training features are refused with the class."""
    val = features.read(saved[1], '')
    features.write(tmp_path / 'val.npz', Features(val.features, val.labels, [*val.classes[:-1], 'emu']))
    with pytest.raises(InputError, match='has 1 class that the training images lack: emu'):
        knn.main(from_files((saved[0], str(tmp_path / 'val.npz')), '--nb-knn', '3'))


def test_other_weights_are_refused_with_the_names(data, tmp_path):
    """Weights of another model are an error."""
    torch.save(timm.create_model('xcit_nano_12_p16', num_classes=0).state_dict(), tmp_path / 'nano.pth')
    with pytest.raises(InputError, match='checkpoint is xcit_nano_12_p16, --model is xcit_nano_12_p8'):
        knn.main(flags(data, tmp_path / 'nano.pth', '--arch', 'xcit_nano_12_p8'))


def test_safetensors_backbone_describes_itself(data, trained, tmp_path):
    """The metadata of a backbone's .safetensors file name its model."""
    content = torch.load(trained)
    tensors = {key.removeprefix('module.backbone.'): value for key, value in content['teacher'].items()
               if key.startswith('module.backbone.')}
    path = tmp_path / 'backbone.safetensors'
    safetensors.torch.save_file(tensors, path, metadata=checkpoints.metadata_of({'args': content['args']}))
    results = knn.main(flags(data, path, '--nb-knn', '3'))
    assert results['model'] == 'xcit_test'
    assert math.isfinite(results['results']['3']['top1'])
