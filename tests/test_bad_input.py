"""Mistakes of users: each ends in one clear line and exit code 2 before any work, and nothing is written."""
import pickle
from pathlib import Path
from typing import Optional

import pytest
import timm
import torch
from conftest import ROOT, tiniest, tiny, write_folders, write_image
from processes import finish, start

from loaders import pictures
from main import main, parse_args
from utils import InputError, NonFiniteLoss, UnreadableImage


def refused(argv: list, *words: str, output_dir: Optional[Path] = None):
    """Assert that a command is refused in one line that contains `words`, and that nothing was written."""
    if output_dir is not None:
        argv = [*argv, '--output-dir', str(output_dir)]
    with pytest.raises(InputError) as caught:
        main(argv)
    message = str(caught.value)
    assert '\n' not in message
    for word in words:
        assert str(word) in message
    assert output_dir is None or not output_dir.exists()


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    return write_folders(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def weights(tmp_path_factory) -> Path:
    """Weights of the tests' model for 2 classes."""
    path = tmp_path_factory.mktemp('weights') / 'nano.pth'
    torch.save({'model': timm.create_model('xcit_nano_12_p16', num_classes=2).state_dict()}, path)
    return path


@pytest.fixture(scope='module')
def finished(data, tmp_path_factory) -> Path:
    """The directory of a run of one epoch; not to be changed."""
    run = tmp_path_factory.mktemp('runs') / 'run'
    main(tiny(data, '--epochs', '1', '--output-dir', str(run)))
    return run


# ----- the command line

def test_program_prints_one_line_and_exits_with_2():
    """A user reads one line on stderr, without a traceback, and nothing on stdout."""
    (code, out, err), = finish(start([ROOT / 'main.py', '--model', 'xcit_smal_12_p16', '--device', 'cpu'], 1))
    assert (code, out) == (2, '')
    assert err.splitlines() == [err.rstrip('\n')]
    assert err.startswith('main.py: error: --model xcit_smal_12_p16: no such model; similar: ')
    assert 'xcit_small_12_p16' in err


@pytest.mark.parametrize(('flags', 'words'), [
    (['--batch-size', '-3'], ["'-3'", 'an integer >= 1']),
    (['--batch-size', '2.5'], ["'2.5'", 'an integer >= 1']),
    (['--input-size', '0'], ["'0'", 'an integer >= 1']),
    (['--drop-path', '1.5'], ["'1.5'", '<= 0.999']),
    (['--drop', '-0.1'], ["'-0.1'", '>= 0 and <= 1']),
    (['--lr', '0'], ["'0'", 'a number > 0']),
    (['--lr', 'nan'], ["'nan'", 'a number > 0']),
    (['--lr', 'inf'], ["'inf'", 'a number > 0']),
    (['--weight-decay', '-1'], ["'-1'"]),
    (['--epochs', '0'], ["'0'"]),
    (['--seed', '-1'], ["'-1'"]),
    (['--num-workers', '-1'], ["'-1'"]),
    (['--accum-iter', '0'], ["'0'"]),
    (['--clip-grad', '0'], ["'0'"]),
    (['--test-freq', '0'], ["'0'"]),
    (['--reprob', '2'], ["'2'"]),
    (['--model-ema-decay', '1.1'], ["'1.1'"]),
    (['--opt-betas', '0.9'], ['0.9', 'needs 2 values']),
    (['--cutmix-minmax', '0.1', '0.2', '0.3'], ['needs 2 values']),
    (['--lr-noise', '0.1', '0.2', '0.3'], ['needs 1 or 2 values']),
    (['--lr-noise', '0.1', '--sched', 'plateau'], ['plateau']),
    (['--sched', 'plateau', '--decay-rate', '2'], ['--decay-rate 2.0', 'less than 1']),
    (['--opt', 'adamww'], ['--opt adamww', 'similar', 'adamw']),
    (['--aa', 'rand-x9'], ['--aa rand-x9', 'rand-m9']),
    (['--xca', 'fast'], ['--xca', 'fast', 'gram']),
    (['--xca', 'gram', '--model', 'resnet18'], ['--xca gram', 'resnet18']),
    (['--compile-mode', 'max-autotune'], ['--compile-mode max-autotune', '--compile']),
    (['--sched', 'linear'], ['linear', 'cosine']),
    (['--data-set', 'IMAGENET'], ['IMAGENET', 'IMNET', 'SAMPLE']),
    (['--inat-category', 'dog'], ['dog', 'genus']),
    (['--device', 'tpu'], ['--device tpu', 'allowed: auto']),
    (['--device', 'xpu'], ['--device xpu', 'cpu']),
    (['--amp', 'fp16', '--device', 'cpu'], ['--amp fp16', 'bf16, off']),
    (['--mixup', '0.8', '--batch-size', '3'], ['--batch-size 3', 'even']),
    (['--cutmix', '1', '--mixup', '0', '--batch-size', '3'], ['--batch-size 3', 'even']),
    (['--teacher-path', 'x.pth'], ['--teacher-path', '--distillation-type']),
    (['--teacher-pretrained'], ['--teacher-pretrained', '--distillation-type']),
    (['--distillation-type', 'hard'], ['--distillation-type hard', '--teacher-path', '--teacher-pretrained']),
    (['--distillation-type', 'hard', '--teacher-path', 'x', '--teacher-model', 'regnety_16'],
     ['--teacher-model regnety_16', 'regnety_160']),
    (['--start-epoch', '400'], ['--start-epoch 400', '--epochs 400']),
    (['--no-such-flag'], ['--no-such-flag']),
    (['--seed', '4294967296'], ["'4294967296'", '<= 4294967295']),
    (['--model', 'xcit_small_12_p16.foo', '--data-set', 'SAMPLE'], ['--model xcit_small_12_p16.foo']),
    (['--model', 'vgg11', '--data-set', 'SAMPLE'], ['--model vgg11', 'drop_path']),
    (['--model', 'vit_tiny_patch16_224', '--data-set', 'SAMPLE', '--input-size', '32'],
     ['--input-size 32', 'vit_tiny_patch16_224']),
    (['--opt', 'fusedadam', '--data-set', 'SAMPLE', '--model', 'xcit_nano_12_p16'], ['--opt fusedadam']),
    (['--data-path', '/no/such/place', '--data-set', 'CIFAR10'], ['/no/such/place', 'no such directory']),
    (['--world-size', '2'], ['--world-size 2', 'RANK']),
], ids=lambda value: ' '.join(value) if isinstance(value, list) and value[0].startswith('--') else '')
def test_bad_flag(flags, words, tmp_path):
    """An invalid flag, value or combination is refused with its name and what is allowed."""
    device = [] if '--device' in flags else ['--device', 'cpu']
    refused([*device, *flags], *words, output_dir=tmp_path / 'run')


def test_resume_auto_without_a_directory():
    """--resume auto needs --output-dir."""
    refused(['--device', 'cpu', '--resume', 'auto'], '--resume auto', '--output-dir')


@pytest.mark.skipif(torch.cuda.is_available(), reason='this machine has a GPU')
def test_absent_gpu(tmp_path):
    """--device cuda without a GPU is refused with the available devices."""
    refused(['--device', 'cuda'], '--device cuda', 'not available', 'cpu', output_dir=tmp_path / 'run')


def test_output_dir_that_is_a_file(tmp_path, data):
    """A file instead of a folder is refused, also above the folder, and unchanged."""
    (tmp_path / 'file').write_text('mine')
    for path in (tmp_path / 'file', tmp_path / 'file' / 'run'):
        refused([*tiny(data), '--output-dir', str(path)], f'--output-dir {path}', 'is not a writable directory')
    assert (tmp_path / 'file').read_text() == 'mine'


def test_odd_batch_is_allowed_without_mixup():
    """Batches of odd size are only refused with mixup or cutmix."""
    assert parse_args(['--device', 'cpu', '--batch-size', '3', '--mixup', '0', '--cutmix', '0']).batch_size == 3


# ----- the data

def test_no_train_folder(tmp_path):
    """A FOLDER data set without train/ is refused with the missing folder and the existing folders."""
    write_image(tmp_path / 'data' / 'val' / 'cat' / '0.png')
    refused(tiny(tmp_path / 'data'), 'no train/ folder', 'existing: val', output_dir=tmp_path / 'run')


def test_empty_class_folder(tmp_path):
    """An empty class folder is refused with its name."""
    write_folders(tmp_path / 'data')
    (tmp_path / 'data' / 'train' / 'emu').mkdir()
    (tmp_path / 'data' / 'val' / 'emu').mkdir()
    refused(tiny(tmp_path / 'data'), 'emu', output_dir=tmp_path / 'run')


def test_wrong_classes_for_imagenet(tmp_path):
    """Folders that are neither WordNet ids nor 1000 are refused."""
    write_folders(tmp_path / 'data')
    refused(['--device', 'cpu', '--data-set', 'IMNET', '--data-path', str(tmp_path / 'data')], '2 class folders',
            '1000', 'cat, dog', output_dir=tmp_path / 'run')


def test_more_accumulated_batches_than_there_are(data, tmp_path):
    """More batches per step than an epoch has are refused."""
    refused(tiny(data, '--accum-iter', '5'), '--accum-iter 5', '4 batches', output_dir=tmp_path / 'run')


def test_images_of_different_sizes(tmp_path):
    """Evaluation images of different sizes without --resize are refused before training."""
    write_folders(tmp_path / 'data')
    write_image(tmp_path / 'data' / 'val' / 'cat' / '9.png', size=(40, 30))
    refused(tiny(tmp_path / 'data', '--no-resize'), '(30, 40), (32, 32)', '--resize', output_dir=tmp_path / 'run')


def test_error_of_a_worker_is_one_line(tmp_path):
    """A truncated image that a worker finds is reported in one line with a remedy."""
    write_folders(tmp_path / 'data', suffix='.jpg')
    path = tmp_path / 'data' / 'train' / 'dog' / '7.jpg'
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, 'NUM_PROBED', 1)  # which is another picture
        refused(tiniest(tmp_path / 'data', '--num-workers', '1', '--no-repeated-aug'), f'unreadable image {path}',
                '--skip-bad-images N replaces up to N such training images by others')


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('damage', ['text', 'truncated'])
def test_bad_image_is_found_before_training(tmp_path, split, damage):
    """A non-image or truncated file in either split is refused before anything is written."""
    write_folders(tmp_path / 'data', suffix='.jpg')
    path = tmp_path / 'data' / split / 'dog' / '1.jpg'
    path.write_bytes(b'not an image' if damage == 'text' else path.read_bytes()[:-200])
    refused(tiny(tmp_path / 'data'), 'unreadable image', path, output_dir=tmp_path / 'run')


