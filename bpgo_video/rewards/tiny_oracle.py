"""How well does a video show what its caption asks for? Judged by rule from the decoded frames alone.

A frame's score is colour x shape x motion, each in [0, 1]:

    colour   share of the foreground that has the hue of an allowed palette colour
    shape    soft intersection over union with an allowed shape's template at the frame's own centroid and area
    motion   steps of the centroid to the neighbouring frames, along an allowed direction

An attribute that the caption leaves open may be completed in any way, but in one way for the whole clip: of the
allowed values the one with the best mean over frames counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bpgo_video.rewards import tiny_world as world

Videos = Float[Tensor, "samples frames 3 height width"]
Scores = Float[Tensor, "samples frames"]


@dataclass(frozen=True)
class Rule:
    """The oracle's constants. A ramp (a, b) maps a onto 0 and b onto 1, clamped."""

    opacity: tuple[float, float] = (0.4, 0.6)  # of a pixel between background and full colour: its mask
    hue_cosine: float = 0.9  # between a pixel's and a palette colour's difference from the background
    small: tuple[float, float] = (4.0, 5.5)  # radius in pixels of the circle with the mask's area
    large: tuple[float, float] = (15.0, 12.5)
    overlap: tuple[float, float] = (0.70, 0.85)  # soft IoU with the template
    lead: tuple[float, float] = (0.0, 0.03)  # soft IoU over the next best shape: wrong ones and blends score 0
    speed: tuple[float, float] = (0.4, 1.1)  # pixels a frame along the direction
    leap: tuple[float, float] = (5.5, 3.5)
    drift: tuple[float, float] = (0.7, 0.2)  # sideways pixels per pixel along the direction


RULE = Rule()


def ramp(value: Tensor, ends: tuple[float, float]) -> Tensor:
    return ((value - ends[0]) / (ends[1] - ends[0])).clamp(0, 1)


def allowed_values(texts: Sequence[str], attribute: str, names: Sequence[str]) -> Bool[Tensor, "samples values"]:
    """Which values of an attribute each caption accepts: one, or all where it is left open."""
    wanted = [getattr(world.Caption.parse(text), attribute) for text in texts]
    return torch.tensor([[value is None or value == name for name in names] for value in wanted])


def best_allowed(scores: Float[Tensor, "samples values frames"], allowed: Bool[Tensor, "samples values"]) -> Scores:
    """The scores under the one allowed value that fits the whole clip best."""
    means = scores.mean(dim=-1).masked_fill(~allowed.to(scores.device), -1.0)
    return scores[torch.arange(len(scores), device=scores.device), means.argmax(dim=1)]


def segment(videos: Videos) -> tuple[Tensor, Tensor]:
    """The thing's mask [samples, frames, H, W], and each pixel's hue as a palette index [same], -1 if none."""
    palette = torch.tensor(list(world.COLOURS.values()), device=videos.device) - world.BACKGROUND
    lengths = palette.norm(dim=1)
    r, g, b = (videos.float() - world.BACKGROUND).unbind(dim=2)
    projected = torch.stack([unit[0] * r + unit[1] * g + unit[2] * b for unit in palette / lengths[:, None]])
    length, index = projected.max(dim=0)
    saliency = (r.square() + g.square() + b.square()).sqrt()
    mask = ramp(saliency / lengths[index], RULE.opacity)
    return mask, torch.where(length > RULE.hue_cosine * saliency, index, -1)


def colour_scores(mask: Tensor, hues: Tensor) -> Float[Tensor, "samples 4 frames"]:
    total = mask.sum(dim=(-2, -1)).clamp(min=1e-6)
    shares = [(mask * (hues == k)).sum(dim=(-2, -1)) / total for k in range(len(world.COLOURS))]
    return torch.stack(shares, dim=1)


