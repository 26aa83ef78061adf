"""Comparison of DINO with the original, by the numbers in dino.json: schedules, loss, steps, crops, evaluations."""
import json
import math

import numpy as np
import pytest
import timm
import torch
from conftest import REFERENCE
from PIL import Image
from seeded_weights import image as seeded_image
from seeded_weights import tensor as seeded_tensor
from torchvision import transforms

from dino import neighbours, updates
from dino.collapse import kinds_of_collapse, spread
from dino.crops import Crops, RandomResizedCrop
from dino.loss import DinoLoss
from dino.networks import Head, MultiCrop
from loaders.pictures import load_rgb
from loaders.transforms import View
from run.optimization import parameter_groups
from run.schedules import cosine, ramp

NUMBERS = json.loads((REFERENCE / 'dino.json').read_text())


def close(actual, expected, rtol: float):
    torch.testing.assert_close(torch.as_tensor(actual, dtype=torch.float64),
                               torch.as_tensor(expected, dtype=torch.float64), rtol=rtol, atol=1e-9)


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def seed_weights(module: torch.nn.Module, seed: int, prefix: str = '') -> torch.nn.Module:
    """Load the reference's weights by the module's names in the original."""
    module.load_state_dict({key: torch.from_numpy(np.asarray(seeded_tensor(prefix + key, tuple(value.shape), seed)))
                            for key, value in module.state_dict().items()})
    with torch.no_grad():
        next(value for key, value in module.named_parameters() if key.endswith('weight_g')).fill_(1)
    return module


def network(arch: str, out_dim: int, *, seed: int, use_bn: bool = False, norm_last_layer: bool = True) -> MultiCrop:
    backbone = timm.create_model(arch, num_classes=0)
    head = Head(backbone.num_features, out_dim, use_bn=use_bn, norm_last_layer=norm_last_layer)
    return seed_weights(MultiCrop(backbone, head), seed)


def crops_of(sides: list, batch: int, first: int) -> list:
    return [torch.from_numpy(seeded_image((batch, 3, side, side), first + j)) for j, side in enumerate(sides)]


# ---------------------------------------------------------------------------------------------------------------------
# Schedules

@pytest.mark.parametrize(('name', 'curve'), [
    ('lr', cosine(5e-4 * 1024 / 256, 1e-6, steps=140, warmup_steps=21)),
    ('wd', cosine(.04, .4, steps=140)),
    ('momentum', cosine(.996, 1., steps=140)),
])
def test_schedules_are_the_originals(name, curve):
    """Learning rate, weight decay and momentum have the original's value at each step."""
    close(curve, NUMBERS['schedules'][name], 1e-6)


def test_cosine_after_a_warmup_is_the_originals():
    """The values after a warm-up equal the original's, also for a warm-up that begins above 0 there."""
    case = NUMBERS['more_schedules']['lr_warmup_start']
    curve = cosine(case['base'], case['final'], steps=case['length'], warmup_steps=16)
    after = {int(step): value for step, value in case['values'].items() if int(step) >= 15}
    close([curve[step] for step in after], list(after.values()), 1e-6)


@pytest.mark.parametrize('name', ['momentum', 'lr_without_warmup'])
def test_schedules_of_other_lengths_are_the_originals(name):
    """Curves of other lengths, with and without warm-up, equal the original's."""
    case = NUMBERS['more_schedules'][name]
    curve = cosine(case['base'], case['final'], steps=case['length'])
    close([curve[int(step)] for step in case['values']], list(case['values'].values()), 1e-6)
    assert len(curve) == case['length']


