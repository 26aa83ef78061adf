"""The training loss against the original's numbers."""
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision import transforms

from losses import AdaptedTeacher, DistillationLoss, classification_loss


class FixedTeacher(nn.Module):
    """Teacher with the same logits for every batch."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images):
        return self.logits + 0 * images.mean()


@pytest.mark.parametrize('case', range(6))
def test_distillation_equals_the_originals(case, reference):
    """Types none, soft and hard, two weights and temperatures."""
    numbers = reference['distillation']
    expected = numbers['cases'][case]
    outputs, outputs_kd, teacher = (torch.tensor(numbers[k]) for k in ('outputs', 'outputs_kd', 'teacher'))
    criterion = DistillationLoss(nn.CrossEntropyLoss(), FixedTeacher(teacher), expected['type'],
                                 alpha=expected['alpha'], tau=expected['tau'])
    loss = criterion(torch.zeros(6, 3, 8, 8), (outputs, outputs_kd), torch.tensor(numbers['labels']))
    assert loss.item() == pytest.approx(expected['loss'], abs=1e-6)


def test_one_output_feeds_both_terms():
    """A tensor of logits is the output of both heads."""
    outputs, targets = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    criterion = DistillationLoss(nn.CrossEntropyLoss(), FixedTeacher(torch.randn(4, 5)), 'soft')
    images = torch.zeros(4, 3, 8, 8)
    assert criterion(images, outputs, targets) == criterion(images, (outputs, outputs), targets)


def test_teacher_gets_no_gradient():
    """Distillation only trains the student."""
    teacher = FixedTeacher(torch.randn(4, 5))
    outputs = torch.randn(4, 5, requires_grad=True)
    criterion = DistillationLoss(nn.CrossEntropyLoss(), teacher, 'soft', alpha=1.)
    criterion(torch.zeros(4, 3, 8, 8), outputs, torch.tensor([0, 1, 2, 3])).backward()
    assert outputs.grad.any()
    assert teacher.logits.grad is None


def test_unknown_type_is_refused():
    """An unknown `distillation_type` is refused with its value."""
    with pytest.raises(ValueError, match="'medium' is not one of"):
        DistillationLoss(nn.CrossEntropyLoss(), None, 'medium')


@pytest.mark.parametrize('smoothing', [0., .1])
def test_hard_targets_are_smoothed_by_the_criterion(smoothing):
    """With class indices the criterion smooths like torch's cross-entropy."""
    logits, targets = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    loss = classification_loss(soft_targets=False, smoothing=smoothing)(logits, targets)
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets, label_smoothing=smoothing))


def test_soft_targets_are_not_smoothed():
    """With probabilities the criterion is torch's cross-entropy."""
    logits, targets = torch.randn(4, 5), torch.randn(4, 5).softmax(dim=1)
    loss = classification_loss(soft_targets=True, smoothing=.1)(logits, targets)
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets))


def test_teacher_gets_images_as_in_its_training():
    """The images are normalised and resized as the teacher was trained."""
    torch.manual_seed(0)
    identity = nn.Identity()
    teacher = AdaptedTeacher(identity, student=((.5, .4, .3), (.2, .3, .4)), own=((.1, .2, .3), (.5, .5, 1.)))
    pixels = torch.rand(2, 3, 4, 6)
    normalized = transforms.Normalize((.5, .4, .3), (.2, .3, .4))(pixels)
    torch.testing.assert_close(teacher(normalized), transforms.Normalize((.1, .2, .3), (.5, .5, 1.))(pixels))
    teacher.size = (8, 12)
    expected = torch.nn.functional.interpolate(transforms.Normalize((.1, .2, .3), (.5, .5, 1.))(pixels), (8, 12),
                                               mode='bicubic', antialias=True)
    torch.testing.assert_close(teacher(normalized), expected)
