"""Which moments of a video make a clip, and which frames show them? By time: the frame nearest to each moment.

Times are seconds from a video's first frame. A clip of n frames at f frames a second that starts at s shows the moments
s, s + 1/f, ..., s + (n - 1)/f, whatever the video's own rate, constant or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import av
import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.config.bpgo import VideoConfig
from bpgo_video.data.images import fit_image
from bpgo_video.data.video import VideoError, opened, upright

SLOWER = 0.95  # a video of less than this share of a clip's frame rate would show frames twice

Shown = TypeVar("Shown")


class Length(NamedTuple):
    """How long a video says it is, in seconds, and its mean frames a second."""

    seconds: float
    rate: float


@dataclass(frozen=True)
class Cut:
    """How videos become clips.

    Attributes:
        video: frames, size and frame rate of a clip.
        most: clips of one video; as many as fit, if they are fewer.
        stride: seconds from the start of one clip to that of the next.
    """

    video: VideoConfig
    most: int
    stride: float

    def starts(self, length: Length) -> list[float]:
        """Where the clips of a video start: 0, stride, 2 stride, ..., as long as it lasts to their last moment.

        Raises:
            VideoError: not one fits, or the video has fewer frames a second than a clip.
        """
        video, last = self.video, (self.video.num_frames - 1) / self.video.fps
        if length.rate < SLOWER * video.fps:
            raise VideoError(
                f"it has {length.rate:.4g} frames a second, a clip {video.fps:g}: frames would stand still; lower --fps"
            )
        starts = [k * self.stride for k in range(self.most) if k * self.stride + last < length.seconds]
        if not starts:
            raise VideoError(
                f"it is {length.seconds:.2f} s long; {video.num_frames} frames at {video.fps:g} a second need more "
                f"than {last:.2f} s"
            )
        return starts


def read_length(path: Path) -> Length:
    """What a video's header says of it; no frame is decoded.

    Raises:
        VideoError: it cannot be opened, or does not say.
    """
    with opened(str(path), str(path)) as container:
        stream = container.streams.video[0]
        if stream.duration is not None:
            seconds = float(stream.duration * stream.time_base)
        elif container.duration is not None:
            seconds = container.duration / av.time_base
        else:
            raise VideoError(f"{path} does not say how long it is; `ffmpeg -i IN -c copy OUT.mp4` writes it down")
        if not stream.average_rate:
            raise VideoError(f"{path} does not say how many frames a second it has")
        return Length(seconds, float(stream.average_rate))


def read_clip(path: Path, start: float, video: VideoConfig) -> Float[Tensor, "frames 3 height width"]:
    """The frames of one clip in [0, 1]: upright, resized to cover its size (`fit_image`) and cut out of the centre.

    What lies before the clip is skipped by seeking to the last keyframe; one frame of the video is in memory at a time.

    Raises:
        VideoError: it does not decode, ends before the clip does, or is smaller than the clip.
    """
    moments = [start + number / video.fps for number in range(video.num_frames)]
    with opened(str(path), str(path)) as container:
        shown = nearest(_timed(container, start, path), moments, 1 / float(container.streams.video[0].average_rate))
        frames = [_fitted(frame, path, video) for frame in shown]
    if len(frames) < len(moments):
        raise VideoError(f"{path} ends before {moments[len(frames)]:.2f} s, though its header says otherwise")
    return torch.stack(frames)


def nearest(timed: Iterable[tuple[float, Shown]], moments: Sequence[float], lasting: float = 0.0) -> Iterator[Shown]:
    """For each moment what is nearest to it in time, the earlier of two that are equally near; one is held at a time.

    Args:
        timed: (time, item) in the order of time.
        moments: in order.
        lasting: how long after its time the last item still counts; it ends where a moment is later.
    """
    waiting, before = list(reversed(moments)), None
    for now in timed:
        while before is not None and waiting and waiting[-1] - before[0] <= now[0] - waiting[-1]:
            waiting.pop()
            yield before[1]
        if not waiting:
            return
        before = now
    while before is not None and waiting and waiting[-1] <= before[0] + lasting:
        waiting.pop()
        yield before[1]


def _timed(container: Any, start: float, path: Path) -> Iterator[tuple[float, av.VideoFrame]]:
    stream = container.streams.video[0]
    first = stream.start_time or 0
    if start > 0:
        container.seek(first + int(start / stream.time_base), stream=stream)
    for frame in container.decode(stream):
        if frame.pts is None:
            raise VideoError(f"{path} has a frame without a time; `ffmpeg -i IN -c copy OUT.mp4` may give it one")
        yield float((frame.pts - first) * stream.time_base), frame


def _fitted(frame: av.VideoFrame, path: Path, video: VideoConfig) -> Float[Tensor, "3 height width"]:
    pixels = torch.from_numpy(upright(frame, path).copy()).permute(2, 0, 1)
    height, width = pixels.shape[1:]
    if height < video.height or width < video.width:
        raise VideoError(f"{path} is {width} x {height}, smaller than a clip of {video.width} x {video.height}")
    return fit_image(pixels.float() / 255, video.height, video.width)
