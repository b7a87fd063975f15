"""The embedded world: one coloured shape that moves across a dark square, with its captions.

The world can be learned on two CPU cores and still is many-to-many: a caption may leave the shape, the colour or the
direction open, and then all completions are right. Pixel videos are (batch, frames, 3, height, width) in [0, 1];
positions are in pixels, x to the right and y downwards. tiny_rewards.py scores its videos.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

FRAMES, SIZE, FPS = 9, 64, 8
BACKGROUND = 0.1
SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.80, 0.20),
    "blue": (0.20, 0.30, 0.95),
    "yellow": (0.95, 0.85, 0.15),
}
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
ATTRIBUTES: tuple[Sequence[str], ...] = (SHAPES, tuple(COLOURS), tuple(DIRECTIONS))  # in the order of Caption's fields
STATED = ((1, 1, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (0, 1, 0), (0, 0, 1))  # attributes that captions state
RADIUS_RANGE = (7.0, 10.0)  # of the circle with the shape's area
SPEED_RANGE = (1.5, 2.5)  # pixels per frame
EDGE_WIDTH = 2.0  # pixels over which an edge fades
MARGIN = 16.0  # pixels between a centre and the border: a triangle's far corner stays inside


@dataclass(frozen=True)
class Caption:
    """The attributes that a prompt states; None leaves one open."""

    shape: str | None
    colour: str | None
    direction: str | None

    @property
    def text(self) -> str:
        """Plain English: "a red circle moving left", "a blue object", "a shape moving left"."""
        noun = self.shape or ("object" if self.colour else "shape")
        words = ["a", self.colour, noun, f"moving {self.direction}" if self.direction else None]
        return " ".join(word for word in words if word)

    @property
    def is_clear(self) -> bool:
        return None not in astuple(self)

    @classmethod
    def parse(cls, text: str) -> Caption:
        """The caption of a prompt.

        Raises:
            ValueError: the text is not a sentence of this world.
        """
        words = text.lower().split()
        caption = cls(*(next((word for word in words if word in names), None) for names in ATTRIBUTES))
        if caption.text != " ".join(words):
            examples = f"{cls('circle', 'red', 'left').text!r} or {cls(None, 'blue', None).text!r}"
            raise ValueError(f"{text!r} is not a caption of the world of moving shapes; one looks like {examples}")
        return caption


def all_captions() -> list[Caption]:
    """Every clear caption (48), then as many with open attributes, in a fixed order."""
    captions: list[Caption] = []
    for is_stated in STATED:
        values = [names if stated else (None,) for names, stated in zip(ATTRIBUTES, is_stated, strict=True)]
        captions += [Caption(*combination) for combination in itertools.product(*values)]
    return captions


def is_heldout(caption: Caption) -> bool:
    """A quarter of the combinations, as in a Latin square: every pair of attributes occurs in training."""
    pairs = zip(ATTRIBUTES, astuple(caption), strict=True)
    return sum(names.index(value) if value else 1 for names, value in pairs) % 4 == 3


def captions(split: str) -> list[Caption]:
    """The captions of "train" or "heldout"; half of each split has open attributes."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split is {split!r}; it must be 'train' or 'heldout'")
    return [caption for caption in all_captions() if is_heldout(caption) == (split == "heldout")]


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes.

    Attributes:
        shapes, colours, directions: indices [batch].
        centres: in pixels, [batch, frames, 2].
        radius: of the circle of equal area, [batch].
    """

    shapes: Tensor
    colours: Tensor
    directions: Tensor
    centres: Tensor
    radius: Tensor

    def of(self, rows: Tensor) -> Scenes:
        """The scenes of these rows."""
        return Scenes(*(value[rows] for value in vars(self).values()))

    def caption(self, index: int) -> Caption:
        indices = (int(values[index]) for values in (self.shapes, self.colours, self.directions))
        return Caption(*(names[i] for names, i in zip(ATTRIBUTES, indices, strict=True)))


def sample_scenes(captions: Sequence[Caption], generator: torch.Generator, frames: int = FRAMES) -> Scenes:
    """One scene per caption, with random open attributes, speed, size and start."""
    count = len(captions)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    indices: list[Tensor] = []
    for names, values in zip(ATTRIBUTES, zip(*map(astuple, captions), strict=True), strict=True):
        drawn = torch.randint(len(names), (count,), generator=generator)
        stated = torch.tensor([names.index(value) if value else -1 for value in values])
        indices.append(torch.where(stated >= 0, stated, drawn))
    shapes, colours, directions = indices
    velocity = torch.tensor(list(DIRECTIONS.values()))[directions] * uniform(*SPEED_RANGE)[:, None]
    travel = velocity * (frames - 1)
    low = MARGIN - travel.clamp(max=0)
    high = SIZE - MARGIN - travel.clamp(min=0)
    start = low + (high - low) * torch.rand(count, 2, generator=generator)
    centres = start[:, None] + velocity[:, None] * torch.arange(frames)[None, :, None]
    return Scenes(shapes, colours, directions, centres, uniform(*RADIUS_RANGE))


def coverage(shapes: Tensor, centres: Tensor, radius: Tensor, size: int = SIZE) -> Tensor:
    """Share of each pixel that a shape covers, in [0, 1]: [..., size, size].

    Args:
        shapes: [...] index into SHAPES.
        centres: [..., 2] in pixels.
        radius: [...] of the circle of equal area.
    """
    axis = torch.arange(size, device=centres.device) + 0.5
    x = axis[None, :] - centres[..., 0, None, None]
    y = axis[:, None] - centres[..., 1, None, None]
    r = radius[..., None, None]
    circle = (x**2 + y**2).sqrt() - r
    square = torch.maximum(x.abs(), y.abs()) - r * math.sqrt(math.pi) / 2
    triangle = torch.maximum(math.sqrt(3) / 2 * x.abs() - y / 2, y) - r * math.sqrt(math.pi / (3 * math.sqrt(3)))
    distance = torch.stack([circle, square, triangle])
    index = shapes[None, ..., None, None].expand(1, *distance.shape[1:])
    return (0.5 - distance.gather(0, index)[0] / EDGE_WIDTH).clamp(0, 1)


def render(scenes: Scenes) -> Tensor:
    """The videos of a batch of scenes: (batch, frames, 3, SIZE, SIZE) in [0, 1]."""
    frames = scenes.centres.shape[1]
    shapes, radius = (value[:, None].expand(-1, frames) for value in (scenes.shapes, scenes.radius))
    mask = coverage(shapes, scenes.centres, radius)[:, :, None]
    colour = torch.tensor(list(COLOURS.values()))[scenes.colours][:, None, :, None, None]
    return mask * colour + (1 - mask) * BACKGROUND