def test_bad_training_picture_names_the_flag(folders):
    """An unreadable training picture is refused with the flag that replaces it by another."""
    (folders / 'train' / 'cat' / '0.png').write_bytes(b'')
    with pytest.raises(UnreadableImage, match=r'cat/0\.png: .*--skip-bad-images N replaces up to N'):
        main(tiniest(folders))


# ----- weights

def test_missing_checkpoint(data, tmp_path):
    """A checkpoint that does not exist is refused with its flag and path."""
    for flag in ('--resume', '--pretrained', '--surgery'):
        refused(tiny(data, flag, str(tmp_path / 'none.pth')), f'{flag} {tmp_path}/none.pth', 'no such file',
                output_dir=tmp_path / 'run')


def test_unreachable_url(data, tmp_path, monkeypatch):
    """A failed download of weights is refused with the URL and the reason."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    refused(tiny(data, '--pretrained', 'http://127.0.0.1:9/x.pth'), 'http://127.0.0.1:9/x.pth', 'refused',
            output_dir=tmp_path / 'run')


def test_checkpoint_of_another_model(data, weights, tmp_path):
    """Weights of a model without a name are refused with their unexpected keys and other shapes."""
    state = {key: value for key, value in torch.load(weights)['model'].items()
             if not key.startswith('blocks.11.')}
    torch.save(state, tmp_path / 'w.pth')
    flags = tiny(data, '--pretrained', str(tmp_path / 'w.pth'), '--model', 'xcit_nano_12_p8')
    refused(flags, 'w.pth', 'unexpected keys: patch_embed.proj.6.0.weight', 'other shapes: patch_embed.proj.0.0',
            'missing keys: blocks.11', output_dir=tmp_path / 'run')


def test_checkpoint_with_a_missing_key(data, weights, tmp_path):
    """Weights that lack a key of the model are refused with this key."""
    state = torch.load(weights, weights_only=True)['model']
    del state['blocks.3.gamma2']
    torch.save(state, tmp_path / 'less.pth')
    refused(tiny(data, '--pretrained', str(tmp_path / 'less.pth')), 'missing keys: blocks.3.gamma2',
            output_dir=tmp_path / 'run')


class Bomb:
    """Object whose unpickling creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, 'w'))


