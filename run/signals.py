"""Signals that stop a run: recorded in the main process, ignored by loading workers."""
import atexit
import contextlib
import multiprocessing
import os
import signal
import threading
from typing import Iterator

from run.output import Output
from run.processes import max_over_processes


class StopRequest:
    """Context that records the first signal to stop a run, for a stop between two steps.

    A second SIGINT (Ctrl-C) interrupts at once. Output without a reader (`| head`) counts as SIGPIPE; SIGPIPE itself
    has no handler, because other pipes cause SIGPIPE as well.
    """
    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self):
        self.signum = 0

    def __enter__(self):
        self.previous = {}
        if threading.current_thread() is threading.main_thread():  # other threads can't have handlers
            self.previous = {signum: signal.signal(signum, self._record) for signum in self.SIGNALS}
        Output.on_broken_pipe = lambda: self._record(signal.SIGPIPE, None)
        return self

    def __exit__(self, *_):
        Output.on_broken_pipe = None
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def _record(self, signum: int, _frame):
        if self.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = self.signum or signum

    def agreed(self) -> int:
        """Return a signal that any process received, 0 for none; all processes must call this method together."""
        return max_over_processes(self.signum)


class WorkerSignals:
    """`worker_init_fn` of loading workers, which then ignore signals until the main process exits.

    A cluster signals every process of a job; without its workers a run could not finish the current step.
    """

    def __init__(self):
        self.exiting = multiprocessing.Value('b', False, lock=False)  # shared with the workers
        # called before multiprocessing's own function, which terminates and joins the workers
        atexit.register(lambda: setattr(self.exiting, 'value', True))

    def __call__(self, _worker_id: int):
        for signum in StopRequest.SIGNALS:
            signal.signal(signum, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: self.exiting.value and os._exit(0))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, StopRequest.SIGNALS)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Block the signals of StopRequest within a context, also in processes that are started there.

    Without the block, a signal to all processes of a job would kill a worker that does not ignore signals yet.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, StopRequest.SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
