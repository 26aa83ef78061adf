"""Weights of models: reading from a published tag, a file, a URL or the Hugging Face hub, and loading into a model."""
import contextlib
import dataclasses
import functools
import hashlib
import re
from pathlib import Path
from typing import List, Optional, Set, Tuple

import timm
import torch

import xcit
import xcit_zoo
from run import checkpoints, hub
from run.descriptions import trained_with
from run.output import detail, log
from utils import InputError, abridge, counted, first_line, similar


@dataclasses.dataclass
class Weights:
    """Weights of a model, and the description of their file.

    Args:
        tensors: tensors by name, in the naming of the published files.
        source: flag and value that gave the weights, for messages; '' if the caller adds them.
        description: place of the weights in the file, for messages.
        checkpoint: content of the whole file, with other keys beside the weights (`args`, `classes`, `epoch`).
        expected: name of the model that the weights must match, and its flag, for messages; both '' if unknown.
        entry: keys of the weights' dict in the file, joined by dots, e.g. 'model_ema'.
        details: changes of the names, and tensors that are not used, for --verbose.
    """
    tensors: dict
    source: str
    description: str
    checkpoint: dict
    expected: Tuple[str, str] = ('', '')
    entry: str = ''
    details: str = ''



# ---------------------------------------------------------------------------------------------------------------------
# Models by name

def without_resolution(name: str) -> str:
    """Return a model's name without its tag, an XCiT's also without timm's resolution."""
    base = name.partition('.')[0]
    short = re.sub(r'_(224|384)$', '', base)
    return short if short in xcit.MODELS else base


def refuse_other_model(own: Optional[str], name: str, flag: str = '--model', *, source: str):
    """Raise InputError if weights of the model `own` (None: unknown) are not those of `name`, which `flag` gave."""
    if own and without_resolution(own) != without_resolution(name):
        raise InputError(about(source, f'checkpoint is {own}, {flag} is {name}'))


def check_model(flag: str, name: str):
    """Raise InputError, with similar names, if timm has no model or tag of the name given by `flag`."""
    base, _, tag = name.partition('.')
    if not timm.is_model(base):
        raise InputError(f'{flag} {name}: no such model{similar(name, xcit.MODELS + timm.list_models())}')
    known = [full.partition('.')[2] for full in timm.list_pretrained(f'{base}.*')]
    if tag and tag not in known:
        raise InputError(f'{flag} {name}: {base} has no such tag; its tags: {", ".join(known)}')


@torch.no_grad()
def problem_with_size(model: torch.nn.Module, size: Tuple[int, int]) -> str:
    """Return the reason why a model in eval mode does not accept images of (img_h, img_w); '' if the model does."""
    try:
        model(torch.zeros(1, 3, *size))
        return ''
    except (AssertionError, RuntimeError, ValueError) as error:
        return first_line(error)


def check_input_size(model: torch.nn.Module, size: int, name: str):
    """Raise InputError if a model, called `name`, does not accept square images of `size` pixels."""
    if problem := problem_with_size(model.eval(), (size, size)):
        raise InputError(f'--input-size {size}: {name} can\'t use this size ({problem})')


def create_backbone(name: str, given: Optional[Weights] = None, **kwargs) -> torch.nn.Module:
    """Build a timm model without a head, with the weights `given`, whose head is dropped, or random weights."""
    model = timm.create_model(name, num_classes=0, **kwargs)
    if given is not None:
        head = set(head_keys(model))
        load(model, dataclasses.replace(given, tensors={k: v for k, v in given.tensors.items() if k not in head}))
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Sources of weights

def tags(model_name: str) -> List[str]:
    """List the tags of a model's published checkpoints, e.g. 'fb_in1k'."""
    return [published.tag for published in xcit_zoo.ZOO.values() if published.model == model_name.split('.')[0]]


def published(model_name: str, tag: str) -> Optional[xcit_zoo.Published]:
    """Return the published checkpoint of a tag; None if there is none. `model_name` is empty if in front of the tag."""
    base = model_name.partition('.')[0]
    entry = xcit_zoo.ZOO.get(tag) or xcit_zoo.ZOO.get(f'{base}.{tag}')
    return entry if entry and base in ('', entry.model) else None


def published_as(given: str, model_name: str = '') -> Optional[xcit_zoo.Published]:
    """Return the published checkpoint with this tag of the model, full name, URL or file name; None: there is none."""
    addressed = (entry for entry in xcit_zoo.ZOO.values()
                 if given == f'{hub.PREFIX}{entry.hf_hub_id}' or Path(given).name == Path(entry.url).name)
    return published(model_name, given) or published('', given) or next(addressed, None)


