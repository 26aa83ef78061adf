"""Model, size, crop and normalisation of weights, which every program takes from their file."""
import json
from pathlib import Path

import pytest
import torch
from conftest import seeded_model, tiniest, write_folders

import hubconf
import main
from classification import teacher
from dino import knn, linear
from dino import train as dino_train
from inference import loaded, setting
from tools import convert_checkpoint, export, extract_features, predict, push_to_hub, visualize_attention
from utils import InputError

MEAN, STD = ['0.4', '0.5', '0.6'], ['0.1', '0.2', '0.3']
OWN = '--model xcit_test --input-size 48 --full-crop --mean 0.4 0.5 0.6 --std 0.1 0.2 0.3'


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    return write_folders(tmp_path_factory.mktemp('data'), size=(64, 56))


@pytest.fixture(scope='module')
def run(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('runs') / 'run'
    main.main(tiniest(data, '--epochs', '1', '--input-size', '48', '--full-crop', '--mean', *MEAN, '--std', *STD,
                      '--output-dir', str(folder)))
    return folder


def evaluate(data: Path, *words) -> dict:
    return main.main(['--eval', *map(str, words), '--data-set', 'FOLDER', '--data-path', str(data), '--device', 'cpu',
                      '--num-workers', '0'])


@pytest.mark.parametrize('flag', ['--resume', '--pretrained'])
def test_evaluation_needs_no_flags(data, run, capsys, flag):
    """The evaluation of a run's file has the setting and the loss of the run's own evaluation, and logs it once."""
    file = run / 'checkpoint.pth'
    stats = evaluate(data, flag, file)
    line = json.loads((run / 'log.txt').read_text())
    assert (stats['model'], stats['resolution'], stats['crop']) == ('xcit_test', [48, 48], 1.)
    assert stats['loss'] == pytest.approx(line['test_loss'], rel=1e-4)
    assert capsys.readouterr().out.count(f'{flag} {file}: using {OWN}, as in the checkpoint\n') == 1


def test_resume_auto_is_evaluated(data, run):
    """--resume auto takes the setting from the checkpoint in --output-dir."""
    args = main.parse_args(['--eval', '--resume', 'auto', '--output-dir', str(run)])
    assert (args.model, args.input_size, args.full_crop) == ('xcit_test', 48, True)
    with pytest.raises(InputError, match=r'--resume auto: no checkpoint\.pth in'):
        main.parse_args(['--eval', '--resume', 'auto', '--output-dir', str(data)])


def test_flags_win(data, run, capsys):
    """Flags that differ from the file are used, and logged in one line."""
    stats = evaluate(data, '--resume', run / 'checkpoint.pth', '--input-size', 32, '--no-full-crop', '--mean', *MEAN)
    assert (stats['resolution'], stats['crop']) == ([32, 32], .875)
    lines = [line for line in capsys.readouterr().out.splitlines() if 'instead of' in line]
    assert lines == [f'--resume {run}/checkpoint.pth: using --input-size 32 --no-full-crop instead of its own '
                     f'--input-size 48 --full-crop']


def test_tools_log_flags_that_differ(data, run, capsys):
    """A tool with the file's own values as flags logs nothing, and with others one line."""
    predict.main([str(data / 'val'), '--pretrained', str(run / 'checkpoint.pth'), '--input-size', '48', '--full-crop',
                  '--device', 'cpu', '--num-workers', '0'])
    assert 'instead of' not in capsys.readouterr().err
    results = knn.main(['--pretrained', str(run / 'checkpoint.pth'), '--nb-knn', '3', '--mean', '0.5', '0.5', '0.5',
                        '--data-set', 'FOLDER', '--data-path', str(data), '--device', 'cpu', '--num-workers', '0'])
    assert results['model'] == 'xcit_test'
    assert ': using --mean 0.5 0.5 0.5 instead of its own --mean 0.4 0.5 0.6\n' in capsys.readouterr().out


def test_small_photos_are_seen_as_in_training(tmp_path):
    """A model trained on resized photos at 32 pixels resizes small pictures, too."""
    content = {'model': seeded_model('xcit_test', num_classes=2).state_dict(),
               'args': {'model': 'xcit_test', 'input_size': 32, 'full_crop': False, 'resize': True}}
    torch.save(content, tmp_path / 'w.pth')
    assert loaded.load(str(tmp_path / 'w.pth')).view.resizes
    assert main.parse_args(['--eval', '--resume', str(tmp_path / 'w.pth'), '--data-set', 'SAMPLE']).resize


def test_fine_tuning_takes_the_normalisation(run):
    """--finetune takes model and normalisation of its file, but neither size nor crop."""
    args = main.parse_args(['--data-set', 'SAMPLE', '--finetune', str(run / 'checkpoint.pth')])
    assert (args.model, args.mean, args.std) == ('xcit_test', [.4, .5, .6], [.1, .2, .3])
    assert (args.input_size, args.full_crop) == (224, True)
    args = main.parse_args(['--data-set', 'SAMPLE', '--finetune', str(run / 'checkpoint.pth'), '--mean', '0', '0', '0'])
    assert (args.mean, args.std) == ([0, 0, 0], [.1, .2, .3])


@pytest.mark.parametrize(('words', 'expected'), [
    (['--pretrained', 'fb_dist_in1k_384'], ('xcit_small_12_p16', 384, True)),
    (['--pretrained', 'xcit_nano_12_p8.fb_in1k'], ('xcit_nano_12_p8', 224, True)),
    (['--model', 'xcit_nano_12_p16.fb_dist_in1k_384'], ('xcit_nano_12_p16.fb_dist_in1k_384', 384, True)),
    (['--pretrained', 'https://dl.fbaipublicfiles.com/xcit/xcit_tiny_12_p8_384_dist.pth'],
     ('xcit_tiny_12_p8', 384, True)),
    (['--pretrained', 'fb_dist_in1k_384', '--input-size', '224', '--no-full-crop'], ('xcit_small_12_p16', 224, False))])
def test_published_weights_have_the_published_setting(words, expected):
    """Resolution and crop of published weights are the published ones, unless a flag is given."""
    args = main.parse_args(['--eval', *words])
    assert (args.model, args.input_size, args.full_crop) == expected


def test_weights_alone_name_their_model(tmp_path):
    """A file of tensors alone is of the XCiT with these shapes, also in timm's naming or in DINO's."""
    state = seeded_model('xcit_nano_12_p16', num_classes=0).state_dict()
    for content in (state, {'teacher': {f'module.backbone.{key}': value for key, value in state.items()}}):
        assert setting.of(content) == {'model': 'xcit_nano_12_p16'}
    assert setting.of({'model': {'fc.weight': torch.zeros(2, 2)}}) == {}


def test_teacher_is_normalised_as_in_its_file(data, run, capsys):
    """A teacher of main.py gets images with the normalisation in its file."""
    options = dict(path=str(run / 'checkpoint.pth'), pretrained=False, input_size=32, mean=None, std=None)
    teacher.build('xcit_test', 2, **options)
    assert 'normalised by mean (0.4, 0.5, 0.6) and standard deviation (0.1, 0.2, 0.3)' in capsys.readouterr().out
    student = ((.4, .5, .6), (.1, .2, .3))
    images, (mean, std) = torch.rand(1, 3, 32, 32), teacher.IMAGENET
    plain, adapted = (teacher.build('xcit_test', 2, **options, student=normalisation)
                      for normalisation in (student, teacher.IMAGENET))
    own, imagenet = ((images - torch.tensor(m)[:, None, None]) / torch.tensor(s)[:, None, None]
                     for m, s in (student, (mean, std)))
    torch.testing.assert_close(adapted(imagenet), plain(own), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope='module')
def nano_p8(tmp_path_factory) -> str:
    """Weights of xcit_nano_12_p8, alone."""
    path = tmp_path_factory.mktemp('weights') / 'nano.pth'
    torch.save(seeded_model('xcit_nano_12_p8', num_classes=2).state_dict(), path)
    return str(path)


OTHER = ['--model', 'xcit_nano_12_p16']
PROGRAMS = {
    '--resume': lambda file, data, out: evaluate(data, '--resume', file, *OTHER),
    '--pretrained': lambda file, data, out: evaluate(data, '--pretrained', file, *OTHER),
    '--finetune': lambda file, data, out: main.main(tiniest(data, '--finetune', file, *OTHER)),
    'teacher': lambda file, data, out: main.main(tiniest(
        data, '--distillation-type', 'hard', '--teacher-path', file, '--teacher-model', 'xcit_nano_12_p16')),
    'predict': lambda file, data, out: predict.main([str(data / 'val'), '--pretrained', file, *OTHER]),
    'extract': lambda file, data, out: extract_features.main(
        [str(data), '--pretrained', file, '--output', f'{out}/f.npz', *OTHER]),
    'export': lambda file, data, out: export.main(
        ['--format', 'torchscript', '--pretrained', file, '--output', f'{out}/m.pt', *OTHER]),
    'attention': lambda file, data, out: visualize_attention.main(
        [str(data / 'val'), '--pretrained', file, '--output-dir', str(out), *OTHER]),
    'convert': lambda file, data, out: convert_checkpoint.main([file, f'{out}/w.pth', '--to', 'original', *OTHER]),
    'push': lambda file, data, out: push_to_hub.main(
        ['--pretrained', file, '--repo', 'me/x', '--dry-run', '--output-dir', f'{out}/hub', *OTHER]),
    'knn': lambda file, data, out: knn.main(['--pretrained', file, '--data-set', 'FOLDER', '--data-path', str(data),
                                             '--device', 'cpu', '--arch', 'xcit_nano_12_p16']),
    'linear': lambda file, data, out: linear.main(
        ['--pretrained', file, '--data-set', 'FOLDER', '--data-path', str(data), '--device', 'cpu', *OTHER]),
    'dino': lambda file, data, out: dino_train.main(
        ['--pretrained', file, '--data-path', str(data), '--device', 'cpu', '--output-dir', str(out), '--batch-size',
         '4', '--out-dim', '16', '--warmup-epochs', '0', '--arch', 'xcit_nano_12_p16']),
    'hub': lambda file, data, out: hubconf.xcit_nano_12_p16(pretrained=file),
}


@pytest.mark.parametrize('program', PROGRAMS)
def test_another_model_is_one_line(nano_p8, data, tmp_path, program):
    """Each program refuses weights of another model with both names."""
    flag = {'teacher': '--teacher-model', 'dino': '--arch', 'hub': 'the model'}.get(program, '--model')
    with pytest.raises(InputError, match=rf'\.pth: checkpoint is xcit_nano_12_p8, {flag} is xcit_nano_12_p16$'):
        PROGRAMS[program](nano_p8, data, tmp_path)


def test_run_of_another_model_is_not_resumed(data, tmp_path):
    """A training with another --model than that of its checkpoint is refused with both names."""
    for name in ('xcit_nano_12_p16', 'xcit_nano_12_p8'):
        words = tiniest(data, '--model', name, '--epochs', '1', '--output-dir', str(tmp_path), '--resume', 'auto')
        if name == 'xcit_nano_12_p16':
            main.main(words)
    with pytest.raises(InputError, match=r'\.pth: checkpoint is xcit_nano_12_p16, --model is xcit_nano_12_p8$'):
        main.main(words)


def test_another_tags_model_is_one_line():
    """A tag of another model is refused with both names."""
    with pytest.raises(InputError, match=r'checkpoint is xcit_nano_12_p8, --model is xcit_tiny_12_p8$'):
        main.parse_args(['--eval', '--model', 'xcit_tiny_12_p8', '--pretrained', 'xcit_nano_12_p8.fb_in1k'])
