"""Weights by name: from a published tag, a file, a URL or the Hugging Face hub, in whichever format, into a model."""
import contextlib
import dataclasses
import functools
import hashlib
import re
from pathlib import Path
from typing import List, Optional, Set, Tuple

import huggingface_hub
import safetensors
import timm
import torch
from timm.models import load_state_dict_from_hf

import xcit
import xcit_zoo
from run import checkpoints
from run.descriptions import trained_with
from run.processes import notice
from utils import InputError, abridge, first_line, similar

HUB = 'hf-hub:'  # before the name of a repository there
HUB_FILE = 'model.safetensors'


@dataclasses.dataclass
class Weights:
    """A model's weights, and what their file says of them.

    Args:
        tensors: by name, in the naming of the published files.
        source: the option and the value they came from, for messages; '' if whoever reads them adds it.
        description: what the file was found to hold.
        checkpoint: the whole file, with whatever it holds beside weights (`args`, `classes`, `epoch`).
    """
    tensors: dict
    source: str
    description: str
    checkpoint: dict


# ---------------------------------------------------------------------------------------------------------------------
# Models by name

def check_model(flag: str, name: str):
    """Refuse a name that timm has no model for; `flag` gave it.

    Raises:
        InputError: names similar ones.
    """
    base, _, tag = name.partition('.')
    if not timm.is_model(base):
        raise InputError(f'{flag} {name}: no such model{similar(name, xcit.MODELS + timm.list_models())}')
    known = [full.partition('.')[2] for full in timm.list_pretrained(f'{base}.*')]
    if tag and tag not in known:
        raise InputError(f'{flag} {name}: {base} has no such tag; it has: {", ".join(known)}')


@torch.no_grad()
def takes(model: torch.nn.Module, size: Tuple[int, int]) -> bool:
    """Whether a model in eval mode can see images of (img_h, img_w)."""
    try:
        model(torch.zeros(1, 3, *size))
        return True
    except (AssertionError, RuntimeError, ValueError):
        return False


