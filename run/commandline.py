"""Command lines: the parser of every program, types of numbers and paths, and how a program ends."""
import argparse
import os
import re
import signal
import sys
import traceback
import types
from pathlib import Path
from typing import Any, List, Optional

from run import config, launch, processes
from run.output import BROKEN_PIPE, Output, discard, has_no_reader, write_line
from run.settings import MostPixels
from utils import InputError, Interrupted, RunStopped, dashed, decodable, did_you_mean

FLAG = re.compile(r'(--|[\u2013\u2014]+|-(?=[A-Za-z].))([^\s=]+)(=.*)?', re.DOTALL)  # some editors replace --


class UnknownFlags(InputError):
    """Flags that a parser does not have, with the flags `known` that are similar."""

    def __init__(self, flags: List[str], known: List[str]):
        super().__init__('; '.join(f'{flag}: no such flag{did_you_mean(flag, known)}' for flag in flags))
        self.flags, self.known = flags, known


class Verbose(argparse.Action):
    """Flag --verbose, which is no value of the program: it prints details of any file, and tracebacks."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, 'nargs': 0, 'dest': argparse.SUPPRESS, 'default': argparse.SUPPRESS})

    def __call__(self, *_):
        Output.verbose = True


class Parser(argparse.ArgumentParser):
    """Parser that raises InputError instead of exiting, and accepts options with dashes or underscores, unabbreviated.

    Help shows the spelling that an option was added with, and defaults. If the parser has --config, the flags in its
    file precede the flags of the command line (run.config).

    Args:
        example: the words of a command after the program's name, in one or more lines, for the end of the help.
    """

    def __init__(self, *args, example: str = '', **kwargs):
        defaults = dict(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(*args, **{**defaults, **kwargs})
        self.example = example
        if self.add_help:
            self.add_argument('--verbose', action=Verbose, help='details of loaded weights, and tracebacks of errors')

    def format_help(self) -> str:
        """Format the help, with the example last, whose lines stay as they are, for a shell."""
        python = '' if self.prog.startswith('python ') else 'python '
        words = self.example.replace('\n', ' \\\n      ')
        return super().format_help() + (f'\nexample:\n  {python}{self.prog} {words}\n' if words else '')

    def error(self, message: str):
        raise InputError(message)

    def parse_known_args(self, args: Optional[list] = None, namespace: Optional[argparse.Namespace] = None):
        options = {option.replace('_', '-'): option for action in self._actions for option in action.option_strings}
        argv = list(sys.argv[1:] if args is None else args)
        end = argv.index('--') if '--' in argv else len(argv)  # no options follow `--`
        argv[:end] = [respelled(argument, options) for argument in argv[:end]]
        self.unknown = ''
        if '--config' in options.values():
            argv_of_files, self.unknown = config.words_of_files(argv[:end], self._actions)
            argv = argv_of_files + argv
        return super().parse_known_args(argv, namespace)

    def parse_args(self, args: Optional[list] = None, namespace: Optional[argparse.Namespace] = None):
        argv = list(sys.argv[1:] if args is None else args)
        known = self.known_options(argv)
        if unknown := unknown_flags(argv, known):  # earlier than argparse, which would first ask for required flags
            raise UnknownFlags(unknown, known)
        parsed = super().parse_args(argv, namespace)
        if self.unknown:  # not earlier: a program may leave unknown flags to another parser
            raise InputError(self.unknown)
        MostPixels.value = vars(parsed).get('max_pixels', MostPixels.DEFAULT)  # of flags.add_pixels_flag
        return parsed

    def known_options(self, argv: list) -> List[str]:
        """Return the options of this parser, and of the command that a command line contains, if any."""
        known = [option for action in self._actions for option in action.option_strings]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                named = [word for word in argv if word in action.choices]
                for command in named[:1] or action.choices:
                    known += action.choices[command].known_options(argv)
        return known

    def is_default(self, argv: Optional[list], name: str) -> bool:
        """Return True if a command line does not set the option with the destination `name`."""
        unset = object()
        namespace = types.SimpleNamespace(**{name: unset})
        return vars(self.parse_args(argv, namespace))[name] is unset


def respelled(argument: str, options: dict) -> str:
    """Return an option (or `--option=value`) in the spelling of `options` (keys: dashes only), others unchanged."""
    name, equals, value = argument.partition('=')
    return options.get(name.replace('_', '-'), name) + equals + value if name.startswith('--') else argument


def unknown_flags(argv: list, known: List[str]) -> List[str]:
    """Return the words of a command line that look like flags, and are none of `known`."""
    spellings = {option.replace('_', '-') for option in known}
    end = argv.index('--') if '--' in argv else len(argv)
    unknown = []
    for word in argv[:end]:
        match = FLAG.fullmatch(word)
        if match is None:
            continue
        dashes, name = match[1], match[2].replace('_', '-')
        is_option = f'{dashes}{name}' in spellings or (dashes == '-' and word[:2] in spellings)
        if not is_option and (dashes.startswith('-') or f'--{name}' in spellings):
            unknown.append(f'{dashes}{match[2]}')
    return unknown


def words_of(flags: dict) -> List[str]:
    """Return flags (values by destination) as arguments of a command line, without flags that are None or ''."""
    argv: List[str] = []
    for name, value in flags.items():
        flag = dashed(name)
        if isinstance(value, bool):
            argv.append(flag if value else f'--no-{flag[2:]}')
        elif isinstance(value, (list, tuple)):
            argv += [flag, *map(str, value)]
        elif value not in (None, ''):
            argv += [f'{flag}={value}'] if str(value).startswith('-') else [flag, str(value)]
    return argv


def expanded(text: str) -> str:
    """Replace `~` and environment variables in a path; return a URL unchanged (an argparse type)."""
    if text.startswith(('http://', 'https://', 'file://', 'hf-hub:')):
        return text
    path = os.path.expanduser(os.path.expandvars(text))
    unset = re.search(r'\$(\w+|{\w+})', path)
    if (unset or path.startswith('~')) and not os.path.exists(path):
        problem = f'{unset[0]} is not set in the environment' if unset else 'there is no such user'
        raise argparse.ArgumentTypeError(f'{text!r} is not a path: {problem}')
    return path


def number(kind: type, low, high=None, *, above: bool = False):
    """Return an argparse type: numbers of `kind` from `low` (or `above` it) to `high`."""
    allowed = (f'{"an integer" if kind is int else "a number"} {">" if above else ">="} {low}'
               + ('' if high is None else f' and <= {high}'))

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = float('nan')
        if not (value > low if above else value >= low) or value == float('inf') or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f'{text!r} is not allowed: must be {allowed}')
        return value

    return parse


def switch(text: str) -> bool:
    """Parse a yes or no in words (an argparse type)."""
    values = {'on': True, 'true': True, '1': True, 'off': False, 'false': False, '0': False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f'{text!r} is not allowed: must be one of {", ".join(values)}')
    return values[text.lower()]


def expanded_path(text: str) -> Path:
    """Expand a path to a pathlib.Path (an argparse type)."""
    return Path(expanded(text))


PATH, PATH_OBJECT = expanded, expanded_path
SWITCH = dict(type=switch, metavar='true|false')
COUNT = number(int, 1)
COUNT_OR_0 = number(int, 0)
FRACTION = number(float, 0, 1)
NON_NEGATIVE = number(float, 0)
POSITIVE = number(float, 0, above=True)


def run_program(main):
    """Run a program's `main()`; print a known reason for its end as one line on stderr; exit.

    The exit code is 2 for invalid input, 128 + n for signal n, and 1 for other errors. Output without a reader counts
    as SIGPIPE; no line is printed for this.
    """
    try:
        code = exit_code_of(main)
        sys.stdout.flush()  # here, where a missing reader can still be handled
    except BrokenPipeError:
        if not any(map(has_no_reader, (sys.stdout, sys.stderr))):
            raise  # another pipe
        code = BROKEN_PIPE
    if code == BROKEN_PIPE:
        for stream in (sys.stdout, sys.stderr):  # Python would complain about the rest of their buffers
            if has_no_reader(stream):
                discard(stream)
    if code:
        sys.exit(code)


def exit_code_of(main) -> Any:
    """Run `main()`, print the reason for its end, and return the argument of sys.exit."""
    try:
        main()
    except Interrupted as error:
        if error.exit_code != BROKEN_PIPE:
            print_reason(str(error))
        return error.exit_code
    except (InputError, RunStopped) as error:
        reason = str(error)
        if Output.verbose:
            traceback.print_exc()
        if processes.report_once(reason, lambda: print_reason(reason, is_error=True)) or (
                not launch.is_watched_with_rank_0()):
            return error.exit_code
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's signal after the end of rank 0 would be reported too
        return 0
    except KeyboardInterrupt:
        print_reason('interrupted')
        return 128 + signal.SIGINT
    except SystemExit as exit_:  # --help
        return exit_.code
    return 0


def print_reason(reason: str, *, is_error: bool = False):
    """Print the program's name and the reason for its end on stderr; pass the reason to torchrun."""
    name, kind, rank = Path(sys.argv[0]).name, ': error' if is_error else '', launch.environment_rank()
    write_line(f'{name}{kind}{f" (rank {rank})" if rank else ""}: {reason}', stream=sys.stderr)
    launch.report_to_torchrun(decodable(f'{name}{kind}: {reason}'))
