"""Run main.py, or another program, on a SLURM cluster or in several processes of this machine.

It takes the program's flags and those of the job.

A job that meets its time limit or is preempted saves its state, is requeued, and goes on where it stopped.
"""
# A job's own processes import this file too, each beside its training: torch and what needs it (the program, run/,
# utils.py) are imported only where a command line is read.
import run.startup  # noqa: F401  first of all

import argparse
import contextlib
import ctypes
import dataclasses
import importlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import List, Optional, Tuple

import submitit
from submitit.core.utils import FailedJobError, JobPaths, UncompletedJobError
from submitit.slurm import slurm

ROOT = Path(__file__).resolve().parent
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
REQUEUE_SIGNAL = signal.SIGUSR2  # the one that submitit asks the cluster for
LOCAL_RESTARTS = 5  # submitit's own limit for jobs without a cluster
POLL_S = .5
QUERY_TIMEOUT_S = 20
# What squeue gives as reason for jobs that no amount of waiting will start
NEVER_STARTS = re.compile(
    r'Partition(Config|NodeLimit|TimeLimit)|BadConstraints|DependencyNeverSatisfied|MaxMemPerLimit|QOSMin\w+'
    r'|(Account|QOS)NotAllowed|Invalid(Account|QOS)|(Assoc|QOS)\w*Max\w+PerJob\w*|JobHoldMaxRequeue|.*requeued.held')
ENDED = ('COMPLETED', 'FAILED', 'CANCELLED', 'TIMEOUT', 'NODE_FAIL', 'OUT_OF_MEMORY', 'BOOT_FAIL', 'DEADLINE',
         'PREEMPTED')


# ---------------------------------------------------------------------------------------------------------------------
# Inside the job

class NotRequeued(Exception):
    """The cluster doesn't start the job again: nodes may have no scontrol, or requeues may be forbidden."""


class TrainingEnded(Exception):
    """The training reached its end while it was asked to stop."""


