"""The whole program as `main([...])` on tiny class folders."""
import argparse
import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import List, Tuple

import numpy as np
import pytest
import timm
import torch
import torchvision
from conftest import ROOT, tiniest, write_folders
from PIL import Image
from resuming import log_lines, state
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import datasets
import weights
from classification import evaluation, preview, recipe
from inference import timm_files
from loaders import samples
from loaders.batches import build_train_loader
from loaders.source import Source
from loaders.transforms import ToNormalizedTensor
from main import main, parse_args
from run import checkpoints
from run.position import Epochs
from run.settings import Loading
from run.training import Run


def assert_same_training(own: dict, other: dict):
    """Assert that model, EMA, optimizer and accuracies are bitwise equal."""
    for key in ('model', 'model_ema', 'optimizer', 'accuracy', 'epoch'):
        torch.testing.assert_close(own[key], other[key], rtol=0, atol=0)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A finished run of 2 epochs: (data, output directory, statistics)."""
    data = write_folders(tmp_path_factory.mktemp('data'))
    output_dir = tmp_path_factory.mktemp('runs') / 'run'
    stats = main(tiniest(data, '--output-dir', str(output_dir)))
    return data, output_dir, stats


# ----- files of a run

def test_log_has_a_line_for_each_epoch(trained):
    """A line has losses, rates, accuracies of the model and of its EMA, speed and memory."""
    lines = log_lines(trained[1])
    assert [line['epoch'] for line in lines] == [0, 1]
    expected = {'train_loss', 'train_lr', 'train_grad_norm', 'train_images_per_s', 'train_data_s', 'train_memory_mb',
                'test_acc1', 'test_acc5', 'test_loss', 'test_ema_acc1', 'epoch', 'n_parameters'}
    assert expected <= set(lines[0])
    assert all(math.isfinite(value) for value in lines[0].values())


def test_tensorboard_has_curves_flags_and_images(trained):
    """TensorBoard has scalars of both epochs, the flags as text and one grid of training images."""
    events = EventAccumulator(str(trained[1] / 'tb')).Reload()
    curves = {'train/loss', 'train/lr', 'train/grad_norm', 'train/images_per_s', 'train/memory_mb', 'test/acc1',
              'test/ema_acc1'}
    assert curves <= set(events.Tags()['scalars'])
    assert [event.step for event in events.Scalars('test/acc1')] == [0, 1]
    assert events.Tags()['tensors'] == ['args/text_summary']
    image = events.Images('train/images')[0]
    assert (image.width, image.height) == Image.open(trained[1] / 'preview.png').size


def test_preview_has_the_originals(folders):
    """The preview has each picture beside the image that the model receives, with its own colours."""
    dataset, _ = datasets.load(Source('FOLDER', str(folders)), is_train=True)
    normalise = ToNormalizedTensor((.5, .4, .3), (.1, .2, .3))
    loader = build_train_loader(dataset.with_transform(normalise), Loading(4, torch.device('cpu'), num_workers=0))
    page = np.asarray(preview.sheet(dataset, loader, 4, normalise))
    assert page.shape[1] == 4 * 96 + 3 * 8
    picture = Image.open(dataset.files()[loader.first_indices(4)[0]])
    assert np.array_equal(page[:96, :96], np.asarray(picture.resize((96, 96), Image.Resampling.BICUBIC)))
    assert np.array_equal(page[:96, 104:200], np.asarray(picture).repeat(3, axis=0).repeat(3, axis=1))


def test_args_json_describes_the_run(trained):
    """args.json has flags, derived values and the versions of the libraries."""
    written = json.loads((trained[1] / 'args.json').read_text())
    assert written['args']['model'] == 'xcit_test'
    assert written['derived']['num_classes'] == 2
    assert written['environment']['torch'] == torch.__version__
    assert set(written['environment']) == {'python', 'torch', 'torchvision', 'timm', 'numpy', 'git'}


def test_checkpoint_holds_everything(trained):
    """Both files load without Python objects and have all parts that a resume needs."""
    for name in ('checkpoint.pth', 'best_model.pth'):
        content = state(trained[1], name)
        content |= content.pop('replaced', {})
        assert set(content) == {'model', 'model_ema', 'optimizer', 'lr_scheduler', 'scaler', 'epoch', 'step',
                                'averages', 'batch', 'seconds', 'accuracy', 'classes', 'args'}
        assert isinstance(content['args'], dict)
    assert not list(trained[1].glob('*.tmp'))


def test_best_model_is_the_best(tmp_path, folders):
    """`best_model.pth` is of the epoch with the highest accuracy, the latest among equal ones."""
    main(tiniest(folders, '--output-dir', str(tmp_path / 'run'), '--epochs', '4'))
    accuracies = [line['test_acc1'] for line in log_lines(tmp_path / 'run')]
    best = state(tmp_path / 'run', 'best_model.pth')
    assert best['epoch'] == max(range(4), key=lambda epoch: (accuracies[epoch], epoch))
    assert best['accuracy']['best'] == max(accuracies)


def test_next_command_evaluates_the_best_model(tmp_path, folders, capsys):
    """The command at the end of a run computes the accuracy of the run."""
    main(tiniest(folders, '--output-dir', str(tmp_path / 'run'), '--full_crop'))
    command = capsys.readouterr().out.splitlines()[-2].split()
    assert command[:2] == ['python', 'main.py']
    stats = main([*command[2:], '--device', 'cpu', '--num-workers', '0'])
    accuracy = state(tmp_path / 'run')['accuracy']
    assert stats['acc1'] == max(accuracy['best'], accuracy['best_ema'])


@pytest.fixture(scope='module', params=['best', 'best_ema'])
def better(request, tmp_path_factory) -> Tuple[str, Path, Path]:
    """A run of an epoch whose model, or whose EMA, is the better one: (better one, data, folder)."""
    folder = tmp_path_factory.mktemp('better')
    data = write_folders(folder / 'data')
    metrics = {'test_acc1': 50., 'test_acc5': 100., 'test_loss': 1.,
               'test_ema_acc1': 75. if request.param == 'best_ema' else 25.}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, 'evaluate_with_ema', lambda *args, **kwargs: (metrics, {}))
        main(tiniest(data, '--epochs', '1', '--model-ema-decay', '.5', '--output-dir', str(folder / 'run')))
    return request.param, data, folder / 'run'


def test_best_file_has_the_better_weights(better):
    """`model` of best_model.pth is the better one of model and EMA, for this code and timm; both can be chosen."""
    name, _, run = better
    own = {flag: weights.read(str(run / 'checkpoint.pth'), '', use_ema=flag).tensors for flag in (False, True)}
    best, key = str(run / 'best_model.pth'), 'cls_token'
    assert not torch.equal(own[False][key], own[True][key])
    assert torch.equal(weights.read(best, '').tensors[key], own[name == 'best_ema'][key])
    assert torch.equal(timm.models.load_state_dict(best)[key], own[name == 'best_ema'][key])
    assert torch.equal(weights.read(best, '', use_ema=True).tensors[key], own[True][key])
    if name == 'best_ema':
        assert torch.equal(weights.read(best, '', key='replaced.model').tensors[key], own[False][key])


def test_best_file_is_resumed(better, tmp_path):
    """A run resumed from best_model.pth is bitwise the run resumed from checkpoint.pth of the same epoch."""
    _, data, run = better
    for name in ('checkpoint.pth', 'best_model.pth'):
        main(tiniest(data, '--epochs', '2', '--model-ema-decay', '.5', '--resume', str(run / name), '--output-dir',
                     str(tmp_path / name)))
    assert_same_training(*(state(tmp_path / name) for name in ('checkpoint.pth', 'best_model.pth')))


def test_measured_accuracy_is_that_of_the_weights(better):
    """The measured accuracy of weights in best_model.pth is that of the chosen ones, also in a converted file."""
    name, _, run = better
    accuracies = {'best': 50, 'best_ema': 75 if name == 'best_ema' else 25}
    for use_ema, expected in ((False, accuracies[name]), (True, accuracies['best_ema'])):
        given = weights.read(str(run / 'best_model.pth'), '', use_ema=use_ema)
        measured = {'last': expected, 'last_epoch': 0, 'images': 8}
        assert timm_files.accuracy_of(given) == {'accuracy': measured}
        converted = {'model': given.tensors, **timm_files.describe(given, 'xcit_test', None)}
        assert timm_files.accuracy_of(weights.extract(converted, '')) == {'accuracy': measured}


def test_accuracy_of_changed_weights_is_unknown(better):
    """Weights that were trained after their evaluation have no measured accuracy."""
    given = weights.read(str(better[2] / 'checkpoint.pth'), '')
    for change in ({'step': 2}, {'epoch': 1}, {'accuracy': None}):
        assert timm_files.accuracy_of(dataclasses.replace(given, checkpoint={**given.checkpoint, **change})) == {}


# ----- resuming

@pytest.mark.parametrize('more', [
    ['--sched', 'plateau', '--patience-epochs', '0', '--cooldown-epochs', '1', '--mixup', '0', '--cutmix', '0'],
    ['--opt', 'sgd', '--accum-iter', '3', '--batch-size', '2', '--no-repeated-aug', '--lr-noise', '0.1', '1.0'],
], ids=['plateau', 'accumulation'])
def test_resumed_run_is_the_uninterrupted_one(tmp_path, folders, monkeypatch, more):
    """--sched plateau, and accumulation with --lr-noise, resume bitwise after a kill at the end of an epoch."""
    flags = tiniest(folders, *more, '--epochs', '4')
    main([*flags, '--output-dir', str(tmp_path / 'whole')])

    save = checkpoints.save_checkpoint

    def save_and_die(content, path, **kwargs):
        save(content, path, **kwargs)
        if content['epoch'] == 1 and path.name == 'checkpoint.pth':
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, 'save_checkpoint', save_and_die)
    with pytest.raises(KeyboardInterrupt):
        main([*flags, '--output-dir', str(tmp_path / 'parts')])
    monkeypatch.undo()
    main([*flags, '--output-dir', str(tmp_path / 'parts'), '--resume', 'auto'])
    assert_same_training(state(tmp_path / 'parts'), state(tmp_path / 'whole'))
    assert [line['epoch'] for line in log_lines(tmp_path / 'parts')] == [0, 1, 2, 3]
    for line, expected in zip(log_lines(tmp_path / 'parts'), log_lines(tmp_path / 'whole'), strict=True):
        assert (line['train_loss'], line['train_lr']) == (expected['train_loss'], expected['train_lr'])


def test_resume_reads_the_given_file(tmp_path, trained):
    """--resume PATH continues from PATH, not from a file in the output folder."""
    data, run, _ = trained
    stats = main(tiniest(data, '--epochs', '3', '--resume', str(run / 'checkpoint.pth'),
                      '--output-dir', str(tmp_path / 'other')))
    assert stats['epoch'] == 2
    assert [line['epoch'] for line in log_lines(tmp_path / 'other')] == [2]


def test_resume_reads_a_url(trained, monkeypatch, tmp_path):
    """--resume URL downloads to torch.hub's cache."""
    data, run, _ = trained
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    url = (run / 'checkpoint.pth').as_uri()
    assert main(tiniest(data, '--eval', '--resume', url))['acc1'] == log_lines(run)[-1]['test_acc1']


