"""tools.benchmark: every command, in a tiny form, and the meaning of its measurements."""
import csv
import re
from unittest import mock

import pytest
import torch
from PIL import Image
from processes import run

from dino import networks
from tools import benchmark_models, measuring
from tools.benchmark import main
from utils import InputError

CPU = torch.device('cpu')
NANO = 'xcit_nano_12_p16'
QUICK = ['--rounds', '1', '--device', 'cpu']


def test_speed(capsys):
    """`speed` prints time, memory, operations and a plausible share of the machine's peak."""
    result = main(['speed', '--model', NANO, '--resolution', '64', '--batch-size', '2', *QUICK])
    assert result['images_per_s'] == pytest.approx(1e3 / result['ms_per_image'])
    assert 0 < result['share_of_peak'] < 1.5
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith('| xcit')]
    assert re.search(r'\| 64x64 \| 2 \| [\d.]+ \| [\d.]+ \| (\d+ MB|-) \| [\d.]+ \| \d+ % of \d+ GFLOP/s', table[0])


@pytest.mark.slow
def test_speed_of_compiled_training():
    """A compiled training step has more operations than a forward pass."""
    arguments = ['speed', '--model', 'resnet10t', '--resolution', '32', '--batch-size', '2', *QUICK]  # soon compiled
    assert main([*arguments, '--training', '--compile'])['gflops_per_image'] > 2 * main(arguments)['gflops_per_image']


def test_operations_are_the_published_ones():
    """In plain form nano has the 0.56 GMAC of the paper, with two operations each."""
    step = benchmark_models.build_step(NANO, (224, 224), 1, benchmark_models.StepSettings(CPU, form='plain'))
    assert measuring.operations(step) / 2e9 == pytest.approx(.56, rel=.05)


def test_scaling(tmp_path, capsys):
    """`scaling` writes a row per model and resolution and two plots, and prints the exponents."""
    main(['scaling', '--models', NANO, f'timm:{NANO}', '--resolutions', '64', '96x128', '--rounds', '1',
          '--output-dir', str(tmp_path), '--device', 'cpu'])
    rows = list(csv.DictReader(open(tmp_path / 'scaling.csv', encoding='utf-8-sig')))
    assert [(row['model'], row['height'], row['width']) for row in rows] == [
        (NANO, '64', '64'), (f'timm:{NANO}', '64', '64'), (NANO, '96', '128'), (f'timm:{NANO}', '96', '128')]
    for name in ('time.png', 'memory.png'):
        assert len(Image.open(tmp_path / name).convert('RGB').getcolors(2 ** 24)) > 20
    assert re.search(rf'\| {NANO} \| -?[\d.]+ \| (-?[\d.]+|-) \|', capsys.readouterr().out)


def test_exponent():
    """The exponent of a quadratic law is 2, and missing values are left out."""
    resolutions = [(10, 10), (20, 20), (40, 40)]
    assert benchmark_models.exponent(resolutions, [1., 16., None]) == pytest.approx(2)
    assert benchmark_models.exponent(resolutions, [1., None, None]) is None


def test_compare(capsys):
    """`compare` measures any models side by side, with ratios to the second."""
    names = [NANO, f'timm:{NANO}', 'deit_tiny_patch16_224', 'resnet18']
    results = main(['compare', '--models', *names, '--resolution', '64', '--batch-size', '2', '--rounds', '1',
                    '--device', 'cpu'])
    assert [result['model'] for result in results] == names
    out = capsys.readouterr().out
    assert re.search(rf'\| timm:{NANO} \| [\d.]+ \| [\d.]+ \| 1.00 \|', out)


def test_suite(monkeypatch, capsys):
    """The ratios of the suite are those of the better of eager and compiled."""
    monkeypatch.setattr(benchmark_models, 'SUITE', (('inference', NANO, 32, 48, 1, 1),))
    result, = main(['compare', '--suite', '--rounds', '1', '--device', 'cpu'])
    row = re.search(r'^\| inference xcit_nano_12_p16 at 32x48, batch 1 \| (.*) \|$', capsys.readouterr().out, re.M)
    here, here_compiled, theirs, theirs_compiled, speed, *memory = row[1].split(' | ')
    assert result['speed'] == pytest.approx(
        min(float(theirs), float(theirs_compiled)) / min(float(here), float(here_compiled)), rel=.1)
    assert float(speed) == pytest.approx(result['speed'], abs=.01)
    assert len(memory) == 3


@pytest.mark.parametrize(('names', 'all_names'), [
    pytest.param([], [NANO], marks=pytest.mark.slow), ([NANO], [NANO, 'xcit_nano_12_p8'])])
def test_against_timm(monkeypatch, names, all_names):
    """--against-timm measures the named models, or all if none is named."""
    monkeypatch.setattr(benchmark_models.xcit, 'MODELS', all_names)
    results = main(['compare', '--against-timm', *names, '--resolution', '32x48', '--batch-size', '1', '--rounds', '1',
                    '--device', 'cpu'])
    assert [(r['model'], r['height'], r['width']) for r in results] == [(NANO, 32, 48)]


@pytest.mark.parametrize(('flags', 'message'), [
    (['--suite', '--resolution', '64'], '--resolution: has no effect with --suite'),
    (['--against-timm', '--compile'], '--compile: has no effect with --against-timm'),
    (['--compile-mode', 'max-autotune'], '--compile-mode max-autotune: has no effect without --compile'),
    (['--models', 'resnet50', '--xca', 'gram'], '--xca gram: has no effect on resnet50')])
def test_options_without_effect_are_refused(flags, message):
    """`compare` refuses flags that have no effect on the chosen models."""
    with pytest.raises(InputError, match=message):
        main(['compare', *flags])


