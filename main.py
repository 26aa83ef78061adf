"""Training and evaluation of image classifiers: XCiT, or any other timm model. The default recipe is the paper's."""
import argparse
import shlex
from pathlib import Path
from typing import List, Optional, Tuple

import timm
import torch
from timm.utils import ModelEmaV3

import datasets
import weights
import xca_gram
import xcit
from classification import evaluation, initial, preview, recipe, report
from engine import train_one_epoch
from inference import setting
from inference.flags import add_choice_of_weights
from loaders import readers, samples
from loaders.batches import build_eval_loader, build_train_loader, images_of_epoch
from loaders.transforms import ToNormalizedTensor, View
from losses import DistillationLoss
from reports import drawings, real_labels
from run import assembly, flags, launch, optimization, parts, processes, schedules
from run.commandline import COUNT, COUNT_OR_0, FRACTION, PATH, POSITIVE, Parser, number, run_program, words_of
from run.descriptions import names_of
from run.folder import BEST, CHECKPOINT, EVALUATION_FILES, RUN_FILES
from run.logs import table_row, write_result
from run.output import log, without_ending
from run.position import Epochs
from run.resume import load_for_resume
from run.training import Run
from utils import InputError, first_line, seed_everything

REFERENCE_BATCH = 512  # images per step that --lr refers to
FILES = (*RUN_FILES, 'split.json', BEST, *EVALUATION_FILES, preview.FILE)
# Defaults that --finetune changes; the command line has priority
FINETUNING = dict(epochs=30, lr=4e-4, min_lr=1e-6, warmup_epochs=0, drop_path=0., reprob=0., repeated_aug=False,
                  full_crop=True)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments

def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser('main.py', description=__doc__,
                    example='--model xcit_small_12_p16 --finetune fb_dist_in1k --data-set FOLDER\n'
                            '--data-path pictures --val-fraction 0.2 --output-dir runs/mine')
    boolean = argparse.BooleanOptionalAction
    group = flags.add_run_group(parser)
    group.add_argument('--start-epoch', default=0, type=COUNT_OR_0, metavar='N', help='first epoch, without --resume')
    flags.add_epochs_flag(group, default=400)

    group = parser.add_argument_group('model')
    flags.add_model_flag(group, default='xcit_small_12_p16')
    group.add_argument('--input-size', default=224, type=COUNT, metavar='PIXELS', help='side of the square images')
    group.add_argument('--drop', default=0., type=FRACTION, metavar='FRACTION', help='dropout rate')
    group.add_argument('--drop-path', default=.1, type=number(float, 0, .999), metavar='FRACTION',
                       help='stochastic depth rate, equal in all layers of XCiT')
    group.add_argument('--pretrained', type=PATH, metavar=flags.WEIGHTS,
                       help='initial weights (tags: docs/weights.md); a head for another number of classes is dropped')
    group.add_argument('--finetune', type=PATH, metavar=flags.WEIGHTS,
                       help='initial weights, with other defaults: '
                       + ', '.join(f'{name} {value}' for name, value in FINETUNING.items()))
    group.add_argument('--freeze-backbone', action=boolean, default=False,
                       help='training of the head alone (linear probe); BatchNorm statistics are frozen as well')
    add_choice_of_weights(group)
    group.add_argument('--surgery', type=PATH, metavar=flags.WEIGHTS,
                       help='weights whose patch stem is copied and frozen: more stable for large models')
    flags.add_grad_checkpointing_flag(group)
    group.add_argument('--xca', choices=xca_gram.FORMS, default='auto',
                       help='form of XCiT\'s attention; auto: the faster one for the input; gram needs --amp off')
    flags.add_compile_flags(group)
    group.add_argument('--model-ema', action=boolean, default=True, help='EMA of the weights')
    group.add_argument('--model-ema-decay', default=.99996, type=FRACTION, metavar='FRACTION',
                       help='final decay of the EMA, which rises over the first steps')
    group.add_argument('--model-ema-force-cpu', action=boolean, default=False, help='EMA in CPU memory')

    group = parser.add_argument_group('optimizer')
    flags.add_batch_flags(group)
    flags.add_optimizer_flags(group)

    group = parser.add_argument_group('schedule')
    group.add_argument('--lr', default=5e-4, type=POSITIVE,
                       help=f'peak learning rate for {REFERENCE_BATCH} images a step; scaled with the actual number')
    flags.add_schedule_flags(group)

    recipe.add_flags(parser)
    group = parser.add_argument_group('data')
    datasets.add_data_flags(group)
    flags.add_loader_flags(group)

    group = parser.add_argument_group('evaluation')
    group.add_argument('--eval', action='store_true', help='evaluation only')
    group.add_argument('--report', action=boolean, default=True,
                       help='page report/report.html in --output-dir, with accuracy, classes, confusions and mistakes')
    group.add_argument('--real-labels', type=PATH, metavar=f'FILE|{real_labels.OF_TIMM}',
                       help='reassessed labels for a second accuracy of --eval with IMNET: real.json, or timm\'s copy')
    group.add_argument('--test-freq', default=1, type=COUNT, metavar='N', help='epochs between two evaluations')
    group.add_argument('--full-crop', action=boolean, default=False,
                       help='evaluation of the whole shorter side (crop 1.0, as published) instead of 0.875 of it')

    group = parser.add_argument_group('distributed')
    group.add_argument('--dist-eval', action=boolean, default=True, help='evaluation images shared by the processes')
    flags.add_distributed_flags(group)
    return parser


