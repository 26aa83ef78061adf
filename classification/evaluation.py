"""Evaluation of classifiers: accuracy, predictions of each image, reassessed labels, and the report of a run."""
import copy
import math
from pathlib import Path
from typing import Callable, Dict, List, Optional, Tuple

import torch
from timm.utils import ModelEmaV3

import xcit
from classification import report
from engine import evaluate
from loaders.batches import build_eval_loader
from loaders.samples import PictureSet
from loaders.transforms import View
from reports import real_labels, tables
from reports.predictions import Predictions
from run import processes
from run.logs import environment, log_values
from run.output import log
from run.settings import Loading
from utils import NonFiniteLoss, counted

# Columns of the table of epochs: key of a metric and format
COLUMNS = {'loss': ('train_loss', '.4f'), 'lr': ('train_lr', '.2e'), 'Acc@1': ('test_acc1', '.3f'),
           'Acc@5': ('test_acc5', '.3f'), 'val loss': ('test_loss', '.3f'), 'EMA Acc@1': ('test_ema_acc1', '.3f'),
           'images/s': ('train_images_per_s', '.0f'), 'MB': ('train_memory_mb', '.0f')}


def evaluate_classifier(model: torch.nn.Module, dataset: PictureSet, view: View, loading: Loading, *,
                        amp_dtype: Optional[torch.dtype] = None, shares_images: bool = True,
                        compile_mode: Optional[str] = None, name: str = 'model', classes: Optional[List[str]] = None,
                        weights: str = '') -> Tuple[dict, Predictions]:
    """Evaluate a trained model on a data set without a transform, and log the setting; an XCiT is fused, in place.

    Args:
        amp_dtype: autocast dtype; None: full precision.
        shares_images: the processes share the images; False: each process evaluates all images.
        compile_mode: mode of torch.compile; None: the model is not compiled.
        name, classes, weights: names of the model, of its classes (None: unknown) and of its weights, for the log.

    Returns:
        The metrics of `engine.evaluate`, and the gathered predictions.
    """
    log_values(environment())
    log(f'{name}: {counted(len(dataset), "image")} at {view.input_size} pixels, crop {view.crop:g}')
    if classes not in (None, dataset.class_names()):
        log(f'{weights}: was trained on classes with other names, or in another order')
    loader = build_eval_loader(dataset.with_transform(view.transform()), loading, shares_images=shares_images)
    model.eval()
    if isinstance(model, xcit.Xcit):
        xcit.fuse(model)
    if compile_mode is not None:
        model.compile(mode=compile_mode)
    predictions = Predictions()
    stats = evaluate(model.to(loading.device), loader, device=loading.device, amp_dtype=amp_dtype,
                     classes=dataset.possible, collect=predictions)
    predictions.gather(loader)
    return stats, predictions


def evaluate_with_ema(model: torch.nn.Module, model_ema: Optional[ModelEmaV3], loader, *, device: torch.device,
                      amp_dtype: Optional[torch.dtype], where: str, after_batch: Callable[[], None], collects: bool
                      ) -> Tuple[dict, Dict[str, Predictions]]:
    """Evaluate a model and its EMA within a run.

    Args:
        where: place in the run, for the error of a diverged model.
        collects: keep the predictions.

    Returns:
        The metrics; and the predictions of 'best' (the model) and 'best_ema', if they are kept.

    Raises:
        NonFiniteLoss: the model has diverged.
    """
    predictions = {name: Predictions() for name in ('best', 'best_ema')} if collects else {}
    options = dict(device=device, amp_dtype=amp_dtype, after_batch=after_batch, prints=False)
    stats = evaluate(model, loader, collect=predictions.get('best'), **options)
    if not math.isfinite(stats['loss']):
        raise NonFiniteLoss('evaluation loss', stats['loss'], where)
    metrics = {f'test_{k}': v for k, v in stats.items() if k not in ('images', 'resolution')}
    if model_ema is not None:
        ema = model_ema.module if model_ema.device is None else copy.deepcopy(model_ema.module).to(device)
        stats = evaluate(ema, loader, header='Test of the EMA', collect=predictions.get('best_ema'), **options)
        metrics.update({f'test_ema_{k}': stats[k] for k in ('acc1', 'acc5', 'loss')})
    return metrics, predictions


def evaluate_real_labels(labels: List[List[int]], dataset: PictureSet, predictions: Predictions) -> dict:
    """Compute and log accuracies by ImageNet's reassessed labels."""
    top1, top5, count = real_labels.accuracy(predictions, dataset.files(), labels)
    log(f'* ReaL Acc@1 {top1:.3f} Acc@5 {top5:.3f} of {counted(count, "image")}')
    return {'real_acc1': top1, 'real_acc5': top5, 'real_images': count}


def write_tables(run_folder: Path, dataset: PictureSet, predictions: Predictions, facts: dict):
    """Write the tables of a report, on the main process, from the predictions of all processes.

    Args:
        facts: result of `report.setting`.
    """
    if processes.is_main_process():
        report.write_tables(run_folder / tables.FOLDER, dataset, predictions, facts)


def draw_report(run_folder: Path, dataset: PictureSet):
    """Draw the pictures and the page of a report, on the main process, from its tables and the log of its run."""
    if processes.is_main_process():
        log(f'Report: {report.draw(run_folder, dataset)}')