def check_exists(given: str, flag: str, model_name: str, *, model_flag: str = '--model'):
    """Raise InputError with the allowed tags unless `given` by `flag` is a tag, a URL, or an existing file."""
    is_address = given.startswith(hub.PREFIX) or checkpoints.is_url(given)
    if is_address or published(model_name, given) or Path(given).exists():
        return
    if other := published('', given):
        raise InputError(f'{flag} {given}: checkpoint is {other.model}, {model_flag} is {model_name}')
    models = [entry.model for entry in xcit_zoo.ZOO.values() if entry.tag == given]
    if models and not model_name:
        allowed = f'; a tag needs its model\'s name in front: {models[0]}.{given}'
    else:
        allowed = f'; tags of {model_name}: {", ".join(tags(model_name))}' if tags(model_name) else ''
    raise InputError(f'{flag} {given}: no such file{allowed}')


def read(given: str, flag: str, model_name: str = '', *, use_ema: bool = False, key: str = '',
         model_flag: str = '--model') -> Weights:
    """Read weights from any place.

    Args:
        given: tag of the model, path (.pth or .safetensors), URL, or `hf-hub:OWNER/NAME`.
        flag: flag that gave `given`, for messages.
        model_name: name of the model; '': the name in the file, or any XCiT.
        use_ema: read the EMA in a run's checkpoint.
        key: place of the weights in a file that has several sets.
        model_flag: flag that gave `model_name`, for messages.

    Raises:
        InputError: the file does not exist, is damaged, or has no weights.
    """
    content = read_content(given, flag, model_name)
    name = model_name or model_of_training(content) or ''
    own = names_of(name) if timm.is_model(name.partition('.')[0]) else None
    return extract(content, f'{flag} {given}', own=own, use_ema=use_ema, key=key, expected=(model_name, model_flag))


def read_content(given: str, flag: str, model_name: str = '') -> dict:
    """Read the content of a file; see `read` for arguments and errors."""
    if checkpoint := published(model_name, given):
        return read_published(checkpoint, flag)
    if given.startswith(hub.PREFIX):
        return hub.read(given.removeprefix(hub.PREFIX), flag)
    return checkpoints.load_checkpoint(given, flag)


def read_published(checkpoint: xcit_zoo.Published, flag: str) -> dict:
    """Read a published checkpoint from the cache, the authors' host or the hub, in this order."""
    cached = hub.cached_file(checkpoint.hf_hub_id) if checkpoint.hf_hub_id else None
    if cached is not None:
        with contextlib.suppress(InputError):  # a damaged file is downloaded again below
            return checkpoints.load_checkpoint(cached, flag)
    try:
        return checkpoints.load_checkpoint(checkpoint.url, flag)
    except checkpoints.DownloadError as error:
        if not checkpoint.hf_hub_id:
            raise
        try:
            return hub.read(checkpoint.hf_hub_id, flag)
        except checkpoints.DownloadError:
            raise error from None


# ---------------------------------------------------------------------------------------------------------------------
# Weights in files

def about(source: str, message: str) -> str:
    """Prefix a message with the source, if there is a source."""
    return f'{source}: {message}' if source else message


def extract(checkpoint: dict, source: str, *, own: Optional[Set[str]] = None, use_ema: bool = False, key: str = '',
            expected: Tuple[str, str] = ('', '')) -> Weights:
    """Find the weights in the content of a file, and rename them to the published names.

    Supported are published files, bare state dicts, DINO's runs (the teacher's backbone), timm's naming, and nesting
    and prefixes of other programs.

    Args:
        own: names of the model's weights (`names_of`); None: any XCiT.
        use_ema: choose the EMA.
        key: place of the weights in the file, or prefix of their names, if there are several sets.
        expected: see `Weights`.

    Raises:
        InputError: there are no weights, several sets that differ, or weights of another task.
    """
    candidates = xcit_zoo.find_weights(checkpoint, own or names_of(''))
    refuse_other_tasks(checkpoint, source)
    if not candidates:
        refuse_linear(checkpoint, source)
    try:
        chosen = xcit_zoo.choose(candidates, average=use_ema, key=key)
    except ValueError as error:
        raise InputError(about(source, f'{error}; choose one set by --checkpoint-key')) from None
    if chosen is None and key:
        labels = ', '.join(candidate.label for candidate in candidates) or abridge(list(checkpoint))
        raise InputError(about(source, f'no weights under {key} (--checkpoint-key); the file has: {labels}'))
    if chosen is None and use_ema:
        raise InputError(f'{source}: has no EMA (--use-ema); its keys: {abridge(list(checkpoint))}')
    chosen = chosen or weights_of_another_model(checkpoint)
    if chosen is None:
        raise InputError(about(source, f'no weights under \'model\'; the file has: {abridge(list(checkpoint))}'))
    is_of_timm, removed = xcit_zoo.has_timm_names(chosen.tensors), [*chosen.cleared, *filter(None, [chosen.prefix])]
    epoch = '' if (number := xcit_zoo.last_epoch(checkpoint)) is None else f', epoch {number}'
    notes = [f'names without {" and ".join(removed)}' if removed else '',
             'timm\'s names' if is_of_timm else '',
             f'{counted(len(chosen.beside), "other tensor", "are")} ignored ({abridge(chosen.beside, 3)})'
             if chosen.beside else '']
    description = (f'weights under \'{chosen.entry}\'' if chosen.entry else 'weights alone') + epoch
    tensors = xcit_zoo.from_timm_names(chosen.tensors) if is_of_timm else chosen.tensors
    return Weights(tensors, source, description, checkpoint, expected, chosen.entry, ', '.join(filter(None, notes)))


