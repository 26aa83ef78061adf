"""The blocks' MLP, worked off in pieces that stay in a CPU's caches.

The hidden activations, four times as large as the tokens, are what a CPU spends its time on fetching. Piece by piece
they are made and used while they are near; the backward pass keeps those before GELU alone.
Shapes: `M` tokens of all images, `C` channels, `D` hidden channels.
"""
import timm.layers
import torch
import torch.nn as nn
import torch.nn.functional as F

from linear import call, has_hooks, is_eager, is_faster, is_linear, linear
from xca import is_half

# Elements that an intermediate result may have before the work is done in pieces. On a CPU 16 MB in float32, measured;
# elsewhere pieces only save memory, and large ones keep the device busy.
PIECE = {'cpu': 2 ** 22, 'other': 2 ** 26}


def piece(x: torch.Tensor) -> int:
    """Elements of a piece on x's device."""
    return PIECE['cpu' if x.device.type == 'cpu' else 'other']


class Mlp(timm.layers.Mlp):
    """Linear, GELU, linear; (..., C) -> (..., C)."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.):
        super().__init__(dim, hidden_dim, drop=drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))
        if self.takes_pieces(x):
            return PiecewiseMlp.apply(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias,
                                      torch.is_grad_enabled())
        if self.takes_biases_apart(x):
            x = self.drop1(self.act(bias_apart(self.fc1, x)))
            return self.drop2(bias_apart(self.fc2, x))
        if self.takes_gelu_along(x):
            return linear(linear(x, self.fc1.weight, self.fc1.bias, gelu=True), self.fc2.weight, self.fc2.bias)
        x = self.drop1(self.act(call(self.fc1, x)))
        return self.drop2(call(self.fc2, x))

    @torch.jit.unused
    def takes_pieces(self, x: torch.Tensor) -> bool:
        if not is_eager():  # first: sizes are not to be looked at there
            return False
        return (x.device.type == 'cpu' and x.numel() // x.shape[-1] * self.fc1.out_features > piece(x)
                and not is_half(x) and not (self.training and self.drop1.p) and self.is_plain() and is_gelu(self.act))

    @torch.jit.unused
    def takes_biases_apart(self, x: torch.Tensor) -> bool:
        return (torch.compiler.is_compiling() and not torch.compiler.is_exporting() and x.device.type == 'cpu'
                and not is_half(x) and self.is_plain() and not is_faster(x))

    @torch.jit.unused
    def takes_gelu_along(self, x: torch.Tensor) -> bool:
        # The backward pass would want what was before GELU.
        return (not torch.is_grad_enabled() and not self.training and self.is_plain() and is_gelu(self.act)
                and is_faster(x))

    @torch.jit.unused
    def is_plain(self) -> bool:
        """Whether the weights and biases of the layers are all there is, and not adapters as well, say."""
        layers = (self.fc1, self.fc2)
        return all(is_linear(layer) and layer.bias is not None for layer in layers)


def bias_apart(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """layer(x), for a compiler for CPUs."""
    # It makes one operation of a product and a sum, for which it first writes the bias into each row of the result. A
    # difference it leaves alone, and joins to what follows: 2 % of a model's time.
    return x @ layer.weight.t() - (-layer.bias)


def is_gelu(layer: nn.Module) -> bool:
    """Whether a layer is the exact GELU, and nobody listens to it."""
    return type(layer) is nn.GELU and layer.approximate == 'none' and not has_hooks(layer)


class PiecewiseMlp(torch.autograd.Function):
    """What Mlp computes, and its gradients, in pieces."""

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, grad_enabled=True):
        tokens = x.reshape(-1, x.shape[-1])  # (M, C)
        size = max(1, piece(x) // len(w1))
        keeps = grad_enabled and any(ctx.needs_input_grad)
        hidden = []  # in pieces, before GELU
        out = torch.empty_like(tokens)
        for part, part_of_out in zip(tokens.split(size), out.split(size)):
            if keeps:
                hidden.append(linear(part, w1, b1))
                part_of_out.copy_(linear(F.gelu(hidden[-1]), w2, b2))
            else:
                part_of_out.copy_(linear(linear(part, w1, b1, gelu=True), w2, b2))
        if keeps:
            ctx.save_for_backward(x, w1, b1, w2, b2, *hidden)
        return out.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        x, w1, b1, w2, b2, *hidden = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():  # somebody wants the gradient's gradient
            out = F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)
            inputs = [t for t, want in zip((x, w1, b1, w2, b2), wanted) if want]
            found = iter(torch.autograd.grad(out, inputs, grad, create_graph=True))
            return *(next(found) if want else None for want in wanted), None
        tokens, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
        size = max(1, piece(x) // len(w1))
        d_x = torch.empty_like(tokens) if wanted[0] else None
        d_w1, d_b1, d_w2 = (torch.zeros_like(p) if want else None for p, want in zip((w1, b1, w2), wanted[1:]))
        for i, (part, h, g) in enumerate(zip(tokens.split(size), hidden, grads.split(size))):
            if d_w2 is not None:
                torch.addmm(d_w2, g.t(), F.gelu(h), out=d_w2)
            if not any(wanted[:3]):
                continue
            d_h = torch.ops.aten.gelu_backward(linear(g, w2.t()), h)
            if d_w1 is not None:
                torch.addmm(d_w1, d_h.t(), part, out=d_w1)
            if d_b1 is not None:
                d_b1 += d_h.sum(dim=0)
            if d_x is not None:
                d_x[i * size:(i + 1) * size] = linear(d_h, w1.t())
        d_b2 = grads.sum(dim=0) if wanted[4] else None
        return None if d_x is None else d_x.view_as(x), d_w1, d_b1, d_w2, d_b2, None
