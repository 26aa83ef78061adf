"""Label maps of pictures of any size: whole or in windows, at one or several scales, in rows of limited memory.

`Rows` is a function from `start` and `stop` to these rows of logits (K, stop - start, width), called with rising rows.
"""
import dataclasses
from typing import Callable, Iterator, List, Optional, Tuple

import numpy as np
import torch
import torch.nn as nn

from dense.resize import ResizedRows, rows_of
from segmentation.rows import head_rows, works_by_rows
from segmentation.transforms import EvalTransform

Rows = Callable[[int, int], torch.Tensor]
WINDOW, STRIDE = 512, 341  # pixels of --test slide
AUG_RATIOS = (.5, .75, 1., 1.25, 1.5, 1.75)
BAND = 2 ** 25  # logits of a band of rows
LARGE = 2 ** 22  # pixels of an image, above which the head works by rows


@dataclasses.dataclass(frozen=True)
class Predictor:
    """Function from pictures to label maps.

    Args:
        model: model in eval mode, on the device.
        transform: resizing and normalisation.
        slide: average overlapping windows instead of the whole image.
        augmented: average six scales, each also mirrored.
        amp_dtype: autocast dtype; None: full precision.
    """
    model: nn.Module
    transform: EvalTransform
    slide: bool = False
    augmented: bool = False
    amp_dtype: Optional[torch.dtype] = None

    def __call__(self, picture: np.ndarray) -> torch.Tensor:
        """Return the class of each pixel of a picture (height, width, 3): (height, width), uint8, on the device."""
        return self.predict(self.prepare(picture), picture.shape[:2])

    def prepare(self, picture: np.ndarray) -> List[torch.Tensor]:
        """Return the normalised images (3, img_h, img_w) of a picture, one for each scale."""
        return [self.transform(picture, ratio=ratio) for ratio in (AUG_RATIOS if self.augmented else (1.,))]

    @torch.inference_mode()
    def predict(self, images: List[torch.Tensor], size: Tuple[int, int]) -> torch.Tensor:
        """Return the class of each pixel of a picture of `size` from its images: (height, width), uint8."""
        versions = [(self.rows(version, size), flipped) for image in images for version, flipped in self.flips(image)]
        out, band = [], max(1, BAND // (self.model.num_classes * size[1]))
        for start in range(0, size[0], band):
            stop = min(start + band, size[0])
            if len(versions) == 1:
                scores = versions[0][0](start, stop)
            else:
                scores = sum(mirrored(rows(start, stop).softmax(dim=0), flipped) for rows, flipped in versions)
            out.append(scores.argmax(dim=0).byte())
        return torch.cat(out)

    def flips(self, image: torch.Tensor) -> Iterator[Tuple[torch.Tensor, bool]]:
        """Yield an image, and its mirror image if both are averaged; each with whether it is mirrored."""
        yield image, False
        if self.augmented:
            yield image.flip(-1), True

    def rows(self, image: torch.Tensor, size: Tuple[int, int]) -> Rows:
        """Return rows of the logits of an image (3, img_h, img_w), resized to its size and then to `size`."""
        device = next(self.model.parameters()).device
        image = image[None].to(device)
        input_size = tuple(image.shape[-2:])
        if self.slide:
            return ResizedRows(Windows(self.logits, image), input_size, size)
        if image.shape[-2] * image.shape[-1] > LARGE and works_by_rows(self.model):
            with torch.autocast(device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
                rows, logits_size = head_rows(self.model, image)
        else:
            logits = self.logits(image)
            rows, logits_size = rows_of(logits), tuple(logits.shape[-2:])
        return ResizedRows(ResizedRows(rows, logits_size, input_size), input_size, size)

    def logits(self, image: torch.Tensor) -> torch.Tensor:
        """Compute logits (K, about img_h / 4, img_w / 4), float32."""
        with torch.autocast(image.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            return self.model(image)[0].float()


def mirrored(x: torch.Tensor, flipped: bool) -> torch.Tensor:
    return x.flip(-1) if flipped else x


class Windows:
    """Rows of logits that are averaged over overlapping windows, with the size of the image.

    Source: mmseg 0.11 models/segmentors/encoder_decoder.py, slide_inference.

    Args:
        logits: function from an image (1, 3, h, w) to logits (K, about h / 4, w / 4).
        image: (1, 3, img_h, img_w).
    """

    def __init__(self, logits: Callable[[torch.Tensor], torch.Tensor], image: torch.Tensor):
        self.logits, self.image = logits, image
        self.tops, self.lefts = (window_starts(length) for length in image.shape[-2:])
        self.counts_across = image.new_zeros(image.shape[-1])
        for left in self.lefts:
            self.counts_across[left:left + WINDOW] += 1
        self.sums: List[Tuple[int, torch.Tensor]] = []  # top and sums (K, height, width) of a row of windows

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        while self.tops and self.tops[0] < stop:
            self.sums.append((self.tops[0], self.add_up(self.tops.pop(0))))
        self.sums = [(top, sums) for top, sums in self.sums if top + sums.shape[-2] > start]
        sums = self.sums[0][1]
        out, counts = sums.new_zeros(len(sums), stop - start, sums.shape[-1]), sums.new_zeros(stop - start, 1)
        for top, sums in self.sums:
            first, last = max(start, top), min(stop, top + sums.shape[-2])
            if first < last:
                out[:, first - start:last - start] += sums[:, first - top:last - top]
                counts[first - start:last - start] += 1
        return out / (counts * self.counts_across)

    def add_up(self, top: int) -> torch.Tensor:
        """Add up the logits of a row of windows: (K, height, img_w)."""
        sums = None
        for left in self.lefts:
            window = self.image[..., top:top + WINDOW, left:left + WINDOW]
            logits, size = self.logits(window), tuple(window.shape[-2:])
            logits = ResizedRows(rows_of(logits), tuple(logits.shape[-2:]), size)(0, size[0])
            if sums is None:
                sums = logits.new_zeros(len(logits), size[0], self.image.shape[-1])
            sums[..., left:left + WINDOW] += logits
        return sums


def window_starts(length: int) -> List[int]:
    """Return the first pixels of windows that cover `length` pixels; the last window ends at the border."""
    count = max(length - WINDOW + STRIDE - 1, 0) // STRIDE + 1
    return [max(min(i * STRIDE + WINDOW, length) - WINDOW, 0) for i in range(count)]