def test_resume_auto_in_an_empty_folder(tmp_path, folders, capsys):
    """In an empty folder --resume auto is a fresh start, which is logged."""
    stats = main(tiniest(folders, '--epochs', '1', '--output-dir', str(tmp_path / 'new'), '--resume', 'auto'))
    assert stats['epoch'] == 0
    assert 'a fresh start' in capsys.readouterr().out


def test_original_training_checkpoints_can_be_read(tmp_path, trained):
    """The original's files, with an argparse.Namespace beside the weights, can be evaluated."""
    data, run, _ = trained
    torch.save({'model': state(run)['model'], 'args': argparse.Namespace(lr=1.)}, tmp_path / 'original.pth')
    stats = main(tiniest(data, '--eval', '--resume', str(tmp_path / 'original.pth')))
    assert stats['acc1'] == log_lines(run)[-1]['test_acc1']


def test_flags_of_the_resuming_command_count(tmp_path, trained):
    """A resumed optimizer has the stored state and the options of the command line."""
    data, run, _ = trained
    main(tiniest(data, '--epochs', '3', '--weight-decay', '.5', '--resume', str(run / 'checkpoint.pth'),
              '--output-dir', str(tmp_path / 'run')))
    groups = state(tmp_path / 'run')['optimizer']['param_groups']
    assert [group['weight_decay'] for group in groups] == [0., .5]


