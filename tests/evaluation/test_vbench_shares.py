"""VBench scores by several ranks or calls: equal to those of one rank, with every video measured once."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bpgo_video.commands.evaluate import main
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.documents import MalformedFile
from bpgo_video.evaluation import vbench_scoring as scoring
from bpgo_video.evaluation.heldout import device_of
from bpgo_video.evaluation.vbench_dimensions import DimensionError, Measured
from bpgo_video.evaluation.vbench_networks import Sources
from bpgo_video.evaluation.vbench_scoring import (
    Task,
    drop_kept,
    kept_folder,
    measure_share,
    prepare,
    read_kept,
    score_folder,
)
from tests.made.scored_clips import clips, request_of, score_command

CPU = torch.device("cpu")
SOURCES = Sources(CPU)
ALONE = Mesh(rank=0, world_size=1, device=CPU)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clips(tmp_path_factory.mktemp("clips") / "videos")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the decoded videos, in order."""
    names: list[str] = []
    decode: Callable = scoring.read_footage

    def seen(item: scoring.Item) -> object:
        names.append(item.path.name)
        return decode(item)

    monkeypatch.setattr(scoring, "read_footage", seen)
    return names


@given(items=st.lists(st.integers()), world_size=st.integers(1, 9))
def test_every_item_is_in_one_share_and_shares_are_balanced(items: list[int], world_size: int) -> None:
    shares = [Mesh(rank, world_size, CPU).round_robin(range(len(items))) for rank in range(world_size)]
    assert sorted(place for share in shares for place in share) == list(range(len(items)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_shares_of_any_number_of_ranks_add_up_to_the_results_of_one(
    folder: Path, tmp_path: Path, world_size: int
) -> None:
    """Five videos, so that two of seven ranks have none."""
    whole = score_folder(request_of(folder), SOURCES, ALONE, tmp_path / "one")
    for task, expected in zip(prepare(request_of(folder), SOURCES, checks_files=False), whole, strict=True):
        ranks = [Mesh(rank, world_size, CPU) for rank in range(world_size)]
        parts = [
            measure_share(task, mesh.round_robin(range(len(task.items))), mesh, tmp_path / "many") for mesh in ranks
        ]
        assert sum(map(len, parts)) == len(task.items)
        found = {place: measured for part in parts for place, measured in part.items()}
        assert task.result(found) == expected


def test_a_score_weighs_videos_by_their_frames_on_any_rank(folder: Path, tmp_path: Path) -> None:
    """VBench's consistency is the mean over all frames, which differs from the mean of the ranks' means."""
    *_, consistency = score_folder(request_of(folder), SOURCES, ALONE, tmp_path / "kept")
    frames = [number + 2 for number in range(5)]  # clips of 3, 4, 5 ... frames, without the first
    values = [float(video.video_results) for video in consistency.videos]
    assert consistency.score == pytest.approx(sum(map(float.__mul__, values, map(float, frames))) / sum(frames))
    assert consistency.score != pytest.approx(sum(values) / 5, abs=1e-9)


def test_an_interrupted_scoring_continues_with_the_remaining_videos(
    folder: Path, tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*score_command(folder, tmp_path / "scores.json"), "--device", "cpu"]
    assert main([*score_command(folder, tmp_path / "whole.json"), "--device", "cpu"]) == 0
    assert len(read) == 3 * 5
    read.clear()
    decode = scoring.read_footage
    failing = lambda *of: pytest.fail("killed") if len(read) == 7 else decode(*of)  # noqa: E731
    monkeypatch.setattr(scoring, "read_footage", failing)
    with pytest.raises(pytest.fail.Exception):
        main(command)
    assert list(json.loads((tmp_path / "scores.json").read_text())) == ["temporal_flickering"]
    monkeypatch.setattr(scoring, "read_footage", decode)
    capsys.readouterr()
    read.clear()
    assert main(command) == 0
    assert read == [f"a man talks-{number}.mp4" for number in (2, 3, 4, 0, 1, 2, 3, 4)]
    assert "dynamic_degree: 2 of 5 videos were measured before" in capsys.readouterr().out
    assert (tmp_path / "scores.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not kept_folder(tmp_path / "scores.json").exists(), "complete results need no stored scores"
    read.clear()
    assert main(command) == 0
    assert len(read) == 15, "a finished scoring is repeated on request"


def test_the_key_of_a_score_contains_everything_it_depends_on(folder: Path, tmp_path: Path) -> None:
    flickering, _, consistency = prepare(request_of(folder), SOURCES, checks_files=False)
    item = consistency.items[0]
    head, image = tmp_path / "head.pth", tmp_path / "image.jpg"
    head.write_bytes(b"1")
    image.write_bytes(b"1")
    other = replace(consistency.network, name="another network")
    cases = [
        (consistency, item),
        (flickering, item),
        (replace(consistency, network=other), item),
        (replace(consistency, sources=replace(SOURCES, head=head)), item),
        (consistency, replace(item, prompt=replace(item.prompt, text="another prompt"))),
        (consistency, replace(item, prompt=replace(item.prompt, info={"auxiliary_info": {"style": "ink"}}))),
        (consistency, replace(item, image=image)),
        (consistency, consistency.items[1]),
    ]
    keys = [task.kept_file(tmp_path, case).stem.rpartition("-")[2] for task, case in cases]
    assert consistency.kept_file(tmp_path, item).stem == f"subject_consistency-{keys[0]}"
    assert len(set(keys)) == len(keys)


def test_a_video_that_was_replaced_is_measured_again(tmp_path: Path, read: list[str]) -> None:
    folder, kept = clips(tmp_path / "videos", count=3), tmp_path / "kept"
    task = prepare(request_of(folder), SOURCES, checks_files=False)[0]
    measure_share(task, range(3), ALONE, kept)
    changed = folder / "a man talks-1.mp4"
    os.utime(changed, ns=(changed.stat().st_atime_ns, changed.stat().st_mtime_ns + 1))
    read.clear()
    score_folder(replace(request_of(folder), dimensions=(task.dimension.name,), backbones={}), SOURCES, ALONE, kept)
    assert read == [changed.name]


def test_stored_scores_are_exact_and_partial_files_are_ignored(folder: Path, tmp_path: Path) -> None:
    numbers = [Measured(1 / 3, 0.1), Measured(True), Measured(1.0)]
    task, other = prepare(request_of(folder), SOURCES, checks_files=False)[:2]
    for places in ([0, 1], [2]):
        made = iter(numbers[place] for place in places)
        measure_share(with_formula(task, lambda *_, made=made: next(made)), places, ALONE, tmp_path)
    measure_share(with_formula(other, lambda *_: Measured(0.5)), [4], ALONE, tmp_path)
    partial = task.kept_file(tmp_path, task.items[3])
    partial.with_name(f".{partial.name}.partial-0123abcd").write_text('{"val')  # of a killed process
    found = read_kept(task, tmp_path)
    assert found == dict(enumerate(numbers))
    assert [type(measured.value) for measured in found.values()] == [float, bool, float]
    drop_kept(tmp_path, [task.dimension.name])
    assert read_kept(task, tmp_path) == {}
    assert read_kept(other, tmp_path) == {4: Measured(0.5)}, "scores of another dimension are kept"
    drop_kept(tmp_path, [other.dimension.name])
    assert not tmp_path.exists()


def with_formula(task: Task, formula: Callable) -> Task:
    return replace(task, dimension=replace(task.dimension, formula=formula))


@pytest.mark.parametrize("text", ["", "{}", '{"value": "high"}'])
def test_a_file_in_another_format_is_named(folder: Path, tmp_path: Path, text: str) -> None:
    (task, *_) = prepare(request_of(folder), SOURCES, checks_files=False)
    task.kept_file(tmp_path, task.items[0]).write_text(text)
    with pytest.raises(MalformedFile, match=r"temporal_flickering-\w+\.json: .*delete it to measure"):
        read_kept(task, tmp_path)


@pytest.mark.parametrize("draw", [lambda: float(torch.rand(())), random.random, lambda: float(np.random.rand())])
def test_random_draws_of_a_users_network_do_not_depend_on_the_order(
    folder: Path, tmp_path: Path, draw: Callable
) -> None:
    """A network with random layers draws from a global generator, whose state is restored."""
    task = prepare(request_of(folder), SOURCES, checks_files=False)[0]
    drawing = with_formula(task, lambda *_: Measured(draw()))
    there, back = (measure_share(drawing, places, ALONE, tmp_path) for places in (range(5), range(4, -1, -1)))
    assert there == back
    first = draw()
    measure_share(drawing, [0], ALONE, tmp_path)
    assert draw() != first


def test_a_score_that_is_not_finite_is_not_stored(folder: Path, tmp_path: Path) -> None:
    task = prepare(request_of(folder), SOURCES, checks_files=False)[0]
    broken = with_formula(task, lambda *_: Measured(float("inf")))
    with pytest.raises(DimensionError, match=r"temporal_flickering of .*talks-2\.mp4 is inf"):
        measure_share(broken, [2], ALONE, tmp_path)
    assert read_kept(task, tmp_path) == {}


def test_each_rank_measures_on_its_own_device() -> None:
    second = Mesh(rank=1, world_size=2, device=torch.device("cuda", 1))
    assert device_of(None, second) == device_of("cuda", second) == torch.device("cuda", 1)
    assert device_of("cpu", second) == CPU
    assert device_of("cuda:3", replace(second, rank=0, world_size=1)) == torch.device("cuda", 3)
    with pytest.raises(ValueError, match="--device cuda:3 is one device for 2 ranks"):
        device_of("cuda:3", second)
