"""What the evaluations share: a frozen backbone, and the features of labelled images that it gives or a file holds."""
import argparse
import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import torch
from torch.utils.data import Dataset

import datasets
import weights
import xcit
from dino import features
from dino.features import Features
from loaders import readers
from run import flags, processes
from run.commandline import COUNT, PATH
from run.folder import check_output_dir
from run.processes import notice
from tools import common
from utils import InputError, replaced

SPLITS = ('train', 'val')
# Flags without effect on features that are in files
OF_IMAGES = ('pretrained', 'model', 'patch_size', 'use_ema', 'checkpoint_key', 'features_dir', 'input_size',
             'full_crop', 'data_set', 'data_path', 'val_fraction', 'exif', 'inat_category', 'train_split', 'val_split',
             'num_classes', 'mean', 'std', 'resize')


@dataclasses.dataclass
class Frozen:
    """A backbone whose weights don't change.

    Args:
        loaded: the model, prepared for inference.
        state: its weights as they were read, without a classifier's.
        fingerprint: of them.
        seed: of the training that they come from, as far as it is known.
    """
    loaded: common.LoadedModel
    state: dict
    fingerprint: str
    seed: int

    @property
    def identity(self) -> dict:
        """Which backbone it is, in plain values."""
        return {'model': self.loaded.name, 'fingerprint': self.fingerprint}

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, img_h, img_w) -> (B, C): the normalised CLS token."""
        model = self.loaded.model
        return model.forward_head(model.forward_features(images), pre_logits=True)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments

def add_flags(parser, *, trains: bool):
    """Which backbone, which images, or which files of features.

    Args:
        trains: also the flags that only a training has a use for.
    """
    group = parser.add_argument_group('model')
    group.add_argument('--arch', '--model', dest='model', metavar='NAME',
                       help='one of the 14 XCiT models, or of timm\'s; if unset, what the weights say, as a '
                       'training\'s checkpoint does')
    group.add_argument('--patch-size', type=COUNT, metavar='PIXELS', help='the model\'s name says it')
    group.add_argument('--pretrained', '--pretrained-weights', dest='pretrained', default='', type=PATH,
                       metavar='TAG|PATH|URL|hf-hub:NAME',
                       help='weights: fb_dino, a training\'s checkpoint.pth (of which the teacher is taken), or others')
    common.add_choice_of_weights(group)
    common.add_square_arguments(parser)

    group = parser.add_argument_group('features')
    group.add_argument('--train-features', type=PATH, metavar='FILE',
                       help='features of training images, made by tools.extract_features or kept in --features-dir; no '
                       'model and no images are needed then')
    group.add_argument('--val-features', type=PATH, metavar='FILE', help='of test images, likewise')
    group.add_argument('--features-dir', type=PATH, metavar='DIR',
                       help='keep the features of both splits there as train.npz and val.npz, and take them from there '
                       'if they are of these weights and these images'
                       + ('; a training is then without augmentation' if trains else ''))

    group = parser.add_argument_group('data')
    datasets.add_data_flags(group)
    flags.add_batch_flags(group, spellings=('--batch-size-per-gpu', '--batch-size'), trains=trains)
    flags.add_loader_flags(group, trains=trains)
    group = parser.add_argument_group('distributed')
    flags.add_distributed_flags(group, sync_bn=False)
    parser.set_defaults(batch_size=128, dist_eval=True)


def check_flags(args, parser: argparse.ArgumentParser):
    """Refuse what can't work, and flags without effect.

    Raises:
        InputError: so it is.
    """
    if bool(args.train_features) != bool(args.val_features):
        given, other = ('train', 'val') if args.train_features else ('val', 'train')
        raise InputError(f'--{given}-features {args.train_features or args.val_features}: needs --{other}-features, '
                         f'too')
    if args.train_features:
        flags.refuse_without_effect(args, parser, OF_IMAGES, 'with --train-features')
    elif not args.pretrained:
        raise InputError('--pretrained: is needed, or --train-features and --val-features')
    else:
        if args.model:
            weights.check_model('--arch', args.model)
        weights.check_exists(args.pretrained, '--pretrained', args.model or '')
        datasets.check_data_set(args)
    if args.features_dir:
        check_output_dir(args.features_dir, '--features-dir')


# ---------------------------------------------------------------------------------------------------------------------
# Builders

def load(args, device: torch.device) -> Frozen:
    """The backbone that the flags describe.

    Raises:
        InputError: the weights can't be read, or are of another model.
    """
    loaded = common.load_model(args, fuse=False)
    patch_size = getattr(loaded.model, 'feature_info', [{}])[0].get('reduction')
    if args.patch_size not in (None, patch_size):
        raise InputError(f'--patch-size {args.patch_size}: {loaded.name} has patches of {patch_size} pixels')
    state = {key: value.detach().cpu().clone() for key, value in weights.backbone_state(loaded.model).items()}
    fingerprint = weights.fingerprint(loaded.model)
    if isinstance(loaded.model, xcit.Xcit):
        xcit.fuse(loaded.model)
    loaded.model.to(device)
    return Frozen(dataclasses.replace(loaded, device=device), state, fingerprint, loaded.seed or 0)


def for_data(args, frozen: Frozen):
    """The flags with what the model says about its images, where they don't."""
    loaded = frozen.loaded
    return replaced(args, input_size=loaded.input_size, full_crop=loaded.full_crop, mean=args.mean or loaded.mean,
                    std=args.std or loaded.std)


