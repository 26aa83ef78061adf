"""Fine-tuning: the defaults of --finetune, --layer-decay, --freeze-backbone."""
import math

import pytest
import small_dino
import timm
import torch
from conftest import seeded_model, tiniest, tiny, write_folders

import utils
from main import FINETUNING, main, parse_args
from run import flags, optimization, schedules
from utils import InputError


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory) -> str:
    """Weights of a model with 1000 classes."""
    path = tmp_path_factory.mktemp('weights') / 'nano.pth'
    torch.save({'model': seeded_model('xcit_nano_12_p16').state_dict()}, path)
    return str(path)


def checkpoint(folder) -> dict:
    return torch.load(folder / 'checkpoint.pth', weights_only=True)


def test_finetune_sets_defaults(pretrained):
    """--finetune changes the defaults in FINETUNING, and nothing else."""
    plain, tuned = (vars(parse_args(['--data-set', 'SAMPLE', flag, pretrained])) for flag in
                    ('--pretrained', '--finetune'))
    assert {k: v for k, v in tuned.items() if v != plain[k]} == {**FINETUNING, 'finetune': pretrained}


def test_finetune_defaults_yield_to_flags(pretrained):
    """A flag on the command line has priority, before or after --finetune."""
    args = parse_args(['--epochs', '7', '--finetune', pretrained, '--lr', '1', '--repeated-aug'])
    assert (args.epochs, args.lr, args.repeated_aug, args.full_crop) == (7, 1., True, True)


def test_finetune_to_other_classes_and_size(tmp_path, pretrained):
    """Weights for 1000 classes become a model for 3, at another resolution, and train."""
    data = write_folders(tmp_path / 'data', classes=('a', 'b', 'c'), size=(70, 50))
    command = tiny(data, '--finetune', pretrained, '--input-size', '48', '--epochs', '1')
    stats = main([*command, '--output-dir', str(tmp_path / 'run')])
    assert math.isfinite(stats['train_loss'])
    assert checkpoint(tmp_path / 'run')['model']['head.weight'].shape == (3, 128)


@pytest.mark.parametrize('sched', ['cosine', 'plateau'])
@pytest.mark.parametrize('warmup', ['0', '2'])
def test_layer_decay_scales_rates_by_depth(sched, warmup):
    """The head has the rate --lr, and each layer a fraction of the rate of the layer above, in every epoch."""
    args = parse_args(['--layer-decay', '0.5', '--sched', sched, '--warmup-epochs', warmup, '--epochs', '10',
                       '--model', 'xcit_nano_12_p16', '--batch-size', '512', '--warmup-lr', '0', '--lr', '1'])
    model = timm.create_model(args.model)
    optimizer = optimization.build_optimizer(model, lr=args.lr, **flags.optimizer_options(args))
    scheduler = schedules.by_epoch(optimizer, **flags.schedule_options(args))
    names = {parameter: name for name, parameter in model.named_parameters()}
    for epoch in range(4):
        rate = {names[p]: group['lr'] for group in optimizer.param_groups for p in group['params']}
        if epoch > 1:
            assert rate['head.weight'] > 0
        assert rate['blocks.11.mlp.fc1.weight'] == pytest.approx(2 * rate['blocks.10.gamma1'])
        assert rate['head.weight'] >= 2 * rate['norm.weight'] == pytest.approx(2 * rate['cls_attn_blocks.1.gamma1'])
        assert rate['blocks.0.gamma1'] == pytest.approx(2 * rate['patch_embed.proj.0.0.weight'])
        scheduler.step(epoch, 0.)


def test_freeze_backbone_trains_the_head_alone(tmp_path, folders, pretrained):
    """All weights but the head's are bitwise the initial ones, BatchNorm statistics included."""
    main(tiny(folders, '--finetune', pretrained, '--freeze-backbone', '--opt', 'sgd', '--epochs', '1', '--output-dir',
              str(tmp_path)))
    given, after = torch.load(pretrained, weights_only=True)['model'], checkpoint(tmp_path)['model']
    changed = [key for key in after if key.startswith('head.') or not torch.equal(after[key], given[key])]
    assert changed == ['head.weight', 'head.bias']
    utils.seed_everything(0)
    initial = timm.create_model('xcit_nano_12_p16', num_classes=2).head.weight
    assert not torch.equal(after['head.weight'], initial)


def test_freeze_backbone_needs_weights():
    """A frozen random backbone is refused."""
    with pytest.raises(InputError, match='--freeze-backbone: needs trained weights'):
        parse_args(['--data-set', 'SAMPLE', '--freeze-backbone'])


def test_finetune_excludes_pretrained(pretrained):
    """Two sources of initial weights are refused."""
    with pytest.raises(InputError, match='replaces --pretrained'):
        parse_args(['--finetune', pretrained, '--pretrained', pretrained])


def test_unknown_tag_names_the_known(pretrained):
    """An unknown tag is refused with the model's tags and the flag."""
    with pytest.raises(InputError, match=r'--finetune fb_in22k: no such file; tags of xcit_small_12_p16: fb_in1k, '):
        parse_args(['--finetune', 'fb_in22k'])


def test_layer_decay_may_change_on_resume(tmp_path, folders):
    """The learning rates are those of the resuming command line."""
    command = tiniest(folders, '--layer-decay', '0.5', '--output-dir', str(tmp_path))
    main([*command, '--epochs', '1'])
    main([*command, '--epochs', '2', '--layer-decay', '0.9', '--resume', 'auto'])
    scales = {group['lr_scale'] for group in checkpoint(tmp_path)['optimizer']['param_groups']}
    assert min(scales) == pytest.approx(.9 ** (len(scales) - 1))


def test_tag_in_the_models_name_selects_its_weights():
    """--model NAME.TAG alone means --pretrained TAG; an unknown tag is refused."""
    assert parse_args(['--model', 'xcit_nano_12_p16.fb_in1k']).pretrained == 'xcit_nano_12_p16.fb_in1k'
    with pytest.raises(InputError, match=r'xcit_nano_12_p16 has no such tag; its tags: .*fb_in1k'):
        parse_args(['--model', 'xcit_nano_12_p16.nonsense'])


def test_checkpoint_of_dino_is_finetuned(folders, tmp_path, capsys):
    """The model's name is read from the file; the teacher gets a fresh head."""
    small_dino.main(['--device', 'cpu', '--num-workers', '0', '--batch-size', '8', '--epochs', '1', '--warmup-epochs',
                     '1', '--arch', 'xcit_nano_12_p16', '--out-dim', '16', '--global-crops-size', '32',
                     '--local-crops-number', '0', '--data-path', str(folders), '--output-dir', str(tmp_path / 'dino')])
    path = tmp_path / 'dino' / 'checkpoint.pth'
    content = torch.load(path)
    content['teacher']['module.backbone.cls_token'].fill_(7.)
    torch.save(content, path)
    argv = ['--finetune', str(path), '--freeze-backbone', '--input-size', '32', '--device', 'cpu', '--num-workers', '0',
            '--batch-size', '4', '--epochs', '1', '--data-set', 'FOLDER', '--data-path', str(folders), '--output-dir',
            str(tmp_path / 'run')]
    main(argv)
    assert f'--finetune {path}: using --model xcit_nano_12_p16, as in the checkpoint' in capsys.readouterr().out
    assert bool((checkpoint(tmp_path / 'run')['model']['cls_token'] == 7.).all())
