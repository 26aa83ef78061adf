"""Imported first by a program: Ctrl-C while its libraries are loaded, which takes seconds, ends it in one line.

Without it, that is a traceback of whatever was being imported, or is lost in there. `run.commandline.run_program` puts
Python's own handler back.
"""
import os
import signal
import sys


def leave(signum: int, _frame):
    """A signal handler. Nothing has been begun that would have to be ended."""
    os.write(sys.__stderr__.fileno(), f'{os.path.basename(sys.argv[0])}: interrupted\n'.encode())
    os._exit(128 + signum)


def importer() -> str:
    """The name of the module that imports this one."""
    frame = sys._getframe(1)
    while frame.f_globals['__name__'] == __name__ or 'importlib' in frame.f_code.co_filename:
        frame = frame.f_back
    return frame.f_globals['__name__']


# Not in another program's libraries, and not where SIGINT is ignored, as after nohup
if importer() == '__main__' and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, leave)
