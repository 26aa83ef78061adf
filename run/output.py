"""Output: log lines, progress bars, optional files, and pipes whose reader ends early, as `head` does."""
import contextlib
import os
import select
import sys
from typing import Callable, Iterator, Optional

from run.processes import is_main_process
from utils import InputError, Interrupted, RunStopped, decodable, first_line

BROKEN_PIPE = 128 + 13  # exit code after SIGPIPE


class Output:
    """Standard output; `on_broken_pipe` is called if no process reads the output (None: raise BrokenPipeError).

    With `verbose`, which is --verbose, details are printed.
    """
    verbose = False
    on_broken_pipe: Optional[Callable[[], None]] = None


def write_line(*words, stream=None):
    """Print a line to a stream (None: standard output); letters that its encoding lacks are printed as escapes."""
    stream = stream or sys.stdout
    encoding = getattr(stream, 'encoding', None) or 'utf-8'
    text = decodable(' '.join(map(str, words)))
    print(text.encode(encoding, 'backslashreplace').decode(encoding), file=stream, flush=True)


def log(*words):
    """Print a line on the main process."""
    if not is_main_process():
        return
    try:
        write_line(*words)
    except BrokenPipeError:
        if Output.on_broken_pipe is None or not has_no_reader(sys.stdout):
            raise
        discard(sys.stdout)
        Output.on_broken_pipe()


@contextlib.contextmanager
def without_ending(name) -> Iterator[None]:
    """Log any error in a context that writes `name`, such as a report, which a training does not need to go on."""
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:  # of a full disk, of a library that draws, of a picture that was deleted
        kind = '' if isinstance(error, (InputError, RunStopped)) else f'{type(error).__name__}: '
        log(f'Error: {kind}{first_line(error)}; the program continues without {name}')


def detail(text: str):
    """Print a line, unless it is empty, on the main process of a program with --verbose."""
    if Output.verbose and text:
        log(text)


def shows_bar() -> bool:
    """Return True if progress is shown as a bar: on a terminal with columns."""
    if not is_main_process() or not sys.stderr.isatty():
        return False
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):  # a stream that is not a file
        return False


def has_no_reader(stream) -> bool:
    """Return True if a stream is a pipe without a reader."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    except (OSError, ValueError):  # not a file
        return False


def discard(stream):
    """Send the buffer of a stream, and all later output, to the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
