"""Train and evaluate segmentation with XCiT: Semantic FPN, UPerNet, or a linear head on frozen features.

The defaults are the original's recipe for ADE20k. Runs are counted in iterations: optimizer steps.
"""
import argparse
import dataclasses
import os
import shlex
import sys
from pathlib import Path
from typing import Callable, Dict, Optional

if not __package__:  # started as a file
    sys.path[0] = os.path.realpath(f'{__file__}/../..')

import torch

import weights
import xcit
from dense import backbone
from dense.backbone import STRIDES
from dense.training import add_optimizer_flags, build_optimizer, freezable
from engine import train_one_epoch
from loaders.batches import Rounds, build_train_loader
from reports import drawings
from run import assembly, flags, parts, processes
from run.commandline import COUNT, PATH, POSITIVE, Parser, number, run_program, words_of
from run.folder import BEST, CHECKPOINT, EVALUATION_FILES, RUN_FILES
from run.logs import environment, log_values, table_row, write_result
from run.output import log
from run.schedules import Schedule, poly
from run.training import Run
from segmentation import data, files, models, patches, report, testing
from segmentation.losses import segmentation_losses
from segmentation.models import Segmenter
from segmentation.transforms import RATIOS, EvalTransform, TrainTransform
from utils import InputError, NonFiniteLoss, abridge, seed_everything

REFERENCE_BATCH = 16  # images per step that --lr refers to
MODEL = 'upernet_xcit_small_12_p16'
ITERATIONS = {'sem_fpn': 80_000, 'upernet': 160_000, 'linear': 40_000}
FILES = (*RUN_FILES, 'split.json', BEST, *EVALUATION_FILES)
EVERY = 8000  # iterations between two evaluations
# Defaults for --data-set SAMPLE; the command line has priority
SAMPLE_DEFAULTS = dict(model='sem_fpn_xcit_nano_12_p16', iterations=1500, every=250, batch_size=16, crop_size=128,
                       short=160, long=640, lr=1e-3, warmup_iterations=100)
COLUMNS = {'loss': ('train_loss', '.4f'), 'lr': ('train_lr', '.2e'), 'mIoU': ('test_mIoU', '.2f'),
           'mAcc': ('test_mAcc', '.2f'), 'aAcc': ('test_aAcc', '.2f'), 'images/s': ('train_images_per_s', '.1f'),
           'MB': ('train_memory_mb', '.0f')}


# ---------------------------------------------------------------------------------------------------------------------
# Arguments

def get_args_parser() -> Parser:
    parser = Parser('python -m segmentation.main', description=__doc__,
                    example='--data-set MASKS --data-path mine --pretrained fb_dist_in1k --output-dir runs/mine')
    boolean = argparse.BooleanOptionalAction
    flags.add_run_group(parser, amp_default='off')
    group = parser.add_argument_group('model')
    group.add_argument('--model', metavar='NAME', help=f'name of the model: {", ".join(models.HEADS)}, each with '
                       f'_xcit_small_12_p16 or another XCiT; if unset, as in the weights, or {MODEL}')
    group.add_argument('--weights', type=PATH, metavar=f'FILE|URL|{files.TAG}',
                       help='weights of a segmenter for --eval, published or trained here')
    group.add_argument('--pretrained', type=PATH, metavar=flags.WEIGHTS,
                       help='initial weights: a classifier, a DINO run, or an earlier segmenter')
    group.add_argument('--freeze-backbone', action=boolean, default=False,
                       help='training of the head alone; BatchNorm statistics of the backbone are frozen as well')
    group.add_argument('--drop-path', type=number(float, 0, .999), metavar='FRACTION',
                       help='stochastic depth rate, equal in all blocks; the original\'s rate of the model if unset')
    flags.add_grad_checkpointing_flag(group)
    flags.add_compile_flags(group)

    group = parser.add_argument_group('optimization')
    flags.add_batch_flags(group)
    flags.add_iteration_flags(group, iterations=None, every=EVERY)
    add_optimizer_flags(group, lr=6e-5, weight_decay=.01, warmup_iterations=1500, warmup_factor=1e-6,
                        reference_batch=REFERENCE_BATCH)
    group = parser.add_argument_group('data')
    data.add_data_flags(group)
    group.add_argument('--crop-size', default=512, type=COUNT, metavar='PIXELS', help='side of training crops')
    testing.add_size_flags(group)
    group.add_argument('--scale-range', default=RATIOS, type=POSITIVE, nargs=2, metavar='RATIO',
                       help='least and largest scale of training pictures, relative to --short and --long')
    flags.add_loader_flags(group)

    group = parser.add_argument_group('evaluation')
    group.add_argument('--eval', action='store_true', help='evaluation only')
    group.add_argument('--knn', type=COUNT, metavar='K', help='evaluation of --pretrained without training: classes of '
                       'the K nearest patches of the training pictures; with --eval and a linear model')
    group.add_argument('--knn-patches', default=100_000, type=COUNT, metavar='N', help='patches that are compared')
    testing.add_flags(group)
    group.add_argument('--report', action=boolean, default=True,
                       help='report in the folder report of --output-dir: classes, confusions, curves, pictures')
    group = parser.add_argument_group('distributed')
    flags.add_distributed_flags(group)
    parser.set_defaults(batch_size=2)
    return parser