@dataclasses.dataclass
class Task:
    """What each process of the job does: run one rank of a program as its child, which can end without ending the job.

    Args:
        argv: the program's command line.
        output_dir: its --output-dir; %j stands for the job's id.
        patience_s: seconds that the training has to save its state.
        resumes: whether a job that is started again goes on from the newest checkpoint.
        environment: variables to set (None: to remove).
        restarts: how often the job was requeued, where the cluster doesn't count.
        program: its module, e.g. `main` or `dino.train`.
        submission: the command line that has submitted the job.
    """
    argv: List[str]
    output_dir: str
    patience_s: float
    resumes: bool
    environment: dict
    restarts: int = 0
    program: str = 'main'  # jobs that were submitted before there were others don't say
    submission: str = ''

    def __post_init__(self):
        self.child = None
        self.stopping = False

    def __call__(self) -> int:
        """Train to the end; returns 0, or ends the process with the training's exit code."""
        job = submitit.JobEnvironment()
        remove_leftovers(job.paths, main_rank=job.global_rank == 0)
        restarts = int(os.environ.get('SLURM_RESTART_COUNT', 0)) if job.name() == 'slurm' else self.restarts
        self.failure = Failure(job, restart=restarts)
        if job.global_rank == 0 and self.failure.code() is None:  # one of an earlier restart would be reported again
            self.failure.path.unlink(missing_ok=True)
        self.catch_signals(local=job.name() == 'local')
        self.start(job)
        try:
            return self.conclude(job, self.wait())
        except TrainingEnded:
            return 0
        except (NotRequeued, UncompletedJobError) as error:  # submitit's, of a job that met its time limit too often
            say(str(error))
            self.say_how_to_go_on(job)
            self.fail(job, 128 + REQUEUE_SIGNAL)
        finally:
            signal.signal(REQUEUE_SIGNAL, signal.SIG_IGN)  # there is nothing left to stop
            self.child.kill()
            self.child.wait()

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Stop the training. submitit calls it on the main rank, in its handler, and requeues what it returns."""
        if self.child is not None:
            self.child.send_signal(REQUEUE_SIGNAL)
            deadline = time.monotonic() + self.patience_s
            while (code := self.exit_code()) is None and time.monotonic() < deadline:
                time.sleep(.1)
            if code == 0:
                raise TrainingEnded
            say('The training did not stop in time: it will go on from its last checkpoint' if code is None else
                f'The training has stopped, exit code {code}')
        return submitit.helpers.DelayedSubmission(dataclasses.replace(self, restarts=self.restarts + 1))

    def output_dir_of(self, job) -> str:
        return self.output_dir.replace('%j', job.job_id)

    def command(self, job) -> list:
        output_dir = self.output_dir_of(job)
        goes_on = self.resumes and self.failure.restart > 0 and has_checkpoint(output_dir)
        return [sys.executable, *program_words(self.program), *self.argv, '--output-dir', output_dir,
                *(['--resume', 'auto'] if goes_on else [])]

    def child_environment(self, job) -> dict:
        """The processes meet on the first node; each sees all GPUs of its node, and takes that of LOCAL_RANK."""
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        changes = {**self.environment, **({'MASTER_ADDR': '127.0.0.1'} if job.name() == 'local' else {})}
        if '.' in self.program:  # else Python looks for its package where the job was submitted, as 3.10 still does
            changes['PYTHONSAFEPATH'] = '1'
        environment = {name: value for name, value in os.environ.items() if name not in changes}
        return {**environment, **{name: value for name, value in changes.items() if value is not None}}

    def catch_signals(self, *, local: bool):
        """Note that the job is being stopped; and without a cluster, pass on what a cluster sends to every process."""
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
            os.setsid()  # Ctrl-C is for the program that waits, which then ends the job in an orderly way
            signal.signal(signal.SIGTERM, forward)
            signal.signal(signal.SIGINT, lambda *_: sys.exit(128 + signal.SIGINT))  # submitit's last before SIGKILL

    def start(self, job):
        """Start the program. A thread waits for its end, for this process to see even in a signal handler.

        Popen's own methods take a lock, for which a handler that interrupts one of them would wait for ever.
        """
        self.child = subprocess.Popen(self.command(job), env=self.child_environment(job),
                                      preexec_fn=end_with_parent if sys.platform == 'linux' else None)
        self.ended = threading.Event()
        threading.Thread(target=lambda: (self.child.wait(), self.ended.set()), daemon=True).start()

    def exit_code(self) -> Optional[int]:
        """The child's exit code, 128 + signal if one ended it; None while it runs."""
        code = self.child.poll()  # never waits for the lock
        return 128 - code if code is not None and code < 0 else code

    def wait(self) -> int:
        """The child's exit code, noticed at once, so that the first failure written down is the cause of the others."""
        while (code := self.exit_code()) is None:
            failed = self.failure.code()
            if failed is not None:
                say(f'Another process of the job has failed (exit code {failed})')
                sys.exit(failed)
            self.ended.wait(POLL_S)
        return code

    def conclude(self, job, code: int) -> int:
        """What the end of this rank's training means for the job."""
        if code == 0:
            return 0
        stopped = code - 128 in STOP_SIGNALS
        if job.global_rank > 0 and (stopped or self.stopping):
            # An error here could only come from other ranks' end. Whether the job goes on is the main rank's to say;
            # leaving without a result keeps submitit from taking the job for failed.
            sys.exit(0)
        if stopped and is_running(job):
            # SIGTERM is all the warning that some clusters give: what follows is the same as for the signal asked for
            signal.raise_signal(REQUEUE_SIGNAL)
        say(f'Rank {job.global_rank}: {program_name(self.program)} ended with exit code {code}')
        if stopped:
            self.say_how_to_go_on(job)
        self.fail(job, code)

    def say_how_to_go_on(self, job):
        """The last line of the log: on a cluster the job's script prints it, after what srun says of the end."""
        if not self.resumes:
            return
        command = (f'{self.submission or "submit it again with"} --output-dir {shlex.quote(self.output_dir_of(job))} '
                   f'--resume auto')
        if job.name() == 'slurm' and self.submission:
            go_on_path(job.paths.folder, job.job_id).write_text(f'To go on: {command}\n')
        else:
            say(f'To go on: {command}')

    def fail(self, job, code: int):
        self.failure.write(code)
        if job.num_tasks > 1:
            time.sleep(4 * POLL_S)  # the others can end with the same code, before srun kills them
        sys.exit(code)


