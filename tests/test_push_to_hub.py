"""tools.push_to_hub: a folder for timm and this repository, and a card with measured values only."""
import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from conftest import seeded_images, seeded_model, tiny, write_folders

import weights
from main import main as train
from tools.push_to_hub import main
from utils import InputError, RunStopped

NAME = 'xcit_nano_12_p16'
FILES = ['README.md', 'config.json', 'model.safetensors']


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> Path:
    """A run that was evaluated in its folder."""
    folder = tmp_path_factory.mktemp('run')
    data = write_folders(folder / 'data')
    train(tiny(data, '--epochs', '1', '--output-dir', str(folder / 'run')))
    train(tiny(data, '--eval', '--resume', str(folder / 'run' / 'best_model.pth'), '--output-dir', str(folder / 'run')))
    return folder / 'run'


def dry_run(folder: Path, weights_file, *words: str) -> str:
    main(['--pretrained', str(weights_file), '--repo', 'me/my-pets', '--dry-run', '--output-dir', str(folder), *words])
    return (folder / 'README.md').read_text()


def test_folder_is_read_by_timm_and_here(run, tmp_path):
    """timm and this repository read the folder, with the same logits, class names and image size."""
    dry_run(tmp_path / 'hub', run / 'best_model.pth')
    assert sorted(file.name for file in (tmp_path / 'hub').iterdir()) == FILES
    images = seeded_images(2, 3, 32, 32)
    own = timm.create_model(NAME, num_classes=2).eval()
    weights.load(own, weights.read(str(run / 'best_model.pth'), '', NAME))
    theirs = timm.create_model(f'local-dir:{tmp_path / "hub"}', pretrained=True).eval()
    again = weights.create_model(NAME, str(tmp_path / 'hub' / 'model.safetensors'))
    with torch.no_grad():
        for model in (theirs, again.eval()):
            torch.testing.assert_close(model(images), own(images), rtol=1e-4, atol=1e-5)
    assert theirs.pretrained_cfg['label_names'] == ['cat', 'dog']
    assert list(theirs.pretrained_cfg['input_size']) == [3, 32, 32]


def test_card_has_what_was_measured(run, tmp_path, capsys):
    """The card has the accuracies of the run and of the evaluation beside it, their data, and commands."""
    card = dry_run(tmp_path / 'hub', run / 'best_model.pth', '--license', 'mit', '--code', 'https://example.org/code')
    assert capsys.readouterr().out.endswith(f'--dry-run: {tmp_path}/hub is written, nothing was uploaded\n')
    stats = json.loads((run / 'eval.json').read_text())
    data = '8 evaluation pictures of data (`--data-set FOLDER`)'
    assert f'- {stats["acc1"]:.2f} % top-1 on the {data}, after epoch 0 of the training\n' in card
    assert f'- {stats["acc1"]:.2f} % top-1 and {stats["acc5"]:.2f} % top-5 on {data} at 32 x 32 pixels, crop 1' in card
    assert 'license: mit\n' in card
    assert "timm.create_model('hf-hub:me/my-pets', pretrained=True)" in card
    assert f'python -m tools.predict PICTURE.jpg --model {NAME} --pretrained hf-hub:me/my-pets' in card
    assert '2 classes: cat, dog. Trained on data (`--data-set FOLDER`).' in card
    assert '[the code of the training](https://example.org/code)' in card


def test_evaluation_of_other_weights_is_not_on_the_card(run, tmp_path, capsys):
    """An eval.json of the EMA, or older than the weights, is left out."""
    for name in ('best_model.pth', 'eval.json'):
        shutil.copy2(run / name, tmp_path / name)
    os.utime(tmp_path / 'eval.json', (0, 0))
    assert 'top-5' not in dry_run(tmp_path / 'hub', tmp_path / 'best_model.pth')
    assert f'{tmp_path}/eval.json: older than {tmp_path}/best_model.pth' in capsys.readouterr().out
    (tmp_path / 'eval.json').write_text((run / 'eval.json').read_text().replace('"use_ema": false', '"use_ema": true'))
    assert 'top-5' not in dry_run(tmp_path / 'hub', tmp_path / 'best_model.pth')


