"""What files of others hold beside tensors and plain values, and may: types whose objects can do no harm.

torch.load(weights_only=True) makes nothing but what is named here and in torch's own list, and calls nothing else.
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
# Settings of other projects, as the dicts that they are; their own classes are not imported
SETTINGS = ('yacs.config.CfgNode', 'fvcore.common.config.CfgNode', 'easydict.EasyDict', 'addict.addict.Dict',
            'mmcv.utils.config.ConfigDict', 'mmengine.config.config.ConfigDict',
            'lightning.fabric.utilities.data.AttributeDict', 'pytorch_lightning.utilities.parsing.AttributeDict')
# Words and numbers of a library's own type, as plain ones
WORDS = ('torch.torch_version.TorchVersion', 'torchvision.transforms.functional.InterpolationMode',
         'torchvision.transforms.transforms.InterpolationMode')
NUMBERS = ('PIL.Image.Resampling', 'signal.Signals')


def as_list(items: Iterable = (), maxlen: Optional[int] = None) -> list:
    """What a deque becomes."""
    return list(items)


def as_dict(factory: Optional[type] = None, items: Iterable = ()) -> dict:
    """What a defaultdict becomes."""
    return dict(items)


def safe_globals() -> List[Tuple[object, str]]:
    """Objects that a file may ask for, by the names that it may ask for them with."""
    named = [(kind, f'{kind.__module__}.{kind.__qualname__}') for kind in PLAIN]
    named += [(getattr(builtins, name), f'builtins.{name}') for name in FACTORIES]
    named += [(as_list, 'collections.deque'), (as_dict, 'collections.defaultdict')]
    named += [(collections.OrderedDict, name) for name in SETTINGS]
    named += [(str, name) for name in WORDS] + [(int, name) for name in NUMBERS]
    # A path of another system can't be made on this one. Python 3.13 calls the module otherwise.
    for module in ('pathlib', 'pathlib._local'):
        for flavour, pure in (('Posix', pathlib.PurePosixPath), ('Windows', pathlib.PureWindowsPath)):
            own = getattr(pathlib, f'{flavour}Path')
            here = isinstance(pathlib.Path(), own)
            named += [(own if here else pure, f'{module}.{flavour}Path'), (pure, f'{module}.Pure{flavour}Path')]
        named += [(pathlib.Path, f'{module}.Path'), (pathlib.PurePath, f'{module}.PurePath')]
    return named + numpys()


def numpys() -> List[Tuple[object, str]]:
    """Scalars and arrays, as NumPy 1 and 2 call what makes them, whichever is installed."""
    scalar = np.float64(0).__reduce__()[0]
    reconstruct = np.zeros(0).__reduce__()[0]
    frombuffer = np.zeros(1).__reduce_ex__(5)[0]
    named = [(np.ndarray, 'numpy.ndarray'), (np.dtype, 'numpy.dtype')]
    for module in ('numpy.core', 'numpy._core'):
        named += [(scalar, f'{module}.multiarray.scalar'), (reconstruct, f'{module}.multiarray._reconstruct'),
                  (frombuffer, f'{module}.numeric._frombuffer')]
    named += [(kind, f'numpy.{kind.__name__}') for kind in set(np.sctypeDict.values())]
    return named + [(kind, f'numpy.dtypes.{name}') for name, kind in vars(np.dtypes).items() if isinstance(kind, type)]