def test_teacher_temperature_is_the_originals():
    """The temperature of each epoch equals the original's."""
    close(ramp(.04, .07, warmup_steps=5, steps=12), NUMBERS['dino_loss']['teacher_temp'], 1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Loss and networks

def test_loss_and_centre_are_the_originals():
    """Loss and centre equal the original's over several batches."""
    rng, criterion = generator(11), DinoLoss(64, crops=6)
    temperatures = NUMBERS['dino_loss']['teacher_temp']
    for call in NUMBERS['dino_loss']['calls']:
        student, teacher = (torch.from_numpy(rng.standard_normal((rows, 64)).astype(np.float32)) for rows in (24, 8))
        loss, _ = criterion(student, teacher, temperatures[call['epoch']])
        close(loss, call['loss'], 1e-6)
        close(criterion.center.norm(), call['center_norm'], 1e-6)
        close(criterion.center[0, :4], call['center_first'], 1e-6)


def test_loss_is_in_float32_under_autocast():
    """Autocast does not change the loss."""
    rng = generator(11)
    student, teacher = (torch.from_numpy(rng.standard_normal((rows, 64)).astype(np.float32)) for rows in (24, 8))
    with torch.autocast('cpu', torch.bfloat16):
        loss, _ = DinoLoss(64, crops=6)(student, teacher, .04)
    close(loss, NUMBERS['dino_loss']['calls'][0]['loss'], 1e-6)


def test_logits_are_in_float32_under_autocast():
    """The head returns logits in full precision, which the loss divides by .04."""
    head = Head(16, 64, use_bn=False, norm_last_layer=True)
    with torch.autocast('cpu', torch.bfloat16):
        logits = head(torch.randn(4, 16))
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())


def test_entropies_distinguish_uniform_from_equal_outputs():
    """The two entropies distinguish uniform, equal and different outputs."""
    criterion = DinoLoss(64, crops=2)
    _, uniform = criterion(torch.zeros(8, 64), torch.zeros(8, 64), .04)
    close(list(uniform.values()), [math.log(64)] * 2, 1e-6)
    one_hot = 100. * torch.eye(64)
    _, alike = DinoLoss(64, crops=2)(torch.zeros(8, 64), one_hot[:1].expand(8, -1), .04)
    close(list(alike.values()), [0., 0.], 1e-6)
    _, apart = DinoLoss(64, crops=2)(torch.zeros(8, 64), one_hot[:8], .04)
    close(list(apart.values()), [0., math.log(8)], 1e-5)


@pytest.mark.parametrize('case', NUMBERS['head']['cases'], ids=lambda case: f'{case["in_dim"]}-{case["out_dim"]}')
def test_head_is_the_originals(case):
    """Names, outputs and gradients of the head equal the original's."""
    head = Head(case['in_dim'], case['out_dim'], use_bn=case['use_bn'], norm_last_layer=case['norm_last_layer'])
    assert {key: list(value.shape) for key, value in head.state_dict().items()} == dict(case['keys'])
    seed_weights(head, case['seed'], 'head.')
    x = generator(case['seed'] + 50).standard_normal((len(case['row_norms']), case['in_dim'])).astype(np.float32)
    y = head(torch.from_numpy(x))
    y.square().sum().backward()
    close(y.norm(dim=1).detach(), case['row_norms'], 1e-5)
    torch.testing.assert_close(y[0, :6].detach(), torch.tensor(case['first_row']), rtol=1e-5, atol=1e-6)
    norms = {name: float(p.grad.norm()) for name, p in head.named_parameters() if p.requires_grad}
    assert norms.keys() == set(case['trainable'])
    torch.testing.assert_close(norms, case['grad_norms'], rtol=1e-5, atol=1e-5)


def test_head_starts_as_the_originals():
    """Initial weights have the original's distribution."""
    torch.manual_seed(0)
    head, expected = Head(384, 4096, use_bn=False, norm_last_layer=True), NUMBERS['head']['initialisation']
    assert float(head.mlp[2].weight.detach().std()) == pytest.approx(expected['mlp_weight_std'], rel=.01)
    assert float(head.last_layer.weight_v.detach().std()) == pytest.approx(expected['weight_v_std'], rel=.01)
    assert float(head.last_layer.weight_v.detach().abs().max()) == pytest.approx(expected['weight_v_max'], rel=1e-3)
    assert not head.mlp[0].bias.any()
    assert bool((head.last_layer.weight_g == 1).all())


@pytest.mark.parametrize('mode', ['eval', 'train'])
def test_crops_of_one_size_pass_the_backbone_together(mode):
    """Crops of equal size are one forward pass, with the original's outputs and BatchNorm statistics."""
    expected, passes = NUMBERS['multicrop'][mode], []
    model = network('xcit_nano_12_p16', 128, seed=5).train(mode == 'train')
    model.backbone.register_forward_pre_hook(lambda _, inputs: passes.append(list(inputs[0].shape)))
    logits, _ = model(crops_of([64, 64, 32, 32, 32, 32], 3, 400))
    assert passes == NUMBERS['multicrop']['calls_of_backbone']
    torch.testing.assert_close(logits.norm(dim=1).detach(), torch.tensor(expected['row_norms']), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[:, :2].detach(), torch.tensor(expected['first_two_of_rows']), rtol=1e-4,
                               atol=1e-5)
    close(sum_of_norms(model, 'running_mean'), expected['bn_running_mean_norms'], 1e-4)


