"""Name and place of a data set."""
import dataclasses
from pathlib import Path
from typing import Optional


@dataclasses.dataclass(frozen=True)
class Source:
    """Name and place of a data set.

    Args:
        name: name of the data set, as in --data-set.
        path: folder of the data, as in --data-path.
        val_fraction: fraction of each class to hold out without val/; None: the fraction stored in `run_folder`.
        exif: pictures are rotated by their EXIF orientation; None: all but published data sets.
        inat_category: level of iNaturalist's taxonomy that makes the classes.
        train_split, val_split, num_classes: splits and number of classes for timm's readers.
        seed: seed of the held-out pictures, and of streams.
        batch_size: images per batch, which some of timm's readers use.
        run_folder: folder of the run that is resumed, whose division of pictures is kept; None: a fresh run.
        flag: flag that gave `path`, for errors.
    """
    name: str
    path: str
    val_fraction: Optional[float] = None
    exif: Optional[bool] = None
    inat_category: str = 'name'
    train_split: str = 'train'
    val_split: str = 'validation'
    num_classes: Optional[int] = None
    seed: int = 0
    batch_size: int = 1
    run_folder: Optional[Path] = None
    flag: str = '--data-path'
