"""Model for tests, timm's xcit_test: it trains and compiles in seconds, and its checkpoints are small."""
from timm.models import generate_default_cfgs, register_model

import xcit

default_cfgs = generate_default_cfgs({'xcit_test': {'num_classes': 1000}})


@register_model
def xcit_test(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None,
              **kwargs) -> xcit.Xcit:
    """Build an XCiT of 13,000 parameters."""
    return xcit.Xcit(patch_size=16, embed_dim=16, depth=1, num_heads=2, **{'eta': 1., **kwargs})
