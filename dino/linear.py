"""Train linear classifiers on the features of a frozen backbone, one per learning rate, or evaluate a classifier.

All learning rates are tried in one pass over the images. The best classifier of the last epoch, or of all epochs with
--keep-best, is written to --output-dir: alone as linear.pth, and with its backbone as one model as classifier.pth.
"""
import argparse
import contextlib
import dataclasses
import os
import shlex
import sys
from pathlib import Path
from typing import Callable, Dict, Iterable, List, Optional

if not __package__:  # started as a file
    sys.path[0] = os.path.realpath(f'{__file__}/../..')

import torch
import torch.nn.functional as F
from torchvision import transforms

import datasets
from dino import classifiers, features, frozen
from dino.classifiers import TAG, Linears
from dino.features import Features, Images
from engine import accuracy_line, train_one_epoch
from loaders.batches import build_train_loader
from loaders.samples import PictureSet, inspect
from loaders.transforms import PADDING, ToNormalizedTensor
from run import checkpoints, flags, parts, processes
from run.assembly import prepare
from run.commandline import COUNT, PATH, POSITIVE, Parser, run_program, words_of
from run.descriptions import names_of, trained_with
from run.folder import EVALUATION_FILES, RUN_FILES, check_output_dir
from run.logs import table_row, write_result
from run.output import log
from run.pace import Pace
from run.position import Epochs
from run.schedules import Schedule, cosine
from run.training import Run
from utils import InputError, counted, dashed, seed_everything

REFERENCE_BATCH = 256  # images per step that --lr refers to
MOMENTUM = .9
FILE, MODEL = 'linear.pth', 'classifier.pth'
FILES = (*RUN_FILES, FILE, MODEL)
VIEW = ('input_size', 'full_crop', 'mean', 'std')  # flags of the images that a classifier's file contains
COLUMNS = {'loss': ('train_loss', '.4f'), 'lr': ('train_lr', '.2e'), 'top-1': ('test_acc1', '.2f'),
           'top-5': ('test_acc5', '.2f'), 'best': ('test_best_acc1', '.2f'), 'of --lr': ('test_lr', 'g')}


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser('python -m dino.linear', description=__doc__,
                    example='--pretrained runs/dino/checkpoint.pth --data-set FOLDER --data-path pictures\n'
                            '--lr .001 .01 .1 --output-dir runs/linear')
    group = flags.add_run_group(parser, amp_default='off')
    flags.add_epochs_flag(group, default=100)
    group.add_argument('--val-freq', default=1, type=COUNT, metavar='N', help='epochs between two evaluations')

    group = parser.add_argument_group('classifier')
    group.add_argument('--lr', default=[.001], type=POSITIVE, nargs='+', help='initial learning rates, one per '
                       f'classifier, for {REFERENCE_BATCH} images per step; scaled with the actual number')
    group.add_argument('--keep-best', action=argparse.BooleanOptionalAction, default=False,
                       help=f'{FILE} and {MODEL} of the best epoch, not of the last')
    group.add_argument('--num-labels', type=COUNT, metavar='N', help='number of classes, which must be the data\'s')
    group.add_argument('--evaluate', action='store_true', help='evaluation of --linear-weights only')
    group.add_argument('--linear-weights', default='', type=PATH, metavar=f'{TAG}|PATH|URL',
                       help=f'trained classifier: {FILE}, or a file of the original; {TAG}: the published classifier')
    group.add_argument('--save-classifier', default='', type=PATH, metavar='FILE', help='.pth or .safetensors file for '
                       f'backbone and classifier as one model, as {MODEL} in --output-dir')
    frozen.add_flags(parser, trains=True)
    parser.set_defaults(output_dir=None)
    return parser


