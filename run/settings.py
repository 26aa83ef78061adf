"""Settings of flags, as values for functions that do not read flags."""
import dataclasses

import torch


class MostPixels:
    """Maximum number of pixels of a picture in this process: --max-pixels of the last parsed command line."""
    DEFAULT = 10 ** 9
    value = DEFAULT


@dataclasses.dataclass(frozen=True)
class Loading:
    """Settings of a loader of batches."""
    batch_size: int  # images per process and forward pass
    device: torch.device  # target of the batches
    num_workers: int = 0  # loading workers, at most one per core; 0: load in the main process
    pin_memory: bool = True  # page-locked host memory for CUDA
    seed: int = 0  # of the order of images and of their augmentation
    accum_iter: int = 1  # batches per optimizer step
    skip_bad_images: int = 0  # number of unreadable training images that may be replaced by others
