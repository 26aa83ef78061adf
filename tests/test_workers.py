"""Loading workers with little shared memory, and workers that die."""
import os
import signal

import pytest
import torch
from conftest import tiniest, write_image
from torch.utils.data import Dataset, default_collate

from inference import pictures
from inference.loaded import LoadedModel
from loaders import workers
from loaders.samples import collate
from loaders.transforms import View
from main import main
from utils import RunStopped


class Squares(Dataset):
    """Samples of 12 KB; the worker calls `act` before each."""

    def __init__(self, act=lambda: None):
        self.act = act

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int):
        self.act()
        return torch.full((3, 32, 32), float(index)), index


def loader(dataset, **kwargs) -> workers.Loader:
    return workers.Loader(dataset, num_workers=1, batch_size=2, **{'collate_fn': default_collate, **kwargs})


@pytest.mark.parametrize('collate_fn', [default_collate, list, collate])
def test_batches_go_through_pipes_if_shared_memory_is_small(monkeypatch, capsys, collate_fn):
    """The batches are equal, and the reason for their speed is logged."""
    monkeypatch.setattr(workers, 'available_shared_memory', lambda: 2 ** 20)
    expected = list(loader(Squares(), collate_fn=collate_fn))
    assert 'through pipes' not in capsys.readouterr().out  # 72 KB are enough
    monkeypatch.setattr(workers, 'AHEAD', 300)
    through_pipes = loader(Squares(), collate_fn=collate_fn)
    assert 'go through pipes, which is slower (in a container: docker run --shm-size=8g)' in capsys.readouterr().out
    monkeypatch.setattr(torch.Tensor, 'share_memory_', None)  # not called
    batches = list(through_pipes)
    assert len(batches) == len(expected) == 3
    assert str(batches) == str(expected)


def test_no_workers_without_any_shared_memory(monkeypatch, capsys, folders):
    """Without memory for the workers' locks, the main process loads."""
    monkeypatch.setattr(workers, 'available_shared_memory', lambda: 5000)
    main(tiniest(folders, '--epochs', '1', '--num-workers', '1'))
    assert '/dev/shm has 4 KB left, too little for loading workers' in capsys.readouterr().out


def test_full_shared_memory_ends_the_run(monkeypatch):
    """The run ends in one line, also with lists of samples, which torch would pass on in a thread and lose."""
    def no_space(tensor):
        raise RuntimeError('unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)')

    monkeypatch.setattr(torch.Tensor, 'share_memory_', no_space)
    with pytest.raises(RunStopped, match=r'^/dev/shm is full: [^\n]*$'):
        list(loader(Squares(), collate_fn=list))


def test_killed_worker_ends_the_run():
    """The system kills workers if memory is short."""
    with pytest.raises(RunStopped, match=r'^a loading worker has died [^\n]*--num-workers\)$'):
        list(loader(Squares(lambda: os.kill(os.getpid(), signal.SIGKILL))))


def test_tools_read_through_pipes(monkeypatch, tmp_path):
    """Tools read all pictures through pipes, and the error of a picture that can't be read."""
    for i in range(3):
        write_image(tmp_path / f'{i}.png')
    (tmp_path / '3.png').write_bytes(b'')
    monkeypatch.setattr(workers, 'available_shared_memory', lambda: 2 ** 20)
    monkeypatch.setattr(workers, 'AHEAD', 300)
    loaded = LoadedModel(torch.nn.Identity(), 'none', None, View(64, full_crop=True), torch.device('cpu'), None)
    unreadable = []
    batches = list(pictures.batches(pictures.find_images([str(tmp_path)]), loaded, batch_size=2, num_workers=1,
                                    unreadable=unreadable))
    assert [indices for _, indices in batches] == [[0, 1], [2]]
    assert len(unreadable) == 1


def test_signal_while_workers_start():
    """A signal to all processes of a job is blocked until the workers ignore it."""
    while_forking = [True]
    os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM) if while_forking else None)
    batches = list(loader(Squares()))
    while_forking.clear()
    assert len(batches) == 3