def test_card_of_a_backbone(tmp_path):
    """The card of a backbone has the command for features, and names the data of --data."""
    content = {'model': seeded_model(NAME, num_classes=0).state_dict(), 'args': {'model': NAME, 'data_set': 'FOLDER'}}
    torch.save(content, tmp_path / 'w.pth')
    card = dry_run(tmp_path / 'hub', tmp_path / 'w.pth', '--data', 'my slides')
    assert 'python -m tools.extract_features PICTURE.jpg --output features.npz' in card
    assert 'tools.predict' not in card
    assert 'pixels. Trained on my slides.' in card
    assert 'pipeline_tag: image-feature-extraction\n' in card


def test_python_of_the_card_runs(run, tmp_path):
    """The Python on the card runs on a picture, in the folder in place of the hub."""
    card = dry_run(tmp_path / 'hub', run / 'best_model.pth')
    code = card.split('```python\n')[1].split('```')[0].replace('hf-hub:me/my-pets', f'local-dir:{tmp_path}/hub')
    names: dict = {}
    exec(code.replace('PICTURE.jpg', str(run.parent / 'data' / 'val' / 'cat' / '0.png')), names)
    assert names['logits'].shape == (1, 2)


def test_card_of_bare_weights(tmp_path):
    """The card of bare weights has no accuracy."""
    torch.save(seeded_model(NAME, num_classes=3).state_dict(), tmp_path / 'w.pth')
    card = dry_run(tmp_path / 'hub', tmp_path / 'w.pth', '--model', NAME)
    assert 'Nothing was measured with this file.' in card
    assert '%' not in card


def test_upload(run, tmp_path, monkeypatch, capsys):
    """The three files are uploaded to a repository that is made if needed."""
    calls = []
    monkeypatch.setattr(huggingface_hub.HfApi, 'create_repo', lambda self, *args, **kwargs: (
        calls.append((args, kwargs))))
    monkeypatch.setattr(huggingface_hub.HfApi, 'upload_folder', lambda self, *, folder_path, repo_id, commit_message: (
        calls.append((repo_id, sorted(file.name for file in Path(folder_path).iterdir())))))
    address = main(['--pretrained', str(run / 'best_model.pth'), '--repo', 'me/my-pets', '--private'])
    assert calls == [(('me/my-pets',), {'private': True, 'exist_ok': True}), ('me/my-pets', FILES)]
    assert address == 'https://huggingface.co/me/my-pets'
    assert f'{address}: uploaded' in capsys.readouterr().out


def test_hub_that_cannot_be_reached(run, monkeypatch):
    """A failed upload is one line with the command for a token."""
    def fail(*args, **kwargs):
        raise ConnectionError('no network\nat all')

    monkeypatch.setattr(huggingface_hub.HfApi, 'create_repo', fail)
    message = r'--repo me/x: can.t be uploaded \(no network\); a token comes from'
    with pytest.raises(RunStopped, match=message) as caught:
        main(['--pretrained', str(run / 'best_model.pth'), '--repo', 'me/x'])
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(('words', 'message'), [
    (['--repo', 'me', '--dry-run'], '--repo me: must be OWNER/NAME'),
    (['--repo', 'me/x', '--dry-run'], '--dry-run: needs --output-dir'),
    (['--repo', 'me/x', '--dry-run', '--output-dir', 'OTHER'], 'contains other files')])
def test_mistakes(run, tmp_path, words, message):
    """Bad flags are refused before anything is written."""
    (tmp_path / 'thesis.tex').write_text('mine')
    with pytest.raises(InputError, match=message):
        main(['--pretrained', str(run / 'best_model.pth'), *(str(tmp_path) if w == 'OTHER' else w for w in words)])
    assert [file.name for file in tmp_path.iterdir()] == ['thesis.tex']