def program_words(program: str) -> List[str]:
    """Python's own part of a program's command line."""
    return ['-u', '-m', program] if '.' in program else ['-u', str(ROOT / f'{program}.py')]


def program_name(program: str) -> str:
    """What users call it."""
    return f'python -m {program}' if '.' in program else f'{program}.py'


class Failure:
    """The file in the job's directory by which a rank's failure ends the others at once, whatever they wait for."""

    def __init__(self, job, restart: int):
        self.path = failure_path(job.paths.folder, job.job_id)
        self.rank, self.restart = job.global_rank, restart

    def code(self) -> Optional[int]:
        """Exit code of the rank that failed; None: none has since the job was started (again)."""
        try:
            failure = json.loads(self.path.read_text())
        except OSError:  # usually because there is none
            return None
        return failure['code'] if failure['restart'] == self.restart else None

    def write(self, code: int):
        if self.code() is None:  # the first one is the cause
            unfinished = self.path.with_suffix(f'.{self.rank}')
            unfinished.write_text(json.dumps({'rank': self.rank, 'code': code, 'restart': self.restart}) + '\n')
            os.replace(unfinished, self.path)


def failure_path(folder: Path, job_id: str) -> Path:
    return folder / f'{job_id}_failure.json'


def go_on_path(folder: Path, job_id: str) -> Path:
    return folder / f'{job_id}_go_on.txt'


def remove_leftovers(paths: JobPaths, *, main_rank: bool):
    """Results of this rank from before a requeue, which submitit would take for the job's, and half-written files."""
    leftovers = [paths.result_pickle, Path(f'{paths.result_pickle}.save_tmp')]
    leftovers += [Path(f'{paths.submitted_pickle}.save_tmp'),
                  go_on_path(paths.folder, paths.job_id)] if main_rank else []
    for path in leftovers:
        path.unlink(missing_ok=True)


def has_checkpoint(output_dir: str) -> bool:
    return any(Path(output_dir).glob('checkpoint*.pth'))


def end_with_parent():
    """In a new process on Linux: be killed when the parent dies, even if that was killed itself."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def is_running(job) -> bool:
    """Whether SLURM holds the job for running: not when it is being cancelled, or is requeued already."""
    if job.name() != 'slurm':
        return False
    return (slurm_status(job.job_id) or ('', ''))[0] == 'RUNNING'


def say(message: str):
    print(message, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# What SLURM says

def slurm_query(*command: str) -> Tuple[bool, str]:
    """Whether a SLURM command succeeded, and what it printed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S)
    except FileNotFoundError:
        return False, f'{command[0]} is not installed'
    except subprocess.TimeoutExpired:
        return False, f'{command[0]} got no answer in {QUERY_TIMEOUT_S} s'
    return done.returncode == 0, (done.stdout if done.returncode == 0 else done.stderr).strip()


def slurm_status(job_id: str) -> Optional[Tuple[str, str]]:
    """(state, reason) of a job, also for some minutes after its end; None: SLURM doesn't know it, or doesn't answer.

    From squeue: unlike sacct it needs no accounting database.
    """
    succeeded, words = slurm_query('squeue', '--noheader', '--states=all', f'--jobs={job_id}', '--format=%T|%r')
    return tuple(words.split('|', 1)) if succeeded and words else None


def slurm_exit_code(job_id: str) -> int:
    """Exit code of a job that has ended, never 0 unless it completed."""
    _, words = slurm_query('scontrol', 'show', 'job', '--oneliner', job_id)
    found = re.search(r' ExitCode=(\d+):(\d+)', words)
    code, signum = map(int, found.groups()) if found else (0, 0)
    return 0 if ' JobState=COMPLETED ' in words else code or (128 + signum if signum else 1)


