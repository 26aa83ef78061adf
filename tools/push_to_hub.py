"""Publish a trained model on the Hugging Face hub for timm and this repository.

Writes a folder with the weights in timm's naming, timm's config and a model card, and uploads the folder. The card's
figures are measured: in the training run of the checkpoint, and in an eval.json beside the checkpoint.
"""
import json
import re
import tempfile
from pathlib import Path
from typing import List, Optional

import huggingface_hub
import timm
import torch

import utils
import weights
import xcit_zoo
from inference import flags, timm_files
from inference.loaded import LoadedModel, load
from run import checkpoints
from run.commandline import PATH_OBJECT, Parser, run_program
from run.descriptions import trained_with
from run.output import log
from utils import InputError, RunStopped, first_line

TOLERANCE = 1e-3  # largest difference between the logits of both models, as a fraction of the largest logit
CARD = '''---
library_name: timm
pipeline_tag: {task}
license: {license}
tags:
- {task}
- timm
- xcit
---
# {title}

{model} for {size} x {size} pixels{classes}.

## Use

```python
import timm

model = timm.create_model('hf-hub:{repo}', pretrained=True).eval()
```

With the [XCiT repository](https://arxiv.org/abs/2106.09681) of the training:

```bash
python -m tools.predict PICTURE.jpg --model {model} --pretrained hf-hub:{repo}
```

## Measured

{measured}
'''


def get_args_parser() -> Parser:
    parser = Parser('python -m tools.push_to_hub', description=__doc__,
                    example='--pretrained runs/mine/best_model.pth --repo OWNER/NAME --dry-run --output-dir runs/hub')
    parser.add_argument('--repo', required=True, metavar='OWNER/NAME', help='repository on the hub')
    parser.add_argument('--output-dir', type=PATH_OBJECT, metavar='DIR',
                        help='folder to write; unset: a temporary folder')
    parser.add_argument('--dry-run', action='store_true', help='folder only, no upload')
    parser.add_argument('--private', action='store_true', help='private visibility of a new repository')
    parser.add_argument('--license', default='other', metavar='ID', help='licence of the weights, e.g. apache-2.0')
    flags.add_weights_flags(parser)
    return parser


def measured(given: weights.Weights, source: str, *, is_ema: bool) -> List[str]:
    """Return a line for each measured accuracy of weights, which may be the EMA of a training checkpoint."""
    trained, lines = trained_with(given.checkpoint), []
    accuracy = given.checkpoint.get('accuracy')
    key = 'best_ema' if is_ema else 'best'
    if isinstance(accuracy, dict) and isinstance(accuracy.get(key), (int, float)) and accuracy[key] > 0:
        lines.append(f'- {accuracy[key]:.2f} % top-1 on the evaluation pictures of the training (`--data-set '
                     f'{trained.get("data_set")}`), the best of its epochs')
    file = Path(source).parent / 'eval.json'
    if Path(source).is_file() and file.is_file():
        try:
            stats = json.loads(file.read_text())
            if Path(str(stats['weights'])).name == Path(source).name:
                side = ' x '.join(map(str, stats['resolution']))
                lines.append(f'- {stats["acc1"]:.2f} % top-1 and {stats["acc5"]:.2f} % top-5 on {stats["images"]} '
                             f'pictures (`--data-set {stats["args"]["data_set"]}`) at {side} pixels, crop '
                             f'{stats["crop"]:g}')
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f'{file}: can\'t be read ({type(error).__name__}: {first_line(error)})') from None
    return lines


def write_folder(folder: Path, loaded: LoadedModel, given: weights.Weights, card: dict, *,
                 published: Optional[xcit_zoo.Published]):
    """Write model.safetensors, config.json and README.md; `card`: repo, license and measured, for CARD."""
    described = timm_files.describe(given, loaded.name, published)
    described['args'].update(input_size=loaded.view.input_size, full_crop=loaded.view.full_crop)
    config = timm_files.config(loaded.name, described, loaded.model, published)
    tensors = timm_files.contiguous(xcit_zoo.to_timm_names(given.tensors))
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints.save_weights(tensors, described, folder / 'model.safetensors')
    utils.write_json(folder / 'config.json', config)
    classes = loaded.classes
    utils.write_text(folder / 'README.md', CARD.format(
        **card, task='image-classification' if loaded.model.num_classes else 'image-feature-extraction',
        title=card['repo'].partition('/')[2], model=loaded.name, size=loaded.view.input_size,
        classes=f', {len(classes)} classes: {utils.abridge(classes, 20)}' if classes else ''))


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
    lines = measured(given, args.pretrained, is_ema=args.use_ema or args.checkpoint_key.startswith('model_ema'))
    figures = '\n'.join(lines) or 'Nothing was measured with this file.'
    card = dict(repo=args.repo, license=args.license, measured=figures)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.output_dir or Path(temporary)
        write_folder(folder, loaded, given, card, published=published)
        check_folder(folder, loaded)
        log(f'{folder}: {loaded.name}, {loaded.model.num_classes} classes; timm computes the same outputs')
        if args.dry_run:
            return None
        address = upload(folder, args.repo, private=args.private)
    log(f'{address}: uploaded')
    return address


if __name__ == '__main__':
    run_program(main)