def parse_args(argv: Optional[list] = None) -> argparse.Namespace:
    """Parse the command line, and refuse invalid flags before any work is done."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if args.finetune:
        if args.pretrained:
            raise InputError('--finetune: replaces --pretrained; give one of these flags')
        parser.set_defaults(**FINETUNING)
        args = parser.parse_args(argv)
        args.pretrained = args.finetune
    if weights.published('', args.model) and not args.pretrained and not args.resume:
        args.pretrained = args.model  # a name with a tag includes the weights
    use_setting_of_file(args, parser, argv)
    weights.check_model('--model', args.model)
    datasets.check_data_set(args)
    flags.check_run_flags(args, writes=EVALUATION_FILES[:1 + args.report] if args.eval else FILES)
    flags.check_compile_flags(args)
    flags.check_optimizer_flags(args)
    flags.check_schedule_flags(args)
    if not args.eval:
        flags.fit_schedule(args, parser, argv)
    recipe.check_flags(args)
    check_model_flags(args)
    if args.real_labels and not (args.eval and args.data_set == 'IMNET'):
        raise InputError(f'--real-labels {args.real_labels}: needs --eval and --data-set IMNET')
    if args.start_epoch >= args.epochs:
        raise InputError(f'--start-epoch {args.start_epoch}: must be less than --epochs {args.epochs}')
    return args


def use_setting_of_file(args, parser: Parser, argv: Optional[list]):
    """Set the flags that the command line leaves open as the weights need; log flags that change, and that differ."""
    if not args.pretrained and not (args.eval and args.resume):
        return
    source, own = setting_of_file(args, '' if parser.is_default(argv, 'model') else args.model)
    names = setting.NAMES if args.eval else ('model', 'mean', 'std')  # other sizes are usual in fine-tuning
    own = {name: own[name] for name in names if name in own}
    used = {name: value if parser.is_default(argv, name) else vars(args)[name] for name, value in own.items()}
    if xcit.is_xcit_name(used.get('model', '')):
        weights.refuse_other_model(own['model'], used['model'], source=source)
    changed = setting.differences(used, vars(args))
    vars(args).update(used)
    if launch.environment_rank() == 0:  # the processes are not connected yet
        if changed:
            log(f'{source}: using {setting.words({name: used[name] for name in changed})}, as in the checkpoint')
        setting.log_differences(own, used, source)


def setting_of_file(args, model: str) -> Tuple[str, dict]:
    """Return the name, for messages, and the setting of the weights; `model`: --model, '' if not set."""
    if args.eval and args.resume:
        checkpoint, source = load_for_resume(args.resume, args.output_dir, keeps_damaged=True)
        if checkpoint is None:
            raise InputError(f'--resume auto: no {CHECKPOINT} in {args.output_dir} to evaluate')
        return source, setting.of(checkpoint, weights.published_as(args.resume, model))
    flag = '--finetune' if args.finetune else '--pretrained'
    model = model or ('' if weights.published('', args.pretrained) else args.model)  # tags of the default model
    return f'{flag} {args.pretrained}', setting.of_flag(args.pretrained, flag, model, downloads=args.eval)


def check_model_flags(args):
    """Check the flags of model and weights."""
    if args.xca != 'auto' and not xcit.is_xcit_name(args.model):
        raise InputError(f'--xca {args.xca}: only works with XCiT models, not {args.model}')
    if args.xca == 'gram' and flags.amp_dtype(args, flags.choose_device(args)):
        raise InputError('--xca gram: needs float32, so add --amp off')
    if args.freeze_backbone and not args.pretrained and not args.resume:
        raise InputError('--freeze-backbone: needs trained weights, from --finetune, --pretrained or --resume')
    if args.freeze_backbone and args.surgery:
        raise InputError('--surgery: has no effect with --freeze-backbone, which trains no stem')
    for flag, value, model in (('--finetune' if args.finetune else '--pretrained', args.pretrained, args.model),
                               ('--surgery', args.surgery, args.model),
                               ('--teacher-path', args.teacher_path, args.teacher_model)):
        if value:
            weights.check_exists(value, flag, model,
                                 model_flag='--teacher-model' if flag == '--teacher-path' else '--model')
    for flag, value in (('--use-ema', args.use_ema), ('--checkpoint-key', args.checkpoint_key)):
        if value and not args.pretrained and not (args.eval and args.resume):
            raise InputError(f'{flag}: needs a file with weights: --pretrained, or --eval with --resume')


# ---------------------------------------------------------------------------------------------------------------------
# Builders

def build_datasets(args) -> Tuple[samples.PictureSet, samples.PictureSet, int]:
    """Load and inspect both splits; set --resize if unset, and lower a --batch-size that the images can't fill."""
    source = datasets.source(args)
    train_set, num_classes = datasets.load_classes(source, is_train=True)
    eval_set, _ = datasets.load_classes(source, is_train=False)
    view = datasets.decide_resize(source, train_set, build_view(args))
    args.resize = view.resize
    samples.log_class_sizes(train_set, eval_set)
    samples.inspect(train_set, eval_set, skips_bad=args.skip_bad_images > 0, same_size=not view.resizes,
                    with_long=view.resizes)
    images = images_of_epoch(train_set, repeated_aug=args.repeated_aug)
    args.batch_size = flags.filled_batch(args.batch_size, images, even=recipe.uses_soft_targets(args))
    return (train_set.with_transform(recipe.build_transform(args, resize=args.resize)),
            eval_set.with_transform(view.transform()), num_classes)