@torch.no_grad()
def test_both_sides_have_the_same_weights():
    """Both implementations are built with the same weights, so their outputs are equal."""
    ours, theirs = (benchmark_models.build(name, (64, 64), training=False, form='auto')
                    for name in (NANO, f'timm:{NANO}'))
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)


def test_xca(capsys):
    """`xca` measures both forms against timm's, forward and backward, eager and compiled."""
    results = main(['xca', '--dim', '128', '--tokens', '50', '--rounds', '1', '--device', 'cpu'])
    assert [(r['tokens'], r['backward']) for r in results] == [(50, False), (50, True)]
    rows = re.findall(r'^\| 128 \| .*', capsys.readouterr().out, re.MULTILINE)
    assert [len(row.split('|')) - 2 for row in rows] == [11] * 2
    for row, result in zip(rows, results):
        timm_eager, timm_compiled = map(float, row.split('|')[4:6])
        assert min(timm_eager, timm_compiled) == pytest.approx(1e3 * result['timm'], abs=.006)


def test_data(capsys):
    """`data` measures both loaders on synthetic pictures, and the stages of a sample."""
    result = main(['data', '--images', '40', '--rounds', '1'])
    assert result['here'] > 0
    assert result['timm'] > 0
    assert list(result['stages']) == ['decode', 'RandomResizedCropAndInterpolation', 'RandomHorizontalFlip',
                                      'RandAugment', 'ToNormalizedTensor', 'RandomErasing']


def test_medians_of_alternating_rounds(monkeypatch):
    """Candidates take turns, and a slow round of one does not count."""
    calls = []
    durations = iter([1., 1., 5., 5., 1., 5., 9., 5., 1., 7.])  # two for warm-up of each, then three rounds of both

    def seconds(step, device, repeats=1):
        step()
        return next(durations)

    monkeypatch.setattr(measuring, 'seconds', seconds)
    times = measuring.take_turns({name: lambda name=name: calls.append(name) for name in 'ab'}, CPU, 3)
    assert times == {'a': 1., 'b': 5.}
    assert ''.join(calls) == 'aabbababab'


def test_out_of_memory_is_shown(capsys):
    """A step out of memory is shown as such, and the other steps are measured."""
    def too_much():
        torch.empty(2 ** 60)

    times = measuring.take_turns({'small': lambda: None, 'large': too_much}, CPU, 1)
    assert times['small'] is not None
    assert times['large'] is None
    assert measuring.shown(times['large']) == 'out of memory'
    assert measuring.peak_memory(too_much, CPU) is None


def test_a_model_that_does_not_fit_is_shown(monkeypatch, capsys):
    """A model that does not fit into memory is shown as out of memory."""
    def build(*args, **kwargs):
        torch.empty(2 ** 60)

    monkeypatch.setattr(benchmark_models, 'build', build)
    result, = main(['compare', '--models', NANO, '--resolution', '32', *QUICK])
    assert (result['seconds'], result['memory_mb']) == (None, None)
    assert f'| {NANO} | out of memory | out of memory | - | - |' in capsys.readouterr().out


def test_peak_memory_is_of_the_step():
    """The peak counts all memory that a step holds at once, independently of the memory in use before."""
    peak, = run(['-c', """if True:
        import torch
        from run import cpu
        from tools import measuring

        def step():
            for n in (2 ** 22, 2 ** 24):
                a = torch.ones(n)
                a + 1
                del a

        cpu.keep_freed_memory()
        held = [torch.ones(2 ** 22) for _ in range(9)]
        del held[::2]  # leaves holes in the heap
        print(measuring.peak_memory(step, torch.device('cpu')))"""], 1)
    if peak == 'None\n':
        pytest.skip('this system does not tell')
    assert float(peak) == pytest.approx(128, abs=20)


@pytest.mark.parametrize(('arguments', 'words'), [
    (['speed', '--model', 'xcit_smal_12_p16'], ['--model', 'xcit_smal_12_p16', 'similar', 'xcit_small_12_p16']),
    (['speed', '--model', 'timm:resnet50'], ['timm:resnet50']),
    (['speed', '--resolution', '224by224'], ['--resolution', '224by224', '800x1333']),
    (['speed', '--resolution', '0'], ['--resolution']),
    (['speed', '--precision', 'fp16', '--device', 'cpu'], ['--precision fp16', 'bf16']),
    (['data', '--data-path', '/nowhere'], ['--data-path /nowhere', 'no such folder']),
    (['xca', '--dim', '100', '--device', 'cpu'], ['--dim 100', 'multiple of 8']),
    (['scaling', '--output-dir', '/etc/hostname/x', '--device', 'cpu'],
     ['--output-dir /etc/hostname/x', 'not a writable directory']),
    (['race'], ['race', 'speed']),
])
def test_bad_input(arguments, words):
    """Bad input is refused in one line with the allowed values."""
    with pytest.raises(InputError) as error:
        main(arguments)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert '\n' not in str(error.value)


def test_dino(capsys):
    """`dino` measures teacher, student and the whole step, which takes the longest, here and with timm's model."""
    with mock.patch.object(networks, 'HIDDEN', 16):
        rows = main(['dino', '--model', NANO, '--batch-size', '2', '--global-crops-size', '64', '--local-crops-size',
                     '32', '--local-crops-number', '1', '--out-dim', '64', '--no-compile', *QUICK])
    assert [row['step'] for row in rows] == ['teacher', 'student', 'whole step']
    assert all(rows[0]['seconds'][way] < rows[2]['seconds'][way] for way in (('here', False), ('timm', False)))
    assert re.search(r'^\| whole step \| timm \| [\d.]+ \| 1.00 \|', capsys.readouterr().out, re.M)
