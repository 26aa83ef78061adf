"""Arguments, learning rates and parameter groups against the original's."""
import json

import pytest
import timm
import torch

import main
from classification import recipe
from main import REFERENCE_BATCH, get_args_parser, parse_args
from run import flags, optimization, pace, schedules
from run.commandline import respelled
from utils import InputError

# Defaults that are defects of the original, or that a device-independent program cannot have.
CHANGED_DEFAULTS = {'model': 'xcit_small_12_p16', 'device': 'auto', 'dist_eval': True}


def build_optimizer(args, model: torch.nn.Module) -> torch.optim.Optimizer:
    lr = flags.pace(args, reference_batch=REFERENCE_BATCH).scaled_lr
    return optimization.build_optimizer(model, lr=lr, **flags.optimizer_options(args))


def build_scheduler(args, optimizer: torch.optim.Optimizer):
    return schedules.by_epoch(optimizer, **flags.schedule_options(args))


def test_every_flag_of_the_original_is_there(reference):
    """Each spelling of the original is accepted."""
    takes_none = {'--eval', '--full_crop', '--dist-eval', '--model-ema', '--no-model-ema', '--model-ema-force-cpu',
                  '--pin-mem', '--no-pin-mem', '--repeated-aug', '--no-repeated-aug', '--resplit'}
    value = {'--device': 'cpu', '--distillation-type': 'hard', '--inat-category': 'name', '--mixup-mode': 'pair',
             '--remode': 'const', '--sched': 'step', '--train-interpolation': 'random', '--opt-betas': '.9 .99',
             '--cutmix-minmax': '.1 .2', '--drop-path': '.1'}
    for flag in set(reference['cli_flags']) - {'-h', '--help'}:
        words = [flag] if flag in takes_none else [flag, *value.get(flag, '1').split()]
        get_args_parser().parse_args(words)


@pytest.mark.parametrize('command', [
    '--model xcit_small_12_p16 --batch-size 64 --drop-path 0.05 --output_dir runs/x --epochs 400',
    '--eval --model xcit_small_12_p16 --full_crop --pretrained '
    'https://dl.fbaipublicfiles.com/xcit/xcit_small_12_p16_224.pth',
    '--eval --input-size 384 --model xcit_small_12_p16 --full_crop --pretrained '
    'https://dl.fbaipublicfiles.com/xcit/xcit_small_12_p16_384_dist.pth',
    '--model xcit_small_12_p16 --batch-size 64 --drop-path 0.05 --output_dir runs/x --epochs 400 '
    '--distillation-type hard --teacher-model regnety_160 --teacher-path '
    'https://dl.fbaipublicfiles.com/deit/regnety_160-a5fe301d.pth'])
def test_commands_of_the_original(command):
    """The commands of the original's README are accepted unchanged."""
    parse_args([*command.split(), '--device', 'cpu'])


def test_defaults_are_the_originals(reference):
    """Defaults are the original's, except for CHANGED_DEFAULTS."""
    own = vars(get_args_parser().parse_args([]))
    expected = {**reference['cli_defaults'], **CHANGED_DEFAULTS}
    assert {key: own[key] for key in expected} == expected


def test_every_flag_has_two_spellings():
    """Dashes and underscores are equivalent, also mixed, in `--no-...` and in `--flag=value`."""
    for dashed, *others in (['--output-dir=x', '--output_dir=x'],
                            ['--no-model-ema', '--no_model_ema', '--no-model_ema'],
                            ['--warmup-epochs=3', '--warmup_epochs=3'], ['--full-crop', '--full_crop']):
        for other in others:
            args = get_args_parser().parse_args([other])
            assert args == get_args_parser().parse_args([dashed]) != get_args_parser().parse_args([])


def test_values_keep_their_spelling():
    """Only options are respelled, not their values; abbreviations are not accepted."""
    assert get_args_parser().parse_args(['--output_dir', 'a_b-c', '--data_path=--x_y']).data_path == '--x_y'
    with pytest.raises(InputError, match='--out: no such flag'):
        get_args_parser().parse_args(['--out', 'x'])
    assert respelled('--no_such_flag', {}) == '--no_such_flag'


def test_learning_rates_equal_the_originals(reference, monkeypatch):
    """The learning rate of each epoch is the original's for every command line of the reference."""
    for expected in reference['lr']:
        args = parse_args([*expected['argv'], '--batch-size', str(expected['batch_size']), '--device', 'cpu'])
        monkeypatch.setattr(pace, 'get_world_size', lambda expected=expected: expected['world_size'])
        optimizer = build_optimizer(args, torch.nn.Linear(2, 2))
        scheduler = build_scheduler(args, optimizer)
        used = []
        for epoch in range(len(expected['lr_used_in_epoch'])):
            used.append(optimizer.param_groups[0]['lr'])
            scheduler.step(epoch)
        assert used == pytest.approx(expected['lr_used_in_epoch'], abs=1e-12, rel=1e-6), expected['argv']


@pytest.mark.parametrize(('name', 'fused'), [('adamw', True), ('sgd', True), ('lamb', None)])
def test_optimizers_that_have_one_kernel_use_it(name, fused):
    """torch's own optimizers update all parameters at once; timm's others have no such option."""
    optimizer = build_optimizer(parse_args(['--device', 'cpu', '--opt', name]), torch.nn.Linear(2, 2))
    assert optimizer.defaults.get('fused') is fused


