"""python -m dino.train from the command line: the original's numbers, files, monitoring and errors."""
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

import weights
from dino import files, monitor, train
from dino.crops import collate
from dino.networks import Head, MultiCrop
from inference.loaded import load
from loaders import batches
from loaders.transforms import ToNormalizedTensor
from run import flags as run_flags
from run.schedules import Schedule
from utils import InputError, Interrupted

TRAJECTORY = json.loads((REFERENCE / 'dino.json').read_text())['trajectory']
PLAIN = ['--flip', '0', '--color-jitter', '0', '--grayscale', '0', '--blur', '0', '--solarize', '0']  # no randomness


def small(data: Path, *more: str) -> list:
    """Return the command line of a run of one second: 13,000 weights, pictures of 32 x 32 pixels."""
    return ['--device', 'cpu', '--num-workers', '0', '--batch-size', '4', '--epochs', '2', '--warmup-epochs', '1',
            '--arch', 'xcit_test', '--out-dim', '16', '--global-crops-size', '32', '--local-crops-size', '16',
            '--local-crops-number', '1', '--data-path', str(data), *more]


@pytest.fixture(scope='module')
def flat(tmp_path_factory) -> Path:
    """Folder of 8 pictures without subfolders."""
    folder = tmp_path_factory.mktemp('flat')
    for i in range(8):
        write_image(folder / f'{i}.png', seed=i)
    return folder


@pytest.fixture(scope='module')
def trained(flat, tmp_path_factory) -> Path:
    """Folder of a run; must not be changed."""
    folder = tmp_path_factory.mktemp('runs') / 'run'
    small_dino.main(small(flat, '--output-dir', str(folder)))
    return folder


def log_of(folder: Path) -> list:
    return list(map(json.loads, (folder / 'log.txt').read_text().splitlines()))


# ---------------------------------------------------------------------------------------------------------------------
# Comparison with the original

@pytest.fixture(scope='module')
def trajectory(tmp_path_factory) -> Path:
    """Folder of a run on 10 pictures that begins with the reference's weights."""
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
    argv = ['--arch', TRAJECTORY['flags']['model'], '--pretrained', str(folder / 'start.pth'), '--device', 'cpu',
            '--data_path', str(folder / 'pictures'), '--output_dir', str(folder / 'run'), '--num_workers', '0']
    for flag, value in TRAJECTORY['flags'].items():
        if flag not in ('model', 'patch'):
            flag = f'--{flag.replace("batch-size", "batch-size-per-gpu").replace("-", "_")}'
            argv += [flag, *map(str, value if isinstance(value, list) else [value])]
    train.main(argv)
    return folder / 'run'


@pytest.mark.parametrize('name', ['train_loss', 'train_lr', 'train_wd', 'center_norm'])
def test_epochs_are_the_originals(trajectory, name):
    """Loss, schedules and centre of each epoch equal the original's."""
    values = [line[{'center_norm': 'train_center_norm'}.get(name, name)] for line in log_of(trajectory)]
    close(values, [line[name] for line in TRAJECTORY['log']], 1e-4 if name in ('train_loss', 'center_norm') else 1e-6)


def norms_of(state: dict, names) -> dict:
    return {name: float(state[f'module.{name}'].norm()) for name in names}


def test_teachers_weights_and_statistics_are_the_originals(trajectory):
    """The norms of the teacher's weights and statistics equal the original's."""
    teacher = torch.load(trajectory / 'checkpoint.pth')['teacher']
    expected = TRAJECTORY['teacher_norms']
    close(list(norms_of(teacher, expected).values()), list(expected.values()), 1e-4)


def test_student_changes_as_the_originals(trajectory):
    """Each weight of the student moves as far as in the original."""
    student = torch.load(trajectory / 'checkpoint.pth')['student']
    for name, expected in TRAJECTORY['student_changes'].items():
        value = student[f'module.{name}']
        start = torch.from_numpy(np.asarray(seeded_tensor(name, tuple(value.shape), TRAJECTORY['seed'])))
        start = torch.ones_like(start) if name.endswith('weight_g') else start
        assert float((value - start).norm()) == pytest.approx(expected, rel=2e-3, abs=1e-6), name


