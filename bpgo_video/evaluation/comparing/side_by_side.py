"""Which prompts are looked at, and how do their videos get into one page? The extremes, as small H.264 files."""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from bpgo_video.data.video import VideoError, as_bytes, read_video, write_video
from bpgo_video.evaluation.comparing.comparison import Compared, tables
from bpgo_video.evaluation.comparing.measuring import Found
from bpgo_video.evaluation.comparing.model_scores import video_path

LONGEST_SIDE = 320  # pixels; larger videos are scaled down
QUALITY = 23  # x264's constant rate factor of what is scaled


@dataclass(frozen=True)
class Clip:
    """A video to embed.

    Attributes:
        label: the model.
        video, poster: base64 of an mp4, and of a JPEG of its middle frame.
    """

    label: str
    video: str
    poster: str
    width: int
    height: int


@dataclass(frozen=True)
class Pair:
    """A prompt with every model's first video of it.

    Attributes:
        row: place among the prompts.
        means: of each model, the reference first: the mean over the prompt's samples by measure.
        disagreement: of each candidate: how far apart the rewards' standardised differences lie.
    """

    row: int
    prompt: str
    tags: Sequence[str]
    clips: Sequence[Clip]
    means: Sequence[Mapping[str, float]]
    disagreement: Sequence[float]


def standardised(compared: Compared, candidate: int) -> dict[str, Float[np.ndarray, "prompts"]]:
    """Each reward's differences of a candidate by prompt, in standard deviations of the reference's scores."""
    one = compared.comparisons[candidate]
    first, second = (tables(compared.models[place].scores) for place in (0, candidate + 1))
    rewards = {**one.of_role("heldout"), **one.of_role("trained")}
    return {
        name: (second[name].mean(axis=1) - first[name].mean(axis=1)) / effect.scale
        for name, effect in rewards.items()
        if effect.scale > 0
    }


def disagreement(compared: Compared, candidate: int) -> Float[np.ndarray, "prompts"]:
    """How far the highest and the lowest standardised difference of a prompt's rewards lie apart."""
    differences = np.stack([*standardised(compared, candidate).values()] or [np.zeros(len(prompts_of(compared)))])
    return differences.max(axis=0) - differences.min(axis=0)


def prompts_of(compared: Compared) -> Sequence[str]:
    return [line.prompt for line in compared.models[0].scores.prompts]


def chosen_rows(compared: Compared, count: int) -> list[int]:
    """In turns the biggest win, loss and disagreement of each candidate by the first held-out measure; in order."""
    measure = next(iter(compared.comparisons[0].of_role("heldout")))
    first = compared.models[0].scores.table(measure).mean(axis=1)
    ranked = []
    for candidate, model in enumerate(compared.models[1:]):
        gain = model.scores.table(measure).mean(axis=1) - first
        ranked += [np.argsort(-gain), np.argsort(gain), np.argsort(-disagreement(compared, candidate))]
    turns = chain.from_iterable(zip_longest(*(order.tolist() for order in ranked)))
    return sorted(list(dict.fromkeys(turns))[:count])


def pairs(compared: Compared, count: int) -> list[Pair]:
    """The chosen prompts in their order, with their videos."""
    apart = [disagreement(compared, candidate) for candidate in range(len(compared.comparisons))]
    means = [{name: table.mean(axis=1) for name, table in tables(model.scores).items()} for model in compared.models]
    found = []
    for row in chosen_rows(compared, count):
        line = compared.models[0].scores.prompts[row]
        clips = [clip_of(model, row) for model in compared.models]
        by_model = [{name: float(values[row]) for name, values in own.items()} for own in means]
        found.append(Pair(row, line.prompt, line.tags, clips, by_model, [float(values[row]) for values in apart]))
    return found


def clip_of(model: Found, row: int) -> Clip:
    """A model's first video of a prompt, at most LONGEST_SIDE large.

    Raises:
        VideoError: it is missing, or cannot be read.
    """
    path = video_path(model.folder, row)
    if not path.is_file():
        raise VideoError(f"{path} is missing beside its scores; restore it, or name the model and a new --output")
    video, fps = read_video(path)
    data, (height, width) = path.read_bytes(), video.shape[2:]
    if max(height, width) > LONGEST_SIDE:
        video = scaled(video)
        data, (height, width) = encoded(video, fps), video.shape[2:]
    middle = Image.fromarray(as_bytes(video[len(video) // 2 :][:1])[0])
    poster = io.BytesIO()
    middle.save(poster, format="jpeg", quality=80)
    return Clip(model.scores.label, _text(data), _text(poster.getvalue()), width, height)


def scaled(video: Float[Tensor, "frames 3 height width"]) -> Float[Tensor, "frames 3 small_height small_width"]:
    """The longer side LONGEST_SIDE, the other in proportion, both even, which 4:2:0 needs."""
    factor = LONGEST_SIDE / max(video.shape[2:])
    size = [max(2, 2 * round(side * factor / 2)) for side in video.shape[2:]]
    frames = [interpolate(frame[None], size, mode="bilinear", antialias=True) for frame in video]
    return torch.cat(frames).clamp(0, 1)


def encoded(video: Float[Tensor, "frames 3 height width"], fps: float) -> bytes:
    """The bytes of an mp4."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_video(path, video, fps, crf=QUALITY)
        return path.read_bytes()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