def build_view(args) -> View:
    return View(args.input_size, args.full_crop, args.resize, args.mean, args.std)


def build_model(args, num_classes: int, *, new_head: bool) -> torch.nn.Module:
    """Build the model with its initial weights; `new_head`: a head for other classes in the weights is dropped."""
    seed_everything(args.seed)
    try:
        model = timm.create_model(args.model, num_classes=num_classes, drop_rate=args.drop,
                                  drop_path_rate=args.drop_path)
    except (TypeError, RuntimeError, ValueError) as error:
        raise InputError(f'--model {args.model}: timm can\'t build this model ({first_line(error)})') from None
    if isinstance(model, xcit.Xcit):
        model.xca_form = args.xca
    else:
        weights.check_input_size(model, args.input_size, args.model)
    if args.pretrained:
        flag = '--finetune' if args.finetune else '--pretrained'
        given = weights.read(args.pretrained, flag, args.model, use_ema=args.use_ema, key=args.checkpoint_key)
        weights.load(model, given, new_head=new_head)
    if args.surgery:
        initial.transplant_stem(model, weights.read(args.surgery, '--surgery', args.model))
    if args.freeze_backbone:
        model.requires_grad_(False)
        model.get_classifier().requires_grad_(True)
    return model


def build_model_ema(args, model: torch.nn.Module) -> Optional[ModelEmaV3]:
    if not args.model_ema:
        return None
    # differs: moving average - the decay rises as 1 - (1 + step) ** -0.8, so that the average of a short run is not
    # made of initial weights; the decay is the original's 0.99996 from step 314,000 (251 of ImageNet's 400 epochs)
    return ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=True, warmup_power=.8,
                      device=torch.device('cpu') if args.model_ema_force_cpu else None)


