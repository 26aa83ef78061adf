"""Processes inside a job: each runs one rank of a program, stops the rank for a requeue and reports its failure."""
import ctypes
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import List, Optional

import submitit
from submitit.core.utils import JobPaths, UncompletedJobError

from slurm import cluster

ROOT = Path(__file__).resolve().parent.parent
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
REQUEUE_SIGNAL = signal.SIGUSR2  # the default of submitit
POLL_S = .5


class NotRequeued(Exception):
    """Failed requeue of a job: the node has no scontrol, or the cluster forbids requeues."""


class TrainingEnded(Exception):
    """End of the run after a stop signal and before the requeue."""


@dataclasses.dataclass
class Task:
    """Process of a job, with one rank of a program as its child; the rank can stop without ending the job.

    Args:
        program: module of the program, e.g. `main` or `dino.train`.
        argv: command line of the program.
        output_dir: --output-dir of the program; %j is replaced by the id of the job.
        stop_timeout_s: time for the program to store its state after a signal.
        resumes: a requeued job resumes from its newest checkpoint.
        environment: variables to set for the program (None: to remove).
        submission: command line that submitted the job.
        restarts: number of requeues so far, for a job without a cluster.
    """
    program: str
    argv: List[str]
    output_dir: str
    stop_timeout_s: float
    resumes: bool
    environment: dict
    submission: str
    restarts: int = 0

    def __post_init__(self):
        self.child = None
        self.stopping = False

    def __setstate__(self, state: dict):
        """Restore a pickled task; jobs that earlier versions submitted call the timeout `patience_s`."""
        self.__dict__.update({'stop_timeout_s': state.get('patience_s'), **state})

    def __call__(self) -> int:
        """Run the program to its end; return 0, or exit with the exit code of the program."""
        job = submitit.JobEnvironment()
        self.output_dir = self.output_dir.replace('%j', job.job_id)
        remove_stale_files(job.paths, main_rank=job.global_rank == 0)
        restarts = int(os.environ.get('SLURM_RESTART_COUNT', 0)) if job.name() == 'slurm' else self.restarts
        self.failure = Failure(job, restart=restarts)
        if job.global_rank == 0 and self.failure.code() is None:  # the failure file of an earlier restart, if any
            self.failure.path.unlink(missing_ok=True)
        self.catch_signals(local=job.name() == 'local')
        self.start(job)
        try:
            return self.handle_exit(job, self.wait())
        except TrainingEnded:
            return 0
        except (NotRequeued, UncompletedJobError) as error:  # submitit's error after too many restarts
            print(error, flush=True)
            self.print_resume_command(job)
            self.fail(job, 128 + REQUEUE_SIGNAL)
        finally:
            signal.signal(REQUEUE_SIGNAL, signal.SIG_IGN)  # too late to stop the program
            self.child.kill()
            self.child.wait()

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Stop the program and return the task to requeue; called by the signal handler of submitit, on rank 0."""
        if self.child is not None:
            self.child.send_signal(REQUEUE_SIGNAL)
            deadline = time.monotonic() + self.stop_timeout_s
            while (code := self.exit_code()) is None and time.monotonic() < deadline:
                time.sleep(.1)
            if code == 0:
                raise TrainingEnded
            print('The run did not stop in time, and will resume from its last checkpoint' if code is None else
                  f'The run has stopped, exit code {code}', flush=True)
        return submitit.helpers.DelayedSubmission(dataclasses.replace(self, restarts=self.restarts + 1))

    def command(self) -> list:
        """Return the command of the rank, with --resume auto after a requeue."""
        resume = self.resumes and self.failure.restart > 0 and has_checkpoint(self.output_dir)
        return [sys.executable, *python_arguments(self.program), *self.argv, '--output-dir', self.output_dir,
                *(['--resume', 'auto'] if resume else [])]

    def child_environment(self, job) -> dict:
        """Return the environment of the rank: the first node as MASTER_ADDR, and all GPUs of its node visible."""
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        changes = {**self.environment, **({'MASTER_ADDR': '127.0.0.1'} if job.name() == 'local' else {})}
        environment = {name: value for name, value in os.environ.items() if name not in changes}
        return {**environment, **{name: value for name, value in changes.items() if value is not None}}

    def catch_signals(self, *, local: bool):
        """Install the signal handlers; a local job also forwards the signals that SLURM sends to every process."""
        requeue = signal.getsignal(REQUEUE_SIGNAL)

        def stop(signum, frame):
            self.stopping = True
            try:
                requeue(signum, frame)
            except (OSError, subprocess.SubprocessError) as error:  # of scontrol
                raise NotRequeued(f'The job can\'t be requeued ({error}).') from None

        def forward(signum, frame):
            if self.child is None:
                sys.exit(128 + signum)
            self.child.send_signal(signum)

        signal.signal(REQUEUE_SIGNAL, stop)
        if local:
            os.setsid()  # Ctrl-C only reaches the program that follows the job, which then stops the job by SIGTERM
            signal.signal(signal.SIGTERM, forward)
            signal.signal(signal.SIGINT, lambda *_: sys.exit(128 + signal.SIGINT))  # submitit's last before SIGKILL

    def start(self, job):
        """Start the program, and a thread that waits for its end."""
        self.child = subprocess.Popen(self.command(), env=self.child_environment(job),
                                      preexec_fn=kill_with_parent if sys.platform == 'linux' else None)
        self.ended = threading.Event()
        # Not Popen.wait here, which takes a lock: a signal handler that interrupts Popen.wait and calls Popen.wait
        # again would block for ever
        threading.Thread(target=lambda: (self.child.wait(), self.ended.set()), daemon=True).start()

    def exit_code(self) -> Optional[int]:
        """Return the exit code of the program (128 + N after signal N); None while the program runs."""
        code = self.child.poll()  # unlike wait, poll does not block
        return 128 - code if code is not None and code < 0 else code

    def wait(self) -> int:
        """Return the exit code of the program without delay: the first failure reported is the cause of the others."""
        while (code := self.exit_code()) is None:
            if (failed := self.failure.code()) is not None:
                print(f'Another process of the job has failed (exit code {failed})', flush=True)
                sys.exit(failed)
            self.ended.wait(POLL_S)
        return code

    def handle_exit(self, job, code: int) -> int:
        """Return 0 after success, requeue the job after a stop signal, else fail the job."""
        if code == 0:
            return 0
        stopped = code - 128 in STOP_SIGNALS
        if job.global_rank > 0 and (stopped or self.stopping):
            # Any error of this rank follows from the stop of the other ranks, and rank 0 decides about the requeue.
            # submitit counts the job as failed only if this rank has a result file.
            sys.exit(0)
        if stopped and job.name() == 'slurm' and cluster.job_state(job.job_id)[0] == 'RUNNING':
            # Neither a cancelled nor a requeued job: some clusters announce preemption by SIGTERM only
            signal.raise_signal(REQUEUE_SIGNAL)
        name = f'python -m {self.program}' if '.' in self.program else f'{self.program}.py'
        print(f'Rank {job.global_rank}: {name} ended with exit code {code}', flush=True)
        if stopped:
            self.print_resume_command(job)
        self.fail(job, code)

    def print_resume_command(self, job):
        """Print the command that resumes the run as the last line of the log."""
        line = f'To resume: {self.submission} --output-dir {shlex.quote(self.output_dir)} --resume auto'
        if self.resumes and job.name() == 'slurm':  # the batch script prints the file after the last output of srun
            resume_command_path(job.paths.folder, job.job_id).write_text(f'{line}\n')
        elif self.resumes:
            print(line, flush=True)

    def fail(self, job, code: int):
        """Report the failure to the other ranks and exit."""
        self.failure.write(code)
        if job.num_tasks > 1:
            time.sleep(4 * POLL_S)  # time for the other ranks to exit with the same code, before srun kills them
        sys.exit(code)


def python_arguments(program: str) -> List[str]:
    """Return the arguments of Python that run a program."""
    return ['-u', '-m', program] if '.' in program else ['-u', str(ROOT / f'{program}.py')]


class Failure:
    """File in the folder of the job with the first failed rank; all other ranks poll the file and exit."""

    def __init__(self, job, restart: int):
        self.path = failure_path(job.paths.folder, job.job_id)
        self.rank, self.restart = job.global_rank, restart

    def code(self) -> Optional[int]:
        """Return the exit code of the failed rank; None if no rank has failed since the last (re)start."""
        try:
            failure = json.loads(self.path.read_text())
        except OSError:  # no failure, usually
            return None
        return failure['code'] if failure['restart'] == self.restart else None

    def write(self, code: int):
        """Store the exit code of this rank, unless another rank has failed before."""
        if self.code() is None:
            unfinished = self.path.with_suffix(f'.{self.rank}')
            unfinished.write_text(json.dumps({'rank': self.rank, 'code': code, 'restart': self.restart}) + '\n')
            os.replace(unfinished, self.path)


def failure_path(folder: Path, job_id: str) -> Path:
    return folder / f'{job_id}_failure.json'


def resume_command_path(folder: Path, job_id: str) -> Path:
    return folder / f'{job_id}_go_on.txt'


def remove_stale_files(paths: JobPaths, *, main_rank: bool):
    """Remove unfinished files, and results from before a requeue, which submitit would read as results of the job."""
    stale = [paths.result_pickle, Path(f'{paths.result_pickle}.save_tmp')]
    if main_rank:
        stale += [Path(f'{paths.submitted_pickle}.save_tmp'), resume_command_path(paths.folder, paths.job_id)]
    for path in stale:
        path.unlink(missing_ok=True)


def has_checkpoint(output_dir: str) -> bool:
    return any(Path(output_dir).glob('checkpoint*.pth'))


def kill_with_parent():
    """Make the kernel kill this process when its parent dies, even by SIGKILL; for preexec_fn, on Linux."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
