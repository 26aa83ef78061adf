"""Publish a trained model on the Hugging Face hub, where timm and this repository read it.

Writes a folder with the weights in timm's naming, the config that timm reads, and a model card, and uploads it. The
card has only figures that were measured: those of the training's checkpoint, and of an eval.json beside it. With
--dry-run the folder is written, and nothing uploaded.
"""
import run.startup  # noqa: F401  first of all

import argparse
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
from run import checkpoints, commandline
from run.commandline import PATH_OBJECT, Parser
from run.descriptions import trained_with
from run.processes import notice
from tools import common, convert_checkpoint
from utils import InputError, RunStopped, first_line

TOLERANCE = 1e-3  # of the largest logit, by which what was written may differ
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


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser('python -m tools.push_to_hub', description=__doc__,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--repo', required=True, metavar='OWNER/NAME', help='where it goes on the hub')
    parser.add_argument('--output-dir', type=PATH_OBJECT, metavar='DIR',
                        help='where the folder is written; unset: a temporary place')
    parser.add_argument('--dry-run', action='store_true', help='write the folder, and upload nothing')
    parser.add_argument('--private', action='store_true', help='of a new repository: only its owner sees it')
    parser.add_argument('--license', default='other', metavar='ID', help='of the weights, e.g. apache-2.0')
    common.add_weights_arguments(parser)
    parser.set_defaults(input_size=None, full_crop=None, device='cpu', amp='off')
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# The folder

def measured(given: weights.Weights, source: str) -> List[str]:
    """What is known of the model's accuracy, a line for each measurement."""
    trained, lines = trained_with(given.checkpoint), []
    accuracy = given.checkpoint.get('accuracy')
    key = 'best_ema' if given.description.startswith('\'model_ema\'') else 'best'
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


def write_folder(args, loaded: common.LoadedModel, given: weights.Weights, folder: Path):
    """model.safetensors, config.json and README.md; refuses what timm would not compute alike."""
    published = weights.published(args.model or '', args.pretrained) or weights.published_as(args.pretrained)
    described = convert_checkpoint.describe(given, loaded.name, published)
    described['args'].update(input_size=loaded.input_size, full_crop=loaded.full_crop)
    config = convert_checkpoint.timm_config(loaded.name, described, loaded.model, published)
    tensors = {key: value.clone(memory_format=torch.contiguous_format)
               for key, value in xcit_zoo.to_timm_names(given.tensors).items()}
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints.save_checkpoint(tensors, folder / 'model.safetensors', metadata=checkpoints.metadata_of(described))
    utils.write_json(folder / 'config.json', config)
    lines = measured(given, args.pretrained)
    classes = loaded.classes
    utils.write_text(folder / 'README.md', CARD.format(
        task='image-classification' if loaded.model.num_classes else 'image-feature-extraction', license=args.license,
        title=args.repo.partition('/')[2], model=loaded.name, size=loaded.input_size, repo=args.repo,
        classes=f', {len(classes)} classes: {utils.abridge(classes, 20)}' if classes else '',
        measured='\n'.join(lines) or 'Nothing was measured with this file.'))
    check_folder(folder, loaded)


@torch.inference_mode()
def check_folder(folder: Path, loaded: common.LoadedModel):
    """Raises RunStopped where timm's model of the folder computes something else."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, loaded.input_size, loaded.input_size)
    own = loaded.model(images)
    theirs = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()(images)
    if not (own - theirs).abs().max() <= TOLERANCE * own.abs().max():
        raise RunStopped(f'{folder}: timm computes other values from it; nothing was uploaded')


# ---------------------------------------------------------------------------------------------------------------------
# The program

def upload(folder: Path, repo: str, *, private: bool) -> str:
    """Upload a folder to a repository, which is made if it is not there; returns its address.

    Raises:
        RunStopped: no token, no right, or no network.
    """
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(folder_path=str(folder), repo_id=repo, commit_message='Weights, config and model card')
    except Exception as error:  # of the network, of the hub, of its token: many kinds
        raise RunStopped(f'--repo {repo}: can\'t be uploaded ({first_line(error)}); a token comes from: hf auth login'
                         ) from None
    return f'https://huggingface.co/{repo}'


def main(argv: Optional[list] = None) -> Optional[str]:
    """Publish, with a command line (`sys.argv` if None); returns the address, None with --dry-run."""
    args = get_args_parser().parse_args(argv)
    if not re.fullmatch(r'[\w.-]+/[\w.-]+', args.repo):
        raise InputError(f'--repo {args.repo}: must be OWNER/NAME')
    if args.dry_run and args.output_dir is None:
        raise InputError('--dry-run: needs --output-dir to write to')
    if args.output_dir is not None and args.output_dir.is_dir() and any(
            file.name not in ('model.safetensors', 'config.json', 'README.md') for file in args.output_dir.iterdir()):
        raise InputError(f'--output-dir {args.output_dir}: holds other files; choose a folder of its own')
    loaded = common.load_model(args, fuse=False)
    given = weights.read(args.pretrained, '--pretrained', loaded.name, use_ema=args.use_ema, key=args.checkpoint_key)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.output_dir or Path(temporary)
        write_folder(args, loaded, given, folder)
        notice(f'{folder}: {loaded.name}, {loaded.model.num_classes} classes; timm computes the same from it')
        if args.dry_run:
            return None
        address = upload(folder, args.repo, private=args.private)
    notice(f'{address}: uploaded')
    return address


if __name__ == '__main__':
    commandline.run_program(main)
