"""Priors stored with prompts: values round-trip, and stale or truncated values are refused."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bpgo_video.data.priors import (
    PriorError,
    PriorTable,
    UnfinishedPriors,
    extensible_anchors,
    load_priors,
    write_priors,
)
from bpgo_video.data.reader import PromptShards
from bpgo_video.data.records import EncoderStamp, PromptRecord
from bpgo_video.data.stream import PromptStream
from tests.made.prompt_folders import write_shards


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Shards of prompts 1000 to 1019, of which the first three are held out."""
    embeds = {"prompt_embeds": torch.ones(2, 2)}
    records = [
        PromptRecord(1000 + i, f"prompt {i}", split="heldout" if i < 3 else "train", conditioning=embeds)
        for i in range(20)
    ]
    write_shards(records, tmp_path / "shards", negative=embeds, policy=EncoderStamp("x", "0", 2), shard_size=7)
    return tmp_path / "shards"


def table_of(anchors: dict[int, tuple[float, float, int, float]], **changes: Any) -> PriorTable:
    """A table of the reward clip."""
    fields: dict[str, Any] = {"reward": "clip", "version": "v1", "scale": 0.25, "policy": "policyhash", "settings": {}}
    return PriorTable(**{**fields, **changes}, anchors=anchors)


def test_a_batch_contains_its_priors(directory: Path) -> None:
    anchors = {1000 + i: (i / 7, i / 100, 16, i / 50) for i in reversed(range(20))}
    write_priors(directory, table_of(anchors))
    tables = load_priors(directory, {"clip": "v1"})
    batch = next(PromptStream(PromptShards(directory), "train", 0, 5, priors=tables.values()))
    prior = batch.priors["clip"]
    expected = torch.tensor([anchors[int(i)] for i in batch.ids], dtype=torch.float64)
    assert torch.equal(prior.mean, expected[:, 0].float())
    assert torch.equal(prior.std, expected[:, 1].float())
    assert prior.count.tolist() == [16] * 5
    assert (prior.scale, prior.version) == (0.25, "v1")


def test_a_missing_stale_or_incomplete_prior_names_the_command(directory: Path) -> None:
    command = r"run: bpgo-video priors RECIPE$"
    with pytest.raises(PriorError, match=rf"clip.json is missing; {command}"):
        load_priors(directory, {"clip": "v1"})
    write_priors(directory, table_of({1003: (0.0, 0.0, 8, 0.1)}))
    with pytest.raises(PriorError, match=rf"is stale: .* version v1 of reward 'clip', which is now v2; {command}"):
        load_priors(directory, {"clip": "v2"})
    tables = load_priors(directory, {"clip": "v1"}).values()
    with pytest.raises(PriorError, match=rf"no anchor for 16 of 17 prompts, the first 'prompt .*{command}"):
        next(PromptStream(PromptShards(directory), "train", 0, 17, priors=tables))
    (directory / "priors" / "clip.json").write_text("[]")
    with pytest.raises(PriorError, match=rf"cannot be read .*{command}"):
        load_priors(directory, {"clip": "v1"})


@pytest.mark.parametrize(
    ("anchor", "problem"),
    [
        ("[NaN, 0.2, 4, 0.1]", "the mean of prompt 1004 is nan: .*finite number"),
        ("[-Infinity, 0.2, 4, 0.1]", "the mean of prompt 1004 is -inf: .*finite number"),
        ("[0.1, -0.2, 4, 0.1]", "the standard deviation of prompt 1004 is -0.2: .*greater than or equal to 0"),
        ("[0.1, 0.2, 0, 0.1]", "the count of prompt 1004 is 0: .*greater than or equal to 1"),
        ("[0.1, 0.2, 4, Infinity]", "the spread within a group of prompt 1004 is inf: .*finite number"),
        ("[0.1]", "anchors.1004.1: Field required"),
    ],
)
def test_a_prior_with_an_impossible_value_names_file_prompt_and_value(
    directory: Path, anchor: str, problem: str
) -> None:
    path = write_priors(directory, table_of({1003: (0.1, 0.2, 4, 0.1), 1004: (0.0, 0.0, 1, 0.0)}))
    content = json.loads(path.read_text())
    content["anchors"]["1004"] = "HERE"
    path.write_text(json.dumps(content).replace('"HERE"', anchor))
    with pytest.raises(PriorError, match=rf"clip.json cannot be read \({problem}\); run: bpgo-video priors"):
        load_priors(directory, {"clip": "v1"})


