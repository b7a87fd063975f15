"""What does the embedded world look like? One coloured shape that moves across a dark square, and its captions.

The world is small enough to learn on two CPU cores and still many-to-many: a caption may leave the shape, the colour or
the direction open, and then every completion of it is right. Pixel videos are (batch, frames, 3, height, width) in
[0, 1]; positions are in pixels, x to the right and y downwards.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

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
RADIUS_RANGE = (7.0, 10.0)  # of the circle with the shape's area
SPEED_RANGE = (1.5, 2.5)  # pixels a frame
EDGE_WIDTH = 2.0  # pixels over which an edge fades
MARGIN = 16.0  # pixels between a centre and the border: a triangle's far corner stays inside


@dataclass(frozen=True)
class Caption:
    """What a prompt asks for; None leaves an attribute open."""

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
        return None not in (self.shape, self.colour, self.direction)

    @classmethod
    def parse(cls, text: str) -> Caption:
        """The caption behind a prompt.

        Raises:
            ValueError: the text is not a sentence of this world.
        """
        words = text.lower().split()
        found = [next((w for w in words if w in names), None) for names in (SHAPES, COLOURS, DIRECTIONS)]
        caption = cls(*found)
        if caption.text != " ".join(words):
            raise ValueError(
                f"{text!r} is not a caption of the world of moving shapes; one looks like "
                f"{cls('circle', 'red', 'left').text!r} or {cls(None, 'blue', None).text!r}"
            )
        return caption


def all_captions() -> list[Caption]:
    """Every clear caption (48), then as many that leave something open; order is fixed."""
    clear = [Caption(*names) for names in itertools.product(SHAPES, COLOURS, DIRECTIONS)]
    partial = [Caption(shape, colour, None) for shape in SHAPES for colour in COLOURS]
    partial += [Caption(shape, None, direction) for shape in SHAPES for direction in DIRECTIONS]
    partial += [Caption(None, colour, direction) for colour in COLOURS for direction in DIRECTIONS]
    partial += [Caption(None, colour, None) for colour in COLOURS]
    partial += [Caption(None, None, direction) for direction in DIRECTIONS]
    return clear + partial


def is_heldout(caption: Caption) -> bool:
    """A quarter of the combinations: a Latin square, so that every pair of attributes occurs in training."""
    values = (
        SHAPES.index(caption.shape) if caption.shape else 1,
        list(COLOURS).index(caption.colour) if caption.colour else 1,
        list(DIRECTIONS).index(caption.direction) if caption.direction else 1,
    )
    return sum(values) % 4 == 3


def captions(split: str) -> list[Caption]:
    """The captions of "train" or "heldout"; half of each split leaves something open."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split is {split!r}; it must be 'train' or 'heldout'")
    return [caption for caption in all_captions() if is_heldout(caption) == (split == "heldout")]


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes: shape and colour indices [batch], centres [batch, frames, 2], radius [batch]."""

    shapes: Tensor
    colours: Tensor
    directions: Tensor
    centres: Tensor
    radius: Tensor

    def of(self, rows: Tensor) -> Scenes:
        """The scenes of these rows."""
        return Scenes(*(value[rows] for value in vars(self).values()))

    def caption(self, index: int) -> Caption:
        return Caption(
            SHAPES[int(self.shapes[index])],
            list(COLOURS)[int(self.colours[index])],
            list(DIRECTIONS)[int(self.directions[index])],
        )


def sample_scenes(wanted: list[Caption], generator: torch.Generator, frames: int = FRAMES) -> Scenes:
    """One scene per caption: open attributes, speed, size and start are drawn from `generator`."""
    count = len(wanted)

    def choose(names, key):
        drawn = torch.randint(len(names), (count,), generator=generator)
        fixed = [list(names).index(getattr(c, key)) if getattr(c, key) else -1 for c in wanted]
        fixed = torch.tensor(fixed)
        return torch.where(fixed >= 0, fixed, drawn)

    def uniform(low, high):
        return low + (high - low) * torch.rand(count, generator=generator)

    shapes, colours = choose(SHAPES, "shape"), choose(COLOURS, "colour")
    directions = choose(DIRECTIONS, "direction")
    velocity = torch.tensor(list(DIRECTIONS.values()))[directions] * uniform(*SPEED_RANGE)[:, None]
    travel = velocity * (frames - 1)
    low = MARGIN - travel.clamp(max=0)
    high = SIZE - MARGIN - travel.clamp(min=0)
    start = low + (high - low) * torch.rand(count, 2, generator=generator)
    centres = start[:, None] + velocity[:, None] * torch.arange(frames)[None, :, None]
    return Scenes(shapes, colours, directions, centres, uniform(*RADIUS_RANGE))


def coverage(shapes: Tensor, centres: Tensor, radius: Tensor, size: int = SIZE) -> Tensor:
    """How much of each pixel a shape covers, in [0, 1]: [..., size, size].

    Args:
        shapes: [...] index into SHAPES.
        centres: [..., 2] in pixels.
        radius: [...] of the circle of equal area.
    """
    axis = torch.arange(size, device=centres.device) + 0.5
    x = axis[None, :] - centres[..., 0, None, None]
    y = axis[:, None] - centres[..., 1, None, None]
    r = radius[..., None, None]
    half_side = r * math.sqrt(math.pi) / 2
    inradius = r * math.sqrt(math.pi / (3 * math.sqrt(3)))
    slanted = math.sqrt(3) / 2 * x.abs() - y / 2
    distance = torch.stack(
        [
            (x**2 + y**2).sqrt() - r,
            torch.maximum(x.abs(), y.abs()) - half_side,
            torch.maximum(slanted, y) - inradius,
        ]
    )
    index = shapes[None, ..., None, None].expand(1, *distance.shape[1:])
    return (0.5 - distance.gather(0, index)[0] / EDGE_WIDTH).clamp(0, 1)


def render(scenes: Scenes) -> Tensor:
    """The videos of a batch of scenes: (batch, frames, 3, SIZE, SIZE) in [0, 1]."""
    frames = scenes.centres.shape[1]
    mask = coverage(
        scenes.shapes[:, None].expand(-1, frames), scenes.centres, scenes.radius[:, None].expand(-1, frames)
    )[:, :, None]
    colour = torch.tensor(list(COLOURS.values()))[scenes.colours][:, None, :, None, None]
    return mask * colour + (1 - mask) * BACKGROUND
