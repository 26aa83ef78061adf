"""Log and exit code of a submitted job, for --wait."""
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import submitit

from slurm import cluster
from slurm.job import POLL_S, failure_path
from slurm.submission import cancel_if_never_starts


class Log:
    """Log file of rank 0, printed while the file grows."""

    def __init__(self, path: Path):
        self.path, self.file = path, None

    def print_new_lines(self):
        if self.file is None and self.path.exists():
            self.file = open(self.path, errors='replace')
        if self.file is not None:
            sys.stdout.write(self.file.read())
            sys.stdout.flush()


def follow_slurm(job: submitit.Job) -> int:
    """Print the log of a job on SLURM until its end, and return its exit code."""
    # Not by submitit.Job.wait, which blocks for ever if there is no accounting database
    log, start, printed, failed_queries = Log(job.paths.stdout), time.monotonic(), None, 0
    while True:
        state, reason = cluster.job_state(job.job_id)
        if state in cluster.ENDED:
            break
        failed_queries = 0 if state else failed_queries + 1
        if failed_queries > 3 and 'Invalid job id' in cluster.query('squeue', f'--jobs={job.job_id}')[1]:
            break
        if state == 'PENDING':
            cancel_if_never_starts(job)
            if reason not in ('None', printed):
                print(f'Job {job.job_id} is pending: {reason}', flush=True)
            printed = reason
        # Fewer queries after the first minutes: a busy cluster should not serve a query each second for days
        for _ in range(min(30, 1 + int(time.monotonic() - start) // 60)):
            log.print_new_lines()
            time.sleep(1)
    log.print_new_lines()
    if not state:
        return report_end(job, 'no longer listed by SLURM', 0 if has_succeeded(job) else 1)
    return report_end(job, state, cluster.job_exit_code(job.job_id))


def follow_locally(job: submitit.Job) -> int:
    """Print the log of a job on this machine until its end, and return its exit code; Ctrl-C stops the job."""
    log, interrupts = Log(job.paths.stdout), []
    # A handler, because KeyboardInterrupt could be raised anywhere, and be lost there
    handler = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
    try:
        while not job.done():
            log.print_new_lines()
            if interrupts:
                interrupts.clear()
                print(f'Stopping job {job.job_id}', flush=True)
                with contextlib.suppress(ProcessLookupError):  # the job has just ended
                    os.kill(int(job.job_id), signal.SIGTERM)
            time.sleep(POLL_S)
    finally:
        signal.signal(signal.SIGINT, handler)
    log.print_new_lines()
    succeeded = all(has_succeeded(job.task(rank)) for rank in range(job.num_tasks))
    return report_end(job, *(('COMPLETED', 0) if succeeded else ('FAILED', 1)))


def has_succeeded(task: submitit.Job) -> bool:
    """Return whether a process of a job has stored a result without an error."""
    try:
        outcome, _ = submitit.core.utils.pickle_load(task.paths.result_pickle)
    except FileNotFoundError:
        return False
    return outcome == 'success'


def report_end(job: submitit.Job, state: str, code: int) -> int:
    """Print the state of an ended job and the last log lines of the failed rank; return the exit code of the job."""
    print(f'Job {job.job_id}: {state}', flush=True)
    if code == 0:
        return 0
    if (path := failure_path(job.paths.folder, job.job_id)).exists():
        failure = json.loads(path.read_text())
        code, log = failure['code'], job.task(failure['rank']).paths.stdout
        if failure['rank'] > 0 and log.exists():
            print(f'Last lines of {log}:\n' + '\n'.join(log.read_text(errors='replace').splitlines()[-40:]))
    elif not job.paths.stdout.exists():
        print(f'No log was written: {job.paths.folder} must be on a file system that all nodes share')
    print(f'Exit code {code}', flush=True)
    return code
