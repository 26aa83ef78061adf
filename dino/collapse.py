"""Detection of collapse by metrics of the teacher output."""
import math
from typing import Dict

import torch
import torch.nn.functional as F

from run.processes import mean_over_processes

TOLERANCE = .01  # largest difference of entropies that counts as equal, in units of ln(out_dim)
LEAST_SPREAD = .02
REMEDIES = 'try a lower --teacher-temp, a lower --lr, --use-bn-in-head true, or a smaller --out-dim'


def spread(features: torch.Tensor) -> torch.Tensor:
    """Compute the spread of features (n, C) of all processes: their mean standard deviation at norm 1, times sqrt(C).

    1: the features are evenly spread over all directions; 0: they are equal.
    """
    unit = F.normalize(features.detach().float(), dim=1)
    mean = mean_over_processes(unit.mean(dim=0))
    variance = mean_over_processes((unit - mean).square().mean(dim=0))
    return variance.sqrt().mean() * features.shape[1] ** .5


def kinds_of_collapse(stats: dict, out_dim: int) -> Dict[str, str]:
    """Return a description of each kind of collapse that an epoch's metrics show, by name."""
    entropy, of_mean, maximum = stats['train_teacher_entropy'], stats['train_mean_entropy'], math.log(out_dim)
    kinds = {}
    if entropy > (1 - TOLERANCE) * maximum:
        kinds['uniform'] = (f'the teacher\'s output is uniform for every image (entropies {entropy:.3f} and '
                            f'{of_mean:.3f} are near ln(out_dim) = {maximum:.3f})')
    elif of_mean - entropy < TOLERANCE * maximum:
        kinds['alike'] = (f'the teacher\'s output is the same for all images (its entropy per image, {entropy:.3f}, '
                          f'equals the entropy of the mean output, {of_mean:.3f})')
    if stats['train_feature_spread'] < LEAST_SPREAD:
        kinds['features'] = (f'the features of all images are alike (spread {stats["train_feature_spread"]:.4f}, below '
                             f'{LEAST_SPREAD})')
    return kinds
