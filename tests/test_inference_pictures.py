"""Picture files given to tools: missing paths and empty folders."""
import pytest
import torch
from conftest import seeded_model

from tools import predict
from utils import InputError, RunStopped


def test_missing_pictures_do_not_stop_the_others(folders, tmp_path, capsys):
    """Missing paths and empty folders are reported on stderr, the others are predicted, and the exit code is 1."""
    weights = tmp_path / 'weights.pth'
    torch.save({'model': seeded_model('xcit_nano_12_p16', num_classes=2).state_dict()}, weights)
    flags = ['--pretrained', str(weights), '--model', 'xcit_nano_12_p16', '--device', 'cpu', '--num-workers', '0']
    (tmp_path / 'empty').mkdir()
    picture = folders / 'val' / 'cat' / '0.png'
    with pytest.raises(RunStopped, match=r'\(2 of 3 could not be read\)') as caught:
        predict.main(['no/such.png', str(picture), str(tmp_path / 'empty'), *flags])
    out, err = capsys.readouterr()
    assert str(picture) in out
    assert 'no/such.png: no such file' in err
    assert 'no images in this folder' in str(caught.value)
    with pytest.raises(InputError, match='no such file'):
        predict.main(['no/such.png', 'nor/this.png', *flags])
