"""Messages to and from models in other processes: JSON that states what they are, and raw pixels; never a pickle.

Pixels travel with 8 bits per channel: a model elsewhere sees videos as a file would hold them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from bpgo_video.rewards.base import Clips, FrameSampling, FrameScores, RewardModel

OWN_SHARE = 0.9  # of a call's timeout that a model elsewhere has: the rest is for the error
MAX_TEXT = 20_000  # characters of a prompt
Size = Annotated[int, Field(ge=1, le=65536)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Message = TypeVar("Message", bound=BaseModel)


class ClipsHeader(BaseModel):
    """What the pixels are: videos (samples, frames, height, width, 3), then any images (samples, height, width, 3)."""

    model_config = ConfigDict(extra="forbid")
    videos: tuple[Size, Size, Size, Size]
    fps: Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
    texts: list[Text]
    images: bool = False


class ScoresMessage(BaseModel):
    """`FrameScores` as plain lists; the message may hold other keys."""

    values: list[list[float]]
    times: list[float] | None


class Description(BaseModel):
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


def read(kind: type[Message], message: object) -> Message:
    """
    Raises:
        MalformedMessage: names the first fields that do not fit, without their values.
    """
    try:
        return kind.model_validate(message)
    except ValidationError as error:
        problems = error.errors(include_input=False, include_url=False)[:3]
        said = [f"{'.'.join(map(str, problem['loc'])) or 'message'}: {problem['msg']}" for problem in problems]
        raise MalformedMessage("; ".join(said)) from None


class DescribedModel(RewardModel):
    """A reward model in another process, which describes it; a subclass sends it the clips."""

    def describe_as(self, message: object) -> None:
        found = read(Description, message)
        self.name, self.version, self.kind = found.name, f"{found.version}-8bit", found.kind
        self.range, self.higher_is_better = found.range, found.higher_is_better
        self.frames = FrameSampling(found.frames, found.frames_per_second)


def description_of(model: RewardModel) -> dict[str, Any]:
    """A model's members as a message."""
    members = {name: getattr(model, name) for name in ("name", "version", "range", "kind", "higher_is_better")}
    return {**members, "frames": model.frames.count, "frames_per_second": model.frames.fps}


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


class Received(NamedTuple):
    """Clips as they arrived, checked; a quarter of their size in fp32."""

    header: ClipsHeader
    pixels: memoryview

    def clips(self) -> Clips:
        """The clips that were packed, fp32."""
        samples, frames, height, width = self.header.videos
        whole = torch.frombuffer(self.pixels, dtype=torch.uint8)
        size = math.prod(self.header.videos) * 3
        videos = _pixels_of(whole[:size].view(samples, frames, height, width, 3))
        images = _pixels_of(whole[size:].view(samples, height, width, 3)) if self.header.images else None
        return Clips(videos, self.header.fps, tuple(self.header.texts), images)


def _pixels_of(rows: Tensor) -> Tensor:
    return rows.movedim(-1, -3).float() / 255


def received(message: object, pixels: memoryview) -> Received:
    """The packed clips, after every check.

    Raises:
        MalformedMessage: states what does not fit.
    """
    header = read(ClipsHeader, message)
    samples, frames, height, width = header.videos
    size = samples * (frames + header.images) * height * width * 3
    if len(header.texts) != samples:
        raise MalformedMessage(f"there are {len(header.texts)} texts for {samples} videos")
    if len(pixels) != size:
        raise MalformedMessage(f"there are {len(pixels)} bytes of pixels; {list(header.videos)} need {size}")
    return Received(header, pixels)


def scores_message(scores: FrameScores) -> dict[str, Any]:
    """A model's own scores; the receiving suite orients them."""
    times = None if scores.times is None else scores.times.tolist()
    return {"values": scores.values.float().cpu().tolist(), "times": times}


def scores_of(message: Mapping[str, Any]) -> FrameScores:
    """
    Raises:
        MalformedMessage: the reply holds no rows of numbers of one length.
    """
    found = read(ScoresMessage, message)
    if len({len(row) for row in found.values}) > 1:
        raise MalformedMessage("rows of scores differ in length; all videos of a call must have equally many")
    times = None if found.times is None else torch.tensor(found.times, dtype=torch.float64)
    return FrameScores(torch.tensor(found.values).reshape(len(found.values), -1), times)
