"""The whole program by `main([...])`, on tiny class folders."""
import argparse
import json
import math
import platform
import subprocess
import sys
from pathlib import Path
from typing import List, Tuple

import pytest
import timm
import torch
import torchvision
from conftest import ROOT, tiniest, write_folders
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import datasets
from main import build_optimizer, build_run, build_scheduler, build_teacher, main, parse_args
from run import checkpoints
from run.parts import Metrics
from run.training import Run


def checkpoint(output_dir: Path, name: str = 'checkpoint.pth') -> dict:
    return torch.load(output_dir / name, weights_only=True)


def assert_same_training(own: dict, other: dict):
    """Bitwise the same model, average, optimizer and accuracies."""
    for key in ('model', 'model_ema', 'optimizer', 'accuracy', 'epoch'):
        torch.testing.assert_close(own[key], other[key], rtol=0, atol=0)


def log_lines(output_dir: Path) -> list:
    return [json.loads(line) for line in (output_dir / 'log.txt').read_text().splitlines()]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A finished run of 2 epochs: (data, output directory, statistics)."""
    data = write_folders(tmp_path_factory.mktemp('data'))
    output_dir = tmp_path_factory.mktemp('runs') / 'run'
    stats = main(tiniest(data, '--output-dir', str(output_dir)))
    return data, output_dir, stats


# ----- what a training leaves behind

def test_log_has_a_line_for_each_epoch(trained):
    """Losses, rates, accuracies of the model and of its average, speed and memory."""
    lines = log_lines(trained[1])
    assert [line['epoch'] for line in lines] == [0, 1]
    expected = {'train_loss', 'train_lr', 'train_grad_norm', 'train_images_per_s', 'train_data_s', 'train_memory_mb',
                'test_acc1', 'test_acc5', 'test_loss', 'test_ema_acc1', 'epoch', 'n_parameters'}
    assert expected <= set(lines[0])
    assert all(math.isfinite(value) for value in lines[0].values())


def test_tensorboard_has_curves_flags_and_images(trained):
    """Scalars for both epochs, the run's flags as text and one grid of training images."""
    events = EventAccumulator(str(trained[1] / 'tb')).Reload()
    curves = {'train/loss', 'train/lr', 'train/grad_norm', 'train/images_per_s', 'train/memory_mb', 'test/acc1',
              'test/ema_acc1'}
    assert curves <= set(events.Tags()['scalars'])
    assert [event.step for event in events.Scalars('test/acc1')] == [0, 1]
    assert events.Tags()['tensors'] == ['args/text_summary']
    image = events.Images('train/images')[0]
    assert (image.width, image.height) == (4 * 34 + 2, 34 + 2)


def test_args_json_tells_what_ran(trained):
    """Flags, derived values and the versions of the libraries."""
    written = json.loads((trained[1] / 'args.json').read_text())
    assert written['args']['model'] == 'xcit_test'
    assert written['derived']['num_classes'] == 2
    assert written['environment']['torch'] == torch.__version__
    assert set(written['environment']) == {'python', 'torch', 'torchvision', 'timm', 'numpy', 'git'}


def test_checkpoint_holds_everything(trained):
    """Both files load without Python objects and hold all that a training needs to go on."""
    for name in ('checkpoint.pth', 'best_model.pth'):
        state = checkpoint(trained[1], name)
        assert set(state) == {'model', 'model_ema', 'optimizer', 'lr_scheduler', 'scaler', 'epoch', 'step', 'averages',
                              'batch', 'accuracy', 'classes', 'args'}
        assert isinstance(state['args'], dict)
    assert not list(trained[1].glob('*.tmp'))


def test_best_model_is_the_best(tmp_path, folders):
    """`best_model.pth` is of the epoch with the highest accuracy, the later one among equals."""
    main(tiniest(folders, '--output-dir', str(tmp_path / 'run'), '--epochs', '4'))
    accuracies = [line['test_acc1'] for line in log_lines(tmp_path / 'run')]
    best = checkpoint(tmp_path / 'run', 'best_model.pth')
    assert best['epoch'] == max(range(4), key=lambda epoch: (accuracies[epoch], epoch))
    assert best['accuracy']['best'] == max(accuracies)


def test_next_command_evaluates_the_best_model(tmp_path, folders, capsys):
    """A training ends with a command that works and finds the accuracy of the training."""
    main(tiniest(folders, '--output-dir', str(tmp_path / 'run'), '--full_crop'))
    command = capsys.readouterr().out.splitlines()[-2].split()
    assert command[:2] == ['python', 'main.py']
    stats = main([*command[2:], '--device', 'cpu', '--num-workers', '0'])
    accuracy = checkpoint(tmp_path / 'run')['accuracy']
    assert stats['acc1'] == max(accuracy['best'], accuracy['best_ema'])