def parse_args(argv: Optional[list] = None) -> argparse.Namespace:
    """Parse the command line, and raise InputError for invalid flags before any work is done."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if args.output_dir is None:
        args.output_dir = '' if args.evaluate else '.'
    flags.check_run_flags(args, writes=EVALUATION_FILES[:1] if args.evaluate else FILES)
    frozen.check_flags(args, parser, needs_train=not args.evaluate)
    if args.features_dir or args.val_features:
        flags.refuse_without_effect(args, parser, ['skip_bad_images'], 'on features that are in files')
    if len(set(args.lr)) < len(args.lr):
        raise InputError(f'--lr {" ".join(f"{lr:g}" for lr in args.lr)}: has a value twice')
    if args.evaluate and args.resume:
        raise InputError(f'--resume {args.resume}: has no effect with --evaluate')
    if args.evaluate and not args.linear_weights:
        raise InputError(f'--evaluate: needs --linear-weights, a file or {TAG}')
    if args.keep_best and args.evaluate:
        raise InputError('--keep-best: has no effect with --evaluate')
    if args.linear_weights and not args.evaluate:
        raise InputError(f'--linear-weights {args.linear_weights}: has no effect without --evaluate')
    if args.linear_weights not in ('', TAG) and not (
            checkpoints.is_url(args.linear_weights) or Path(args.linear_weights).exists()):
        raise InputError(f'--linear-weights {args.linear_weights}: no such file; {TAG}: the published classifier')
    if args.save_classifier:
        if args.val_features:
            raise InputError(f'--save-classifier {args.save_classifier}: needs a backbone, unlike --val-features')
        if Path(args.save_classifier).suffix not in ('.pth', '.safetensors'):
            raise InputError(f'--save-classifier {args.save_classifier}: must end in .pth or .safetensors')
        check_output_dir(str(Path(args.save_classifier).absolute().parent), '--save-classifier')
    return args


@dataclasses.dataclass
class Source:
    """Features for training and test.

    Args:
        loader: batches of images or features, and class indices.
        features: function from a batch's images or features to features (B, C).
        val: function that returns the test features.
        images: number of training images.
        width: C.
        backbone: identity of the backbone, see `frozen.Frozen`; empty: unknown.
    """
    loader: Iterable
    features: Callable[[torch.Tensor], torch.Tensor]
    val: Callable[[], Features]
    images: int
    width: int
    classes: List[str]
    backbone: dict


def build_images(args, backbone: frozen.Frozen) -> Images:
    return Images(datasets.source(args), backbone.view(resize=args.resize))


def build_source(args, device: torch.device, backbone: Optional[frozen.Frozen]) -> Source:
    """Build features: read from files, or extracted from images, once with --features-dir, else in each epoch."""
    if backbone is None:
        return source_of(args, *frozen.read_both(args.train_features, args.val_features))
    loading, images = flags.loading(args, device), build_images(args, backbone)
    if args.features_dir:
        sets = features.build_datasets(images)
        return source_of(args, *frozen.features_of_both(backbone, images, sets, loading, folder=args.features_dir))
    train_set = build_train_dataset(images, skips_bad=args.skip_bad_images > 0)
    val_set = features.build_dataset(images, is_train=False)
    classes, where = train_set.class_names(), f'{images.source.flag}: val'
    features.refuse_missing(val_set.classes, train_set.classes, where=where)
    return Source(build_train_loader(train_set, loading, drop_last=False), backbone,
                  lambda: features.with_labels_of(classes, backbone.extract(val_set, loading, 'val'), where=where),
                  len(train_set), backbone.loaded.model.num_features, classes, backbone.identity)


def source_of(args, train: Features, val: Features) -> Source:
    return Source(features.Batches(train, args.batch_size, seed=args.seed), lambda rows: rows, lambda: val,
                  len(train), train.features.shape[1], train.classes, frozen.identity(train.made_of))


def build_train_dataset(images: Images, *, skips_bad: bool) -> PictureSet:
    """Build the training images with the original's augmentation; small images are padded and cropped as in main.py."""
    dataset, _ = datasets.load_classes(images.source, is_train=True)
    view = datasets.decide_resize(images.source, dataset, images.view)
    inspect(dataset, skips_bad=skips_bad, with_long=view.resizes)
    crop = (transforms.RandomResizedCrop(view.input_size) if view.resize else
            transforms.RandomCrop(view.input_size, padding=PADDING, pad_if_needed=True))
    return dataset.with_transform(transforms.Compose([crop, transforms.RandomHorizontalFlip(),
                                                      ToNormalizedTensor(view.mean, view.std)]))


