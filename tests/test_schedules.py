"""Curves of learning rates and weight decay: values by their formulas, and their way to an optimizer."""
import math

import pytest
import torch

from run import schedules


def test_poly_decays_by_its_power():
    """Step i of n has (start - end) (1 - i/n)**power + end, as in mmcv's PolyLrUpdaterHook."""
    values = schedules.poly(6e-5, 1e-6, steps=160, power=.9)
    assert len(values) == 160
    assert values[0] == 6e-5
    for i in (1, 80, 159):
        assert values[i] == pytest.approx((6e-5 - 1e-6) * (1 - i / 160) ** .9 + 1e-6, rel=1e-12)


def test_poly_with_power_1_is_linear():
    """With power 1, `poly` has half of its start value in the middle of the run."""
    assert schedules.poly(1., 0., steps=10)[5] == .5


def test_warmup_multiplies_the_decayed_value():
    """Step i of a warm-up of w steps has 1 - (1 - i/w) (1 - factor) of the value, as in mmcv's linear warm-up."""
    plain = schedules.poly(6e-5, 0., steps=160)
    values = schedules.poly(6e-5, 0., steps=160, warmup_steps=15, warmup_factor=1e-6)
    assert values[0] == pytest.approx(6e-5 * 1e-6, rel=1e-9)
    for i in (1, 7, 14):
        assert values[i] == pytest.approx(plain[i] * (1 - (1 - i / 15) * (1 - 1e-6)), rel=1e-12)
    assert values[15:] == plain[15:]


def test_multistep_decays_at_its_milestones():
    """A milestone is the first step with the smaller value."""
    values = schedules.multistep(1e-4, steps=12, milestones=[8, 11], warmup_steps=4, warmup_factor=1e-3)
    assert values[8:] == pytest.approx([1e-5, 1e-5, 1e-5, 1e-6])
    assert values[4:8] == [1e-4] * 4
    assert values[:4] == pytest.approx([1e-4 * (1 - (1 - i / 4) * (1 - 1e-3)) for i in range(4)])


def test_cosine_warms_up_from_0_and_stays_above_its_end():
    """The last step of the warm-up and the next one have the start value; `end` is never reached."""
    values = schedules.cosine(1., .1, steps=10, warmup_steps=4)
    assert values[:5] == pytest.approx([0., 1 / 3, 2 / 3, 1., 1.])
    assert values[7] == pytest.approx(.1 + .9 * (1 + math.cos(math.pi / 2)) / 2)
    assert min(values[4:]) > .1


def test_ramp_reaches_its_last_value_at_the_end_of_the_warmup():
    """`ramp` rises by equal increments to its last value in the last step of the warm-up, and stays there."""
    assert schedules.ramp(0., 1., steps=6, warmup_steps=3) == [0., .5, 1., 1., 1., 1.]


def optimizer() -> torch.optim.Optimizer:
    """Build an optimizer of three groups; the second group has half of the learning rate."""
    groups = [{'params': [torch.nn.Parameter(torch.ones(1))], **options} for options in ({}, {'lr_scale': .5}, {})]
    return torch.optim.SGD(groups, lr=7., weight_decay=7.)


def test_schedule_sets_all_learning_rates_and_some_weight_decays():
    """Learning rates are times `lr_scale`; only the decayed groups get the curve of weight decay."""
    sgd = optimizer()
    schedules.Schedule(sgd, [1., 2., 3.], weight_decay=[.1, .2, .3], decayed=[0]).set(1)
    assert [group['lr'] for group in sgd.param_groups] == [2., 1., 2.]
    assert [group['weight_decay'] for group in sgd.param_groups] == [.2, 7., 7.]


@pytest.mark.parametrize(('steps_done', 'lr'), [(0, 7.), (1, 1.), (3, 3.)])
def test_resume_sets_the_values_of_the_last_finished_step(steps_done, lr):
    """Without a finished step the optimizer keeps its values."""
    sgd = optimizer()
    schedules.Schedule(sgd, [1., 2., 3.]).resume(steps_done)
    assert sgd.param_groups[0]['lr'] == lr