# ----- going on

@pytest.mark.parametrize('more', [
    ['--drop-path', '.3', '--drop', '.1'],
    ['--sched', 'plateau', '--patience-epochs', '0', '--cooldown-epochs', '1', '--mixup', '0', '--cutmix', '0'],
    ['--opt', 'sgd', '--accum-iter', '3', '--batch-size', '2', '--no-repeated-aug', '--lr-noise', '0.1', '1.0'],
], ids=['dropout', 'plateau', 'accumulation'])
def test_resumed_training_is_the_uninterrupted_one(tmp_path, folders, monkeypatch, more):
    """Stopping after epoch 1 and going on gives bitwise the weights of 4 epochs in one go."""
    flags = tiniest(folders, *more, '--epochs', '4')
    main([*flags, '--output-dir', str(tmp_path / 'whole')])

    save = checkpoints.save_checkpoint

    def save_and_die(state, path, **kwargs):
        save(state, path, **kwargs)
        if state['epoch'] == 1 and path.name == 'checkpoint.pth':
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, 'save_checkpoint', save_and_die)
    with pytest.raises(KeyboardInterrupt):
        main([*flags, '--output-dir', str(tmp_path / 'parts')])
    monkeypatch.undo()
    main([*flags, '--output-dir', str(tmp_path / 'parts'), '--resume', 'auto'])
    assert_same_training(checkpoint(tmp_path / 'parts'), checkpoint(tmp_path / 'whole'))
    assert [line['epoch'] for line in log_lines(tmp_path / 'parts')] == [0, 1, 2, 3]
    for own, other in zip(log_lines(tmp_path / 'parts'), log_lines(tmp_path / 'whole'), strict=True):
        assert (own['train_loss'], own['train_lr']) == (other['train_loss'], other['train_lr'])


def test_workers_do_not_change_the_numbers(tmp_path, folders):
    """Two loader processes give bitwise the weights of none."""
    for workers in ('0', '2'):
        main(tiniest(folders, '--epochs', '1', '--num-workers', workers, '--output-dir', str(tmp_path / workers)))
    assert_same_training(checkpoint(tmp_path / '0'), checkpoint(tmp_path / '2'))


def test_resume_reads_the_file_it_names(tmp_path, trained):
    """--resume PATH continues from that file, not from one in the output directory."""
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


def test_resume_auto_starts_where_there_is_nothing(tmp_path, folders, capsys):
    """In an empty directory --resume auto is a fresh start, and says so."""
    stats = main(tiniest(folders, '--epochs', '1', '--output-dir', str(tmp_path / 'new'), '--resume', 'auto'))
    assert stats['epoch'] == 0
    assert 'a fresh start' in capsys.readouterr().out


def test_another_run_in_the_same_directory_keeps_the_first(tmp_path, folders):
    """Without --resume the files of the earlier run are moved, not overwritten."""
    flags = tiniest(folders, '--epochs', '1', '--output-dir', str(tmp_path / 'run'))
    main(flags)
    first = (tmp_path / 'run' / 'checkpoint.pth').read_bytes()
    main([*flags, '--seed', '1'])
    assert (tmp_path / 'run' / 'previous-1' / 'checkpoint.pth').read_bytes() == first
    assert (tmp_path / 'run' / 'checkpoint.pth').read_bytes() != first


def test_original_training_checkpoints_can_be_read(tmp_path, trained):
    """The original's files hold an argparse.Namespace beside the weights."""
    data, run, _ = trained
    torch.save({'model': checkpoint(run)['model'], 'args': argparse.Namespace(lr=1.)}, tmp_path / 'original.pth')
    stats = main(tiniest(data, '--eval', '--resume', str(tmp_path / 'original.pth')))
    assert stats['acc1'] == log_lines(run)[-1]['test_acc1']


def test_flags_of_the_resuming_command_count(tmp_path, trained):
    """The optimizer's state is taken over, its options are the command line's."""
    data, run, _ = trained
    main(tiniest(data, '--epochs', '3', '--weight-decay', '.5', '--resume', str(run / 'checkpoint.pth'),
              '--output-dir', str(tmp_path / 'run')))
    groups = checkpoint(tmp_path / 'run')['optimizer']['param_groups']
    assert [group['weight_decay'] for group in groups] == [0., .5]