def test_teachers_features_are_the_originals(trajectory):
    """backbone.pth returns the features of the original's teacher."""
    model = timm.create_model('xcit_nano_12_p16', num_classes=0).eval()
    model.load_state_dict(torch.load(trajectory / 'backbone.pth')['model'])
    transform = ToNormalizedTensor()
    pictures = torch.stack([transform(Image.open(trajectory.parent / 'pictures' / f'{i}.png')) for i in range(10)])
    with torch.no_grad():
        features = model(pictures)
    close(features.norm(dim=1), TRAJECTORY['teacher_feature_norms'], 1e-3)
    first = torch.tensor(TRAJECTORY['teacher_features_first'])
    torch.testing.assert_close(features[0, :8], first, rtol=1e-3, atol=1e-3)
    unit = torch.nn.functional.normalize(features, dim=1)
    close(unit @ unit[0], TRAJECTORY['similarities_of_first'], 1e-3)


def test_defaults_are_the_originals():
    """The defaults of all flags that the original has equal its own."""
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
    """Booleans of the original's flags are given as words."""
    args = train.get_args_parser().parse_args(['--norm_last_layer', word, '--use-bn-in-head', word])
    assert (args.norm_last_layer, args.use_bn_in_head) == (value, value)


def test_help_needs_no_network():
    """--help works without a network."""
    out, = run(['-c', 'import socket, sys; socket.socket.connect = socket.getaddrinfo = None; from dino import train; '
                      'train.get_args_parser().print_help()'], 1)
    assert '--momentum-teacher' in out


# ---------------------------------------------------------------------------------------------------------------------
# Processes and positions

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
    """Metrics, centre and weights of two processes equal those of one with the double batch."""
    results = {}
    for world, batch in ((1, 8), (2, 4)):
        folder = tmp_path / str(world)
        run(['-c', ONE_STEP, *small(flat, *PLAIN, '--global-crops-scale', '1', '1', '--local-crops-scale', '1', '1',
                                    '--batch-size', str(batch), '--drop-path-rate', '0', '--clip-grad', '.05',
                                    '--lr', '.1', '--optimizer', 'sgd', '--output-dir', str(folder),
                                    '--epochs', '3')], world)
        checkpoint = torch.load(folder / 'checkpoint.pth')
        metrics = ('loss', 'teacher_entropy', 'mean_entropy', 'feature_spread', 'grad_norm')
        results[world] = ([[line[f'train_{name}'] for name in metrics] for line in log_of(folder)],
                          checkpoint['dino_loss']['center'], checkpoint['student'], checkpoint['teacher'])
    torch.testing.assert_close(results[2], results[1], rtol=1e-4, atol=1e-6)


def test_crops_differ_between_pictures_ranks_and_epochs(flat, monkeypatch):
    """Crops are a function of seed, epoch and position: no two are equal, and a repeated epoch is."""
    args = train.parse_args(small(flat, '--batch-size', '2'))
    monkeypatch.setattr(batches, 'get_world_size', lambda: 2)
    loaders = []
    for epoch, rank in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 0)):
        monkeypatch.setattr(batches, 'get_rank', lambda rank=rank: rank)
        loading = run_flags.loading(args, torch.device('cpu'))
        loader = batches.build_train_loader(train.build_dataset(args), loading, collate_fn=collate)
        loader.set_position(epoch, 0)
        loaders.append(torch.cat([batch[0] for batch in loader]))
    assert torch.equal(loaders[0], loaders[-1])
    flattened = torch.cat(loaders[:-1]).flatten(1)
    assert len(flattened.unique(dim=0)) == len(flattened)


# ---------------------------------------------------------------------------------------------------------------------
# Data

def test_pictures_are_found_in_subfolders(tmp_path, capsys):
    """Pictures are found in subfolders of any depth; other files are ignored."""
    write_image(tmp_path / 'a' / 'b' / '0.png')
    write_image(tmp_path / 'c.jpg')
    (tmp_path / 'notes.txt').write_text('no picture')
    args = train.parse_args(small(tmp_path))
    assert len(train.build_dataset(args)) == 2


def test_pictures_of_train_are_used(tmp_path, capsys):
    """Pictures come from train/ if the folder has val/, too, which is logged."""
    write_folders(tmp_path / 'data')
    assert len(train.build_dataset(train.parse_args(small(tmp_path / 'data')))) == 16
    assert 'using train/' in capsys.readouterr().out


