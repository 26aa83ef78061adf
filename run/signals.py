"""Signals that ask a run to stop: noted in the main process, left to it by those that load data."""
import atexit
import contextlib
import multiprocessing
import os
import signal
import threading
from typing import Iterator

from run.processes import Output, max_over_processes


class StopRequest:
    """Notes the signals that ask a run to stop, so that it can do so between two steps.

    Use as a context; a second SIGINT (Ctrl-C) interrupts at once. That nobody reads the output any more (`| head`)
    counts as SIGPIPE, which itself comes from other pipes as well.
    """
    SIGNALS = tuple(s for s in signal.Signals if s.name in ('SIGTERM', 'SIGINT', 'SIGUSR1', 'SIGUSR2'))

    def __init__(self):
        self.signum = 0

    def __enter__(self):
        self.previous = {}
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self.previous = {signum: signal.signal(signum, self._note) for signum in self.SIGNALS}
        Output.on_broken_pipe = lambda: self._note(signal.SIGPIPE, None)
        return self

    def __exit__(self, *_):
        Output.on_broken_pipe = None
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _frame):
        if self.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = self.signum or signum

    def agreed(self) -> int:
        """The signal that any process has got, 0 for none; all processes must ask at the same step."""
        return max_over_processes(self.signum)


class WorkerSignals:
    """For data-loading workers (`worker_init_fn`): leave signals to the main process, until that one exits.

    A cluster signals every process of a job; without its workers a run could not finish the step that it is at.
    """

    def __init__(self):
        self.exiting = multiprocessing.Value('b', False, lock=False)  # shared with the workers
        atexit.register(self._allow_termination)  # runs before multiprocessing's own, which terminates and joins them

    def _allow_termination(self):
        self.exiting.value = True

    def _terminate(self, _signum: int, _frame):
        if self.exiting.value:
            os._exit(0)

    def __call__(self, _worker_id: int):
        for signum in StopRequest.SIGNALS:
            signal.signal(signum, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._terminate)
        if hasattr(signal, 'pthread_sigmask'):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, StopRequest.SIGNALS)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """A context in which signals that ask to stop have to wait; processes that are started in it inherit that.

    Otherwise one that is for all processes of a job would kill a worker which has not come to ignore it.
    """
    if not hasattr(signal, 'pthread_sigmask'):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, StopRequest.SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
