"""A model with its weights, class names and evaluation transform."""
import dataclasses
from typing import List, Optional

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo

import weights
import xcit
from inference import setting
from loaders.transforms import SMALL, Mean, View
from run.descriptions import names_of, number_of, trained_with
from run.output import log
from utils import InputError, counted

CPU = torch.device('cpu')


@dataclasses.dataclass
class LoadedModel:
    """A model in eval mode on its device, with the settings of its evaluation.

    Args:
        name: name of the model, e.g. 'xcit_small_12_p16'.
        classes: names of the classes 0, 1, ... in words; None: unknown, or no head.
        view: part and size of the pictures that the model is evaluated with.
        amp_dtype: autocast dtype; None: full precision.
        seed: seed of the run that the weights come from, if known.
    """
    model: torch.nn.Module
    name: str
    classes: Optional[List[str]]
    view: View
    device: torch.device
    amp_dtype: Optional[torch.dtype]
    seed: Optional[int] = None

    def transform(self, image: Image.Image) -> torch.Tensor:
        """Transform a picture for evaluation, (3, img_h, img_w); a picture above the input size is always resized."""
        is_too_large = not self.view.resizes and max(image.size) > self.view.input_size
        view = dataclasses.replace(self.view, full_crop=True) if is_too_large else self.view
        return view.transform()(image)


def load(pretrained: str, *, model: str = '', use_ema: bool = False, checkpoint_key: str = '',
         input_size: Optional[int] = None, full_crop: Optional[bool] = None, mean: Mean = None, std: Mean = None,
         device: torch.device = CPU, amp_dtype: Optional[torch.dtype] = None, fuse: bool = True) -> LoadedModel:
    """Build a model with weights, and with as many classes as the weights have; log values that differ from its own.

    Args:
        pretrained: value of --pretrained, see weights.read.
        model: name of the model; '': the name in the weights.
        use_ema, checkpoint_key: choice of one of several sets of weights, see weights.read.
        input_size, full_crop, mean, std: see `View`; None: the values of the model's own evaluation.
        amp_dtype: autocast dtype; None: full precision.
        fuse: prepare an XCiT for inference (xcit.fuse).

    Raises:
        InputError: the model or the weights do not exist, or do not match.
    """
    if model:
        weights.check_model('--model', model)
    weights.check_exists(pretrained, '--pretrained', model)
    given = weights.read(pretrained, '--pretrained', model, use_ema=use_ema, key=checkpoint_key)
    own = setting.of(given.checkpoint, weights.published_as(pretrained, model))
    name = model or own.get('model') or weights.model_of_training(given.checkpoint)
    if name is None:
        raise InputError(f'--model: needed, because {pretrained} does not contain the name of its model')
    weights.check_model('--model', name)
    network = timm.create_model(name, num_classes=weights.num_classes(name, given))
    weights.load(network, given)
    network.eval().requires_grad_(False)
    if fuse and isinstance(network, xcit.Xcit):
        xcit.fuse(network)
    size = own.get('input_size') or network.default_cfg['input_size'][-1]
    defaults = {'input_size': size, 'full_crop': True, 'mean': None, 'std': None}
    given_flags = {'model': name, 'input_size': input_size, 'full_crop': full_crop, 'mean': mean, 'std': std}
    used = {**defaults, **own, **{flag: value for flag, value in given_flags.items() if value is not None}}
    setting.log_differences(own, used, given.source)
    view = View(used['input_size'], used['full_crop'], used['input_size'] > SMALL or 'resize' in own, used['mean'],
                used['std'])
    return LoadedModel(network.to(device), name, class_names(given, network), view, device, amp_dtype,
                       seed=number_of(trained_with(given.checkpoint).get('seed')))


def class_names(given: weights.Weights, model: torch.nn.Module) -> Optional[List[str]]:
    """Return the class names of a checkpoint in words, or ImageNet's for a model of 1000 unnamed classes."""
    stored = given.checkpoint.get('classes')
    names = names_of(stored, model.num_classes)
    if names is None and stored is not None and model.num_classes:
        log(f'{given.source}: class names are ignored, because they do not match {counted(model.num_classes, "class")}')
    if names is None and model.num_classes == 1000:
        names = ImageNetInfo('imagenet-1k').label_names()
    return names and in_words(names)


def in_words(names: List[str]) -> List[str]:
    """Replace ImageNet's WordNet ids by words; keep other class names."""
    info = ImageNetInfo('imagenet-1k' if len(names) == 1000 else 'imagenet-22k')
    known = set(info.label_names()) if len(names) in (1000, 21841) else ()
    return [info.label_name_to_description(name) if name in known else name for name in names]


def check_xcit(name: str):
    """Refuse a model that is not an XCiT."""
    if not xcit.is_xcit_name(name):
        raise InputError(f'--model {name}: not an XCiT model, which this program needs; allowed: '
                         f'{", ".join(xcit.MODELS)}')
