"""The last steps before training: checkpointing, compilation, synchronised BatchNorm, DistributedDataParallel."""
import pytest
import torch

import xcit
from run import assembly, processes

CPU = torch.device('cpu')


def small() -> xcit.Xcit:
    return xcit.xcit_nano_12_p16(num_classes=2, depth=1)


@pytest.fixture
def calls(monkeypatch) -> list:
    """Names of the steps in the order of their calls."""
    names = []
    monkeypatch.setattr(xcit.Xcit, 'set_grad_checkpointing', lambda self: names.append('checkpointing'))
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self, **options: names.append(f'compile {options}'))
    monkeypatch.setattr(processes, 'with_synchronised_bn', lambda model, device: names.append('sync BN') or model)
    monkeypatch.setattr(processes, 'wrap_for_distributed', lambda model, device: names.append('DDP') or model)
    return names


def test_order(calls):
    """Checkpointing precedes compilation, which precedes synchronised BatchNorm and DistributedDataParallel."""
    model, teacher = small(), small()
    assembly.prepare(model, CPU, checkpointed=model, compiled=[(model, {'mode': 'default'})], synchronised=[teacher])
    assert calls == ['checkpointing', "compile {'mode': 'default'}", 'sync BN', 'sync BN', 'DDP']


def test_steps_can_be_left_out(calls):
    """Nothing is checkpointed, compiled or synchronised unless the caller asks for it."""
    assembly.prepare(small(), CPU, sync_bn=False)
    assert calls == ['DDP']


def test_a_single_process_gets_its_own_model():
    """Without other processes the model is the same object, and compilation keeps the names of its weights."""
    model = small()
    names = list(model.state_dict())
    assert assembly.prepare(model, CPU, compiled=[(model, dict(backend='eager'))]) is model
    assert list(model.state_dict()) == names


@pytest.mark.filterwarnings('error:Grad strides')
def test_distributed_gradients_on_cpus_have_the_strides_of_parameters(tmp_path):
    """DistributedDataParallel does not warn about the strides of depthwise kernels; the weights keep their values."""
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/init', rank=0, world_size=1)
    try:
        model = small()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        ddp_model = assembly.prepare(model, CPU, sync_bn=False)
        assert isinstance(ddp_model, torch.nn.parallel.DistributedDataParallel)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        ddp_model(torch.rand(2, 3, 64, 64)).sum().backward()  # the first backward pass of a process would warn
    finally:
        torch.distributed.destroy_process_group()
