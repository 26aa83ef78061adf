"""Checkpoint files of plain values and state dicts: written completely or not at all, read without executing code."""
import contextlib
import fcntl
import glob
import http.client
import json
import os
import pickle
import re
import shutil
import sys
import urllib.parse
import urllib.request
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Optional

import safetensors
import safetensors.torch
import torch

from run import file_kinds, harmless
from run.output import shows_bar, write_line
from run.processes import is_main_process
from utils import InputError, RunStopped, abridge, first_line, sync_to_disk, utf8_name, whole_file

WEIGHT_SUFFIXES = ('.pth', '.pt', '.safetensors', '.ckpt', '.bin', '.tar')
DESCRIPTION = ('args', 'classes', 'accuracy', 'epoch')  # keys of a run's checkpoint that describe its weights


def save_checkpoint(state: dict, path: Path, *, keep: Optional[Path] = None, metadata: Optional[dict] = None):
    """Write `state` so that `path` is either the old file or the complete new one, at every moment.

    Args:
        state: content; only tensors for a path that ends in .safetensors.
        keep: new path of the old file; None: the old file is replaced.
        metadata: texts by name, for a path that ends in .safetensors.

    Raises:
        RunStopped: the file can't be written, e.g. to a full disk; the old file is unchanged.
    """
    if not is_main_process():
        return
    unfinished = path.with_name(path.name + '.tmp')
    try:
        with open(unfinished, 'wb') as file:
            if path.suffix == '.safetensors':
                file.write(safetensors.torch.save(state, metadata=metadata or {'format': 'pt'}))
            else:
                torch.save(state, file)
            sync_to_disk(file)
        if keep is not None and path.exists():
            copy_file(path, keep, is_replaced=True)
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # torch wraps the system's error
        unfinished.unlink(missing_ok=True)
        raise RunStopped(f'{path} can\'t be written ({first_line(error)}); the previous file is intact') from None
    with contextlib.suppress(OSError):  # some systems can't sync a directory
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def save_weights(tensors: dict, description: dict, path: Path):
    """Write a model's weights with their description, a dict with keys of DESCRIPTION that `args` is one of.

    The weights are the entry `model` beside the description, as in the original's files; in a .safetensors file the
    description is metadata. timm loads both kinds.
    """
    if path.suffix == '.safetensors':
        save_checkpoint(tensors, path, metadata=metadata_of(description))
    else:
        save_checkpoint({'model': tensors, **description}, path)


def copy_file(path: Path, copy: Path, *, is_replaced: bool = False):
    """Hard-link `path` to `copy` on the main process; a linked file must never be changed, only replaced.

    On a file system without links the file is copied, or only renamed if `path` is replaced next (`is_replaced`).

    Raises:
        RunStopped: the copy can't be written.
    """
    if not is_main_process():
        return
    with whole_file(copy) as unfinished:
        unfinished.unlink(missing_ok=True)
        try:
            os.link(path, unfinished)
        except OSError:
            (os.replace if is_replaced else shutil.copyfile)(path, unfinished)


def check_integrity(path):
    """Raise BadZipFile if a checkpoint's content differs from its checksums, which `torch.load` ignores."""
    if not zipfile.is_zipfile(path):  # an old format without checksums
        return
    try:
        with zipfile.ZipFile(path) as archive:
            # 0x10 marks a directory, which torch would read as an empty entry
            directories = (entry.filename for entry in archive.infolist() if entry.external_attr & 0x10)
            damaged = archive.testzip() or next(directories, None)
    except (zlib.error, NotImplementedError, RuntimeError) as error:  # from a damaged method or flag
        raise zipfile.BadZipFile(first_line(error)) from None
    if damaged:
        raise zipfile.BadZipFile(f'wrong checksum of {damaged}')


def is_url(source) -> bool:
    return str(source).startswith(('http://', 'https://', 'file://'))


def cache_path(url: str) -> Path:
    """Return the path of a download in torch.hub's cache."""
    return Path(torch.hub.get_dir(), 'checkpoints', Path(urllib.parse.urlparse(str(url)).path).name)


class DownloadError(InputError):
    """Failure of a download."""


def load_checkpoint(source, flag: str) -> dict:
    """Read a checkpoint onto the CPU, without executing any code in it.

    Args:
        source: path of a .safetensors file or a file of torch.save, or a URL (kept in torch.hub's cache).
        flag: flag that named the source, for errors.

    Raises:
        InputError: the file does not exist, is damaged, or contains Python objects.
        DownloadError: the network or the server fails.
    """
    if str(source).startswith('file://'):
        return load_file(Path(urllib.request.url2pathname(urllib.parse.urlparse(source).path)), f'{flag} {source}')
    return load_from_url(str(source), flag) if is_url(source) else load_file(Path(source), f'{flag} {source}')


def load_from_url(url: str, flag: str) -> dict:
    """Read a checkpoint from torch.hub's cache, or download it; a file that can't be read is not kept."""
    try:
        path = cache_path(url)
    except ValueError as error:
        raise InputError(f'{flag} {url}: {first_line(error)}') from None
    if path.name == 'checkpoints':
        raise InputError(f'{flag} {url}: has no file name')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        record = open(path.with_name(path.name + '.lock'), 'a+')  # URL and time stamp of the last download
    except OSError as error:  # the cache of another user may be readable
        if path.exists():
            return load_file(path, f'{flag} {url}: {path}')
        raise DownloadError(f'{flag} {url}: {path.parent} can\'t be written to ({first_line(error)})') from None
    with record:
        with contextlib.suppress(OSError):  # a file system without locks: two processes may download the same file
            fcntl.flock(record, fcntl.LOCK_EX)  # until the record is closed
        if path.exists() and not is_of_another_url(path, record, url):
            try:
                return load_file(path, f'{flag} {url}: {path}')
            except InputError as error:
                write_line(f'{error}; downloading the file again', stream=sys.stderr)
        checkpoint = download(url, path, flag)
        record.truncate(0)
        record.write(f'{url}\n{path.stat().st_mtime_ns}')
    return checkpoint


