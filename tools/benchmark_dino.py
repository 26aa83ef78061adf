"""Time and memory of a training step of DINO, against the same step with timm's model (tools.benchmark dino).

The crops are random numbers, so loading is not measured.
"""
from typing import Callable, Dict, List, Optional, Sequence

import timm
import torch

import xcit
from dino import updates
from dino.loss import GLOBAL, DinoLoss
from dino.networks import Head, MultiCrop
from run import cpu
from run.output import log
from tools import measuring
from tools.measuring import autocast, or_dash, peak_memory, ratio, shown, table, take_turns

STEPS = ('teacher', 'student', 'whole step')
TEMPERATURE, CLIP, MOMENTUM = .04, 3., .996


def build_network(name: str, out_dim: int, *, of_timm: bool) -> MultiCrop:
    """Build a network with random weights, equal for both implementations."""
    torch.manual_seed(0)
    backbone = (measuring.timm_twin(name, num_classes=0) if of_timm else
                xcit.speed_up_training(timm.create_model(name, num_classes=0)))
    return MultiCrop(backbone, Head(backbone.num_features, out_dim, use_bn=False, norm_last_layer=True)).train()


def build_steps(name: str, batch_size: int, crop_sizes: Sequence[int], out_dim: int, *, of_timm: bool,
                compile_mode: Optional[str], precision: str, device: torch.device) -> Dict[str, Callable]:
    """Return functions by name: the teacher's pass; the student's passes and update; both, and the teacher's update.

    `crop_sizes` are pixels, global crops first; with compile_mode=None the networks are not compiled.
    """
    try:
        student, teacher = (build_network(name, out_dim, of_timm=of_timm).to(device) for _ in range(2))
        crops = [torch.randn(batch_size, 3, size, size, device=device) for size in crop_sizes]
        criterion = DinoLoss(out_dim, len(crops)).to(device)
    except RuntimeError as error:
        return dict.fromkeys(STEPS, measuring.fails_for_memory(error))
    teacher.requires_grad_(False)
    if compile_mode is not None:
        for network in (student, teacher):
            network.backbone.compile(mode=compile_mode, dynamic=False)
    optimizer = updates.build_optimizer('adamw', student)

    @torch.no_grad()
    def run_teacher() -> torch.Tensor:
        with autocast(device, precision):
            return teacher(crops[:GLOBAL])[0]

    def update_student(teacher_out: torch.Tensor):
        with autocast(device, precision):
            loss, _ = criterion(student(crops)[0], teacher_out, TEMPERATURE)
        loss.backward()
        updates.clip_each(student.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    def whole_step():
        update_student(run_teacher())
        updates.average_into(teacher, student, MOMENTUM)

    fixed = torch.randn(GLOBAL * batch_size, out_dim, device=device)
    return dict(zip(STEPS, (run_teacher, lambda: update_student(fixed), whole_step)))


def measure(name: str, batch_size: int, crop_sizes: Sequence[int], out_dim: int, *, compile_mode: Optional[str],
            precision: str, device: torch.device, rounds: int) -> List[dict]:
    """Measure the steps here and with timm's model, and return a row for each; for arguments see `build_steps`."""
    if device.type == 'cpu':
        cpu.keep_freed_memory()  # as dino.train does
    ways = {(source, mode is not None): build_steps(
        name, batch_size, crop_sizes, out_dim, of_timm=source == 'timm', compile_mode=mode, precision=precision,
        device=device) for source in ('here', 'timm') for mode in dict.fromkeys((None, compile_mode))}
    rows = []
    for step in STEPS:
        times = take_turns({way: steps[step] for way, steps in ways.items()}, device, rounds)
        memory = {way: times[way] and peak_memory(steps[step], device) for way, steps in ways.items()}
        rates = {way: seconds and batch_size / seconds for way, seconds in times.items()}
        rows.append(dict(step=step, seconds=times, memory_mb=memory, images_per_s=rates))
        log(f'{step}: ' + ', '.join(f'{source}{" compiled" * compiled} {shown(rate, 1, " images/s")}'
                                    for (source, compiled), rate in rates.items()))
    base = ('timm', False)
    table(['step', 'model', 'images/s', 'speed, timm = 1', 'peak memory, MB', 'timm = 1'],
          [[row['step'], f'{way[0]}{", compiled" * way[1]}', shown(row['images_per_s'][way]),
            ratio(row['seconds'][way], row['seconds'][base]), or_dash(row['memory_mb'][way], 0),
            ratio(row['memory_mb'][base], row['memory_mb'][way])] for row in rows for way in ways])
    return rows
