"""Where a training is: counted in epochs, or in iterations with an evaluation every so many.

Both consist of rounds: an epoch, or the iterations from one evaluation to the next. After each the training is
evaluated, logged and stored; within one it can be interrupted, and goes on there.
"""
from typing import Iterator


class Epochs:
    """Counts epochs, and batches within one.

    Args:
        total: of the whole training.
        first: the epoch to begin with.

    Attributes:
        done: the last finished epoch; -1: none.
        step: batches done of the next one.
    """
    unit = 'epoch'
    flag = 'epochs'
    required = ('epoch',)  # what a checkpoint to go on from must say
    fixed = ()  # flags that may not change

    def __init__(self, total: int, *, first: int = 0):
        self.total, self.done, self.step = total, first - 1, 0

    def rounds_left(self) -> Iterator[int]:
        return iter(range(self.done + 1, self.total))

    def finish(self, epoch: int):
        self.done, self.step = epoch, 0

    def updates_before(self, epoch: int) -> None:
        """Steps of the optimizer before an epoch; None: as many as all before it have, all being alike."""

    def count(self) -> int:
        """What the log calls the last finished round."""
        return self.done

    def first_to_log(self) -> int:
        """What the log calls the next round; later lines come from work that was lost."""
        return self.done + 1

    def name(self, epoch: int) -> str:
        return f'Epoch {epoch}'

    def __str__(self) -> str:
        return f'epoch {self.done + 1}, step {self.step}'

    def state_dict(self) -> dict:
        return {'epoch': self.done, 'step': self.step}

    def load_state_dict(self, state: dict):
        self.done, self.step = state['epoch'], state.get('step', 0)


class Iterations:
    """Counts iterations, each a step of the optimizer; in rounds of `every`, the last of which may be shorter.

    Args:
        args: the flags of run.flags.add_iteration_flags and add_batch_flags.

    Attributes:
        done: the last finished round; -1: none.
        step: batches done of the next one.
    """
    unit = 'iteration'
    flag = 'iterations'
    required = ('iteration', 'rounds')
    fixed = ('every',)

    def __init__(self, args):
        self.iterations, self.every, self.accum_iter = args.iterations, args.every, args.accum_iter
        self.total = -(-self.iterations // self.every)  # rounds
        self.done, self.step = -1, 0

    def rounds_left(self) -> Iterator[int]:
        return iter(range(self.done + 1, self.total))

    def finish(self, number: int):
        self.done, self.step = number, 0

    def updates_before(self, number: int) -> int:
        return number * self.every

    def count(self) -> int:
        """Iterations that are done."""
        return min((self.done + 1) * self.every + self.step // self.accum_iter, self.iterations)

    def first_to_log(self) -> int:
        return (self.done + 1) * self.every + 1

    def name(self, number: int) -> str:
        return f'Iterations {number * self.every + 1} to {min((number + 1) * self.every, self.iterations)}'

    def __str__(self) -> str:
        return f'iteration {self.count()}'

    def state_dict(self) -> dict:
        # Their number alone does not say whether a round whose steps are all done was evaluated, too.
        return {'iteration': self.count(), 'rounds': self.done + 1}

    def load_state_dict(self, state: dict):
        rounds, iteration = state['rounds'], state['iteration']
        left = iteration - rounds * self.every
        if iteration >= self.iterations and rounds >= self.total:
            rounds, left = self.total, 0
        elif left < 0:  # the last round was shorter, and --iterations is larger now
            rounds, left = divmod(iteration, self.every)
        self.done, self.step = rounds - 1, left * self.accum_iter
