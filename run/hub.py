"""Weights in repositories of the Hugging Face hub."""
import contextlib
from pathlib import Path
from typing import Optional

import huggingface_hub
import safetensors
from timm.models import load_state_dict_from_hf

from run.checkpoints import DownloadError, load_safetensors
from utils import first_line

PREFIX = 'hf-hub:'  # before the name of a repository
FILE = 'model.safetensors'


def cached_file(name: str) -> Optional[str]:
    """Return the path of a repository's weights in the hub's cache; None if there are none."""
    path = huggingface_hub.try_to_load_from_cache(name, FILE)
    return path if isinstance(path, str) else None


def read(name: str, flag: str) -> dict:
    """Read the weights in a repository of the Hugging Face hub, or raise DownloadError."""
    repository, _, revision = name.partition('@')
    file = dict(repo_id=repository, filename=FILE, revision=revision or None)
    try:
        if huggingface_hub.try_to_load_from_cache(**file) is None:
            # One request checks the connection: a download would retry for most of a minute.
            with contextlib.suppress(huggingface_hub.errors.EntryNotFoundError):
                huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(**file))
        try:
            content = load_state_dict_from_hf(name, weights_only=True)
        except safetensors.SafetensorError:  # the hub's cache is damaged
            huggingface_hub.hf_hub_download(**file, force_download=True)
            content = load_state_dict_from_hf(name, weights_only=True)
        path = huggingface_hub.try_to_load_from_cache(**file)
        return load_safetensors(Path(path)) if isinstance(path, str) else content  # with the description of the weights
    except Exception as error:  # the network, the hub and the file have many kinds of errors
        raise DownloadError(f'{flag} {PREFIX}{name}: can\'t be read from the Hugging Face hub ({first_line(error)}); '
                            f'without a network, give the path of its {FILE}') from None
