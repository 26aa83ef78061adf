"""Time of cross-covariance attention alone, in both forms (tools.benchmark xca)."""
from typing import Callable, List, Tuple

import timm.models.xcit
import torch

import xca
import xcit
from tools.measuring import autocast, fails_for_memory, least_of, ratio, shown, table, take_turns
from utils import InputError


def attention(dims: List[int], token_counts: List[int], batch_size: int, *, precision: str, device: torch.device,
              rounds: int) -> List[dict]:
    """Measure XCA in both forms against timm's; ratios compare the faster of eager and compiled."""
    rows, results = [], []
    for dim in dims:
        heads = next((row['num_heads'] for row in xcit.SIZES.values() if row['embed_dim'] == dim), 8)
        if dim % heads:
            raise InputError(f'--dim {dim}: must be a multiple of {heads}, the number of heads')
        modules = {'timm': timm.models.xcit.XCA(dim, heads, qkv_bias=True).to(device)}
        for form in ('plain', 'gram'):
            modules[form] = xca.XCA(dim, heads).to(device)
            modules[form].load_state_dict(modules['timm'].state_dict())
            modules[form].form = form
        for tokens in token_counts:
            for backward in (False, True):
                torch.compiler.reset()
                steps = {(name, compiled): build_step(module, (batch_size, tokens, dim), backward=backward,
                                                      precision=precision, compiled=compiled)
                         for name, module in modules.items() for compiled in (False, True)}
                times = take_turns(steps, device, rounds)
                least = least_of(times)
                results.append(dict(dim=dim, tokens=tokens, backward=backward, **least))
                rows.append([dim, tokens, 'forward+backward' if backward else 'forward',
                             *(shown(value and 1e3 * value, 2) for value in times.values()),
                             ratio(least['plain'], least['timm']), ratio(least['gram'], least['timm'])])
    table(['C', 'N', '', 'timm, ms', 'compiled', 'plain, ms', 'compiled', 'gram, ms', 'compiled', 'plain, timm = 1',
           'gram, timm = 1'], rows)
    return results


def build_step(module: torch.nn.Module, shape: Tuple[int, int, int], *, backward: bool, precision: str,
               compiled: bool) -> Callable:
    """Return a function that does a forward pass of tokens of `shape` (B, N, C), and a backward pass if wanted."""
    device = module.proj.weight.device
    function = torch.compile(module, dynamic=False) if compiled else module
    try:
        x = torch.randn(shape, device=device, requires_grad=backward)
    except RuntimeError as error:
        return fails_for_memory(error)

    def step():
        with torch.inference_mode(not backward), autocast(device, precision):
            y = function(x)
        if backward:
            y.sum().backward()
            module.zero_grad()
            x.grad = None

    return step
