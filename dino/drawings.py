"""Pictures that DINO draws: crops before a run, and attention with principal components during a run."""
import dataclasses
import math
from pathlib import Path
from typing import Callable, Dict, List

import numpy as np
import torch
from PIL import Image

from dino.data import some_pictures
from dino.networks import MultiCrop
from engine import evaluating
from inference.pictures import drawing_side
from loaders.samples import PictureSet
from reports import lettering, maps
from run.output import log, without_ending
from run.processes import is_main_process
from run.training import Run
from utils import counted, decodable, derive_seed, seed_cpu, whole_file, writing

FOLDER = 'dino_pictures'  # in --output-dir
LONGER_SIDE = 480  # pixels of pictures whose maps are drawn, unless a model was trained with small images
LEAST_SIDE = 96  # pixels of the longer side of the largest picture on a sheet
ORIGINAL = 1024  # largest longer side of an original beside its crops, in pixels
LONGEST = 40  # characters of a file name within another file name
CONTACT_SHEET = 'crops.png'


def write_crops(path: str, dataset: PictureSet, count: int, *, seed: int, skips_bad: bool) -> int:
    """Write the crops of some pictures as PNG files to the folder `path`; return the number of pictures.

    Args:
        dataset: data set with `crops.Crops` as its transform.
        count: number of pictures, evenly spread over the data set.
        skips_bad: leave out unreadable pictures.
    """
    if not is_main_process():
        return count
    folder, tiles = Path(path), []
    chosen, files = some_pictures(dataset, count, skips_bad=skips_bad), dataset.files()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for index, picture in chosen:
            seed_cpu(derive_seed(seed, index))
            crops = dict(zip(dataset.transform.names, dataset.transform.pictures(picture)))
            name = Path(files[index]).name if files else ''
            stem = f'{index:06}' + (name and f'_{lettering.abridged(decodable(Path(name).stem), LONGEST)}')
            original = maps.scale_to(picture, min(max(picture.size), ORIGINAL))
            for key, drawn in {'original': original, **crops}.items():
                drawn.save(folder / f'{stem}_{key}.png')
            tiles += row_of_crops(picture, crops, f'{index:06} {lettering.visible(name)}' if name else f'{index:06}')
        if tiles:
            sheet = maps.side_by_side(tiles, columns=1 + len(dataset.transform.names))
            sheet.save(folder / CONTACT_SHEET)
    log(f'{folder}: crops of {len(chosen)} of {counted(len(dataset), "picture")}, and {CONTACT_SHEET} with all of them')
    return len(chosen)


def row_of_crops(picture: Image.Image, crops: Dict[str, Image.Image], name: str) -> List[Image.Image]:
    """Return a picture with its name, at the size of its largest crop, and its crops, for a sheet."""
    side = max(max(crop.size) for crop in crops.values())
    zoom = max(1, -(-LEAST_SIDE // side))
    tiles = [lettering.captioned(maps.scale_to(picture, side * zoom), [name])]
    return tiles + [lettering.captioned(maps.enlarged(crop, zoom), [key]) for key, crop in crops.items()]


@dataclasses.dataclass
class Drawing:
    """Drawing of attention and principal components, for the same pictures after several epochs.

    Args:
        names: names of the pictures.
        input_size: side of the images that the backbone is trained with, in pixels.
        normalise: transform of a picture to a tensor (3, img_h, img_w).
    """
    pictures: List[Image.Image]
    names: List[str]
    input_size: int
    normalise: Callable
    device: torch.device

    def __call__(self, teacher: MultiCrop, run: Run, name: str, *, step: int):
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
        run.log.tensorboard.do('add_image', 'pictures', np.asarray(sheet), step, None, 'HWC')

    @torch.inference_mode()
    def sheet(self, backbone: torch.nn.Module) -> Image.Image:
        """Draw each picture, the mean attention of its CLS token, and its patch tokens as colours, side by side.

        All attention has one scale. The colours are principal components of the tokens of all pictures.
        `backbone`: XCiT in eval mode.
        """
        scaled = [maps.scale_to(picture, drawing_side(self.input_size, LONGER_SIDE)) for picture in self.pictures]
        patch_size, attentions, tokens = backbone.patch_size, [], []
        for picture in scaled:
            attention, output = backbone.forward_attention(self.normalise(picture)[None].to(self.device))
            grid = -(-picture.height // patch_size), -(-picture.width // patch_size)
            attentions.append(maps.in_multiples(attention[0].mean(dim=0).unflatten(0, grid).float().cpu()))
            tokens.append(output[0, 1:].unflatten(0, grid).float().cpu())
        scale, zoom = maps.color_scale(attentions), max(1, LEAST_SIDE // max(max(picture.size) for picture in scaled))
        tiles = []
        for picture, name, values, colors in zip(scaled, self.names, attentions, maps.component_colors(tokens)):
            low, high = maps.extent(values)
            drawn = {lettering.visible(name): picture,
                     f'attention {low:.1f} to {high:.1f}': maps.paint(picture, values, scale, patch_size),
                     'features': maps.color_picture(colors, picture.size, patch_size)}
            tiles += [lettering.captioned(maps.enlarged(tile, zoom), [text]) for text, tile in drawn.items()]
        page = maps.side_by_side(tiles, columns=3 * math.ceil(math.sqrt(len(scaled) / 3)))
        return maps.above(page, maps.legend(scale, 12))