def run_of(args, model, optimizer, scaler) -> Run:
    """A training that has no moving average and has not begun."""
    return build_run(args, model, None, optimizer, build_scheduler(args, optimizer), scaler, Metrics(), None)


def test_fused_optimizer_goes_on_from_an_unfused_one(trained):
    """Checkpoints of before it was fused say so; the state is taken over all the same."""
    data, run, _ = trained
    state = checkpoint(run)
    for group in state['optimizer']['param_groups']:
        assert group.pop('fused')
    args = parse_args(tiniest(data))
    model = timm.create_model(args.model, num_classes=2)
    optimizer = build_optimizer(args, model)
    run_of(args, model, optimizer, torch.amp.GradScaler(enabled=False)).load(state, 'checkpoint')
    assert [group['fused'] for group in optimizer.param_groups] == [True, True]
    assert len(optimizer.state) == len(list(model.parameters()))


def test_resuming_elsewhere_keeps_the_run_that_is_there(tmp_path, trained):
    """--resume A/checkpoint.pth --output-dir B moves B's files away first."""
    data, run, _ = trained
    other = tmp_path / 'other'
    main(tiniest(data, '--epochs', '1', '--seed', '3', '--output-dir', str(other)))
    before = (other / 'checkpoint.pth').read_bytes()
    main(tiniest(data, '--epochs', '3', '--resume', str(run / 'checkpoint.pth'), '--output-dir', str(other)))
    assert (other / 'previous-1' / 'checkpoint.pth').read_bytes() == before
    assert [line['epoch'] for line in log_lines(other)] == [2]


def test_finished_run_is_left_alone(trained, capsys):
    """--resume auto after the last epoch says that nothing is left to do, and writes nothing."""
    data, run, _ = trained
    before = {path: path.read_bytes() for path in run.rglob('*') if path.is_file()}
    assert main(tiniest(data, '--output-dir', str(run), '--resume', 'auto')) == {}
    assert 'nothing is left to do' in capsys.readouterr().out
    assert {path: path.read_bytes() for path in run.rglob('*') if path.is_file()} == before


def test_half_a_line_in_the_log_is_dropped(tmp_path, folders):
    """What a crash cut short does not stop a resumed run."""
    run = tmp_path / 'run'
    flags = tiniest(folders, '--output-dir', str(run))
    main([*flags, '--epochs', '1'])
    with open(run / 'log.txt', 'a') as file:
        file.write('{"train_loss": 0.')
    main([*flags, '--resume', 'auto'])
    assert [line['epoch'] for line in log_lines(run)] == [0, 1]


def test_full_precision_checkpoint_can_go_on_with_a_scaler(trained):
    """The empty state of a disabled scaler is no obstacle to an enabled one."""
    data, run, _ = trained
    args = parse_args(tiniest(data))
    model = timm.create_model(args.model, num_classes=2)
    optimizer = build_optimizer(args, model)
    scaler = torch.amp.GradScaler('cpu', enabled=True)
    run_of(args, model, optimizer, scaler).load(checkpoint(run), 'checkpoint')
    assert scaler.get_scale() == 2 ** 16


# ----- evaluation

def test_eval_writes_json(trained, tmp_path):
    """Accuracies, loss, speed, model, weights, resolution and crop."""
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
    """--eval --pretrained evaluates them."""
    data, run, _ = trained
    stats = main(tiniest(data, '--eval', '--pretrained', str(run / 'checkpoint.pth')))
    assert stats['acc1'] == log_lines(run)[-1]['test_acc1']


@pytest.fixture
def compiled(monkeypatch) -> List[Tuple[str, str]]:
    """Class and mode of each module that is compiled, without code generation, which would take a minute."""
    modules = []
    compile_module = torch.nn.Module.compile

    def compile_eagerly(module, mode='default'):
        modules.append((type(module).__name__, mode))
        compile_module(module, backend='aot_eager')

    monkeypatch.setattr(torch.nn.Module, 'compile', compile_eagerly)
    return modules


def test_evaluation_can_be_compiled(folders, compiled):
    """With the same result, and with the mode that is asked for."""
    flags = tiniest(folders, '--eval', '--model', 'xcit_test')
    stats, eager = main([*flags, '--compile', '--compile-mode', 'max-autotune']), main(flags)
    assert stats['loss'] == pytest.approx(eager['loss'], rel=1e-5)
    assert stats['acc1'] == eager['acc1']
    assert compiled == [('Xcit', 'max-autotune')]