def is_of_another_url(path: Path, record, url: str) -> bool:
    """Return True if a file in the cache comes from another URL: names such as model.safetensors are not unique."""
    record.seek(0)
    origin, _, written = record.read().partition('\n')
    return origin not in ('', url) and written == str(path.stat().st_mtime_ns)  # else a user put the file there


def download(url: str, path: Path, flag: str) -> dict:
    """Download a checkpoint, and keep it at `path` if it can be read."""
    hash_in_name = re.search(r'-([0-9a-f]{8,})\.', path.name)
    fresh = path.with_name(f'new-{path.name}')
    try:
        torch.hub.download_url_to_file(url, str(fresh), hash_in_name and hash_in_name[1], progress=shows_bar())
        checkpoint = load_file(fresh, f'{flag} {url}: the downloaded file')
        os.replace(fresh, path)
    except (OSError, http.client.HTTPException) as error:  # urllib's errors are OSErrors
        raise DownloadError(f'{flag} {url}: can\'t be downloaded ({first_line(error)}); without a network, put the '
                            f'file at {path}') from None
    except InputError as error:
        raise DownloadError(str(error)) from None
    except (RuntimeError, ValueError) as error:  # a wrong hash; a malformed URL
        raise DownloadError(f'{flag} {url}: {first_line(error)}') from None
    finally:
        for unfinished in path.parent.glob(f'{glob.escape(fresh.name)}*'):  # files of killed processes, too
            unfinished.unlink()
    return checkpoint


def load_safetensors(path: Path) -> dict:
    """Read a .safetensors file: its tensors, or a run's checkpoint if its metadata come from `metadata_of`."""
    with utf8_name(path) as name:
        tensors = safetensors.torch.load_file(name)
        with safetensors.safe_open(name, 'pt') as file:
            metadata = file.metadata() or {}
    description = description_of(metadata)
    return {'model': tensors, **description} if description else tensors


def metadata_of(checkpoint: dict) -> dict:
    """Return metadata for a .safetensors file that describe a run's checkpoint: texts by name."""
    described = {key: checkpoint[key] for key in DESCRIPTION if checkpoint.get(key) is not None}
    return {'format': 'pt', **{key: json.dumps(value, default=str) for key, value in described.items()}}


def description_of(metadata: dict) -> dict:
    """Return the content of `metadata_of`; empty for metadata of other programs."""
    description = {}
    for key in DESCRIPTION:
        with contextlib.suppress(KeyError, ValueError):
            description[key] = json.loads(metadata[key])
    args = description.get('args')
    return description if isinstance(args, dict) and {'model', 'arch'} & args.keys() else {}


def problem_of_pickle(path: Path, error: pickle.UnpicklingError) -> str:
    """Return the reason why torch refuses a file: damage, or an object that is not a plain value, with its type."""
    match = re.search(r'GLOBAL (\S+)', str(error))
    if match is None:
        return ('damaged, truncated or not a checkpoint of tensors and plain values (files that need code '
                'to be executed are refused)')
    refused = match[1]
    with contextlib.suppress(Exception):  # only works for zip archives
        for other in torch.serialization.get_unsafe_globals_in_checkpoint(path):
            if other.startswith(('torch.nn.modules.', 'timm.models.', 'timm.layers.', 'torchvision.models.')):
                refused = other
    is_model = refused.startswith(('torch.nn.modules.', 'timm.', 'torchvision.'))
    problem = f'is a whole pickled model ({refused})' if is_model else f'contains a Python object of type {refused}'
    return (f'{problem}, which is refused because unpickling could execute code; in the program that wrote the file, '
            f'save the weights alone: torch.save(model.state_dict(), FILE)')


def load_file(path: Path, name: str) -> dict:
    """Read a file as `load_checkpoint` does; `name` is its name in messages."""
    try:
        if path.is_dir():
            raise IsADirectoryError
        kind = file_kinds.kind_of(path)
        if kind == file_kinds.SAFETENSORS:
            return load_safetensors(path)
        if kind:
            raise InputError(f'{name}: is {kind}')
        with torch.serialization.safe_globals(harmless.safe_globals()), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about the format of files that torch then refuses
            check_integrity(path)
            with open(path, 'rb') as file:  # from a path, torch would rely on the suffix
                checkpoint = torch.load(file, map_location='cpu', weights_only=True)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f'{name}: no such file') from None
    except IsADirectoryError:
        files = sorted(file.name for file in path.iterdir() if file.suffix in WEIGHT_SUFFIXES)
        raise InputError(f'{name}: a directory, not a checkpoint file'
                         + (f'; its files: {abridge(files, 4)}' if files else '')) from None
    except pickle.UnpicklingError as error:
        raise InputError(f'{name}: {problem_of_pickle(path, error)}') from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile,
            safetensors.SafetensorError) as error:
        raise InputError(f'{name}: damaged, truncated or not a checkpoint ({first_line(error)})') from None
    if not isinstance(checkpoint, dict):
        raise InputError(f'{name}: contains a {type(checkpoint).__name__}, not a checkpoint')
    return checkpoint