def test_fused_optimizer_resumes_from_an_unfused_one(tmp_path, trained):
    """Older checkpoints without `fused` are resumed by the fused optimizer."""
    data, run, _ = trained
    content = state(run)
    for group in content['optimizer']['param_groups']:
        assert group.pop('fused')
    torch.save(content, tmp_path / 'old.pth')
    main(tiniest(data, '--epochs', '3', '--resume', str(tmp_path / 'old.pth'), '--output-dir', str(tmp_path / 'run')))
    optimizer = state(tmp_path / 'run')['optimizer']
    assert [group['fused'] for group in optimizer['param_groups']] == [True, True]
    assert optimizer['state'][0]['step'] == 12


def test_resuming_elsewhere_keeps_the_other_run(tmp_path, trained):
    """--resume A/checkpoint.pth --output-dir B sets B's files aside."""
    data, run, _ = trained
    other = tmp_path / 'other'
    main(tiniest(data, '--epochs', '1', '--seed', '3', '--output-dir', str(other)))
    before = (other / 'checkpoint.pth').read_bytes()
    main(tiniest(data, '--epochs', '3', '--resume', str(run / 'checkpoint.pth'), '--output-dir', str(other)))
    assert (other / 'previous-1' / 'checkpoint.pth').read_bytes() == before
    assert [line['epoch'] for line in log_lines(other)] == [2]


