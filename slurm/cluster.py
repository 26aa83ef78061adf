"""Queries of the cluster by the commands of SLURM."""
import re
import subprocess
import sys
from typing import Tuple

QUERY_TIMEOUT_S = 20
# Reasons in squeue for which a pending job stays pending for ever
NEVER_STARTS = re.compile(
    r'Partition(Config|NodeLimit|TimeLimit)|BadConstraints|DependencyNeverSatisfied|MaxMemPerLimit|QOSMin\w+'
    r'|(Account|QOS)NotAllowed|Invalid(Account|QOS)|(Assoc|QOS)\w*Max\w+PerJob\w*|JobHoldMaxRequeue|.*requeued.held')
ENDED = ('COMPLETED', 'FAILED', 'CANCELLED', 'TIMEOUT', 'NODE_FAIL', 'OUT_OF_MEMORY', 'BOOT_FAIL', 'DEADLINE',
         'PREEMPTED')


def query(*command: str) -> Tuple[bool, str]:
    """Run a SLURM command; return whether the command succeeded, and its stdout (stderr if the command failed)."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S)
    except FileNotFoundError:
        return False, f'{command[0]} is not installed'
    except subprocess.TimeoutExpired:
        return False, f'{command[0]}: timeout after {QUERY_TIMEOUT_S} s'
    return result.returncode == 0, (result.stdout if result.returncode == 0 else result.stderr).strip()


def job_state(job_id: str) -> Tuple[str, str]:
    """Return (state, reason) of a job, also for some minutes after its end; ('', '') if there is no answer."""
    # squeue needs no accounting database, unlike sacct
    succeeded, output = query('squeue', '--noheader', '--states=all', f'--jobs={job_id}', '--format=%T|%r')
    return tuple(output.split('|', 1)) if succeeded and output else ('', '')


def job_exit_code(job_id: str) -> int:
    """Return the exit code of an ended job; never 0 for a job that did not complete."""
    _, output = query('scontrol', 'show', 'job', '--oneliner', job_id)
    match = re.search(r' ExitCode=(\d+):(\d+)', output)
    code, signum = map(int, match.groups()) if match else (0, 0)
    return 0 if ' JobState=COMPLETED ' in output else code or (128 + signum if signum else 1)


def print_resources():
    """Print partitions, nodes, memory and GPUs of the cluster on stderr."""
    _, output = query('sinfo', '--format=%18P %.6a %.12l %.6D %.5c %.9m %14G %20f %t')
    print(f'Resources of the cluster (MEMORY in MB per node, GRES: GPUs):\n{output}', file=sys.stderr)
