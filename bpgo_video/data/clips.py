"""Videos with captions, cut into clips: the frames nearest in time to the clip's moments, whatever the frame rate.

Inputs are

    FOLDER     videos, also in subfolders, each with its caption in a .txt of the same name next to it; or videos and
               their metadata.csv, .jsonl or .parquet
    FILE       a list as of prompts, see prompt_formats.py, with a path in "video" or "file_name"

Hidden files are ignored; every other file of a folder without a list must be a video or a caption. Planning reads only
the videos' headers. A clip of n frames at f frames per second that starts at s shows the moments s, s + 1/f, ...,
s + (n - 1)/f in seconds from the video's first frame.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, TypeVar

import av
import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.config.bpgo import VideoConfig
from bpgo_video.data import MAX_CHARACTERS, Columns
from bpgo_video.data.containers import VideoError, decoded, opened
from bpgo_video.data.media import VideoHeader, fit_image, read_header, upright
from bpgo_video.data.prompt_files import Line, Rejected, checked_lines, list_of, read_lines
from bpgo_video.data.prompt_formats import MAX_LINE, PromptFileError
from bpgo_video.data.records import prompt_id

EXTENSIONS = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"})
CAPTION = ".txt"
COLUMNS: Columns = {"video": ("video", "file_name"), "image": (), "id": ()}
MIN_RATE = 0.95  # of the clip's frame rate; slower videos would show frames twice

Item = TypeVar("Item")


@dataclass(frozen=True)
class Cut:
    """How videos become clips.

    Attributes:
        video: frames, size and frame rate of a clip.
        max_clips: per video.
        stride: seconds between the starts of clips.
    """

    video: VideoConfig
    max_clips: int
    stride: float

    def starts(self, header: VideoHeader) -> list[float]:
        """The starts 0, stride, 2 stride, ... of a video's clips, up to max_clips, whose last moment it still shows.

        Raises:
            VideoError: not one clip fits, or the video has fewer frames per second than a clip.
        """
        video, last = self.video, (self.video.num_frames - 1) / self.video.fps
        if header.seconds is None:
            raise VideoError("the video does not state its duration; `ffmpeg -i IN -c copy OUT.mp4` adds it")
        if header.fps < MIN_RATE * video.fps:
            raise VideoError(
                f"the video has {header.fps:.4g} frames per second, a clip {video.fps:g}, so frames would repeat; "
                "lower --fps"
            )
        starts = [k * self.stride for k in range(self.max_clips) if k * self.stride + last < header.seconds]
        if not starts:
            raise VideoError(
                f"the video is {header.seconds:.2f} s long; {video.num_frames} frames at {video.fps:g} per second need "
                f"more than {last:.2f} s"
            )
        return starts


def read_clip(
    source: Path | bytes, start: float, video: VideoConfig, owner: str = ""
) -> Float[Tensor, "frames 3 height width"]:
    """The frames of one clip in [0, 1]: upright, resized to cover the clip's size and centre-cropped (`fit_image`).

    Seeks to the last keyframe before the clip; holds one frame of the video at a time.

    Args:
        source: a file, or its content.
        owner: its name in errors; a file's own by default.

    Raises:
        VideoError: the video does not decode, ends before the clip does, or is smaller than the clip.
    """
    owner = owner or str(source)
    moments = [start + number / video.fps for number in range(video.num_frames)]
    with opened(source if isinstance(source, bytes) else str(source), owner) as container:
        duration = 1 / float(container.streams.video[0].average_rate)
        frames = [_fit(frame, owner, video) for frame in nearest(_timed(container, start, owner), moments, duration)]
    if len(frames) < len(moments):
        raise VideoError(f"{owner} ends before {moments[len(frames)]:.2f} s, too early for {video.num_frames} frames")
    return torch.stack(frames)


def nearest(timed: Iterable[tuple[float, Item]], moments: Sequence[float], duration: float = 0.0) -> Iterator[Item]:
    """For each moment the item nearest in time, the earlier of two at equal distance. Holds one item at a time.

    Args:
        timed: (time, item), ascending in time.
        moments: ascending.
        duration: of the last item; later moments get nothing.
    """
    remaining = deque(moments)
    for before, after in pairwise(chain(timed, [None])):
        assert before is not None
        time, item = before
        while remaining and remaining[0] - time <= (after[0] - remaining[0] if after else duration):
            remaining.popleft()
            yield item
        if not remaining:
            return


def _timed(container: Any, start: float, owner: str) -> Iterator[tuple[float, av.VideoFrame]]:
    stream = container.streams.video[0]
    first = stream.start_time or 0
    if start > 0:
        container.seek(first + int(start / stream.time_base), stream=stream)
    for frame in decoded(container, owner):
        if frame.pts is None:
            raise VideoError(f"{owner} has a frame without a time; `ffmpeg -i IN -c copy OUT.mp4` may add it")
        yield float((frame.pts - first) * stream.time_base), frame


def _fit(frame: av.VideoFrame, owner: str, video: VideoConfig) -> Float[Tensor, "3 height width"]:
    pixels = torch.from_numpy(upright(frame, owner).copy()).permute(2, 0, 1)
    height, width = pixels.shape[1:]
    if height < video.height or width < video.width:
        raise VideoError(f"{owner} is {width} x {height}, smaller than a clip of {video.width} x {video.height}")
    return fit_image(pixels.float() / 255, video.height, video.width)


def read_clips(
    inputs: Iterable[Path | str], cut: Cut, columns: Columns | None = None, max_characters: int = MAX_CHARACTERS
) -> Iterator[Line | Rejected]:
    """Every clip in order, or the reason why a video cannot be used; a `read` of `make_plan`.

    The record of a line has the caption as its prompt, a hash of caption, video name and start as its id, and in `info`
    the name as "video" and the start in seconds as "start".

    Raises:
        PromptFileError: an input is neither a folder nor a list that exists.
    """
    columns = {**COLUMNS, **(columns or {})}
    for path in map(Path, inputs):
        if path.is_dir() and list_of(path) is None:
            root = path
            lines = checked_lines(_folder_entries(path), _folder_fields, [path], columns, max_characters)
        elif path.exists():
            root = path if path.is_dir() else path.parent
            lines = read_lines([path], columns, max_characters)
        else:
            raise PromptFileError(f"{path} does not exist; give a folder of videos, or a list of them")
        for line in lines:
            try:
                yield from [line] if isinstance(line, Rejected) else _clips(line, root, cut)
            except VideoError as error:
                yield Rejected(line.place, str(error))


def _clips(line: Line, root: Path, cut: Cut) -> Iterator[Line]:
    path, record = line.media["video"], line.record
    if isinstance(path, bytes):
        raise VideoError("the list holds the video itself; write it to a file, and its path to the list")
    name = os.path.relpath(path, root)
    for start in cut.starts(read_header(path)):
        info = {**record.info, "video": name, "start": start}
        key = prompt_id(f"{record.prompt}\0{name}\0{start:.6f}")
        yield replace(line, record=replace(record, id=key, info=info))


def _folder_entries(root: Path) -> Iterator[tuple[str, tuple[Path, Path]]]:
    """Every file that is neither hidden nor the caption of a video."""
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        videos = {Path(name).stem for name in files if Path(name).suffix.lower() in EXTENSIONS}
        for path in (Path(folder, name) for name in sorted(files) if not name.startswith(".")):
            if path.suffix != CAPTION or path.stem not in videos:
                yield str(path), (path, root)


def _folder_fields(entry: tuple[Path, Path]) -> dict[str, Any]:
    path, root = entry
    if path.suffix == CAPTION:
        raise ValueError("this caption has no video of the same name next to it")
    if path.suffix.lower() not in EXTENSIONS:
        raise ValueError(
            f"this file is neither a video ({', '.join(sorted(EXTENSIONS))}) nor a caption; move it to another folder"
        )
    caption = path.with_suffix(CAPTION)
    if not caption.is_file():
        raise ValueError(f"this video has no caption; write one to {caption.name} next to it")
    with caption.open("rb") as stream:
        text = stream.read(MAX_LINE + 1)
    return {"prompt": text.decode("utf-8-sig"), "video": str(path.relative_to(root))}
