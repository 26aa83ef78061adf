"""Teachers of distillation, with their weights, on images of the size and normalisation of their own training."""
from typing import Optional, Sequence, Tuple

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import weights
from losses import AdaptedTeacher
from run.descriptions import trained_with
from run.output import log
from utils import InputError, counted, first_line

Normalisation = Tuple[tuple, tuple]  # mean and standard deviation of each channel
IMAGENET: Normalisation = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def build(name: str, num_classes: int, *, path: str, pretrained: bool, input_size: int,
          mean: Optional[Sequence[float]], std: Optional[Sequence[float]], student: Normalisation = IMAGENET
          ) -> torch.nn.Module:
    """Build a frozen teacher in eval mode.

    Args:
        name: name of a timm model.
        path: tag, path or URL of the weights; '' with `pretrained`.
        pretrained: use timm's weights.
        input_size: side of the student's images, in pixels.
        mean, std: normalisation that the teacher was trained with; None: the value in its file, or timm's.
        student: normalisation of the student's images.

    Raises:
        InputError: the weights can't be read, have other classes, or the teacher does not accept the images.
    """
    source = f'--teacher-pretrained (--teacher-model {name})'
    if pretrained:
        teacher_classes = timm.models.get_pretrained_cfg_value(name, 'num_classes')
        if teacher_classes != num_classes:
            raise InputError(f'{source}: timm\'s weights have {counted(teacher_classes, "class")}, not {num_classes}')
    try:
        teacher = timm.create_model(name, pretrained=pretrained, num_classes=num_classes)
    except Exception as error:  # of any hub that timm uses
        if not pretrained:
            raise
        raise InputError(f'{source}: timm can\'t get the weights ({first_line(error)})') from None
    config = getattr(teacher, 'pretrained_cfg', {})
    own_size, trained = tuple(config.get('input_size', (3, 224, 224))[1:]), {}
    if path:
        given = weights.read(path, '--teacher-path', name, model_flag='--teacher-model')
        weights.load(teacher, given)
        trained = trained_with(given.checkpoint)
    if 'train_interpolation' in trained:  # trained by main.py
        config = {name: trained.get(name) for name in ('mean', 'std')}
    own = (tuple(mean or config.get('mean') or IMAGENET[0]), tuple(std or config.get('std') or IMAGENET[1]))
    return adapt(teacher.eval().requires_grad_(False), name, input_size=input_size, own=own, own_size=own_size,
                 student=student)


def adapt(teacher: torch.nn.Module, name: str, *, input_size: int, own: Normalisation, own_size: Tuple[int, int],
          student: Normalisation) -> torch.nn.Module:
    """Wrap the teacher so that its input has the normalisation `own` and, if needed, `own_size`; log both."""
    size = None
    if weights.problem_with_size(teacher, (input_size, input_size)):
        size = own_size
        if weights.problem_with_size(teacher, size):
            raise InputError(f'--teacher-model {name}: accepts neither images of {input_size} pixels (--input-size) '
                             f'nor of {size[0]}')
    if size is None and own == student:
        return teacher
    resized = f'resized to {size[0]} x {size[1]} pixels and ' if size else ''
    log(f'--teacher-model {name}: its images are {resized}normalised by mean {own[0]} and standard deviation {own[1]}, '
        f'as in its training')
    return AdaptedTeacher(teacher, student=student, own=own, size=size)
