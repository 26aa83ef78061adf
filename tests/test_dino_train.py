"""python -m dino.train as users start it: the original's numbers, its files and other people's, and what is refused."""
import argparse
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
from PIL import Image
from processes import run
from seeded_weights import tensor as seeded_tensor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_dino import close, seed_weights

import datasets
from dino import files, monitor, train
from dino.networks import Head, MultiCrop
from loaders import batches
from utils import InputError

TRAJECTORY = json.loads((REFERENCE / 'dino.json').read_text())['trajectory']
PLAIN = ['--flip', '0', '--color-jitter', '0', '--grayscale', '0', '--blur', '0', '--solarize', '0']  # no randomness


def small(data: Path, *more: str) -> list:
    """Command line of a training that takes a second: an XCiT of 13,000 weights, on pictures of 32 x 32 pixels."""
    return ['--device', 'cpu', '--num-workers', '0', '--batch-size', '4', '--epochs', '2', '--warmup-epochs', '1',
            '--arch', 'xcit_test', '--out-dim', '16', '--global-crops-size', '32', '--local-crops-size', '16',
            '--local-crops-number', '1', '--data-path', str(data), *more]


@pytest.fixture(scope='module')
def flat(tmp_path_factory) -> Path:
    """One folder of 8 pictures."""
    folder = tmp_path_factory.mktemp('flat')
    for i in range(8):
        write_image(folder / f'{i}.png', seed=i)
    return folder


@pytest.fixture(scope='module')
def trained(flat, tmp_path_factory) -> Path:
    """The folder of a training; not to be changed."""
    folder = tmp_path_factory.mktemp('runs') / 'run'
    small_dino.main(small(flat, '--output-dir', str(folder)))
    return folder


def log_of(folder: Path) -> list:
    return list(map(json.loads, (folder / 'log.txt').read_text().splitlines()))


# ---------------------------------------------------------------------------------------------------------------------
# The original's numbers, by the command line

@pytest.fixture(scope='module')
def trajectory(tmp_path_factory) -> Path:
    """The folder of the whole program's run on 10 pictures, from the reference's weights."""
    folder = tmp_path_factory.mktemp('trajectory')
    rng = np.random.Generator(np.random.PCG64(TRAJECTORY['pictures']['seed']))
    (folder / 'pictures').mkdir()
    for i in range(10):
        coarse = np.round(rng.uniform(0, 255, (4, 4, 3))).astype(np.uint8)
        Image.fromarray(coarse).resize((64, 64), Image.BICUBIC).save(folder / 'pictures' / f'{i}.png')
    backbone = timm.create_model('xcit_nano_12_p16', num_classes=0)
    start = seed_weights(MultiCrop(backbone, Head(128, 80, use_bn=False, norm_last_layer=True)), TRAJECTORY['seed'])
    weights = {f'module.{key}': value for key, value in start.state_dict().items()}
    torch.save({'student': weights, 'teacher': weights}, folder / 'start.pth')
    words = ['--arch', TRAJECTORY['flags']['model'], '--pretrained', str(folder / 'start.pth'), '--device', 'cpu',
             '--data_path', str(folder / 'pictures'), '--output_dir', str(folder / 'run'), '--num_workers', '0']
    for flag, value in TRAJECTORY['flags'].items():
        if flag not in ('model', 'patch'):
            flag = f'--{flag.replace("batch-size", "batch-size-per-gpu").replace("-", "_")}'
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    train.main(words)
    return folder / 'run'


@pytest.mark.parametrize('name', ['train_loss', 'train_lr', 'train_wd', 'center_norm'])
def test_epochs_are_the_originals(trajectory, name):
    own = [line[{'center_norm': 'train_center_norm'}.get(name, name)] for line in log_of(trajectory)]
    close(own, [line[name] for line in TRAJECTORY['log']], 1e-4 if name in ('train_loss', 'center_norm') else 1e-6)


def norms_of(state: dict, names) -> dict:
    return {name: float(state[f'module.{name}'].norm()) for name in names}


