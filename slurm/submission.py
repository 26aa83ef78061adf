"""Submission of a job to SLURM, or as processes of this machine."""
import contextlib
import dataclasses
import io
import os
import shlex
import signal
import sys
import time
from typing import Dict, List, Optional

import submitit
import torch
from submitit.core.utils import FailedJobError, JobPaths
from submitit.slurm import slurm as submitit_slurm

from slurm import cluster
from slurm.job import ROOT, Task, resume_command_path
from utils import InputError

LOCAL_RESTARTS = 5  # limit of submitit for jobs without a cluster
# The repository comes before any PYTHONPATH of the user; the folder of the submission is not searched (Python >= 3.11)
PYTHON_PATH = f'export PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}'


@dataclasses.dataclass(frozen=True)
class Request:
    """Resources and settings of a job.

    Args:
        job_dir: folder for the files of the job; %j is replaced by the id of the job.
        gpus_per_node: one process per GPU; 0: processes on CPUs.
        mem_gb: memory per node; None: the default of the cluster.
        max_restarts: number of requeues at the time limit.
        setup: shell commands to run before the program.
        options: further options of sbatch by name, e.g. partition; None: the default of the cluster.
    """
    name: str
    job_dir: str
    nodes: int
    tasks_per_node: int
    cpus_per_task: int
    gpus_per_node: int
    mem_gb: Optional[float]
    timeout_min: int
    max_restarts: int
    setup: List[str]
    options: Dict[str, Optional[str]]

    @property
    def signal_delay_s(self) -> int:
        """Time between the stop signal and the time limit."""
        return min(120, 60 * self.timeout_min // 4)


def slurm_parameters(request: Request) -> dict:
    """Return the request as parameters of submitit's SLURM executor."""
    path = '"$SLURM_JOB_ID"'.join(map(
        shlex.quote, str(resume_command_path(JobPaths(request.job_dir).folder, '%j')).split('%j')))
    print_resume_command = f'at_end() {{ [ ! -e {path} ] || echo "$(<{path})"; }}; trap at_end EXIT'
    # Since SLURM 22.05, srun does not inherit --cpus-per-task from sbatch
    srun_args = [f'--cpus-per-task={request.cpus_per_task}', '--kill-on-bad-exit=1']
    return dict(
        job_name=request.name, nodes=request.nodes, ntasks_per_node=request.tasks_per_node, time=request.timeout_min,
        cpus_per_task=request.cpus_per_task, gpus_per_node=request.gpus_per_node or None, **request.options, wckey=None,
        mem=f'{round(request.mem_gb * 1024)}M' if request.mem_gb else None, signal_delay_s=request.signal_delay_s,
        setup=[*request.setup, PYTHON_PATH, print_resume_command], srun_args=srun_args, stderr_to_stdout=True,
        additional_parameters={'requeue': True})


def sbatch_script(request: Request) -> str:
    """Return the script to submit; needs no SLURM."""
    folder = JobPaths(request.job_dir).folder
    command = f'{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}'
    return submitit_slurm._make_sbatch_string(command=command, folder=folder, **slurm_parameters(request))


class SlurmExecutor(submitit.SlurmExecutor):
    """SLURM executor of submitit that removes its temporary submission script."""

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        parent = JobPaths.get_first_id_independent_folder(self.folder)
        self.temporary = parent / f'.submission_file_{uid}.sh'
        return super()._make_submission_file_text(command, uid)

    def _submit_command(self, command: str):
        try:
            return super()._submit_command(command)
        finally:
            self.temporary.unlink(missing_ok=True)


def submit_to_slurm(request: Request, task: Task) -> submitit.Job:
    """Submit a job to the cluster.

    Raises:
        InputError: the cluster can't meet the request; the message contains SLURM's reason.
    """
    folder = JobPaths.get_first_id_independent_folder(request.job_dir)
    before = set(folder.glob('*.pkl'))
    executor = SlurmExecutor(request.job_dir, max_num_timeout=request.max_restarts)
    executor.update_parameters(**slurm_parameters(request))
    try:
        with outside_any_job(), contextlib.redirect_stderr(io.StringIO()):  # the error repeats the text on stderr
            job = executor.submit(task)
    except FailedJobError as error:
        for path in set(folder.glob('*.pkl')) - before:
            with contextlib.suppress(FileNotFoundError):  # file of a job submitted at the same time, moved since
                if submitit.helpers.DelayedSubmission.load(path).function == task:
                    path.unlink()
        cluster.print_resources()
        lines = [line.removeprefix('sbatch: ').removeprefix('error: ') for line in str(error).splitlines()]
        raise InputError(f'SLURM rejected the job: {"; ".join(filter(None, lines))}') from None
    cancel_if_never_starts(job, seconds=10)
    return job


@contextlib.contextmanager
def outside_any_job():
    """Hide the environment of a surrounding job, which the new job would inherit; SLURM_CONF stays."""
    if 'SLURM_JOB_ID' not in os.environ:
        yield
        return
    conf = {name: value for name, value in os.environ.items() if name == 'SLURM_CONF'}
    with submitit.helpers.clean_env():
        os.environ.update(conf)
        yield


def cancel_if_never_starts(job: submitit.Job, seconds: float = 0):
    """Cancel a pending job that can never start, remove its files and raise InputError.

    Args:
        seconds: time to wait for the reason that the job is pending.
    """
    deadline, confirmations = time.monotonic() + seconds, 0
    while confirmations < 2:  # the scheduler may replace its first reason
        state, reason = cluster.job_state(job.job_id)
        if state == 'PENDING' and cluster.NEVER_STARTS.fullmatch(reason):
            confirmations += 1
            time.sleep(1 if confirmations == 1 else 0)
        elif state not in ('', 'PENDING') or reason not in ('', 'None') or time.monotonic() >= deadline:
            return
        else:
            time.sleep(.3)
    job.cancel()
    if not job.paths.stdout.exists():
        for path in (job.paths.submitted_pickle, job.paths.submission_file):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the folder contains other files
            job.paths.folder.rmdir()
    cluster.print_resources()
    raise InputError(f'SLURM would never start job {job.job_id} (reason: {reason}); the job is cancelled')


@contextlib.contextmanager
def detached():
    """Let the processes that the context starts outlive this program and its terminal; they have no output."""
    sys.stdout.flush()
    sys.stderr.flush()
    copies = [os.dup(fd) for fd in range(3)]
    devnull = os.open(os.devnull, os.O_RDWR)
    handlers = {signum: signal.signal(signum, signal.SIG_IGN) for signum in (signal.SIGINT, signal.SIGHUP)}
    try:
        for fd in range(3):
            os.dup2(devnull, fd)
        yield
    finally:
        for fd, copy in enumerate(copies):
            os.dup2(copy, fd)
            os.close(copy)
        os.close(devnull)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def submit_locally(request: Request, task: Task) -> submitit.Job:
    """Start the processes of all nodes on this machine; raise InputError for fewer GPUs than processes."""
    processes = request.nodes * request.tasks_per_node
    if request.gpus_per_node and torch.cuda.device_count() < processes:
        raise InputError(f'--nodes {request.nodes} --ngpus {request.gpus_per_node}: the job runs without a cluster, '
                         f'and this machine has {torch.cuda.device_count()} GPU(s); --ngpus 0 selects CPUs')
    # Not by submitit's `setup`, which would start its controller through a shell with another process id
    python = ['bash', '-c', '\n'.join([*request.setup, PYTHON_PATH, 'exec "$0" "$@"']), sys.executable]
    executor = submitit.LocalExecutor(request.job_dir, max_num_timeout=min(request.max_restarts, LOCAL_RESTARTS),
                                      python=shlex.join(python))
    executor.update_parameters(tasks_per_node=processes, timeout_min=request.timeout_min,
                               signal_delay_s=request.signal_delay_s, stderr_to_stdout=True)
    with detached():
        return executor.submit(task)
