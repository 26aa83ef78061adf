"""DINO: self-distillation without labels (https://arxiv.org/abs/2104.14294), and evaluation of frozen features."""