def test_teachers_weights_and_statistics_are_the_originals(trajectory):
    teacher = torch.load(trajectory / 'checkpoint.pth')['teacher']
    expected = TRAJECTORY['teacher_norms']
    close(list(norms_of(teacher, expected).values()), list(expected.values()), 1e-4)


def test_student_changes_as_the_originals(trajectory):
    student = torch.load(trajectory / 'checkpoint.pth')['student']
    for name, expected in TRAJECTORY['student_changes'].items():
        value = student[f'module.{name}']
        start = torch.from_numpy(np.asarray(seeded_tensor(name, tuple(value.shape), TRAJECTORY['seed'])))
        start = torch.ones_like(start) if name.endswith('weight_g') else start
        assert float((value - start).norm()) == pytest.approx(expected, rel=2e-3, abs=1e-6), name


def test_teachers_features_are_the_originals(trajectory):
    model = timm.create_model('xcit_nano_12_p16', num_classes=0).eval()
    model.load_state_dict(torch.load(trajectory / 'backbone.pth'))
    transform = datasets.build_normalisation(argparse.Namespace(mean=None, std=None))
    pictures = torch.stack([transform(Image.open(trajectory.parent / 'pictures' / f'{i}.png')) for i in range(10)])
    with torch.no_grad():
        features = model(pictures)
    close(features.norm(dim=1), TRAJECTORY['teacher_feature_norms'], 1e-3)
    first = torch.tensor(TRAJECTORY['teacher_features_first'])
    torch.testing.assert_close(features[0, :8], first, rtol=1e-3, atol=1e-3)
    unit = torch.nn.functional.normalize(features, dim=1)
    close(unit @ unit[0], TRAJECTORY['similarities_of_first'], 1e-3)


def test_defaults_are_the_originals():
    args = train.get_args_parser().parse_args([])
    assert {name: getattr(args, name) for name in (
        'arch', 'out_dim', 'norm_last_layer', 'momentum_teacher', 'use_bn_in_head', 'warmup_teacher_temp',
        'teacher_temp', 'warmup_teacher_temp_epochs', 'weight_decay', 'weight_decay_end', 'clip_grad', 'batch_size',
        'epochs', 'freeze_last_layer', 'lr', 'warmup_epochs', 'min_lr', 'optimizer', 'drop_path_rate',
        'global_crops_scale', 'local_crops_number', 'local_crops_scale', 'output_dir', 'saveckp_freq', 'seed',
        'num_workers', 'dist_url', 'input_size', 'local_crops_size')} == dict(
        arch='xcit_small_12_p16', out_dim=65536, norm_last_layer=True, momentum_teacher=.996, use_bn_in_head=False,
        warmup_teacher_temp=.04, teacher_temp=.04, warmup_teacher_temp_epochs=0, weight_decay=.04, weight_decay_end=.4,
        clip_grad=3., batch_size=64, epochs=100, freeze_last_layer=1, lr=.0005, warmup_epochs=10, min_lr=1e-6,
        optimizer='adamw', drop_path_rate=.1, global_crops_scale=[.4, 1.], local_crops_number=8,
        local_crops_scale=[.05, .4], output_dir='.', saveckp_freq=20, seed=0, num_workers=10, dist_url='env://',
        input_size=224, local_crops_size=96)


@pytest.mark.parametrize(('word', 'value'), [('true', True), ('On', True), ('1', True), ('false', False),
                                             ('OFF', False), ('0', False)])
def test_booleans_are_words(word, value):
    args = train.get_args_parser().parse_args(['--norm_last_layer', word, '--use-bn-in-head', word])
    assert (args.norm_last_layer, args.use_bn_in_head) == (value, value)


def test_help_needs_no_network():
    out, = run(['-c', 'import socket, sys; socket.socket.connect = socket.getaddrinfo = None; from dino import train; '
                      'train.get_args_parser().print_help()'], 1)
    assert '--momentum-teacher' in out


# ---------------------------------------------------------------------------------------------------------------------
# Processes, ranks and places

