"""Submission of main.py, or of another program, to a SLURM cluster or as several processes of this machine.

The command line contains the flags of the program and of the job. At the time limit and on preemption the job stores
its state, is requeued and resumes.
"""
import argparse
import importlib
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Optional, Tuple

import datasets
from loaders import readers
from run import flags
from run.commandline import COUNT, COUNT_OR_0, PATH, PATH_OBJECT, POSITIVE, Parser, UnknownFlags, run_program
from run.folder import check_output_dir
from slurm import cluster, following, submission
from slurm.job import ROOT, Task, has_checkpoint, python_arguments
from utils import InputError, dashed


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the job's flags; the program has its own parser."""
    parser = Parser(Path(__file__).name, usage='%(prog)s [flags of the job] [flags of the program]', add_help=False,
                    description=__doc__, example='--nodes 2 --ngpus 8 --partition NAME --model xcit_small_12_p16\n'
                    '--batch-size 64 --drop-path 0.05 --data-path imagenet')
    group = parser.add_argument_group('job')
    group.add_argument('-h', '--help', action='store_true', help='flags of the job and of the program')
    group.add_argument('--program', default='main', metavar='MODULE',
                       help='module of the program, with functions parse_args and main, e.g. dino.train')
    group.add_argument('--cluster', default='auto', choices=['auto', 'slurm', 'local'],
                       help='SLURM, or processes of this machine (local); auto: slurm if sinfo finds a cluster')
    group.add_argument('--nodes', default=2, type=COUNT, metavar='N', help='number of nodes')
    group.add_argument('--ngpus', default=8, type=COUNT_OR_0, metavar='N',
                       help='GPUs per node, one process each; 0: processes on CPUs')
    group.add_argument('--tasks-per-node', type=COUNT, metavar='N', help='processes per node without GPUs; 1 if unset')
    group.add_argument('--cpus-per-task', type=COUNT, metavar='N', help='CPU cores per process; --num-workers if unset')
    group.add_argument('--mem-gb', type=POSITIVE, metavar='GB', help='memory per node; the cluster\'s default if unset')
    group.add_argument('--timeout', default=2800, type=COUNT, metavar='MINUTES',
                       help='time limit, at which the job stores its state and is requeued')
    group.add_argument('--max-restarts', default=20, type=COUNT_OR_0, metavar='N',
                       help='maximum number of requeues at the time limit (local: at most '
                       f'{submission.LOCAL_RESTARTS}); includes preemptions if the limit is 10 minutes or less')
    group.add_argument('--job-dir', default='./runs/%j', type=PATH, metavar='DIR',
                       help='folder of the logs and, without --output-dir, of the results; must be on a file system '
                       'that all nodes share; %%j is the job\'s id')
    group.add_argument('--partition', metavar='NAME', help='partition; the cluster\'s default if unset')
    group.add_argument('--constraint', metavar='FEATURES', help='required features of the nodes')
    group.add_argument('--use-volta32', action='store_true', help='short form of --constraint volta32gb')
    group.add_argument('--account', metavar='NAME', help='account to charge')
    group.add_argument('--qos', metavar='NAME', help='quality of service')
    group.add_argument('--comment', metavar='TEXT', help='comment, e.g. a reason for the priority of the job')
    group.add_argument('--exclude', metavar='NODES', help='nodes to avoid, separated by commas')
    group.add_argument('--setup', default=[], action='append', metavar='LINE',
                       help='shell command to run before the program, e.g. "module load cuda"; can be repeated')
    group.add_argument('--wait', action='store_true', help='log printed until the job ends, and the job\'s exit code')
    group.add_argument('--dry-run', action='store_true', help='sbatch script printed instead of submitted')
    return parser


def load_program(name: str):
    """Import the module of a program; raise InputError if the module does not exist, or is not a program."""
    path = ROOT.joinpath(*name.split('.')).with_suffix('.py')
    if not all(part.isidentifier() for part in name.split('.')) or not path.is_file():
        raise InputError(f'--program {name}: no such module in {ROOT}; the default is main')
    module = importlib.import_module(name)
    if not all(hasattr(module, function) for function in ('parse_args', 'main')) or name == Path(__file__).stem:
        raise InputError(f'--program {name}: must have the functions parse_args and main')
    if "__name__ == '__main__'" not in path.read_text():
        raise InputError(f'--program {name}: must have a block "if __name__ == \'__main__\'"')
    return module


