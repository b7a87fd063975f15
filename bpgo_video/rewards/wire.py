"""Messages to and from models in other processes: JSON that states what they are, and raw pixels; never a pickle.

Pixels travel with 8 bits per channel: a model elsewhere sees videos as a file would hold them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked
from torch import Tensor

from bpgo_video.rewards.base import Clips, FrameSampling, FrameScores, RewardModel

MAX_TEXT = 20_000  # characters of a prompt
Size = Annotated[int, Field(ge=1, le=65536)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]


@checked(frozen=True, config=ConfigDict(extra="forbid"))
class ClipsHeader:
    """What the pixels are: videos (samples, frames, height, width, 3), then any images (samples, height, width, 3)."""

    videos: Annotated[list[Size], Field(min_length=4, max_length=4)]
    fps: Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
    texts: list[Text]
    images: bool = False

    @property
    def bytes(self) -> int:
        samples, frames, height, width = self.videos
        return samples * (frames + self.images) * height * width * 3


@checked(frozen=True)
class ScoresMessage:
    """`FrameScores` as plain lists."""

    values: list[list[float]]
    times: list[float] | None = None


@checked(frozen=True, config=ConfigDict(extra="ignore"))
class Description:
    """The members of a reward model but for its call; see `RewardModel`."""

    name: str
    version: str
    range: tuple[float, float]
    higher_is_better: bool = True
    kind: Literal["real", "proxy", "test"] = "real"
    frames: int | None = None
    frames_per_second: float | None = None


class MalformedMessage(ValueError):
    """Another process sent something else than it should; the message states what is wrong."""


class DescribedModel(RewardModel):
    """A reward model in another process, which describes it; a subclass sends it the clips."""

    def describe_as(self, description: Description) -> None:
        self.name, self.kind = description.name, description.kind
        self.version = f"{description.version}-8bit"
        self.range, self.higher_is_better = description.range, description.higher_is_better
        self.frames = FrameSampling(description.frames, description.frames_per_second)


def description_of(model: RewardModel) -> dict[str, Any]:
    """A model's members as a message."""
    members = {name: getattr(model, name) for name in ("name", "version", "kind", "higher_is_better")}
    frames = {"frames": model.frames.count, "frames_per_second": model.frames.fps}
    return {**members, **frames, "range": list(model.range)}


class Packed(NamedTuple):
    """Clips ready to travel: the header's JSON object, and the pixels of all videos, then of all images."""

    header: dict[str, Any]
    pixels: memoryview


def packed(clips: Clips) -> Packed:
    samples, frames, _, height, width = clips.videos.shape
    parts = [_bytes_of(pixels) for pixels in (clips.videos, clips.images) if pixels is not None]
    header = {"videos": [samples, frames, height, width], "fps": float(clips.fps), "texts": list(clips.texts)}
    return Packed({**header, "images": clips.images is not None}, torch.cat(parts).numpy().data)


def _bytes_of(pixels: Tensor) -> Tensor:
    """[..., 3, height, width] in [0, 1] to a row of bytes, channels last, on the CPU."""
    return (pixels.detach() * 255).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1).contiguous().flatten().cpu()


@dataclass(frozen=True)
class Received:
    """Clips as they arrived, checked; a quarter of their size in fp32."""

    header: ClipsHeader
    pixels: memoryview

    def clips(self) -> Clips:
        """The clips that were packed, fp32."""
        samples, frames, height, width = self.header.videos
        whole = torch.frombuffer(self.pixels, dtype=torch.uint8)
        videos, images = whole.split([n := math.prod(self.header.videos) * 3, len(whole) - n])
        return Clips(
            _pixels_of(videos.view(samples, frames, height, width, 3)),
            self.header.fps,
            tuple(self.header.texts),
            _pixels_of(images.view(samples, height, width, 3)) if self.header.images else None,
        )


def _pixels_of(rows: Tensor) -> Tensor:
    return rows.movedim(-1, -3).float() / 255


def received(message: object, pixels: memoryview) -> Received:
    """The packed clips, after every check.

    Raises:
        MalformedMessage: states what does not fit.
    """
    header = read_message(ClipsHeader, message)
    if len(header.texts) != header.videos[0]:
        raise MalformedMessage(f"there are {len(header.texts)} texts for {header.videos[0]} videos")
    if len(pixels) != header.bytes:
        raise MalformedMessage(f"there are {len(pixels)} bytes of pixels; {header.videos} need {header.bytes}")
    return Received(header, pixels)


def scores_message(scores: FrameScores) -> dict[str, Any]:
    """A model's own scores; the receiving suite orients them."""
    times = None if scores.times is None else scores.times.tolist()
    return {"values": scores.values.float().cpu().tolist(), "times": times}


def scores_of(message: Mapping[str, Any]) -> FrameScores:
    """The scores in a reply, which may hold other keys.

    Raises:
        MalformedMessage: they are no rows of numbers of one length.
    """
    found = read_message(ScoresMessage, {key: message.get(key) for key in ("values", "times")})
    if len({len(row) for row in found.values}) > 1:
        raise MalformedMessage("rows of scores differ in length; all videos of a call must have equally many")
    times = None if found.times is None else torch.tensor(found.times, dtype=torch.float64)
    return FrameScores(torch.tensor(found.values).reshape(len(found.values), -1), times)


def read_message(kind: Any, message: object) -> Any:
    """A message as one of this file's dataclasses.

    Raises:
        MalformedMessage: names the first fields that do not fit, without their values.
    """
    try:
        return TypeAdapter(kind).validate_python(message)
    except ValidationError as error:
        problems = error.errors(include_input=False, include_url=False)[:3]
        said = [f"{'.'.join(map(str, problem['loc'])) or 'message'}: {problem['msg']}" for problem in problems]
        raise MalformedMessage("; ".join(said)) from None
