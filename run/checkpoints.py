"""Checkpoint files: plain values and state dicts, written whole or not at all, read without executing anything."""
import contextlib
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
from run.processes import is_main_process, shows_bar
from utils import InputError, RunStopped, abridge, first_line, sync_to_disk, whole_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


WEIGHT_SUFFIXES = ('.pth', '.pt', '.safetensors', '.ckpt', '.bin', '.tar')
DESCRIPTION = ('args', 'classes', 'accuracy', 'epoch')  # what a .safetensors file keeps of a training's checkpoint


def save_checkpoint(state: dict, path: Path, *, keep: Optional[Path] = None, metadata: Optional[dict] = None):
    """Write `state` so that `path` holds either the old file or the whole new one, at every moment.

    Args:
        state: for a path that ends in .safetensors, tensors alone.
        keep: where the old file goes; None: it is replaced.
        metadata: of a path that ends in .safetensors: texts by name.

    Raises:
        RunStopped: the disk is full, or can't be written to; the old file is as it was.
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
            keep_as(path, keep)
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # torch wraps the system's error
        unfinished.unlink(missing_ok=True)
        raise RunStopped(f'{path} can\'t be written ({first_line(error)}); the one before is intact') from None
    with contextlib.suppress(OSError):  # some systems can't do that with a directory
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def keep_as(path: Path, keep: Path):
    """Give a file a second name, so that at no moment there is none under the first."""
    link = keep.with_name(keep.name + '.tmp')
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a file system without links
        os.replace(path, keep)
    else:
        os.replace(link, keep)


def copy_as(path: Path, copy: Path):
    """Give a file that is only ever replaced, never changed, a second name; on the main process.

    Raises:
        RunStopped: it can't be copied.
    """
    if not is_main_process():
        return
    with whole_file(copy) as unfinished:
        unfinished.unlink(missing_ok=True)
        try:
            os.link(path, unfinished)
        except OSError:  # a file system without links
            shutil.copyfile(path, unfinished)


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


def cache_path(url: str) -> Path:
    """Where a download of `url` is kept: torch.hub's cache."""
    return Path(torch.hub.get_dir(), 'checkpoints', Path(urllib.parse.urlparse(str(url)).path).name)


class DownloadError(InputError):
    """A file can't be downloaded."""


def load_checkpoint(source, flag: str) -> dict:
    """Read a checkpoint onto the CPU, without executing anything that it holds.

    Args:
        source: path (.safetensors, or anything that torch.save wrote) or URL (kept in torch.hub's cache).
        flag: the option that named it, for the error's text.

    Raises:
        InputError: not there, damaged, or holding Python objects.
        DownloadError: of these, what the network or the server is to blame for.
    """
    if str(source).startswith('file://'):
        return load_file(Path(urllib.request.url2pathname(urllib.parse.urlparse(source).path)), f'{flag} {source}')
    return load_from_url(str(source), flag) if is_url(source) else load_file(Path(source), f'{flag} {source}')


def load_from_url(url: str, flag: str) -> dict:
    """A file that can't be read is not kept, so that what was cut short is downloaded anew."""
    try:
        path = cache_path(url)
    except ValueError as error:
        raise InputError(f'{flag} {url}: {first_line(error)}') from None
    if path.name == 'checkpoints':
        raise InputError(f'{flag} {url}: has no file\'s name')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        record = open(path.with_name(path.name + '.lock'), 'a+')
    except OSError as error:  # others' cache, that may be read
        if path.exists():
            return load_file(path, f'{flag} {url}: {path}')
        raise DownloadError(f'{flag} {url}: {path.parent} can\'t be written to ({first_line(error)})') from None
    with record:
        wait_for_lock(record)
        if path.exists() and not is_of_another_url(path, record, url):
            try:
                return load_file(path, f'{flag} {url}: {path}')
            except InputError as error:
                print(f'{error}; downloading it again', file=sys.stderr, flush=True)
        checkpoint = download(url, path, flag)
        record.truncate(0)
        record.write(f'{url}\n{path.stat().st_mtime_ns}')
    return checkpoint


