"""Start a command as one or several real processes that find each other, and collect what they print."""
import os
import socket
import subprocess
import sys

from conftest import ROOT


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def start(command: list, world: int) -> list:
    """The processes of ranks 0 to world - 1 that run `command`, each with its environment."""
    common = {**os.environ, 'WORLD_SIZE': str(world), 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port()),
              'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    return [subprocess.Popen([sys.executable, *map(str, command)], text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, env={**common, 'RANK': str(rank), 'LOCAL_RANK': str(rank)})
            for rank in range(world)]


def finish(processes: list, *, timeout: float = 120) -> list:
    """(exit code, stdout, stderr) of each."""
    results = [(*process.communicate(timeout=timeout), process.returncode) for process in processes]
    return [(code, out, err) for out, err, code in results]


def run(command: list, world: int) -> list:
    """Standard outputs of all ranks of a command that succeeds."""
    results = finish(start(command, world))
    assert [code for code, _, _ in results] == [0] * world, results
    return [out for _, out, _ in results]