def test_training_can_be_compiled(folders, compiled, monkeypatch):
    """Model, moving average and teacher are, and the training is the same."""
    monkeypatch.setattr('main.build_teacher', lambda args, classes: timm.create_model('resnet10t', num_classes=classes))
    flags = tiniest(folders, '--model', 'xcit_test', '--epochs', '1', '--distillation-type', 'soft',
                 '--teacher-path', __file__)
    eager = main(flags)
    stats = main([*flags, '--compile', '--compile-mode', 'max-autotune'])
    assert stats['train_loss'] == pytest.approx(eager['train_loss'], rel=1e-4)
    assert stats['test_ema_loss'] == pytest.approx(eager['test_ema_loss'], rel=1e-4)
    assert compiled == [('Xcit', 'max-autotune'), ('Xcit', 'max-autotune'), ('ResNet', 'default')]


def test_moving_average_in_cpu_memory_is_not_compiled(folders, compiled):
    """It is never called: each evaluation makes a copy on the model's device."""
    main(tiniest(folders, '--model', 'xcit_test', '--epochs', '1', '--model-ema-force-cpu', '--compile'))
    assert compiled == [('Xcit', 'default')]


def test_test_freq_skips_evaluations(tmp_path, folders):
    """Every third epoch, and the last."""
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
    """Options run on one device without DDP, to a finite loss."""
    stats = main(tiniest(folders, '--epochs', '1', *more))
    assert math.isfinite(stats['train_loss'])
    assert ('test_ema_acc1' in stats) == ('--no-model-ema' not in more)


@pytest.mark.parametrize('flag', ['--resplit', '--no-resplit'])
def test_resplit_reaches_the_batches(folders, monkeypatch, flag):
    """With it every training batch is erased as a whole, without it none."""
    erased, erase = [], datasets.CleanHalfErasing.__call__

    def noted(self, samples):
        erased.append(len(samples))
        return erase(self, samples)

    monkeypatch.setattr(datasets.CleanHalfErasing, '__call__', noted)
    main(tiniest(folders, '--epochs', '1', '--no-repeated-aug', flag))
    assert erased == ([4] * 4 if flag == '--resplit' else [])


def test_pretrained_head_of_other_classes_is_left_out(tmp_path, folders, trained, capsys):
    """Weights for 2 classes start a training for 3: all but the head is taken, and a message says so."""
    data = write_folders(tmp_path / 'three', classes=('a', 'b', 'c'))
    main(tiniest(data, '--epochs', '1', '--lr', '1e-12', '--warmup-lr', '0', '--min-lr', '0', '--output-dir',
              str(tmp_path / 'run'), '--pretrained', str(trained[1] / 'checkpoint.pth')))
    assert 'are for 2 classes, not 3: all but the head is taken' in capsys.readouterr().out
    own, given = checkpoint(tmp_path / 'run')['model'], checkpoint(trained[1])['model']
    torch.testing.assert_close(own['blocks.0.mlp.fc1.weight'], given['blocks.0.mlp.fc1.weight'])
    assert own['head.weight'].shape == (3, 16)


def test_surgery_copies_and_freezes_the_stem(tmp_path, folders, trained):
    """The stem, statistics included, stays bitwise that of the given weights."""
    source = trained[1] / 'checkpoint.pth'
    main(tiniest(folders, '--surgery', str(source), '--output-dir', str(tmp_path / 'run'), '--seed', '5'))
    own, given = checkpoint(tmp_path / 'run')['model'], checkpoint(trained[1])['model']
    stem = {key for key in own if key.startswith('patch_embed.')}
    assert len(stem) == 24
    assert all(torch.equal(own[key], given[key]) for key in stem)
    assert not torch.equal(own['blocks.0.mlp.fc1.weight'], given['blocks.0.mlp.fc1.weight'])


@pytest.mark.parametrize('kind', ['soft', 'hard'])
def test_distillation_trains(folders, tmp_path, kind):
    """A timm teacher from a file that holds its weights under 'model'."""
    teacher = timm.create_model('resnet18', num_classes=2)
    torch.save({'model': teacher.state_dict()}, tmp_path / 'teacher.pth')
    flags = tiniest(folders, '--epochs', '1', '--distillation-type', kind, '--teacher-model', 'resnet18',
                 '--teacher-path', str(tmp_path / 'teacher.pth'))
    own, plain = main([*flags, '--distillation-alpha', '.9']), main([*flags, '--distillation-alpha', '0'])
    assert math.isfinite(own['train_loss'])
    assert own['train_loss'] != plain['train_loss']


