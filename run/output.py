"""Streams whose reader may leave before a program ends, as `head` does."""
import os
import select

BROKEN_PIPE = 128 + 13  # exit code of a program that SIGPIPE would have ended


def has_no_reader(stream) -> bool:
    """Whether a stream goes to a pipe that nobody will read any more."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # Windows; no file
        return False


def discard(stream):
    """Send what a stream still holds, and gets from now on, nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
