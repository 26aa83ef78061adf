"""Publish a trained model on the Hugging Face hub for timm and this repository.

Writes a folder with the weights in timm's naming, timm's config and a model card, and uploads the folder. The card's
figures are measured: in the training run of the checkpoint, and in an eval.json beside the checkpoint.
"""
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import List, Optional

if not __package__:  # started as a file
    sys.path[0] = os.path.realpath(f'{__file__}/../..')

import huggingface_hub
import timm
import torch

import utils
import weights
import xcit
import xcit_zoo
from inference import flags, timm_files
from inference.loaded import LoadedModel, load
from run import checkpoints
from run.commandline import PATH_OBJECT, Parser, run_program
from run.descriptions import trained_with
from run.output import log
from utils import InputError, RunStopped, counted, first_line

TOLERANCE = 1e-3  # largest difference between the logits of both models, as a fraction of the largest logit
DATA = {'IMNET': 'ImageNet-1k', 'IMNET22k': 'ImageNet-22k', 'CIFAR10': 'CIFAR-10', 'CIFAR100': 'CIFAR-100',
        'FASHION': 'Fashion-MNIST', 'SAMPLE': 'a part of Fashion-MNIST', 'INAT': 'iNaturalist 2018',
        'INAT19': 'iNaturalist 2019', 'CARS': 'Stanford Cars', 'FLOWERS': 'Oxford Flowers 102'}  # by --data-set
CODE = 'https://github.com/facebookresearch/xcit'
CARD = '''---
library_name: timm
pipeline_tag: {task}
license: {license}
tags:
- {task}
- timm{tag}
---
# {title}

{model} for {size} x {size} pixels{classes}.{trained}

## Use

```python
import timm
from PIL import Image

model = timm.create_model('hf-hub:{repo}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
{outputs} = model(transform(Image.open('PICTURE.jpg').convert('RGB'))[None])
```

With {code}:

```bash
python -m tools.{command} --model {model} --pretrained hf-hub:{repo}
```

## Measured

{measured}
'''
CLASSIFIER = dict(task='image-classification', outputs='logits', command='predict PICTURE.jpg')
BACKBONE = dict(task='image-feature-extraction', outputs='features',
                command='extract_features PICTURE.jpg --output features.npz')


def get_args_parser() -> Parser:
    parser = Parser('python -m tools.push_to_hub', description=__doc__,
                    example='--pretrained runs/mine/best_model.pth --repo OWNER/NAME --dry-run --output-dir runs/hub')
    parser.add_argument('--repo', required=True, metavar='OWNER/NAME', help='repository on the hub')
    parser.add_argument('--output-dir', type=PATH_OBJECT, metavar='DIR',
                        help='folder to write; unset: a temporary folder')
    parser.add_argument('--dry-run', action='store_true', help='folder only, no upload')
    parser.add_argument('--private', action='store_true', help='private visibility of a new repository')
    parser.add_argument('--data', metavar='NAME', help='name of the training data on the card; if unset, by --data-set '
                        'or the folder\'s name')
    parser.add_argument('--code', metavar='URL', help='address of this code, for a link on the card')
    parser.add_argument('--license', default='other', metavar='ID', help='licence of the weights, e.g. apache-2.0')
    flags.add_weights_flags(parser)
    return parser


def data_of(run: dict, name: Optional[str]) -> str:
    """Return the name of a run's data for the card, '' if unknown; `run`: flags of the run, `name`: --data."""
    data_set, folder = run.get('data_set'), Path(str(run.get('data_path') or '')).name
    known = DATA.get(data_set) or (f'{folder} (`--data-set {data_set}`)' if folder else data_set)
    return name or (known if isinstance(data_set, str) else '')


def in_training(given: weights.Weights, data: str) -> List[str]:
    """Return a line with the accuracy that the training measured of weights, if there is one."""
    accuracy = timm_files.accuracy_of(given).get('accuracy')
    if not accuracy:
        return []
    count = f'{accuracy["images"]:.0f} ' if 'images' in accuracy else ''
    return [f'- {accuracy["last"]:.2f} % top-1 on the {count}evaluation pictures of {data}, after epoch '
            f'{accuracy["last_epoch"]:.0f} of the training']


