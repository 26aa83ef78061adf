"""How fast a training step is, and what memory it needs, beside the same step with timm's model (tools.benchmark dino).

The crops are made numbers, so that loading is left out.
"""
import functools
from typing import Callable, Dict, List, Optional

import timm
import torch

import xcit
import xcit_zoo
from dino import updates
from dino.loss import GLOBAL, DinoLoss
from dino.networks import Head, MultiCrop
from run import processes
from run.processes import notice
from tools.measuring import PRECISIONS, fails_for_memory, known, peak_memory, ratio, shown, table, take_turns

STEPS = ('teacher', 'student', 'whole step')
TEMPERATURE, CLIP, MOMENTUM, LR = .04, 3., .996, 1e-5


def build_network(name: str, out_dim: int, *, of_timm: bool) -> MultiCrop:
    """With random weights, the same for both implementations."""
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=0)
    if of_timm:
        weights = backbone.state_dict()
        backbone = timm.create_model(f'{name}_224', num_classes=0)
        backbone.load_state_dict(xcit_zoo.to_timm_names(weights))
    else:
        xcit.speed_up_training(backbone)
    return MultiCrop(backbone, Head(backbone.num_features, out_dim, use_bn=False, norm_last_layer=True)).train()


def build_steps(args, device: torch.device, *, of_timm: bool, compiled: bool) -> Dict[str, Callable]:
    """By name: the teacher's pass; the student's, back and with its update; both with the moving average."""
    try:
        student, teacher = (build_network(args.model, args.out_dim, of_timm=of_timm).to(device) for _ in range(2))
        crops = [torch.randn(args.batch_size, 3, size, size, device=device) for size in
                 [args.global_crops_size] * GLOBAL + [args.local_crops_size] * args.local_crops_number]
        criterion = DinoLoss(args.out_dim, len(crops)).to(device)
    except RuntimeError as error:
        return dict.fromkeys(STEPS, fails_for_memory(error))
    teacher.requires_grad_(False)
    if compiled:
        for network in (student, teacher):
            network.backbone.compile(mode=args.compile_mode, dynamic=False)
    optimizer = torch.optim.AdamW(updates.parameter_groups(student), lr=LR, fused=True)
    autocast = functools.partial(torch.autocast, device.type, PRECISIONS[args.precision],
                                 enabled=args.precision != 'fp32')

    @torch.no_grad()
    def teach() -> torch.Tensor:
        with autocast():
            return teacher(crops[:GLOBAL])[0]

    def learn(taught: torch.Tensor):
        with autocast():
            loss, _ = criterion(student(crops)[0], taught, TEMPERATURE)
        loss.backward()
        updates.clip_each(student.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    def both():
        learn(teach())
        updates.average_into(teacher, student, MOMENTUM)

    fixed = torch.randn(GLOBAL * args.batch_size, args.out_dim, device=device)
    return dict(zip(STEPS, (teach, lambda: learn(fixed), both)))


def measure(args, device: torch.device) -> List[dict]:
    """The command: prints a table, and returns its rows."""
    if device.type == 'cpu':
        processes.keep_freed_memory()  # as a training does
    ways = {(source, compiled): build_steps(args, device, of_timm=source == 'timm', compiled=compiled)
            for source in ('here', 'timm') for compiled in ((False, True) if args.compile else (False,))}
    rows = []
    for name in STEPS:
        times = take_turns({way: steps[name] for way, steps in ways.items()}, device, args.rounds)
        memory = {way: times[way] and peak_memory(steps[name], device) for way, steps in ways.items()}
        rows.append(dict(step=name, seconds=times, memory_mb=memory))
        notice(f'{name}: ' + ', '.join(f'{source}{" compiled" * compiled} {shown(rate(args, seconds), 1, " images/s")}'
                                       for (source, compiled), seconds in times.items()))
    base = ('timm', False)
    table(['step', 'model', 'images/s', 'speed, timm = 1', 'peak memory, MB', 'timm = 1'],
          [[row['step'], f'{source}{", compiled" * compiled}', shown(rate(args, row['seconds'][source, compiled])),
            ratio(row['seconds'][source, compiled], row['seconds'][base]),
            known(row['memory_mb'][source, compiled], 0),
            ratio(row['memory_mb'][base], row['memory_mb'][source, compiled])]
           for row in rows for source, compiled in ways])
    return rows


def rate(args, seconds: Optional[float]) -> Optional[float]:
    """Images in a second."""
    return seconds and args.batch_size / seconds