def weights_of_another_model(checkpoint: dict) -> Optional[xcit_zoo.Found]:
    """Return the weights in a file of an unknown model, under the keys that most programs use; None: no weights."""
    dicts = dict(xcit_zoo.dicts_of_tensors(checkpoint))
    for entry in ('model', 'state_dict', 'teacher', ''):
        if entry in dicts:
            tensors, cleared = xcit_zoo.without_wrappers(dicts[entry])
            prefix = 'module.' if all(key.startswith('module.') for key in tensors) else ''
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
            return xcit_zoo.Found(entry, prefix, tensors, [], cleared)
    return None


def refuse_other_tasks(checkpoint: dict, source: str):
    """Raise InputError if a file contains a detector or a segmenter."""
    for _, tensors in xcit_zoo.dicts_of_tensors(checkpoint):
        if parts := xcit_zoo.of_other_task(list(tensors)):
            raise InputError(about(source, f'the weights of a detector or a segmenter ({", ".join(parts)}), not of a '
                                           f'classifier or a backbone'))


def refuse_linear(checkpoint: dict, source: str):
    """Raise InputError if a file only contains linear classifiers, as linear.pth of dino.linear."""
    found = [tensors for _, tensors in xcit_zoo.dicts_of_tensors(checkpoint)]
    if found and all(map(xcit_zoo.is_linear, found)):
        shape = next(tuple(value.shape) for value in found[0].values() if value.ndim == 2)
        raise InputError(about(
            source, f'a linear classifier alone, of {shape[1]} features for {counted(shape[0], "class")}, without '
                    'its backbone; both as one model: classifier.pth beside it, or python -m '
                    'dino.linear --evaluate --linear-weights FILE --save-classifier MODEL.pth'))


@functools.cache
def names_of(model_name: str) -> Set[str]:
    """Return the names of a model's weights, in the published naming and in timm's; '': of all XCiT models."""
    if not model_name:
        return names_of('xcit_large_24_p16') | names_of('xcit_large_24_p8')
    base = model_name.partition('.')[0]
    try:
        with torch.device('meta'):
            names = timm.create_model(base).state_dict()
    except (RuntimeError, NotImplementedError, TypeError):  # some models can't be built without storage
        names = timm.create_model(base).state_dict()
    return xcit_zoo.in_both_namings(names)


# ---------------------------------------------------------------------------------------------------------------------
# Into a model

def num_classes(name: str, given: Weights) -> int:
    """Return the number of classes of the head in weights of the model `name`; 0: there is no head."""
    head = timm.models.get_pretrained_cfg_value(name, 'classifier') or 'head'
    bias = given.tensors.get(f'{head}.bias')
    return 0 if bias is None else len(bias)


def named_for(model: torch.nn.Module, weights: Weights) -> dict:
    """Return the weights under the model's own names, which are timm's for timm's XCiT."""
    return xcit_zoo.to_timm_names(weights.tensors) if xcit_zoo.has_timm_names(model.state_dict()) else weights.tensors


def head_keys(model: torch.nn.Module) -> List[str]:
    """Return the names of weight and bias of a model's head."""
    return [f'{getattr(model, "default_cfg", {}).get("classifier", "head")}.{part}' for part in ('weight', 'bias')]


def check(model: torch.nn.Module, weights: Weights):
    """Raise InputError if weights, other than the head's, are missing, unexpected or of another shape."""
    own, given, head = model.state_dict(), named_for(model, weights), head_keys(model)
    problems = {
        'missing keys': [k for k in own if k not in given],
        'unexpected keys': [k for k in given if k not in own],
        'other shapes': [f'{k} {tuple(getattr(given[k], "shape", ()))}, model has {tuple(own[k].shape)}'
                         for k in own if k in given and getattr(given[k], 'shape', None) != own[k].shape]}
    problems = {problem: keys for problem, keys in problems.items() if any(k.split()[0] not in head for k in keys)}
    if problems and weights.expected[0]:
        refuse_other_model(model_in(weights.checkpoint), *weights.expected, source=weights.source)
    if problems:
        details = '; '.join(f'{problem}: {abridge(keys, 3)}' for problem, keys in problems.items())
        raise InputError(about(weights.source, f'the weights do not match this model; {details}'))


