"""Position of a run, in rounds: epochs, or iterations between two evaluations.

After each round the model is evaluated, and the run is logged and stored. A run that is interrupted within a round
resumes within this round.
"""


class Epochs:
    """Position in a run of `total` rounds, each an epoch.

    Attributes:
        done: last finished round; -1: none.
        step: batches done of the next round.
    """
    unit = 'epoch'
    required = ('epoch',)  # keys that a checkpoint must have to be resumed
    fixed = ()  # flags that may not change on resume

    def __init__(self, total: int, *, first: int = 0):
        self.total, self.done, self.step = total, first - 1, 0

    def remaining_rounds(self) -> range:
        return range(self.done + 1, self.total)

    def finish(self, epoch: int):
        self.done, self.step = epoch, 0

    def updates_before(self, epoch: int) -> None:
        """Return None: all epochs have equally many optimizer steps."""

    def updates_done(self, *, per_round: int, accum_iter: int) -> int:
        """Return the number of finished optimizer steps, of which an epoch has `per_round`."""
        return (self.done + 1) * per_round - (-self.step // accum_iter)

    def count(self) -> int:
        """Return the number of the last finished round in the log."""
        return self.done

    def first_to_log(self) -> int:
        """Return the number of the next round in the log; lines from this number on come from lost work."""
        return self.done + 1

    def name(self, epoch: int) -> str:
        return f'Epoch {epoch}'

    def __str__(self) -> str:
        return f'epoch {self.done + 1}, step {self.step}'

    def state_dict(self) -> dict:
        return {'epoch': self.done, 'step': self.step}

    def load_state_dict(self, state: dict):
        self.done, self.step = state['epoch'], state.get('step', 0)


class Iterations(Epochs):
    """Position in a run of rounds with `every` iterations (optimizer steps), perhaps fewer in the last round.

    Args:
        iterations: iterations of the whole run.
        accum_iter: batches per iteration.
    """
    unit = 'iteration'
    required = ('iteration', 'rounds')
    fixed = ('every',)

    def __init__(self, iterations: int, *, every: int, accum_iter: int = 1):
        super().__init__(-(-iterations // every))  # rounds
        self.iterations, self.every, self.accum_iter = iterations, every, accum_iter

    def updates_before(self, number: int) -> int:
        return number * self.every

    def updates_done(self, *, per_round: int, accum_iter: int) -> int:
        return self.count()

    def count(self) -> int:
        """Return the number of finished iterations."""
        return min((self.done + 1) * self.every + self.step // self.accum_iter, self.iterations)

    def first_to_log(self) -> int:
        return (self.done + 1) * self.every + 1

    def name(self, number: int) -> str:
        return f'Iterations {number * self.every + 1} to {min((number + 1) * self.every, self.iterations)}'

    def __str__(self) -> str:
        return f'iteration {self.count()}'

    def state_dict(self) -> dict:
        # The number of iterations does not show whether the last complete round was evaluated.
        return {'iteration': self.count(), 'rounds': self.done + 1}

    def load_state_dict(self, state: dict):
        rounds, iteration = state['rounds'], state['iteration']
        remainder = iteration - rounds * self.every
        if iteration >= self.iterations and rounds >= self.total:
            rounds, remainder = self.total, 0
        elif remainder < 0:  # the last round was shorter, and --iterations is larger now
            rounds, remainder = divmod(iteration, self.every)
        self.done, self.step = rounds - 1, remainder * self.accum_iter
