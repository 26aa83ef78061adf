"""Flags from a file (--config): YAML, JSON, or the args.json of an earlier run."""
import argparse
import json
from pathlib import Path
from typing import Any, List, Tuple

import yaml

from utils import InputError, first_line, similar


def words_of_files(words: List[str], actions: list) -> Tuple[List[str], str]:
    """What the files that --config names would be on a command line, to be put before its own words.

    Args:
        words: of the command line.
        actions: the parser's.

    Returns:
        The words, and an error about a key that the parser does not know, '' if there is none.

    Raises:
        InputError: a file can't be read, or a value is not one of its flag.
    """
    found, unknown = [], ''
    options = {option.replace('_', '-'): action for action in actions for option in action.option_strings}
    for file in files_of(words):
        for key, value in read(file).items():
            name = f'--{str(key).replace("_", "-")}'
            if name not in options:
                known = [option for option in options if option.startswith('--')]
                unknown = unknown or f'--config {file}: there is no flag {name}{similar(name, known)}'
            elif name != '--config' and value is not None:
                found += words_of(name, value, options[name], f'--config {file}: {key}')
    return found, unknown


def files_of(words: List[str]) -> List[str]:
    after = [following for word, following in zip(words, words[1:]) if word == '--config']
    return after + [word.partition('=')[2] for word in words if word.startswith('--config=')]


def read(file: str) -> dict:
    """The content of a file; of an args.json its flags."""
    path = Path(file).expanduser()
    try:
        text = path.read_text()
        content = json.loads(text) if path.suffix == '.json' else yaml.safe_load(text)
    except OSError as error:
        raise InputError(f'--config {file}: {error.strerror or first_line(error)}') from None
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f'--config {file}: is not valid {"JSON" if path.suffix == ".json" else "YAML"} '
                         f'({" ".join(str(error).split())})') from None
    content = {} if content is None else content  # an empty file
    if not isinstance(content, dict):
        raise InputError(f'--config {file}: must hold flags and their values, as in "batch-size: 64"')
    if not isinstance(content.get('args'), dict):
        return content
    flags = content['args']  # a run's; it says twice what it was fine-tuned from
    return {key: value for key, value in flags.items() if key != 'pretrained' or value != flags.get('finetune')}


def words_of(name: str, value: Any, action: argparse.Action, where: str) -> List[str]:
    """A flag and its value as words of a command line."""
    if isinstance(action, argparse.BooleanOptionalAction) or action.nargs == 0:
        if not isinstance(value, bool):
            raise InputError(f'{where} {value!r}: must be true or false')
        off = [f'--no-{name[2:]}'] if isinstance(action, argparse.BooleanOptionalAction) else []
        return [name] if value else off
    if isinstance(value, bool):  # YAML's reading of `on` and `off`
        value = {True: 'on', False: 'off'}[value] if {'on', 'off'} & set(action.choices or ()) else value
    if isinstance(value, list) and action.nargs:
        return [name, *map(str, value)]
    if isinstance(value, (list, dict)):
        raise InputError(f'{where}: must be one value')
    return [f'{name}={value}']
