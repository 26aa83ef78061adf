"""Types allowed in checkpoints besides tensors and plain values: their objects can't do harm.

torch.load(weights_only=True) only makes objects of the types below and of torch's own list.
"""
import argparse
import builtins
import collections
import datetime
import decimal
import fractions
import pathlib
import types
import uuid
from collections.abc import Iterable
from typing import List, Optional, Tuple

import numpy as np

PLAIN = (argparse.Namespace, types.SimpleNamespace, collections.ChainMap, collections.UserDict, collections.UserList,
         datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone, decimal.Decimal,
         fractions.Fraction, uuid.UUID, slice)
FACTORIES = ('bool', 'bytes', 'dict', 'float', 'frozenset', 'int', 'list', 'object', 'set', 'str', 'tuple')
# Settings of other projects, read as dicts without importing the projects
SETTINGS = ('yacs.config.CfgNode', 'fvcore.common.config.CfgNode', 'easydict.EasyDict', 'addict.addict.Dict',
            'mmcv.utils.config.ConfigDict', 'mmengine.config.config.ConfigDict',
            'lightning.fabric.utilities.data.AttributeDict', 'pytorch_lightning.utilities.parsing.AttributeDict')
# Texts and numbers of a library's own type, read as plain values
TEXTS = ('torch.torch_version.TorchVersion', 'torchvision.transforms.functional.InterpolationMode',
         'torchvision.transforms.transforms.InterpolationMode')
NUMBERS = ('PIL.Image.Resampling', 'signal.Signals')


def as_list(items: Iterable = (), maxlen: Optional[int] = None) -> list:
    """Read a deque as a list."""
    return list(items)


def as_dict(factory: Optional[type] = None, items: Iterable = ()) -> dict:
    """Read a defaultdict as a dict."""
    return dict(items)


def safe_globals() -> List[Tuple[object, str]]:
    """Return the allowed objects, each with the name that it has in files."""
    named = [(kind, f'{kind.__module__}.{kind.__qualname__}') for kind in PLAIN]
    named += [(getattr(builtins, name), f'builtins.{name}') for name in FACTORIES]
    named += [(as_list, 'collections.deque'), (as_dict, 'collections.defaultdict')]
    named += [(collections.OrderedDict, name) for name in SETTINGS]
    named += [(str, name) for name in TEXTS] + [(int, name) for name in NUMBERS]
    # Paths of Windows can't be made on other systems, only their pure counterparts.
    kinds = {name: getattr(pathlib, name) for name in ('Path', 'PosixPath', 'PurePath', 'PurePosixPath')}
    kinds |= dict.fromkeys(('WindowsPath', 'PureWindowsPath'), pathlib.PureWindowsPath)
    for module in ('pathlib', 'pathlib._local'):  # Python 3.13 renames the module
        named += [(kind, f'{module}.{name}') for name, kind in kinds.items()]
    return named + numpys()


def numpys() -> List[Tuple[object, str]]:
    """Return NumPy's scalars, arrays and their constructors, with their names in NumPy 1 and 2."""
    scalar = np.float64(0).__reduce__()[0]
    reconstruct = np.zeros(0).__reduce__()[0]
    frombuffer = np.zeros(1).__reduce_ex__(5)[0]
    named = [(np.ndarray, 'numpy.ndarray'), (np.dtype, 'numpy.dtype')]
    for module in ('numpy.core', 'numpy._core'):
        named += [(scalar, f'{module}.multiarray.scalar'), (reconstruct, f'{module}.multiarray._reconstruct'),
                  (frombuffer, f'{module}.numeric._frombuffer')]
    named += [(kind, f'numpy.{kind.__name__}') for kind in set(np.sctypeDict.values())]
    return named + [(kind, f'numpy.dtypes.{name}') for name, kind in vars(np.dtypes).items() if isinstance(kind, type)]
