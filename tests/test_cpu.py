"""CPU settings: the log of busy cores, and the allocator."""
import os
import platform
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from run import session


def log_of_session(capsys) -> str:
    with session.joined('cpu'):
        return capsys.readouterr().out


@pytest.fixture
def two_threads_on_four_cores(monkeypatch):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {0, 1, 2, 3})


@pytest.mark.parametrize('load', [8., 2.5])
def test_busy_cores_are_logged(two_threads_on_four_cores, monkeypatch, capsys, load):
    """A load above the number of free cores is logged with a remedy."""
    monkeypatch.setattr(os, 'getloadavg', lambda: (load, 0., 0.))
    out = log_of_session(capsys)
    assert f'load {load}, 4 cores, 2 threads of this program' in out
    assert 'OMP_NUM_THREADS=1 ' in out


def no_load():
    raise OSError


@pytest.mark.parametrize('case', ['half of them free', 'set', 'one thread', 'no load'])
def test_load_that_is_not_logged(two_threads_on_four_cores, monkeypatch, capsys, case):
    """Nothing is logged with free cores, with a chosen number of threads, with one thread, or without a load."""
    monkeypatch.setattr(os, 'getloadavg', lambda: (2. if case == 'half of them free' else 8., 0., 0.))
    if case == 'set':
        monkeypatch.setenv('OMP_NUM_THREADS', '2')
    elif case == 'one thread':
        monkeypatch.setattr(torch, 'get_num_threads', lambda: 1)
    elif case == 'no load':
        monkeypatch.setattr(os, 'getloadavg', no_load)
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