ONE_STEP = '''
import sys
import torch
from tests import small_dino

def forward(self, x):  # the statistics of a process's batch are its own on a CPU
    return torch.nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)

torch.nn.BatchNorm2d.forward = forward
small_dino.main(sys.argv[1:])
'''


def test_two_processes_are_one_with_the_double_batch(flat, tmp_path):
    """Loss, centre, clipping and so the weights; pictures of one batch are in any order."""
    found = {}
    for world, batch in ((1, 8), (2, 4)):
        folder = tmp_path / str(world)
        run(['-c', ONE_STEP, *small(flat, *PLAIN, '--global-crops-scale', '1', '1', '--local-crops-scale', '1', '1',
                                    '--batch-size', str(batch), '--drop-path-rate', '0', '--clip-grad', '.05',
                                    '--lr', '.1', '--optimizer', 'sgd', '--output-dir', str(folder),
                                    '--epochs', '3')], world)
        checkpoint = torch.load(folder / 'checkpoint.pth')
        figures = ('loss', 'teacher_entropy', 'mean_entropy', 'feature_spread', 'grad_norm')
        found[world] = ([[line[f'train_{name}'] for name in figures] for line in log_of(folder)],
                        checkpoint['dino_loss']['center'], checkpoint['student'], checkpoint['teacher'])
    torch.testing.assert_close(found[2], found[1], rtol=1e-4, atol=1e-6)


def test_crops_differ_between_pictures_ranks_and_epochs(flat, monkeypatch):
    """Each is a function of seed, epoch and position; a resume does not bring those of epoch 0 again."""
    args = train.parse_args(small(flat, '--batch-size', '2'))
    monkeypatch.setattr(batches, 'get_world_size', lambda: 2)
    loaders = []
    for epoch, rank in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 0)):
        monkeypatch.setattr(batches, 'get_rank', lambda rank=rank: rank)
        loader = train.build_train_loader(train.data.build_dataset(args), args, torch.device('cpu'),
                                          collate_fn=train.crops.collate)
        loader.set_position(epoch, 0)
        loaders.append(torch.cat([batch[0] for batch in loader]))
    assert torch.equal(loaders[0], loaders[-1])
    flattened = torch.cat(loaders[:-1]).flatten(1)
    assert len(flattened.unique(dim=0)) == len(flattened)


# ---------------------------------------------------------------------------------------------------------------------
# Data

def test_nested_and_class_folders_are_read(tmp_path, capsys):
    write_image(tmp_path / 'a' / 'b' / '0.png')
    write_image(tmp_path / 'c.jpg')
    (tmp_path / 'notes.txt').write_text('no picture')
    args = train.parse_args(small(tmp_path))
    assert len(train.data.build_dataset(args)) == 2


def test_pictures_of_train_are_taken(tmp_path, capsys):
    write_folders(tmp_path / 'data')
    assert len(train.data.build_dataset(train.parse_args(small(tmp_path / 'data')))) == 16
    assert 'takes those of train/' in capsys.readouterr().out


@pytest.mark.parametrize('skipped', [True, False])
def test_unreadable_picture(tmp_path, capsys, skipped):
    """It ends the training in one line, or is skipped where that is allowed."""
    for i in range(8):
        write_image(tmp_path / 'data' / f'{i}.png', seed=i)
    (tmp_path / 'data' / '0.png').write_bytes(b'no picture')
    flags = small(tmp_path / 'data', '--output-dir', str(tmp_path / 'run'), '--epochs', '1')
    if skipped:
        small_dino.main([*flags, '--skip-bad-images', '1'])
        assert 'skipped (1 of at most 1)' in capsys.readouterr().err
    else:
        with pytest.raises(InputError, match=r'unreadable image .*0\.png'):
            small_dino.main(flags)


def test_preview_writes_crops_before_any_model_is_built(flat, tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'build_networks', None)
    train.main(small(flat, '--preview-crops', str(tmp_path / 'seen'), '--preview-count', '3', '--output-dir',
                     str(tmp_path / 'run')))
    names = sorted(path.name for path in (tmp_path / 'seen').iterdir())
    assert len(names) == 9
    assert names[:3] == ['000000_global1.png', '000000_global2.png', '000000_local1.png']
    assert [Image.open(tmp_path / 'seen' / name).size for name in names[:3]] == [(32, 32), (32, 32), (16, 16)]
    assert not (tmp_path / 'run').exists()


