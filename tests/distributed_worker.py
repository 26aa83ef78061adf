"""One rank of test_distributed.py, which prints its results as one line of JSON."""
import json
import os
import signal

import torch
from torch.utils.data import DataLoader, TensorDataset

import xcit
from engine import evaluate, train_one_epoch
from loaders.batches import Batches
from run import assembly, processes, session, signals
from samplers import evaluation_indices

CPU = torch.device('cpu')


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return xcit.xcit_nano_12_p16(num_classes=7, depth=1)


def without_batch_statistics(model: torch.nn.Module) -> torch.nn.Module:
    """Keep BatchNorm in eval mode, so that an image's gradient does not depend on the rest of its batch."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train = lambda mode=True: None
            module.training = False
    return model


def losses_of(wrapped: torch.nn.Module):
    return lambda batch: {'loss': torch.nn.functional.cross_entropy(wrapped(batch[0]), batch[1])}


def train(inner: torch.nn.Module, images, targets, *, batch_size: int, accum_iter: int = 1, **preparation) -> dict:
    """Take one step of plain SGD on this process's share."""
    wrapped = assembly.prepare(inner, CPU, **preparation)
    return train_one_epoch(
        wrapped, losses_of(wrapped), DataLoader(TensorDataset(images, targets), batch_size=batch_size),
        optimizer=torch.optim.SGD(inner.parameters(), lr=1.), device=CPU, epoch=0, seed=0, accum_iter=accum_iter)


def results() -> dict:
    rank, world = processes.get_rank(), processes.get_world_size()
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.randn(17, 3, 32, 32, generator=generator), torch.arange(17) % 7
    facts = {'evaluation': {}}

    evaluated = model()
    if rank:  # as BatchNorms without synchronisation would be
        for buffer in evaluated.buffers():
            buffer.add_(1)
    for size in range(1, 18):
        loader = DataLoader(TensorDataset(images[:size], targets[:size]), batch_size=2,
                            sampler=evaluation_indices(range(size), num_replicas=world, rank=rank))
        stats = evaluate(evaluated, Batches(loader), device=CPU)
        facts['evaluation'][size] = [stats['acc1'], stats['acc5'], stats['loss']]

    if world <= 2:
        share = slice(rank * 6 // world, (rank + 1) * 6 // world)
        for key, options in (('gradient', dict(batch_size=6)), ('accumulated', dict(batch_size=3 // world or 1,
                                                                                  accum_iter=6))):
            trained = without_batch_statistics(model())
            stats = train(trained, images[share], targets[share], **options)
            facts[key] = (trained.head.weight - model().head.weight).flatten()[:50].tolist()
        facts['grad_norm'] = stats['grad_norm']

    if world == 2:
        for key in ('plain', 'compiled', 'checkpointed'):
            inner = model()
            preparation = {'compiled': dict(compiled=[(inner, dict(backend='aot_eager'))]),
                           'checkpointed': dict(checkpointed=inner)}.get(key, {})
            facts[key] = train(inner, images[:4], targets[:4], batch_size=4, **preparation)['grad_norm']

        counted = assembly.prepare(model(), CPU)
        facts['exchanges'] = 0

        def count(state, bucket):
            facts['exchanges'] += bucket.is_last()
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        counted.register_comm_hook(None, count)
        train_one_epoch(counted, losses_of(counted), DataLoader(TensorDataset(images[:4], targets[:4]), batch_size=2),
                        optimizer=torch.optim.SGD(counted.parameters(), lr=1.), device=CPU, epoch=0, seed=0,
                        accum_iter=2)

    with signals.StopRequest() as stop:
        if rank == world - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        facts['agreed'] = stop.agreed()
    return facts


if __name__ == '__main__':
    with session.joined('cpu', timeout_minutes=1):
        print(json.dumps(results()))
