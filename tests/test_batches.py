"""Rounds of batches for runs that are counted in iterations."""
from loaders.batches import Rounds
from run.position import Iterations


class Loader:
    """Loader of epochs with 5 batches, which are pairs (epoch, step)."""

    def __init__(self):
        self.starts = []

    def set_position(self, epoch, step):
        self.epoch, self.step = epoch, step

    def __len__(self):
        return 5 - self.step

    def __iter__(self):
        self.starts.append((self.epoch, self.step))
        yield from ((self.epoch, i) for i in range(self.step, 5))


def test_rounds_continue_the_epochs_of_the_data():
    """Rounds of 4, 4 and 2 of epochs with 5 batches: a round continues where the last one ended, without a restart."""
    loader = Loader()
    rounds, batches = Rounds(loader, Iterations(10, every=4)), []
    for number in range(3):
        rounds.set_position(number, 0)
        batches.append(list(rounds))
    assert batches == [[(0, 0), (0, 1), (0, 2), (0, 3)], [(0, 4), (1, 0), (1, 1), (1, 2)], [(1, 3), (1, 4)]]
    assert loader.starts == [(0, 0), (1, 0)]


def test_a_round_can_be_entered_anywhere():
    """The rest of a round begins in the epoch and at the step of its position."""
    rounds = Rounds(Loader(), Iterations(10, every=4))
    rounds.set_position(1, 2)
    assert (len(rounds), list(rounds)) == (2, [(1, 1), (1, 2)])
