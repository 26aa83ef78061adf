"""Setting of a model's own evaluation, from the file of its weights or the table of published weights.

A setting is a dict by the names of flags: `model`, `input_size` (pixels), `full_crop`, `mean` and `std` (None:
ImageNet's), and `resize` for small images. It has the keys that are known.
"""
import shlex
from pathlib import Path
from typing import Optional

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import weights
import xcit_zoo
from loaders.transforms import SMALL
from run.commandline import words_of
from run.descriptions import side_of, trained_with
from run.output import log

NAMES = ('model', 'input_size', 'full_crop', 'mean', 'std', 'resize')
IMAGENET = {'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD}


def of_flag(given: str, flag: str, model: str = '', *, downloads: bool = True) -> dict:
    """Return the setting of weights that are not read yet; see `weights.read` for arguments and errors.

    Args:
        model: name of the model that a tag belongs to.
        downloads: also read weights that are not in a file of this machine, and not published.
    """
    weights.check_exists(given, flag, model)
    published = weights.published_as(given, model)
    is_read = published is None and (downloads or Path(given).is_file())
    return of(weights.read_content(given, flag, model), published) if is_read else of({}, published)


def of(content: dict, published: Optional[xcit_zoo.Published] = None) -> dict:
    """Return the setting of published weights, or as the content of a file describes it."""
    if published:
        return {'model': published.model, 'input_size': published.resolution, 'full_crop': published.crop == 1.,
                'mean': None, 'std': None}
    if not content:
        return {}
    trained = trained_with(content)
    setting = {'model': weights.model_in(content),
               'input_size': side_of(trained.get('input_size')) or side_of(trained.get('img_size'))}
    setting = {name: value for name, value in setting.items() if value}
    if trained.get('full_crop') is not None or is_of_dino(trained):
        setting['full_crop'] = evaluation_crop(trained) == 1.
    for name in IMAGENET:
        value = trained.get(name, ())
        if value is None or (isinstance(value, (list, tuple)) and len(value) == 3):
            setting[name] = value and list(value)
    if trained.get('resize') is True and setting.get('input_size', SMALL + 1) <= SMALL:
        setting['resize'] = True
    return setting


def is_of_dino(trained: dict) -> bool:
    """Return True if the flags of a training run are those of DINO, which have no --full-crop."""
    return 'teacher_temp' in trained and 'out_dim' in trained


def evaluation_crop(trained: dict) -> float:
    """Return the fraction of a picture's shorter side in evaluation; `trained`: flags of the training run."""
    return .875 if trained.get('full_crop') is False or is_of_dino(trained) else 1.


def words(setting: dict) -> str:
    """Return a setting as flags of a command line."""
    return shlex.join(words_of({name: setting[name] for name in NAMES if name in setting}))


def differences(own: dict, used: dict) -> list:
    """Return the names of the flags whose used value is not that of a model's own setting."""
    def plain(name: str, value):
        value = value or IMAGENET.get(name, value)
        return weights.without_resolution(value) if name == 'model' else tuple(value) if name in IMAGENET else value

    return [name for name in NAMES if name in own and plain(name, own[name]) != plain(name, used[name])]


def log_differences(own: dict, used: dict, source: str):
    """Log the flags whose used value is not that of a model's own setting, in one line."""
    if names := differences(own, used):
        pairs = (words({name: IMAGENET.get(name) if setting[name] is None else setting[name] for name in names})
                 for setting in (used, own))
        log('{}: using {} instead of its own {}'.format(source, *pairs))
