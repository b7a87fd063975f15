"""What clips do folders and lists of videos hold? A caption, a video and a start each; what cannot be used is named.

    FOLDER     videos, in subfolders too, each with its caption in a .txt of the same name beside it
    .jsonl     an object a line: "video", a path relative to the list's folder, "caption", and any of FIELDS

Of a video only the header is read here. Hidden files are no input; every other one of a folder must be a video or a
caption.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bpgo_video.data.clips import Cut, read_length
from bpgo_video.data.prompt_files import (
    MAX_CHARACTERS,
    MAX_LINE,
    Line,
    PromptFileError,
    Rejected,
    checked_line,
    json_object,
    numbered_lines,
    prompt_id,
)
from bpgo_video.data.prompt_plan import Plan, Progress, plan_of, without_bar

EXTENSIONS = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"})
CAPTION = ".txt"
FIELDS = ("video", "caption", "split", "tags", "info")
Entry = tuple[str, Path, Callable[[], dict[str, Any]]]  # place, folder of relative paths, what gives the fields


def plan_clips(
    inputs: Iterable[Path | str],
    cut: Cut,
    split: str = "train",
    on_error: str = "stop",
    max_characters: int = MAX_CHARACTERS,
    progress: Progress = without_bar,
) -> Plan:
    """Which clips a build will write; arguments and errors as in `make_plan`, and VideoErrors of `Cut.starts`."""
    paths = tuple(map(Path, inputs))
    read = partial(read_clips, paths, cut, split, max_characters)
    return plan_of(read, f"videos in {', '.join(map(str, paths))}", on_error, progress)


def read_clips(
    inputs: Iterable[Path], cut: Cut, split: str = "train", max_characters: int = MAX_CHARACTERS
) -> Iterator[Line | Rejected]:
    """Every clip, in order, or why a video cannot be used.

    A line's record has the caption as its prompt, an id that is a hash of caption, video's name and start, and in
    `info` the name ("video") and the start in seconds ("start").

    Raises:
        PromptFileError: an input that is neither a folder nor a .jsonl file, or does not exist.
    """
    for path in inputs:
        if not path.is_dir() and (path.suffix != ".jsonl" or not path.is_file()):
            raise PromptFileError(f"{path} is neither a folder of videos nor a .jsonl file that exists")
        for place, folder, fields in (_folder if path.is_dir() else _list)(path):
            try:
                line = checked_line(place, {"split": split, **fields()}, folder, max_characters)
                yield from _clips(line, str(line.media["video"].relative_to(folder)), cut)
            except (ValueError, RecursionError) as error:  # VideoErrors and what JSON and UTF-8 raise are ValueErrors
                yield Rejected(place, str(error))


def _clips(line: Line, name: str, cut: Cut) -> Iterator[Line]:
    for start in cut.starts(read_length(line.media["video"])):
        key = prompt_id(f"{line.record.prompt}\0{name}\0{start:.6f}")
        info = {**line.record.info, "video": name, "start": start}
        yield replace(line, record=replace(line.record, id=key, info=info))


def _list(path: Path) -> Iterator[Entry]:
    for place, line in numbered_lines(path):
        yield place, path.parent, partial(_listed, line)


def _listed(line: bytes) -> dict[str, Any]:
    content = json_object(line, "video", "caption")
    for name in content:
        if name not in FIELDS:
            raise ValueError(f"unknown field {name!r}; known are {', '.join(FIELDS)}")
    return {"prompt": content.pop("caption"), **content}


def _folder(root: Path) -> Iterator[Entry]:
    for here, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        videos = {Path(name).stem for name in files if Path(name).suffix.lower() in EXTENSIONS}
        for name in sorted(files):
            path = Path(here, name)
            is_caption = path.suffix == CAPTION and path.stem in videos
            if not is_caption and not name.startswith("."):
                yield str(path), root, partial(_beside, path, root)


def _beside(path: Path, root: Path) -> dict[str, Any]:
    if path.suffix == CAPTION:
        raise ValueError("it is the caption of no video: none beside it has its name")
    if path.suffix.lower() not in EXTENSIONS:
        raise ValueError(f"it is neither a video ({', '.join(sorted(EXTENSIONS))}) nor a caption; put it elsewhere")
    caption = path.with_suffix(CAPTION)
    if not caption.is_file():
        raise ValueError(f"it has no caption; write one to {caption.name} beside it")
    with caption.open("rb") as stream:
        text = stream.read(MAX_LINE + 1)
    return {"prompt": text.decode("utf-8-sig"), "video": str(path.relative_to(root))}
