"""Export a model with its weights as ONNX, TorchScript or torch.export program, in float32.

The batch size is free; with --dynamic also height and width. Before a file is kept, its outputs are compared with the
model's at several sizes. The file contains metadata as JSON: class names, and size (pixels), crop and normalisation of
the images; as metadata properties of ONNX, and as extra file metadata.json of the other formats.
"""
import argparse
import contextlib
import io
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Callable, Dict, List, Tuple

if not __package__:  # started as a file
    sys.path[0] = os.path.realpath(f'{__file__}/../..')

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import utils
import xca_gram
import xcit
import xcit_fuse
from inference import flags
from inference.loaded import LoadedModel, load
from run.commandline import NON_NEGATIVE, PATH_OBJECT, Parser, run_program
from run.output import log
from utils import InputError, RunStopped, first_line
from weights import check_input_size

ONNX_PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')
OPSET = 20  # torch.onnx's default; fewer runtimes read newer versions
METADATA = 'metadata.json'


def get_args_parser() -> Parser:
    parser = Parser('python -m tools.export', description=__doc__,
                    example='--format onnx --output model.onnx --dynamic --pretrained runs/mine/best_model.pth')
    flags.add_weights_flags(parser)
    flags.add_square_flags(parser)
    group = parser.add_argument_group('export')
    group.add_argument('--format', required=True, choices=list(FORMATS),
                       help='format of the file; onnx needs the packages of requirements-export.txt; torchscript is '
                       'deprecated by PyTorch')
    group.add_argument('--output', required=True, type=PATH_OBJECT, metavar='FILE', help='file to write: '
                       + ', '.join(f'{suffix} ({name})' for name, (suffix, _, _) in FORMATS.items()))
    group.add_argument('--dynamic', action=argparse.BooleanOptionalAction, default=False,
                       help='free height and width, each above one patch (XCiT only); a torchscript file accepts any '
                       'size in any case, and the flag adds the comparison')
    group.add_argument('--tolerance', type=NON_NEGATIVE, default=1e-4, metavar='FRACTION',
                       help='largest difference allowed, as a fraction of the largest output')
    return parser


def parse_args(argv=None) -> argparse.Namespace:
    args = get_args_parser().parse_args(argv)
    suffix = FORMATS[args.format][0]
    if args.output.suffix != suffix:
        raise InputError(f'--output {args.output}: must end in {suffix} for --format {args.format}')
    folder = args.output.absolute().parent
    if args.output.is_dir() or not folder.is_dir():
        raise InputError(f'--output {args.output}: is {"a" if args.output.is_dir() else "in no"} directory')
    if not os.access(folder, os.W_OK):
        raise InputError(f'--output {args.output}: can\'t be written to {folder}')
    missing = [name for name in ONNX_PACKAGES if args.format == 'onnx' and not utils.is_installed(name)]
    if missing:
        raise InputError(f'--format onnx: needs {", ".join(missing)}: pip install -r requirements-export.txt')
    return args


def check_sizes(loaded: LoadedModel, dynamic: bool):
    """Raise InputError if the model or the format does not accept the size of the images."""
    model, size = loaded.model, loaded.view.input_size
    if not isinstance(model, xcit.Xcit):
        if dynamic:
            raise InputError(f'--dynamic: only works with XCiT models, not {loaded.name}')
        check_input_size(model, size, loaded.name)
    elif dynamic and size <= model.patch_size:
        raise InputError(f'--input-size {size}: must be above {model.patch_size} with --dynamic (one patch)')


def free_axes(dynamic: bool) -> Dict[int, str]:
    """Return the axes of the images (B, 3, img_h, img_w) that a file leaves open, and their names."""
    return {0: 'batch', 2: 'height', 3: 'width'} if dynamic else {0: 'batch'}


def to_onnx(model: torch.nn.Module, images: torch.Tensor, metadata: dict, *, dynamic: bool) -> bytes:
    program = torch.onnx.export(
        model, (images,), dynamo=True, opset_version=OPSET, dynamic_shapes=(free_axes(dynamic),),
        input_names=['images'], output_names=['outputs'], verbose=False)
    for node in program.model.graph:
        node.metadata_props.clear()  # contains paths of this machine
    program.model.metadata_props.update({key: json.dumps(value) for key, value in metadata.items()})
    return program.model_proto.SerializeToString()


