"""Command lines: the parser of every program, types of numbers, and how a program ends."""
import argparse
import os
import re
import signal
import sys
from pathlib import Path
from typing import Optional

from run import config, launch, processes, startup
from run.output import BROKEN_PIPE, discard, has_no_reader
from utils import InputError, Interrupted, RunStopped


class Parser(argparse.ArgumentParser):
    """argparse's, with InputError for exit and traceback, and with every option under two spellings.

    `--job-dir` and `--job_dir` are one option, however it was added; help shows the spelling that it was added with.
    Abbreviations are not accepted. Where there is a flag --config, the file that it names comes before the command
    line's flags (run.config).
    """

    def __init__(self, *args, allow_abbrev: bool = False, **kwargs):
        super().__init__(*args, allow_abbrev=allow_abbrev, **kwargs)

    def error(self, message: str):
        raise InputError(message)

    def parse_known_args(self, args: Optional[list] = None, namespace: Optional[argparse.Namespace] = None):
        own = {option.replace('_', '-'): option for action in self._actions for option in action.option_strings}
        words = list(sys.argv[1:] if args is None else args)
        end = words.index('--') if '--' in words else len(words)  # after it there are no options
        words[:end] = [respelled(word, own) for word in words[:end]]
        self.unknown = ''
        if '--config' in own.values():
            from_files, self.unknown = config.words_of_files(words[:end], self._actions)
            words = from_files + words
        return super().parse_known_args(words, namespace)

    def parse_args(self, args: Optional[list] = None, namespace: Optional[argparse.Namespace] = None):
        parsed = super().parse_args(args, namespace)
        if self.unknown:  # not before: a program may leave them to another parser
            raise InputError(self.unknown)
        return parsed


def respelled(word: str, options: dict) -> str:
    """An option as it was added, where it was given with other dashes and underscores; any other word as it is.

    Args:
        word: of a command line; `--option=value` too.
        options: the spelling that each option was added with, by the one with dashes only.
    """
    name, equals, value = word.partition('=')
    return options.get(name.replace('_', '-'), name) + equals + value if name.startswith('--') else word


def expanded(text: str) -> str:
    """An argparse type: a path in which `~` and environment variables are replaced; an address stays as it is."""
    if text.startswith(('http://', 'https://', 'file://', 'hf-hub:')):
        return text
    path = os.path.expanduser(os.path.expandvars(text))
    unset = re.search(r'\$(\w+|{\w+})', path)
    if (unset or path.startswith('~')) and not os.path.exists(path):
        problem = f'{unset[0]} is not set in the environment' if unset else 'there is no such user'
        raise argparse.ArgumentTypeError(f'{text!r} is not a path: {problem}')
    return path


def number(kind: type, low, high=None, *, above: bool = False):
    """An argparse type: a number of `kind` from `low` (or `above` it) to `high`."""
    allowed = f'{"an integer" if kind is int else "a number"} {">" if above else ">="} {low}'
    allowed += '' if high is None else f' and <= {high}'

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = float('nan')
        if not (value > low if above else value >= low) or value == float('inf') or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f'{text!r} is not allowed: it must be {allowed}')
        return value

    return parse


def switch(text: str) -> bool:
    """An argparse type: a yes or no in words."""
    words = {'on': True, 'true': True, '1': True, 'off': False, 'false': False, '0': False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f'{text!r} is not allowed: it must be one of {", ".join(words)}')
    return words[text.lower()]


def expanded_path(text: str) -> Path:
    """The same as a pathlib.Path."""
    return Path(expanded(text))


PATH, PATH_OBJECT = expanded, expanded_path
SWITCH = dict(type=switch, metavar='true|false')
COUNT = number(int, 1)
COUNT_OR_0 = number(int, 0)
FRACTION = number(float, 0, 1)
NON_NEGATIVE = number(float, 0)
POSITIVE = number(float, 0, above=True)


def run_program(main):
    """Run a program's `main()`; what stops it for a known reason is one line on stderr, and the exit code.

    2: the user's input; 128 + n: signal n, also if only the reader of the output has left, which needs no line; 1:
    anything else.
    """
    if signal.getsignal(signal.SIGINT) is startup.leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = exit_code_of(main)
        sys.stdout.flush()  # here, where it can still be answered that nobody reads it
    except BrokenPipeError:
        if not any(map(has_no_reader, (sys.stdout, sys.stderr))):
            raise  # another pipe
        code = BROKEN_PIPE
    if code == BROKEN_PIPE:
        for stream in (sys.stdout, sys.stderr):  # Python would complain about what is left in them
            if has_no_reader(stream):
                discard(stream)
    if code:
        sys.exit(code)


def exit_code_of(main):
    """What sys.exit takes; the reason is printed."""
    try:
        main()
    except Interrupted as error:
        if error.exit_code != BROKEN_PIPE:
            say(str(error))
        return error.exit_code
    except (InputError, RunStopped) as error:
        words = str(error)
        if processes.say_once(words, lambda: say(words, error=True)) or not launch.is_watched_with_rank_0():
            return error.exit_code
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, when rank 0 has ended: it would report that, too
        return 0
    except KeyboardInterrupt:
        say('interrupted')
        return 128 + signal.SIGINT
    except SystemExit as ended:  # --help
        return ended.code
    return 0


def say(words: str, *, error: bool = False):
    """Print why the program ends, with its name, and tell torchrun."""
    name, kind, rank = Path(sys.argv[0]).name, ': error' if error else '', launch.environment_rank()
    print(f'{name}{kind}{f" (rank {rank})" if rank else ""}: {words}', file=sys.stderr, flush=True)
    launch.report_to_torchrun(f'{name}{kind}: {words}')