@pytest.mark.parametrize(('sides', 'expected'), [([64, 64, 48, 48, 32], [2, 2, 1]), ([64, 32, 64], [1, 1, 1])])
def test_crops_are_passed_in_their_order(sides, expected):
    """Crops of equal size are grouped only if they are neighbours."""
    passes = []

    class Counted(torch.nn.Module):
        def forward(self, x):
            passes.append(len(x))
            return x.mean(dim=(2, 3))

    MultiCrop(Counted(), torch.nn.Identity())([torch.zeros(1, 3, side, side) for side in sides])
    assert passes == expected


def sum_of_norms(model: torch.nn.Module, end: str) -> float:
    return sum(float(value.norm()) for key, value in model.state_dict().items() if key.endswith(end))


# ---------------------------------------------------------------------------------------------------------------------
# Steps

def norm_of(model: torch.nn.Module) -> float:
    return math.sqrt(sum(float(p.detach().double().square().sum()) for p in model.parameters()))


def take_step(student, teacher, criterion, optimizer, crops, *, temperature, clip, freeze, momentum) -> dict:
    with torch.no_grad():
        teacher_out, _ = teacher(crops[:2])
    loss, _ = criterion(student(crops)[0], teacher_out, temperature)
    optimizer.zero_grad()
    loss.backward()
    with_gradient = [p for p in student.parameters() if p.grad is not None]
    before = [float(p.grad.norm()) for p in with_gradient]
    updates.clip_each(with_gradient, clip)
    after = math.sqrt(sum(float(p.grad.square().sum()) for p in with_gradient))
    if freeze:
        updates.freeze_last_layer(student)
    optimizer.step()
    updates.average_into(teacher, student, momentum)
    return {'loss': float(loss.detach()), 'center_norm': float(criterion.center.norm()),
            'grad_norms_sum': sum(before), 'grad_norm_max': max(before),
            'clipped_tensors': sum(norm > clip for norm in before), 'grad_norm_after_clipping': after,
            'student_norm': norm_of(student), 'teacher_norm': norm_of(teacher),
            'student_bn_means': sum_of_norms(student, 'running_mean'),
            'teacher_bn_means': sum_of_norms(teacher, 'running_mean'),
            'weight_g_norm': float(student.head.last_layer.weight_g.detach().norm()),
            'weight_v_norm': float(student.head.last_layer.weight_v.detach().norm()),
            'cls_token_norm': float(student.backbone.cls_token.detach().norm())}


def count(groups: list) -> tuple:
    return tuple(len(group['params']) for group in groups)


def test_steps_of_adamw_are_the_originals():
    """Losses, norms and weights of AdamW steps equal the original's."""
    expected = NUMBERS['train_steps']
    student, teacher = (network('xcit_nano_12_p16', 512, seed=0).train() for _ in range(2))
    groups = parameter_groups(student, updates.is_spared)
    assert count(groups) == (expected['decayed'], expected['undecayed'])
    groups[0]['weight_decay'] = .04
    optimizer, criterion = torch.optim.AdamW(groups, lr=1e-3), DinoLoss(512, crops=4)
    for it, step in enumerate(expected['steps']):
        crops = [*crops_of([64, 64], 4, 100 + 10 * it), *crops_of([32, 32], 4, 105 + 10 * it)]
        actual = take_step(student, teacher, criterion, optimizer, crops, temperature=.04, clip=3., freeze=it == 0,
                           momentum=.996)
        close([actual[name] for name in step], list(step.values()), 1e-4)


