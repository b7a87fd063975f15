"""Messages to and from reward models in other processes: validated JSON and raw pixels, never a pickle.

Pixels have 8 bits per channel, as in a video file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.rewards.base import Clips, FrameSampling, FrameScores, RewardModel, groupwise, listens

CALL_SHARE = 0.9  # of a call's timeout that the other process may use: the rest is for reporting the error
MAX_REPLY = 64 * 2**20  # bytes

Size = Annotated[int, Field(ge=1, le=65536)]
Text = Annotated[str, Field(max_length=20_000)]
Message = TypeVar("Message", bound=BaseModel)


class ClipsHeader(BaseModel):
    """Layout of the pixels: videos (samples, frames, height, width, 3), then any images (samples, height, width, 3)."""

    model_config = ConfigDict(extra="forbid", strict=True)
    videos: Annotated[tuple[Size, Size, Size, Size], Field(strict=False)]  # a list in JSON
    fps: Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
    texts: list[Text]
    images: bool = False


class ScoresMessage(BaseModel):
    """`FrameScores` as plain lists; the message may hold other keys."""

    model_config = ConfigDict(strict=True)
    values: list[list[float]]
    times: list[float] | None
    std: list[list[float]] | None = None


class Description(BaseModel):
    """The members of a reward model except its call; see `RewardModel`."""

    name: str
    version: str
    range: tuple[float, float]
    higher_is_better: bool = True
    kind: Literal["real", "proxy", "test"] = "real"
    frames: int | None = None
    frames_per_second: float | None = None


class Capacity(BaseModel):
    """What a server takes, besides its model's description."""

    max_bytes: int


class MalformedMessage(ValueError):
    """A message of another process that breaks the format; names what is wrong."""


class PackedClips(NamedTuple):
    """Clips as they are sent: a header for JSON (`ClipsHeader`), and the pixels of all videos, then of all images."""

    header: dict[str, Any]
    pixels: memoryview


def parse(kind: type[Message], message: object) -> Message:
    """
    Raises:
        MalformedMessage: names the first wrong fields, without their values.
    """
    try:
        return kind.model_validate(message)
    except ValidationError as error:
        problems = error.errors(include_input=False, include_url=False)[:3]
        named = [f"{'.'.join(map(str, problem['loc'])) or 'message'}: {problem['msg']}" for problem in problems]
        raise MalformedMessage("; ".join(named)) from None


def pack_clips(clips: Clips) -> PackedClips:
    samples, frames, _, height, width = clips.videos.shape
    parts = [_to_bytes(pixels) for pixels in (clips.videos, clips.images) if pixels is not None]
    header = {"videos": [samples, frames, height, width], "fps": float(clips.fps), "texts": list(clips.texts)}
    return PackedClips({**header, "images": clips.images is not None}, torch.cat(parts).numpy().data)


def check_clips(message: object, pixels: memoryview) -> PackedClips:
    """The received clips, validated but not yet unpacked: they have a quarter of their size in fp32.

    Raises:
        MalformedMessage: names what is wrong.
    """
    header = parse(ClipsHeader, message)
    samples, frames, height, width = header.videos
    size = samples * (frames + header.images) * height * width * 3
    if len(header.texts) != samples:
        raise MalformedMessage(f"there are {len(header.texts)} texts for {samples} videos")
    if len(pixels) != size:
        raise MalformedMessage(f"there are {len(pixels)} bytes of pixels; {list(header.videos)} need {size}")
    return PackedClips(header.model_dump(), pixels)


def unpack_clips(packed: PackedClips) -> Clips:
    """The clips that were packed, fp32."""
    header, pixels = packed.header, torch.frombuffer(packed.pixels, dtype=torch.uint8)
    samples, frames, height, width = header["videos"]
    size = math.prod(header["videos"]) * 3
    videos = _from_bytes(pixels[:size].view(samples, frames, height, width, 3))
    images = _from_bytes(pixels[size:].view(samples, height, width, 3)) if header["images"] else None
    return Clips(videos, header["fps"], tuple(header["texts"]), images)


def _to_bytes(pixels: Tensor) -> Tensor:
    """[..., 3, height, width] in [0, 1] to bytes, channels last, flat, on the CPU."""
    return (pixels.detach() * 255).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1).contiguous().flatten().cpu()


def _from_bytes(pixels: Tensor) -> Tensor:
    return pixels.movedim(-1, -3).float() / 255


def pack_scores(scores: FrameScores) -> dict[str, Any]:
    """A model's own scores: the receiving suite negates them where lower is better."""
    times = None if scores.times is None else scores.times.tolist()
    std = None if scores.std is None else scores.std.float().cpu().tolist()
    return {"values": scores.values.float().cpu().tolist(), "times": times, "std": std}


def unpack_scores(message: Mapping[str, Any]) -> FrameScores:
    """
    Raises:
        MalformedMessage: the message does not hold rows of numbers of one length.
    """
    scores = parse(ScoresMessage, message)
    rows = [*scores.values, *(scores.values if scores.std is None else scores.std)]
    if len({len(row) for row in rows}) > 1 or len(rows) != 2 * len(scores.values):
        raise MalformedMessage("rows of scores, or of std, differ in length; all videos of a call need equally many")
    std = None if scores.std is None else torch.tensor(scores.std).reshape(len(scores.std), -1)
    times = None if scores.times is None else torch.tensor(scores.times, dtype=torch.float64)
    return FrameScores(torch.tensor(scores.values).reshape(len(scores.values), -1), times, std)


def describe(model: RewardModel) -> dict[str, Any]:
    """A model's members as a `Description`.

    Raises:
        ConfigError: the model listens, or compares samples; clips are sent without sound and without groups.
    """
    if groupwise(model):
        raise ConfigError(
            f"reward {model.name!r} compares the samples of a prompt, but a server receives no groups; name it as the "
            "recipe's model"
        )
    if listens(model):
        raise ConfigError(
            f"reward {model.name!r} listens, but a server receives no sound; name it as the recipe's model"
        )
    members = {name: getattr(model, name) for name in ("name", "version", "range", "kind", "higher_is_better")}
    return {**members, "frames": model.frames.count, "frames_per_second": model.frames.fps}


class DescribedModel(RewardModel):
    """A reward model in another process, with the members that it describes; a subclass sends it the clips."""

    def set_members(self, message: object) -> None:
        described = parse(Description, message)
        self.name, self.version, self.kind = described.name, f"{described.version}-8bit", described.kind
        self.range, self.higher_is_better = described.range, described.higher_is_better
        self.frames = FrameSampling(described.frames, described.frames_per_second)