def in_evaluation(source: str, run: dict, name: Optional[str], *, choice: dict) -> List[str]:
    """Return a line with the accuracy in an eval.json beside a file of weights, if it is that of these weights.

    Args:
        source: path of the weights.
        run: flags of the training.
        name: name of the training data, --data.
        choice: flags that choose the weights in their file.
    """
    file = Path(source).parent / 'eval.json'
    if not Path(source).is_file() or not file.is_file():
        return []
    try:
        stats = json.loads(file.read_text())
        used = stats['args']
        if Path(str(stats.get('weights'))).name != Path(source).name or any(
                used.get(flag, value) != value for flag, value in choice.items()):
            return []
        if file.stat().st_mtime < Path(source).stat().st_mtime:
            log(f'{file}: older than {source}, so its accuracy is left out')
            return []
        is_same = all(used.get(flag) == run.get(flag) for flag in ('data_set', 'data_path'))
        side = ' x '.join(map(str, stats['resolution']))
        return [f'- {stats["acc1"]:.2f} % top-1 and {stats["acc5"]:.2f} % top-5 on {stats["images"]} evaluation '
                f'pictures of {data_of(used, name if is_same else None)} at {side} pixels, crop {stats["crop"]:g}']
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f'{file}: can\'t be read ({type(error).__name__}: {first_line(error)})') from None


def write_folder(folder: Path, loaded: LoadedModel, given: weights.Weights, card: dict, *,
                 published: Optional[xcit_zoo.Published]):
    """Write model.safetensors, config.json and README.md; `card`: repo, license, trained, code and measured of CARD."""
    described = timm_files.describe(given, loaded.name, published)
    described['args'].update(input_size=loaded.view.input_size, full_crop=loaded.view.full_crop)
    config = timm_files.config(loaded.name, described, loaded.model, published)
    tensors = timm_files.contiguous(xcit_zoo.to_timm_names(given.tensors))
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints.save_weights(tensors, described, folder / 'model.safetensors')
    utils.write_json(folder / 'config.json', config)
    classes = loaded.classes
    utils.write_text(folder / 'README.md', CARD.format(
        **card, **(CLASSIFIER if loaded.model.num_classes else BACKBONE),
        tag='\n- xcit' if xcit.is_xcit_name(loaded.name) else '',
        title=card['repo'].partition('/')[2], model=loaded.name, size=loaded.view.input_size,
        classes=f', {counted(len(classes), "class")}: {utils.abridge(classes, 20)}' if classes else ''))


@torch.inference_mode()
def check_folder(folder: Path, loaded: LoadedModel):
    """Raise RunStopped if timm computes other outputs from a folder."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, loaded.view.input_size, loaded.view.input_size)
    expected = loaded.model(images)
    outputs = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()(images)
    if not (expected - outputs).abs().max() <= TOLERANCE * expected.abs().max():
        raise RunStopped(f'{folder}: timm computes other values from this folder; nothing was uploaded')


def upload(folder: Path, repo: str, *, private: bool) -> str:
    """Upload a folder to a repository, which is made if needed; return its address."""
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(folder_path=str(folder), repo_id=repo, commit_message='Weights, config and model card')
    except Exception as error:  # many kinds: network, hub, token
        raise RunStopped(f'--repo {repo}: can\'t be uploaded ({first_line(error)}); a token comes from: hf auth login'
                         ) from None
    return f'https://huggingface.co/{repo}'


def main(argv: Optional[list] = None) -> Optional[str]:
    """Publish, with a command line (`sys.argv` if None); return the address, or None with --dry-run."""
    args = get_args_parser().parse_args(argv)
    if not re.fullmatch(r'[\w.-]+/[\w.-]+', args.repo):
        raise InputError(f'--repo {args.repo}: must be OWNER/NAME')
    if args.dry_run and args.output_dir is None:
        raise InputError('--dry-run: needs --output-dir to write to')
    if args.output_dir is not None and args.output_dir.is_dir() and any(
            file.name not in ('model.safetensors', 'config.json', 'README.md') for file in args.output_dir.iterdir()):
        raise InputError(f'--output-dir {args.output_dir}: contains other files; choose another folder')
    loaded = load(**flags.weights(args), fuse=False)
    given = weights.read(args.pretrained, '--pretrained', loaded.name, use_ema=args.use_ema, key=args.checkpoint_key)
    published = weights.published(args.model or '', args.pretrained) or weights.published_as(args.pretrained)
    run = trained_with(given.checkpoint)
    data = data_of(run, args.data)
    lines = in_training(given, data) + in_evaluation(
        args.pretrained, run, args.data, choice={'use_ema': args.use_ema, 'checkpoint_key': args.checkpoint_key})
    card = dict(repo=args.repo, license=args.license, trained=f' Trained on {data}.' if data else '',
                code=f'[the code of the training]({args.code})' if args.code else
                f'the code of the training, a new version of [XCiT\'s code]({CODE})',
                measured='\n'.join(lines) or 'Nothing was measured with this file.')
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.output_dir or Path(temporary)
        write_folder(folder, loaded, given, card, published=published)
        check_folder(folder, loaded)
        log(f'{folder}: {loaded.name}, {counted(loaded.model.num_classes, "class")}; timm computes the same outputs')
        if args.dry_run:
            log(f'--dry-run: {folder} is written, nothing was uploaded')
            return None
        address = upload(folder, args.repo, private=args.private)
    log(f'{address}: uploaded')
    return address


if __name__ == '__main__':
    run_program(main)