def test_steps_of_sgd_with_batchnorm_and_free_lengths_are_the_originals():
    """SGD steps with BatchNorm in the head and free prototype norms equal the original's."""
    expected = NUMBERS['train_steps_2']
    student, teacher = (network('xcit_tiny_12_p16', 256, seed=1, use_bn=True, norm_last_layer=False).train()
                        for _ in range(2))
    groups = parameter_groups(student, updates.is_spared)
    assert count(groups) == (expected['decayed'], expected['undecayed'])
    optimizer, criterion = torch.optim.SGD(groups, lr=.1, momentum=.9), DinoLoss(256, crops=5)
    temperatures = ramp(.04, .07, warmup_steps=2, steps=12)
    rates = zip((.1, .2, .2), (.04, .05, .06), (0, 1, 1), (.99, .995, .999))
    for it, (step, (lr, decay, epoch, momentum)) in enumerate(zip(expected['steps'], rates)):
        for group in optimizer.param_groups:
            group['lr'] = lr
        optimizer.param_groups[0]['weight_decay'] = decay
        actual = take_step(student, teacher, criterion, optimizer, crops_of([64, 64, 32, 32, 32], 3, 100 + 20 * it),
                           temperature=temperatures[epoch], clip=.3, freeze=epoch < 1, momentum=momentum)
        close([actual[name] for name in step], list(step.values()), 1e-4)
    with torch.no_grad():
        features = teacher.eval().backbone(torch.from_numpy(seeded_image((2, 3, 64, 64), 7)))
    close(features[:, :6], expected['teacher_features'], 1e-3)
    close(features.norm(dim=1), expected['teacher_feature_norms'], 1e-4)


def test_cls_token_temperature_and_lengths_are_decayed():
    """Weight decay applies to cls_token, the temperature of XCA and the norms of prototypes."""
    student = network('xcit_nano_12_p16', 16, seed=0, norm_last_layer=False)
    decayed = {id(p) for p in parameter_groups(student, updates.is_spared)[0]['params']}
    names = {name for name, p in student.named_parameters() if id(p) in decayed}
    assert {'backbone.cls_token', 'backbone.blocks.0.attn.temperature', 'head.last_layer.weight_g'} <= names


def test_lars_is_the_originals():
    """Weights after LARS steps equal the original's."""
    rng, lars = generator(21), NUMBERS['lars']
    shapes = {'matrix': (8, 5), 'bias': (8,), 'conv': (4, 3, 3, 3), 'zero_matrix': (3, 4), 'temperature': (2, 1, 1)}
    values = {name: torch.nn.Parameter(torch.from_numpy(rng.standard_normal(shape).astype(np.float32)
                                                        * (0 if name == 'zero_matrix' else 1)))
              for name, shape in shapes.items()}
    optimizer = updates.Lars([{'params': [p for p in values.values() if p.ndim != 1]},
                              {'params': [values['bias']], 'weight_decay': 0.}], lr=0.)
    for it, (step, lr, decay) in enumerate(zip(lars['steps'], (.3, .2, .2), (.1, .1, .2))):
        for name, shape in shapes.items():
            gradient = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
            values[name].grad = gradient * (0 if it == 1 and name == 'conv' else 1)
        for group in optimizer.param_groups:
            group['lr'] = lr
        optimizer.param_groups[0]['weight_decay'] = decay
        optimizer.step()
        for name, expected in step.items():
            close(values[name].detach().norm(), expected['norm'], 1e-5)
            torch.testing.assert_close(values[name].detach().flatten()[:3], torch.tensor(expected['first']), rtol=1e-5,
                                       atol=1e-6)


