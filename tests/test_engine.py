"""The training and evaluation loops on a real model and a few images."""
import math

import pytest
import timm
import torch
from conftest import seeded_images, seeded_model
from torch.utils.data import DataLoader, TensorDataset

from engine import EvaluationBatches, evaluate, train_one_epoch
from loaders.batches import Batches
from losses import DistillationLoss
from main import build_model_ema, parse_args
from utils import InputError, NonFiniteLoss

CPU = torch.device('cpu')
NANO = 'xcit_nano_12_p16'


def batches(images: torch.Tensor, targets: torch.Tensor, batch_size: int) -> DataLoader:
    return DataLoader(TensorDataset(images, targets), batch_size=batch_size)


def train(model, loader, *, optimizer=None, epoch=0, criterion=None, **kwargs) -> dict:
    criterion = criterion or DistillationLoss(torch.nn.CrossEntropyLoss())

    def losses(batch):
        images, targets = batch
        return {'loss': criterion(images, model(images), targets)}

    return train_one_epoch(
        model, losses, loader, optimizer=optimizer or torch.optim.SGD(model.parameters(), lr=.1),
        scaler=torch.amp.GradScaler('cpu', enabled=False), device=CPU, epoch=epoch, seed=0, **kwargs)


def weights(model) -> list:
    return [p.detach().clone() for p in model.parameters()]


