"""The lines about batches and learning rates in a run's log."""
import pytest
import torch

from run import pace
from run.pace import Pace


def test_learning_rate_and_steps_are_logged(capsys):
    """The log has the scaled rate, the steps of an epoch and of the warm-up, and the images that fill no batch."""
    Pace(.1, 6, 2, 512).log(batches=2, images=16, warmup_epochs=3, epochs=5)
    assert capsys.readouterr().out == (
        'Learning rate 0.00234 at its peak: --lr 0.1 x 12 images a step / 512\n'
        'An epoch has 1 step, the warm-up 3; the last 4 of 16 images of an epoch do not fill a batch and are left '
        'out\n')


def test_low_learning_rate_is_warned_about(capsys):
    """A peak learning rate below LOW_LR is warned about, with the value of --lr that prevents it."""
    Pace(4e-4, 8, 1, 512).log(batches=2, warmup_epochs=0, epochs=1)
    assert ('Warning: --lr 0.0004 is scaled to 6.25e-06, because a step has 8 images, not 512; for a learning rate of '
            '0.0004, give --lr 0.0256\n') in capsys.readouterr().out


def test_warmup_as_long_as_the_run_is_warned_about(capsys):
    """A warm-up with as many epochs as the run is warned about: the rate never reaches its peak."""
    Pace(.1, 8).log(batches=2, warmup_epochs=1, epochs=1)
    assert 'Warning: the warm-up (--warmup-epochs 1) is as long as the run (--epochs 1)' in capsys.readouterr().out


@pytest.mark.parametrize(('reference_batch', 'lr'), [(512, .1 * 96 / 512), (None, .1)])
def test_learning_rate_is_scaled_by_all_images_of_a_step(monkeypatch, reference_batch, lr):
    """Batch size, accumulation and processes count; without a reference batch the rate is that of --lr."""
    monkeypatch.setattr(pace, 'get_world_size', lambda: 4)
    scaled = Pace(.1, 8, 3, reference_batch)
    assert (scaled.images_per_batch, scaled.images_per_step) == (32, 96)
    assert scaled.scaled_lr == pytest.approx(lr)
    assert scaled.derived(torch.device('cpu'), torch.bfloat16) == {
        'device': 'cpu', 'amp_dtype': 'torch.bfloat16', 'processes': 4, 'global_batch': 96,
        'scaled_lr': scaled.scaled_lr}


def test_rising_learning_rate_is_warned_about(capsys):
    """A final learning rate above the peak is warned about."""
    Pace(1e-3, 8, 1, 512).log(batches=2, warmup_epochs=0, epochs=1, min_lr=1e-4)
    assert 'Warning: --min-lr 0.0001, the final learning rate, is above the peak, 1.56e-05' in capsys.readouterr().out