def model_with_gradients() -> torch.nn.Module:
    rng, model = generator(22), torch.nn.Module()
    for name, shape, factor in (('backbone.a', (6, 4), .1), ('backbone.b', (6,), 1.), ('backbone.c', (10, 10), 10.),
                                ('head.last_layer.weight_v', (20, 5), 3.)):
        parent = model
        for part in name.split('.')[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        parameter = torch.nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.from_numpy((factor * rng.standard_normal(shape)).astype(np.float32))
        parent.register_parameter(name.rpartition('.')[2], parameter)
    return model


def test_each_gradient_is_clipped_by_its_own_norm():
    """Clipping uses the norm of each tensor, and returns the global norm."""
    expected, model = NUMBERS['clip_and_cancel'], model_with_gradients()
    total = updates.clip_each(model.parameters(), 3.)
    close([float(p.grad.norm()) for p in model.parameters()],
          [expected['norms_after'][name] for name, _ in model.named_parameters()], 1e-5)
    close(total, math.hypot(*expected['norms_before']), 1e-5)


def test_clipping_at_0_leaves_gradients():
    """A maximum of 0 does not change gradients."""
    model = model_with_gradients()
    updates.clip_each(model.parameters(), 0.)
    close([float(p.grad.norm()) for p in model.parameters()], NUMBERS['clip_and_cancel']['norms_before'], 1e-5)


def test_frozen_last_layer_has_no_gradient_at_all():
    """Freezing sets the gradients of the prototypes to None, and no others."""
    model = model_with_gradients()
    updates.freeze_last_layer(model)
    assert {name: p.grad is None for name, p in model.named_parameters()} == \
        NUMBERS['clip_and_cancel']['gradient_is_none_in_epoch_0']


def test_teacher_averages_parameters_and_not_buffers():
    """The EMA updates parameters, not BatchNorm statistics."""
    teacher, student = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    with torch.no_grad():
        student.weight.fill_(3.)
        student.running_mean.fill_(5.)
    updates.average_into(teacher, student, .75)
    assert teacher.weight.tolist() == [1.5, 1.5]
    assert teacher.running_mean.tolist() == [0., 0.]


# ---------------------------------------------------------------------------------------------------------------------
# Crops

def build_crops(**changed) -> Crops:
    return Crops(**{**dict(
        global_size=224, local_size=96, local_count=1, global_scale=[.4, 1.], local_scale=[.05, .4], flip=.5,
        color_jitter=[.4, .4, .2, .1], grayscale=.2, blur=[1., .1, .5], solarize=.2), **changed})


SIDE, DRAWS = 112, 300


def picture(kind: str) -> Image.Image:
    x = np.arange(SIDE)
    row = {'grey100': np.full(SIDE, 100), 'grey220': np.full(SIDE, 220), 'red': np.full(SIDE, 100),
           'ramp': np.round(30 + 50 * np.linspace(0, 1, SIDE)), 'stripes': np.where(x // 4 % 2, 110, 60)}[kind]
    pixels = np.repeat(np.tile(row, (SIDE, 1))[:, :, None], 3, axis=2)
    if kind == 'red':
        pixels[:, :, 1:] = 50
    return Image.fromarray(pixels.astype(np.uint8))


def draws(kind: str, **changed) -> list:
    """Draw crops of a picture as arrays (h, w, 3), by kind of crop."""
    torch.manual_seed(0)
    crops, shown = build_crops(global_size=56, local_size=24, **changed), picture(kind)
    return [[np.asarray(crop, dtype=np.float64) for crop in kinds]
            for kinds in zip(*(crops.pictures(shown) for _ in range(DRAWS)))]


TRUE = NUMBERS['augmentation']['true_probabilities']
RATES = {
    'color_jitter': ('grey100', lambda x: abs(x.mean() - 100) > .3, [TRUE['color_jitter']] * 3),
    'solarize': ('grey220', lambda x: x.mean() < 128, list(TRUE['solarize'].values())),
    'grayscale': ('red', lambda x: bool((x[:, :, 0] == x[:, :, 1]).all()), [TRUE['grayscale']] * 3),
    'flip': ('ramp', lambda x: x[:, :len(x) // 2].mean() > x[:, len(x) // 2:].mean(), [TRUE['flip']] * 3),
}


@pytest.mark.parametrize('name', RATES)
def test_random_operations_have_the_originals_rates(name):
    """Jitter, solarization, grayscale and flip occur as often as in the original."""
    kind, happened, expected = RATES[name]
    for of_kind, rate in zip(draws(kind), expected):
        seen = sum(map(happened, of_kind)) / DRAWS
        assert abs(seen - rate) <= 4 * math.sqrt(rate * (1 - rate) / DRAWS)


def test_color_jitter_is_as_strong_as_the_originals():
    """Brightness varies as in the original."""
    for crops, expected in zip(draws('grey100'), NUMBERS['augmentation']['kinds'].values()):
        means = [crop.mean() for crop in crops]
        error = expected['grey100_std_of_means'] / math.sqrt(DRAWS)
        assert abs(np.mean(means) - 100) < 4 * error
        # the standard error of a standard deviation, of both measurements
        assert abs(np.std(means) - expected['grey100_std_of_means']) < 4 * error


def test_color_jitter_changes_colors_as_the_originals():
    """Contrast, saturation and hue change a red picture as in the original."""
    for crops, expected in zip(draws('red'), NUMBERS['augmentation']['kinds'].values()):
        colored = np.array([crop.mean(axis=(0, 1)) for crop in crops if not (crop[:, :, 0] == crop[:, :, 1]).all()])
        spread = np.array(expected['red_std_of_coloured'])
        error = 4 * spread * math.sqrt(1 / len(colored) + 1 / 480)
        assert (np.abs(colored.mean(axis=0) - expected['red_mean_of_coloured']) < error).all()
        assert (np.abs(colored.std(axis=0) - spread) < error).all()


def test_blur_has_the_originals_rates():
    """Blur occurs as often as in the original for each kind of crop."""
    off = dict(color_jitter=[0.] * 4, grayscale=0., solarize=0., flip=0., global_scale=[1., 1.],
               local_scale=[1., 1.])
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[:, ::2] = 255  # any blur leaves none of the two colours
    torch.manual_seed(0)
    crops, shown = build_crops(global_size=SIDE, local_size=SIDE, **off), Image.fromarray(pixels)
    for of_kind, rate in zip(zip(*(crops.pictures(shown) for _ in range(DRAWS))), TRUE['blur'].values()):
        seen = sum(0 < np.asarray(crop)[SIDE // 2, SIDE // 2, 0] < 255 for crop in of_kind) / DRAWS
        assert abs(seen - rate) <= 4 * math.sqrt(rate * (1 - rate) / DRAWS)


@pytest.mark.parametrize(('number', 'kind'), [(0, 'global1'), (1, 'global2'), (2, 'local')])
def test_blur_is_as_strong_as_the_originals(number, kind):
    """Blur smooths edges as much as in the original."""
    expected, x = NUMBERS['augmentation']['kinds'][kind], np.arange(448)
    row = np.where(x // 16 % 2, 110, 60).astype(np.uint8)
    shown = Image.fromarray(np.repeat(np.tile(row, (448, 1))[:, :, None], 3, axis=2))
    torch.manual_seed(0)
    plan = build_crops().plans[number]
    edges = []
    for _ in range(60):
        crop = np.asarray(plan(shown), dtype=np.float64)[:, :, 0]
        edges.append(np.abs(np.diff(crop, axis=1)).mean() / crop.mean())
    error = expected['stripes_edge_std'] * math.sqrt(1 / 60 + 1 / 600)
    assert abs(np.mean(edges) - expected['stripes_edge_mean']) < 4 * error


@pytest.mark.parametrize('scale', [(.4, 1.), (.05, .4), (.25, 1.), (.14, 1.)])
def test_crops_have_the_originals_areas(scale):
    """The areas of crops have the original's mean."""
    expected = NUMBERS['crop_distribution']['scales'][str(scale)]
    crop = build_crops(global_scale=list(scale)).plans[0].transforms[0]
    shown, draws_ = torch.zeros(3, 375, 500), 2000
    torch.manual_seed(0)
    areas = []
    for _ in range(draws_):
        _, _, height, width = crop.get_params(shown, crop.scale, crop.ratio)
        areas.append(height * width / (375 * 500))
    assert abs(np.mean(areas) - expected['area_mean']) < 4 * expected['area_std'] * math.sqrt(1 / draws_ + 1 / 20000)


def boxes(size: tuple, scale: list, count: int, kind=RandomResizedCrop) -> list:
    """Return (top, left, height, width) of crops, the n-th from the seed n."""
    shown, found = Image.new('L', size), []
    for seed in range(count):
        torch.manual_seed(seed)
        found.append(kind.get_params(shown, scale, [3 / 4, 4 / 3]))
    return found


@pytest.mark.parametrize('size', [(224, 224), (300, 200), (200, 399)], ids=str)
@pytest.mark.parametrize('scale', [[.4, 1.], [.05, .4]], ids=str)
def test_crops_of_pictures_below_2_to_1_are_torchvisions(size, scale):
    """Crops, and the random numbers after them, are torchvision's."""
    own, theirs = ((boxes(size, scale, 50, kind), torch.rand(1).item())
                   for kind in (RandomResizedCrop, transforms.RandomResizedCrop))
    assert own == theirs


@pytest.mark.parametrize('size', [(400, 200), (200, 600), (900, 60), (60, 900)], ids=str)
@pytest.mark.parametrize('scale', [[.4, 1.], [.05, .4]], ids=str)
def test_crops_of_long_pictures_are_anywhere(size, scale):
    """Crops of a long picture have the wanted shapes, differ, and together show the whole picture."""
    along, across = (1, 0) if size[0] > size[1] else (0, 1)
    found = boxes(size, scale, 200)
    seen = np.zeros(max(size), bool)
    for box in found:
        assert 0 < box[2 + across] <= min(size) - box[across]
        assert .72 < box[3] / box[2] < 1.37
        assert box[2] * box[3] <= max(size) * min(size) * (scale[1] + .02)
        seen[box[along]:box[along] + box[2 + along]] = True
    assert seen.mean() > .95
    assert len(set(found)) > 150


def test_crops_of_long_pictures_that_fit_are_torchvisions():
    """A crop of a long picture only differs from torchvision's where torchvision's is the central rectangle."""
    theirs = boxes((400, 200), [.4, 1.], 200, transforms.RandomResizedCrop)
    is_central = [box == (0, (400 - 267) // 2, 200, 267) for box in theirs]
    assert 15 < sum(is_central) < 50
    for own, other, central in zip(boxes((400, 200), [.4, 1.], 200), theirs, is_central):
        assert central or own == other


@pytest.mark.parametrize('size', [(1, 900), (3, 1), (1, 1), (2, 5)], ids=str)
def test_thin_pictures_have_crops(size):
    """Pictures of a few pixels have crops, as with torchvision."""
    for top, left, height, width in boxes(size, [.05, 1.], 30):
        assert 0 < height <= size[1] - top
        assert 0 < width <= size[0] - left


def test_global_crops_of_a_long_picture_differ():
    """The two global crops of a 900 x 60 picture show different parts."""
    shown = Image.fromarray(np.tile(np.linspace(0, 255, 900).astype(np.uint8), (60, 1))).convert('RGB')
    crops = build_crops(color_jitter=[0.] * 4, solarize=0., global_size=16, local_count=0)
    torch.manual_seed(0)
    means = np.array([[np.asarray(crop).mean() for crop in crops.pictures(shown)] for _ in range(20)])
    assert np.abs(means[:, 0] - means[:, 1]).mean() > 40
    assert means.min() < 40
    assert means.max() > 215


def test_crops_depend_on_torchs_generator_alone():
    """Crops with the same seed of torch are equal."""
    crops, shown = build_crops(), picture('ramp')
    torch.manual_seed(3)
    first = crops(shown)
    torch.manual_seed(3)
    torch.testing.assert_close(crops(shown), first, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation

def test_evaluation_transform_is_the_originals():
    """An evaluation image equals the original's pixel by pixel."""
    expected = NUMBERS['eval_transforms']['knn_and_linear']
    image = View(224, full_crop=False, resize=True).transform()(load_rgb(REFERENCE / 'pattern.png'))
    step = expected['step']
    assert list(image.shape) == expected['shape']
    assert float(image.mean()) == pytest.approx(expected['mean'], abs=1e-5)
    assert float(image.std()) == pytest.approx(expected['std'], abs=1e-4)
    torch.testing.assert_close(image[:, ::step, ::step].flatten(), torch.tensor(expected['values']), rtol=0, atol=1e-4)


def knn_case(seed: int, *, classes: int, width: int, images: tuple, noise: float) -> tuple:
    rng = generator(seed)
    centres, case = rng.standard_normal((classes, width)), []
    for count_ in images:
        labels = np.arange(count_) % classes
        features = centres[labels] + noise * rng.standard_normal((count_, width))
        case += [torch.from_numpy(features.astype(np.float32)), torch.from_numpy(labels)]
    return tuple(case)


def test_knn_is_the_originals():
    """Top-1 and top-5 equal the original's for several k."""
    expected = {int(k): values for k, values in NUMBERS['knn']['top1_top5'].items()}
    train, train_labels, test, test_labels = knn_case(5, classes=10, width=16, images=(500, 200), noise=1.6)
    hits = neighbours.accuracies(train, train_labels, test, test_labels, ks=list(expected), temperature=.07,
                                 num_classes=10)
    assert {k: top1 / 2 for k, (top1, _) in hits.items()} == {k: top1 for k, (top1, _) in expected.items()}
    assert {k: hits[k][1] / 2 for k in (1, 20, 100)} == {k: expected[k][1] for k in (1, 20, 100)}
    assert hits[10][1] / 2 == 93.  # the original's 94 counts classes without votes


@pytest.mark.parametrize('setting', NUMBERS['knn2']['results'])
@pytest.mark.parametrize('blocks', [(256, 2 ** 16), (7, 97)])
def test_knn_is_the_originals_in_blocks_of_any_size(monkeypatch, setting, blocks):
    """Accuracies do not depend on the sizes of blocks."""
    monkeypatch.setattr(neighbours, 'TEST_BLOCK', blocks[0])
    monkeypatch.setattr(neighbours, 'TRAIN_BLOCK', blocks[1])
    expected = NUMBERS['knn2']['results'][setting]
    k, temperature = (float(part.split('=')[1]) for part in setting.split(','))
    case = knn_case(13, classes=20, width=32, images=(1000, 250), noise=2.2)
    hits = neighbours.accuracies(*case, ks=[int(k)], temperature=temperature, num_classes=20)[int(k)]
    assert [100 * hit / 250 for hit in hits] == pytest.approx([expected['top1'], expected['top5']])


def test_knn_of_equal_votes_takes_the_lower_class():
    """Classes with equal votes are ranked by their index."""
    votes, labels = torch.tensor([[1., 1., 1., 1.]]), torch.tensor([[3, 1, 3, 1]])
    assert neighbours.rank(votes, labels, 5)[:, :2].tolist() == [[1, 3]]


def test_class_without_a_vote_is_no_prediction():
    """Only classes of neighbours are ranked, even those whose votes are 0."""
    votes, labels = torch.tensor([[1., .5, 0.]]), torch.tensor([[3, 1, 4]])
    assert neighbours.rank(votes, labels, 6).tolist() == [[3, 1, 4, -1, -1, -1]]


def test_top5_of_one_neighbour_is_top1():
    """With k = 1 there is one prediction, although class 0 would be right for many images."""
    train, labels = torch.eye(8), torch.arange(8)
    hits = neighbours.accuracies(train, labels, train, (labels + 1) % 8, ks=[1, 2], temperature=.07, num_classes=8)
    assert hits[1] == (0, 0)


def test_knn_works_at_any_temperature():
    """A small temperature, which would make votes infinite, has the result of the nearest neighbour."""
    case = knn_case(13, classes=20, width=32, images=(1000, 250), noise=2.2)
    cold, nearest = (neighbours.accuracies(*case, ks=[k], temperature=temperature, num_classes=20)[k][0]
                     for k, temperature in ((20, 1e-4), (1, .07)))
    assert cold == nearest


def test_knn_of_equal_similarities_takes_the_first(monkeypatch):
    """Equally near neighbours are ranked in the order of the training set."""
    monkeypatch.setattr(neighbours, 'TRAIN_BLOCK', 4)
    train = torch.ones(20, 1)
    _, places = neighbours.nearest(train, torch.ones(2, 1), 6)
    assert places.tolist() == [[0, 1, 2, 3, 4, 5]] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Collapse

def stats(**changed) -> dict:
    return {**dict(train_teacher_entropy=2., train_mean_entropy=4., train_feature_spread=.5), **changed}


@pytest.mark.parametrize(('metrics', 'kinds'), [
    (stats(), set()),
    (stats(train_teacher_entropy=5.54, train_mean_entropy=5.545), {'uniform'}),
    (stats(train_teacher_entropy=1., train_mean_entropy=1.01), {'alike'}),
    (stats(train_teacher_entropy=0., train_mean_entropy=0.), {'alike'}),
    (stats(train_feature_spread=.019), {'features'}),
    (stats(train_feature_spread=.021), set()),
    (stats(train_teacher_entropy=5.54, train_mean_entropy=5.54, train_feature_spread=0.), {'uniform', 'features'}),
])
def test_collapse_is_named_by_its_kind(metrics, kinds):
    """Each kind of collapse is detected by its own metrics."""
    assert set(kinds_of_collapse(metrics, 256)) == kinds


def test_spread_of_random_features_is_1_and_of_equal_ones_0():
    """The spread is 1 for random features and 0 for equal ones."""
    torch.manual_seed(0)
    assert float(spread(torch.randn(4096, 64))) == pytest.approx(1., abs=.01)
    assert float(spread(torch.ones(8, 64))) == pytest.approx(0., abs=1e-6)
