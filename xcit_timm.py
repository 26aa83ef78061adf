"""Methods of timm's models besides the forward pass: heads, features of blocks, checkpointing, parameter groups."""
import contextlib
from typing import List, Optional, Tuple, Union

import torch
import torch.nn as nn
import torch.utils.checkpoint
from timm.models._features import FeatureGetterNet, feature_take_indices

GLOBAL_POOLS = ('token', 'avg', '')


class BadValue(ValueError, AssertionError):
    """Invalid argument; an AssertionError as well, which timm's models raise."""


@contextlib.contextmanager
def creation_defaults(device: Optional[torch.device], dtype: Optional[torch.dtype]):
    """Create tensors on `device` and with `dtype` inside this context; None: torch's defaults."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype or default)
    try:
        with contextlib.nullcontext() if device is None else torch.device(device):
            yield
    finally:
        torch.set_default_dtype(default)


class TimmModel(nn.Module):
    """Base class of xcit.Xcit; uses its modules. Shapes as in xcit.py."""

    def set_global_pool(self, global_pool: str):
        if global_pool not in GLOBAL_POOLS:
            raise BadValue(f'global_pool {global_pool!r} is not one of {GLOBAL_POOLS}')
        if global_pool == 'token' and self.cls_token is None:
            raise BadValue("global_pool 'token' needs the CLS token, which has been pruned")
        self.global_pool = global_pool

    @torch.jit.ignore
    def no_weight_decay(self):
        return {'cls_token'}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False):
        return dict(
            stem=r'^cls_token|^pos_embeder|^patch_embed',
            blocks=r'^blocks\.(\d+)',
            cls_attn_blocks=[(r'^cls_attn_blocks\.(\d+)', None), (r'^norm', (99999,))])  # with the last block

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True):
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None):
        """Replace the head by an untrained head of `num_classes` outputs (0: none); set the pooling, if given."""
        if global_pool is not None:
            self.set_global_pool(global_pool)
        self.num_classes = num_classes
        like = next(self.parameters())
        self.head = (nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype)
                     if num_classes > 0 else nn.Identity())
        self.init_linear(self.head)
        self.head.train(self.training)

    def forward_intermediates(
            self, x: torch.Tensor, indices: Optional[Union[int, List[int]]] = None, norm: bool = False,
            stop_early: bool = False, output_fmt: str = 'NCHW', intermediates_only: bool = False,
            return_prefix_tokens: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Return outputs of chosen XCA blocks, with timm's interface.

        Args:
            x: (B, in_chans, img_h, img_w).
            indices: list of block numbers (negative: from the end), number of last blocks, or None (all).
            norm: apply the final norm to each output.
            stop_early: skip the blocks after the last chosen block (only with `intermediates_only`).
            output_fmt: 'NCHW' for (B, C, H, W), 'NLC' for (B, N, C).
            intermediates_only: return the list alone.
            return_prefix_tokens: return pairs of each output and the CLS token (B, 1, C) that class attention computes
                from this output. Not in TorchScript.

        Returns:
            The list, or the pair (normalised tokens (B, 1 + N, C), list).
        """
        if not torch.jit.is_scripting():
            if output_fmt not in ('NCHW', 'NLC'):
                raise BadValue(f"output_fmt '{output_fmt}' is not one of 'NCHW', 'NLC'")
        chosen, last = feature_take_indices(len(self.blocks), indices)
        x, H, W = self.forward_patches(x)
        x, outputs = self.forward_blocks(x, H, W, chosen, last + 1 if stop_early and intermediates_only else None)
        intermediates = [self.norm(tokens) if norm else tokens for tokens in outputs]
        if output_fmt == 'NCHW':
            intermediates = [tokens.transpose(1, 2).unflatten(2, (H, W)).contiguous() for tokens in intermediates]
        if not torch.jit.is_scripting() and return_prefix_tokens and self.cls_token is not None:
            intermediates = list(zip(intermediates, [self.forward_cls(tokens)[:, :1] for tokens in outputs]))
        if intermediates_only:
            return intermediates
        return self.forward_cls(x), intermediates

    @torch.jit.ignore
    def forward_attention(self, x: torch.Tensor, *, layer: int = -1) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return the attention of the CLS token to the patches, and the tokens; works for fused models as well.

        Args:
            x: (B, in_chans, img_h, img_w).
            layer: number of the class-attention block (negative: from the end).

        Returns:
            Attention of CLS to the patches (B, h, N), in float32; normalised tokens (B, 1 + N, C).
        """
        attn, inputs = self.cls_attn_blocks[layer].attn, []
        hook = attn.register_forward_pre_hook(lambda module, args: inputs.extend(args))
        try:
            tokens = self.forward_features(x)
        finally:
            hook.remove()
        with torch.autocast(x.device.type, enabled=False):
            return attn.attention_weights(inputs[0].float())[:, :, 1:], tokens

    @torch.jit.ignore
    def prune_intermediate_layers(
            self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True):
        """Delete the layers that the chosen intermediates do not need; return the chosen block numbers.

        `prune_head` deletes the CLS token as well: `forward` then returns the patches (B, N, C).
        """
        chosen, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[:last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.cls_attn_blocks = nn.ModuleList()
            self.cls_token = None
            self.num_prefix_tokens = 0
            self.reset_classifier(0, '')
        return chosen


def network_of(model: nn.Module, action: str) -> TimmModel:
    """Return an Xcit, or the Xcit inside a `features_only` model.

    Args:
        action: participle for the error, e.g. 'fused'.

    Raises:
        ValueError: there is no Xcit of this copy of the package.
    """
    network = model.model if isinstance(model, FeatureGetterNet) else model
    if isinstance(network, TimmModel):
        return network
    reason = 'it is not an Xcit of this package'
    if any(base.__name__ == TimmModel.__name__ for base in type(network).__mro__):
        file = network.set_global_pool.__code__.co_filename
        reason = f'it comes from another copy of this package ({file}), not from {__file__}'
    raise ValueError(f'a {type(network).__name__} cannot be {action}: {reason}')


@contextlib.contextmanager
def frozen_batchnorm_statistics(module: nn.Module):
    """Normalise with batch statistics, without updating the running statistics, in all BatchNorms of `module`."""
    norms = [m for m in module.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm))]
    before = [(m.momentum, m.num_batches_tracked.clone()) for m in norms]
    for m in norms:
        m.momentum = 0.
    try:
        yield
    finally:
        for m, (momentum, num_batches_tracked) in zip(norms, before):
            m.momentum = momentum
            m.num_batches_tracked.copy_(num_batches_tracked)


def checkpoint_block(block: nn.Module, *args) -> torch.Tensor:
    """Run a block without keeping its activations, which the backward pass computes again."""
    # The second run must not update BatchNorm's running statistics again. A compiled block needs (and accepts) no
    # context: the compiler repeats only the arithmetic, not the update of the statistics.
    contexts = {} if torch.compiler.is_compiling() else dict(
        context_fn=lambda: (contextlib.nullcontext(), frozen_batchnorm_statistics(block)))
    return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False, **contexts)