def frozen_statistics(model):
    """Keep BatchNorm in eval mode, so that an image's gradient does not depend on the rest of its batch."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train = lambda mode=True: None
            module.training = False
    return model


def test_eight_images_are_learnt_by_heart():
    """The loop reduces the loss on 8 random images to almost nothing."""
    torch.manual_seed(0)
    model = timm.create_model('xcit_test', num_classes=8)
    loader = batches(torch.randn(8, 3, 32, 32), torch.arange(8), 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = [train(model, loader, optimizer=optimizer, epoch=epoch)['loss'] for epoch in range(40)]
    assert losses[0] > 1.5
    assert losses[-1] < .05


def test_accumulated_batches_give_the_step_of_their_union():
    """Two batches of 2 under --accum-iter 2 move the weights as one batch of 4 does."""
    images, targets = seeded_images(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    moved = []
    for batch_size, accum_iter in ((4, 1), (2, 2)):
        model = frozen_statistics(seeded_model(NANO, num_classes=4))
        train(model, batches(images, targets, batch_size), accum_iter=accum_iter)
        moved.append(weights(model))
    torch.testing.assert_close(*moved)


def test_last_group_may_be_smaller():
    """Three batches under --accum-iter 2 are two steps: the third batch is a whole step."""
    images, targets = seeded_images(6, 3, 32, 32), torch.arange(6)
    grouped, single = (frozen_statistics(seeded_model(NANO, num_classes=6)) for _ in range(2))
    train(grouped, batches(images, targets, 2), accum_iter=2)
    train(single, [(images[:4], targets[:4]), (images[4:], targets[4:])])
    torch.testing.assert_close(weights(grouped), weights(single))


def test_clip_grad_limits_the_step():
    """With plain SGD the step is lr times the clipped norm; the logged norm is the one before clipping."""
    model = seeded_model(NANO, num_classes=4)
    before = weights(model)
    stats = train(model, batches(seeded_images(4, 3, 32, 32), torch.arange(4), 4), clip_grad=.01)
    step = math.sqrt(sum((new - old).square().sum().item() for new, old in zip(weights(model), before)))
    assert step == pytest.approx(.1 * .01, rel=1e-2)
    assert stats['grad_norm'] > 1


def test_random_layers_depend_on_epoch_and_step_only():
    """An epoch determines the weights, whatever random numbers were drawn before; another epoch gives others."""
    loader = batches(seeded_images(4, 3, 32, 32), torch.arange(4), 2)
    results = []
    for epoch, history in ((3, 1), (3, 2), (4, 1)):
        torch.manual_seed(history)
        model = seeded_model(NANO, num_classes=4, drop_path_rate=.5)
        train(model, loader, epoch=epoch)
        results.append(model.head.weight.detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_non_finite_loss_stops_before_the_step():
    """A loss that is not finite is raised with epoch, step and value, before the weights change."""
    model = seeded_model(NANO, num_classes=4)
    before = weights(model)
    with pytest.raises(NonFiniteLoss, match='loss is nan at epoch 5, step 0'):
        train(model, batches(torch.full((2, 3, 32, 32), math.nan), torch.tensor([0, 1]), 2), epoch=5)
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)


def two_weights() -> torch.nn.Module:
    """Return a model with two weights, 3 and 4."""
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    with torch.no_grad():
        model.weight += torch.tensor([[3., 4.]])
    return model


def one_step(model, losses, **kwargs) -> dict:
    return train_one_epoch(
        model, losses, [{'x': [torch.ones(1, 2)]}], optimizer=torch.optim.SGD(model.parameters(), lr=1.),
        device=CPU, epoch=0, seed=0, **kwargs)


def test_the_sum_of_several_losses_is_minimised():
    """The sum has the gradient; each loss is averaged by its name, as is a value without gradient."""
    model = two_weights()
    stats = one_step(model, lambda batch: {'a': model(batch['x'][0]).sum(), 'b': 2 * model.weight[0, 0],
                                           'value': torch.tensor(5.)})
    assert model.weight.tolist() == [[3. - 1 - 2, 4. - 1]]
    assert {name: stats[name] for name in ('loss', 'a', 'b', 'value')} == {'loss': 13., 'a': 7., 'b': 6., 'value': 5.}


@pytest.mark.parametrize(('losses', 'options', 'message'), [
    (lambda weight: {'a': weight, 'lr': weight}, {}, 'lr: reserved for a metric of the epoch'),
    (lambda weight: {'a': weight, 'loss': weight}, {}, 'loss: reserved for a metric of the epoch'),
    (lambda weight: {'a': weight.detach()}, {}, r'none of the losses \(a\) has a gradient'),
    (lambda weight: {'a': weight}, {'amp_dtype': torch.float16, 'scaler': None}, 'needs a scaler')])
def test_invalid_losses_are_refused(losses, options, message):
    """An error of the task is raised before the weights change."""
    model = two_weights()
    with pytest.raises(ValueError, match=message):
        one_step(model, lambda batch: losses(model.weight.sum()), **options)


def test_the_loss_that_is_not_finite_is_named():
    """NonFiniteLoss contains the name of the loss that is not finite, and the step."""
    model = two_weights()
    with pytest.raises(NonFiniteLoss, match='b is inf at iterations 5 to 8, step 0'):
        one_step(model, lambda batch: {'a': model.weight.sum(), 'b': torch.tensor(math.inf)},
                 header='Iterations 5 to 8')


def test_a_task_can_have_its_own_clipping():
    """A function changes the gradients, and the norm that it returns is logged."""
    model = two_weights()

    def clip(parameters):
        parameters[0].grad.fill_(.5)
        return torch.tensor(7.)

    assert one_step(model, lambda batch: {'loss': model.weight.sum()}, clip_grad=clip)['grad_norm'] == 7
    assert model.weight.tolist() == [[2.5, 3.5]]


def test_a_rate_can_change_with_every_step():
    """`before_update` is called before the gradients, with the number of the update over all epochs."""
    updates, model = [], two_weights()
    train_one_epoch(
        model, lambda batch: {'loss': model(batch).sum()}, [torch.ones(1, 2)] * 4,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.), scaler=torch.amp.GradScaler('cpu', enabled=False),
        device=CPU, epoch=3, seed=0, accum_iter=2, before_update=updates.append)
    assert updates == [6, 7]


def test_frozen_part_stays_in_eval_mode():
    """The BatchNorm statistics of a frozen stem (--surgery) do not change, while those of the blocks do."""
    model = seeded_model(NANO, num_classes=4)
    stem, block = model.patch_embed.proj[0][1], model.blocks[0].local_mp.bn
    before = stem.running_mean.clone(), block.running_mean.clone()
    train(model, batches(seeded_images(4, 3, 32, 32), torch.arange(4), 4), frozen=model.patch_embed)
    assert torch.equal(stem.running_mean, before[0])
    assert not torch.equal(block.running_mean, before[1])


def test_ema_leaves_the_initial_weights_soon():
    """After 20 steps at the default decay the EMA is far closer to the weights than to the initial weights."""
    model = seeded_model(NANO, num_classes=4)
    model_ema = build_model_ema(parse_args(['--device', 'cpu']), model)
    start = model.head.weight.detach().clone()
    loader = batches(seeded_images(40, 3, 32, 32), torch.arange(40) % 4, 2)
    train(model, loader, optimizer=torch.optim.SGD(model.parameters(), lr=1e-3),
          average=lambda updates: model_ema.update(model, step=updates))
    average = model_ema.module.head.weight
    assert (average - model.head.weight).norm() < .5 * (start - model.head.weight).norm()


def test_ema_reaches_its_decay():
    """After a warm-up of 314,000 steps the decay is that of the flag, as in the original."""
    model_ema = build_model_ema(parse_args(['--device', 'cpu']), torch.nn.Linear(1, 1))
    assert model_ema.get_decay(300_000) < .99996
    assert model_ema.get_decay(320_000) == .99996


def test_evaluation_equals_one_pass_over_all_images():
    """Accuracies and loss of uneven batches are those of all images at once; nothing is counted twice."""
    model = seeded_model(NANO, num_classes=20).eval()
    images, targets = torch.randn(11, 3, 32, 32), torch.arange(11)
    stats = evaluate(model, Batches(batches(images, targets, 4)), device=CPU)
    with torch.no_grad():
        logits = model(images)
    ranks = (logits > logits.gather(1, targets[:, None])).sum(dim=1)
    assert stats['images'] == 11
    assert stats['acc1'] == pytest.approx(100 * (ranks == 0).double().mean().item())
    assert stats['acc5'] == pytest.approx(100 * (ranks < 5).double().mean().item())
    assert stats['loss'] == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-6)


def test_evaluation_ends_with_the_originals_line(capsys):
    """The line is `* Acc@1 81.982 Acc@5 95.814 loss 0.805`; of fewer than 5 classes all are among the best 5."""
    loader = Batches(batches(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]), 2))
    evaluate(seeded_model(NANO, num_classes=3), loader, device=CPU)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith('* Acc@1 ')
    assert 'Acc@5 100.000 loss ' in last


def test_bf16_training_step_is_close():
    """One bfloat16 step on the CPU gives about the loss of full precision."""
    loader = batches(seeded_images(4, 3, 32, 32), torch.arange(4), 4)
    full, half = (train(seeded_model(NANO, num_classes=4), loader, amp_dtype=dtype)['loss']
                  for dtype in (None, torch.bfloat16))
    assert half == pytest.approx(full, rel=.05)


def test_teacher_runs_under_the_same_autocast():
    """Student and teacher have the same precision."""
    dtypes = []
    teacher = seeded_model(NANO, num_classes=4).eval()
    teacher.head.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    criterion = DistillationLoss(torch.nn.CrossEntropyLoss(), teacher, 'hard')
    train(seeded_model(NANO, num_classes=4), batches(seeded_images(2, 3, 32, 32), torch.arange(2), 2),
          criterion=criterion, amp_dtype=torch.bfloat16)
    assert dtypes == [torch.bfloat16]
    assert not teacher.training


class Lossy:
    """A loader of two batches of which images were lost."""
    counts_batches = True

    def __len__(self):
        return 2

    def __iter__(self):
        return iter([torch.zeros(2, 3), torch.zeros(2, 3)])

    def images_evaluated(self, count):
        raise InputError(f'{count} of 5 images')


def test_lost_images_end_an_evaluation():
    """`images` has the loader check the number of results."""
    loop = EvaluationBatches(Lossy(), CPU, header='Test')
    count = sum(len(batch) for batch in loop)
    assert loop.images_per_s() > 0
    with pytest.raises(InputError, match='4 of 5 images'):
        loop.images(count)


def test_evaluation_checks_for_signals_after_each_batch():
    """`after_batch` is called once per batch, under autocast of the asked dtype."""
    calls = []
    for _ in EvaluationBatches(Lossy(), CPU, header='Test', amp_dtype=torch.bfloat16,
                               after_batch=lambda: calls.append(torch.is_autocast_enabled('cpu'))):
        assert torch.get_autocast_dtype('cpu') == torch.bfloat16
    assert len(calls) == 2
