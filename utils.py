"""What is general: the errors that programs end with, text, seeds, and files that are written whole."""
import argparse
import contextlib
import difflib
import importlib.util
import json
import os
import random
from pathlib import Path
from typing import Iterator

import numpy as np
import torch


class InputError(ValueError):
    """Something that the user gave can't be used: one line that says what, where, and what is allowed."""
    exit_code = 2

    def __init__(self, message: str):
        # An exception of a data-loading worker comes back with the worker's traceback before its text.
        last_line = (message.strip().splitlines() or [''])[-1]
        super().__init__(last_line.removeprefix(f'{type(self).__module__}.{type(self).__qualname__}: '))


class UnreadableImage(InputError):
    """An image can't be decoded; the message names it."""


class RunStopped(RuntimeError):
    """A run can't go on, for a reason that one line tells."""
    exit_code = 1


class Interrupted(RunStopped):
    """A signal asked a run to stop, and its state is stored."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signum


# ---------------------------------------------------------------------------------------------------------------------
# Text and packages

def abridge(items: list, most: int = 8) -> str:
    """The first `most` of the items, and how many more there are."""
    more = f', ... {len(items) - most} more' if len(items) > most else ''
    return ', '.join(map(str, items[:most])) + more


def similar(name: str, names: list) -> str:
    """What to add to the refusal of a name: those of `names` that are like it."""
    matches = difflib.get_close_matches(name, names, n=5, cutoff=.5)
    return f'; similar: {", ".join(dict.fromkeys(matches))}' if matches else ''


def replaced(args, **values) -> argparse.Namespace:
    """Flags with values that follow from the data; the command line's own are read-only."""
    return argparse.Namespace(**{**vars(args), **values})


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # taken out of sys.modules
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Randomness: always a function of where in the training it is used, never of what happened before

def derive_seed(*keys: int) -> int:
    """A 64-bit seed from any number of integers from 0 to 2**32 - 1, e.g. (seed, epoch, position)."""
    # SeedSequence pads with zeros: without their number, (3,) and (3, 0) would give the same.
    return int(np.random.SeedSequence((len(keys), *keys)).generate_state(1, np.uint64)[0])


def seed_everything(*keys: int):
    """Seed Python's, NumPy's and torch's generators (CPU and accelerator) with a function of `keys`."""
    seed_cpu(*keys)
    torch.manual_seed(derive_seed(*keys) % 2 ** 63)


def seed_cpu(*keys: int):
    """The same without accelerators, which takes a tenth of the time: for each sample of a data set."""
    seed = derive_seed(*keys)
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.default_generator.manual_seed(seed % 2 ** 63)


# ---------------------------------------------------------------------------------------------------------------------
# Files

@contextlib.contextmanager
def writing(path: Path):
    """A context in which `path` is written; raises RunStopped where the system can't."""
    try:
        yield
    except OSError as error:
        raise RunStopped(f'{path} can\'t be written ({error.strerror or first_line(error)})') from None


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A context in which to write a file under another name (same suffix), which becomes `path` if all went well.

    Raises:
        RunStopped: it can't be written.
    """
    unfinished = path.with_name(f'{path.stem}.unfinished{path.suffix}')
    try:
        with writing(path):
            yield unfinished
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def sync_to_disk(file):
    """Don't come back before the disk has what was written to an open file."""
    file.flush()
    os.fsync(file.fileno())


def write_json(path: Path, values: dict):
    write_text(path, json.dumps(values, indent=2) + '\n')


def write_text(path: Path, text: str):
    with whole_file(path) as unfinished:
        unfinished.write_text(text)