def test_half_a_line_in_the_log_is_dropped(tmp_path, folders):
    """A line that a crash has cut short is removed by a resumed run."""
    run = tmp_path / 'run'
    flags = tiniest(folders, '--output-dir', str(run))
    main([*flags, '--epochs', '1'])
    with open(run / 'log.txt', 'a') as file:
        file.write('{"train_loss": 0.')
    main([*flags, '--resume', 'auto'])
    assert [line['epoch'] for line in log_lines(run)] == [0, 1]


def test_full_precision_checkpoint_is_resumed_with_a_scaler(trained):
    """The empty state of a disabled scaler leaves an enabled one at its initial scale."""
    args = parse_args(tiniest(trained[0]))
    model = weights.ModelPart(timm.create_model(args.model, num_classes=2))
    scaler = torch.amp.GradScaler('cpu', enabled=True)
    Run(args, Epochs(args.epochs), {'model': model, 'scaler': scaler}).load(state(trained[1]), 'checkpoint')
    assert scaler.get_scale() == 2 ** 16


# ----- evaluation

def test_eval_writes_json(trained, tmp_path):
    """eval.json has accuracies, loss, speed, model, weights, resolution and crop."""
    data, run, _ = trained
    main(tiniest(data, '--eval', '--resume', str(run / 'checkpoint.pth'), '--output-dir', str(tmp_path / 'eval')))
    written = json.loads((tmp_path / 'eval' / 'eval.json').read_text())
    last = log_lines(run)[-1]
    assert (written['acc1'], written['acc5'], written['loss']) == (
        last['test_acc1'], last['test_acc5'], last['test_loss'])
    assert written['images_per_s'] > 0
    assert written['model'] == 'xcit_test'
    assert written['weights'] == str(run / 'checkpoint.pth')
    assert (written['resolution'], written['crop']) == ([32, 32], 1.)
    assert written['environment']['torch'] == torch.__version__


def test_eval_of_pretrained_weights(trained):
    """--eval --pretrained evaluates the weights."""
    data, run, _ = trained
    stats = main(tiniest(data, '--eval', '--pretrained', str(run / 'checkpoint.pth')))
    assert stats['acc1'] == log_lines(run)[-1]['test_acc1']


@pytest.fixture
def compiled(monkeypatch) -> List[Tuple[str, str]]:
    """Class and mode of each compiled module; compilation without code generation, which would take a minute."""
    modules = []
    compile_module = torch.nn.Module.compile

    def compile_eagerly(module, mode='default'):
        modules.append((type(module).__name__, mode))
        compile_module(module, backend='aot_eager')

    monkeypatch.setattr(torch.nn.Module, 'compile', compile_eagerly)
    return modules