def show_cluster():
    """Print on stderr what a request can be made of."""
    _, words = slurm_query('sinfo', '--format=%18P %.6a %.12l %.6D %.5c %.9m %14G %20f %t')
    print(f'The cluster has (MEMORY in MB for each node, GRES: its GPUs):\n{words}', file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def refusal(message: str) -> Exception:
    from utils import InputError
    return InputError(message)


def get_args_parser() -> argparse.ArgumentParser:
    """The job's flags; the program's are left to its own parser."""
    from run.commandline import COUNT, COUNT_OR_0, PATH, POSITIVE, Parser
    parser = Parser(Path(__file__).name, description=__doc__, add_help=False,
                    usage='%(prog)s [flags of the job] [flags of the program]',
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group('job')
    group.add_argument('-h', '--help', action='store_true', help='show these flags and those of the program')
    group.add_argument('--program', default='main', metavar='MODULE',
                       help='what is run: a module of this repository with parse_args and main, e.g. dino.train')
    group.add_argument('--cluster', default='auto', choices=['auto', 'slurm', 'local'],
                       help='auto: slurm where a cluster answers to sinfo, else local, as processes of this machine')
    group.add_argument('--nodes', default=2, type=COUNT, metavar='N')
    group.add_argument('--ngpus', default=8, type=COUNT_OR_0, metavar='N',
                       help='GPUs of each node, with a process for each; 0: train on CPUs')
    group.add_argument('--tasks-per-node', type=COUNT, metavar='N', help='processes of each node with --ngpus 0; 1 if '
                       'unset')
    group.add_argument('--cpus-per-task', type=COUNT, metavar='N', help='CPU cores of each process; --num-workers if '
                       'unset')
    group.add_argument('--mem-gb', type=POSITIVE, metavar='GB', help='memory of each node; the cluster\'s default if '
                       'unset')
    group.add_argument('--timeout', default=2800, type=COUNT, metavar='MINUTES',
                       help='time limit, at which the job saves its state and is requeued')
    group.add_argument('--max-restarts', default=20, type=COUNT_OR_0, metavar='N',
                       help=f'how often a job that met its time limit is requeued (local: up to {LOCAL_RESTARTS}); '
                       'preemption counts too where the limit is 10 minutes or less')
    group.add_argument('--job-dir', default='./runs/%j', type=PATH, metavar='DIR',
                       help='for logs and, without --output-dir, for results; must be on a file system that all nodes '
                       'share; %%j is the job\'s id')
    group.add_argument('--partition', metavar='NAME', help='the cluster\'s default if unset')
    group.add_argument('--constraint', metavar='FEATURES', help='what nodes must have')
    group.add_argument('--use-volta32', action='store_true', help='the same as --constraint volta32gb')
    group.add_argument('--account', metavar='NAME', help='whom the cluster charges')
    group.add_argument('--qos', metavar='NAME', help='quality of service')
    group.add_argument('--comment', metavar='TEXT', help='noted with the job; some clusters want a reason for priority')
    group.add_argument('--exclude', metavar='NODES', help='nodes not to use, separated by commas')
    group.add_argument('--setup', default=[], action='append', metavar='LINE',
                       help='shell command to run before the training, e.g. "module load cuda"; can be repeated')
    group.add_argument('--wait', action='store_true', help='follow the log to the end; exit with the job\'s exit code')
    group.add_argument('--dry-run', action='store_true', help='print the sbatch script, and submit nothing')
    return parser


def load_program(name: str):
    """The module of a program.

    Raises:
        InputError: it is none of this repository's, or can't be run.
    """
    path = ROOT.joinpath(*name.split('.')).with_suffix('.py')
    if not all(word.isidentifier() for word in name.split('.')) or not path.is_file():
        raise refusal(f'--program {name}: no such module in {ROOT}; main is the default')
    module = importlib.import_module(name)
    if not all(hasattr(module, function) for function in ('parse_args', 'main')) or name == Path(__file__).stem:
        raise refusal(f'--program {name}: has no parse_args and main, and so can\'t be run')
    if "__name__ == '__main__'" not in path.read_text():
        raise refusal(f'--program {name}: does nothing when it is run (it has no if __name__ == \'__main__\')')
    return module


def parse_args(argv: list) -> Tuple[argparse.Namespace, list]:
    """Parse the command line and refuse what can't work before a job waits for hours to find out.

    Returns:
        The flags of the job and those that every program has, and the program's words of the command line.

    Raises:
        InputError: a flag, of the program or of the job, can't be used.
    """
    from run import flags
    from run.commandline import Parser
    job_parser = get_args_parser()
    args, program_argv = job_parser.parse_known_args(argv)
    program = load_program(args.program)
    if args.help:
        print(job_parser.format_help())
        program.parse_args(['--help'])
    shared = Parser(add_help=False)
    for add_flags in (flags.add_run_flags, flags.add_checkpoint_flags, flags.add_loader_flags):
        add_flags(shared)
    shared.add_argument('--eval', action='store_true')
    shared.parse_known_args(program_argv, args)

    kind = 'cuda' if args.ngpus else 'cpu'
    if args.device not in ('auto', kind):
        raise refusal(f'--device {args.device}: with --ngpus {args.ngpus} it is {kind}')
    if args.ngpus and args.tasks_per_node not in (None, args.ngpus):
        raise refusal(f'--tasks-per-node {args.tasks_per_node}: each of --ngpus {args.ngpus} has its process')
    if args.use_volta32:
        if args.constraint not in (None, 'volta32gb'):
            raise refusal(f'--use-volta32: means --constraint volta32gb, not {args.constraint}')
        args.constraint = 'volta32gb'
    if '%' in args.job_dir.replace('%j', '') or '%' in args.output_dir.replace('%j', ''):
        raise refusal(f'--job-dir {args.job_dir}: of the marks with % only %j is allowed')
    if args.dry_run and args.cluster == 'local':
        raise refusal('--dry-run: prints the script for SLURM, which --cluster local doesn\'t use')
    args.job_dir = str(Path(args.job_dir).absolute())
    parent = next(path for path in Path(args.job_dir).parents if path.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise refusal(f'--job-dir {args.job_dir}: {parent} is not a directory that can be written to')
    args.tasks_per_node = args.ngpus or args.tasks_per_node or 1
    args.cpus_per_task = args.cpus_per_task or max(1, args.num_workers)
    args.output_dir = str(Path(args.output_dir or args.job_dir).absolute())
    # The job's nodes have the GPUs; this machine need not
    unchecked = ['--device', 'cpu', *(['--amp', 'off'] if args.ngpus else [])]
    program.parse_args([*program_argv, '--output-dir', args.output_dir, *unchecked])
    check_checkpoint(args)
    return args, [*program_argv, '--device', kind]


def check_checkpoint(args):
    """Refuse a directory with a checkpoint that isn't to be continued: a requeued job couldn't tell it from its own."""
    output_dir = Path(args.output_dir).resolve()
    continued = args.resume == 'auto' or (args.resume and Path(args.resume).resolve().parent == output_dir)
    if has_checkpoint(output_dir) and not continued and not args.eval:
        raise refusal(f'--output-dir {args.output_dir}: holds the checkpoint of another run; to continue that, add '
                      f'--resume auto')


# ---------------------------------------------------------------------------------------------------------------------
# Submission

def signal_delay(args) -> int:
    """Seconds before the time limit at which the job is told to stop."""
    return min(120, 60 * args.timeout // 4)


def make_task(args, program_argv: list, output_dir: str, argv: list) -> Task:
    gpus = os.environ.get('CUDA_VISIBLE_DEVICES') if args.ngpus else ''
    environment = {'OMP_NUM_THREADS': os.environ.get('OMP_NUM_THREADS', str(args.cpus_per_task))}
    if args.cluster == 'local':
        environment['CUDA_VISIBLE_DEVICES'] = gpus  # submitit would set it to 0, 1, ...
    return Task(program_argv, output_dir, patience_s=.75 * signal_delay(args), resumes=not args.eval,
                environment=environment, program=args.program,
                submission=shlex.join(['python', __file__, *argv]))


def slurm_parameters(args) -> dict:
    """The request, in submitit's words for SLURM."""
    # srun doesn't take --cpus-per-task over from sbatch since SLURM 22.05
    words = go_on_path(JobPaths(args.job_dir).folder, '%j')
    words = '"$SLURM_JOB_ID"'.join(shlex.quote(part) for part in str(words).split('%j'))
    say_how_to_go_on = f'at_end() {{ [ ! -e {words} ] || echo "$(<{words})"; }}; trap at_end EXIT'
    srun_args = [f'--cpus-per-task={args.cpus_per_task}', '--kill-on-bad-exit=1']
    return dict(
        job_name='xcit' if args.program == 'main' else args.program, nodes=args.nodes,
        ntasks_per_node=args.tasks_per_node, cpus_per_task=args.cpus_per_task, gpus_per_node=args.ngpus or None,
        mem=f'{round(args.mem_gb * 1024)}M' if args.mem_gb else None, time=args.timeout,
        signal_delay_s=signal_delay(args), partition=args.partition, constraint=args.constraint,
        account=args.account, qos=args.qos, comment=args.comment, exclude=args.exclude, wckey=None, srun_args=srun_args,
        setup=[f'export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}', *args.setup,
               say_how_to_go_on],
        stderr_to_stdout=True, additional_parameters={'requeue': True})


def sbatch_script(args) -> str:
    """The script that would be submitted; SLURM need not be installed."""
    folder = JobPaths(args.job_dir).folder
    command = f'{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}'
    return slurm._make_sbatch_string(command=command, folder=folder, **slurm_parameters(args))


def rank_command(args, program_argv: list) -> str:
    """What each process of the job runs."""
    return shlex.join(['python', *program_words(args.program), *program_argv, '--output-dir', args.output_dir])


class SlurmExecutor(submitit.SlurmExecutor):
    """submitit's, without the files that it leaves beside the jobs' directories."""

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        parent = JobPaths.get_first_id_independent_folder(self.folder)
        self.temporary = parent / f'.submission_file_{uid}.sh'
        return super()._make_submission_file_text(command, uid)

    def _submit_command(self, command: str):
        try:
            return super()._submit_command(command)
        finally:
            self.temporary.unlink(missing_ok=True)


def submit_to_slurm(args, task: Task) -> submitit.Job:
    """Raises InputError with SLURM's words where the cluster can't meet the request."""
    folder = JobPaths.get_first_id_independent_folder(args.job_dir)
    before = set(folder.glob('*.pkl'))
    executor = SlurmExecutor(args.job_dir, max_num_timeout=args.max_restarts)
    executor.update_parameters(**slurm_parameters(args))
    try:
        with outside_any_job(), contextlib.redirect_stderr(io.StringIO()):  # stderr: it gets what the error says too
            job = executor.submit(task)
    except FailedJobError as error:
        for path in set(folder.glob('*.pkl')) - before:
            with contextlib.suppress(FileNotFoundError):  # that of a job submitted at the same time, now in its place
                if submitit.helpers.DelayedSubmission.load(path).function == task:
                    path.unlink()
        show_cluster()
        lines = [line.removeprefix('sbatch: ').removeprefix('error: ') for line in str(error).splitlines()]
        raise refusal(f'SLURM refuses the job: {"; ".join(line for line in lines if line)}') from None
    refuse_if_never_starts(job, seconds=10)
    return job


@contextlib.contextmanager
def outside_any_job():
    """Where a job submits another one: hide what that would inherit, except where the cluster is found."""
    if 'SLURM_JOB_ID' not in os.environ:
        yield
        return
    conf = {name: value for name, value in os.environ.items() if name == 'SLURM_CONF'}
    with submitit.helpers.clean_env():
        os.environ.update(conf)
        yield


def refuse_if_never_starts(job: submitit.Job, seconds: float = 0):
    """Cancel a job of which SLURM says, within some seconds of having accepted it, that it will not start."""
    deadline, looks = time.monotonic() + seconds, 0
    while looks < 2:  # the first reason can be a rough one, which the scheduler replaces
        state, reason = slurm_status(job.job_id) or ('', '')
        if state == 'PENDING' and NEVER_STARTS.fullmatch(reason):
            looks += 1
            time.sleep(1 if looks == 1 else 0)
        elif state not in ('', 'PENDING') or reason not in ('', 'None') or time.monotonic() >= deadline:
            return
        else:
            time.sleep(.3)
    job.cancel()
    if not job.paths.stdout.exists():
        for path in (job.paths.submitted_pickle, job.paths.submission_file):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # holds other files
            job.paths.folder.rmdir()
    show_cluster()
    raise refusal(f'SLURM would never start job {job.job_id}, which is cancelled; its reason: {reason}')


@contextlib.contextmanager
def detached():
    """What is started here outlives this program and its terminal, and doesn't hold its output open."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(fd) for fd in range(3)]
    nowhere = os.open(os.devnull, os.O_RDWR)
    handlers = {signum: signal.signal(signum, signal.SIG_IGN) for signum in (signal.SIGINT, signal.SIGHUP)}
    try:
        for fd in range(3):
            os.dup2(nowhere, fd)
        yield
    finally:
        for fd, copy in enumerate(kept):
            os.dup2(copy, fd)
            os.close(copy)
        os.close(nowhere)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def submit_locally(args, task: Task) -> submitit.Job:
    """Start the job as processes of this machine, as many as it would have on all its nodes."""
    import torch
    processes = args.nodes * args.tasks_per_node
    if args.ngpus and torch.cuda.device_count() < processes:
        raise refusal(f'--nodes {args.nodes} --ngpus {args.ngpus}: no SLURM cluster is used, and this machine has '
                      f'{torch.cuda.device_count()} GPU(s); --ngpus 0 trains on CPUs')
    # submitit would run the lines in front of the program that starts the processes, and could then lose its id
    python = ['bash', '-c', '\n'.join([*args.setup, 'exec "$0" "$@"']), sys.executable]
    executor = submitit.LocalExecutor(args.job_dir, max_num_timeout=min(args.max_restarts, LOCAL_RESTARTS),
                                      python=shlex.join(python))
    executor.update_parameters(tasks_per_node=processes, timeout_min=args.timeout, signal_delay_s=signal_delay(args),
                               stderr_to_stdout=True)
    before = os.environ.get('PYTHONPATH')
    os.environ['PYTHONPATH'] = f'{ROOT}{os.pathsep}{before}' if before else str(ROOT)
    try:
        with detached():
            return executor.submit(task)
    finally:
        os.environ.pop('PYTHONPATH') if before is None else os.environ.update(PYTHONPATH=before)


# ---------------------------------------------------------------------------------------------------------------------
# Following a job

class Log:
    """The main rank's log, printed as it grows."""

    def __init__(self, path: Path):
        self.path, self.file = path, None

    def show(self):
        if self.file is None and self.path.exists():
            self.file = open(self.path, errors='replace')
        if self.file is not None:
            sys.stdout.write(self.file.read())
            sys.stdout.flush()


def follow_slurm(job: submitit.Job) -> int:
    """Print the job's log until the job ends; returns its exit code.

    submitit's own `wait` asks sacct alone, and waits for ever where there is no accounting database.
    """
    log, started, shown, lost = Log(job.paths.stdout), time.monotonic(), None, 0
    while True:
        state, reason = slurm_status(job.job_id) or ('', '')
        if state in ENDED:
            break
        lost = 0 if state else lost + 1
        if lost > 3 and 'Invalid job id' in slurm_query('squeue', f'--jobs={job.job_id}')[1]:
            state = 'forgotten by SLURM'
            break
        if state == 'PENDING':
            refuse_if_never_starts(job)
            if reason != 'None' and reason != shown:
                say(f'Job {job.job_id} waits: {reason}')
            shown = reason
        # A cluster with thousands of jobs should not be asked each second for days
        for _ in range(min(30, 1 + int(time.monotonic() - started) // 60)):
            log.show()
            time.sleep(1)
    log.show()
    if state == 'forgotten by SLURM':
        code = 0 if has_succeeded(job) else 1
    else:
        code = slurm_exit_code(job.job_id)
    return report_end(job, state, code)


def follow_locally(job: submitit.Job) -> int:
    """Print the job's log until its processes have ended; returns its exit code. Ctrl-C stops the job."""
    log, interrupts = Log(job.paths.stdout), []
    # Not KeyboardInterrupt, which would break off whatever is being done, or be lost in it.
    handler = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
    try:
        while not job.done():
            log.show()
            if interrupts:
                interrupts.clear()
                say(f'Stopping job {job.job_id}')
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(int(job.job_id), signal.SIGTERM)
            time.sleep(POLL_S)
    finally:
        signal.signal(signal.SIGINT, handler)
    log.show()
    succeeded = all(has_succeeded(job.task(rank)) for rank in range(job.num_tasks))
    return report_end(job, 'COMPLETED' if succeeded else 'FAILED', 0 if succeeded else 1)


def has_succeeded(task: submitit.Job) -> bool:
    """Whether a process of a job has left a result that is no error."""
    try:
        outcome, _ = submitit.core.utils.pickle_load(task.paths.result_pickle)
    except FileNotFoundError:
        return False
    return outcome == 'success'


def report_end(job: submitit.Job, state: str, code: int) -> int:
    """Say how a job ended, with the end of the log of the rank that failed; returns its exit code."""
    say(f'Job {job.job_id}: {state}')
    failure = failure_path(job.paths.folder, job.job_id)
    if code == 0:
        return 0
    if failure.exists():
        failure = json.loads(failure.read_text())
        code, path = failure['code'], job.task(failure['rank']).paths.stdout
        if failure['rank'] > 0 and path.exists():
            say(f'The end of {path}:\n' + '\n'.join(path.read_text(errors='replace').splitlines()[-40:]))
    elif not job.paths.stdout.exists():
        say(f'It wrote no log: {job.paths.folder} must be on a file system that all nodes share')
    say(f'Exit code {code}')
    return code


# ---------------------------------------------------------------------------------------------------------------------

def choose_cluster(wanted: str) -> str:
    """Raises InputError where SLURM is asked for and no cluster answers."""
    if wanted == 'local':
        return 'local'
    answers, words = slurm_query('sinfo', '--noheader', '--format=%P')
    if answers:
        return 'slurm'
    if wanted == 'slurm':
        raise refusal(f'--cluster slurm: no cluster answers ({"; ".join(words.splitlines())})')
    say(f'No SLURM cluster answers ({"; ".join(words.splitlines())}): the job runs on this machine')
    return 'local'


def main(argv: Optional[list] = None) -> int:
    """Submit with a command line (`sys.argv` if None), given as a list of words.

    Returns:
        0, or the job's exit code with --wait.

    Raises:
        InputError: the arguments can't be used, or the cluster can't meet the request.
    """
    argv = sys.argv[1:] if argv is None else argv
    args, program_argv = parse_args(argv)
    if args.dry_run:
        print(f'{sbatch_script(args)}\n# Each process runs: {rank_command(args, program_argv)}')
        return 0
    args.cluster = choose_cluster(args.cluster)
    if args.cluster == 'local':
        # A process's id comes round again, and with it another job's directory
        name = f'local-{time.strftime("%Y%m%d-%H%M%S")}-{os.getpid()}'
        args.job_dir, args.output_dir = (path.replace('%j', name) for path in (args.job_dir, args.output_dir))
    task = make_task(args, program_argv, args.output_dir, argv)
    job = submit_to_slurm(args, task) if args.cluster == 'slurm' else submit_locally(args, task)
    stop = f'scancel {job.job_id}' if args.cluster == 'slurm' else f'kill {job.job_id}'
    log = job.task(0).paths.stdout
    say(f'Job {job.job_id} ({args.nodes} x {args.tasks_per_node} processes'
        f'{"" if args.cluster == "slurm" else ", on this machine"})\n'
        f'  results: {args.output_dir.replace("%j", job.job_id)}\n'
        f'  logs:    {job.paths.folder}/{job.job_id}_RANK_log.out\n'
        f'  follow:  {shlex.join(["tail", "-n", "+1", "-F", str(log)])}\n'
        f'  stop:    {stop}')
    if not args.wait:
        return 0
    try:
        return follow_slurm(job) if args.cluster == 'slurm' else follow_locally(job)
    except KeyboardInterrupt:
        say(f'Job {job.job_id} goes on; {stop} ends it')
        return 128 + signal.SIGINT


if __name__ == '__main__':
    # By its name, under which the job's processes, too, find what is submitted
    import run_with_submitit
    from run.commandline import run_program
    run_program(lambda: sys.exit(run_with_submitit.main()))