def read_onnx(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(session.run(['outputs'], {'images': images.numpy()})[0])


def to_torchscript(model: torch.nn.Module, images: torch.Tensor, metadata: dict, *, dynamic: bool) -> bytes:
    buffer = io.BytesIO()  # torch.jit.save to a file aborts the process if the disk is full
    torch.jit.save(torch.jit.script(model), buffer, _extra_files={METADATA: json.dumps(metadata)})
    return buffer.getvalue()


def to_torch_export(model: torch.nn.Module, images: torch.Tensor, metadata: dict, *, dynamic: bool) -> bytes:
    buffer = io.BytesIO()
    axes = dict.fromkeys(free_axes(dynamic), torch.export.Dim.DYNAMIC)
    program = torch.export.export(model, (images,), dynamic_shapes=(axes,))
    for node in program.graph.nodes:
        node.meta.pop('stack_trace', None)  # contains paths of this machine
    torch.export.save(program, buffer, extra_files={METADATA: json.dumps(metadata)})
    return buffer.getvalue()


# Suffix, function that exports a model to the content of a file, and function that reads a file as images -> outputs
FORMATS = {
    'onnx': ('.onnx', to_onnx, read_onnx),
    'torchscript': ('.pt', to_torchscript, torch.jit.load),
    'torch-export': ('.pt2', to_torch_export, lambda path: torch.export.load(path).module()),
}


def describe(loaded: LoadedModel) -> dict:
    """Return the metadata of a file: the preparation of images and the class names, as plain values.

    `crop` is the part of an image's shorter side that is resized to `input_size`; None: images are not resized.
    """
    view = loaded.view
    return {'model': loaded.name, 'classes': loaded.classes, 'input_size': view.input_size,
            'crop': view.crop if view.resizes else None, 'interpolation': 'bicubic',
            'mean': list(view.mean or IMAGENET_DEFAULT_MEAN), 'std': list(view.std or IMAGENET_DEFAULT_STD)}


def compare(exported: Callable, examples: List[Tuple[torch.Tensor, torch.Tensor]], tolerance: float
            ) -> Dict[tuple, float]:
    """Log and return the largest difference of a file's outputs for each shape, as a fraction of the largest output.

    Args:
        examples: images (B, 3, img_h, img_w) and the model's outputs (B, K).

    Raises:
        RunStopped: a difference is above the tolerance.
    """
    differences = {}
    for images, expected in examples:
        difference = ((exported(images) - expected).abs().max() / expected.abs().max()).item()
        differences[tuple(images.shape)] = difference
        report = f'{" x ".join(map(str, images.shape))}: largest difference {difference:.1e}, tolerance {tolerance:.1e}'
        if not difference <= tolerance:  # also for nan
            raise RunStopped(f'{report}, of the largest output: not exported')
        log(report)
    return differences


@torch.no_grad()
def main(argv=None) -> Dict[tuple, float]:
    """Export a model, with a command line (`sys.argv` if None); return the result of `compare`."""
    args = parse_args(argv)
    with utils.whole_file(args.output) as path:
        path.touch()  # a file that can't be written ends the program before work starts
        loaded = load(**flags.weights(args), **flags.squares(args), fuse=False)
        check_sizes(loaded, args.dynamic)
        differences = export(loaded, path, format_name=args.format, dynamic=args.dynamic, tolerance=args.tolerance)
    pixels = (f'more than {loaded.model.patch_size} pixels a side' if args.dynamic
              else f'{loaded.view.input_size} x {loaded.view.input_size} pixels')
    log(f'{args.output}: {args.output.stat().st_size / 2 ** 20:.1f} MB, for any number of images of {pixels}')
    return differences


def prepare(model: xcit.Xcit, input_size: int, format_name: str):
    """Fold BatchNorm and LayerScale, and fix the form of XCA, which can't depend on the image in a file."""
    with torch.no_grad():
        tokens = model.patch_embed(torch.zeros(1, 3, input_size, input_size)).flatten(2).transpose(1, 2)
        model.xca_form = 'gram' if xca_gram.applies(model.blocks[0].attn, tokens) else 'plain'
    if format_name == 'torchscript':  # its compiler only reads the definition
        xcit_fuse.fuse_stem(model)
    else:
        xcit.fuse(model)


def export(loaded: LoadedModel, path: Path, *, format_name: str, dynamic: bool, tolerance: float
           ) -> Dict[tuple, float]:
    """Prepare a model for inference, export it to `path`, and compare; raise RunStopped if this fails."""
    generator = torch.Generator().manual_seed(0)
    size = loaded.view.input_size
    shapes = [(1, 3, size, size), (3, 3, size, size)]
    if dynamic:  # images of the least height, and larger images, which are not square
        shapes += [(1, 3, loaded.model.patch_size + 1, size), (2, 3, size + 1, size + size // 2)]
    batches = [torch.randn(shape, generator=generator) for shape in shapes]
    examples = [(images, loaded.model(images)) for images in batches]
    if isinstance(loaded.model, xcit.Xcit):
        prepare(loaded.model, size, format_name)
    log(f'Exporting {loaded.name} as {format_name}')
    _, content_of, read = FORMATS[format_name]
    problem = f'{loaded.name} can\'t be exported as {format_name}'
    with errors_in_one_line(problem):
        # The example has more than one image: an axis of length 1 would be fixed.
        content = content_of(loaded.model, batches[-1], describe(loaded), dynamic=dynamic)
    with open(path, 'wb') as file:
        file.write(content)
        utils.sync_to_disk(file)
    with errors_in_one_line(problem):
        return compare(read(path), examples, tolerance)


@contextlib.contextmanager
def errors_in_one_line(problem: str):
    """Turn any error of an exporter or a runtime into RunStopped, and hide warnings about their deprecated parts."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    except RunStopped:
        raise
    except Exception as error:  # many kinds
        raise RunStopped(f'{problem} ({first_line(error.__cause__ or error)})') from None


if __name__ == '__main__':
    run_program(main)