@pytest.mark.parametrize('legacy', [False, True])
def test_pickle_is_refused_and_not_executed(data, tmp_path, legacy):
    """A pickle that would execute code is refused, plain or in torch's format."""
    path = tmp_path / 'bomb.pth'
    bomb = {'model': Bomb(tmp_path / 'executed')}
    path.write_bytes(pickle.dumps(bomb)) if legacy else torch.save(bomb, path)
    refused(tiny(data, '--pretrained', str(path)), 'bomb.pth', 'refused', output_dir=tmp_path / 'run')
    assert not (tmp_path / 'executed').exists()


def test_evaluation_refuses_another_head(tmp_path, weights):
    """A head for 2 classes can't be evaluated on 3, from either flag."""
    write_folders(tmp_path / 'three', classes=('a', 'b', 'c'))
    for flag in ('--pretrained', '--resume'):
        refused(tiny(tmp_path / 'three', '--eval', flag, str(weights)), 'for 2 classes, not 3',
                output_dir=tmp_path / 'run')


def test_resuming_refuses_another_head(tmp_path, weights):
    """A run can't be resumed with another number of classes."""
    write_folders(tmp_path / 'three', classes=('a', 'b', 'c'))
    refused(tiny(tmp_path / 'three', '--resume', str(weights)), 'for 2 classes, not 3', output_dir=tmp_path / 'run')