def test_global_crops_alone_are_learnt_from(flat, tmp_path):
    small_dino.main(small(flat, '--local-crops-number', '0', '--output-dir', str(tmp_path / 'run'), '--epochs', '1'))
    assert math.isfinite(log_of(tmp_path / 'run')[0]['train_loss'])


# ---------------------------------------------------------------------------------------------------------------------
# Files

def test_training_writes_what_the_original_writes(trained):
    content = torch.load(trained / 'checkpoint.pth')
    assert {'student', 'teacher', 'optimizer', 'epoch', 'args', 'dino_loss', 'fp16_scaler'} <= content.keys()
    assert (content['epoch'], list(content['dino_loss'])) == (2, ['center'])
    heads = {key.removeprefix('module.head.') for key in content['student'] if key.startswith('module.head.')}
    assert heads == {*(f'mlp.{i}.{name}' for i in (0, 2, 4) for name in ('weight', 'bias')), 'last_layer.weight_g',
                     'last_layer.weight_v'}
    assert all(key.startswith('module.backbone.') for key in content['teacher'].keys() - {
        f'module.head.{name}' for name in heads})
    assert isinstance(content['args'], dict)


def test_epochs_that_stay(flat, tmp_path):
    """Every --saveckp-freq, and the last."""
    small_dino.main(small(flat, '--epochs', '4', '--saveckp-freq', '2', '--output-dir', str(tmp_path)))
    assert sorted(path.name for path in tmp_path.glob('checkpoint0*')) == [
        'checkpoint0000.pth', 'checkpoint0002.pth', 'checkpoint0003.pth']


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_backbone_is_the_teachers(flat, tmp_path, suffix):
    small_dino.main(small(flat, '--output-dir', str(tmp_path), '--backbone-format', suffix, '--epochs', '1'))
    path = tmp_path / f'backbone.{suffix}'
    found = torch.load(path) if suffix == 'pth' else safetensors.torch.load_file(path)
    teacher = torch.load(tmp_path / 'checkpoint.pth')['teacher']
    assert found.keys() == {key.removeprefix('module.backbone.') for key in teacher if 'backbone' in key}
    assert all(torch.equal(value, teacher[f'module.backbone.{key}']) for key, value in found.items())


def test_log_has_the_figures_of_an_epoch(trained):
    assert {'epoch', 'train_loss', 'train_lr', 'train_wd', 'train_teacher_entropy', 'train_mean_entropy',
            'train_center_norm', 'train_feature_spread', 'train_images_per_s'} <= log_of(trained)[0].keys()


def student_of(folder: Path) -> dict:
    return torch.load(folder / 'checkpoint.pth')['student']


def renamed_head(name: str) -> str:
    return name.replace('head.mlp.', 'projection_head.').replace('head.last_layer.', 'prototypes.')


OTHERS = {  # what other years' files call a weight
    'bare': lambda name: name.removeprefix('module.'),
    'old head': lambda name: renamed_head(name),
    'no backbone': lambda name: renamed_head(name).removeprefix('module.').removeprefix('backbone.'),
    'parametrized': lambda name: name.replace('weight_g', 'parametrizations.weight.original0').replace(
        'weight_v', 'parametrizations.weight.original1'),
    'inner': lambda name: name.replace('module.', '').replace('backbone.', 'backbone.module.'),
}


def load_pretrained(path: Path, flat: Path) -> tuple:
    args = train.parse_args(small(flat, '--pretrained', str(path)))
    criterion = train.DinoLoss(16, 3)
    with small_dino.mock.patch.object(small_dino.networks, 'HIDDEN', 16):
        return *train.build_networks(args, criterion), criterion