@pytest.mark.parametrize('skipped', [True, False])
def test_unreadable_picture(tmp_path, capsys, skipped):
    """An unreadable picture is an error, or skipped with --skip-bad-images."""
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
    """--preview-crops writes some pictures with all of their crops and a sheet, and nothing else happens."""
    monkeypatch.setattr(train, 'build_networks', None)
    train.main(small(flat, '--preview-crops', str(tmp_path / 'crops'), '--preview-count', '3', '--output-dir',
                     str(tmp_path / 'run')))
    names = sorted(path.name for path in (tmp_path / 'crops').iterdir())
    assert len(names) == 13
    first = train.build_dataset(train.parse_args(small(flat))).files()[0]
    kinds = ('global1', 'global2', 'local1', 'original')
    assert names[:4] == [f'000000_{Path(first).stem}_{kind}.png' for kind in kinds]
    assert [Image.open(tmp_path / 'crops' / name).size for name in names[:3]] == [(32, 32), (32, 32), (16, 16)]
    assert np.array_equal(Image.open(tmp_path / 'crops' / names[3]), Image.open(first))
    assert names[-1] == 'crops.png'
    assert Image.open(tmp_path / 'crops' / 'crops.png').width == 4 * 96 + 3 * 8
    assert not (tmp_path / 'run').exists()


def test_training_with_global_crops_only(flat, tmp_path):
    """Training with --local-crops-number 0 has a finite loss."""
    small_dino.main(small(flat, '--local-crops-number', '0', '--output-dir', str(tmp_path / 'run'), '--epochs', '1'))
    assert math.isfinite(log_of(tmp_path / 'run')[0]['train_loss'])


# ---------------------------------------------------------------------------------------------------------------------
# Files

def test_training_writes_what_the_original_writes(trained):
    """A checkpoint has the original's keys and names."""
    content = torch.load(trained / 'checkpoint.pth')
    assert {'student', 'teacher', 'optimizer', 'epoch', 'args', 'dino_loss', 'fp16_scaler'} <= content.keys()
    assert (content['epoch'], list(content['dino_loss'])) == (2, ['center'])
    heads = {key.removeprefix('module.head.') for key in content['student'] if key.startswith('module.head.')}
    assert heads == {*(f'mlp.{i}.{name}' for i in (0, 2, 4) for name in ('weight', 'bias')), 'last_layer.weight_g',
                     'last_layer.weight_v'}
    assert all(key.startswith('module.backbone.') for key in content['teacher'].keys() - {
        f'module.head.{name}' for name in heads})
    assert isinstance(content['args'], dict)


def test_epochs_that_are_kept(flat, tmp_path):
    """Checkpoints of every --saveckp-freq epochs and of the last epoch are kept."""
    small_dino.main(small(flat, '--epochs', '4', '--saveckp-freq', '2', '--output-dir', str(tmp_path)))
    assert sorted(path.name for path in tmp_path.glob('checkpoint0*')) == [
        'checkpoint0000.pth', 'checkpoint0002.pth', 'checkpoint0003.pth']


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_backbone_is_the_teachers(flat, tmp_path, suffix):
    """The backbone's file holds the teacher's backbone."""
    small_dino.main(small(flat, '--output-dir', str(tmp_path), '--backbone-format', suffix, '--epochs', '1'))
    path = tmp_path / f'backbone.{suffix}'
    backbone = torch.load(path)['model'] if suffix == 'pth' else safetensors.torch.load_file(path)
    teacher = torch.load(tmp_path / 'checkpoint.pth')['teacher']
    assert backbone.keys() == {key.removeprefix('module.backbone.') for key in teacher if 'backbone' in key}
    assert all(torch.equal(value, teacher[f'module.backbone.{key}']) for key, value in backbone.items())


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_backbone_describes_its_model(flat, tmp_path, suffix):
    """The backbone's file is read as checkpoint.pth: with its model, size, crop and normalisation; timm opens it."""
    small_dino.main(small(flat, '--output-dir', str(tmp_path), '--backbone-format', suffix, '--epochs', '1',
                          '--mean', '.3', '.4', '.5', '--global-crops-size', '48'))
    path = str(tmp_path / f'backbone.{suffix}')
    own, checkpoint = (load(file) for file in (path, str(tmp_path / 'checkpoint.pth')))
    assert (own.name, own.view, own.seed) == (checkpoint.name, checkpoint.view, checkpoint.seed)
    assert (own.name, own.view.input_size, own.view.mean) == ('xcit_test', 48, [.3, .4, .5])
    images = torch.randn(1, 3, 48, 48)
    theirs = timm.create_model('xcit_test', num_classes=0, checkpoint_path=path).eval()
    torch.testing.assert_close(theirs(images), checkpoint.model(images), rtol=1e-4, atol=1e-5)


