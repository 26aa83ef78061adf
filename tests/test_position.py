"""Position of a run in epochs or iterations."""
import pytest

from run.position import Epochs, Iterations


def test_iterations_keep_their_position():
    """Rounds of 4, 4 and 2; a position within a round is restored, also if only the evaluation is left to do."""
    position, other = (Iterations(10, every=4, accum_iter=3) for _ in range(2))
    assert list(position.remaining_rounds()) == [0, 1, 2]
    position.step = 6
    assert position.state_dict() == {'iteration': 2, 'rounds': 0}
    position.finish(0)
    position.step = 3
    other.load_state_dict(position.state_dict())
    assert (other.done, other.step, other.count()) == (0, 3, 5)
    position.step = 12
    other.load_state_dict(position.state_dict())
    assert (other.done, other.step, other.count()) == (0, 12, 8)
    position.finish(2)
    other.load_state_dict(position.state_dict())
    assert (position.count(), list(other.remaining_rounds())) == (10, [])


def test_last_round_may_be_continued_by_more_iterations():
    """A run that ended within a round of 4 continues there when --iterations is larger."""
    position, longer = Iterations(10, every=4), Iterations(20, every=4)
    position.finish(2)
    longer.load_state_dict(position.state_dict())
    assert (longer.done, longer.step, list(longer.remaining_rounds())) == (1, 2, [2, 3, 4])


@pytest.mark.parametrize(('step', 'updates'), [(0, 20), (1, 21), (3, 21), (4, 22)])
def test_updates_done_within_an_epoch(step, updates):
    """Two epochs of 10 optimizer steps, and the begun groups of 3 batches."""
    position = Epochs(5)
    position.finish(1)
    position.step = step
    assert position.updates_done(per_round=10, accum_iter=3) == updates


def test_runs_of_epochs_and_of_iterations_are_told_apart():
    """No checkpoint of one kind has the keys that the other kind needs."""
    assert not set(Epochs.required) & set(Iterations(10, every=4).state_dict())
    assert not set(Iterations.required) & set(Epochs(3).state_dict())
