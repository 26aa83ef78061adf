"""Export a model to a file that runs without this repository: ONNX, TorchScript or torch.export.

The file takes normalised images (B, 3, img_h, img_w), float32, and gives logits, or without a head pooled features.
With --dynamic, B is any number, and img_h and img_w are any numbers of pixels above one patch; otherwise all three are
fixed (but in TorchScript, where they never are). Before the file is kept, its outputs are compared with the model's.
Names of classes, resolution, crop, mean and standard deviation are stored with it, as JSON under 'xcit'.
"""
import argparse
import json
import warnings
from pathlib import Path
from typing import Callable, List, Optional

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import utils
import xcit
from tools import common
from utils import COUNT, NON_NEGATIVE, InputError, Parser, RunStopped, notice

SUFFIXES = {'onnx': '.onnx', 'torchscript': '.pt', 'torch-export': '.pt2'}
ONNX_PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')
METADATA = 'xcit'  # the name of what is stored beside the model


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser('python -m tools.export', description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--format', required=True, choices=list(SUFFIXES))
    parser.add_argument('--output', required=True, type=Path, metavar='FILE',
                        help='ends in ' + ', '.join(f'{suffix} ({name})' for name, suffix in SUFFIXES.items()))
    parser.add_argument('--dynamic', action='store_true', help='leave batch, height and width open')
    parser.add_argument('--batch-size', type=COUNT, metavar='IMAGES', help='where it is not left open; 1 if unset')
    parser.add_argument('--tolerance', default=1e-4, type=NON_NEGATIVE,
                        help='largest difference from the model\'s outputs, as a fraction of the largest of these')
    common.add_weights_arguments(parser)
    common.add_square_arguments(parser)
    parser.set_defaults(device='cpu', amp='off')  # where outputs can be compared exactly
    return parser


def check_output(args):
    """Refuse what can't be written, or needs packages that are not there."""
    if args.output.suffix != SUFFIXES[args.format]:
        raise InputError(f'--output {args.output}: must end in {SUFFIXES[args.format]} for --format {args.format}')
    if args.output.is_dir() or not args.output.absolute().parent.is_dir():
        problem = 'is a folder' if args.output.is_dir() else 'its folder is missing'
        raise InputError(f'--output {args.output}: {problem}')
    if args.dynamic and args.format == 'torchscript':
        raise InputError('--dynamic: TorchScript files take any size without it')
    if args.batch_size and (args.dynamic or args.format == 'torchscript'):
        raise InputError(f'--batch-size {args.batch_size}: has no effect where the sizes are left open')
    missing = [name for name in ONNX_PACKAGES if args.format == 'onnx' and not utils.is_installed(name)]
    if missing:
        raise InputError(f'--format onnx: needs {", ".join(missing)}; pip install -r requirements-export.txt')


# ---------------------------------------------------------------------------------------------------------------------
# The formats: each writes a file, and reads it back as a function of images

def export_onnx(model: torch.nn.Module, images: torch.Tensor, path: Path, *, dynamic: bool, metadata: str) -> Callable:
    import onnxruntime
    dimensions = {0: 'batch', 2: 'height', 3: 'width'}
    program = torch.onnx.export(
        model, (images,), dynamo=True, verbose=False, input_names=['images'], output_names=['output'],
        dynamic_shapes=(dict.fromkeys(dimensions, torch.export.Dim.DYNAMIC),) if dynamic else None)
    program.model.metadata_props[METADATA] = metadata
    if dynamic:
        shape = program.model.graph.inputs[0].shape
        program.rename_axes({shape[i]: name for i, name in dimensions.items()})
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(session.run(None, {'images': images.numpy()})[0])


def export_torchscript(model: torch.nn.Module, images: torch.Tensor, path: Path, *, dynamic: bool, metadata: str
                       ) -> Callable:
    # Scripting keeps every size open; tracing would fix the grid in the positional encoding.
    script = torch.jit.freeze(torch.jit.script(model))
    torch.jit.save(script, path, _extra_files={METADATA: metadata})
    return torch.jit.load(path)


def export_program(model: torch.nn.Module, images: torch.Tensor, path: Path, *, dynamic: bool, metadata: str
                   ) -> Callable:
    shapes = (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),) if dynamic else None
    program = torch.export.export(model, (images,), dynamic_shapes=shapes)
    torch.export.save(program, path, extra_files={METADATA: metadata})
    return torch.export.load(path).module()


EXPORTERS = {'onnx': export_onnx, 'torchscript': export_torchscript, 'torch-export': export_program}


# ---------------------------------------------------------------------------------------------------------------------
# The program

def sizes_to_check(args, input_size: int) -> List[tuple]:
    """Shapes (B, img_h, img_w) that the file is tried with."""
    if not args.dynamic and args.format != 'torchscript':
        return [(args.batch_size or 1, input_size, input_size)]
    more = input_size * 4 // 3
    return [(1, input_size, input_size), (3, input_size, more), (2, more + 1, input_size + 5), (1, 40, 56)]


@torch.inference_mode()
def compare(model: torch.nn.Module, exported: Callable, shapes: List[tuple], tolerance: float):
    """Print how far the outputs of both are apart for random images of each shape.

    Raises:
        RunStopped: farther than the tolerance, as a fraction of the largest output.
    """
    for batch, height, width in shapes:
        images = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
        expected = model(images)
        difference = ((exported(images) - expected).abs().max() / expected.abs().max()).item()
        where = f'{batch} x 3 x {height} x {width}'
        notice(f'{where}: largest difference {difference:.1e} of the largest output (tolerance {tolerance:.0e})')
        if not difference <= tolerance:
            raise RunStopped(f'the exported model differs by {difference:.1e} at {where}, more than --tolerance '
                             f'{tolerance:.0e}: no file is kept')


def describe(loaded: common.LoadedModel) -> str:
    """What a user of the file has to know, as JSON."""
    return json.dumps({'model': loaded.name, 'classes': loaded.classes, 'input_size': loaded.input_size,
                       'crop': 1. if loaded.full_crop else .875, 'mean': IMAGENET_DEFAULT_MEAN,
                       'std': IMAGENET_DEFAULT_STD})


def main(argv: Optional[list] = None) -> Path:
    """Export, with a command line (`sys.argv` if None); returns the file's path."""
    args = get_args_parser().parse_args(argv)
    check_output(args)
    loaded = common.load_model(args)
    if not isinstance(loaded.model, xcit.Xcit):
        raise InputError(f'--model {loaded.name}: is not an XCiT model')
    example = torch.zeros(2 if args.dynamic else args.batch_size or 1, 3, loaded.input_size, loaded.input_size)
    with utils.whole_file(args.output) as unfinished:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch's, about its own exporters
            exported = EXPORTERS[args.format](xcit.fuse_stem(loaded.model), example, unfinished, dynamic=args.dynamic,
                                              metadata=describe(loaded))
        compare(loaded.model, exported, sizes_to_check(args, loaded.input_size), args.tolerance)
    notice(f'{args.output}: {loaded.name}, {args.output.stat().st_size / 2 ** 20:.1f} MB')
    return args.output


if __name__ == '__main__':
    utils.run_program(main)