def test_evaluation_can_be_compiled(folders, compiled):
    """A compiled evaluation has the requested mode and equal results."""
    flags = tiniest(folders, '--eval', '--model', 'xcit_test')
    stats, eager = main([*flags, '--compile', '--compile-mode', 'max-autotune']), main(flags)
    assert stats['loss'] == pytest.approx(eager['loss'], rel=1e-5)
    assert stats['acc1'] == eager['acc1']
    assert compiled == [('Xcit', 'max-autotune')]


def test_training_can_be_compiled(folders, compiled, monkeypatch):
    """Model, EMA and teacher are compiled, and the losses are equal."""
    monkeypatch.setattr('classification.teacher.build',
                        lambda name, classes, **options: timm.create_model('xcit_test', num_classes=classes))
    flags = tiniest(folders, '--model', 'xcit_test', '--epochs', '1', '--distillation-type', 'soft',
                 '--teacher-path', __file__)
    eager = main(flags)
    stats = main([*flags, '--compile', '--compile-mode', 'max-autotune'])
    assert stats['train_loss'] == pytest.approx(eager['train_loss'], rel=1e-4)
    assert stats['test_ema_loss'] == pytest.approx(eager['test_ema_loss'], rel=1e-4)
    assert compiled == [('Xcit', 'max-autotune'), ('Xcit', 'max-autotune'), ('Xcit', 'default')]


def test_ema_in_cpu_memory_is_not_compiled(folders, compiled):
    """An EMA in CPU memory is not compiled: each evaluation makes a copy on the model's device."""
    main(tiniest(folders, '--model', 'xcit_test', '--epochs', '1', '--model-ema-force-cpu', '--compile'))
    assert compiled == [('Xcit', 'default')]


def test_test_freq_skips_evaluations(tmp_path, folders):
    """--test-freq 3 evaluates every third epoch, and the last one."""
    main(tiniest(folders, '--epochs', '5', '--test-freq', '3', '--output-dir', str(tmp_path / 'run')))
    tested = ['test_acc1' in line for line in log_lines(tmp_path / 'run')]
    assert tested == [True, False, False, True, True]


# ----- options

@pytest.mark.parametrize('more', [
    ['--clip-grad', '1.0'],
    ['--model-ema-force-cpu'],
    ['--no-model-ema'],
    ['--accum-iter', '2'],
    ['--grad-checkpointing', '--deterministic'],
    ['--resplit', '--reprob', '1'],
    ['--amp', 'bf16'],
    ['--mixup', '0', '--smoothing', '0'],
    ['--cutmix-minmax', '0.2', '0.8'],
    ['--mixup-mode', 'elem', '--no-repeated-aug'],
    ['--sched', 'step', '--opt', 'lamb'],
    ['--model', 'resnet18'],
], ids=' '.join)
def test_option_trains(folders, more):
    """Training with each option has a finite loss, and metrics of the EMA unless --no-model-ema is given."""
    stats = main(tiniest(folders, '--epochs', '1', *more))
    assert math.isfinite(stats['train_loss'])
    assert ('test_ema_acc1' in stats) == ('--no-model-ema' not in more)


@pytest.mark.parametrize('flag', ['--resplit', '--no-resplit'])
def test_resplit_reaches_the_batches(folders, monkeypatch, flag):
    """Random erasing of whole batches is applied to every batch under --resplit, otherwise to none."""
    erased, erase = [], samples.CleanHalfErasing.__call__

    def recorded(self, batch):
        erased.append(len(batch))
        return erase(self, batch)

    monkeypatch.setattr(samples.CleanHalfErasing, '__call__', recorded)
    main(tiniest(folders, '--epochs', '1', '--no-repeated-aug', flag))
    assert erased == ([4] * 4 if flag == '--resplit' else [])


def test_pretrained_head_of_other_classes_is_left_out(tmp_path, folders, trained, capsys):
    """Weights for 2 classes start a run for 3 without their head, which is logged."""
    data = write_folders(tmp_path / 'three', classes=('a', 'b', 'c'))
    main(tiniest(data, '--epochs', '1', '--lr', '1e-12', '--warmup-lr', '0', '--min-lr', '0', '--output-dir',
              str(tmp_path / 'run'), '--pretrained', str(trained[1] / 'checkpoint.pth')))
    assert 'are for 2 classes, not 3: all but the head is loaded' in capsys.readouterr().out
    own, given = state(tmp_path / 'run')['model'], state(trained[1])['model']
    torch.testing.assert_close(own['blocks.0.mlp.fc1.weight'], given['blocks.0.mlp.fc1.weight'])
    assert own['head.weight'].shape == (3, 16)


