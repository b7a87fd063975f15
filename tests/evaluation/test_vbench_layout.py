"""Video folders in VBench's layout: file names, the manifest next to the folder, and named problems."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from PIL import Image

from bpgo_video.config.generation import GenerationError, GenerationSettings
from bpgo_video.data.media import VideoHeader, read_video, write_video
from bpgo_video.data.records import prompt_id
from bpgo_video.documents import MalformedFile
from bpgo_video.evaluation.vbench_files import ENCODING, Suite, SuiteError, header_problems, read_suite, video_problems
from bpgo_video.evaluation.vbench_layout import lay_out, places_of, read_texts, reader_of
from bpgo_video.inference import generate as generation
from bpgo_video.inference.generate import generate, plan
from tests.made.random_wan import random_wan

ENTRIES = [
    {"prompt_en": "a red circle moving left", "dimension": ["color"], "auxiliary_info": {"color": "red"}},
    {"prompt_en": "In a still frame, a square", "dimension": ["temporal_flickering"]},
]


def layout_problems(folder: Path, suite: Suite, fps: float | None = None) -> list[str]:
    return video_problems(folder, suite, fps=fps, whole=True)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_wan(tmp_path_factory.mktemp("policy") / "wan")


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    (tmp_path / "info.json").write_text(json.dumps(ENTRIES))
    return read_suite(str(tmp_path / "info.json"), samples=2)


@pytest.fixture
def settings(policy: Path, suite: Suite, tmp_path: Path) -> GenerationSettings:
    return GenerationSettings(
        policy=str(policy), prompts=suite.source, output=tmp_path / "videos", seed=5, num_steps=2, guidance_scale=1.0,
        num_frames=9, height=64, width=64, fps=8, samples_per_prompt=suite.samples, batch_size=4,
    )  # fmt: skip


def test_a_layout_contains_exactly_the_videos_of_the_suite(
    settings: GenerationSettings, suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = lay_out(settings, suite)
    assert {path.name for path in settings.output.iterdir()} == {
        "a red circle moving left-0.mp4", "a red circle moving left-1.mp4", "In a still frame, a square-0.mp4",
        "In a still frame, a square-1.mp4",
    }  # fmt: skip
    assert manifest == settings.output.with_name("videos.generation.json")
    assert layout_problems(settings.output, suite) == []
    content = json.loads(manifest.read_text())
    assert content["complete"]
    assert content["settings"]["policy_fingerprint"]
    assert content["videos"][3] == {
        "prompt": "In a still frame, a square", "id": prompt_id("In a still frame, a square"), "seed": 5, "sample": 1,
        "file": "In a still frame, a square-1.mp4",
    }  # fmt: skip
    assert settings.output.with_name("videos.sheets").is_dir()
    with av.open(str(settings.output / "a red circle moving left-0.mp4")) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt, container.streams.video[0].average_rate) == ("h264", "yuv420p", 8)
    plain = replace(settings, output=settings.output.with_name("plain"))
    generate(plain)
    for name, number in (
        ("a red circle moving left-1.mp4", "00000-01"),
        ("In a still frame, a square-0.mp4", "00001-00"),
    ):
        alike = read_video(settings.output / name)[0] - read_video(plain.output / f"{number}.mp4")[0]
        assert alike.abs().mean() < 0.015, "equal up to rounding, which H.264 amplifies"
    (settings.output / ".a red circle moving left-0.mp4.partial-0123abcd").write_bytes(b"of a killed rank")
    monkeypatch.setattr(generation, "load_pipeline", lambda *_: pytest.fail("all videos exist"))
    lay_out(settings, suite)
    assert layout_problems(settings.output, suite) == []


def test_unexpected_files_stop_a_layout_before_generation(
    settings: GenerationSettings, suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "load_pipeline", lambda *_: pytest.fail("no model may be loaded"))
    settings.output.mkdir()
    (settings.output / "notes.txt").write_text("mine")
    with pytest.raises(SuiteError, match=r"'notes\.txt' is none of the suite's files"):
        lay_out(settings, suite)
    (settings.output / "notes.txt").unlink()
    (settings.output / "a red circle moving left-0.mp4").write_bytes(b"of another program")
    with pytest.raises(GenerationError, match=r"holds videos, but no videos\.generation\.json"):
        lay_out(settings, suite)


def test_an_enhanced_prompt_reaches_the_model_and_the_file_name_is_unchanged(
    settings: GenerationSettings, suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    call = WanPipeline.__call__

    @functools.wraps(call)  # keeps the signature, from which defaults are read
    def listen(self: WanPipeline, *args: Any, **given: Any) -> Any:
        heard.extend(given["prompt"])
        return call(self, *args, **given)

    monkeypatch.setattr(WanPipeline, "__call__", listen)
    long = {entry["prompt_en"]: f"{entry['prompt_en']} and then stops" for entry in ENTRIES}
    file = tmp_path / "texts.jsonl"
    lines = [json.dumps({"prompt": prompt, "generation_prompt": text}) for prompt, text in long.items()]
    file.write_text("\n".join(lines))
    manifest = lay_out(settings, suite, texts=read_texts(file, suite))
    video = json.loads(manifest.read_text())["videos"][0]
    assert video["prompt"] == "a red circle moving left"
    assert video["generation_prompt"] == "a red circle moving left and then stops"
    assert heard[:2] == ["a red circle moving left and then stops"] * 2
    assert "a red circle moving left-1.mp4" in {path.name for path in settings.output.iterdir()}
    with pytest.raises(GenerationError, match="generation_prompts_sha256"):
        lay_out(settings, suite)


def test_fields_of_a_users_list_reach_the_model(tmp_path: Path) -> None:
    line = {
        "prompt": "a red circle",
        "negative_prompt": "blurry",
        "info": {"generation_prompt": "a red circle, slowly"},
    }
    (tmp_path / "own.jsonl").write_text(json.dumps(line))
    suite = read_suite(str(tmp_path / "own.jsonl"), samples=1)
    settings = GenerationSettings(policy="none", prompts=suite.source, output=tmp_path / "videos", seed=0)
    (job,) = plan(settings, reader_of(suite, None, None)(settings, ()), places_of(settings.output))
    assert (job.text, job.negative_prompt("other")) == ("a red circle, slowly", "blurry")
    assert job.file == tmp_path / "videos" / "a red circle-0.mp4"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['{"prompt": "a red circle moving left"}'], r"texts\.jsonl:1: generation_prompt: Field required"),
        (['{"prompt": "other", "generation_prompt": "x"}'], "'other' is not a prompt of"),
        (['{"prompt": "a red circle moving left", "generation_prompt": "x"}'] * 2, "appears twice"),
        (
            ['{"prompt": "a red circle moving left", "generation_prompt": "x"}'],
            "'In a still frame, a square' has no line",
        ),
    ],
)
def test_generation_prompts_must_cover_the_whole_suite(
    suite: Suite, tmp_path: Path, lines: list[str], words: str
) -> None:
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    with pytest.raises((SuiteError, MalformedFile), match=words):
        read_texts(tmp_path / "texts.jsonl", suite)


def test_image_to_video_starts_from_the_images_of_the_suite(tmp_path: Path) -> None:
    """Prompts with and without camera motion continue the same image."""
    images = tmp_path / "images"
    images.mkdir()
    Image.fromarray(np.full((80, 96, 3), 200, np.uint8)).save(images / "a shape.jpg")
    entries = [
        {"prompt_en": "a shape", "dimension": ["i2v_background"], "image_name": "a shape.jpg"},
        {"prompt_en": "a shape, camera pans left", "dimension": ["camera_motion"]},
    ]
    (tmp_path / "info.json").write_text(json.dumps(entries))
    suite = read_suite(str(tmp_path / "info.json"), samples=1)
    settings = GenerationSettings(
        policy=str(random_wan(tmp_path / "wan", images=True)), prompts=suite.source, output=tmp_path / "videos", seed=5,
        num_steps=2, guidance_scale=1.0, num_frames=9, height=64, width=64, fps=8,
    )  # fmt: skip
    with pytest.raises(SuiteError, match="--images"):
        lay_out(settings, suite)
    manifest = lay_out(settings, suite, images=images)
    assert json.loads(manifest.read_text())["settings"]["images_sha256"]
    assert layout_problems(settings.output, suite) == []


def write(folder: Path, suite: Suite, frames: int = 4) -> None:
    for number, name in enumerate(suite.names()):
        write_video(folder / name, torch.full((frames, 3, 16, 32), number / 10), fps=8)


def test_every_problem_of_a_folder_is_named(suite: Suite, tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    write(folder, suite)
    assert layout_problems(folder, suite) == []
    one, two, three, four = (folder / name for name in suite.names())
    write_video(one, torch.zeros(4, 3, 16, 32), fps=10)
    two.write_bytes(two.read_bytes()[:-200])
    three.unlink()
    write_video(four, torch.zeros(3, 3, 16, 16), fps=8)
    write_video(folder / "extra-0.mp4", torch.zeros(3, 3, 16, 16), fps=8)
    problems = layout_problems(folder, suite, fps=8)
    assert f"'{three.name}' is missing" in problems
    assert f"'{one.name}' has fps 10 where 8 is expected" in problems
    assert any(str(two) in problem and "is it complete?" in problem for problem in problems)
    assert any("'extra-0.mp4' is none of the suite's files" in problem for problem in problems)
    assert sum(f"'{four.name}' has" in problem for problem in problems) in (0, 2), (
        "frames and size of a video that differs from the others"
    )
    assert sum("has frames" in problem for problem in problems) == 1
    assert sum("has size" in problem for problem in problems) == 1


def test_a_file_without_its_last_frames_is_named(suite: Suite, tmp_path: Path) -> None:
    """A truncated mp4 still opens if its index precedes the frames, as some programs write it."""
    folder = tmp_path / "videos"
    write(folder, suite)
    path = folder / next(iter(suite.names()))
    noise = np.random.default_rng(0).integers(0, 255, (30, 64, 64, 3), np.uint8)
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        for image in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert any(path.name in problem and "complete?" in problem for problem in layout_problems(folder, suite, fps=8))


def test_the_frame_rate_is_that_of_the_manifest_or_of_most_files() -> None:
    header = VideoHeader(fps=16.0, frames=81, height=480, width=832, codec="h264", pixel_format="yuv420p")
    headers = {"a": header, "b": replace(header, fps=8.0), "c": header}
    assert header_problems(headers, {}) == ["'b' has fps 8 where 16 is expected"]
    assert header_problems(headers, {"fps": "8"}) == [f"'{name}' has fps 16 where 8 is expected" for name in "ac"]
    assert header_problems({"a": replace(header, fps=30000 / 1001)}, {"fps": "29.97"}) == []
    other = {"a": replace(header, codec="hevc", pixel_format="yuv444p"), "b": replace(header, width=480)}
    assert header_problems(other, {}, ("fps",)) == []
    assert header_problems({"a": other["a"]}, ENCODING) == [
        "'a' has codec hevc where h264 is expected", "'a' has pixel format yuv444p where yuv420p is expected",
    ]  # fmt: skip
    assert header_problems({}, {}) == []
