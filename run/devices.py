"""Device of --device, and deterministic operations."""
import os
from typing import Optional

import torch

from utils import InputError

AMP_DTYPES = {'fp16': torch.float16, 'bf16': torch.bfloat16, 'off': None}


def choose_device(name: str) -> torch.device:
    """Return the device of a name (`auto`: the first available of cuda, mps and cpu), or raise InputError."""
    available = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(), 'cpu': True}
    kinds = [kind for kind, is_available in available.items() if is_available]
    try:
        device = torch.device(kinds[0] if name == 'auto' else name)
    except RuntimeError:
        raise InputError(f'--device {name}: no such device; allowed: auto, cuda, cuda:N, mps, cpu') from None
    if not available.get(device.type):
        raise InputError(f'--device {name}: not available on this machine, which has: {", ".join(kinds)}')
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f'--device {name}: this machine has {torch.cuda.device_count()} GPU(s), counted from 0')
    return device


def set_deterministic(deterministic: bool):
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')


def amp_dtype_of(amp: Optional[str], device: torch.device) -> Optional[torch.dtype]:
    """Return the autocast dtype of --amp on a device; None: full precision."""
    return AMP_DTYPES[amp or ('fp16' if device.type == 'cuda' else 'off')]