def test_surgery_copies_and_freezes_the_stem(tmp_path, folders, trained):
    """The stem, statistics included, stays bitwise that of --surgery."""
    source = trained[1] / 'checkpoint.pth'
    main(tiniest(folders, '--surgery', str(source), '--output-dir', str(tmp_path / 'run'), '--seed', '5'))
    own, given = state(tmp_path / 'run')['model'], state(trained[1])['model']
    stem = {key for key in own if key.startswith('patch_embed.')}
    assert len(stem) == 24
    assert all(torch.equal(own[key], given[key]) for key in stem)
    assert not torch.equal(own['blocks.0.mlp.fc1.weight'], given['blocks.0.mlp.fc1.weight'])


@pytest.mark.parametrize('kind', ['soft', 'hard'])
def test_distillation_trains(folders, tmp_path, kind):
    """A timm teacher from a file changes the loss."""
    teacher = timm.create_model('resnet18', num_classes=2)
    torch.save({'model': teacher.state_dict()}, tmp_path / 'teacher.pth')
    flags = tiniest(folders, '--epochs', '1', '--distillation-type', kind, '--teacher-model', 'resnet18',
                 '--teacher-path', str(tmp_path / 'teacher.pth'))
    own, plain = main([*flags, '--distillation-alpha', '.9']), main([*flags, '--distillation-alpha', '0'])
    assert math.isfinite(own['train_loss'])
    assert own['train_loss'] != plain['train_loss']


def test_teacher_of_other_images(folders, tmp_path, capsys):
    """The images of a teacher get its size and normalisation; the flags have priority."""
    teacher = timm.create_model('vit_tiny_patch16_224', num_classes=2).eval()
    torch.save(teacher.state_dict(), tmp_path / 'teacher.pth')
    flags = tiniest(folders, '--distillation-type', 'hard', '--teacher-model', 'vit_tiny_patch16_224',
                    '--teacher-path', str(tmp_path / 'teacher.pth'))
    pixels = torch.rand(2, 3, 32, 32)
    normalize = torchvision.transforms.Normalize
    resized = torch.nn.functional.interpolate(normalize(*[(.5,) * 3] * 2)(pixels), 224, mode='bicubic', antialias=True)
    images = normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)(pixels)
    adapted = recipe.build_criterion(parse_args(flags), 2).teacher
    torch.testing.assert_close(adapted(images), teacher(resized), rtol=1e-4, atol=1e-4)
    out = capsys.readouterr().out
    assert 'its images are resized to 224 x 224 pixels and normalised by mean (0.5, 0.5, 0.5)' in out
    args = parse_args([*flags, '--teacher-mean', *map(str, IMAGENET_DEFAULT_MEAN), '--teacher-std',
                       *map(str, IMAGENET_DEFAULT_STD)])
    resized = torch.nn.functional.interpolate(images, 224, mode='bicubic', antialias=True)
    torch.testing.assert_close(recipe.build_criterion(args, 2).teacher(images), teacher(resized), rtol=1e-4,
                               atol=1e-4)


def test_teacher_from_timm(folders, tmp_path, monkeypatch):
    """--teacher-pretrained loads timm's weights of the model."""
    teacher = timm.create_model('resnet18', num_classes=2)
    torch.save(teacher.state_dict(), tmp_path / 'resnet18.pth')
    cfg = timm.models.get_pretrained_cfg('resnet18')
    for key, value in {'num_classes': 2, 'file': str(tmp_path / 'resnet18.pth')}.items():
        monkeypatch.setattr(cfg, key, value)
    monkeypatch.setattr(timm.models._registry, '_model_pretrained_cfgs', {
        **timm.models._registry._model_pretrained_cfgs, 'resnet18': cfg,
        f'resnet18.{cfg.tag}': cfg})
    args = parse_args(tiniest(folders, '--distillation-type', 'hard', '--teacher-model', 'resnet18',
                                   '--teacher-pretrained'))
    loaded = recipe.build_criterion(args, 2).teacher
    assert torch.equal(loaded.fc.weight, teacher.fc.weight)
    assert not loaded.training


