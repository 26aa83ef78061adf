"""Flags from a file (--config): YAML, JSON, or the args.json of an earlier run."""
import argparse
import json
from pathlib import Path
from typing import Any, List, Tuple

import yaml

from utils import InputError, dashed, did_you_mean, first_line


def words_of_files(argv: List[str], actions: list) -> Tuple[List[str], str]:
    """Return the flags in the files of --config as arguments of a command line, in the form that the `actions` parse.

    Returns:
        The arguments, and an error about a key that is not a flag of the parser ('' for none).

    Raises:
        InputError: a file can't be read, or a value is not allowed for its flag.
    """
    file_argv, unknown = [], ''
    options = {option.replace('_', '-'): action for action in actions for option in action.option_strings}
    files = [following for argument, following in zip(argv, argv[1:]) if argument == '--config']
    files += [argument.partition('=')[2] for argument in argv if argument.startswith('--config=')]
    for file in files:
        for key, value in read(file).items():
            name = dashed(str(key))
            if name not in options:
                known = [option for option in options if option.startswith('--')]
                unknown = unknown or f'--config {file}: there is no flag {name}{did_you_mean(name, known)}'
            elif name != '--config' and value is not None:
                file_argv += flag_words(name, value, options[name], f'--config {file}: {key}')
    return file_argv, unknown


def read(file: str) -> dict:
    """Read the flags in a file; an args.json contains its flags under `args`."""
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
        raise InputError(f'--config {file}: must contain flags and their values, as in "batch-size: 64"')
    if not isinstance(content.get('args'), dict):
        return content
    flags = content['args']  # a run stores the source of fine-tuning twice
    return {key: value for key, value in flags.items() if key != 'pretrained' or value != flags.get('finetune')}


def flag_words(name: str, value: Any, action: argparse.Action, where: str) -> List[str]:
    """Return a flag and its value as arguments of a command line."""
    has_off = isinstance(action, argparse.BooleanOptionalAction)
    if has_off or action.nargs == 0:
        if not isinstance(value, bool):
            raise InputError(f'{where} {value!r}: must be true or false')
        return [name] if value else [f'--no-{name[2:]}'] * has_off
    if isinstance(value, bool):  # YAML's reading of `on` and `off`
        value = {True: 'on', False: 'off'}[value] if {'on', 'off'} & set(action.choices or ()) else value
    if isinstance(value, list) and action.nargs:
        return [name, *map(str, value)]
    if isinstance(value, (list, dict)):
        raise InputError(f'{where}: must be one value')
    return [f'{name}={value}']
