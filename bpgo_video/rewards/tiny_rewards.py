"""Rewards of the world of moving shapes (tiny/world.py): a rule-based oracle, and a small learned motion model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, normalize

from bpgo_video.files import fingerprint, resolve_folder
from bpgo_video.rewards.base import Clips, Device, FrameReward, FrameScores, RewardModel
from bpgo_video.tiny import world as world
from bpgo_video.types import Videos

FrameValues = Float[Tensor, "samples frames"]
WORDS = sorted({word for caption in world.all_captions() for word in caption.text.split()})


@dataclass(frozen=True)
class Rule:
    """The oracle's constants. A ramp (a, b) maps a to 0 and b to 1, clamped."""

    opacity: tuple[float, float] = (0.4, 0.6)  # of a pixel between background and full colour: its mask
    hue_cosine: float = 0.9  # between a pixel's and a palette colour's difference from the background
    small: tuple[float, float] = (4.0, 5.5)  # radius in pixels of the circle with the mask's area
    large: tuple[float, float] = (15.0, 12.5)
    overlap: tuple[float, float] = (0.70, 0.85)  # soft IoU with the template
    lead: tuple[float, float] = (0.0, 0.03)  # soft IoU minus that of the next best shape: blends score 0
    speed: tuple[float, float] = (0.4, 1.1)  # pixels per frame along the direction
    leap: tuple[float, float] = (5.5, 3.5)
    drift: tuple[float, float] = (0.7, 0.2)  # sideways pixels per pixel along the direction


RULE = Rule()


class ShapesOracle(FrameReward):
    """Whether a frame shows what its caption states, in [0, 1]: `oracle_scores`."""

    name, kind = "shapes_oracle", "test"
    version = hashlib.sha256(repr(RULE).encode()).hexdigest()[:16]

    def score(self, clips: Clips, indices: list[int]) -> FrameValues:
        return oracle_scores(clips.videos, clips.texts)


def oracle_scores(videos: Videos, texts: Sequence[str]) -> FrameValues:
    """Colour x shape x motion per frame, in [0, 1]. Arguments and errors as `oracle_parts`."""
    parts = oracle_parts(videos, texts)
    return parts["colour"] * parts["shape"] * parts["motion"]


@torch.no_grad()
def oracle_parts(videos: Videos, texts: Sequence[str]) -> dict[str, FrameValues]:
    """The factors of the oracle's score, each in [0, 1] per frame, computed by rule from the decoded frames.

    colour: share of the foreground with the hue of an allowed palette colour.
    shape: soft intersection over union with an allowed shape's template at the frame's own centroid and area.
    motion: steps of the centroid to the neighbouring frames, along an allowed direction.

    A caption that leaves an attribute open allows all values, but the same one for the whole clip: the value with the
    highest mean over frames counts.

    Args:
        videos: values in [0, 1], square, two frames or more.
        texts: one caption of the world per sample.

    Raises:
        ValueError: a text is not a caption of the world, the counts differ, or there is only one frame.
    """
    if len(videos) != len(texts) or videos.shape[1] < 2:
        raise ValueError(f"{len(texts)} texts for videos {tuple(videos.shape)}: one each, two frames or more")
    chunks = []
    for chunk in videos.split(4):  # small enough for the processor's cache
        mask, hues = segment(chunk)
        centres, radius = locate(mask)
        present = (ramp(radius, RULE.small) * ramp(radius, RULE.large))[:, None]
        scores = (colour_scores(mask, hues), shape_scores(mask, centres, radius), motion_scores(centres))
        chunks.append([score * present for score in scores])
    colour, shape, motion = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return {
        "colour": best_allowed(colour, texts, "colour", list(world.COLOURS)),
        "shape": best_allowed(shape, texts, "shape", world.SHAPES),
        "motion": best_allowed(motion, texts, "direction", list(world.DIRECTIONS)),
    }


def ramp(value: Tensor, ends: tuple[float, float]) -> Tensor:
    return ((value - ends[0]) / (ends[1] - ends[0])).clamp(0, 1)


def best_allowed(
    scores: Float[Tensor, "samples values frames"], texts: Sequence[str], attribute: str, names: Sequence[str]
) -> FrameValues:
    """The scores under the one value that the caption allows and that has the highest mean over the clip."""
    stated = [getattr(world.Caption.parse(text), attribute) for text in texts]
    allowed: Bool[Tensor, "samples values"] = torch.tensor([[s is None or s == name for name in names] for s in stated])
    means = scores.mean(dim=-1).masked_fill(~allowed.to(scores.device), -1.0)
    return scores[torch.arange(len(scores), device=scores.device), means.argmax(dim=1)]


def segment(videos: Videos) -> tuple[Tensor, Tensor]:
    """The object's mask [samples, frames, H, W], and each pixel's hue as a palette index [same], -1 if none."""
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