def test_seed_decides_the_run(tmp_path, folders):
    """Runs with equal seeds have bitwise equal weights, runs with different seeds have not."""
    for name, seed in (('a', '0'), ('b', '0'), ('c', '1')):
        main(tiniest(folders, '--epochs', '1', '--seed', seed, '--output-dir', str(tmp_path / name)))
    assert_same_training(state(tmp_path / 'a'), state(tmp_path / 'b'))
    assert not torch.equal(state(tmp_path / 'a')['model']['head.weight'],
                           state(tmp_path / 'c')['model']['head.weight'])


# ----- small data and the first lines

@pytest.mark.parametrize('flags', [[], ['--mixup', '0', '--cutmix', '0']])
def test_batch_size_is_lowered_to_the_number_of_pictures(folders, tmp_path, capsys, flags):
    """A batch size above the number of pictures is lowered in log, args.json and checkpoint."""
    main(tiniest(folders, '--batch-size', '64', '--epochs', '1', '--output-dir', str(tmp_path), *flags))
    assert '--batch-size 64: an epoch has 16 images per process; using batches of 16\n' in capsys.readouterr().out
    assert state(tmp_path)['batch'] == 16
    assert json.loads((tmp_path / 'args.json').read_text())['args']['batch_size'] == 16


def test_odd_number_of_pictures_under_mixup(tmp_path, capsys):
    """Mixup needs an even batch size, also if it is lowered."""
    write_folders(tmp_path / 'data', per_class=5)
    (tmp_path / 'data' / 'train' / 'cat' / '0.png').unlink()
    main(tiniest(tmp_path / 'data', '--batch-size', '64', '--epochs', '1', '--no-repeated-aug'))
    assert 'using batches of 8' in capsys.readouterr().out


def test_log_of_a_run(folders, capsys):
    """The first lines have the pace but not all flags, and each epoch is a row of a table."""
    main(tiniest(folders, '--epochs', '3', '--test-freq', '2'))
    out = capsys.readouterr().out
    assert 'Learning rate 7.81e-05 at its peak: --lr 0.01 x 4 images a step / 512\n' in out
    assert 'Namespace' not in out
    assert max(map(len, out.splitlines())) < 250
    header, *rows = [line.split() for line in out.splitlines() if re.match(r' +(epoch|\d) ', line)]
    assert header[:4] == ['epoch', 'loss', 'lr', 'Acc@1']
    assert [row[0] for row in rows] == ['0', '1', '2']
    assert [row[3] == '-' for row in rows] == [False, True, False]


def test_importing_does_nothing(tmp_path):
    """The import of every module prints nothing, parses nothing and writes nothing."""
    names = [path.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.') for pattern in ('*.py', '*/*.py')
             for path in ROOT.glob(pattern) if path.parent.name != 'tests' and path.stem != '__init__']
    result = subprocess.run([sys.executable, '-c', f'import {", ".join(names)}', '--no-such-flag'], cwd=tmp_path,
                            env={'PYTHONPATH': str(ROOT), 'PATH': ''}, capture_output=True, text=True)
    assert (result.returncode, result.stdout, list(tmp_path.iterdir())) == (0, '', []), result.stderr


# ----- on a GPU

@pytest.mark.gpu
@pytest.mark.parametrize('amp', ['fp16', 'bf16', 'off'])
def test_trains_on_cuda(tmp_path, folders, amp):
    """Each precision trains to a finite loss; the scaler's state is stored under fp16."""
    flags = [flag if flag != 'cpu' else 'cuda' for flag in tiniest(folders)]
    stats = main([*flags, '--amp', amp, '--output-dir', str(tmp_path / 'run'), '--clip-grad', '1'])
    assert math.isfinite(stats['train_loss'])
    assert bool(state(tmp_path / 'run')['scaler']) == (amp == 'fp16')


@pytest.mark.gpu
def test_ema_in_cpu_memory_on_cuda(folders):
    """--model-ema-force-cpu keeps the EMA off the GPU and still evaluates it."""
    flags = [flag if flag != 'cpu' else 'cuda' for flag in tiniest(folders)]
    assert math.isfinite(main([*flags, '--model-ema-force-cpu'])['test_ema_loss'])