def build_optimizer(linears: Linears, lrs: List[float]) -> torch.optim.Optimizer:
    """Build SGD with a group for each classifier; a schedule sets the learning rates."""
    groups = [{'params': [*layer.parameters()], 'lr_scale': lr} for lr, layer in zip(lrs, linears.layers)]
    return torch.optim.SGD(groups, lr=0., momentum=MOMENTUM)


class Backbone:
    """Identity of a classifier's backbone, which may not change on resume, as a part of a run."""

    def __init__(self, identity: dict):
        self.identity = identity

    def state_dict(self) -> dict:
        return self.identity

    def load_state_dict(self, state: dict):
        classifiers.refuse_other_backbone(state, self.identity)


def train(args, device: torch.device, backbone: Optional[frozen.Frozen]) -> dict:
    """Train; return the metrics of the last evaluation."""
    source = build_source(args, device, backbone)
    check_classes(args.num_labels, source.classes)
    seed_everything(args.seed)
    linears = Linears(source.width, len(source.classes), len(args.lr)).to(device)
    optimizer, best, kept = build_optimizer(linears, args.lr), parts.Metrics(), classifiers.Kept()
    scaler, amp_dtype = flags.build_scaler(args, device), flags.amp_dtype(args, device)
    run = Run(args, Epochs(args.epochs), {
        'linears': linears, 'optimizer': parts.Optimizer(optimizer), 'backbone': Backbone(source.backbone),
        'classes': parts.Classes(source.classes), 'accuracy': best, 'kept': kept, 'scaler': scaler},
        optional=('kept',), fixed=('epochs', 'lr', 'keep_best'), files=FILES)
    pace = Pace(1., args.batch_size, args.accum_iter, REFERENCE_BATCH)  # scaled_lr: the factor of all rates
    schedule = Schedule(optimizer, cosine(pace.scaled_lr, 0., steps=args.epochs))
    derived = {**pace.derived(device, amp_dtype), 'scaled_lr': [lr * pace.scaled_lr for lr in args.lr],
               'images': source.images, 'classes': len(source.classes), 'width': source.width, **source.backbone,
               **({} if backbone is None else backbone.view(resize=args.resize).setting())}
    with run.resumed():
        is_over = run.is_over()
        if is_over and not args.save_classifier:
            return {}
        val = source.val()
        ddp_linears = prepare(linears, device)
        losses = losses_of(ddp_linears, source.features, args.lr)
        with contextlib.nullcontext() if is_over else run.started(derived):
            for epoch in run.rounds(source.loader):
                schedule.set(epoch)
                stats = train_one_epoch(ddp_linears, losses, source.loader, optimizer=optimizer,
                                        **run.options(epoch, device, scaler))
                stats = {f'train_{name}': value for name, value in stats.items()}
                stats['train_loss'] /= len(args.lr)  # per classifier
                if (epoch + 1) % args.val_freq == 0 or epoch + 1 == args.epochs:
                    tested = test(args.lr, linears, val, device)
                    stats.update(metrics_of(tested))
                    is_best = best.update_best({'acc1': stats['test_acc1']}, epoch=epoch) is not None
                    stats['test_best_acc1'] = best['acc1']
                    if is_best or not args.keep_best or kept.layer is None:
                        keep(kept, args.lr, linears, tested, epoch=epoch)
                        if run.folder is not None:
                            classifiers.save(run.folder / FILE, kept.layer, {
                                'backbone': source.backbone, 'classes': list(source.classes), **kept.description,
                                **({} if backbone is None else {'args': settings_of(args, backbone)})})
                if epoch + 1 == args.epochs and run.folder is not None and backbone is not None:
                    save_model(args, run.folder / MODEL, backbone, kept.layer, source.classes)
                run.finish(epoch, stats, summary=table_row(stats, COLUMNS))
        if is_over:  # else the last epoch was tested above
            tested = test(args.lr, linears, val, device)
            if kept.layer is None:  # in checkpoints of earlier versions
                keep(kept, args.lr, linears, tested, epoch=run.position.done)
    for lr, metrics in tested.items():
        log(f'--lr {lr:g}: {accuracy_line(metrics)}')
    lr = best_lr(tested)
    log(f'Best in the last epoch: --lr {lr:g}\n{accuracy_line(tested[lr])}')
    if run.folder is not None:
        log(line_about(run.folder / FILE, kept, best, last=args.epochs - 1))
    if args.save_classifier:
        save_model(args, Path(args.save_classifier), backbone, kept.layer, source.classes)
    if backbone is not None and (args.save_classifier or run.folder is not None):
        log_use(args, Path(args.save_classifier or run.folder / MODEL))
    return metrics_of(tested) if is_over else stats