@pytest.mark.parametrize('other', OTHERS)
def test_files_of_other_years_are_read(trained, flat, tmp_path, other):
    content = torch.load(trained / 'checkpoint.pth')
    args = argparse.Namespace(arch='xcit_test', lr=np.float64(.1))
    torch.save({**{name: {OTHERS[other](key): value for key, value in content[name].items()}
                   for name in ('student', 'teacher')}, 'args': args, 'epoch': 2,
                'optimizer': {'param_groups': [{'lr': np.float64(.1)}], 'state': {}}}, tmp_path / 'other.pth')
    student, teacher, criterion = load_pretrained(tmp_path / 'other.pth', flat)
    for name, network in (('student', student), ('teacher', teacher)):
        own = network.state_dict()
        assert all(torch.equal(own[key.removeprefix('module.')], value) for key, value in content[name].items())
    assert not criterion.center.any()


def test_training_goes_on_from_a_full_file_with_its_centre(trained, flat):
    _, _, criterion = load_pretrained(trained / 'checkpoint.pth', flat)
    assert torch.equal(criterion.center, torch.load(trained / 'checkpoint.pth')['dino_loss']['center'])
    assert criterion.center.any()


def test_backbone_file_starts_both_networks(trained, flat, capsys):
    student, teacher, _ = load_pretrained(trained / 'backbone.pth', flat)
    expected = torch.load(trained / 'backbone.pth')
    for network in (student, teacher):
        assert all(torch.equal(network.backbone.state_dict()[key], value) for key, value in expected.items())
    assert torch.equal(student.head.mlp[0].weight, teacher.head.mlp[0].weight)
    assert 'their heads are fresh' in capsys.readouterr().out


def test_head_of_another_width_is_refused_with_the_names(trained, flat):
    args = train.parse_args(small(flat, '--pretrained', str(trained / 'checkpoint.pth')))
    with pytest.raises(InputError, match=r'of another shape: head\.mlp\.0\.weight'):
        train.build_networks(args, train.DinoLoss(16, 3))  # of 2048 hidden numbers


@pytest.mark.parametrize(('flag', 'value'), [
    ('--epochs', '3'), ('--warmup-epochs', '0'), ('--lr', '0.1'), ('--teacher-temp', '0.07'),
    ('--local-crops-number', '2'), ('--data-set', 'SAMPLE')])
def test_another_training_is_not_gone_on_with(trained, flat, tmp_path, flag, value):
    with pytest.raises(InputError, match=f'was trained with {flag} .*, not {value}'):
        small_dino.main([*small(flat, flag, value), '--resume', str(trained / 'checkpoint.pth'), '--output-dir',
                         str(tmp_path / 'run')])
    assert not (tmp_path / 'run').exists()


def test_other_pictures_are_not_gone_on_with(trained, flat, tmp_path):
    """As many, under other names; the same ones may have moved."""
    for folder, name in (('moved', '{}'), ('other', 'x{}')):
        (tmp_path / folder).mkdir()
        for path in flat.iterdir():
            (tmp_path / folder / name.format(path.name)).write_bytes(path.read_bytes())
    resume = ['--resume', str(trained / 'checkpoint.pth'), '--output-dir', str(tmp_path / 'run')]
    small_dino.main([*small(tmp_path / 'moved'), *resume])
    with pytest.raises(InputError, match='8 pictures of other names'):
        small_dino.main([*small(tmp_path / 'other'), *resume])


def test_a_resume_has_the_rates_of_the_last_step(flat):
    """Also where the last step of an epoch had fewer batches than --accum-iter."""
    args = train.parse_args(small(flat, '--epochs', '3'))
    rates, optimizer = train.Rates(args, steps=3), torch.optim.SGD([{'params': [torch.zeros(1)]}] * 1, lr=1.)
    position = files.NextEpoch(3)
    position.done, position.step = 0, 5  # of 5 batches, two in a step
    rates.go_on(optimizer, position, accum_iter=2)
    assert optimizer.param_groups[0]['lr'] == rates.lr[5]


