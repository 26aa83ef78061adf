"""Real processes that run a command together, and their output.

They are forked from a server that has imported the libraries: the imports take longer than most tests.
"""
import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import types
from pathlib import Path

ROOT = Path(__file__).parent.parent  # not from conftest, which started programs can't import
SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(['torch', 'torchvision', 'timm', 'torch.utils.tensorboard'])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


class Started:
    """`python COMMAND` as a process, with the methods of subprocess.Popen that the tests need.

    Args:
        command: a script, or -c and code, and arguments.
        environment: all environment variables.
    """

    def __init__(self, command: list, environment: dict):
        self.out, self.err = (tempfile.NamedTemporaryFile('r') for _ in range(2))
        self.process = SERVER.Process(target=run_command, args=(command, environment, self.out.name, self.err.name))
        self.process.start()

    def poll(self):
        return self.process.exitcode

    def send_signal(self, signum: int):
        if self.poll() is None:
            os.kill(self.process.pid, signum)

    def finish(self, timeout: float) -> tuple:
        """Return exit code, stdout and stderr."""
        self.process.join(timeout)
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)
            raise subprocess.TimeoutExpired('python', timeout, self.out.read(), self.err.read())
        return self.poll(), self.out.read(), self.err.read()


def run_command(command: list, environment: dict, out: str, err: str):
    """Run a command in a forked process as if a shell had started it."""
    multiprocessing.set_start_method(None, force=True)  # back to Python's default
    for name, stream in ((out, sys.stdout), (err, sys.stderr)):
        with open(name, 'w') as file:
            os.dup2(file.fileno(), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    import small_model  # noqa: F401  as conftest.py does
    first, *sys.argv = command
    libraries = [path for path in sys.path if path and not Path(path).is_relative_to(ROOT)]
    try:
        if first == '-c':
            code, sys.argv[0] = sys.argv[0], '-c'
            sys.path[:] = ['', *environment['PYTHONPATH'].split(os.pathsep), *libraries]
            module = sys.modules['__main__'] = types.ModuleType('__main__')
            exec(code, vars(module))
        else:
            sys.argv.insert(0, first)
            sys.path[:] = [os.path.dirname(first), *environment['PYTHONPATH'].split(os.pathsep), *libraries]
            runpy.run_path(first, run_name='__main__')
    finally:
        atexit._run_exitfuncs()


def torch_variables(rank: int, world: int, port: int) -> dict:
    """Return the variables that torchrun sets."""
    return {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(world), 'MASTER_ADDR': '127.0.0.1',
            'MASTER_PORT': str(port)}


def start(command: list, world: int, variables=torch_variables) -> list:
    """Start the processes of ranks 0 to world - 1, each with the variables of a launcher."""
    common, port = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}, free_port()
    return [Started(list(map(str, command)), {**common, **variables(rank, world, port)}) for rank in range(world)]


def finish(processes: list, *, timeout: float = 120) -> list:
    """Return (exit code, stdout, stderr) of each process."""
    return [process.finish(timeout) for process in processes]


def run(command: list, world: int) -> list:
    """Run a command that succeeds, and return the standard outputs of all ranks."""
    results = finish(start(command, world))
    assert [code for code, _, _ in results] == [0] * world, results
    return [out for _, out, _ in results]
