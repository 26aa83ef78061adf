"""Checkpoint files: plain values and state dicts, written whole or not at all, read without executing anything."""
import argparse
import os
import pickle
import re
import urllib.error
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Optional

import torch

from utils import InputError, RunStopped, first_line, is_main_process


def save_checkpoint(state: dict, path: Path, *, keep: Optional[Path] = None):
    """Write `state` so that `path` holds either the old file or the whole new one, at every moment.

    Args:
        keep: where the old file goes; None: it is replaced.

    Raises:
        RunStopped: the disk is full, or can't be written to; the old file is as it was.
    """
    if not is_main_process():
        return
    unfinished = path.with_name(path.name + '.tmp')
    try:
        with open(unfinished, 'wb') as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch wraps the system's error
        unfinished.unlink(missing_ok=True)
        raise RunStopped(f'{path} can\'t be written ({first_line(error)}); the one before is intact') from None
    if keep is not None and path.exists():
        os.replace(path, keep)
    os.replace(unfinished, path)


def check_integrity(path):
    """Compare a checkpoint's contents with its checksums, which `torch.load` ignores.

    Raises:
        zipfile.BadZipFile: they differ.
    """
    if not zipfile.is_zipfile(path):  # an old format without checksums
        return
    try:
        with zipfile.ZipFile(path) as archive:
            directories = (entry.filename for entry in archive.infolist() if entry.external_attr & 0x10)
            damaged = archive.testzip() or next(directories, None)
    except (zlib.error, NotImplementedError, RuntimeError) as error:  # what a wrong method or flag looks like
        raise zipfile.BadZipFile(first_line(error)) from None
    if damaged:  # 0x10 marks a directory, as which torch would read nothing at all
        raise zipfile.BadZipFile(f'wrong checksum of {damaged}')


def is_url(source) -> bool:
    return str(source).startswith(('http://', 'https://', 'file://'))


def load_checkpoint(source, flag: str) -> dict:
    """Read a checkpoint onto the CPU, without executing anything that it holds.

    Args:
        source: path or URL (kept in torch.hub's cache).
        flag: the option that named it, for the error's text.

    Raises:
        InputError: not there, damaged, or holding Python objects.
    """
    try:
        # Checkpoints of the original's main.py hold its parsed arguments, which can do no harm.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch's about the format of files that it then refuses
            if is_url(source):
                checkpoint = torch.hub.load_state_dict_from_url(
                    str(source), map_location='cpu', weights_only=True,
                    check_hash=re.search(r'-[0-9a-f]{8,}\.', str(source)) is not None)
            else:
                check_integrity(source)
                checkpoint = torch.load(source, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise InputError(f'{flag} {source}: no such file') from None
    except IsADirectoryError:
        raise InputError(f'{flag} {source}: a directory, not a checkpoint file') from None
    except urllib.error.URLError as error:
        raise InputError(f'{flag} {source}: can\'t be downloaded ({error})') from None
    except pickle.UnpicklingError:
        raise InputError(f'{flag} {source}: damaged, truncated or not a checkpoint of tensors and plain values (files '
                         f'that need Python code to be run are refused)') from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(f'{flag} {source}: damaged, truncated or not a checkpoint ({first_line(error)})') from None
    if not isinstance(checkpoint, dict):
        raise InputError(f'{flag} {source}: holds a {type(checkpoint).__name__}, not a checkpoint')
    return checkpoint