def load(model: torch.nn.Module, weights: Weights, *, new_head: bool = False):
    """Load all weights into `model`.

    Args:
        new_head: keep the model's new head if the weights have a head for another number of classes, or no head.

    Raises:
        InputError: a weight is missing, unexpected, or has another shape.
    """
    check(model, weights)
    own, given = model.state_dict(), named_for(model, weights)
    weight, bias = head_keys(model)
    if weights.source:
        log(f'{weights.source}: {weights.description}')
        detail(weights.details)
    if any(getattr(own.get(k), 'shape', None) != getattr(given.get(k), 'shape', None) for k in (weight, bias)):
        if weight not in given:
            problem = 'have no head'
        elif weight not in own:
            problem = f'have a head for {counted(len(given[weight]), "class")}, and the model has no head'
        elif bias not in given:
            problem = f'have a head without {bias}'
        elif len(given[weight]) != len(own[weight]):
            problem = f'are for {counted(len(given[weight]), "class")}, not {len(own[weight])}'
        else:
            problem = (f'have a head of another width: {weight} {tuple(given[weight].shape)}, model has '
                       f'{tuple(own[weight].shape)}')
        if weight in own and not new_head:
            raise InputError(about(weights.source, f'the weights {problem}'))
        log(about(weights.source, f'the weights {problem}: all but the head is loaded'))
        given = {k: v for k, v in given.items() if k not in (weight, bias)}
    model.load_state_dict(given, strict=False)  # checked above, with a better error


class ModelPart:
    """Model as a part of a run (run.parts), with its weights in any naming; `name`: value of --model."""

    def __init__(self, model: torch.nn.Module, name: str = ''):
        self.model, self.name = model, name

    def state_dict(self) -> dict:
        return self.model.state_dict()

    def load_state_dict(self, state: dict):
        load(self.model, extract({'model': state}, '', own=xcit_zoo.in_both_namings(self.model.state_dict()),
                                 expected=(self.name, '--model')))


def model_of_training(checkpoint: dict) -> Optional[str]:
    """Return the name of the model in a file's description, an XCiT's without resolution; None if there is none."""
    flags = trained_with(checkpoint)
    names = (flags.get('model'), flags.get('arch'), checkpoint.get('arch'))
    name = next((name for name in names if isinstance(name, str) and name), None)
    return without_resolution(name) if name and without_resolution(name) in xcit.MODELS else name


def model_in(checkpoint: dict) -> Optional[str]:
    """Return the name of the timm model in a file's description, or of the XCiT with its weights; None: unknown."""
    name = model_of_training(checkpoint)
    if name and timm.is_model(name.partition('.')[0]):
        return name
    found = xcit_zoo.find_weights(checkpoint, names_of(''))
    return next(filter(None, (xcit.name_with(xcit_zoo.from_timm_names(part.tensors)) for part in found)), None)


def backbone_state(model: torch.nn.Module) -> dict:
    """Return a model's weights without the head."""
    head = head_keys(model)
    return {key: value for key, value in model.state_dict().items() if key not in head}


def fingerprint(model: torch.nn.Module) -> str:
    """Return a digest of a model's weights without the head."""
    digest = hashlib.sha256()
    for key, value in sorted(backbone_state(model).items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def create_model(name: str, pretrained=False, **kwargs) -> torch.nn.Module:
    """Build an XCiT model by `timm.create_model`, with any weights that `read` accepts.

    Args:
        pretrained: False: random weights; True: weights of the model's first tag; else a tag, path, URL or
            `hf-hub:OWNER/NAME`.
        kwargs: options of timm and of the model. With another `num_classes` than in the weights, the head is new.

    Raises:
        InputError: the weights can't be read, or do not match the model.
    """
    if not pretrained:
        return timm.create_model(name, **kwargs)
    source = tags(name)[0] if pretrained is True else str(pretrained)
    check_exists(source, 'pretrained', name, model_flag='the model')
    given = read(source, 'pretrained', name, model_flag='the model')
    check(build_without_storage(name, given), given)
    entry = published_as(source, name)
    model = timm.create_model(
        f'{name}.{entry.tag}' if entry else name, pretrained=True,
        pretrained_cfg_overlay=dict(state_dict=given.tensors, num_classes=num_classes(name, given)), **kwargs)
    for part in model.modules():  # timm keeps the weights
        getattr(part, 'pretrained_cfg', {}).pop('state_dict', None)
    return model


def build_without_storage(name: str, given: Weights) -> torch.nn.Module:
    """Build a model on the device `meta`, with names and shapes only, and with as many classes as the weights."""
    with torch.device('meta'):
        return timm.create_model(name, num_classes=num_classes(name, given))