def test_log_has_the_metrics_of_an_epoch(trained):
    """Each line of log.txt has all metrics of its epoch."""
    assert {'epoch', 'train_loss', 'train_lr', 'train_wd', 'train_teacher_entropy', 'train_mean_entropy',
            'train_center_norm', 'train_feature_spread', 'train_images_per_s'} <= log_of(trained)[0].keys()


def student_of(folder: Path) -> dict:
    return torch.load(folder / 'checkpoint.pth')['student']


def renamed_head(name: str) -> str:
    return name.replace('head.mlp.', 'projection_head.').replace('head.last_layer.', 'prototypes.')


OTHERS = {  # names of a weight in files of other years
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
        return *train.build_networks(args, criterion)[:2], criterion


@pytest.mark.parametrize('other', OTHERS)
def test_files_of_other_years_are_read(trained, flat, tmp_path, other):
    """--pretrained accepts the names that files of other years have."""
    content = torch.load(trained / 'checkpoint.pth')
    args = argparse.Namespace(arch='xcit_test', lr=np.float64(.1))
    torch.save({**{name: {OTHERS[other](key): value for key, value in content[name].items()}
                   for name in ('student', 'teacher')}, 'args': args, 'epoch': 2,
                'optimizer': {'param_groups': [{'lr': np.float64(.1)}], 'state': {}}}, tmp_path / 'other.pth')
    student, teacher, criterion = load_pretrained(tmp_path / 'other.pth', flat)
    for name, network in (('student', student), ('teacher', teacher)):
        state = network.state_dict()
        assert all(torch.equal(state[key.removeprefix('module.')], value) for key, value in content[name].items())
    assert not criterion.center.any()


def test_pretrained_checkpoint_includes_the_centre(trained, flat):
    """--pretrained loads the centre of a checkpoint."""
    _, _, criterion = load_pretrained(trained / 'checkpoint.pth', flat)
    assert torch.equal(criterion.center, torch.load(trained / 'checkpoint.pth')['dino_loss']['center'])
    assert criterion.center.any()


def test_backbone_file_starts_both_networks(trained, flat, capsys):
    """A backbone's weights are loaded into both networks, whose heads are equal and new."""
    student, teacher, _ = load_pretrained(trained / 'backbone.pth', flat)
    expected = torch.load(trained / 'backbone.pth')['model']
    for network in (student, teacher):
        assert all(torch.equal(network.backbone.state_dict()[key], value) for key, value in expected.items())
    assert torch.equal(student.head.mlp[0].weight, teacher.head.mlp[0].weight)
    assert 'their heads are new' in capsys.readouterr().out


def test_initial_loss_is_named_for_new_heads_only(trained, flat, capsys):
    """The line about the initial loss is only true for new heads, not for those of a checkpoint."""
    for name, is_named in (('checkpoint.pth', False), ('backbone.pth', True)):
        small_dino.main(small(flat, '--epochs', '1', '--output-dir', '', '--pretrained', str(trained / name)))
        assert ('The loss begins at' in capsys.readouterr().out) == is_named


def test_head_of_another_width_is_refused_with_the_names(trained, flat):
    """A head that does not match is an error with the names of its weights."""
    args = train.parse_args(small(flat, '--pretrained', str(trained / 'checkpoint.pth')))
    with pytest.raises(InputError, match=r'head\.mlp\.0\.weight .*only the heads differ: .* with backbone\.pth'):
        train.build_networks(args, train.DinoLoss(16, 3))  # of 2048 hidden numbers


@pytest.mark.parametrize(('flag', 'value'), [
    ('--epochs', '3'), ('--warmup-epochs', '0'), ('--lr', '0.1'), ('--teacher-temp', '0.07'),
    ('--local-crops-number', '2'), ('--data-set', 'SAMPLE')])
def test_resume_with_another_recipe_is_refused(trained, flat, tmp_path, flag, value):
    """A resume with another value of a fixed flag is refused, and leaves no folder."""
    with pytest.raises(InputError, match=f'was trained with {flag} .*, not {value}; .* --pretrained .*checkpoint.pth '):
        small_dino.main([*small(flat, flag, value), '--resume', str(trained / 'checkpoint.pth'), '--output-dir',
                         str(tmp_path / 'run')])
    assert not (tmp_path / 'run').exists()


def test_resume_with_other_pictures_is_refused(trained, flat, tmp_path):
    """A resume with other file names is refused; the folder may move."""
    for folder, name in (('moved', '{}'), ('other', 'x{}')):
        (tmp_path / folder).mkdir()
        for path in flat.iterdir():
            (tmp_path / folder / name.format(path.name)).write_bytes(path.read_bytes())
    resume = ['--resume', str(trained / 'checkpoint.pth'), '--output-dir', str(tmp_path / 'run')]
    small_dino.main([*small(tmp_path / 'moved'), *resume])
    with pytest.raises(InputError, match=r'8 images with other names.*; .* --pretrained'):
        small_dino.main([*small(tmp_path / 'other'), *resume])


def test_resume_sets_the_rates_of_the_last_step(flat):
    """A resumed optimizer has the rates of its last step, also if that step had fewer batches than --accum-iter."""
    curves = train.build_curves(train.parse_args(small(flat, '--epochs', '3')), lr=.1, steps=3)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.)
    position = files.NextEpoch(3)
    position.done, position.step = 0, 5  # of 5 batches, two in a step
    Schedule(optimizer, curves['lr']).resume(position.updates_done(per_round=3, accum_iter=2))
    assert optimizer.param_groups[0]['lr'] == curves['lr'][5]