def test_pictures_of_the_user_stay_where_they_are(tmp_path, monkeypatch):
    """In a folder that a run writes to by default."""
    for i in range(4):
        write_image(tmp_path / 'pictures' / f'{i}.png', seed=i)
    (tmp_path / 'backbone.py').write_text('mine')
    monkeypatch.chdir(tmp_path)
    small_dino.main(small(Path('pictures'), '--epochs', '1'))
    small_dino.main(small(Path('pictures'), '--epochs', '1'))
    assert len(list((tmp_path / 'pictures').iterdir())) == 4
    assert (tmp_path / 'backbone.py').exists()


def test_another_number_of_pictures_is_not_gone_on_with(trained, flat, tmp_path):
    write_image(tmp_path / 'more' / '8.png')
    for path in flat.iterdir():
        (tmp_path / 'more' / path.name).write_bytes(path.read_bytes())
    with pytest.raises(InputError, match='was trained on 8 pictures, and --data-path has 9'):
        small_dino.main([*small(tmp_path / 'more'), '--resume', str(trained / 'checkpoint.pth')])


# ---------------------------------------------------------------------------------------------------------------------
# While it trains

def test_collapse_is_said_once_for_each_kind(flat, capsys):
    args = train.parse_args(small(flat))
    watch = monitor.Monitor(args, None, torch.device('cpu'))
    stats = dict(train_teacher_entropy=2.77, train_mean_entropy=2.772, train_feature_spread=.3)
    for epoch in range(3):
        watch.after_epoch(epoch, stats, None, None)
    watch.after_epoch(3, {**stats, 'train_feature_spread': .01}, None, None)
    out = capsys.readouterr().out
    assert out.count('collapse') == 2
    assert 'collapse in epoch 1: the teacher says nothing of any image' in out
    assert 'collapse in epoch 3: the features of all images are alike' in out
    assert '--teacher-temp' in out


def test_collapse_of_a_training_is_said(flat, tmp_path, capsys):
    """At such a temperature the teacher says the same of everything."""
    small_dino.main(small(flat, '--teacher-temp', '100', '--warmup-teacher-temp', '100', '--epochs', '3',
                          '--output-dir', str(tmp_path / 'run')))
    assert capsys.readouterr().out.count('Warning: collapse in epoch 1: the teacher says nothing of any image') == 1


def test_knn_is_known_before_the_first_step_and_the_best_stays(flat, tmp_path, capsys):
    labelled = write_folders(tmp_path / 'labelled')
    small_dino.main(small(flat, '--knn-every', '2', '--knn-data-path', str(labelled), '--nb-knn', '3', '--epochs', '3',
                          '--output-dir', str(tmp_path / 'run')))
    out, lines = capsys.readouterr().out, log_of(tmp_path / 'run')
    assert 'Before the first step: 3-NN classifier result: Top1: ' in out
    assert [('knn_top1' in line) for line in lines] == [False, True, True]
    assert 'knn_before' in lines[1]
    best = torch.load(tmp_path / 'run' / 'best_checkpoint.pth')
    tops = {line['epoch']: line['knn_top1'] for line in lines if 'knn_top1' in line}
    assert tops[best['epoch'] - 1] == max(tops.values())


def test_pictures_are_drawn(flat, tmp_path):
    small_dino.main(small(flat, '--pictures-every', '2', '--pictures-count', '2', '--output-dir', str(tmp_path)))
    names = sorted(path.name for path in (tmp_path / 'dino_pictures').iterdir())
    assert names == ['before.png', 'epoch0001.png']
    sheet = Image.open(tmp_path / 'dino_pictures' / 'epoch0001.png')
    assert len(sheet.getcolors(1 << 20)) > 50
    events = EventAccumulator(str(tmp_path / 'tb'), size_guidance={'images': 0}).Reload()
    assert [event.step for event in events.Images('pictures')] == [0, 2]


def test_large_pictures_are_drawn_at_the_size_of_the_crops(flat, tmp_path):
    """Where these are small: a photo would have many thousands of patches."""
    write_image(tmp_path / 'photos' / '0.png', size=(3000, 2000))
    watch = monitor.Monitor(train.parse_args(small(flat, '--pictures-every', '1', '--pictures', str(
        tmp_path / 'photos'), '--output-dir', str(tmp_path / 'run'))), None, torch.device('cpu'))
    backbone = timm.create_model('xcit_nano_12_p16', num_classes=0).eval()
    sheet = monitor.draw_maps(backbone, watch.shown, watch.args, torch.device('cpu'))
    assert max(sheet.size) < 400