def parse_args(argv: Optional[list] = None) -> argparse.Namespace:
    """Parse the command line, and raise InputError for invalid flags before any work is done."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if args.data_set == data.SAMPLE:
        parser.set_defaults(**SAMPLE_DEFAULTS)
        args = parser.parse_args(argv)
    args.amp = args.amp or 'off'
    flags.check_run_flags(args, writes=EVALUATION_FILES[:1 + args.report] if args.eval else FILES)
    flags.check_compile_flags(args)
    data.check_flags(args)
    check_weights(args)
    if not args.eval:
        args.model = args.model or MODEL
    if args.model:
        kind, _ = backbone.parse(args.model, models.HEADS)
        args.iterations = args.iterations or ITERATIONS[kind]
        if kind == 'linear' and not args.eval and not args.freeze_backbone:
            raise InputError(f'--model {args.model}: a head for frozen features, so add --freeze-backbone')
        if not args.eval:
            check_batch(args, kind)
    return args


def check_batch(args, kind: str):
    """Raise InputError if BatchNorm would have a single value for each channel."""
    if args.batch_size > 1:
        return
    if kind == 'upernet':
        raise InputError('--batch-size 1: UPerNet normalises pooled maps of 1 pixel, so give at least 2 pictures')
    if kind == 'sem_fpn' and args.crop_size < 2 * STRIDES[-1]:
        raise InputError(f'--batch-size 1: the coarsest map of --crop-size {args.crop_size} has 1 pixel; give at least '
                         f'2 pictures, or --crop-size {2 * STRIDES[-1]}')


def check_weights(args):
    """Raise InputError if the flags of weights do not match each other, or a file does not exist."""
    if args.knn:
        if not args.eval or not args.pretrained or not (args.model or '').startswith('linear_'):
            raise InputError(f'--knn {args.knn}: needs --eval, --pretrained and --model linear_xcit_...')
    elif args.eval:
        if bool(args.weights) == bool(args.resume):
            raise InputError(f'--eval: needs --weights (a file, a URL or {files.TAG}), or --resume')
        if args.pretrained:
            raise InputError('--pretrained: has no effect with --eval; --weights is the flag of a segmenter')
    elif args.weights:
        raise InputError('--weights: only works with --eval; --pretrained is the flag of initial weights')
    elif args.freeze_backbone and not args.pretrained and not args.resume:
        raise InputError('--freeze-backbone: needs trained weights, from --pretrained or --resume')
    if args.weights:
        files.check_exists(args.weights, '--weights', args.model or '')
    if args.pretrained == files.TAG:
        files.check_exists(files.TAG, '--pretrained', args.model or MODEL)
    elif args.pretrained:
        weights.check_exists(args.pretrained, '--pretrained', backbone.parse(args.model or MODEL, models.HEADS)[1])


# ---------------------------------------------------------------------------------------------------------------------
# The two programs

def build_model(args, num_classes: int) -> Segmenter:
    seed_everything(args.seed)
    model = models.build(args.model, num_classes, args.drop_path)
    if args.pretrained:
        files.load_initial(model, args.pretrained, '--pretrained')
    return model


def losses_of(model: torch.nn.Module, indices: Dict[str, list]) -> Callable[[list], dict]:
    """Return a function of a batch that returns its losses; the batch's indices are kept in `indices`."""
    def losses(batch: list) -> Dict[str, torch.Tensor]:
        images, labels, indices['last'] = batch
        return segmentation_losses(*model(images, auxiliary=True), labels)
    return losses


