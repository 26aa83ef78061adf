"""CPU settings: the log of busy cores, and the allocator."""
import os
import platform
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from run import cpu, session


def log_of_session(capsys) -> str:
    with session.joined('cpu'):
        return capsys.readouterr().out


@pytest.fixture
def four_threads(monkeypatch):
    """Four cores and threads, of which `load` is the load of other programs."""
    def with_load(load: float, busy: float) -> list:
        monkeypatch.setattr(os, 'getloadavg', lambda: (load, 0., 0.))
        monkeypatch.setattr(cpu, 'busy_cores', lambda: busy)
        return chosen

    chosen = []
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 4)
    monkeypatch.setattr(torch, 'set_num_threads', chosen.append)
    monkeypatch.setattr(cpu, 'allowed_cores', lambda: 4)
    return with_load


@pytest.mark.parametrize(('load', 'busy', 'threads'), [(8., 4., 1), (2.5, 3., 2), (1., 1.2, 3), (8., None, 1)])
def test_threads_are_lowered_to_the_free_cores(four_threads, capsys, load, busy, threads):
    """With other programs on the cores, a program lowers its threads and logs the load."""
    chosen = four_threads(load, busy)
    used = load if busy is None else min(load, busy)
    assert log_of_session(capsys) == (f'Other programs use {used:.1f} of 4 cores: {threads} instead of 4 threads; '
                                      '--threads or OMP_NUM_THREADS sets another number\n')
    assert chosen == [threads]


def test_a_given_number_of_threads_is_used(four_threads, capsys):
    """--threads decides, whatever the load is; a measurement only warns."""
    chosen = four_threads(8., 4.)
    with session.joined('cpu', threads=3):
        assert (chosen, capsys.readouterr().out) == ([3], '')
    cpu.set_threads(only_warns=True)
    assert (chosen, capsys.readouterr().out) == ([3], 'Warning: Other programs use 4.0 of 4 cores: times are too '
                                                 'long; 4 threads\n')


def test_cores_that_are_busy_are_measured(monkeypatch):
    """The measured load is a number of cores between none and all."""
    monkeypatch.setattr(cpu, 'WAIT_S', .05)
    busy = cpu.busy_cores()
    assert busy is None or 0 <= busy <= cpu.usable_cores()


def no_load():
    raise OSError


@pytest.mark.parametrize('case', ['free', 'an earlier run', 'set', 'no load'])
def test_load_that_changes_nothing(four_threads, monkeypatch, capsys, case):
    """Threads stay with free cores, after a load that has ended, with OMP_NUM_THREADS, or without a known load."""
    chosen = four_threads(.4 if case == 'free' else 8., .1 if case == 'an earlier run' else 4.)
    if case == 'set':
        monkeypatch.setenv('OMP_NUM_THREADS', '4')
    elif case == 'no load':
        monkeypatch.setattr(os, 'getloadavg', no_load)
    assert chosen == []
    assert log_of_session(capsys) == ''


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='other C libraries have other allocators')
def test_freed_memory_is_reused():
    """A tensor reuses the pages of a freed one, instead of getting new pages from the system."""
    code = """if True:
        import resource
        import torch
        from run import cpu
        cpu.keep_freed_memory()
        for step in range(30):
            if step == 10:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.empty(2 ** 24).fill_(1.)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    pages = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert int(pages) < 5 * 16384  # of 20 * 16384