def locate(mask: Tensor) -> tuple[Float[Tensor, "samples frames 2"], FrameValues]:
    """Centroid in pixels (the frame's middle for an empty mask), and radius of the circle with the mask's area."""
    height, width = mask.shape[-2:]
    area = mask.sum(dim=(-2, -1))
    x = mask.sum(dim=-2) @ (torch.arange(width, device=mask.device) + 0.5)
    y = mask.sum(dim=-1) @ (torch.arange(height, device=mask.device) + 0.5)
    middle = torch.tensor([width / 2, height / 2], device=mask.device)
    centres = torch.stack([x, y], dim=-1) / area.clamp(min=1e-6)[..., None]
    return torch.where(area[..., None] > 1, centres, middle), (area / math.pi).sqrt()


def shape_scores(mask: Tensor, centres: Tensor, radius: Tensor) -> Float[Tensor, "samples 3 frames"]:
    """Ramp of the soft IoU with each shape's template, times that of its lead over the best other shape."""
    ious = []
    for index in range(len(world.SHAPES)):
        shapes = torch.full_like(radius, index, dtype=torch.long)
        template = ramp(world.coverage(shapes, centres, radius, mask.shape[-1]), RULE.opacity)
        intersection = torch.minimum(mask, template).sum(dim=(-2, -1))
        union = mask.sum(dim=(-2, -1)) + template.sum(dim=(-2, -1)) - intersection
        ious.append(intersection / union.clamp(min=1e-6))
    overlaps = torch.stack(ious, dim=1)
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


class LearnedMotion(RewardModel):
    """P(the clip's motion matches the prompt), in [0, 1], one score per video.

    Args:
        model: folder that tools/tiny/train_rewards.py wrote.
    """

    name, kind, differentiable = "learned_motion", "proxy", True

    def __init__(self, model: str, device: Device = "cpu"):
        folder = resolve_folder(model)
        self.model = MotionMatch.load(folder).to(device)
        self.version = fingerprint(folder, (".",))

    def __call__(self, clips: Clips) -> FrameScores:
        videos = self.model.embed_videos(clips.videos.to(self.model.scale.device))
        match = (videos * self.model.embed_texts(clips.texts)).sum(dim=1, keepdim=True)
        return FrameScores((self.model.scale * match + self.model.bias).sigmoid())


def block(inputs: int, outputs: int, time: int, stride: int) -> nn.Sequential:
    """A convolution over `time` frames and 3x3 pixels with group normalisation."""
    convolution = nn.Conv3d(inputs, outputs, (time, 3, 3), stride=(1, stride, stride), padding=((time - 1) // 2, 1, 1))
    return nn.Sequential(convolution, nn.GroupNorm(4, outputs), nn.SiLU())


class MotionMatch(nn.Module):
    """A dual encoder of video and text: P(match) = sigmoid(scale cos(video, text) + bias).

    Convolutions over time capture direction, which single frames do not show; pooling over time and space discards the
    object's position.

    Args:
        words: the vocabulary; other words are ignored.
        width: channels of the first convolution.
        dim: of the shared embedding.
    """

    def __init__(self, words: Sequence[str] = WORDS, width: int = 16, dim: int = 32):
        super().__init__()
        self.config: dict[str, Any] = {"words": list(words), "width": width, "dim": dim}
        self.video = nn.Sequential(
            block(3, width, 1, 2),
            block(width, 2 * width, 3, 2),
            block(2 * width, 2 * width, 3, 1),
            block(2 * width, 4 * width, 3, 2),
        )
        self.video_head = nn.Linear(8 * width, dim)
        self.words = nn.Parameter(torch.randn(len(words), dim))
        self.text_head = nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-2.0))

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp()

    def embed_videos(self, videos: Videos) -> Float[Tensor, "samples dim"]:
        """Unit vectors of clips in [0, 1] with three frames or more."""
        half_size = avg_pool2d(videos.flatten(0, 1), 2).unflatten(0, videos.shape[:2])
        features = self.video((half_size * 4 - 1).transpose(1, 2))
        mean, worst = features.mean(dim=(2, 3, 4)), features.amax(dim=(3, 4)).amin(dim=2)
        return normalize(self.video_head(torch.cat([mean, worst], dim=1)), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "texts dim"]:
        """Unit vectors of captions, from the sum of their words' vectors."""
        counts = [[text.lower().split().count(word) for word in self.config["words"]] for text in texts]
        return normalize(self.text_head(self.words.new_tensor(counts) @ self.words), dim=-1)

    def logits(
        self, videos: Float[Tensor, "samples dim"], texts: Float[Tensor, "texts dim"]
    ) -> Float[Tensor, "samples texts"]:
        """Logits of each video's match with each text, from their embeddings."""
        return self.scale * videos @ texts.T + self.bias

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n", "utf-8")
        save_file(self.state_dict(), folder / "model.safetensors")

    @classmethod
    def load(cls, folder: Path) -> MotionMatch:
        """The model that `save` wrote, frozen, in evaluation mode."""
        config = json.loads((folder / "config.json").read_text("utf-8"))
        model = cls(**config)
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.eval().requires_grad_(False)
