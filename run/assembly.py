"""Checkpointing, compilation, sync BN and DDP of a resumed model, in the required order."""
from typing import Iterable, Optional, Tuple

import torch
import torch.nn as nn

from run import processes
from run.output import log


def prepare(model: nn.Module, device: torch.device, *, checkpointed: Optional[nn.Module] = None,
            compiled: Iterable[Tuple[nn.Module, dict]] = (), sync_bn: bool = True,
            synchronised: Iterable[nn.Module] = ()) -> nn.Module:
    """Return a model ready for `engine.train_one_epoch`.

    A program builds the model, speeds it up, builds the optimizer and the `Run`, resumes, and calls this function.
    Speeding up replaces modules: before the optimizer and the loading of weights. The optimizer refers to
    the parameters: nothing here replaces parameters. Gradient checkpointing changes the traced code:
    before compilation, which is in place and keeps the names of the state dict. DistributedDataParallel collects
    parameters and buffers: after everything that replaces modules.

    Args:
        model: model on the device, with its weights.
        checkpointed: module whose activations are computed twice to save memory; None: none.
        compiled: modules, each with its options of torch.compile.
        sync_bn: synchronise BatchNorm over several GPUs.
        synchronised: further modules in train mode, without gradients, whose BatchNorms are synchronised in place.
    """
    if checkpointed is not None:
        checkpointed.set_grad_checkpointing()
    for module, options in compiled:
        module.compile(**options)
    if sync_bn:
        model, *_ = [processes.with_synchronised_bn(module, device) for module in (model, *synchronised)]
    if processes.is_distributed() and device.type != 'cuda':
        log('BatchNorm is not synchronised: each process normalises with its own batch (only CUDA supports it)')
        lay_out_as_gradients(model)
    return processes.wrap_for_distributed(model, device)


def lay_out_as_gradients(model: nn.Module):
    """Give depthwise kernels (C, 1, h, w) the strides that their gradients have on CPUs, in place.

    The strides differ in the dimension of size 1 alone. DistributedDataParallel would warn about other strides.
    """
    for parameter in model.parameters():
        if parameter.ndim == 4 and parameter.shape[1] == 1 and parameter.is_contiguous():
            size, (first, _, *last) = parameter.shape, parameter.stride()
            parameter.data = parameter.data.as_strided(size, (first, 1, *last))