def parse_args(argv: list) -> Tuple[argparse.Namespace, list]:
    """Parse the command line, and raise InputError for invalid flags before the job waits in a queue.

    Returns:
        The flags of the job and the flags that all programs share; the command line of the program.
    """
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
    flags.add_data_path_flag(shared)
    shared.parse_known_args(program_argv, args)

    device = 'cuda' if args.ngpus else 'cpu'
    check_job_flags(args, device)
    args.job_dir = str(Path(args.job_dir).absolute())
    args.constraint = 'volta32gb' if args.use_volta32 else args.constraint
    args.tasks_per_node = args.ngpus or args.tasks_per_node or 1
    args.cpus_per_task = args.cpus_per_task or max(1, args.num_workers)
    args.output_dir = str(Path(args.output_dir or args.job_dir).absolute())
    check_checkpoint(args)
    # This machine may lack the GPUs of the nodes
    unchecked = ['--device', 'cpu', *(['--amp', 'off'] if args.ngpus else [])]
    try:
        parsed = program.parse_args([*program_argv, '--output-dir', args.output_dir, *unchecked])
    except UnknownFlags as error:  # perhaps a flag of the job
        raise UnknownFlags(error.flags, error.known + job_parser.known_options(argv)) from None
    check_data(vars(parsed))
    parser = program.get_args_parser() if hasattr(program, 'get_args_parser') else shared
    return args, [*with_absolute_paths(program_argv, parser, vars(parsed)), '--device', device]


def with_absolute_paths(argv: list, parser: Parser, values: dict) -> list:
    """Return the command line of a program with absolute paths: the job may start in another folder.

    Args:
        values: parsed flags by destination; relative paths in the files of --config are appended.
    """
    actions = {option.replace('_', '-'): action for action in parser._actions for option in action.option_strings
               if action.type in (PATH, PATH_OBJECT)}
    changed, given = list(argv), {'output_dir'}
    for i, word in enumerate(argv):
        name, equals, value = word.partition('=')
        action = actions.get(name.replace('_', '-'))
        if action is None or not (equals or i + 1 < len(argv)):
            continue
        given.add(action.dest)
        if equals:
            changed[i] = f'{name}={absolute(value, action)}'
        else:
            changed[i + 1] = absolute(argv[i + 1], action)
    for action in dict.fromkeys(actions.values()):
        value = values.get(action.dest)
        if action.dest not in given and value and value != parser.get_default(action.dest):
            path = absolute(str(value), action)
            changed += [action.option_strings[-1], path] if path != str(value) else []
            given.add(action.dest)
    return changed


def absolute(value: str, action: argparse.Action) -> str:
    """Return the value of a path's flag as an absolute path; a URL, a name of weights and `auto` stay."""
    path, alternatives = PATH(value), str(action.metavar).split('|')
    is_name = len(alternatives) > 1 and (value in alternatives or not Path(path).exists())
    is_address = path.startswith(('http://', 'https://', 'file://', 'hf-hub:'))
    return value if not value or is_name or is_address else str(Path(path).absolute())


def check_data(values: dict):
    """Raise InputError if the data of a program, whose flags are `values`, do not exist; warn of a default."""
    files = {name: values[name] for name in ('train_features', 'val_features') if values.get(name)}
    for name, path in files.items():
        if not Path(path).is_file():
            raise InputError(f'{dashed(name)} {path}: no such file')
    folders = {'knn_data_path': values.get('knn_data_path'), 'data_path': None if files else values.get('data_path')}
    if values.get('data_set') == datasets.SAMPLE or readers.prefix_of(values.get('data_set') or ''):
        del folders['data_path']
    for name, path in folders.items():
        if path is not None and not Path(path).is_dir():
            error = datasets.no_directory(dashed(name), path)
            if path not in datasets.DEFAULT_PATHS:
                raise error
            print(f'Warning: {error}', file=sys.stderr, flush=True)


def check_job_flags(args, device: str):
    """Raise InputError for conflicting flags of the job, and for a --job-dir that can't be created."""
    if args.device not in ('auto', device):
        raise InputError(f'--device {args.device}: must be {device} or auto with --ngpus {args.ngpus}')
    if args.ngpus and args.tasks_per_node not in (None, args.ngpus):
        raise InputError(f'--tasks-per-node {args.tasks_per_node}: must be {args.ngpus} or unset with --ngpus '
                         f'{args.ngpus}, one process per GPU')
    if args.use_volta32 and args.constraint not in (None, 'volta32gb'):
        raise InputError(f'--use-volta32: conflicts with --constraint {args.constraint}; must be volta32gb or unset')
    for flag, path in (('--job-dir', args.job_dir), ('--output-dir', args.output_dir)):
        if '%' in path.replace('%j', ''):
            raise InputError(f'{flag} {path}: %j is the only allowed use of %')
    if args.dry_run and args.cluster == 'local':
        raise InputError('--dry-run: prints the script for SLURM, which --cluster local does not use')
    check_output_dir(args.job_dir, '--job-dir')


