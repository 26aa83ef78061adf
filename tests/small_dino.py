"""dino.train with a narrow head, for small checkpoints."""
from unittest import mock

from dino import networks, train


def main(argv=None) -> dict:
    with mock.patch.object(networks, 'HIDDEN', 16):
        return train.main(argv)
