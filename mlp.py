"""The blocks' MLP, worked off in pieces that stay in a CPU's caches.

The hidden activations, four times as large as the tokens, are what a CPU spends its time on fetching. Piece by piece
they are made and used while they are near; the backward pass keeps those before GELU alone.
Shapes: `M` tokens of all images, `C` channels, `D` hidden channels.
"""
import timm.layers
import torch
import torch.nn.functional as F

# Elements that an intermediate result may have before the work is done in pieces. On a CPU 16 MB in float32, measured;
# elsewhere pieces only save memory, and large ones keep the device busy.
PIECE = {'cpu': 2 ** 22, 'other': 2 ** 24}


def piece(x: torch.Tensor) -> int:
    """Elements of a piece on x's device."""
    return PIECE['cpu' if x.device.type == 'cpu' else 'other']


def in_pieces() -> bool:
    """Whether to work in pieces: not where autograd or a compiler has its own plan."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


class Mlp(timm.layers.Mlp):
    """Linear, GELU, linear; (..., C) -> (..., C)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting() and self.takes_pieces(x):
            return PiecewiseMlp.apply(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(x))

    @torch.jit.unused
    def takes_pieces(self, x: torch.Tensor) -> bool:
        if torch.compiler.is_compiling():  # first: sizes are not to be looked at there
            return False
        return (x.device.type == 'cpu' and x.numel() // x.shape[-1] * self.fc1.out_features > piece(x)
                and not torch.is_autocast_enabled('cpu') and not (self.training and self.drop1.p))


class PiecewiseMlp(torch.autograd.Function):
    """What Mlp computes, and its gradients, in pieces."""

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2):
        tokens = x.reshape(-1, x.shape[-1])  # (M, C)
        M, D = len(tokens), len(w1)
        size = max(1, piece(x) // D)
        keeps = any(ctx.needs_input_grad)
        hidden = x.new_empty(M if keeps else size, D)
        out = torch.empty_like(tokens)
        for i in range(0, M, size):
            part = tokens[i:i + size]
            h = hidden[i:i + size] if keeps else hidden[:len(part)]
            torch.mm(part, w1.t(), out=h).add_(b1)
            torch.addmm(b2, F.gelu(h), w2.t(), out=out[i:i + size])
        if keeps:
            ctx.save_for_backward(x, hidden, w1, b1, w2, b2)
        return out.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        x, hidden, w1, b1, w2, b2 = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants the gradient's gradient
            out = F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)
            return torch.autograd.grad(out, (x, w1, b1, w2, b2), grad, create_graph=True)
        tokens, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
        size = max(1, piece(x) // len(w1))
        d_x, d_w1, d_b1, d_w2 = torch.empty_like(tokens), *(torch.zeros_like(p) for p in (w1, b1, w2))
        for i in range(0, len(tokens), size):
            part, h, g = tokens[i:i + size], hidden[i:i + size], grads[i:i + size]
            torch.addmm(d_w2, g.t(), F.gelu(h), out=d_w2)
            d_h = torch.ops.aten.gelu_backward(g @ w2, h)
            torch.addmm(d_w1, d_h.t(), part, out=d_w1)
            d_b1 += d_h.sum(dim=0)
            torch.mm(d_h, w1, out=d_x[i:i + size])
        return d_x.view_as(x), d_w1, d_b1, d_w2, grads.sum(dim=0)
