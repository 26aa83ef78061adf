"""Pictures that DINO draws: crops before a run, and attention with principal components during a run."""
import dataclasses
import math
from pathlib import Path
from typing import Callable, List

import numpy as np
import torch
from PIL import Image

from dino.data import some_pictures
from dino.networks import MultiCrop
from engine import evaluating
from loaders.samples import PictureSet
from loaders.transforms import SMALL
from reports import maps
from run.output import log, without_ending
from run.processes import is_main_process
from run.training import Run
from utils import derive_seed, seed_cpu, whole_file, writing

FOLDER = 'dino_pictures'  # in --output-dir
LONGER_SIDE = 480  # pixels of pictures whose maps are drawn, unless a model was trained with small images
LEAST_SIDE = 96  # pixels of the longer side of the largest picture on a sheet


def write_crops(path: str, dataset: PictureSet, count: int, *, seed: int, skips_bad: bool) -> int:
    """Write the crops of some pictures as PNG files to the folder `path`; return the number of pictures.

    Args:
        dataset: data set with `crops.Crops` as its transform.
        count: number of pictures, evenly spread over the data set.
        skips_bad: leave out unreadable pictures.
    """
    if not is_main_process():
        return count
    folder = Path(path)
    chosen = some_pictures(dataset, count, skips_bad=skips_bad)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for index, picture in chosen:
            seed_cpu(derive_seed(seed, index))
            for name, crop in zip(dataset.transform.names, dataset.transform.pictures(picture)):
                crop.save(folder / f'{index:06}_{name}.png')
    log(f'{folder}: crops of {len(chosen)} of {len(dataset)} pictures')
    return len(chosen)


@dataclasses.dataclass
class Drawing:
    """Drawing of attention and principal components, for the same pictures after several epochs.

    Args:
        input_size: side of the images that the backbone is trained with, in pixels.
        normalise: transform of a picture to a tensor (3, img_h, img_w).
    """
    pictures: List[Image.Image]
    input_size: int
    normalise: Callable
    device: torch.device

    def __call__(self, teacher: MultiCrop, run: Run, name: str, *, epochs_done: int):
        """Write a sheet to the run's folder, and add it to TensorBoard."""
        if not is_main_process():
            return
        with evaluating(teacher.backbone):
            sheet = self.sheet(teacher.backbone)
        path = run.folder / FOLDER / f'{name}.png'
        with without_ending('this drawing'):
            path.parent.mkdir(exist_ok=True)
            with whole_file(path) as unfinished:
                sheet.save(unfinished)
        run.log.tensorboard.do('add_image', 'pictures', np.asarray(sheet), epochs_done, None, 'HWC')

    @torch.inference_mode()
    def sheet(self, backbone: torch.nn.Module) -> Image.Image:
        """Draw each picture, the mean attention of its CLS token, and its patch tokens as colours, side by side.

        The colours are principal components of the tokens of all pictures. `backbone`: XCiT in eval mode.
        """
        longer_side = LONGER_SIDE if self.input_size > SMALL else self.input_size
        scaled = [maps.scale_to(picture, longer_side) for picture in self.pictures]
        patch_size, attentions, tokens = backbone.patch_size, [], []
        for picture in scaled:
            attention, output = backbone.forward_attention(self.normalise(picture)[None].to(self.device))
            grid = -(-picture.height // patch_size), -(-picture.width // patch_size)
            attentions.append(attention[0].mean(dim=0).unflatten(0, grid).cpu())
            tokens.append(output[0, 1:].unflatten(0, grid).float().cpu())
        row = []
        for picture, attention, colors in zip(scaled, attentions, maps.component_colors(tokens)):
            row += [picture, maps.paint(picture, attention, maps.color_scale(attention), patch_size),
                    maps.color_picture(colors, picture.size, patch_size)]
        scale = max(1, LEAST_SIDE // max(max(picture.size) for picture in scaled))
        row = [tile.resize([side * scale for side in tile.size], Image.Resampling.NEAREST) for tile in row]
        return maps.side_by_side(row, columns=3 * math.ceil(math.sqrt(len(scaled) / 3)))
