"""The installed package, which has the model alone."""
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT

PROGRAM = '''
import sys
import utils  # the caller's
assert utils.MINE
import timm, torch, xcit
model = timm.create_model('xcit_nano_12_p16.fb_dist_in1k', num_classes=10, pretrained=False).eval()
images = torch.rand(1, 3, 96, 64)
expected = model(images)
fast = xcit.fuse(model)
assert (fast(images) - expected).abs().max() < 1e-5 * expected.abs().max()
assert 'torchvision' not in sys.modules or 'timm' in sys.modules
ours = {name: module.__file__ for name, module in sys.modules.items() if name.split('_')[0] in ('xcit', 'xca')}
assert len(ours) > 6 and all(sys.argv[1] in file for file in ours.values()), ours
'''


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """Build the wheel from a copy of git's files, since the build writes beside the sources."""
    folder = tmp_path_factory.mktemp('wheel')
    files = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', '*.py', 'pyproject.toml', 'LICENSE',
                            'README.md'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for file in files:
        if (ROOT / file).exists():
            (folder / 'source' / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / 'source' / file).write_bytes((ROOT / file).read_bytes())
    built = subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--wheel-dir', folder,
                            folder / 'source'], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return next(folder.glob('xcit-*.whl'))


def test_wheel_holds_the_model_alone(wheel):
    """The wheel has the model's modules, a licence and a version; it requires torch and timm."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith('/METADATA'))).decode()
    modules = {name for name in names if '.dist-info/' not in name}
    assert {'xca.py', 'xca_gram.py', 'xcit.py', 'xcit_zoo.py', 'xcit_fuse.py'} <= modules
    assert all(name.removesuffix('.py').split('_')[0] in ('xca', 'xcit') for name in modules)
    assert any(name.endswith('/licenses/LICENSE') for name in names)
    assert '\nVersion: ' in metadata
    assert sorted(line.split()[1][:4] for line in metadata.splitlines() if line.startswith('Requires-Dist')) == [
        'timm', 'torc']


def test_installed_beside_a_foreign_utils(wheel, tmp_path):
    """The package works in a program that has another module `utils`."""
    venv, folder = tmp_path / 'venv', tmp_path / 'elsewhere'
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', venv], check=True)
    site = next(venv.glob('lib/python*/site-packages'))
    subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', site, wheel], check=True)
    (site / 'packages.pth').write_text(f'{Path(torch.__file__).parents[1]}\n')  # torch and timm
    folder.mkdir()
    (folder / 'utils.py').write_text('MINE = True\n')
    (folder / 'program.py').write_text(PROGRAM)
    run = subprocess.run([venv / 'bin' / 'python', 'program.py', str(site)], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
