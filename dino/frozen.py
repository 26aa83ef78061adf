"""Frozen backbones and their features of labelled images, for the evaluations dino.knn and dino.linear."""
import argparse
import dataclasses
import os
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import torch

import datasets
import inference.flags
import inference.loaded
import weights
import xcit
from dino import features, networks
from dino.features import Features, Images
from inference.loaded import LoadedModel
from loaders import readers
from loaders.samples import PictureSet
from loaders.transforms import View
from run import devices, flags, parts, processes
from run.commandline import PATH
from run.folder import check_output_dir
from run.output import log
from run.settings import Loading
from utils import InputError, counted

SPLITS = ('train', 'val')
# Flags without effect on features that are in files
OF_IMAGES = ('pretrained', 'model', 'patch_size', 'use_ema', 'checkpoint_key', 'features_dir', 'input_size',
             'full_crop', 'data_set', 'data_path', 'val_fraction', 'exif', 'inat_category', 'train_split', 'val_split',
             'num_classes', 'mean', 'std', 'resize')


@dataclasses.dataclass
class Frozen:
    """Backbone with fixed weights.

    Args:
        loaded: model, prepared for inference.
        state: weights before that preparation, without a classifier's.
        fingerprint: fingerprint of the weights.
    """
    loaded: LoadedModel
    state: dict
    fingerprint: str

    @property
    def identity(self) -> dict:
        """Name of the model and fingerprint of the weights, in plain values."""
        return {'model': self.loaded.name, 'fingerprint': self.fingerprint}

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, img_h, img_w) -> (B, C): the normalised CLS token."""
        model = self.loaded.model
        return model.forward_head(model.forward_features(images), pre_logits=True)

    def extract(self, dataset: PictureSet, loading: Loading, split: str) -> Features:
        return features.extract(self, dataset, loading, amp_dtype=self.loaded.amp_dtype, header=f'Features, {split}')

    def view(self, *, resize: Optional[bool] = None) -> View:
        """Return the view of images for this backbone."""
        return dataclasses.replace(self.loaded.view, resize=resize)


def add_flags(parser, *, trains: bool):
    """Add the flags of backbone, images and files of features; `trains`: with the flags that only training uses."""
    group = parser.add_argument_group('model')
    flags.add_model_flag(group, '--arch')
    networks.add_patch_size_flag(group)
    group.add_argument('--pretrained', '--pretrained-weights', dest='pretrained', default='', type=PATH,
                       metavar=flags.WEIGHTS, help='weights: fb_dino, checkpoint.pth of a run (the teacher), or others')
    inference.flags.add_choice_of_weights(group)
    inference.flags.add_square_flags(parser)

    group = parser.add_argument_group('features')
    group.add_argument('--train-features', type=PATH, metavar='FILE', help='features of training images, from '
                       'tools.extract_features or --features-dir, instead of model and images')
    group.add_argument('--val-features', type=PATH, metavar='FILE', help='features of test images')
    group.add_argument('--features-dir', type=PATH, metavar='DIR',
                       help='folder for the features of both splits (train.npz and val.npz), which are reused with the '
                       'same weights and images' + '; training is then without augmentation' * trains)

    group = parser.add_argument_group('data')
    datasets.add_data_flags(group)
    flags.add_batch_flags(group, spellings=('--batch-size-per-gpu', '--batch-size'), trains=trains)
    flags.add_loader_flags(group, trains=trains)
    group = parser.add_argument_group('distributed')
    flags.add_distributed_flags(group, sync_bn=False)
    parser.set_defaults(batch_size=128)


def check_flags(args, parser: argparse.ArgumentParser, *, needs_train: bool = True):
    """Raise InputError if a flag is invalid or has no effect; complete --amp.

    Args:
        needs_train: --val-features need --train-features.
    """
    args.amp = args.amp or 'off'
    flags.choose_device(args)  # --amp needs the device
    if args.train_features and not args.val_features:
        raise InputError(f'--train-features {args.train_features}: needs --val-features')
    if args.val_features and needs_train and not args.train_features:
        raise InputError(f'--val-features {args.val_features}: needs --train-features')
    if args.val_features:
        flags.refuse_without_effect(args, parser, OF_IMAGES, 'with --val-features')
    elif not args.pretrained:
        raise InputError(f'--pretrained: is needed, or {"--train-features and " * needs_train}--val-features')
    else:
        if args.model:
            weights.check_model('--arch', args.model)
        weights.check_exists(args.pretrained, '--pretrained', args.model or '')
        datasets.check_data_set(args)
    if args.features_dir:
        check_output_dir(args.features_dir, '--features-dir')


def build(args, device: torch.device) -> Optional[Frozen]:
    """Load the backbone of the flags, see `load`; None: features are read from files."""
    if args.val_features:
        return None
    frozen = load(**inference.flags.weights(args), **inference.flags.squares(args), mean=args.mean, std=args.std,
                  device=device, amp_dtype=flags.amp_dtype(args, device))
    patch_size = getattr(frozen.loaded.model, 'feature_info', [{}])[0].get('reduction')  # also of timm's models
    networks.check_patch_size(args.patch_size, frozen.loaded.name, patch_size)
    return frozen


def load(pretrained: str, **options) -> Frozen:
    """Load a backbone; `options` and errors: as of inference.loaded.load."""
    model = inference.loaded.load(pretrained, fuse=False, **options)
    state = {key: value.detach().cpu().clone() for key, value in weights.backbone_state(model.model).items()}
    fingerprint = weights.fingerprint(model.model)
    if isinstance(model.model, xcit.Xcit):
        xcit.fuse(model.model)
    return Frozen(model, state, fingerprint)


def features_of_both(frozen: Frozen, images: Images, sets: List[PictureSet], loading: Loading, *, folder: str = ''
                     ) -> Tuple[Features, Features]:
    """Return the features of training and test images, as stored in a folder (if not ''), or extracted and stored.

    Args:
        sets: splits of `images` from features.build_datasets.

    Raises:
        InputError: stored features come from other weights or images.
    """
    both = {}
    if folder:
        made_of = {split: describe(frozen, images, dataset, split) for split, dataset in zip(SPLITS, sets)}
        paths = {split: Path(folder, f'{split}.npz') for split in SPLITS}
        stored = processes.on_main_process(lambda: ' '.join(split for split, path in paths.items() if path.exists()))
        both = {split: read_stored(paths[split], made_of[split]) for split in stored.split()}
    for split, dataset in zip(SPLITS, sets):
        if split not in both:
            both[split] = frozen.extract(dataset, loading, split)
            if folder and processes.is_main_process():
                paths[split].parent.mkdir(parents=True, exist_ok=True)
                features.write(paths[split], dataclasses.replace(both[split], made_of=made_of[split]))
    return both['train'], features.in_common(both['train'], both['val'], where=f'{images.source.flag}: val')


def read_stored(path: Path, expected: dict) -> Features:
    """Read a file of --features-dir; raise InputError if its weights or images differ from `expected`."""
    stored = features.read(str(path), '--features-dir')
    if stored.made_of is None:
        raise InputError(f'--features-dir: {path} does not name its weights and images; use --train-features and '
                         f'--val-features')
    other = [f'{key}: {stored.made_of.get(key)}, now {value}' for key, value in expected.items()
             if stored.made_of.get(key) != value]
    if other:
        raise InputError(f'--features-dir: {path} comes from other weights or images ({"; ".join(other)}); choose '
                         f'another folder')
    log(f'{path}: {counted(len(stored), "feature", "are")} reused')
    return stored


def describe(frozen: Frozen, images: Images, dataset: PictureSet, split: str) -> Dict[str, object]:
    """Return the weights and images behind the features of a split, in plain values that can be compared."""
    source, view, files = images.source, images.view, dataset.files()
    notes = [f'{label} {os.path.getsize(file)}' for file, label in dataset.samples]
    return {**frozen.identity, 'data set': source.name, 'split': split,
            'files': parts.digest_of(files, notes, root=source.path) if files else os.path.realpath(source.path),
            'images': None if readers.is_stream(source.name) else len(dataset),
            'precision': next(name for name, dtype in devices.AMP_DTYPES.items() if dtype == frozen.loaded.amp_dtype),
            'input size': view.input_size, 'full crop': view.full_crop, 'resize': view.resize,
            'mean': view.mean, 'std': view.std, 'exif': source.exif, 'inat category': source.inat_category,
            'train split': source.train_split, 'val split': source.val_split, 'val fraction': source.val_fraction}


def read_both(train_path: str, val_path: str) -> Tuple[Features, Features]:
    """Read --train-features and --val-features; raise InputError if they can't be used, or do not match."""
    train, val = features.read(train_path, '--train-features'), features.read(val_path, '--val-features')
    if train.made_of and val.made_of and identity(train.made_of) != identity(val.made_of):
        raise InputError(f'--val-features {val_path}: comes from other weights than --train-features {train_path}')
    return train, features.in_common(train, val, where=f'--val-features {val_path}',
                                     where_train=f'--train-features {train_path}')


def identity(made_of: Optional[dict]) -> dict:
    """Return the identity of the backbone behind features, see `Frozen.identity`; empty: unknown."""
    return {name: made_of[name] for name in ('model', 'fingerprint')} if made_of else {}
