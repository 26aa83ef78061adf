"""The models for torch.hub: `torch.hub.load(REPO, 'xcit_small_12_p16', pretrained='fb_in1k')`."""
import contextlib
import pathlib
import sys

dependencies = ['huggingface_hub', 'numpy', 'safetensors', 'timm', 'torch', 'torchvision', 'tqdm']

# Where the models' classes are
_MODELS = ('xca', 'xcit', 'xcit_fuse', 'xcit_linear', 'xcit_timm', 'xcit_train', 'xcit_zoo')
_FILES = ('run', 'utils', 'weights', *_MODELS)  # of this repository, that the models need


@contextlib.contextmanager
def _own_modules():
    """A context in which imports find this repository's files, whatever the caller has imported under their names.

    After it the caller has its own modules back; those of the models stay where there were none: pickling needs them.
    """
    others = {name: sys.modules.pop(name) for name in _named() if not _is_own(sys.modules[name])}
    before = set(_named())
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    try:
        yield
    finally:
        sys.path.remove(str(pathlib.Path(__file__).parent))
        for name in set(_named()) - before - set(_MODELS):
            del sys.modules[name]
        sys.modules.update(others)


def _named() -> list:
    """Modules that are imported under the names of this repository's files, whoever they are of."""
    return [name for name in sys.modules if name.split('.')[0] in _FILES]


def _is_own(module) -> bool:
    file = getattr(module, '__file__', None)
    root = pathlib.Path(__file__).resolve().parent
    return file is not None and pathlib.Path(file).resolve().parent in (root, root / 'run')


def _entry_point(name: str, size: str, patch_size: int):
    def entry_point(pretrained=False, **kwargs):
        with _own_modules():
            import weights
        return weights.create_model(name, pretrained, **kwargs)

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__doc__ = f"""XCiT {size} with {patch_size} x {patch_size} pixel patches.

    Args:
        pretrained: False: random weights; True: the published ones for 224 pixels; or a tag of theirs (fb_in1k,
            fb_dist_in1k, fb_dist_in1k_384, for some models fb_dino), a path, a URL, or hf-hub:OWNER/NAME.
        kwargs: timm's and the model's, e.g. num_classes, drop_path_rate, features_only. Without num_classes, the
            model has as many as its weights; with another number, a fresh head.
    """
    return entry_point


# Not read from xcit.py: torch.hub imports this file first, then tells which dependencies are missing.
for _size in ('nano_12', 'tiny_12', 'tiny_24', 'small_12', 'small_24', 'medium_24', 'large_24'):
    for _patch_size in (16, 8):
        _name = f'xcit_{_size}_p{_patch_size}'
        globals()[_name] = _entry_point(_name, _size, _patch_size)