def test_form_of_xca_reaches_the_model():
    """--xca sets the model's form of attention."""
    args = parse_args(['--device', 'cpu', '--model', 'xcit_nano_12_p16', '--xca', 'gram'])
    assert main.build_model(args, 10, new_head=True).xca_form == 'gram'


def test_parameter_groups_equal_the_originals(reference):
    """Class, weight decays, betas and eps are the original's."""
    expected = reference['optimizer']
    optimizer = build_optimizer(parse_args(['--device', 'cpu']), timm.create_model('xcit_nano_12_p16'))
    assert type(optimizer).__name__ == expected['class']
    for own, theirs in zip(optimizer.param_groups, expected['groups'], strict=True):
        assert own['weight_decay'] == theirs['weight_decay']
        assert list(own['betas']) == theirs['lr_betas']
        assert own['eps'] == theirs['eps']
        assert len(own['params']) == theirs['n']


def test_decayed_parameters_are_the_originals(reference):
    """The names in each group are the original's: temperatures are decayed, the CLS token is not."""
    model = timm.create_model('xcit_nano_12_p16')
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = build_optimizer(parse_args(['--device', 'cpu']), model)
    for own, theirs in zip(optimizer.param_groups, reference['optimizer']['groups'], strict=True):
        assert sorted(names[id(p)] for p in own['params']) == sorted(theirs['params'])


def test_accumulated_batches_enter_the_learning_rate():
    """Four batches a step count as one batch four times as large."""
    wide, accumulated = (build_optimizer(parse_args(['--device', 'cpu', *more]), torch.nn.Linear(2, 2))
                         for more in (['--batch-size', '64'], ['--batch-size', '16', '--accum-iter', '4']))
    assert wide.param_groups[0]['lr'] == accumulated.param_groups[0]['lr']


@pytest.mark.parametrize(('mixup', 'cutmix', 'soft'), [('0.8', '0', True), ('0', '1', True), ('0', '0', False)])
def test_mixup_and_criterion_agree_on_soft_targets(mixup, cutmix, soft):
    """Mixup and cutmix make targets soft, each alone, with the criterion for soft targets."""
    args = parse_args(['--device', 'cpu', '--mixup', mixup, '--cutmix', cutmix])
    assert recipe.uses_soft_targets(args) == soft
    assert (recipe.build_mixup(args, 10) is not None) == soft
    criterion = recipe.build_criterion(args, 10)
    targets = torch.tensor([1, 2])
    if soft:
        targets = recipe.build_mixup(args, 10)(torch.randn(2, 3, 8, 8), targets)[1]
    assert criterion(None, torch.randn(2, 10), targets).isfinite()


def test_plateau_lowers_the_rate_after_warm_up():
    """After a warm-up and `patience` epochs without progress the rate is multiplied by --decay-rate."""
    args = parse_args(['--device', 'cpu', '--sched', 'plateau', '--patience-epochs', '1', '--cooldown-epochs', '0',
                       '--warmup-epochs', '2', '--decay-rate', '0.5'])
    optimizer = build_optimizer(args, torch.nn.Linear(2, 2))
    base = optimizer.param_groups[0]['lr']
    scheduler = build_scheduler(args, optimizer)
    used = []
    for epoch in range(7):
        used.append(optimizer.param_groups[0]['lr'])
        scheduler.step(epoch, 50.)
    middle = 1e-6 + (base - 1e-6) / 2
    assert used == pytest.approx([1e-6, 1e-6, middle, base, base, base, base / 2])


@pytest.mark.parametrize(('flags', 'name', 'value', 'reason'), [
    (['--epochs', '4'], 'warmup_epochs', 1, 'the default, 5, does not fit --epochs 4'),
    (['--epochs', '1'], 'warmup_epochs', 0, 'the default, 5, does not fit --epochs 1'),
    (['--epochs', '4', '--warmup-epochs', '5'], 'warmup_epochs', 5, ''),
    (['--epochs', '6'], 'warmup_epochs', 5, ''),
    (['--epochs', '8', '--sched', 'step'], 'decay_epochs', 2, 'the default, 30, does not fit --sched step'),
    (['--epochs', '8', '--sched', 'plateau'], 'patience_epochs', 2, 'the default, 10, does not fit --sched plateau'),
    (['--epochs', '8'], 'decay_epochs', 30, '')])
def test_defaults_fit_a_short_run(flags, name, value, reason, capsys):
    """A default that other flags rule out is replaced, and logged; a flag that is given stays."""
    assert vars(parse_args(['--device', 'cpu', *flags]))[name] == value
    out, flag = capsys.readouterr().out, f'--{name.replace("_", "-")}'
    assert (f'{flag} {value} is used, because {reason}' in out) if reason else flag not in out


def test_a_resumed_run_keeps_its_fitted_defaults(tmp_path):
    """A resumed run has the warm-up in its args.json, also if the default would fit or has changed since."""
    (tmp_path / 'checkpoint.pth').touch()
    flags = ['--device', 'cpu', '--output-dir', str(tmp_path), '--resume', 'auto']
    for stored, epochs in ((5, '4'), (1, '20')):
        (tmp_path / 'args.json').write_text(json.dumps({'args': {'warmup_epochs': stored}}))
        assert parse_args([*flags, '--epochs', epochs]).warmup_epochs == stored
        assert parse_args([*flags, '--epochs', epochs, '--warmup-epochs', '2']).warmup_epochs == 2