def compiled_modules(args, model: torch.nn.Module, model_ema: Optional[ModelEmaV3], criterion: DistillationLoss
                     ) -> List[tuple]:
    """Return the modules that --compile compiles, with the options of torch.compile for each."""
    modules = [(model, {'mode': args.compile_mode})]
    if model_ema is not None and model_ema.device is None:  # else the EMA is evaluated as a copy on the model's device
        modules.append((model_ema.module, {'mode': args.compile_mode}))
    if criterion.teacher is not None:  # without CUDA graphs: the model's graph would overwrite the teacher's outputs
        modules.append((criterion.teacher, {}))
    return modules if args.compile else []


# ---------------------------------------------------------------------------------------------------------------------
# The two programs

def train(args, device: torch.device) -> dict:
    """Train a model; return the last epoch's metrics."""
    train_set, eval_set, num_classes = build_datasets(args)
    loading, pace = flags.loading(args, device), flags.pace(args, reference_batch=REFERENCE_BATCH)
    train_loader = build_train_loader(train_set, loading, collate_fn=recipe.build_collate(args),
                                      repeated_aug=args.repeated_aug)
    eval_loader = build_eval_loader(eval_set, loading, shares_images=args.dist_eval)

    model = build_model(args, num_classes, new_head=True).to(device)
    if isinstance(model, xcit.Xcit):
        xcit.speed_up_training(model)
    model_ema, mixup = build_model_ema(args, model), recipe.build_mixup(args, num_classes)
    criterion = recipe.build_criterion(args, num_classes).to(device)
    optimizer = optimization.build_optimizer(model, lr=pace.scaled_lr, **flags.optimizer_options(args))
    scheduler = schedules.by_epoch(optimizer, **flags.schedule_options(args))
    amp_dtype, scaler = flags.amp_dtype(args, device), flags.build_scaler(args, device)
    accuracy = parts.Metrics(last=0., best=0., best_ema=0.)
    run = Run(
        args, Epochs(args.epochs, first=args.start_epoch),
        {'model': weights.ModelPart(model, args.model),
         'model_ema': None if model_ema is None else weights.ModelPart(model_ema.module, args.model),
         'optimizer': parts.Optimizer(optimizer, keeps_lr=scheduler.depends_on_the_past),
         'lr_scheduler': scheduler, 'scaler': scaler, 'accuracy': accuracy,
         'classes': parts.Classes(train_set.class_names())},
        optional=('model_ema', 'scaler', 'accuracy', 'classes',
                  *([] if scheduler.depends_on_the_past else ['lr_scheduler'])),
        fixed=('opt', 'val_fraction'), files=FILES)
    # The head, a linear layer, is the same in both modes
    frozen = model if args.freeze_backbone else model.patch_embed if args.surgery else None
    derived = {**pace.derived(device, amp_dtype), 'num_classes': num_classes, 'train_images': len(train_set),
               'eval_images': len(eval_set),
               'n_parameters': sum(p.numel() for p in model.parameters() if p.requires_grad)}

    with run.resumed() as missing:
        if 'model_ema' in missing:
            model_ema.set(model)
        scheduler.go_to(run.position.done)
        if run.is_over():
            return {}
        ddp_model = assembly.prepare(model, device, checkpointed=model if args.grad_checkpointing else None,
                                     compiled=compiled_modules(args, model, model_ema, criterion),
                                     sync_bn=args.sync_bn)

        def losses(batch) -> dict:
            images, targets = batch if mixup is None else mixup(*batch)
            return {'loss': criterion(images, ddp_model(images), targets)}

        with run.started(derived):
            if run.log is not None:
                log_start(run, train_set, train_loader, count=min(args.batch_size, 32),
                          normalise=ToNormalizedTensor(args.mean, args.std))
                if args.report:
                    drawings.log_missing()
            pace.log(batches=len(train_loader), warmup_epochs=args.warmup_epochs, epochs=args.epochs,
                     images=images_of_epoch(train_set, repeated_aug=args.repeated_aug), min_lr=args.min_lr)
            for epoch in run.rounds(train_loader):
                best = None
                stats = train_one_epoch(
                    ddp_model, losses, train_loader, optimizer=optimizer, clip_grad=args.clip_grad, frozen=frozen,
                    average=None if model_ema is None else lambda done: model_ema.update(model, step=done),
                    **run.options(epoch, device, scaler))
                stats = {f'train_{k}': v for k, v in stats.items()}
                if epoch % args.test_freq == 0 or epoch == args.epochs - 1:
                    with run.evaluation():
                        metrics, predictions = evaluation.evaluate_with_ema(
                            model, model_ema, eval_loader, device=device, amp_dtype=amp_dtype,
                            where=f'the end of epoch {epoch}', after_batch=run.check_signals,
                            collects=bool(args.report and args.output_dir))
                    stats.update(metrics)
                    best = update_best(accuracy, stats, epoch, images=len(eval_set))
                    if best and predictions:
                        predictions[best].gather(eval_loader)
                        facts = report.setting(
                            model=args.model, weights=f'{"EMA" if best == "best_ema" else "model"} of epoch {epoch}',
                            source=datasets.source(args), view=build_view(args))
                        with without_ending(f'the report in {run.folder}'):
                            evaluation.write_tables(run.folder, eval_set, predictions[best], facts)
                # faithful: stepped with the epoch just finished, so that epochs 0 and 1 share a rate (original main.py)
                scheduler.step(epoch, accuracy['last'])
                stats['n_parameters'] = derived['n_parameters']
                # The best file has the better weights as `model`; programs such as timm's prefer its `model_ema`
                replace = {'model': 'model_ema'} if best == 'best_ema' else {'model_ema': None} if model_ema else {}
                run.finish(epoch, stats, keep=[BEST] if best else [], replace=replace,
                           summary=table_row(stats, evaluation.COLUMNS))
    if run.folder is not None:
        if args.report:
            with without_ending(f'the report in {run.folder}'):
                evaluation.draw_report(run.folder, eval_set)
        print_next_steps(args, accuracy)
    return stats


