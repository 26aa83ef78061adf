"""What timm's users ask of a model beside its forward pass: heads, features of blocks, checkpointing, groups."""
import contextlib
from typing import ClassVar, List, Optional, Tuple, Union

import torch
import torch.nn as nn
import torch.utils.checkpoint
from timm.models._features import feature_take_indices

from xca import FORMS

GLOBAL_POOLS = ('token', 'avg', '')


class BadValue(ValueError, AssertionError):  # the latter is what timm's models raise
    pass


def check_output_fmt(output_fmt: str):
    if output_fmt not in ('NCHW', 'NLC'):
        raise BadValue(f"output_fmt {output_fmt!r} is not one of 'NCHW', 'NLC'")


class TimmModel(nn.Module):
    """A model of `patch_embed`, `blocks`, `cls_attn_blocks`, `norm` and `head`, as xcit.Xcit is. Shapes as there."""

    def set_global_pool(self, global_pool: str):
        if global_pool not in GLOBAL_POOLS:
            raise BadValue(f'global_pool {global_pool!r} is not one of {GLOBAL_POOLS}')
        if global_pool == 'token' and self.cls_token is None:
            raise BadValue("global_pool 'token' needs the CLS token, which was pruned")
        self.global_pool = global_pool

    __jit_unused_properties__: ClassVar[List[str]] = ['xca_form']

    @property
    def xca_form(self) -> str:
        """How XCA is computed: 'auto', 'plain' or 'gram', see `xca.XCA`. Assigned, it is that of all blocks.

        Raises:
            ValueError: there is no such form.
        """
        return self.blocks[0].attn.form

    @xca_form.setter
    def xca_form(self, form: str):
        if form not in FORMS:
            raise ValueError(f'form {form!r} is not one of {FORMS}')
        for block in self.blocks:
            block.attn.form = form

    @torch.jit.ignore
    def no_weight_decay(self):
        return {'cls_token'}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False):
        return dict(
            stem=r'^cls_token|^pos_embeder|^patch_embed',
            blocks=r'^blocks\.(\d+)',
            cls_attn_blocks=[(r'^cls_attn_blocks\.(\d+)', None), (r'^norm', (99999,))])  # timm: with the one before

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True):
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None):
        """Replace the head by a fresh one of `num_classes` (0: none), and the pooling where given."""
        if global_pool is not None:
            self.set_global_pool(global_pool)
        self.num_classes = num_classes
        like = next(self.parameters())
        self.head = (nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype)
                     if num_classes > 0 else nn.Identity())
        self.init_linear(self.head)
        self.head.train(self.training)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
            return_prefix_tokens: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Outputs of chosen XCA blocks, as timm's models give them.

        Args:
            x: (B, in_chans, img_h, img_w).
            indices: the last n blocks if a number, all if None, or a list of block numbers (negative: from the end).
            norm: apply the final LayerNorm to each.
            stop_early: leave out the blocks after the last one chosen (with `intermediates_only`).
            output_fmt: 'NCHW' for (B, C, H, W), 'NLC' for (B, N, C).
            intermediates_only: return the list alone.
            return_prefix_tokens: make of each output a pair with the CLS token (B, 1, C) that class attention gets from
                that block's tokens; the blocks themselves have none. Not in TorchScript.

        Returns:
            The list, or the pair (normalised tokens (B, 1 + N, C), list).
        """
        if not torch.jit.is_scripting():
            check_output_fmt(output_fmt)
        wanted, last = feature_take_indices(len(self.blocks), indices)
        if torch.jit.is_scripting() or not (stop_early and intermediates_only):  # TorchScript can't cut a ModuleList
            blocks = self.blocks
        else:
            blocks = self.blocks[:last + 1]
        x, H, W = self.forward_patches(x)
        chosen = []
        for i, block in enumerate(blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_block(block, x, H, W)
            else:
                x = block(x, H, W)
            if i in wanted:
                chosen.append(x)
        intermediates = [self.norm(tokens) if norm else tokens for tokens in chosen]
        if output_fmt == 'NCHW':
            intermediates = [tokens.transpose(1, 2).unflatten(2, (H, W)).contiguous() for tokens in intermediates]
        if not torch.jit.is_scripting() and return_prefix_tokens and self.cls_token is not None:
            intermediates = list(zip(intermediates, [self.forward_cls(tokens)[:, :1] for tokens in chosen]))
        if intermediates_only:
            return intermediates
        return self.forward_cls(x), intermediates

    @torch.jit.ignore
    def forward_attention(self, x: torch.Tensor, *, layer: int = -1) -> Tuple[torch.Tensor, torch.Tensor]:
        """Where the CLS token looks, and what the model makes of each patch; also of a model that is fused.

        Args:
            x: (B, in_chans, img_h, img_w).
            layer: class-attention block, counted from 0, or from the end.

        Returns:
            Attention of CLS (B, h, N), in float32, of which that to CLS itself is left out; normalised tokens
            (B, 1 + N, C).
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
        """Delete the layers that the chosen intermediates don't need; returns the block numbers chosen.

        With `prune_head` the CLS token goes as well: `forward` returns the patches (B, N, C).
        """
        wanted, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[:last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.cls_attn_blocks = nn.ModuleList()
            self.cls_token = None
            self.num_prefix_tokens = 0
            self.reset_classifier(0, '')
        return wanted


@contextlib.contextmanager
def frozen_batchnorm_statistics(module: nn.Module):
    """Let the BatchNorms in `module` normalise with the batch's statistics without recording them."""
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
    """Run a block without keeping its activations; the backward pass computes them again."""
    # The second run must not enter the batch into BatchNorm's running statistics once more. A compiled block needs
    # (and takes) no context: the compiler repeats the arithmetic alone, not the update of the statistics.
    contexts = {} if torch.compiler.is_compiling() else dict(
        context_fn=lambda: (contextlib.nullcontext(), frozen_batchnorm_statistics(block)))
    return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False, **contexts)
