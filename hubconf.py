"""The models for torch.hub: `torch.hub.load(REPO, 'xcit_small_12_p16', pretrained='fb_in1k')`."""
import contextlib
import pathlib
import sys
import warnings

dependencies = ['huggingface_hub', 'numpy', 'safetensors', 'timm', 'torch', 'torchvision', 'tqdm']

_ROOT = pathlib.Path(__file__).resolve().parent
# Modules that define the models' classes
_MODELS = ('xca', 'xca_gram', 'xcit', 'xcit_fuse', 'xcit_linear', 'xcit_timm', 'xcit_train', 'xcit_zoo')
_FILES = ('run', 'utils', 'weights', *_MODELS)  # modules of this repository that the models need


@contextlib.contextmanager
def _own_modules():
    """Import this repository's files inside this context, even if the caller has modules of the same names.

    An installed copy of the models that equals this one serves both. Afterwards the caller's modules are restored.
    Modules of the models that the caller does not have stay imported, since pickling needs the modules.
    """
    others = {name: sys.modules[name] for name in _imported() if not _is_own(sys.modules[name])}
    models = {name: others[name] for name in _MODELS if name in others}
    if all(map(_is_equal, models.values())):
        others = {name: module for name, module in others.items() if name not in models}
        models = {}
    elif hasattr(models.get('xcit'), 'Xcit'):
        warnings.warn(f'{models["xcit"].__file__}, which is imported, is another version than {_ROOT / "xcit.py"}: '
                      f'functions of the one, as xcit.fuse, refuse models of the other', stacklevel=4)
    for name in others:
        del sys.modules[name]
    before = set(_imported())
    sys.path.insert(0, str(_ROOT))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', message='Overwriting xcit_')  # of timm; the warning above has the reason
            yield
    finally:
        sys.path.remove(str(_ROOT))
        for name in set(_imported()) - before - set(() if models else _MODELS):
            del sys.modules[name]
        sys.modules.update(others)


def _imported() -> list:
    """Return names of imported modules that are names of files here, also of modules that come from elsewhere."""
    return [name for name in sys.modules if name.split('.')[0] in _FILES]


def _is_own(module) -> bool:
    file = getattr(module, '__file__', None)
    return file is not None and pathlib.Path(file).resolve().parent in (_ROOT, _ROOT / 'run')


def _is_equal(module) -> bool:
    """Return True if a module of another folder has the content of this repository's file."""
    file = getattr(module, '__file__', None)
    return file is not None and pathlib.Path(file).read_bytes() == (_ROOT / f'{module.__name__}.py').read_bytes()


def _entry_point(name: str, size: str, patch_size: int):
    def entry_point(pretrained=False, **kwargs):
        with _own_modules():
            import weights
        return weights.create_model(name, pretrained, **kwargs)

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__doc__ = f"""XCiT {size} with {patch_size} x {patch_size} pixel patches.

    Args:
        pretrained: False (random weights), True (published weights for 224 pixels), a tag of published weights
            (fb_in1k, fb_dist_in1k, fb_dist_in1k_384, for some models fb_dino), a path, a URL or hf-hub:OWNER/NAME.
        kwargs: arguments of timm and of the model, e.g. num_classes, drop_path_rate, features_only. Default of
            num_classes: as many as the weights; another number: an untrained head.
    """
    return entry_point


# Written out, since torch.hub imports this file before it checks `dependencies`, which xcit.py needs.
for _size in ('nano_12', 'tiny_12', 'tiny_24', 'small_12', 'small_24', 'medium_24', 'large_24'):
    for _patch_size in (16, 8):
        _name = f'xcit_{_size}_p{_patch_size}'
        globals()[_name] = _entry_point(_name, _size, _patch_size)