def test_teacher_of_other_images(folders, tmp_path, capsys):
    """One of 224 pixels and another mean sees the images as it was trained; the flags have the last word."""
    teacher = timm.create_model('vit_tiny_patch16_224', num_classes=2).eval()
    torch.save(teacher.state_dict(), tmp_path / 'teacher.pth')
    flags = tiniest(folders, '--distillation-type', 'hard', '--teacher-model', 'vit_tiny_patch16_224',
                    '--teacher-path', str(tmp_path / 'teacher.pth'))
    pixels = torch.rand(2, 3, 32, 32)
    normalize = torchvision.transforms.Normalize
    resized = torch.nn.functional.interpolate(normalize(*[(.5,) * 3] * 2)(pixels), 224, mode='bicubic', antialias=True)
    images = normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)(pixels)
    torch.testing.assert_close(build_teacher(parse_args(flags), 2)(images), teacher(resized), rtol=1e-4, atol=1e-4)
    out = capsys.readouterr().out
    assert 'sees the images resized to 224 x 224 pixels and normalised by mean (0.5, 0.5, 0.5)' in out
    own = build_teacher(parse_args([*flags, '--teacher-mean', *map(str, IMAGENET_DEFAULT_MEAN), '--teacher-std',
                                    *map(str, IMAGENET_DEFAULT_STD)]), 2)
    resized = torch.nn.functional.interpolate(images, 224, mode='bicubic', antialias=True)
    torch.testing.assert_close(own(images), teacher(resized), rtol=1e-4, atol=1e-4)


def test_teacher_from_timm(folders, tmp_path, monkeypatch):
    """--teacher-pretrained takes the weights that timm knows for the model."""
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
    loaded = build_teacher(args, 2)
    assert torch.equal(loaded.fc.weight, teacher.fc.weight)
    assert not loaded.training


def test_seed_decides_the_run(tmp_path, folders):
    """The same seed gives bitwise the same weights, another one others."""
    for name, seed in (('a', '0'), ('b', '0'), ('c', '1')):
        main(tiniest(folders, '--epochs', '1', '--seed', seed, '--output-dir', str(tmp_path / name)))
    assert_same_training(checkpoint(tmp_path / 'a'), checkpoint(tmp_path / 'b'))
    assert not torch.equal(checkpoint(tmp_path / 'a')['model']['head.weight'],
                           checkpoint(tmp_path / 'c')['model']['head.weight'])


def test_importing_does_nothing(tmp_path):
    """Importing every module prints nothing, parses nothing and writes nothing."""
    names = [path.stem for path in ROOT.glob('*.py')]
    names += [f'{name}.{path.stem}' for name in ('run', 'loaders', 'tools') for path in (ROOT / name).glob('*.py')]
    modules = ', '.join(name for name in names if not name.endswith('__init__'))
    result = subprocess.run([sys.executable, '-c', f'import {modules}', '--no-such-flag'], cwd=tmp_path,
                            env={'PYTHONPATH': str(ROOT), 'PATH': ''}, capture_output=True, text=True)
    assert (result.returncode, result.stdout, list(tmp_path.iterdir())) == (0, '', [])


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='other C libraries have other ways')
def test_freed_memory_is_not_fetched_again():
    """A tensor takes the place of one that was freed: its pages need not come from the system again."""
    code = """if True:
        import resource
        import torch
        from run import processes
        processes.keep_freed_memory()
        for step in range(30):
            if step == 10:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.empty(2 ** 24).fill_(1.)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    pages = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert int(pages) < 5 * 16384  # of 20 * 16384


# ----- on a GPU

@pytest.mark.gpu
@pytest.mark.parametrize('amp', ['fp16', 'bf16', 'off'])
def test_trains_on_cuda(tmp_path, folders, amp):
    """Each precision, to a finite loss; the scaler's state is stored under fp16."""
    flags = [flag if flag != 'cpu' else 'cuda' for flag in tiniest(folders)]
    stats = main([*flags, '--amp', amp, '--output-dir', str(tmp_path / 'run'), '--clip-grad', '1'])
    assert math.isfinite(stats['train_loss'])
    assert bool(checkpoint(tmp_path / 'run')['scaler']) == (amp == 'fp16')


@pytest.mark.gpu
def test_average_in_cpu_memory_on_cuda(folders):
    """--model-ema-force-cpu keeps the average off the GPU and still evaluates it."""
    flags = [flag if flag != 'cpu' else 'cuda' for flag in tiniest(folders)]
    assert math.isfinite(main([*flags, '--model-ema-force-cpu'])['test_ema_loss'])
