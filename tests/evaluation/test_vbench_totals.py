"""VBench totals: equal to those of VBench's scripts; result files are validated."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpgo_video.documents import MalformedFile
from bpgo_video.evaluation.vbench_files import (
    BENCHMARKS,
    Result,
    ResultError,
    TotalsError,
    Video,
    benchmark_of,
    check_complete,
    merge,
    read_results,
    totals,
    write_results,
)

GOLDEN = {
    "subject_consistency": 0.95, "background_consistency": 0.96, "temporal_flickering": 0.985,
    "motion_smoothness": 0.985, "dynamic_degree": 0.6, "aesthetic_quality": 0.62, "imaging_quality": 0.66,
    "object_class": 0.9, "multiple_objects": 0.7, "human_action": 0.96, "color": 0.88, "spatial_relationship": 0.72,
    "scene": 0.53, "appearance_style": 0.24, "temporal_style": 0.245, "overall_consistency": 0.27,
}  # fmt: skip
I2V = {
    "camera_motion": 0.4, "i2v_subject": 0.97, "i2v_background": 0.98, "subject_consistency": 0.95,
    "background_consistency": 0.96, "motion_smoothness": 0.985, "dynamic_degree": 0.6, "aesthetic_quality": 0.62,
    "imaging_quality": 0.66,
}  # fmt: skip


def test_totals_equal_those_of_vbenchs_script() -> None:
    """The output of VBench's scripts/cal_final_score.py for these sixteen scores."""
    found = totals("vbench", GOLDEN)
    assert list(found) == ["quality", "semantic", "total"]
    assert found["quality"] == pytest.approx(0.8282967379389304, abs=1e-12)
    assert found["semantic"] == pytest.approx(0.7843970749666797, abs=1e-12)
    assert found["total"] == pytest.approx(0.8195168053444803, abs=1e-12)


def test_image_to_video_totals_equal_values_computed_by_hand() -> None:
    """Quality sums to 5.5 without flickering, I2V to 2.1; their mean is the total (scripts/cal_i2v_final_score.py)."""
    subject, background = (0.95 - 0.1462) / 0.8538, (0.96 - 0.2615) / 0.7385
    motion = (0.985 - 0.706) / 0.2915
    quality = (subject + background + motion + 0.62 + 0.66 + 0.5 * 0.6) / 5.5
    i2v = ((0.97 - 0.1462) / 0.8538 + (0.98 - 0.2615) / 0.7385 + 0.1 * 0.4) / 2.1
    found = totals("vbench-i2v", I2V)
    assert list(found) == ["quality", "i2v", "total"]
    assert found["quality"] == pytest.approx(quality, abs=1e-12)
    assert found["i2v"] == pytest.approx(i2v, abs=1e-12)
    assert found["total"] == pytest.approx((quality + i2v) / 2, abs=1e-12)


def test_the_total_of_vbench_2_is_a_mean_of_means() -> None:
    names = BENCHMARKS["vbench-2.0"].dimensions
    assert len(names) == 18
    scores = {name: number / 20 for number, name in enumerate(names)}
    found = totals("vbench-2.0", scores)
    sizes = [2, 2, 7, 3, 4]  # from its README: creativity, commonsense, controllability, human fidelity, physics
    means, start = [], 0
    for size in sizes:
        means.append(sum(range(start, start + size)) / size / 20)
        start += size
    assert list(found.values()) == pytest.approx([*means, sum(means) / 5], abs=1e-12)
    assert list(found)[:-1] == ["creativity", "commonsense", "controllability", "human_fidelity", "physics"]


@given(st.dictionaries(st.sampled_from(sorted(GOLDEN)), st.floats(0, 1), min_size=16, max_size=16))
def test_the_total_is_between_its_groups(scores: dict[str, float]) -> None:
    found = totals("vbench", scores)
    low, high = sorted((found["quality"], found["semantic"]))
    assert low - 1e-12 <= found["total"] <= high + 1e-12
    assert found["total"] == pytest.approx(0.8 * found["quality"] + 0.2 * found["semantic"], abs=1e-12)


def test_a_missing_dimension_does_not_count_as_zero() -> None:
    """VBench's script counts it as a raw 0, which is -.1712 after the normalisation of subject consistency."""
    fewer = {name: score for name, score in GOLDEN.items() if name != "subject_consistency"}
    found = totals("vbench", fewer)
    whole = totals("vbench", GOLDEN)
    subject = (0.95 - 0.1462) / 0.8538
    assert found["quality"] == pytest.approx((6.5 * whole["quality"] - subject) / 5.5, abs=1e-12)
    only_quality = {name: score for name, score in GOLDEN.items() if name in list(GOLDEN)[:7]}
    assert totals("vbench", only_quality) == {
        "quality": pytest.approx(whole["quality"], abs=1e-12), "semantic": None, "total": None,
    }  # fmt: skip