def test_data_without_labels_are_learnt_from(tmp_path):
    """Labels that no data set should have, and splits with none."""
    args = train.parse_args(small(tmp_path, '--data-set', 'SAMPLE'))
    assert len(train.data.build_dataset(args)) > 1000
    write_image(tmp_path / 'only' / 'train' / 'cat' / '0.png')
    args = train.parse_args(small(tmp_path / 'only', '--data-set', 'FOLDER'))
    assert len(train.data.build_dataset(args)) == 1


def test_accumulation_is_no_larger_batch_for_the_centre(flat, tmp_path, capsys):
    small_dino.main(small(flat, '--accum-iter', '2', '--output-dir', str(tmp_path), '--epochs', '1'))
    assert 'the centre and BatchNorm see 4 at a time' in capsys.readouterr().out


@pytest.mark.parametrize('flags', [['--grad-checkpointing'], ['--amp', 'bf16'], ['--optimizer', 'lars'],
                                   ['--use-bn-in-head', 'true', '--norm-last-layer', 'false'],
                                   pytest.param(['--compile'], marks=pytest.mark.slow)], ids=' '.join)
def test_other_ways_to_train(flat, tmp_path, flags):
    small_dino.main(small(flat, *flags, '--output-dir', str(tmp_path)))
    assert math.isfinite(log_of(tmp_path)[-1]['train_loss'])


@pytest.mark.gpu
@pytest.mark.parametrize('flags', [[], ['--use_fp16', 'true'], ['--amp', 'off', '--compile']], ids=' '.join)
def test_training_on_a_gpu(flat, tmp_path, flags):
    """In bf16 by default, in fp16 with its scaler, and compiled; k-NN and pictures too."""
    labelled = write_folders(tmp_path / 'labelled')
    small_dino.main(small(flat, '--device', 'cuda', *flags, '--knn-every', '1', '--knn-data-path', str(labelled),
                          '--nb-knn', '3', '--pictures-every', '1', '--output-dir', str(tmp_path / 'run')))
    lines = log_of(tmp_path / 'run')
    assert all(math.isfinite(line['train_loss']) and 'knn_top1' in line for line in lines)
    assert torch.load(tmp_path / 'run' / 'checkpoint.pth')['args']['amp'] == {
        '': 'bf16', '--use_fp16 true': 'fp16', '--amp off --compile': 'off'}[' '.join(flags)]


# ---------------------------------------------------------------------------------------------------------------------
# Bad input

