"""segmentation.main with few channels, blocks and drawn pictures, for short runs and small checkpoints."""
import functools
from unittest import mock

import xcit
from dense import backbone
from segmentation import data, heads, models
from segmentation import main as program

SIZE = {**xcit.SIZES['nano_12'], 'embed_dim': 16, 'depth': 4, 'num_heads': 2, 'patch_size': 16}


def main(argv=None) -> dict:
    with mock.patch.object(backbone, 'options_of', return_value=SIZE), mock.patch.dict(
            backbone.LEVELS, {4: (0, 1, 2, 3)}), mock.patch.dict(data.SAMPLE_PICTURES, {True: 16, False: 3}), \
            mock.patch.object(models, 'FPNHead', functools.partial(heads.FPNHead, channels=16)):
        return program.main(argv)
