"""General helpers: errors that end programs, text, seeds, and files that are written completely or not at all."""
import contextlib
import csv
import difflib
import importlib.util
import io
import json
import os
import random
import re
from pathlib import Path
from typing import Iterable, Iterator, List, Union

import numpy as np
import torch

CONTROLS = re.compile('[\x00-\x1f\x7f-\x9f\u2028\u2029]')
SURROGATES = re.compile('[\ud800-\udfff]')  # Python's letters for bytes of names that are not UTF-8


class InputError(ValueError):
    """Invalid input of the user: one line with the flag or file, the value, and what is allowed."""
    exit_code = 2

    def __init__(self, message: str):
        # An exception of a loading worker arrives with the worker's traceback before its text.
        last_line = (message.strip().splitlines() or [''])[-1]
        super().__init__(last_line.removeprefix(f'{type(self).__module__}.{type(self).__qualname__}: '))


class UnreadableImage(InputError):
    """Image that can't be decoded; the message contains its name."""


class RunStopped(RuntimeError):
    """Reason why a run can't continue, in one line."""
    exit_code = 1


class NonFiniteLoss(RunStopped):
    """Loss or gradient norm of a run that diverges."""

    def __init__(self, name: str, value: float, where: str):
        super().__init__(f'{name} is {value} at {where}: run stopped; the last checkpoint is unchanged')


class Interrupted(RunStopped):
    """Stop of a run by a signal, after its state was stored."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signum


def abridge(items: list, most: int = 8) -> str:
    """Join the first `most` items, and append the number of further items."""
    more = f', ... {len(items) - most} more' if len(items) > most else ''
    return ', '.join(map(shown, items[:most])) + more


def decodable(text: object) -> str:
    r"""Return a text that every file and library can store: a byte of a name that is not UTF-8 becomes `\xe4`."""
    # Names of files and folders can have any bytes; Python reads a byte that is not UTF-8 as a surrogate.
    return SURROGATES.sub(lambda match: f'\\x{ord(match[0]) - 0xdc00:02x}' if '\udc80' <= match[0] <= '\udcff'
                          else f'\\u{ord(match[0]):04x}', str(text))


def shown(name: object) -> str:
    r"""Return a name for a line of output: `decodable`, and a line break in the name becomes `\n`."""
    return CONTROLS.sub(lambda match: match[0].encode('unicode_escape').decode(), decodable(name))


def name_bytes(name: str) -> bytes:
    """Return the bytes of a file's name, which may be no UTF-8, e.g. for a digest."""
    return name.encode('utf-8', 'surrogateescape')


def counted(count: int, noun: str, verb: str = '') -> str:
    """Return a number with its noun, in the singular for 1, and the `verb` (are, have) in the same number."""
    ending = '' if count == 1 else 'es' if noun.endswith(('s', 'ch', 'x')) else 's'
    verb = {'are': 'is', 'have': 'has'}[verb] if verb and count == 1 else verb
    return f'{count} {noun}{ending}{f" {verb}" if verb else ""}'


@contextlib.contextmanager
def utf8_name(path: Union[str, Path]) -> Iterator[str]:
    """Yield a name of a file within a context, for libraries that only accept names in UTF-8."""
    name = str(path)
    if name == decodable(name):
        yield name
    else:  # a name that the system makes
        with open(path, 'rb') as file:
            yield f'/proc/self/fd/{file.fileno()}'


def similar(name: str, names: list) -> str:
    """Return a suffix for an error about an unknown name, with similar `names`."""
    matches = difflib.get_close_matches(name, names, n=5, cutoff=.5)
    return f'; similar: {", ".join(dict.fromkeys(matches))}' if matches else ''


def did_you_mean(flag: str, known: list) -> str:
    """Return a suffix for an error about an unknown flag: the flags that begin with its name, or the most similar."""
    names = {option.lstrip('-').replace('_', '-'): option for option in known}
    name = flag.lstrip('-\u2013\u2014').replace('_', '-').lower()
    matches = ([other for other in names if other == name] or [other for other in names if other.startswith(name)][:3]
               or difflib.get_close_matches(name, names, n=1, cutoff=.6))
    return f' (did you mean {" or ".join(names[match] for match in matches)}?)' if matches else ''


def dashed(name: str) -> str:
    """Return the flag of an argparse destination, e.g. `--batch-size` of `batch_size`."""
    return f'--{name.replace("_", "-")}'


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_installed(package: str) -> bool:
    """Return True if a package can be imported, without its import."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # removed from sys.modules
        return False


def derive_seed(*keys: int) -> int:
    """Return a 64-bit seed for any number of integers from 0 to 2**32 - 1, e.g. (seed, epoch, position).

    Randomness is always a function of the position in a run, so that a resumed run is equal to an uninterrupted run.
    """
    # SeedSequence pads with zeros: without the number of keys, (3,) and (3, 0) would give the same seed.
    return int(np.random.SeedSequence((len(keys), *keys)).generate_state(1, np.uint64)[0])


def seed_everything(*keys: int):
    """Seed Python's, NumPy's and torch's generators (CPU and accelerator) with a function of `keys`."""
    seed_cpu(*keys)
    torch.manual_seed(derive_seed(*keys) % 2 ** 63)


def seed_cpu(*keys: int):
    """Seed the CPU's generators, in a tenth of the time: for each sample of a data set."""
    seed = derive_seed(*keys)
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.default_generator.manual_seed(seed % 2 ** 63)


@contextlib.contextmanager
def writing(path: Path):
    """Turn an OSError in a context that writes `path` into RunStopped."""
    try:
        yield
    except OSError as error:
        raise RunStopped(f'{path} can\'t be written ({error.strerror or first_line(error)})') from None


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield the name of a file (same suffix) to write and then rename to `path`; raise RunStopped if writing fails."""
    unfinished = path.with_name(f'{path.stem}.unfinished{path.suffix}')
    try:
        with writing(path):
            yield unfinished
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def sync_to_disk(file):
    """Return when everything that was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def write_json(path: Path, values: dict):
    write_text(path, json.dumps(values, indent=2) + '\n')


def write_text(path: Path, text: str):
    """Write a text as UTF-8, with all names in it `decodable`."""
    with whole_file(path) as unfinished:
        unfinished.write_text(decodable(text), encoding='utf-8')


def write_csv(path: Path, rows: Iterable[Iterable]):
    """Write rows of cells in a form that spreadsheets open with all letters: UTF-8 with a byte order mark."""
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows(rows)
    write_text(path, '\ufeff' + text.getvalue())


def read_csv(path: Path) -> List[List[str]]:
    """Return the rows of a file of `write_csv`, or of another file in UTF-8."""
    with open(path, newline='', encoding='utf-8-sig') as file:
        return list(csv.reader(file))
