"""Train a linear classifier on a frozen backbone's features, and measure its accuracy; or evaluate one that exists.

Several learning rates are tried in one pass over the images, each with a classifier of its own. The best of them is
linear.pth in --output-dir.
"""
import run.startup  # noqa: F401  first of all

import argparse
import contextlib
import dataclasses
import math
import shlex
from pathlib import Path
from typing import Callable, Dict, Iterable, List, Optional

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from torchvision import transforms

import datasets
from dino import classifiers, features, frozen
from dino.classifiers import TAG, Linears
from dino.features import Features
from engine import train_one_epoch
from loaders.batches import build_train_loader
from run import checkpoints, flags, parts, processes
from run.commandline import COUNT, PATH, POSITIVE, Parser, run_program
from run.descriptions import names_of
from run.folder import check_output_dir
from run.logs import environment
from run.position import Epochs
from run.processes import notice
from run.training import Run
from utils import InputError, abridge, replaced, seed_everything, write_json

REFERENCE_BATCH = 256  # images for which --lr is meant
MOMENTUM = .9
PADDING = 4  # pixels around small pictures, of which a square of their size is cut out
FILE = 'linear.pth'


# ---------------------------------------------------------------------------------------------------------------------
# Arguments

def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser('python -m dino.linear', description=__doc__,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group('run')
    flags.add_run_flags(group)
    flags.add_amp_flag(group, default='off')
    flags.add_checkpoint_flags(group)
    group.add_argument('--epochs', default=100, type=COUNT, metavar='N', help='of the whole training')
    group.add_argument('--val-freq', default=1, type=COUNT, metavar='N', help='epochs between two evaluations')

    group = parser.add_argument_group('classifier')
    group.add_argument('--lr', default=[.001], type=POSITIVE, nargs='+',
                       help=f'learning rates at the beginning, each of a classifier, for {REFERENCE_BATCH} images a '
                       'step; scaled with the real number')
    group.add_argument('--num-labels', type=COUNT, metavar='N', help='classes; the data say it')
    group.add_argument('--evaluate', action='store_true', help='evaluate --linear-weights only')
    group.add_argument('--linear-weights', default='', type=PATH, metavar=f'{TAG}|PATH|URL',
                       help=f'a trained classifier: {FILE}, or a file of the original; {TAG}: the published one')
    group.add_argument('--save-classifier', default='', type=PATH, metavar='FILE',
                       help='write backbone and classifier as one model, which main.py --eval and the tools take; .pth '
                       'or .safetensors')
    frozen.add_flags(parser, trains=True)
    parser.set_defaults(output_dir=None)
    return parser


def parse_args(argv: Optional[list] = None) -> argparse.Namespace:
    """Parse the command line and refuse what can't work before any work is done."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    args.amp = args.amp or 'off'
    if args.output_dir is None:
        args.output_dir = '' if args.evaluate else '.'
    flags.check_run_flags(args)
    frozen.check_flags(args, parser)
    if args.features_dir or args.train_features:
        flags.refuse_without_effect(args, parser, ['skip_bad_images'], 'on features that are in files')
    if len(set(args.lr)) < len(args.lr):
        raise InputError(f'--lr {" ".join(f"{lr:g}" for lr in args.lr)}: has a value twice')
    if args.evaluate and not args.linear_weights:
        raise InputError(f'--evaluate: needs --linear-weights, a file or {TAG}')
    if args.evaluate and args.resume:
        raise InputError(f'--resume {args.resume}: has no effect with --evaluate')
    if args.linear_weights and not args.evaluate:
        raise InputError(f'--linear-weights {args.linear_weights}: has no effect without --evaluate')
    if args.linear_weights and args.linear_weights != TAG and not checkpoints.is_url(args.linear_weights) and not Path(
            args.linear_weights).exists():
        raise InputError(f'--linear-weights {args.linear_weights}: no such file; {TAG} means the published one')
    if args.save_classifier:
        if args.train_features:
            raise InputError(f'--save-classifier {args.save_classifier}: needs a backbone, and --train-features has '
                             f'none')
        if Path(args.save_classifier).suffix not in ('.pth', '.safetensors'):
            raise InputError(f'--save-classifier {args.save_classifier}: must end in .pth or .safetensors')
        check_output_dir(str(Path(args.save_classifier).absolute().parent), '--save-classifier')
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Builders

@dataclasses.dataclass
class Source:
    """What classifiers learn from and are tested on.

    Args:
        loader: batches of images or features, and class indices.
        features: a batch's images or features -> features (B, C).
        val: gives the test features.
        images: for training.
        width: C.
        classes: what they are called.
        backbone: which one the features are of, in plain values.
    """
    loader: Iterable
    features: Callable[[torch.Tensor], torch.Tensor]
    val: Callable[[], Features]
    images: int
    width: int
    classes: List[str]
    backbone: dict


def build_source(args, device: torch.device, held: Optional[frozen.Frozen]) -> Source:
    """From files of features; or from images by a frozen backbone, by way of --features-dir if that is given.

    Raises:
        InputError: the data or the files are not there, or can't be used.
    """
    if held is None or args.features_dir:
        train, val = (frozen.read_both(args) if held is None else
                      frozen.features_of_both(args, held, frozen.build_datasets(args), device))
        return Source(features.Batches(train, args.batch_size, seed=args.seed), lambda rows: rows, lambda: val,
                      len(train), train.features.shape[1], train.classes, frozen.identity(train.made_of))
    dataset = build_train_dataset(args)
    val_set, = frozen.build_datasets(args, ('val',))
    features.check_common(dataset, val_set)
    classes = datasets.class_names(dataset)
    return Source(
        build_train_loader(dataset, args, device, drop_last=False), held,
        lambda: features.with_numbers_of(classes, features.extract(args, held, val_set, device, header='Features, val'),
                                         where='--data-path: val'),
        len(dataset), held.loaded.model.num_features, classes, held.identity)


def build_train_dataset(args) -> Dataset:
    """Training images with the original's augmentation; small pictures are cropped as main.py does it."""
    dataset, _ = datasets.load_dataset(args, is_train=True)
    if not args.skip_bad_images:
        datasets.probe_images(dataset, is_train=True)
    args = replaced(args, resize=datasets.decide_resize(args, dataset))
    crop = (transforms.RandomResizedCrop(args.input_size) if datasets.resizes(args) else
            transforms.RandomCrop(args.input_size, padding=PADDING, pad_if_needed=True))
    dataset.transform = transforms.Compose([crop, transforms.RandomHorizontalFlip(),
                                            datasets.build_normalisation(args)])
    return dataset


def build_optimizer(linears: Linears) -> torch.optim.Optimizer:
    """Its learning rates are set before each epoch."""
    return torch.optim.SGD([{'params': [*layer.parameters()]} for layer in linears.layers], lr=0., momentum=MOMENTUM)


def learning_rates(args, epoch: int) -> List[float]:
    """Of each classifier: a half cosine over the epochs."""
    factor = flags.images_per_step(args) / REFERENCE_BATCH * (1 + math.cos(math.pi * epoch / args.epochs)) / 2
    return [lr * factor for lr in args.lr]


class Backbone:
    """Which backbone a classifier is for, as a part of its training: it may not change."""

    def __init__(self, identity: dict):
        self.identity = identity

    def state_dict(self) -> dict:
        return self.identity

    def load_state_dict(self, state: dict):
        refuse_other_backbone(state, self.identity)


def refuse_other_backbone(known: Optional[dict], here: dict):
    """Raises InputError where both are known, and not the same."""
    if known and here and known != here:
        raise InputError(f'is for features of another backbone ({words(known)}) than these ({words(here)})')


def words(identity: dict) -> str:
    return f'{identity.get("model")}, weights {identity.get("fingerprint")}'


# ---------------------------------------------------------------------------------------------------------------------
# The program

def train(args, device: torch.device, held: Optional[frozen.Frozen]) -> dict:
    """Train; returns the figures of the last evaluation."""
    source = build_source(args, device, held)
    check_classes(args, source.classes)
    seed_everything(args.seed)
    linears = Linears(source.width, len(source.classes), len(args.lr)).to(device)
    optimizer, best = build_optimizer(linears), parts.Metrics()
    run = Run(args, Epochs(args.epochs), {
        'linears': linears, 'optimizer': parts.Optimizer(optimizer), 'backbone': Backbone(source.backbone),
        'classes': parts.Classes(source.classes), 'accuracy': best, 'scaler': flags.build_scaler(args, device)},
        fixed=('epochs', 'lr'))
    derived = {'device': str(device), 'amp_dtype': str(flags.amp_dtype(args, device)), 'images': source.images,
               'classes': len(source.classes), 'width': source.width, 'processes': processes.get_world_size(),
               'scaled_lr': learning_rates(args, 0), **source.backbone}
    with run.locked():
        run.resume()
        over = run.is_over()
        if over and not args.save_classifier:
            return {}
        val = source.val()
        ddp_linears = processes.wrap_for_distributed(linears, device, sync_bn=False)
        losses = losses_of(ddp_linears, source.features, args.lr)
        with contextlib.nullcontext() if over else run.started(derived):
            for epoch in run.rounds(source.loader):
                for group, lr in zip(optimizer.param_groups, learning_rates(args, epoch)):
                    group['lr'] = lr
                stats = train_one_epoch(ddp_linears, losses, source.loader, optimizer=optimizer,
                                        **run.options(epoch, device))
                stats = {f'train_{name}': value for name, value in stats.items()}
                stats['train_loss'] /= len(args.lr)  # of a classifier
                if (epoch + 1) % args.val_freq == 0 or epoch + 1 == args.epochs:
                    tested = test(args, linears, val, device)
                    stats.update(figures(tested))
                    best.note_best('acc1', stats['test_acc1'])
                    stats['test_best_acc1'] = best['acc1']
                    save(args, linears, tested, source)
                run.finish(epoch, stats, best=False, summary=summary_of(stats))
        tested = test(args, linears, val, device)
    for lr, found in tested.items():
        notice(f'--lr {lr:g}: {classifiers.line(found)}')
    lr = best_of(tested)
    notice(f'Best: --lr {lr:g}\n{classifiers.line(tested[lr])}')
    if args.save_classifier:
        save_model(args, held, linears.layers[args.lr.index(lr)], source.classes)
    return figures(tested) if over else stats


def test(args, linears: Linears, val: Features, device: torch.device) -> Dict[float, dict]:
    """Figures of each classifier, by its learning rate."""
    return {lr: classifiers.evaluate(layer, val, device) for lr, layer in zip(args.lr, linears.layers)}


def losses_of(ddp_linears: torch.nn.Module, features_of: Callable, lrs: List[float]) -> Callable[[list], dict]:
    """A function of a batch: the loss of each classifier by its learning rate; their sum is minimised."""
    def losses(batch: list) -> Dict[str, torch.Tensor]:
        with torch.no_grad():
            found = features_of(batch[0])
        return {f'loss_lr{lr:g}': F.cross_entropy(logits, batch[1])
                for lr, logits in zip(lrs, ddp_linears(found))}
    return losses


def best_of(tested: Dict[float, dict]) -> float:
    """The learning rate whose classifier is right most often."""
    return max(tested, key=lambda lr: tested[lr]['acc1'])


def figures(tested: Dict[float, dict]) -> dict:
    """For the log: those of the best classifier, and top-1 of each."""
    lr = best_of(tested)
    each = {f'test_acc1_lr{lr:g}': found['acc1'] for lr, found in tested.items()} if len(tested) > 1 else {}
    return {**{f'test_{name}': value for name, value in tested[lr].items()}, **each, 'test_lr': lr}


def summary_of(stats: dict) -> dict:
    """What the table of epochs shows of one: texts by column."""
    columns = {'loss': format(stats['train_loss'], '.4f'), 'lr': format(stats['train_lr'], '.2e')}
    if 'test_acc1' not in stats:
        return {**columns, 'top-1': '-', 'top-5': '-', 'best': '-', 'of --lr': '-'}
    return {**columns, 'top-1': format(stats['test_acc1'], '.2f'), 'top-5': format(stats['test_acc5'], '.2f'),
            'best': format(stats['test_best_acc1'], '.2f'), 'of --lr': format(stats['test_lr'], 'g')}


def save(args, linears: Linears, tested: Dict[float, dict], source: Source):
    """The best classifier."""
    lr = best_of(tested)
    if args.output_dir:
        classifiers.save(Path(args.output_dir, FILE), linears.layers[args.lr.index(lr)], {
            'backbone': source.backbone, 'classes': list(source.classes), 'lr': lr, **tested[lr]})


def save_model(args, held: frozen.Frozen, layer: torch.nn.Linear, classes: List[str]):
    """The best classifier with its backbone."""
    path = Path(args.save_classifier)
    classifiers.save_with_backbone(path, layer, held, {
        'args': {'model': held.loaded.name, 'input_size': args.input_size, 'full_crop': args.full_crop,
                 'mean': args.mean, 'std': args.std}, 'classes': list(classes)})
    notice(f'{path}: backbone and classifier as one model; to evaluate it: {shlex.join(evaluation_command(args))}')


def evaluation_command(args) -> List[str]:
    """How main.py evaluates the file of --save-classifier as it was tested here; the file says the model."""
    words = ['python', 'main.py', '--eval', '--pretrained', args.save_classifier, '--input-size', str(args.input_size)]
    words += ['--full-crop'] if args.full_crop else []
    for flag in ('mean', 'std'):
        words += [f'--{flag}', *map(str, getattr(args, flag))] if getattr(args, flag) else []
    return [*words, '--data-set', args.data_set, *([] if args.data_set == 'SAMPLE' else ['--data-path',
                                                                                         args.data_path])]


def check_classes(args, classes: List[str]):
    if args.num_labels not in (None, len(classes)):
        raise InputError(f'--num-labels {args.num_labels}: the data have {len(classes)} classes')


def evaluate(args, device: torch.device, held: Optional[frozen.Frozen]) -> dict:
    """Accuracy of --linear-weights."""
    if held is None:
        val = frozen.read_both(args)[1]
        classes, width, identity = val.classes, val.features.shape[1], frozen.identity(val.made_of)
    else:
        dataset, = frozen.build_datasets(args, ('val',))
        classes, width, identity = datasets.class_names(dataset), held.loaded.model.num_features, held.identity
    check_classes(args, classes)
    layer, content = classifiers.read(args.linear_weights, identity.get('model', ''))
    source = f'--linear-weights {args.linear_weights}'
    if (layer.in_features, layer.out_features) != (width, len(classes)):
        raise InputError(f'{source}: is for features of {layer.in_features} numbers and {layer.out_features} classes, '
                         f'and here are {width} and {len(classes)}')
    known = content.get('backbone')
    try:
        refuse_other_backbone(known if isinstance(known, dict) else None, identity)
    except InputError as error:
        raise InputError(f'{source}: {error}') from None
    names = names_of(content.get('classes'), len(classes))
    if names not in (None, list(classes)):
        raise InputError(f'{source}: is for other classes ({abridge(names, 4)}), or in another order, than these '
                         f'({abridge(list(classes), 4)})')
    if held is not None:
        val = features.extract(args, held, dataset, device, header='Features, val')
    stats = {**classifiers.evaluate(layer.to(device), val, device), 'images': len(val)}
    notice(classifiers.line(stats))
    if args.output_dir and processes.is_main_process():
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        write_json(Path(args.output_dir, 'eval.json'), {**stats, 'args': vars(args), 'environment': environment()})
    if args.save_classifier:
        save_model(args, held, layer, classes)
    return stats


def main(argv: Optional[list] = None) -> dict:
    """Train or evaluate with a command line (`sys.argv` if None); returns the figures of the last evaluation.

    Raises:
        InputError: the arguments, or the data, weights or features they name, can't be used.
    """
    args = parse_args(argv)
    with processes.joined(args, trains=not args.evaluate) as device:
        held = None if args.train_features else frozen.load(args, device)
        args = args if held is None else frozen.for_data(args, held)
        return evaluate(args, device, held) if args.evaluate else train(args, device, held)


if __name__ == '__main__':
    run_program(main)