@pytest.mark.parametrize(('flags', 'words'), [
    (['--epochs', '5', '--warmup-epochs', '10'], ['--warmup-epochs 10', '--epochs 5']),
    (['--warmup-teacher-temp-epochs', '30'], ['--warmup-teacher-temp-epochs 30', '--epochs 2']),
    (['--global-crops-scale', '1', '.4'], ['--global-crops-scale 1 0.4', 'smaller first']),
    (['--global-crops-scale', '.4'], ['--global-crops-scale 0.4', '2 values']),
    (['--local-crops-scale', '0', '.4'], ['--local-crops-scale', "'0'", '> 0']),
    (['--local-crops-scale', '.1', '1.4'], ['--local-crops-scale', "'1.4'", '<= 1']),
    (['--local-crops-scale', '.1', '.2', '.3'], ['--local-crops-scale 0.1 0.2 0.3', '2 values']),
    (['--local-crops-number', '-1'], ['--local-crops-number', "'-1'"]),
    (['--momentum-teacher', '1.1'], ['--momentum-teacher', "'1.1'", '<= 1']),
    (['--momentum-teacher', '-.1'], ['--momentum-teacher', "'-.1'", '>= 0']),
    (['--teacher-temp', '0'], ['--teacher-temp', "'0'", '> 0']),
    (['--warmup-teacher-temp', '-1'], ['--warmup-teacher-temp', "'-1'"]),
    (['--local-crops-size', '8'], ['--local-crops-size 8', '16 pixels']),
    (['--global-crops-size', '15'], ['--global-crops-size 15', '16 pixels']),
    (['--arch', 'resnet18'], ['--arch resnet18', 'no XCiT']),
    (['--arch', 'xcit_smal_12_p16'], ['--arch xcit_smal_12_p16', 'similar', 'xcit_small_12_p16']),
    (['--patch-size', '8'], ['--patch-size 8', '16 pixels']),
    (['--color-jitter', '.4', '.4'], ['--color-jitter 0.4 0.4', '4 values']),
    (['--color-jitter', '.4', '.4', '.2', '.6'], ['--color-jitter', 'at most 0.5']),
    (['--blur', '1', '.1'], ['--blur 1 0.1', '3 values']),
    (['--norm-last-layer', 'maybe'], ['--norm-last-layer', "'maybe'"]),
    (['--use-fp16', 'maybe'], ['--use-fp16', "'maybe'"]),
    (['--use-fp16', 'true'], ['--amp fp16', 'needs cuda']),
    (['--arch', 'xcit_small_12_p16.fb_dino'], ['--arch xcit_small_12_p16.fb_dino', '--pretrained fb_dino']),
    (['--nb-knn', '5'], ['--nb-knn', 'without --knn-every']),
    (['--pictures-count', '5'], ['--pictures-count', 'without --pictures-every']),
    (['--preview-count', '5'], ['--preview-count', 'without --preview-crops']),
    (['--train-split', 'x'], ['--train-split', 'PICTURES']),
    (['--knn-every', '1', '--knn-data-set', 'XX'], ['--knn-data-set XX', 'must be one of']),
    (['--batch-size', '9'], ['8', '9']),
    (['--knn-every', '1'], ['--knn-every 1', '--knn-data-path']),
    (['--knn-every', '1', '--knn-data-path', '/nowhere'], ['--knn-data-path /nowhere', 'no such directory']),
    (['--pictures', '/nowhere', '--pictures-every', '1'], ['--pictures /nowhere', 'no such directory']),
    (['--val-fraction', '.1'], ['--val-fraction', 'no effect']),
    (['--pretrained', '/nowhere.pth'], ['--pretrained /nowhere.pth', 'no such file']),
    (['--data-path', '/nowhere'], ['--data-path /nowhere', 'no such directory']),
], ids=lambda value: ' '.join(value) if isinstance(value, list) and value[0].startswith('--') else '')
def test_bad_input(flat, tmp_path, flags, words):
    with pytest.raises(InputError) as caught:
        small_dino.main(small(flat, '--output-dir', str(tmp_path / 'run'), *flags))
    assert '\n' not in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == []
    assert not (tmp_path / 'run').exists()


def test_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(InputError, match='no pictures there or in its subfolders'):
        small_dino.main(small(tmp_path))


def test_labelled_classes_that_train_lacks_are_refused(flat, tmp_path):
    labelled = write_folders(tmp_path / 'labelled')
    write_image(labelled / 'val' / 'emu' / '0.png')
    with pytest.raises(InputError, match='emu'):
        small_dino.main(small(flat, '--knn-every', '1', '--knn-data-path', str(labelled), '--output-dir',
                              str(tmp_path / 'run')))
    assert not (tmp_path / 'run').exists()


def test_weights_of_another_model_are_refused_with_the_names(flat, tmp_path):
    torch.save(timm.create_model('xcit_nano_12_p16', num_classes=0).state_dict(), tmp_path / 'nano.pth')
    with pytest.raises(InputError, match=r'blocks\.1\.'):
        small_dino.main(small(flat, '--pretrained', str(tmp_path / 'nano.pth'), '--output-dir', str(tmp_path / 'run')))


def test_centre_is_found_under_any_wrapper():
    centre = torch.ones(1, 4)
    assert torch.equal(files.centre_in({'dino_loss': {'module.center': centre}}), centre)
    assert files.centre_in({"dino_loss": {}}) is None