def is_of_another_url(path: Path, record, url: str) -> bool:
    """Whether a file in the cache was downloaded from elsewhere: names such as model.safetensors are not unique.

    Args:
        record: open file with the last download's URL and the time stamp of what it brought; empty: none is known.
    """
    record.seek(0)
    origin, _, written = record.read().partition('\n')
    return origin not in ('', url) and written == str(path.stat().st_mtime_ns)  # or else it was put there by hand


def download(url: str, path: Path, flag: str) -> dict:
    """Fetch a checkpoint, and keep it at `path` once it proved to be whole."""
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
        for unfinished in path.parent.glob(f'{glob.escape(fresh.name)}*'):  # an earlier, killed process's too
            unfinished.unlink()
    return checkpoint


def wait_for_lock(file):
    """Return once no other process of this machine has the lock of an open file; it is held until that is closed."""
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks: two processes may download the same
            fcntl.flock(file, fcntl.LOCK_EX)


def load_safetensors(path: Path) -> dict:
    """The tensors of a .safetensors file; as a training's checkpoint, if its metadata say what that would."""
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, 'pt') as file:
        metadata = file.metadata() or {}
    described = described_in(metadata)
    return {'model': tensors, **described} if described else tensors


def metadata_of(checkpoint: dict) -> dict:
    """What a .safetensors file is to keep of a training's checkpoint beside its tensors: texts by name."""
    kept = {key: checkpoint[key] for key in DESCRIPTION if checkpoint.get(key) is not None}
    return {'format': 'pt', **{key: json.dumps(value, default=str) for key, value in kept.items()}}


def described_in(metadata: dict) -> dict:
    """What `metadata_of` has kept; nothing of metadata by others."""
    found = {}
    for key in DESCRIPTION:
        with contextlib.suppress(KeyError, ValueError):
            found[key] = json.loads(metadata[key])
    return found if isinstance(found.get('args'), dict) and 'model' in found['args'] else {}


def problem_of_pickle(path: Path, error: pickle.UnpicklingError) -> str:
    """Why torch refuses a file: something in it that is no plain value, by its name, or damage."""
    found = re.search(r'GLOBAL (\S+)', str(error))
    if found is None:
        return ('damaged, truncated or not a checkpoint of tensors and plain values (files that need Python code to be '
                'run are refused)')
    refused = found[1]
    with contextlib.suppress(Exception):  # only files that are zip archives can be asked
        for other in torch.serialization.get_unsafe_globals_in_checkpoint(path):
            if other.startswith(('torch.nn.modules.', 'timm.models.', 'timm.layers.', 'torchvision.models.')):
                refused = other
    if refused.startswith(('torch.nn.modules.', 'timm.', 'torchvision.')):
        return (f'is a whole pickled model ({refused}), which could run code; where it comes from, save its weights '
                f'alone: torch.save(model.state_dict(), FILE)')
    return (f'holds a Python object of type {refused}, which is refused, since it could run code; where it comes from, '
            f'save the weights alone: torch.save(model.state_dict(), FILE)')


def load_file(path: Path, name: str) -> dict:
    """Read a file, which messages call `name`; see `load_checkpoint`."""
    try:
        if path.is_dir():
            raise IsADirectoryError
        kind = file_kinds.kind_of(path)
        if kind == file_kinds.SAFETENSORS:
            return load_safetensors(path)
        if kind:
            raise InputError(f'{name}: is {kind}')
        with torch.serialization.safe_globals(harmless.safe_globals()), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch's about the format of files that it then refuses
            check_integrity(path)
            with open(path, 'rb') as file:  # of a path, torch believes the suffix
                checkpoint = torch.load(file, map_location='cpu', weights_only=True)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f'{name}: no such file') from None
    except IsADirectoryError:
        inside = sorted(file.name for file in path.iterdir() if file.suffix in WEIGHT_SUFFIXES)
        raise InputError(f'{name}: a directory, not a checkpoint file'
                         + (f'; it has: {abridge(inside, 4)}' if inside else '')) from None
    except pickle.UnpicklingError as error:
        raise InputError(f'{name}: {problem_of_pickle(path, error)}') from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile,
            safetensors.SafetensorError) as error:
        raise InputError(f'{name}: damaged, truncated or not a checkpoint ({first_line(error)})') from None
    if not isinstance(checkpoint, dict):
        raise InputError(f'{name}: holds a {type(checkpoint).__name__}, not a checkpoint')
    return checkpoint