def update_best(accuracy: parts.Metrics, stats: dict, epoch: int, *, images: int) -> Optional[str]:
    """Update the accuracies; return `best` or `best_ema` if this evaluation is the best so far, else None."""
    accuracy.update(last=stats['test_acc1'], last_epoch=float(epoch), images=float(images))
    if 'test_ema_acc1' in stats:
        accuracy['last_ema'] = stats['test_ema_acc1']
    best = accuracy.update_best({'best': stats['test_acc1'], 'best_ema': stats.get('test_ema_acc1', float('nan'))},
                                epoch=epoch)
    if best:
        accuracy['better_is_average'] = float(best == 'best_ema')
    return best


def log_start(run: Run, train_set: samples.PictureSet, loader, *, count: int, normalise: ToNormalizedTensor):
    """Write the split of the pictures to the output folder, and a preview of a new run's images."""
    if train_set.split is not None:
        train_set.split.write(run.folder)
    if run.first == 0 and (page := preview.sheet(train_set, loader, count, normalise)) is not None:
        preview.write(run.folder, run.log, page)


def print_next_steps(args, accuracy: parts.Metrics):
    """Print the best epoch of a run, and the commands that evaluate and use its model."""
    file, is_ema = Path(args.output_dir, BEST), bool(accuracy.get('better_is_average'))
    if 'best_epoch' in accuracy:
        place = f', in {file}' if file.exists() else ''  # no new best after a resume from another folder
        log(f'Best: epoch {accuracy["best_epoch"]:.0f}, {"the EMA" if is_ema else "the model"}, Acc@1 '
            f'{accuracy["best_ema" if is_ema else "best"]:.3f}{place}')
    file = file if file.exists() else file.with_name(CHECKPOINT)
    evaluate = words_of({
        'resume': file, **datasets.flags_of(args.data_set, args.data_path),
        'inat_category': args.inat_category if args.data_set.startswith('INAT') else None,
        'num_classes': args.num_classes, 'val_split': args.val_split if readers.prefix_of(args.data_set) else None})
    log('Next, evaluate the model, or predict your own pictures:\n  '
        + shlex.join(['python', 'main.py', '--eval', *evaluate]) + '\n  '
        + shlex.join(['python', '-m', 'tools.predict', 'PICTURE.jpg', *words_of({'pretrained': file})]))