def test_files_of_the_user_are_not_moved(tmp_path, monkeypatch):
    """A run in the current folder, the default, only moves files of earlier runs."""
    for i in range(4):
        write_image(tmp_path / 'pictures' / f'{i}.png', seed=i)
    (tmp_path / 'backbone.py').write_text('')
    monkeypatch.chdir(tmp_path)
    small_dino.main(small(Path('pictures'), '--epochs', '1'))
    small_dino.main(small(Path('pictures'), '--epochs', '1'))
    assert len(list((tmp_path / 'pictures').iterdir())) == 4
    assert (tmp_path / 'backbone.py').exists()


def test_resume_with_more_pictures_is_refused(trained, flat, tmp_path):
    """A resume with more pictures than the checkpoint's run is refused with both numbers."""
    write_image(tmp_path / 'more' / '8.png')
    for path in flat.iterdir():
        (tmp_path / 'more' / path.name).write_bytes(path.read_bytes())
    with pytest.raises(InputError, match='was trained on 8 images; --data-path contains 9'):
        small_dino.main([*small(tmp_path / 'more'), '--resume', str(trained / 'checkpoint.pth')])


# ---------------------------------------------------------------------------------------------------------------------
# Monitoring, and further flags

def build_monitor(args, dataset=None) -> monitor.Monitor:
    return monitor.build(args, dataset, run_flags.loading(args, torch.device('cpu')), None)


def test_each_kind_of_collapse_is_logged_once(flat, capsys):
    """A warning about each kind of collapse appears once, with remedies, not in the first epoch of a warm-up."""
    watch = build_monitor(train.parse_args(small(flat)))
    stats = dict(train_teacher_entropy=2.77, train_mean_entropy=2.772, train_feature_spread=.3)
    for epoch in range(3):
        watch.after_epoch(epoch, stats, None, None)
    watch.after_epoch(3, {**stats, 'train_feature_spread': .01}, None, None)
    out = capsys.readouterr().out
    assert out.count('collapse') == 2
    assert 'collapse in epoch 1: the teacher\'s output is uniform for every image' in out
    assert 'collapse in epoch 3: the features of all images are alike' in out
    assert '--teacher-temp' in out


def test_collapse_of_a_run_is_logged(flat, tmp_path, capsys):
    """A very high temperature makes the teacher's output uniform, which is logged."""
    small_dino.main(small(flat, '--teacher-temp', '100', '--warmup-teacher-temp', '100', '--epochs', '3',
                          '--output-dir', str(tmp_path / 'run')))
    assert capsys.readouterr().out.count('Warning: collapse in epoch 1: the teacher\'s output is uniform') == 1


