"""Is a folder of videos one that VBench measures as it should? Names, rates, sizes, encoding, every frame.

DIR.generation.json beside a folder DIR is the manifest of the layout that made it (layout.py).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from bpgo_video.data.video import VideoError, VideoHeader, check_video, read_header
from bpgo_video.evaluation.vbench.suite import Suite, SuiteError, folder_problems, foreign_problems, listing

ENCODING = {"codec": "h264", "pixel format": "yuv420p"}
MEASURES = ("fps", "frames", "size", *ENCODING)


def beside(folder: Path, name: str) -> Path:
    """What belongs to a folder of videos, and must not lie in it."""
    whole = Path(os.path.abspath(folder))
    return whole.with_name(f"{whole.name}.{name}")


def layout_problems(folder: Path, suite: Suite, fps: float | None = None) -> list[str]:
    """Everything that keeps VBench from scoring the folder as it should; every video is decoded.

    Args:
        fps: that the videos must have; None: that of the manifest beside the folder, or of most videos.

    Raises:
        SuiteError: there is no such folder.
    """
    found = folder_problems(folder, suite)
    headers = {}
    for name in suite.names():
        if (folder / name).is_file():
            try:
                headers[name] = _whole(folder / name)
            except VideoError as error:
                found.append(str(error))
    return found + header_problems(headers, {**ENCODING, **_rate(folder, fps)})


def header_problems(
    headers: Mapping[str, VideoHeader], expected: Mapping[str, str], measures: Sequence[str] = MEASURES
) -> list[str]:
    """Videos that differ from the rest.

    Args:
        headers: by the file's name.
        expected: what they must be; of what it does not say, most videos decide.
        measures: what is compared.
    """
    if not headers:
        return []
    told = {name: _as_text(header) for name, header in headers.items()}
    usual = {what: Counter(video[what] for video in told.values()).most_common(1)[0][0] for what in measures}
    usual |= {what: expected[what] for what in measures if what in expected}
    return [
        f"{name!r} has {what} {video[what]} where {usual[what]} is expected"
        for name, video in told.items()
        for what in measures
        if video[what] != usual[what]
    ]


def _rate(folder: Path, fps: float | None) -> dict[str, str]:
    known = fps or written_fps(folder)
    return {} if known is None else {"fps": f"{known:.4g}"}


def _as_text(header: VideoHeader) -> dict[str, str]:
    return {
        "fps": f"{header.fps:.4g}",
        "frames": str(header.frames),
        "size": f"{header.width}x{header.height}",
        "codec": header.codec,
        "pixel format": header.pixel_format,
    }


def _whole(path: Path) -> VideoHeader:
    header = read_header(path)
    if (count := check_video(str(path), str(path))) < header.frames:
        raise VideoError(f"{path} holds {count} of {header.frames} frames; is it complete?")
    return header


def check_videos(folder: Path, suite: Suite | None, paths: Sequence[Path], fps: float | None) -> None:
    """Whether the files are there, open, and have one rate, by their headers alone, and nothing foreign lies beside.

    Args:
        fps: that all videos must have; None: that of the layout's manifest, or of most videos.

    Raises:
        SuiteError: names every problem.
    """
    problems = [f"{path.name!r} is missing" for path in paths if not path.is_file()]
    problems += [] if suite is None else foreign_problems(folder, suite)
    headers = {}
    for path in paths:
        if path.is_file():
            try:
                headers[path.name] = read_header(path)
            except VideoError as error:
                problems.append(str(error))
    problems += header_problems(headers, _rate(folder, fps), ("fps",))
    if problems:
        raise SuiteError(f"{folder} cannot be measured as it is:{listing(problems)}")


def written_fps(folder: Path) -> float | None:
    """Frames a second of the generation whose manifest lies beside the folder; None where there is none.

    Raises:
        SuiteError: the manifest is damaged.
    """
    manifest = beside(folder, "generation.json")
    if not manifest.is_file():
        return None
    try:
        return float(json.loads(manifest.read_text("utf-8"))["settings"]["fps"])
    except (ValueError, TypeError, KeyError) as error:
        raise SuiteError(f"{manifest} does not say the rate of its videos ({error!r}); say it with --fps") from error
