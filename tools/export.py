"""Export a model with its weights as ONNX, TorchScript or torch.export program, in float32.

The batch size stays free; height and width do with --dynamic. The outputs of the file, read back, are compared with the
model's at several sizes before it is kept. It also holds what a program that uses it must know, as JSON: names of the
classes, and size (pixels), crop and normalisation of the images. ONNX has these as metadata properties, the two others
as extra file metadata.json.
"""
import run.startup  # noqa: F401  first of all

import argparse
import io
import json
import os
import warnings
from pathlib import Path
from typing import Callable, Dict, List, Tuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import datasets
import utils
import xca_gram
import xcit
import xcit_fuse
from run import commandline
from run.commandline import NON_NEGATIVE, PATH_OBJECT
from run.processes import notice
from tools import common
from utils import InputError, RunStopped, first_line
from weights import check_input_size

ONNX_PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')
OPSET = 20  # torch.onnx's own choice; newer ones are read by fewer runtimes
METADATA = 'metadata.json'


# ---------------------------------------------------------------------------------------------------------------------
# Arguments

def get_args_parser() -> argparse.ArgumentParser:
    parser = commandline.Parser('python -m tools.export', description=__doc__,
                          formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    common.add_weights_arguments(parser)
    common.add_square_arguments(parser)
    parser.set_defaults(device='cpu', amp='off')  # for load_model: every machine has them
    group = parser.add_argument_group('export')
    group.add_argument('--format', required=True, choices=list(FORMATS),
                       help='onnx needs the packages of requirements-export.txt; torchscript is deprecated by PyTorch')
    group.add_argument('--output', required=True, type=PATH_OBJECT, metavar='FILE',
                       help='ends in ' + ', '.join(f'{suffix} ({name})' for name, (suffix, _, _) in FORMATS.items()))
    group.add_argument('--dynamic', action=argparse.BooleanOptionalAction, default=False,
                       help='leave height and width free, each of any size above one patch (XCiT only); a torchscript '
                       'file takes any size in any case, which this has compared')
    group.add_argument('--tolerance', type=NON_NEGATIVE, default=1e-4, metavar='FRACTION',
                       help='largest difference allowed, as a fraction of the largest output')
    return parser


def parse_args(argv=None) -> argparse.Namespace:
    """Parse the command line and refuse what can't work before any work is done."""
    args = get_args_parser().parse_args(argv)
    suffix = FORMATS[args.format][0]
    if args.output.suffix != suffix:
        raise InputError(f'--output {args.output}: must end in {suffix} for --format {args.format}')
    folder = args.output.absolute().parent
    if args.output.is_dir() or not folder.is_dir():
        raise InputError(f'--output {args.output}: is {"a" if args.output.is_dir() else "in no"} directory')
    if not os.access(folder, os.W_OK):
        raise InputError(f'--output {args.output}: can\'t be written to {folder}')
    if args.format == 'onnx':
        check_packages()
    return args


def check_packages():
    missing = [name for name in ONNX_PACKAGES if not utils.is_installed(name)]
    if missing:
        raise InputError(f'--format onnx: needs {", ".join(missing)}: pip install -r requirements-export.txt')


def check_sizes(loaded: common.LoadedModel, dynamic: bool):
    """Refuse sizes that the model or the format can't take."""
    if not isinstance(loaded.model, xcit.Xcit):
        if dynamic:
            raise InputError(f'--dynamic: is for the XCiT models, and {loaded.name} is none')
        check_input_size(argparse.Namespace(model=loaded.name, input_size=loaded.input_size), loaded.model)
    elif dynamic and loaded.input_size <= patch_size(loaded.model):
        raise InputError(f'--input-size {loaded.input_size}: must be above {patch_size(loaded.model)} with --dynamic, '
                         f'which is one patch')


def patch_size(model: xcit.Xcit) -> int:
    return model.feature_info[0]['reduction']


# ---------------------------------------------------------------------------------------------------------------------
# Formats: for each, what makes a file's content of a model, and what reads the file, as images -> outputs

def free_axes(dynamic: bool) -> Dict[int, str]:
    """The axes of the images (B, 3, img_h, img_w) whose length a file leaves open."""
    return {0: 'batch', 2: 'height', 3: 'width'} if dynamic else {0: 'batch'}


def to_onnx(model: torch.nn.Module, images: torch.Tensor, metadata: dict, *, dynamic: bool) -> bytes:
    program = torch.onnx.export(
        model, (images,), dynamo=True, opset_version=OPSET, dynamic_shapes=(free_axes(dynamic),),
        input_names=['images'], output_names=['outputs'], verbose=False)
    for node in program.model.graph:
        node.metadata_props.clear()  # torch's notes, with paths of this machine
    program.model.metadata_props.update({key: json.dumps(value) for key, value in metadata.items()})
    return program.model_proto.SerializeToString()


def read_onnx(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(session.run(['outputs'], {'images': images.numpy()})[0])


def to_torchscript(model: torch.nn.Module, images: torch.Tensor, metadata: dict, *, dynamic: bool) -> bytes:
    buffer = io.BytesIO()  # torch.jit.save itself aborts the process where the disk is full
    torch.jit.save(torch.jit.script(model), buffer, _extra_files={METADATA: json.dumps(metadata)})
    return buffer.getvalue()


def to_torch_export(model: torch.nn.Module, images: torch.Tensor, metadata: dict, *, dynamic: bool) -> bytes:
    buffer = io.BytesIO()
    axes = dict.fromkeys(free_axes(dynamic), torch.export.Dim.DYNAMIC)
    program = torch.export.export(model, (images,), dynamic_shapes=(axes,))
    for node in program.graph.nodes:
        node.meta.pop('stack_trace', None)  # with paths of this machine
    torch.export.save(program, buffer, extra_files={METADATA: json.dumps(metadata)})
    return buffer.getvalue()


def read_torch_export(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.export.load(path).module()


FORMATS = {
    'onnx': ('.onnx', to_onnx, read_onnx),
    'torchscript': ('.pt', to_torchscript, torch.jit.load),
    'torch-export': ('.pt2', to_torch_export, read_torch_export),
}


def describe(loaded: common.LoadedModel) -> dict:
    """What a program must know to show images to the model and to name what it says; plain values.

    `crop` is the part of an image's shorter side that is resized to `input_size`; None: images are taken as they are.
    """
    crop = 1. if loaded.full_crop else .875
    return {'model': loaded.name, 'classes': loaded.classes, 'input_size': loaded.input_size,
            'crop': crop if datasets.resizes_for_evaluation(loaded) else None, 'interpolation': 'bicubic',
            'mean': list(loaded.mean or IMAGENET_DEFAULT_MEAN), 'std': list(loaded.std or IMAGENET_DEFAULT_STD)}


# ---------------------------------------------------------------------------------------------------------------------
# Comparison

def shapes_to_compare(loaded: common.LoadedModel, dynamic: bool) -> List[Tuple[int, ...]]:
    """Batches of several sizes; with `dynamic`, also images as low as they may be, and larger ones, not square."""
    size = loaded.input_size
    shapes = [(1, 3, size, size), (3, 3, size, size)]
    if dynamic:
        shapes += [(1, 3, patch_size(loaded.model) + 1, size), (2, 3, size + 1, size + size // 2)]
    return shapes


def compare(exported: Callable, examples: List[Tuple[torch.Tensor, torch.Tensor]], tolerance: float
            ) -> Dict[tuple, float]:
    """Compare what a file computes with the model's outputs, and print each difference.

    Args:
        examples: images (B, 3, img_h, img_w) and the model's outputs (B, K).
        tolerance: fraction of the largest output.

    Returns:
        The largest difference for each shape of the images, as a fraction of the largest output.

    Raises:
        RunStopped: one is above the tolerance.
    """
    differences = {}
    for images, expected in examples:
        difference = ((exported(images) - expected).abs().max() / expected.abs().max()).item()
        differences[tuple(images.shape)] = difference
        report = f'{" x ".join(map(str, images.shape))}: largest difference {difference:.1e}, tolerance {tolerance:.1e}'
        if not difference <= tolerance:  # nan is none of both
            raise RunStopped(f'{report}, of the largest output: not exported')
        notice(report)
    return differences


# ---------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def main(argv=None) -> Dict[tuple, float]:
    """Export a model; returns how far its outputs are from the model's, see `compare`."""
    args = parse_args(argv)
    with utils.whole_file(args.output) as path:
        path.touch()  # what can't be written shows before the work
        loaded = common.load_model(args, fuse=False)
        check_sizes(loaded, args.dynamic)
        differences = export(loaded, args, path)
    if args.dynamic:
        images = f'images of more than {patch_size(loaded.model)} pixels a side'
    else:
        images = f'images of {loaded.input_size} x {loaded.input_size} pixels'
    notice(f'{args.output}: {args.output.stat().st_size / 2 ** 20:.1f} MB, for any number of {images}')
    return differences


def prepare(model: xcit.Xcit, input_size: int, format_name: str):
    """Fold BatchNorm and LayerScale away, and choose the form of XCA, which must not depend on the image in a file."""
    with torch.no_grad():
        tokens = model.patch_embed(torch.zeros(1, 3, input_size, input_size)).flatten(2).transpose(1, 2)
        gram = xca_gram.applies(model.blocks[0].attn, tokens)
    model.xca_form = 'gram' if gram else 'plain'
    if format_name == 'torchscript':  # its compiler reads the definition alone
        xcit_fuse.fuse_stem(model)
    else:
        xcit.fuse(model)


def export(loaded: common.LoadedModel, args, path: Path) -> Dict[tuple, float]:
    """Write a file and compare it with the model, which this prepares for inference.

    Raises:
        RunStopped: the model can't be exported, or the file not read back, or it computes something else.
    """
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(shape, generator=generator) for shape in shapes_to_compare(loaded, args.dynamic)]
    examples = [(images, loaded.model(images)) for images in batches]
    if isinstance(loaded.model, xcit.Xcit):
        prepare(loaded.model, loaded.input_size, args.format)
    notice(f'Exporting {loaded.name} as {args.format}')
    _, content_of, read = FORMATS[args.format]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # the exporters' about their own deprecated parts
            # The example has more than one image: an axis of length 1 would count as fixed.
            content = content_of(loaded.model, batches[-1], describe(loaded), dynamic=args.dynamic)
            with utils.writing(args.output), open(path, 'wb') as file:
                file.write(content)
                utils.sync_to_disk(file)
            return compare(read(path), examples, args.tolerance)
    except RunStopped:
        raise
    except Exception as error:  # of the exporters and the runtimes: many kinds
        raise RunStopped(f'{loaded.name} can\'t be exported as {args.format} ({first_line(error.__cause__ or error)})'
                         ) from None


if __name__ == '__main__':
    commandline.run_program(main)