def check_checkpoint(args):
    """Raise InputError if --output-dir contains a checkpoint of another run, from which a requeued job would resume."""
    output_dir = Path(args.output_dir).resolve()
    resumes = args.resume == 'auto' or (args.resume and Path(args.resume).resolve().parent == output_dir)
    if has_checkpoint(output_dir) and not resumes and not args.eval:
        raise InputError(f'--output-dir {args.output_dir}: contains the checkpoint of another run; to resume that run, '
                         f'add --resume auto')


def choose_cluster(name: str) -> str:
    """Return `slurm` or `local`; raise InputError for --cluster slurm without a cluster."""
    if name == 'local':
        return 'local'
    succeeded, output = cluster.query('sinfo', '--noheader', '--format=%P')
    if succeeded:
        return 'slurm'
    reason = '; '.join(output.splitlines())
    if name == 'slurm':
        raise InputError(f'--cluster slurm: no cluster available ({reason})')
    print(f'No SLURM cluster available ({reason}): the job runs on this machine', flush=True)
    return 'local'


def build_request(args, job_dir: str) -> submission.Request:
    """Return the resources and settings of the job."""
    return submission.Request(
        name='xcit' if args.program == 'main' else args.program, job_dir=job_dir, nodes=args.nodes,
        tasks_per_node=args.tasks_per_node, cpus_per_task=args.cpus_per_task, gpus_per_node=args.ngpus,
        mem_gb=args.mem_gb, timeout_min=args.timeout, max_restarts=args.max_restarts, setup=args.setup,
        options=dict(partition=args.partition, constraint=args.constraint, account=args.account, qos=args.qos,
                     comment=args.comment, exclude=args.exclude))


def main(argv: Optional[list] = None) -> int:
    """Submit the job of a command line (`sys.argv` if None); return 0, or with --wait the exit code of the job.

    Raises:
        InputError: a flag is invalid, or the cluster can't meet the request.
    """
    argv = sys.argv[1:] if argv is None else argv
    args, program_argv = parse_args(argv)
    if args.dry_run:
        command = ['python', *python_arguments(args.program), *program_argv, '--output-dir', args.output_dir]
        print(f'{submission.sbatch_script(build_request(args, args.job_dir))}\n'
              f'# Each process runs: {shlex.join(command)}')
        return 0
    local = choose_cluster(args.cluster) == 'local'
    # With the time, because process ids are reused
    name = f'local-{time.strftime("%Y%m%d-%H%M%S")}-{os.getpid()}' if local else '%j'
    job_dir, output_dir = (path.replace('%j', name) for path in (args.job_dir, args.output_dir))
    request = build_request(args, job_dir)
    environment = {'OMP_NUM_THREADS': os.environ.get('OMP_NUM_THREADS', str(args.cpus_per_task))}
    if local:  # submitit would set the variable to 0, 1, ...
        environment['CUDA_VISIBLE_DEVICES'] = os.environ.get('CUDA_VISIBLE_DEVICES') if args.ngpus else ''
    task = Task(args.program, program_argv, output_dir, stop_timeout_s=.75 * request.signal_delay_s,
                resumes=not args.eval, environment=environment, submission=shlex.join(['python', __file__, *argv]))
    job = submission.submit_locally(request, task) if local else submission.submit_to_slurm(request, task)
    stop = f'kill {job.job_id}' if local else f'scancel {job.job_id}'
    print(f'Job {job.job_id} ({args.nodes} x {args.tasks_per_node} processes{", on this machine" if local else ""})\n'
          f'  results: {output_dir.replace("%j", job.job_id)}\n'
          f'  logs:    {job.paths.folder}/{job.job_id}_RANK_log.out\n'
          f'  follow:  {shlex.join(["tail", "-n", "+1", "-F", str(job.task(0).paths.stdout)])}\n'
          f'  stop:    {stop}', flush=True)
    if not args.wait:
        return 0
    try:
        return following.follow_locally(job) if local else following.follow_slurm(job)
    except KeyboardInterrupt:
        print(f'Job {job.job_id} keeps running; to stop the job: {stop}', flush=True)
        return 128 + signal.SIGINT


if __name__ == '__main__':
    run_program(lambda: sys.exit(main()))