def locate(mask: Tensor) -> tuple[Float[Tensor, "samples frames 2"], Scores]:
    """Centroid in pixels and radius of the circle with the mask's area; an empty mask lies in the middle."""
    height, width = mask.shape[-2:]
    area = mask.sum(dim=(-2, -1))
    x = mask.sum(dim=-2) @ (torch.arange(width, device=mask.device) + 0.5)
    y = mask.sum(dim=-1) @ (torch.arange(height, device=mask.device) + 0.5)
    middle = torch.tensor([width / 2, height / 2], device=mask.device)
    centres = torch.stack([x, y], dim=-1) / area.clamp(min=1e-6)[..., None]
    return torch.where(area[..., None] > 1, centres, middle), (area / math.pi).sqrt()


def shape_overlaps(mask: Tensor, centres: Tensor, radius: Tensor) -> Float[Tensor, "samples 3 frames"]:
    """Soft IoU of the mask with each shape's template."""
    overlaps = []
    for index in range(len(world.SHAPES)):
        shapes = torch.full_like(radius, index, dtype=torch.long)
        template = ramp(world.coverage(shapes, centres, radius, mask.shape[-1]), RULE.opacity)
        both = torch.minimum(mask, template).sum(dim=(-2, -1))
        either = mask.sum(dim=(-2, -1)) + template.sum(dim=(-2, -1)) - both
        overlaps.append(both / either.clamp(min=1e-6))
    return torch.stack(overlaps, dim=1)


def shape_scores(overlaps: Float[Tensor, "samples 3 frames"]) -> Float[Tensor, "samples 3 frames"]:
    first, second = overlaps.topk(2, dim=1).values.unbind(dim=1)
    best_other = torch.where(overlaps == first[:, None], second[:, None], first[:, None])
    return ramp(overlaps, RULE.overlap) * ramp(overlaps - best_other, RULE.lead)


def motion_scores(centres: Float[Tensor, "samples frames 2"]) -> Float[Tensor, "samples 4 frames"]:
    """Per direction; a frame's score is the mean over its steps from and to its neighbours."""
    directions = torch.tensor(list(world.DIRECTIONS.values()), device=centres.device)
    steps = centres.diff(dim=1)
    along = torch.einsum("sfc,dc->sdf", steps, directions)
    sideways = (steps.square().sum(dim=-1)[:, None] - along.square()).clamp(min=0).sqrt()
    drift = ramp(sideways / along.clamp(min=1e-6), RULE.drift)
    score = ramp(along, RULE.speed) * ramp(along, RULE.leap) * drift
    inner = (score[..., 1:] + score[..., :-1]) / 2
    return torch.cat([score[..., :1], inner, score[..., -1:]], dim=-1)


@torch.no_grad()
def oracle_parts(videos: Videos, texts: Sequence[str]) -> dict[str, Scores]:
    """What a policy gets right and wrong: "colour", "shape" and "motion", each in [0, 1] per frame.

    Args:
        videos: values in [0, 1], square, two frames or more.
        texts: one caption of the world per sample.

    Raises:
        ValueError: a text is not a caption of the world, the counts do not agree, or there is one frame only.
    """
    if len(videos) != len(texts) or videos.shape[1] < 2:
        raise ValueError(f"{len(texts)} texts for videos {tuple(videos.shape)}: one each, two frames or more")
    options = {"colour": list(world.COLOURS), "shape": world.SHAPES, "motion": list(world.DIRECTIONS)}
    attribute = {"colour": "colour", "shape": "shape", "motion": "direction"}
    chunks = []
    for chunk in videos.split(4):  # small enough to stay in the processor's cache
        mask, hues = segment(chunk)
        centres, radius = locate(mask)
        present = (ramp(radius, RULE.small) * ramp(radius, RULE.large))[:, None]
        overlaps = shape_overlaps(mask, centres, radius)
        scores = (colour_scores(mask, hues), shape_scores(overlaps), motion_scores(centres))
        chunks.append([score * present for score in scores])
    joined = [torch.cat(parts) for parts in zip(*chunks, strict=True)]
    return {
        name: best_allowed(score, allowed_values(texts, attribute[name], options[name]))
        for name, score in zip(options, joined, strict=True)
    }


def oracle_scores(videos: Videos, texts: Sequence[str]) -> Scores:
    """Colour x shape x motion per frame, in [0, 1]. Arguments and errors as `oracle_parts`."""
    parts = oracle_parts(videos, texts)
    return parts["colour"] * parts["shape"] * parts["motion"]