def test_resuming_with_another_optimizer(data, finished, tmp_path):
    """A resume with another --opt is refused with both optimizers."""
    refused(tiny(data, '--opt', 'sgd', '--resume', str(finished / 'checkpoint.pth')), '--opt adamw', 'sgd',
            output_dir=tmp_path / 'run')


def test_evaluating_without_a_checkpoint(data, tmp_path):
    """--eval --resume auto needs a checkpoint."""
    refused(tiny(data, '--eval', '--resume', 'auto'), 'no checkpoint.pth', output_dir=tmp_path / 'run')


@pytest.mark.parametrize('content', [{'model': 3}, {'epoch': 3}, {}, [1, 2]], ids=str)
def test_checkpoint_without_weights(data, tmp_path, content):
    """A file without weights is refused by every flag."""
    torch.save(content, tmp_path / 'odd.pth')
    for flag in ('--pretrained', '--surgery', '--resume'):
        refused(tiny(data, flag, str(tmp_path / 'odd.pth')), f'{flag} {tmp_path}/odd.pth', output_dir=tmp_path / 'run')


def test_teacher_of_other_classes(data, tmp_path):
    """A teacher with another number of classes is refused."""
    torch.save(timm.create_model('resnet18', num_classes=5).state_dict(), tmp_path / 'teacher.pth')
    refused(tiny(data, '--distillation-type', 'hard', '--teacher-model', 'resnet18', '--teacher-path',
                 str(tmp_path / 'teacher.pth')), '--teacher-path', '5 classes, not 2', output_dir=tmp_path / 'run')


def test_timms_teacher_of_other_classes(data, tmp_path):
    """timm's weights for 1000 classes are refused for 2 classes, before any download."""
    refused(tiny(data, '--distillation-type', 'hard', '--teacher-pretrained', '--teacher-model', 'resnet18'),
            'have 1000 classes, not 2', output_dir=tmp_path / 'run')


def test_surgery_on_a_model_without_stem(data, weights, tmp_path):
    """--surgery needs a model with a patch_embed."""
    refused(tiny(data, '--model', 'resnet18', '--surgery', str(weights)), '--surgery', 'no patch_embed',
            output_dir=tmp_path / 'run')


def test_overflow_of_the_last_step_is_not_stored(data, tmp_path):
    """Weights that an epoch's last step made non-finite are found by the evaluation and not stored."""
    run = tmp_path / 'run'
    with pytest.raises(NonFiniteLoss, match='evaluation loss is nan at the end of epoch 0'):
        main(tiny(data, '--accum-iter', '4', '--lr', '1e30', '--output-dir', str(run)))
    assert not (run / 'checkpoint.pth').exists()
    assert not (run / 'log.txt').exists()