def evaluate_only(args, device: torch.device) -> dict:
    """Evaluate a model; return and store the metrics."""
    source = datasets.source(args)
    dataset, num_classes = datasets.load_classes(source, is_train=False)
    labels = args.real_labels and real_labels.read(args.real_labels)
    if labels:
        real_labels.numbers_of(dataset.files())  # raises InputError before the work
    view = datasets.decide_resize(source, dataset, build_view(args))
    args.resize = view.resize
    samples.inspect(None, dataset, same_size=not view.resizes)
    model = build_model(args, num_classes, new_head=False)
    checkpoint, origin = load_for_resume(args.resume, args.output_dir, keeps_damaged=True)
    if checkpoint is not None:
        weights.load(model, weights.extract(checkpoint, origin, own=weights.names_of(args.model), use_ema=args.use_ema,
                                            key=args.checkpoint_key, expected=(args.model, '--model')))
    elif not args.pretrained:
        log('Neither --resume nor --pretrained: the weights are random')
    stats, predictions = evaluation.evaluate_classifier(
        model, dataset, view, flags.loading(args, device), amp_dtype=flags.amp_dtype(args, device),
        shares_images=args.dist_eval, compile_mode=args.compile_mode if args.compile else None, name=args.model,
        classes=names_of((checkpoint or {}).get('classes')), weights=origin)
    if labels:
        stats.update(evaluation.evaluate_real_labels(labels, dataset, predictions))
    stats.update(model=args.model, weights=args.resume or args.pretrained, crop=view.crop)
    if args.output_dir:
        if processes.is_main_process():
            write_result(Path(args.output_dir, 'eval.json'), stats, vars(args))
        if args.report:
            facts = report.setting(model=args.model, weights=origin or args.pretrained or 'random', source=source,
                                   view=view)
            with without_ending(f'the report in {args.output_dir}'):
                evaluation.write_tables(Path(args.output_dir), dataset, predictions, facts)
                evaluation.draw_report(Path(args.output_dir), dataset)
    return stats


def main(argv: Optional[list] = None) -> dict:
    """Run with a list of words as the command line (None: `sys.argv`); return the last metrics."""
    args = parse_args(argv)
    with flags.joined(args, trains=not args.eval) as device:
        return evaluate_only(args, device) if args.eval else train(args, device)


if __name__ == '__main__':
    run_program(main)
