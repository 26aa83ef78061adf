"""Flags from a file: --config."""
import json

import pytest
import torch
from conftest import tiny

import run_with_submitit
import xcit
from main import main, parse_args
from utils import InputError


def test_config_file(tmp_path):
    """YAML below the command line's flags: numbers, lists, switches, off, and keys in either spelling."""
    (tmp_path / 'c.yaml').write_text('batch-size: 8\nopt_betas: [0.8, 0.9]\nlr: 1e-3\nrepeated_aug: false\namp: off\n'
                                     'model: xcit_nano_12_p8\nfull-crop: true\nclip-grad:\n')
    args = parse_args(['--device', 'cpu', '--batch-size', '16', '--config', str(tmp_path / 'c.yaml')])
    assert (args.batch_size, args.opt_betas, args.lr, args.repeated_aug, args.amp, args.model, args.full_crop,
            args.clip_grad) == (16, [.8, .9], 1e-3, False, 'off', 'xcit_nano_12_p8', True, None)


def test_config_of_an_earlier_run(folders, tmp_path):
    """The args.json of a run gives the same run, with fine-tuning too."""
    torch.save(xcit.xcit_nano_12_p16(num_classes=2).state_dict(), tmp_path / 'w.pth')
    flags = tiny(folders, '--epochs', '1', '--finetune', str(tmp_path / 'w.pth'))
    first = main([*flags, '--output-dir', str(tmp_path / 'a')])
    again = main(['--config', str(tmp_path / 'a' / 'args.json'), '--output-dir', str(tmp_path / 'b')])
    assert first['train_loss'] == again['train_loss']
    runs = [json.loads((tmp_path / name / 'args.json').read_text())['args'] for name in 'ab']
    assert {key for key in runs[0] if runs[0][key] != runs[1][key]} == {'output_dir', 'config'}


@pytest.mark.parametrize(('name', 'text', 'message'), [
    ('c.yaml', 'batchsize: 8', r'c\.yaml: there is no flag --batchsize \(did you mean --batch-size\?\)'),
    ('c.json', '{"batch_size": ', 'is not valid JSON'), ('c.yaml', 'a: [', 'is not valid YAML'),
    ('c.yaml', '- 1', 'must contain flags and their values'), ('c.yaml', 'batch-size: many', "'many' is not allowed"),
    ('c.yaml', 'batch-size: [1, 2]', 'must be one value'), ('c.yaml', 'model-ema: maybe', 'must be true or false'),
    ('c.yaml', 'eval: 1', 'must be true or false'), ('c.yaml', 'amp: true', 'invalid choice'),
    (None, '', 'No such file')])
def test_invalid_config(tmp_path, name, text, message):
    """A refusal is one line with the file, or the flag and its value."""
    path = tmp_path / (name or 'nowhere.yaml')
    if name:
        path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        parse_args(['--device', 'cpu', '--config', str(path)])
    assert '\n' not in str(caught.value)


def test_config_of_a_job(tmp_path, capsys):
    """run_with_submitit.py reads the flags that it shares with the program, and passes the file on."""
    (tmp_path / 'c.yaml').write_text(f'data-set: SAMPLE\nnum-workers: 3\noutput-dir: {tmp_path}/run\n')
    run_with_submitit.main(['--dry-run', '--ngpus', '0', '--nodes', '1', '--config', str(tmp_path / 'c.yaml')])
    out = capsys.readouterr().out
    assert f'--config {tmp_path}/c.yaml' in out
    assert f'--output-dir {tmp_path}/run' in out
    assert '#SBATCH --cpus-per-task=3' in out