def test_best_knn_is_kept(flat, tmp_path, capsys):
    """k-NN is measured before training and every N epochs; the best epoch is best_checkpoint.pth."""
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
    """Drawings are written before training and every N epochs, also to TensorBoard."""
    small_dino.main(small(flat, '--pictures-every', '2', '--pictures-count', '2', '--output-dir', str(tmp_path)))
    names = sorted(path.name for path in (tmp_path / 'dino_pictures').iterdir())
    assert names == ['before.png', 'epoch0001.png']
    sheet = Image.open(tmp_path / 'dino_pictures' / 'epoch0001.png')
    assert len(sheet.getcolors(1 << 20)) > 50
    events = EventAccumulator(str(tmp_path / 'tb'), size_guidance={'images': 0}).Reload()
    assert [event.step for event in events.Images('pictures')] == [-1, 1]


def test_a_resume_hides_no_picture(flat, tmp_path, ordered_events):
    """TensorBoard shows every drawing once at its epoch, after a resume too, and 'before' at -1."""
    flags = ['--pictures-every', '1', '--pictures-count', '1', '--output-dir', str(tmp_path)]
    with pytest.raises(Interrupted):
        small_dino.main(small(flat, *flags, '--stop-after-epochs', '1'))
    small_dino.main(small(flat, *flags, '--resume', 'auto'))
    events = EventAccumulator(str(tmp_path / 'tb'), size_guidance={'images': 0}).Reload()
    assert [event.step for event in events.Images('pictures')] == [-1, 0, 1]
    assert [event.step for event in events.Scalars('train/loss')] == [0, 1]


def test_the_epoch_of_a_file_is_the_tables(flat, tmp_path):
    """Messages about checkpoint0001.pth and the table number its epoch 1."""
    small_dino.main(small(flat, '--output-dir', str(tmp_path), '--saveckp-freq', '1'))
    notes = [weights.read(str(tmp_path / name), '--pretrained', 'xcit_test').description for name in
             ('checkpoint0000.pth', 'checkpoint0001.pth', 'checkpoint.pth')]
    assert [note.rpartition('epoch ')[2] for note in notes] == ['0', '1', '1']


def test_large_pictures_are_drawn_at_the_size_of_the_crops(flat, tmp_path):
    """A photo is drawn at the size of small crops: its own size would be many thousands of patches."""
    write_image(tmp_path / 'photos' / '0.png', size=(3000, 2000))
    watch = build_monitor(train.parse_args(small(flat, '--pictures-every', '1', '--pictures', str(tmp_path / 'photos'),
                                                 '--output-dir', str(tmp_path / 'run'))))
    backbone = timm.create_model('xcit_nano_12_p16', num_classes=0).eval()
    assert max(watch.drawing.sheet(backbone).size) < 400


def test_labels_are_ignored(tmp_path):
    """Labelled data sets are used without their labels, also with one class and no val/."""
    args = train.parse_args(small(tmp_path, '--data-set', 'SAMPLE'))
    assert len(train.build_dataset(args)) > 1000
    write_image(tmp_path / 'only' / 'train' / 'cat' / '0.png')
    args = train.parse_args(small(tmp_path / 'only', '--data-set', 'FOLDER'))
    assert len(train.build_dataset(args)) == 1


def test_accumulation_does_not_enlarge_the_batch_of_the_centre(flat, tmp_path, capsys):
    """The log contains the number of images behind centre and BatchNorm with --accum-iter."""
    small_dino.main(small(flat, '--accum-iter', '2', '--output-dir', str(tmp_path), '--epochs', '1'))
    assert 'centre and BatchNorm from 4 images at a time' in capsys.readouterr().out


@pytest.mark.parametrize('flags', [['--grad-checkpointing'], ['--amp', 'bf16'], ['--optimizer', 'lars'],
                                   ['--use-bn-in-head', 'true', '--norm-last-layer', 'false'],
                                   pytest.param(['--compile'], marks=pytest.mark.slow)], ids=' '.join)
def test_other_ways_to_train(flat, tmp_path, flags):
    """Training with gradient checkpointing, bf16, LARS, another head or compilation has a finite loss."""
    small_dino.main(small(flat, *flags, '--output-dir', str(tmp_path)))
    assert math.isfinite(log_of(tmp_path)[-1]['train_loss'])