@torch.no_grad()
def check_input_size(args, model: torch.nn.Module):
    """Refuse an --input-size that the model is not made for; XCiT takes any."""
    try:
        model.eval()(torch.zeros(1, 3, args.input_size, args.input_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise InputError(f'--input-size {args.input_size}: {args.model} can\'t take it ({first_line(error)})') from None


# ---------------------------------------------------------------------------------------------------------------------
# Where weights come from

def tags(model_name: str) -> List[str]:
    """The tags of a model's published checkpoints, e.g. 'fb_in1k'."""
    return [published.tag for published in xcit_zoo.ZOO.values() if published.model == model_name.split('.')[0]]


def published(model_name: str, tag: str) -> Optional[xcit_zoo.Published]:
    """The published checkpoint that a tag, alone or after its model's name, means for a model; None if none.

    Args:
        model_name: '' for any, where the tag has a model's name.
    """
    found = xcit_zoo.ZOO.get(tag) or xcit_zoo.ZOO.get(f'{model_name.split(".")[0]}.{tag}')
    return found if found and model_name.split('.')[0] in ('', found.model) else None


def published_as(given: str) -> Optional[xcit_zoo.Published]:
    """The published checkpoint that a full name, an address or a file's name means, None if it is none of them."""
    name = Path(given).name
    if given in xcit_zoo.ZOO:
        return xcit_zoo.ZOO[given]
    return next((entry for entry in xcit_zoo.ZOO.values()
                 if given == f'{HUB}{entry.hf_hub_id}' or name == Path(entry.url).name), None)


def check_exists(given: str, flag: str, model_name: str):
    """Refuse what is no tag of the model, no address, and no file.

    Raises:
        InputError: says what would be allowed.
    """
    if published(model_name, given) or given.startswith(HUB) or checkpoints.is_url(given) or Path(given).exists():
        return
    allowed = f'; tags of {model_name}: {", ".join(tags(model_name))}' if tags(model_name) else ''
    if not model_name and given in {entry.tag for entry in xcit_zoo.ZOO.values()}:
        example = next(entry.model for entry in xcit_zoo.ZOO.values() if entry.tag == given)
        allowed = f'; as a tag it needs its model\'s name before it, as in {example}.{given}'
    raise InputError(f'{flag} {given}: no such file{allowed}')


def read(given: str, flag: str, model_name: str = '', *, use_ema: bool = False, key: str = '') -> Weights:
    """Read weights from wherever `given` says.

    Args:
        given: a tag of the model, a path (.pth or .safetensors), a URL, or `hf-hub:OWNER/NAME`.
        flag: the option that gave it, for messages.
        model_name: whose tags count, and whose names are looked for; '': what the file says, or any XCiT.
        use_ema: take the moving average that a training checkpoint holds.
        key: which of several sets of weights to take.

    Raises:
        InputError: not there, damaged, or without weights.
    """
    content = read_content(given, flag, model_name)
    name = model_name or model_of_training(content) or ''
    own = names_of(name) if timm.is_model(name.partition('.')[0]) else None
    return extract(content, f'{flag} {given}', own=own, use_ema=use_ema, key=key)


def read_content(given: str, flag: str, model_name: str = '') -> dict:
    """All that a file holds; arguments and errors as of `read`."""
    checkpoint = published(model_name, given)
    if checkpoint is not None:
        return read_published(checkpoint, flag)
    if given.startswith(HUB):
        return read_hub(given.removeprefix(HUB), flag)
    return checkpoints.load_checkpoint(given, flag)


def read_published(checkpoint: xcit_zoo.Published, flag: str) -> dict:
    """The file of a published checkpoint, from either home; nothing is downloaded that is on this machine already."""
    if checkpoint.hf_hub_id:
        cached = huggingface_hub.try_to_load_from_cache(checkpoint.hf_hub_id, HUB_FILE)
        if isinstance(cached, str):
            with contextlib.suppress(InputError):  # damaged: downloaded anew below
                return checkpoints.load_checkpoint(cached, flag)
    try:
        return checkpoints.load_checkpoint(checkpoint.url, flag)
    except checkpoints.DownloadError as error:
        if not checkpoint.hf_hub_id:
            raise
        try:
            return read_hub(checkpoint.hf_hub_id, flag)
        except checkpoints.DownloadError:
            raise error from None


def read_hub(name: str, flag: str) -> dict:
    repository, _, revision = name.partition('@')
    file = dict(repo_id=repository, filename=HUB_FILE, revision=revision or None)
    try:
        if huggingface_hub.try_to_load_from_cache(**file) is None:
            # Asks once whether the hub can be reached: a download would try for most of a minute.
            with contextlib.suppress(huggingface_hub.errors.EntryNotFoundError):
                huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(**file))
        try:
            return load_state_dict_from_hf(name, weights_only=True)
        except safetensors.SafetensorError:  # the hub's cache is damaged
            huggingface_hub.hf_hub_download(**file, force_download=True)
            return load_state_dict_from_hf(name, weights_only=True)
    except Exception as error:  # of the network, of the hub, of the file: many kinds
        raise checkpoints.DownloadError(
            f'{flag} {HUB}{name}: can\'t be read from the Hugging Face hub ({first_line(error)}); without a network, '
            f'give the path of its {HUB_FILE}') from None


# ---------------------------------------------------------------------------------------------------------------------
# What files hold

def about(source: str, message: str) -> str:
    """A message with the source of the weights before it, unless whoever reads them adds that."""
    return f'{source}: {message}' if source else message


def extract(checkpoint: dict, source: str, *, own: Optional[Set[str]] = None, use_ema: bool = False, key: str = ''
            ) -> Weights:
    """Find the weights in a file's content, and give them the published names.

    Known are the published files, bare state dicts, DINO's trainings (the teacher's backbone), timm's naming, and
    whatever other programs put around the weights or before their names.

    Args:
        own: the model's names (`names_of`); None: it may be any XCiT.
        use_ema: take the moving average.
        key: which of several sets of weights to take: where they are in the file, or what stands before their names.

    Raises:
        InputError: there are none, or several that differ, or they are of another task.
    """
    own = own or names_of('')
    found = xcit_zoo.find_weights(checkpoint, own)
    refuse_other_tasks(checkpoint, source)
    try:
        one = xcit_zoo.choose(found, average=use_ema, key=key)
    except ValueError as error:
        raise InputError(about(source, f'{error}; choose one of them by --checkpoint-key')) from None
    if one is None and key:
        there = ', '.join(found.label for found in found) or abridge(list(checkpoint))
        raise InputError(about(source, f'no weights under {key} (--checkpoint-key); it has: {there}'))
    if one is None and use_ema:
        raise InputError(f'{source}: holds no moving average (--use-ema); it has: {abridge(list(checkpoint))}')
    one = one or of_another_model(checkpoint)
    if one is None:
        raise InputError(about(source, f'no weights under \'model\'; the file has: {abridge(list(checkpoint))}'))
    tensors, words = one.tensors, [f'\'{one.entry}\'' if one.entry else 'a bare state dict']
    removed = [*one.cleared, *([one.prefix] if one.prefix else [])]
    words += [f'names without {" and ".join(removed)}'] if removed else []
    if xcit_zoo.has_timm_names(tensors):
        tensors = xcit_zoo.from_timm_names(tensors)
        words.append('timm\'s names')
    words += [f'{len(one.beside)} other tensors are left ({abridge(one.beside, 3)})'] if one.beside else []
    if isinstance(checkpoint.get('epoch'), int):
        words.append(f'of epoch {checkpoint["epoch"]}')
    return Weights(tensors, source, ', '.join(words), checkpoint)


def of_another_model(checkpoint: dict) -> Optional[xcit_zoo.Found]:
    """The weights in a file of no known model, under the names that most programs use for them."""
    there = dict(xcit_zoo.dicts_of_tensors(checkpoint))
    entry = next((entry for entry in ('model', 'state_dict', 'teacher', '') if entry in there), None)
    if entry is None:
        return None
    tensors, cleared = xcit_zoo.without_wrappers(there[entry])
    prefix = 'module.' if all(key.startswith('module.') for key in tensors) else ''
    tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return xcit_zoo.Found(entry, prefix, tensors, [], cleared)


def refuse_other_tasks(checkpoint: dict, source: str):
    """Raises InputError: the file is of a detector or of a segmenter."""
    for _, tensors in xcit_zoo.dicts_of_tensors(checkpoint):
        parts = xcit_zoo.of_other_task(list(tensors))
        if parts:
            raise InputError(about(source, f'the weights of a detector or a segmenter ({", ".join(parts)}), which are '
                                           f'neither a classifier\'s nor a backbone\'s'))


@functools.cache
def names_of(model_name: str) -> Set[str]:
    """What the weights of a model are called, in the published naming and in timm's; of all XCiT, where it is ''."""
    if not model_name:
        return names_of('xcit_large_24_p16') | names_of('xcit_large_24_p8')
    base = model_name.partition('.')[0]
    try:
        with torch.device('meta'):
            names = timm.create_model(base).state_dict()
    except (RuntimeError, NotImplementedError, TypeError):  # some can't be built without storage
        names = timm.create_model(base).state_dict()
    return xcit_zoo.in_both_namings(names)


# ---------------------------------------------------------------------------------------------------------------------
# Into a model

def num_classes(name: str, given: Weights) -> int:
    """How many classes the head in weights of the model `name` has; 0: there is none."""
    head = timm.models.get_pretrained_cfg_value(name, 'classifier') or 'head'
    bias = given.tensors.get(f'{head}.bias')
    return 0 if bias is None else len(bias)


def named_for(model: torch.nn.Module, weights: Weights) -> dict:
    """The weights under the model's own names: timm's, if it is timm's XCiT."""
    return xcit_zoo.to_timm_names(weights.tensors) if xcit_zoo.has_timm_names(model.state_dict()) else weights.tensors


def head_keys(model: torch.nn.Module) -> List[str]:
    return [f'{getattr(model, "default_cfg", {}).get("classifier", "head")}.{part}' for part in ('weight', 'bias')]


def check(model: torch.nn.Module, weights: Weights):
    """Refuse weights that are not the model's; the head is left aside.

    Raises:
        InputError: lists the weights that are missing, left over or of another shape.
    """
    own, given, head = model.state_dict(), named_for(model, weights), head_keys(model)
    problems = {
        'missing keys': [k for k in own if k not in given],
        'unexpected keys': [k for k in given if k not in own],
        'other shapes': [f'{k} {tuple(getattr(given[k], "shape", ()))}, model has {tuple(own[k].shape)}'
                         for k in own if k in given and getattr(given[k], 'shape', None) != own[k].shape]}
    problems = {what: keys for what, keys in problems.items() if any(k.split()[0] not in head for k in keys)}
    if problems:
        found = '; '.join(f'{what}: {abridge(keys)}' for what, keys in problems.items())
        raise InputError(about(weights.source, f'the weights are not this model\'s; {found}'))


def load(model: torch.nn.Module, weights: Weights, *, new_head: bool = False):
    """Load all of the weights into `model`.

    Args:
        new_head: keep the model's fresh head where the given one is for another number of classes, or there is none.

    Raises:
        InputError: a weight is missing, left over or of another shape.
    """
    check(model, weights)
    own, given = model.state_dict(), named_for(model, weights)
    head = head_keys(model)
    if weights.source:
        notice(about(weights.source, weights.description))
    if any(getattr(own.get(k), 'shape', None) != getattr(given.get(k), 'shape', None) for k in head):
        if head[0] not in given:
            problem = 'have no head'
        elif head[0] not in own:
            problem = f'have a head for {len(given[head[0]])} classes, which the model has no place for'
        elif head[1] not in given:
            problem = f'have a head without {head[1]}'
        elif len(given[head[0]]) != len(own[head[0]]):
            problem = f'are for {len(given[head[0]])} classes, not {len(own[head[0]])}'
        else:
            problem = (f'have a head of another width: {head[0]} {tuple(given[head[0]].shape)}, model has '
                       f'{tuple(own[head[0]].shape)}')
        if head[0] in own and not new_head:
            raise InputError(about(weights.source, f'the weights {problem}'))
        notice(about(weights.source, f'the weights {problem}: all but the head is taken'))
        given = {k: v for k, v in given.items() if k not in head}
    model.load_state_dict(given, strict=False)  # checked above, in words of our own


class ModelPart:
    """A model as a part of a training (run.parts): its weights in whichever naming a checkpoint has them."""

    def __init__(self, model: torch.nn.Module):
        self.model = model

    def state_dict(self) -> dict:
        return self.model.state_dict()

    def load_state_dict(self, state: dict):
        load(self.model, extract({'model': state}, '', own=xcit_zoo.in_both_namings(self.model.state_dict())))


def model_of_training(checkpoint: dict) -> Optional[str]:
    """The model that a file says it is of; this repository's where timm has the same under a name with a resolution."""
    trained = trained_with(checkpoint)
    named = (trained.get('model'), trained.get('arch'), checkpoint.get('arch'))
    name = next((name for name in named if isinstance(name, str) and name), None)
    own = re.sub(r'_(224|384)(\..*)?$', '', str(name))
    return own if own in xcit.MODELS else name


def backbone_state(model: torch.nn.Module) -> dict:
    """A model's weights without a classifier's head."""
    head = head_keys(model)
    return {key: value for key, value in model.state_dict().items() if key not in head}


def fingerprint(model: torch.nn.Module) -> str:
    """A short text that is another for other weights; a classifier's head does not count."""
    digest = hashlib.sha256()
    for key, value in sorted(backbone_state(model).items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def model_named_in(given: str, flag: str) -> Optional[str]:
    """The model that weights say they are of, without a download; None if they don't.

    Raises:
        InputError: the file can't be read.
    """
    known = published('', given) or published_as(given)
    if known:
        return known.model
    return model_of_training(checkpoints.load_checkpoint(given, flag)) if Path(given).is_file() else None


def create_model(name: str, pretrained=False, **kwargs) -> torch.nn.Module:
    """`timm.create_model` of an XCiT model with any weights that `read` takes.

    Args:
        pretrained: False: random weights; True: those of the model's first tag; else a tag, path, URL or
            `hf-hub:OWNER/NAME`.
        kwargs: timm's and the model's. With another `num_classes` than the weights have, the head is a fresh one.

    Raises:
        InputError: the weights can't be read, or are not the model's.
    """
    if not pretrained:
        return timm.create_model(name, **kwargs)
    source = tags(name)[0] if pretrained is True else str(pretrained)
    check_exists(source, 'pretrained', name)
    given = read(source, 'pretrained', name)
    check(build_without_storage(name, given), given)
    published_here = published(name, source) or published_as(source)
    model = timm.create_model(
        f'{name}.{published_here.tag}' if published_here else name, pretrained=True,
        pretrained_cfg_overlay=dict(state_dict=given.tensors, num_classes=num_classes(name, given)), **kwargs)
    for part in model.modules():  # timm keeps what it was given
        getattr(part, 'pretrained_cfg', {}).pop('state_dict', None)
    return model


def build_without_storage(name: str, given: Weights) -> torch.nn.Module:
    """A model with a head like that of the weights, on the device `meta`: names and shapes alone."""
    with torch.device('meta'):
        return timm.create_model(name, num_classes=num_classes(name, given))
