"""Drawn pictures for first steps without data: shapes of eight classes over three grounds and a background."""
import dataclasses
import math
from typing import Callable, Dict, List, Tuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from utils import derive_seed

SIDE = 160  # pixels
SCALE = 4  # of the drawing, for soft edges
SHAPES = ('disc', 'square', 'triangle', 'star', 'cross', 'ring', 'crescent', 'arrow')
GROUNDS = ('background', 'grass', 'gravel', 'brick')
CLASSES = (*SHAPES, *GROUNDS)
MOST_SHAPES = 6
LEAST_SIZE, MOST_SIZE = 26, 84  # pixels, across a shape


@dataclasses.dataclass
class Scene:
    """Drawn picture.

    Args:
        picture: (SIDE, SIDE, 3), uint8.
        shapes: class index and coverage (SIDE, SIDE) of 0 to 1 of each shape, from back to front.
        ground: (SIDE, SIDE), class index of the ground of each pixel.
    """
    picture: np.ndarray
    shapes: List[Tuple[int, np.ndarray]]
    ground: np.ndarray

    def labels(self) -> np.ndarray:
        """Return the label of each pixel as in files: 1 + class, and 0 on the soft edges of shapes; uint8."""
        labels = 1 + self.ground
        for index, coverage in self.shapes:
            labels[coverage > 0] = 0
            labels[coverage == 1] = 1 + index
        return labels.astype(np.uint8)


def draw(number: int, seed: int) -> Scene:
    """Draw the picture `number` of the pictures of a seed."""
    random = np.random.default_rng(derive_seed(seed, number))
    ground = np.full((SIDE, SIDE), len(SHAPES))
    horizon = int(random.integers(SIDE // 3, SIDE))
    kind = int(random.integers(1, len(GROUNDS)))
    ground[horizon:] += kind
    picture = background(random)
    picture[horizon:] = TEXTURES[GROUNDS[kind]](random)[horizon:]
    shapes = []
    for _ in range(int(random.integers(1, MOST_SHAPES + 1))):
        index = int(random.integers(len(SHAPES)))
        coverage = cover(SHAPES[index], random)
        color = random.uniform(0, 255, 3) + 14 * random.standard_normal((SIDE, SIDE, 1))
        picture += coverage[..., None] * (color - picture)
        shapes.append((index, coverage))
    picture += 4 * random.standard_normal(picture.shape)
    return Scene(picture.clip(0, 255).astype(np.uint8), shapes, ground)


def cover(name: str, random: np.random.Generator) -> np.ndarray:
    """Draw a shape of random size, place and rotation; return its coverage of each pixel, (SIDE, SIDE)."""
    radius = random.uniform(LEAST_SIZE, MOST_SIZE) / 2
    x, y = random.uniform(0, SIDE, 2)
    angle = random.uniform(0, 2 * math.pi)
    page = Image.new('L', (SIDE * SCALE, SIDE * SCALE))
    pen = ImageDraw.Draw(page)

    def circle(radius: float, x: float, y: float, fill: int):
        pen.ellipse([SCALE * (x - radius), SCALE * (y - radius), SCALE * (x + radius), SCALE * (y + radius)], fill=fill)

    if name in POLYGONS:
        corners = POLYGONS[name] @ np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        pen.polygon([tuple(SCALE * (np.array([x, y]) + radius * corner)) for corner in corners], fill=255)
    else:
        circle(radius, x, y, 255)
        if name == 'ring':
            circle(.55 * radius, x, y, 0)
        elif name == 'crescent':
            circle(.8 * radius, x + .5 * radius * math.cos(angle), y + .5 * radius * math.sin(angle), 0)
    return np.asarray(page.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float64) / 255


def polygon(angles: np.ndarray, radii: np.ndarray) -> np.ndarray:
    return np.stack((np.sin(angles), -np.cos(angles)), axis=1) * np.broadcast_to(radii, angles.shape)[:, None]


POLYGONS: Dict[str, np.ndarray] = {
    'square': np.array([[-.8, -.8], [.8, -.8], [.8, .8], [-.8, .8]]),
    'triangle': polygon(np.arange(3) * 2 * math.pi / 3, np.ones(3)),
    'star': polygon(np.arange(10) * math.pi / 5, np.array([1, .42] * 5)),
    'cross': np.array([[-.3, -1], [.3, -1], [.3, -.3], [1, -.3], [1, .3], [.3, .3], [.3, 1], [-.3, 1], [-.3, .3],
                       [-1, .3], [-1, -.3], [-.3, -.3]]),
    'arrow': np.array([[0, -1], [.7, -.2], [.28, -.2], [.28, 1], [-.28, 1], [-.28, -.2], [-.7, -.2]]),
}


# ---------------------------------------------------------------------------------------------------------------------
# Grounds: pictures (SIDE, SIDE, 3) of floats

def noise(random: np.random.Generator, blur: float) -> np.ndarray:
    """Return blurred noise (SIDE, SIDE), about -1 to 1."""
    page = Image.fromarray(random.integers(0, 256, (SIDE, SIDE), dtype=np.uint8))
    values = np.asarray(page.filter(ImageFilter.GaussianBlur(blur)), dtype=np.float64)
    return (values - values.mean()) / (3 * values.std() + 1e-9)


def background(random: np.random.Generator) -> np.ndarray:
    top, bottom = random.uniform(90, 240, (2, 1, 1, 3))
    slope = np.linspace(0, 1, SIDE)[:, None, None]
    return top + slope * (bottom - top) + 12 * noise(random, 12)[..., None]


def grass(random: np.random.Generator) -> np.ndarray:
    blades = noise(random, .7) + noise(random, 6)
    return np.array([70, 140, 50]) * random.uniform(.8, 1.2) + 30 * blades[..., None]


def gravel(random: np.random.Generator) -> np.ndarray:
    return np.full(3, 140) * random.uniform(.8, 1.2) + 70 * noise(random, 1.6)[..., None] * np.array([1., .96, .9])


def brick(random: np.random.Generator) -> np.ndarray:
    height, width = int(random.integers(8, 14)), int(random.integers(18, 30))
    y, x = np.mgrid[:SIDE, :SIDE]
    row = y // height
    is_joint = (y % height < 2) | ((x + row % 2 * width // 2) % width < 2)
    tone = np.array([165, 75, 55]) * random.uniform(.8, 1.2) + 18 * noise(random, 3)[..., None]
    return np.where(is_joint[..., None], 190., tone)


TEXTURES: Dict[str, Callable] = {'grass': grass, 'gravel': gravel, 'brick': brick}