def train(args, device: torch.device) -> dict:
    """Train; return the metrics of the last evaluation."""
    train_set, val_set = data.build(data.source(args))
    if args.report:
        drawings.log_missing()
    loading, position, pace = flags.loading(args, device), flags.iterations(args), flags.pace(
        args, reference_batch=REFERENCE_BATCH)
    transform = TrainTransform(args.crop_size, args.short, args.long, tuple(args.scale_range))
    loader = Rounds(build_train_loader(data.Numbered(train_set.with_transform(transform)), loading,
                                       collate_fn=torch.utils.data.default_collate), position)
    model = build_model(args, len(train_set.classes)).to(device)
    xcit.speed_up_training(model.backbone)
    frozen = freezable(model.backbone, freezes=args.freeze_backbone)
    optimizer, scaler = build_optimizer(model, lr=pace.scaled_lr, weight_decay=args.weight_decay), flags.build_scaler(
        args, device)
    schedule = Schedule(optimizer, poly(pace.scaled_lr, 0., steps=args.iterations, warmup_steps=args.warmup_iterations,
                                        warmup_factor=args.warmup_factor))
    best = parts.Metrics()
    run = Run(args, position, {
        'model': model, 'optimizer': parts.Optimizer(optimizer), 'scaler': scaler, 'best': best,
        'classes': files.ClassesPart(train_set.classes, train_set.numbering),
        'data': parts.Images(len(train_set), train_set.files())},
        optional=('scaler', 'best'), fixed=('model', 'lr', 'weight_decay', 'warmup_iterations', 'iterations'),
        files=FILES)
    with run.resumed():
        if run.is_over():
            return {}
        schedule.resume(position.count())
        ddp_model = assembly.prepare(model, device, checkpointed=model.backbone if args.grad_checkpointing else None,
                                     compiled=[(model, dict(mode=args.compile_mode))] if args.compile else (),
                                     sync_bn=args.sync_bn)
        predictor = testing.build_predictor(args, model, flags.amp_dtype(args, device))
        indices = {}
        with run.started({**pace.derived(device, flags.amp_dtype(args, device)), 'train_pictures': len(train_set),
                          'val_pictures': len(val_set), 'classes': len(train_set.classes),
                          'n_parameters': sum(p.numel() for p in model.parameters() if p.requires_grad)}):
            pace.log_rate()
            if run.folder is not None and train_set.split is not None and processes.is_main_process():
                train_set.split.write(run.folder)
            for number in run.rounds(loader):
                try:
                    stats = train_one_epoch(
                        ddp_model, losses_of(ddp_model, indices), loader, optimizer=optimizer,
                        before_update=schedule.set, clip_grad=args.clip_grad, frozen=frozen,
                        **run.options(number, device, scaler))
                except NonFiniteLoss as error:
                    error.args = (f'{error} (pictures of this process: {names_of(train_set, indices)})',)
                    raise
                stats = {f'train_{name}': value for name, value in stats.items()}
                with run.evaluation():
                    confusion = testing.evaluate(predictor, val_set, loading, after_batch=run.check_signals)
                stats.update({f'test_{name}': value for name, value in confusion.metrics().items()})
                stats['iteration'] = position.updates_before(number + 1)
                if args.report:
                    report.after_round(run, predictor, val_set, confusion, iteration=stats['iteration'])
                is_best = best.update_best({'mIoU': stats['test_mIoU']}, epoch=position.updates_before(number + 1))
                run.finish(number, stats, summary=table_row(stats, COLUMNS), keep=[BEST] * bool(is_best))
    if run.folder is not None and processes.is_main_process():
        if args.report:
            report.draw(run.folder)
        print_next_steps(args, run.folder)
    return stats


