"""Progress of loops, the table of rounds, and batches on their way to the device."""
import os
import re

import pytest
import torch

from run import output, progress
from run.logs import table_row


def test_table_has_aligned_columns(capsys):
    """A header once, and below it a row per round; a metric that is missing is `-`."""
    columns = {'loss': ('train_loss', '.4f'), 'Acc@1': ('test_acc1', '.2f')}
    table = progress.Table()
    for epoch, stats in enumerate([{'train_loss': 1., 'test_acc1': 50.}, {'train_loss': .5}]):
        table.add({'epoch': str(epoch), **table_row(stats, columns)})
    header, *rows = capsys.readouterr().out.splitlines()
    assert [line.split() for line in (header, *rows)] == [
        ['epoch', 'loss', 'Acc@1'], ['0', '1.0000', '50.00'], ['1', '0.5000', '-']]
    assert {len(line) for line in rows} == {len(header)}


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    now = [1000.]
    monkeypatch.setattr(progress.time, 'perf_counter', lambda: now[0])
    monkeypatch.setattr(progress.Progress, 'last_line', -float('inf'))
    return now


def test_lines_are_printed_by_time(clock, capsys):
    """A line at the first step, with the remaining time, then every 20 seconds, whatever the length of a step."""
    for header in ('Epoch 0', 'Epoch 1'):
        for _ in progress.Progress([torch.zeros(2, 3)] * 30, header, torch.device('cpu')):
            clock[0] += 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('Epoch 0 [ 1/30]  eta 0:01:27  ')
    steps = [int(re.search(r'\[ *(\d+)/', line)[1]) for line in lines]
    assert steps == [1, 8, 15, 22, 29, 6, 13, 20, 27]


@pytest.mark.parametrize(('columns', 'bar'), [(80, True), (0, False)])
def test_terminal_without_columns_gets_lines(monkeypatch, columns, bar):
    """Terminals that programs make may have no columns."""
    monkeypatch.setattr(output.sys.stderr, 'isatty', lambda: True, raising=False)
    monkeypatch.setattr(output.sys.stderr, 'fileno', lambda: 2, raising=False)
    monkeypatch.setattr(os, 'get_terminal_size', lambda fd: os.terminal_size((columns, 24)))
    assert output.shows_bar() is bar


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
@pytest.mark.parametrize('count', [0, 1, 3])
def test_prefetch_changes_nothing(device, count):
    """Every batch is yielded once, in order, on the device."""
    loader = [[torch.full((2, 3), float(i)), torch.tensor([i, i])] for i in range(count)]
    prefetched = list(progress.DevicePrefetch(loader, torch.device(device)))
    assert len(prefetched) == len(progress.DevicePrefetch(loader, torch.device(device))) == count
    for actual, expected in zip(prefetched, loader):
        assert all(a.device.type == device and torch.equal(a.cpu(), e) for a, e in zip(actual, expected))


def test_batches_of_any_structure_are_moved_and_counted():
    """Lists of dicts, tuples of crops, objects that are not tensors; the images of each are counted."""
    image, meta = torch.zeros(3, 8, 8), torch.device('meta')
    batches = {2: ([image, image], [{'boxes': torch.zeros(5, 4), 'id': 'a'}, {'boxes': torch.zeros(1, 4), 'id': 'b'}]),
               4: ((torch.zeros(4, 3, 8, 8), torch.zeros(4, 3, 6, 6)), torch.zeros(4)),
               3: [{'image': image}] * 3,
               5: {'id': list('abcde'), 'image': torch.zeros(5, 3, 8, 8)}}
    for count, batch in batches.items():
        assert progress.count_images(batch) == count
    moved = progress.map_leaves(batches[2], torch.Tensor, lambda tensor: tensor.to(meta))
    assert moved[1][0]['boxes'].device == moved[0][1].device == meta
    assert moved[1][1]['id'] == 'b'