@pytest.mark.parametrize(
    ("words", "environment", "command"),
    [
        ("bpgo-video train 'my run.yaml' --run.dir x", {}, "bpgo-video priors 'my run.yaml' --run.dir x"),
        ("__main__.py --local_rank=1 doctor tiny", {"WORLD_SIZE": "8"}, "bpgo-video priors tiny --ranks 8"),
        (
            "train.py --local_rank=1 --config r",
            {"WORLD_SIZE": "16", "LOCAL_SIZE": "8"},
            "deepspeed --hostfile HOSTS --module bpgo_video priors --config r",
        ),
        ("pytest tests/data", {}, "bpgo-video priors RECIPE"),
    ],
)
def test_a_missing_prior_prints_the_command_for_this_run(
    words: str, environment: dict[str, str], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", shlex.split(words))
    for name in ("WORLD_SIZE", "LOCAL_SIZE"):  # which earlier tests of this process may have set by starting ranks
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(PriorError("it is missing")) == f"it is missing; run: {command}"


def test_an_invalid_prior_is_not_written(directory: Path) -> None:
    with pytest.raises(ValueError, match=r"scale\n.*greater than 0"):
        write_priors(directory, table_of({1: (0.0, 0.0, 8, 0.1)}, scale=0.0))
    with pytest.raises(ValueError, match="finite number"):
        write_priors(directory, table_of({1: (float("nan"), 0.0, 8, 0.1)}))
    with pytest.raises(ValueError, match="reward name"):
        write_priors(directory, table_of({}, reward="../clip"))
    assert not list(directory.glob("priors/*"))


FIRST, SECOND = {(7, 0): {"clip": [0.25, 0.5]}}, {(9, 1): {"clip": [0.1, 0.3]}}


def test_notes_are_read_back_without_a_truncated_line(tmp_path: Path) -> None:
    notes = UnfinishedPriors(tmp_path, {"seed": "0"})
    assert notes.begin() == {}
    notes.add(FIRST)
    notes.add(SECOND)
    notes.path.write_text(notes.path.read_text() + '{"id": 11, "sco')
    assert UnfinishedPriors(tmp_path, {"seed": "0"}).begin() == FIRST | SECOND
    notes.add({(11, 2): {"clip": [0.2]}})
    assert notes.begin() == FIRST | SECOND | {(11, 2): {"clip": [0.2]}}
    notes.remove()
    assert notes.begin() == {}


def test_notes_of_other_settings_are_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    UnfinishedPriors(tmp_path, {"seed": "0"}).begin()
    UnfinishedPriors(tmp_path, {"seed": "0"}).add(FIRST)
    other = UnfinishedPriors(tmp_path, {"seed": "1"})
    assert capsys.readouterr().out == ""
    assert other.begin() == {}
    expected = f"{other.path}: an unfinished measurement with other settings is dropped, scored groups: 1\n"
    assert capsys.readouterr().out == expected
    other.add(SECOND)
    assert other.begin() == SECOND
    assert UnfinishedPriors(tmp_path, {"seed": "0"}).begin() == {}


def test_anchors_of_the_same_settings_are_extended_and_others_are_not(directory: Path) -> None:
    first, second, row = {"sampler": "a"}, {"sampler": "b", "video": "c"}, (0.0, 0.0, 8, 0.1)
    assert extensible_anchors(directory, ["clip", "motion"], first) == ({}, "")
    write_priors(directory, table_of({1: row, 2: row}, settings=first))
    assert extensible_anchors(directory, ["clip", "motion"], first) == ({}, ""), "a reward was not measured"
    path = write_priors(directory, table_of({2: row, 3: row}, settings=first, reward="motion"))
    assert extensible_anchors(directory, ["clip", "motion"], first) == ({2: {"clip": row, "motion": row}}, "")
    found, why = extensible_anchors(directory, ["motion", "clip"], second)
    assert found == {}
    assert why == f"the 2 anchors of {path} were measured with another sampler, video"
    path.write_text(path.read_text().replace("0.25", "0.75"))
    found, why = extensible_anchors(directory, ["motion", "clip"], first)
    assert found == {}
    assert "motion.json" in why
    assert "run:" not in why


def test_an_earlier_format_is_refused(directory: Path) -> None:
    path = write_priors(directory, table_of({1: (0.0, 0.0, 8, 0.1)}))
    path.write_text(path.read_text().replace('"format_version": 2', '"format_version": 1'))
    with pytest.raises(PriorError, match=r"format_version: .* 2\); run: bpgo-video priors"):
        load_priors(directory, {"clip": "v1"})
