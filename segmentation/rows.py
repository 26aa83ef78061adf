"""Logits of large images by rows: the finest level, the largest maps of all, exists for some rows at a time."""
from typing import Callable, List, Tuple

import torch
import torch.nn.functional as F

from dense.resize import ResizedRows, rows_of
from segmentation.heads import FPN, FPNHead, UPerHead
from segmentation.models import Segmenter

Rows = Callable[[int, int], torch.Tensor]  # from `start` and `stop` to rows (channels, stop - start, width)


def works_by_rows(model: torch.nn.Module) -> bool:
    return isinstance(getattr(model, 'decode_head', None), (FPNHead, UPerHead))


def head_rows(model: Segmenter, image: torch.Tensor) -> Tuple[Rows, Tuple[int, int]]:
    """Return rows of the logits (K, rows, width) of an image (1, 3, img_h, img_w), and their height and width."""
    fine, *coarse = model.backbone.forward_maps(image)
    coarse = [step(x) for step, x in zip((model.backbone.fpn2, model.backbone.fpn3, model.backbone.fpn4), coarse)]
    factor = 4 if model.backbone.patch_size == 16 else 2
    size = (factor * fine.shape[-2], factor * fine.shape[-1])

    def level_rows(start: int, stop: int) -> torch.Tensor:
        """Return rows of the pyramid's finest level, (1, C, rows, width); each depends on one row of patches."""
        first = start // factor
        rows = model.backbone.fpn1(fine[..., first:-(-stop // factor), :])
        return rows[..., start - factor * first:stop - factor * first, :]

    build = fpn_rows if isinstance(model.decode_head, FPNHead) else uper_rows
    rows = build(model, level_rows, size, coarse)
    return lambda start, stop: rows(start, stop)[0].float(), size


def fpn_rows(model: Segmenter, level_rows: Rows, size: Tuple[int, int], coarse: List[torch.Tensor]) -> Rows:
    neck: FPN = model.neck
    head: FPNHead = model.decode_head
    laterals = neck.top_down([conv(x) for conv, x in zip(neck.lateral_convs[1:], coarse)])
    scaled = [branch(conv(x)) for branch, conv, x in zip(head.scale_heads[1:], neck.fpn_convs[1:], laterals)]
    scaled = [ResizedRows(rows_of(x), tuple(x.shape[-2:]), size) for x in scaled]
    above = F.interpolate(laterals[0], size=(laterals[0].shape[-2], size[1]))  # nearest, columns alone
    nearest = (torch.arange(size[0]) * (above.shape[-2] / size[0])).long().to(above.device)

    def lateral_rows(start: int, stop: int) -> torch.Tensor:
        return neck.lateral_convs[0](level_rows(start, stop)) + above[..., nearest[start:stop], :]

    level = convolved(neck.fpn_convs[0], lateral_rows, size[0])
    finest = convolved(head.scale_heads[0], level, size[0])
    return lambda start, stop: head.classify(sum((x(start, stop) for x in scaled), finest(start, stop)))


def uper_rows(model: Segmenter, level_rows: Rows, size: Tuple[int, int], coarse: List[torch.Tensor]) -> Rows:
    head: UPerHead = model.decode_head
    laterals = [conv(x) for conv, x in zip(head.lateral_convs[1:], coarse)] + [head.pool(coarse[-1])]
    laterals = head.top_down(laterals)
    levels = [conv(x) for conv, x in zip(head.fpn_convs[1:], laterals)] + laterals[-1:]
    above, *others = [ResizedRows(rows_of(x), tuple(x.shape[-2:]), size) for x in (laterals[0], *levels)]

    def lateral_rows(start: int, stop: int) -> torch.Tensor:
        return head.lateral_convs[0](level_rows(start, stop)) + above(start, stop)

    finest = convolved(head.fpn_convs[0], lateral_rows, size[0])

    def levels_rows(start: int, stop: int) -> torch.Tensor:
        return torch.cat([finest(start, stop), *(x(start, stop) for x in others)], dim=1)

    bottleneck = convolved(head.fpn_bottleneck, levels_rows, size[0])
    return lambda start, stop: head.classify(bottleneck(start, stop))


def convolved(layer: Callable[[torch.Tensor], torch.Tensor], rows: Rows, height: int) -> Rows:
    """Return the rows of a 3x3 convolution with padding, which needs one more row above and below."""
    def convolved_rows(start: int, stop: int) -> torch.Tensor:
        first, last = max(start - 1, 0), min(stop + 1, height)
        x = layer(rows(first, last))
        return x[..., start - first:x.shape[-2] - (last - stop), :]

    return convolved_rows