def keep(kept: classifiers.Kept, lrs: List[float], linears: Linears, tested: Dict[float, dict], *, epoch: int):
    """Keep the classifier with the best learning rate of an epoch."""
    lr = best_lr(tested)
    kept.keep(linears.layers[lrs.index(lr)], epoch=epoch, lr=lr, **tested[lr])


def line_about(file: Path, kept: classifiers.Kept, best: parts.Metrics, *, last: int) -> str:
    """Return the log line about the classifier in a file: its epoch, and whether another epoch was better."""
    epoch, acc1 = kept.description['epoch'], kept.description['acc1']
    notes = [f'{file}: epoch {epoch}', *['the last'] * (epoch == last), *['the best'] * (acc1 >= best['acc1']),
             f'--lr {kept.description["lr"]:g}', f'Acc@1 {acc1:.3f}']
    number = f' {best["best_epoch"]:.0f}' if 'best_epoch' in best else ''  # not in checkpoints of earlier versions
    better = f'; epoch{number} was better, with {best["acc1"]:.3f}: --keep-best, in a new run, keeps it'
    return ', '.join(notes) + better * (acc1 < best['acc1'])


def test(lrs: List[float], linears: Linears, val: Features, device: torch.device) -> Dict[float, dict]:
    """Evaluate each classifier; return the metrics by learning rate."""
    return {lr: classifiers.evaluate(layer, val, device) for lr, layer in zip(lrs, linears.layers)}


def losses_of(ddp_linears: torch.nn.Module, features_of: Callable, lrs: List[float]) -> Callable[[list], dict]:
    """Return a function of a batch that returns the loss of each classifier by learning rate."""
    def losses(batch: list) -> Dict[str, torch.Tensor]:
        with torch.no_grad():
            rows = features_of(batch[0])
        return {f'loss_lr{lr:g}': F.cross_entropy(logits, batch[1]) for lr, logits in zip(lrs, ddp_linears(rows))}
    return losses


def best_lr(tested: Dict[float, dict]) -> float:
    return max(tested, key=lambda lr: tested[lr]['acc1'])


def metrics_of(tested: Dict[float, dict]) -> dict:
    """Return the metrics for the log: all of the best classifier, and top-1 of each classifier."""
    lr = best_lr(tested)
    each = {f'test_acc1_lr{lr:g}': metrics['acc1'] for lr, metrics in tested.items()} if len(tested) > 1 else {}
    return {**{f'test_{name}': value for name, value in tested[lr].items()}, **each, 'test_lr': lr}


