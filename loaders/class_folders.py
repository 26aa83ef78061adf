"""Folders of class folders: each folder's pictures are one class."""
import copy
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from torchvision import datasets

from loaders import pictures, split
from loaders.samples import PictureSet
from utils import InputError, abridge, counted


class ClassFolders(PictureSet, datasets.ImageFolder):
    """A folder of class folders.

    Args:
        standard, possible, upright: see PictureSet; without `standard` the classes are the folders' names, sorted.
        numbers: index of the class of each folder, if the folders do not have standard names.
        allow_empty: accept classes without pictures.
        flag: flag that gave the folder, for errors.

    Raises:
        InputError: no such folder, no class folders in it, a class without pictures, or a name that is not standard.
    """

    def __init__(self, root: Path, transform=None, *, standard: Optional[List[str]] = None,
                 numbers: Optional[Dict[str, int]] = None, possible: Optional[List[int]] = None, upright: bool = True,
                 allow_empty: bool = False, flag: str = '--data-path'):
        self.standard, self.numbers, self.possible, self.upright, self.flag = standard, numbers, possible, upright, flag
        super().__init__(root, transform=transform, loader=partial(pictures.load_rgb, upright=upright),
                         allow_empty=allow_empty)

    def find_classes(self, directory) -> Tuple[List[str], Dict[str, int]]:
        try:
            classes = pictures.visible_folders(directory)
        except OSError as error:
            raise InputError(f'{self.flag}: {directory}: {error.strerror}') from None
        if not classes:
            raise InputError(f'{self.flag}: {directory} has no class folders; labelled pictures are needed, in a '
                             f'folder for each class')
        numbers = self.numbers or {name: i for i, name in enumerate(self.standard or classes)}
        unknown = [name for name in classes if name not in numbers]
        if len(unknown) == len(classes) == len(self.standard or ()):  # all classes, under other names
            numbers = {name: i for i, name in enumerate(classes)}
            if set(classes) == {str(i) for i in range(len(classes))}:  # sorted as texts, numbers have another order
                numbers = {name: int(name) for name in classes}
        elif unknown:
            raise InputError(
                f'{self.flag}: {directory} has {counted(len(classes), "class folder")}, of which {len(unknown)} are '
                f'not among the {len(self.standard)} WordNet ids (as n01440764): {abridge(unknown)}')
        return classes, {name: numbers[name] for name in classes}

    def make_dataset(self, directory, class_to_idx: Dict[str, int], extensions=None, is_valid_file=None,
                     allow_empty: bool = False) -> List[Tuple[str, int]]:
        """Return paths and classes of the pictures in torchvision's order."""
        left_out = Counter()
        paths = {name: pictures.find(Path(directory, name), left_out) for name in sorted(class_to_idx)}
        pictures.log_left_out(f'{self.flag}: {directory}', left_out)
        empty = [name for name, paths_of_class in paths.items() if not paths_of_class]
        if (empty and not allow_empty) or len(empty) == len(paths):
            raise InputError(f'{self.flag}: {directory}: no pictures in {abridge(empty)}')
        return [(path, class_to_idx[name]) for name, paths_of_class in paths.items() for path in paths_of_class]

    def class_names(self) -> List[str]:
        return list(self.standard) if self.numbers is not None else super().class_names()

    def divided(self, division: split.Split, is_train: bool) -> 'ClassFolders':
        """Return the pictures on one side of a division."""
        part, names = copy.copy(self), division.train if is_train else division.val
        part.split = division
        part.samples = [sample for sample, name in zip(self.samples, self.names()) if name in names]
        return part

    def names(self) -> List[str]:
        """Return the paths of the pictures relative to the folder, as CLASS/..."""
        return [Path(path).relative_to(self.root).as_posix() for path, _ in self.samples]