def names_of(dataset: data.LabelledPictures, indices: Dict[str, list]) -> str:
    """Return the names of the pictures of the last batch."""
    chosen = indices.get('last', torch.zeros(0)).tolist()
    return abridge([str(dataset.samples[i][0]) if dataset.samples else str(i) for i in chosen])


def print_next_steps(args, folder: Path):
    best = folder / BEST
    file = best if best.exists() else folder / CHECKPOINT
    place = words_of({'weights': file, 'data_set': args.data_set, 'data_path': args.data_path or None})
    evaluate = ['segmentation.main', '--eval', *place]
    predict = ['segmentation.predict', 'PICTURES', *words_of({'weights': file, 'out': 'labels'})]
    log('Next, evaluate the model, or predict your own pictures:'
        + ''.join(f'\n  {shlex.join(["python", "-m", *command])}' for command in (evaluate, predict)))


def evaluate_neighbours(args, device: torch.device) -> dict:
    """Evaluate frozen features by nearest patches; return and store the metrics."""
    train_set, val_set = data.build(data.source(args))
    model = build_model(args, len(train_set.classes)).backbone.to(device).eval()
    xcit.fuse(model)
    loading = dataclasses.replace(flags.loading(args, device), batch_size=1)
    bank, classes = patches.collect(model, train_set, EvalTransform(args.short, args.long), loading,
                                    most=args.knn_patches)
    if len(bank) < args.knn:
        raise InputError(f'--knn {args.knn}: the training pictures have {len(bank)} patches with a class')
    log(f'{args.model}: {len(bank)} patches of {len(train_set)} pictures')
    neighbours = patches.PatchNeighbours(model, bank.to(device), classes.to(device), k=args.knn, name=args.model,
                                         num_classes=len(train_set.classes))
    return test(args, neighbours, val_set, device, args.pretrained)


def evaluate_only(args, device: torch.device) -> dict:
    """Evaluate a model; return and store the metrics."""
    loaded = files.load(args.weights or str(report.resumed_file(args.resume, args.output_dir)),
                        '--weights' if args.weights else '--resume', args.model or '')
    known = loaded.known(args.zero_is_a_class)
    _, val_set = data.build(data.source(args), trains=False, known=known)
    model = loaded.model.to(device).eval()
    xcit.fuse(model.backbone)
    return test(args, model, val_set, device, args.weights or args.resume)


def test(args, model: torch.nn.Module, val_set: data.LabelledPictures, device: torch.device, origin: str) -> dict:
    """Test a model on a data set; return and store the metrics; `origin`: name of the weights."""
    log_values(environment())
    log(f'{model.name}: {len(val_set)} pictures, {len(val_set.classes)} classes')
    predictor = testing.build_predictor(args, model, flags.amp_dtype(args, device))
    confusion = testing.evaluate(predictor, val_set, flags.loading(args, device))
    rows = confusion.rows(val_set.classes)
    stats = {**confusion.metrics(), 'pictures': len(val_set), 'model': model.name,
             'weights': origin, 'classes': rows}
    report.log_result(stats)
    if args.output_dir and processes.is_main_process():
        write_result(Path(args.output_dir, 'eval.json'), stats, vars(args))
        if args.report:
            report.write_tables(Path(args.output_dir), predictor, val_set, confusion, weights=origin)
            report.draw(Path(args.output_dir))
    return stats


def main(argv: Optional[list] = None) -> dict:
    """Run with a command line (`sys.argv` if None); return the metrics of the last evaluation."""
    args = parse_args(argv)
    with flags.joined(args, trains=not args.eval) as device:
        program = evaluate_neighbours if args.knn else evaluate_only if args.eval else train
        return program(args, device)


if __name__ == '__main__':
    run_program(main)
