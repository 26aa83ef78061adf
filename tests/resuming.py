"""Helpers of tests that interrupt runs and resume them."""
import contextlib
import json
import os
import resource
import signal
from pathlib import Path
from typing import Callable, Iterator

import pytest
import torch

from run import signals
from run.training import Run
from utils import Interrupted

UNTESTED = ('checkpoint_previous.pth', 'checkpoint_damaged.pth')  # their position depends on where a run was stopped


def state(run: Path, name: str = 'checkpoint.pth') -> dict:
    return torch.load(run / name, weights_only=True)


def log_lines(run: Path) -> list:
    return [json.loads(line) for line in (run / 'log.txt').read_text().splitlines()]


def is_same(value, expected, rtol: float = 0.) -> bool:
    """Return True if nested dicts and lists of tensors and plain values are equal, bitwise if `rtol` is 0."""
    if isinstance(value, torch.Tensor):
        return torch.allclose(value, expected, rtol, rtol / 10) if rtol else torch.equal(value, expected)
    if isinstance(value, dict):
        return value.keys() == expected.keys() and all(is_same(value[key], expected[key], rtol) for key in value)
    if isinstance(value, list):
        return len(value) == len(expected) and all(is_same(*pair, rtol) for pair in zip(value, expected))
    return value == (pytest.approx(expected, rtol) if rtol and isinstance(expected, float) else expected)


def assert_same_run(run: Path, other: Path, *, rounds: int):
    """Assert that two runs have bitwise equal checkpoints, and equal logs of so many rounds."""
    for name in sorted(path.name for path in other.glob('*.pth') if path.name not in UNTESTED):
        content, expected = state(run, name), state(other, name)
        assert set(content) == set(expected)
        compared = content.keys() - {'args', 'seconds'}
        assert [key for key in compared if not is_same(content[key], expected[key])] == []
    lines, expected_lines = log_lines(run), log_lines(other)
    assert len(lines) == len(expected_lines) == rounds
    for line, expected in zip(lines, expected_lines):
        assert line.keys() == expected.keys()
        for key in line:
            if not key.endswith(('images_per_s', 'data_s', 'memory_mb')):
                assert line[key] == pytest.approx(expected[key], rel=1e-12), key


def interrupt(program: Callable[[], object], signum: int, check: int, monkeypatch) -> Interrupted:
    """Run a program in this process, and send it a signal just before its `check`-th check for signals."""
    checks, agreed = iter(range(1, 1000)), signals.StopRequest.agreed

    def agreed_after_signal(self):
        if next(checks) == check:
            os.kill(os.getpid(), signum)
        return agreed(self)

    monkeypatch.setattr(signals.StopRequest, 'agreed', agreed_after_signal)
    with pytest.raises(Interrupted) as caught:
        program()
    monkeypatch.undo()
    return caught.value


def interrupt_within_round(program: Callable[[], object], step: int, monkeypatch) -> Interrupted:
    """Run a program in this process, and send it SIGTERM when `step` batches of its first round are done."""
    after_update = Run.after_update

    def after_update_and_signal(self, done, sums):
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)
        after_update(self, done, sums)

    monkeypatch.setattr(Run, 'after_update', after_update_and_signal)
    with pytest.raises(Interrupted) as caught:
        program()
    monkeypatch.undo()
    return caught.value


@contextlib.contextmanager
def full_disk(largest_file: int) -> Iterator[None]:
    """Limit the size of files that this process can write, in bytes, within a context."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