@pytest.mark.gpu
@pytest.mark.parametrize('flags', [[], ['--use_fp16', 'true'], ['--amp', 'off', '--compile']], ids=' '.join)
def test_training_on_a_gpu(flat, tmp_path, flags):
    """Training, k-NN and drawings work in bf16 (the default), in fp16 with its scaler, and compiled."""
    labelled = write_folders(tmp_path / 'labelled')
    small_dino.main(small(flat, '--device', 'cuda', *flags, '--knn-every', '1', '--knn-data-path', str(labelled),
                          '--nb-knn', '3', '--pictures-every', '1', '--output-dir', str(tmp_path / 'run')))
    lines = log_of(tmp_path / 'run')
    assert all(math.isfinite(line['train_loss']) and 'knn_top1' in line for line in lines)
    assert torch.load(tmp_path / 'run' / 'checkpoint.pth')['args']['amp'] == {
        '': 'bf16', '--use_fp16 true': 'fp16', '--amp off --compile': 'off'}[' '.join(flags)]


def test_defaults_fit_a_short_run_on_small_crops(capsys):
    """Warm-up, frozen prototypes and local crops adapt to --epochs and --global-crops-size, and are logged."""
    flags = ['--device', 'cpu', '--arch', 'xcit_nano_12_p16', '--data-path', 'x']
    args = train.parse_args([*flags, '--epochs', '5', '--global-crops-size', '64'])
    assert (args.warmup_epochs, args.freeze_last_layer, args.local_crops_size) == (1, 1, 32)
    assert '--warmup-epochs 1 is used, because the default, 10, does not fit --epochs 5\n' in capsys.readouterr().out
    args = train.parse_args([*flags, '--epochs', '1'])
    assert (args.warmup_epochs, args.freeze_last_layer, args.local_crops_size) == (0, 0, 96)


def test_default_batch_fits_few_pictures(flat, tmp_path, capsys):
    """A folder with fewer pictures than the default of --batch-size is one batch; a size that is given is refused."""
    argv = [word for word in small(flat, '--epochs', '1', '--warmup-epochs', '0') if word not in ('--batch-size', '4')]
    small_dino.main([*argv, '--output-dir', str(tmp_path)])
    assert 'an epoch has 8 images per process; using batches of 8' in capsys.readouterr().out
    with pytest.raises(InputError, match='--batch-size 65: an epoch has 8 images'):
        small_dino.main([*argv, '--batch-size', '65', '--output-dir', str(tmp_path / 'other')])


# ---------------------------------------------------------------------------------------------------------------------
# Bad input

@pytest.mark.parametrize(('flags', 'parts'), [
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
    (['--arch', 'resnet18'], ['--arch resnet18', 'not an XCiT model']),
    (['--arch', 'vit_small'], ['--arch vit_small: no such XCiT model; similar: xcit_small']),
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
    (['--compile-mode', 'max-autotune'], ['--compile-mode max-autotune', 'without --compile']),
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
def test_bad_input(flat, tmp_path, flags, parts):
    """An invalid flag is one line with flag and value, and leaves no folder."""
    with pytest.raises(InputError) as caught:
        small_dino.main(small(flat, '--output-dir', str(tmp_path / 'run'), *flags))
    assert '\n' not in str(caught.value)
    assert [part for part in parts if part not in str(caught.value)] == []
    assert not (tmp_path / 'run').exists()


def test_folder_without_pictures_is_refused(tmp_path):
    """A --data-path without pictures is refused."""
    with pytest.raises(InputError, match='no pictures there or in its subfolders'):
        small_dino.main(small(tmp_path))


def test_labelled_classes_that_train_lacks_are_refused(flat, tmp_path):
    """Test images of a class without training images are an error."""
    labelled = write_folders(tmp_path / 'labelled')
    write_image(labelled / 'val' / 'emu' / '0.png')
    with pytest.raises(InputError, match='emu'):
        small_dino.main(small(flat, '--knn-every', '1', '--knn-data-path', str(labelled), '--output-dir',
                              str(tmp_path / 'run')))
    assert not (tmp_path / 'run').exists()


def test_weights_of_another_model_are_refused_with_the_names(flat, tmp_path):
    """Weights of another model are an error with their names."""
    torch.save(timm.create_model('xcit_nano_12_p16', num_classes=0).state_dict(), tmp_path / 'nano.pth')
    with pytest.raises(InputError, match='checkpoint is xcit_nano_12_p16, --arch is xcit_test'):
        small_dino.main(small(flat, '--pretrained', str(tmp_path / 'nano.pth'), '--output-dir', str(tmp_path / 'run')))


def test_centre_is_found_under_any_wrapper():
    """The centre is found under any prefix; it may be missing."""
    centre = torch.ones(1, 4)
    assert torch.equal(files.centre_in({'dino_loss': {'module.center': centre}}), centre)
    assert files.centre_in({"dino_loss": {}}) is None