def build_datasets(args, splits: Sequence[str] = SPLITS) -> List[Dataset]:
    """Labelled images as evaluation shows them.

    Args:
        args: of `for_data`.

    Raises:
        InputError: the data are not there, or not what the data set's name says.
    """
    sets = [features.build_dataset(args, is_train=split == 'train') for split in splits]
    if len(sets) == 2:
        features.check_common(*sets)
    return sets


def features_of_both(args, frozen: Frozen, sets: List[Dataset], device: torch.device) -> Tuple[Features, Features]:
    """Features of training and test images, from --features-dir if they are there.

    Raises:
        InputError: they are there, but of other weights or images.
    """
    kept = read_kept(args, frozen, sets) if args.features_dir else {}
    for split, dataset in zip(SPLITS, sets):
        if split not in kept:
            kept[split] = features.extract(args, frozen, dataset, device, header=f'Features, {split}')
            if args.features_dir and processes.is_main_process():
                path = kept_file(args, split)
                path.parent.mkdir(parents=True, exist_ok=True)
                features.write(path, dataclasses.replace(kept[split], made_of=describe(args, frozen, dataset, split)))
    return kept['train'], features.in_common(kept['train'], kept['val'], where='--data-path: val')


def kept_file(args, split: str) -> Path:
    return Path(args.features_dir, f'{split}.npz')


def read_kept(args, frozen: Frozen, sets: List[Dataset]) -> Dict[str, Features]:
    """By split, what --features-dir has already.

    Raises:
        InputError: it is of other weights or images.
    """
    there = processes.on_main_process(lambda: ' '.join(split for split in SPLITS if kept_file(args, split).exists()))
    kept = {split: features.read(str(kept_file(args, split)), '--features-dir') for split in there.split()}
    for split, dataset in zip(SPLITS, sets):
        if split in kept:
            refuse_other_features(kept[split].made_of, describe(args, frozen, dataset, split), kept_file(args, split))
            notice(f'{kept_file(args, split)}: {len(kept[split])} features are taken from there')
    return kept


def describe(args, frozen: Frozen, dataset: Dataset, split: str) -> Dict[str, object]:
    """What the features of a split are made of: plain values, equal where it is the same."""
    root = os.path.realpath(args.data_path)
    samples = getattr(dataset, 'samples', [(name, None) for name in datasets.files_of(dataset)])
    listed = '\n'.join(f'{os.path.relpath(name, args.data_path)} {label} {os.path.getsize(name)}'
                       for name, label in samples)
    return {**frozen.identity, 'data set': args.data_set, 'split': split,
            'files': hashlib.sha256(listed.encode()).hexdigest()[:16] if samples else root,
            'images': None if readers.is_stream(args.data_set) else len(dataset), 'precision': args.amp,
            **{name.replace('_', ' '): getattr(args, name) for name in (
                'input_size', 'full_crop', 'resize', 'mean', 'std', 'exif', 'inat_category', 'train_split', 'val_split',
                'val_fraction')}}


def refuse_other_features(found: Optional[dict], expected: dict, path: Path):
    if found is None:
        raise InputError(f'--features-dir: {path} does not say what it was made of; use --train-features and '
                         f'--val-features')
    other = [f'{name}: {found.get(name)}, now {value}' for name, value in expected.items() if found.get(name) != value]
    if other:
        raise InputError(f'--features-dir: {path} was made of others ({"; ".join(other)}); choose another folder')


def read_both(args) -> Tuple[Features, Features]:
    """Features of --train-features and --val-features.

    Raises:
        InputError: they can't be used, or don't belong together.
    """
    train, val = (features.read(getattr(args, f'{split}_features'), f'--{split}-features') for split in SPLITS)
    made = [identity(found.made_of) for found in (train, val)]
    if all(made) and made[0] != made[1]:
        raise InputError(f'--val-features {args.val_features}: is of other weights than --train-features '
                         f'{args.train_features}')
    return train, features.in_common(train, val, where=f'--val-features {args.val_features}')


def identity(made_of: Optional[dict]) -> dict:
    """Which backbone features are of; empty where that is not known."""
    return {name: made_of[name] for name in ('model', 'fingerprint')} if made_of else {}
