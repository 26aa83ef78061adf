"""Segmentation without training: each patch gets the classes of the nearest patches of labelled pictures."""
from typing import Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from dense.backbone import STRIDES, XcitPyramid
from dino.neighbours import TEMPERATURE, nearest
from loaders.batches import build_eval_loader
from run import processes
from run.progress import Progress
from run.settings import Loading
from segmentation.data import LabelledPictures
from segmentation.losses import IGNORED
from segmentation.testing import Prepared, only_sample
from segmentation.transforms import EvalTransform

BLOCK = 4096  # patches in one comparison


class PatchNeighbours(nn.Module):
    """Backbone and labelled patches; its logits are the votes of the nearest patches by cosine similarity.

    Args:
        backbone: pyramid in eval mode, whose last block gives the features.
        patches: (n, C), of norm 1.
        classes: (n,).
        k: number of neighbours, at most n.
        num_classes: K.
    """

    def __init__(self, backbone: XcitPyramid, patches: torch.Tensor, classes: torch.Tensor, *, k: int,
                 num_classes: int, name: str):
        super().__init__()
        self.backbone, self.k, self.num_classes, self.name = backbone, k, num_classes, name
        self.register_buffer('patches', patches)
        self.register_buffer('classes', classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Compute votes (B, K, about img_h / 4, img_w / 4), which sum to 1, from images (B, 3, img_h, img_w)."""
        maps = features_of(self.backbone, images)
        votes = torch.cat([self.votes(rows) for rows in maps.permute(0, 2, 3, 1).flatten(0, 2).split(BLOCK)])
        votes = votes.view(len(maps), *maps.shape[-2:], -1).permute(0, 3, 1, 2)
        return F.interpolate(votes, scale_factor=self.backbone.patch_size // STRIDES[0], mode='bilinear')

    def votes(self, rows: torch.Tensor) -> torch.Tensor:
        """Compute votes (b, K) for features (b, C) of norm 1."""
        similarities, indices = nearest(self.patches, rows, self.k)
        weights = (similarities / TEMPERATURE).softmax(dim=1)
        return rows.new_zeros(len(rows), self.num_classes).scatter_add_(1, self.classes[indices], weights)


def features_of(backbone: XcitPyramid, images: torch.Tensor) -> torch.Tensor:
    """Return the last block's map of norm 1, (B, C, H, W)."""
    return F.normalize(backbone.forward_maps(images)[-1].float(), dim=1)


@torch.inference_mode()
def collect(backbone: XcitPyramid, dataset: LabelledPictures, transform: EvalTransform, loading: Loading, *, most: int
            ) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return features (n, C) and classes (n,) of at most `most` patches, evenly from all pictures, on every process.

    The class of a patch is that of its central pixel; patches without a class are left out.
    """
    loader = build_eval_loader(dataset.with_transform(Prepared(transform)), loading, collate_fn=only_sample)
    per_picture, rows, labels = max(1, most // len(dataset)), [], []
    for image, classes in Progress(loader, 'Patches', loading.device):
        maps = features_of(backbone, image[None].to(loading.device))
        height, width = maps.shape[-2:]
        y, x = (((torch.arange(count) + .5) * (length / count)).long() for count, length in
                zip((height, width), classes.shape))
        central = classes[y[:, None], x].flatten()
        chosen = (central != IGNORED).nonzero()[:, 0]
        chosen = chosen[torch.linspace(0, len(chosen) - 1, min(per_picture, len(chosen))).long()]
        rows.append(maps[0].flatten(1).t()[chosen.to(maps.device)].cpu())
        labels.append(central[chosen].long()[:, None])
    rows, labels = (processes.gather_rows(torch.cat(parts), in_turn=loader.counts_batches) for parts in (rows, labels))
    return rows, labels[:, 0]
