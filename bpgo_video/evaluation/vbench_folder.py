"""Checks of a folder of videos before VBench measures it: names, rates, sizes, encoding, every frame.

DIR.generation.json next to a folder DIR is the manifest of the layout that made it (layout.py).
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from bpgo_video.data.media import VideoError, VideoHeader, check_video, read_header
from bpgo_video.evaluation.vbench_suite import Suite, SuiteError

ENCODING = {"codec": "h264", "pixel format": "yuv420p"}
PROPERTIES: Mapping[str, Callable[[VideoHeader], str]] = {
    "fps": lambda header: f"{header.fps:.4g}",
    "frames": lambda header: str(header.frames),
    "size": lambda header: f"{header.width}x{header.height}",
    "codec": lambda header: header.codec,
    "pixel format": lambda header: header.pixel_format,
}


def sibling(folder: Path, name: str) -> Path:
    """A path next to a folder of videos, for what belongs to it and must not be in it."""
    whole = Path(os.path.abspath(folder))
    return whole.with_name(f"{whole.name}.{name}")


def video_problems(
    folder: Path, suite: Suite | None, names: Iterable[str] | None = None, fps: float | None = None, whole: bool = False
) -> list[str]:
    """Everything that keeps VBench from measuring these files of a folder as it should.

    Args:
        suite: other files than its own are a problem; None allows any.
        names: of the files; None: all of the suite's.
        fps: required of the videos; None: the manifest's, or that of most videos.
        whole: decode every frame, and compare length, size and encoding too; else the rate alone, by the headers.

    Raises:
        SuiteError: there is no such folder, or its manifest is damaged.
    """
    if not folder.is_dir():
        raise SuiteError(f"there is no folder of videos {folder}")
    problems, headers = [] if suite is None else foreign_problems(folder, suite), {}
    for name in sorted(suite.names() if names is None and suite is not None else names or ()):
        try:
            headers[name] = read_header(folder / name)
            if whole and (count := check_video(str(folder / name), str(folder / name))) < headers[name].frames:
                problems.append(f"{folder / name} holds {count} of {headers[name].frames} frames; is it complete?")
        except VideoError as error:
            problems.append(str(error) if (folder / name).is_file() else f"{name!r} is missing")
    expected = expected_rate(folder, fps)
    return problems + (
        header_problems(headers, ENCODING | expected) if whole else header_problems(headers, expected, ("fps",))
    )


def foreign_problems(folder: Path, suite: Suite) -> list[str]:
    """Files that are not the suite's, or are under another spelling."""

    def plain(name: str) -> str:
        return unicodedata.normalize("NFC", name).casefold()

    wanted, problems = suite.names(), []
    by_spelling = {plain(name): name for name in wanted}
    for name in sorted(set(os.listdir(folder)) - wanted.keys()):
        wrong = "none of the suite's files; VBench wants nothing else in the folder: move it"
        if near := by_spelling.get(plain(name)):
            wrong = f"another spelling of {near!r}, the only one under which VBench finds it; rename or remove it"
        problems.append(f"{name!r} is {wrong}")
    return problems


def header_problems(
    headers: Mapping[str, VideoHeader], expected: Mapping[str, str], properties: Iterable[str] = tuple(PROPERTIES)
) -> list[str]:
    """Videos, by name, that differ in some of PROPERTIES from what is `expected`, or else from most of the others."""
    problems = []
    for what in properties:
        texts = {name: PROPERTIES[what](header) for name, header in headers.items()}
        usual = expected.get(what) or max(Counter(texts.values()).items(), key=lambda item: item[1], default=("", 0))[0]
        problems += [
            f"{name!r} has {what} {text} where {usual} is expected" for name, text in texts.items() if text != usual
        ]
    return problems


def expected_rate(folder: Path, fps: float | None) -> dict[str, str]:
    """The requested rate, or that in the manifest next to the folder; empty without either."""
    manifest = sibling(folder, "generation.json")
    if not fps and manifest.is_file():
        try:
            fps = float(json.loads(manifest.read_text("utf-8"))["settings"]["fps"])
        except (ValueError, TypeError, KeyError) as error:
            raise SuiteError(f"{manifest} does not say the rate of its videos ({error!r}); give it by --fps") from error
    return {"fps": f"{fps:.4g}"} if fps else {}