def test_the_benchmark_is_recognised_by_its_dimensions() -> None:
    assert benchmark_of(GOLDEN) == "vbench"
    assert benchmark_of(I2V) == "vbench-i2v"
    assert benchmark_of({**I2V, "temporal_flickering": 0.9}) == "vbench-i2v"
    assert benchmark_of({"Human_Anatomy": 0.5}) == "vbench-2.0"
    with pytest.raises(TotalsError, match="vbench has no smoothness"):
        benchmark_of({**GOLDEN, "smoothness": 0.5})


def test_a_score_that_is_not_a_number_has_no_total() -> None:
    with pytest.raises(TotalsError, match="color nan"):
        totals("vbench", {**GOLDEN, "color": math.nan})


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


VIDEOS = [{"video_path": "v/a-0.mp4", "video_results": 0.5}, {"video_path": "v/a-1.mp4", "video_results": True}]


def test_results_are_read_in_vbenchs_format_and_in_ours(tmp_path: Path) -> None:
    path = write(tmp_path / "r.json", {"color": [0.75, VIDEOS], "camera_motion": [0.5, {"static": math.nan}, VIDEOS]})
    color, camera = read_results(path)
    assert (color.dimension, color.score, color.labels) == ("color", 0.75, ("official",))
    assert [video.video_results for video in camera.videos] == [0.5, True]
    own = [Result("color", 0.75, (Video("v/a-0.mp4", 0.5, "proxy", "a net"),))]
    write_results(tmp_path / "own.json", own)
    assert read_results(tmp_path / "own.json") == own
    content = json.loads((tmp_path / "own.json").read_text())
    assert content["color"][0] == 0.75
    assert {"video_path": "v/a-0.mp4", "video_results": 0.5}.items() <= content["color"][1][0].items()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"color": [math.nan, VIDEOS]}, r"color\.0: .* finite number \(given: nan\)"),
        ({"color": ["0.5", VIDEOS]}, r"color\.0: .* valid number \(given: '0\.5'\)"),
        ({"color": [66.1, VIDEOS]}, r"color\.0: .* less than or equal to 2 \(given: 66\.1\); .*between -1 and 1"),
        ({"color": [0.5, []]}, r"color\.1: .*at least 1 item"),
        ({"color": [0.5]}, r"color\.1: Field required"),
        ({"color": 0.5}, r"color: .*valid array \(given: 0\.5\)"),
        ({"color": [0.5, [VIDEOS[0], VIDEOS[0]]]}, r"color\.1: .*'v/a-0\.mp4' appears 2 times"),
        ({"color": [0.5, [{"video_path": "a"}]]}, r"color\.1\.0\.video_results: Field required"),
        ({"color": [0.5, [{"video_path": "a", "video_results": math.nan}]]}, r"video_results.*finite number"),
        ({"color": [0.5, [{"video_path": "a", "video_results": "yes"}]]}, r"video_results.*given: 'yes'"),
        ([0.5], "content: .*should be an object"),
        ({}, "content: .*at least 1 item"),
    ],
)
def test_unusable_results_are_named(tmp_path: Path, content: object, words: str) -> None:
    with pytest.raises(MalformedFile, match=rf"r\.json: .*{words}"):
        read_results(write(tmp_path / "r.json", content))


@pytest.mark.parametrize("text", ["", '{"color": [0.5, [{"video_p'])
def test_empty_and_truncated_files_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(MalformedFile, match=r"r\.json: .*cut short"):
        read_results(tmp_path / "r.json")


def test_a_dimension_comes_from_one_file(tmp_path: Path) -> None:
    one, two = (write(tmp_path / f"{n}.json", {n: [0.5, VIDEOS]}) for n in ("color", "scene"))
    assert list(merge([one, two])) == ["color", "scene"]
    with pytest.raises(ResultError, match=r"color is in .*color\.json and in .*again\.json"):
        merge([one, two, write(tmp_path / "again.json", {"color": [0.4, VIDEOS]})])


def test_results_must_cover_all_the_requested_videos(tmp_path: Path) -> None:
    """VBench's temporal flickering skips videos that it cannot decode."""
    (color,) = read_results(write(tmp_path / "r.json", {"color": [0.5, VIDEOS]}))
    check_complete(color, ["a-0.mp4", "a-1.mp4"])
    with pytest.raises(ResultError, match=r"lacks 1 videos, 'a-2\.mp4' first"):
        check_complete(color, ["a-0.mp4", "a-1.mp4", "a-2.mp4"])
    with pytest.raises(ResultError, match=r"has 'a-1\.mp4' in addition"):
        check_complete(color, ["a-0.mp4"])