def settings_of(args, backbone: frozen.Frozen) -> dict:
    """Return the model and the view of its images, as flags."""
    return {'model': backbone.loaded.name, **backbone.view(resize=args.resize).setting()}


def save_model(args, path: Path, backbone: frozen.Frozen, layer: torch.nn.Linear, classes: List[str]):
    """Write a classifier with its backbone."""
    classifiers.save_with_backbone(path, layer, backbone, {'args': settings_of(args, backbone),
                                                           'classes': list(classes)})


def log_use(args, path: Path):
    """Log the command that evaluates the model in a file of save_model."""
    options = words_of({'eval': True, 'pretrained': path, **datasets.flags_of(args.data_set, args.data_path),
                        'val_fraction': args.val_fraction, 'seed': args.seed if args.val_fraction else None})
    command = shlex.join(['python', 'main.py', *options])
    log(f'{path}: backbone and classifier as one model; to evaluate it: {command}')


def check_classes(num_labels: Optional[int], classes: List[str]):
    if num_labels not in (None, len(classes)):
        raise InputError(f'--num-labels {num_labels}: the data have {counted(len(classes), "class")}')


def evaluate(args, device: torch.device, backbone: Optional[frozen.Frozen]) -> dict:
    """Evaluate --linear-weights; return the metrics."""
    if backbone is None:
        val = read_val(args)
        classes, width, identity = val.classes, val.features.shape[1], frozen.identity(val.made_of)
    else:
        dataset = features.build_dataset(build_images(args, backbone), is_train=False)
        classes, width, identity = dataset.class_names(), backbone.loaded.model.num_features, backbone.identity
    check_classes(args.num_labels, classes)
    layer = classifiers.read_matching(args.linear_weights, width=width, classes=classes, backbone=identity)
    if backbone is not None:
        val = backbone.extract(dataset, flags.loading(args, device), 'val')
    stats = {**classifiers.evaluate(layer.to(device), val, device), 'images': len(val)}
    log(accuracy_line(stats))
    if args.output_dir and processes.is_main_process():
        setting = {} if backbone is None else backbone.view(resize=args.resize).setting()
        write_result(Path(args.output_dir, 'eval.json'), {**stats, **setting}, vars(args))
    if args.save_classifier:
        save_model(args, Path(args.save_classifier), backbone, layer, classes)
        log_use(args, Path(args.save_classifier))
    return stats


def read_val(args) -> Features:
    """Read --val-features, with labels that are indices of the classifier's classes if its file names them."""
    if args.train_features:
        return frozen.read_both(args.train_features, args.val_features)[1]
    val = features.read(args.val_features, '--val-features')
    layer, content = classifiers.read(args.linear_weights, frozen.identity(val.made_of).get('model', ''))
    names = names_of(content.get('classes'), layer.out_features)
    return val if names is None else features.with_labels_of(names, val, where=f'--val-features {args.val_features}')


def take_view(args):
    """Set the flags of the images that are unset to the values in the file of --linear-weights; log other values."""
    if args.linear_weights == TAG or args.val_features:
        return
    trained = trained_with(checkpoints.load_checkpoint(args.linear_weights, '--linear-weights'))
    for name in VIEW:
        value, given = trained.get(name), vars(args)[name]
        if given is None:
            vars(args)[name] = value
        elif value not in (None, given):
            log(f'Warning: the classifier was trained with {dashed(name)} {value}, not {given}')


def main(argv: Optional[list] = None) -> dict:
    """Train or evaluate with a command line (`sys.argv` if None); return the metrics of the last evaluation."""
    args = parse_args(argv)
    if args.evaluate:
        take_view(args)
    with flags.joined(args, trains=not args.evaluate) as device:
        backbone = frozen.build(args, device)
        return evaluate(args, device, backbone) if args.evaluate else train(args, device, backbone)


if __name__ == '__main__':
    run_program(main)
