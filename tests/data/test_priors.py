"""Priors stored with prompts: values round-trip, and stale or truncated values are refused."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch

from bpgo_video.data.priors import PriorError, UnfinishedPriors, load_priors, write_priors
from bpgo_video.data.reader import PromptShards
from bpgo_video.data.records import EncoderStamp, PromptRecord
from bpgo_video.data.stream import PromptStream
from bpgo_video.distributed.heartbeat import Heartbeat
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.training import estimation
from bpgo_video.types import PromptBatch
from tests.made.prompt_folders import write_shards
from tests.made.recipes import PROMPTS, make_shards, small_recipe


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


def test_a_batch_contains_its_priors(directory: Path) -> None:
    anchors = {1000 + i: (i / 7, i / 100, 16) for i in reversed(range(20))}
    write_priors(directory, "clip", "v1", 0.25, "policyhash", anchors)
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
    write_priors(directory, "clip", "v1", 0.25, "policyhash", {1003: (0.0, 0.0, 8)})
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
        ("[NaN, 0.2, 4]", "the mean of prompt 1004 is nan: .*finite number"),
        ("[-Infinity, 0.2, 4]", "the mean of prompt 1004 is -inf: .*finite number"),
        ("[0.1, -0.2, 4]", "the standard deviation of prompt 1004 is -0.2: .*greater than or equal to 0"),
        ("[0.1, 0.2, 0]", "the number of samples of prompt 1004 is 0: .*greater than or equal to 1"),
        ("[0.1]", "anchors.1004.1: Field required"),
    ],
)
def test_a_prior_with_an_impossible_value_names_file_prompt_and_value(
    directory: Path, anchor: str, problem: str
) -> None:
    path = write_priors(directory, "clip", "v1", 0.25, "policyhash", {1003: (0.1, 0.2, 4), 1004: (0.0, 0.0, 1)})
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
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(PriorError("it is missing")) == f"it is missing; run: {command}"


def test_an_invalid_prior_is_not_written(directory: Path) -> None:
    with pytest.raises(ValueError, match=r"scale\n.*greater than 0"):
        write_priors(directory, "clip", "v1", 0.0, "p", {1: (0.0, 0.0, 8)})
    with pytest.raises(ValueError, match="finite number"):
        write_priors(directory, "clip", "v1", 1.0, "p", {1: (float("nan"), 0.0, 8)})
    with pytest.raises(ValueError, match="reward name"):
        write_priors(directory, "../clip", "v1", 1.0, "p", {})
    assert not list(directory.glob("priors/*"))


FIRST, SECOND = {7: {"clip": [0.25, 0.5]}}, {9: {"clip": [0.1, 0.3]}}


def test_notes_are_read_back_without_a_truncated_line(tmp_path: Path) -> None:
    notes = UnfinishedPriors(tmp_path, {"seed": "0"})
    assert notes.begin() == {}
    notes.add(FIRST)
    notes.add(SECOND)
    notes.path.write_text(notes.path.read_text() + '{"id": 11, "sco')
    assert UnfinishedPriors(tmp_path, {"seed": "0"}).begin() == FIRST | SECOND
    notes.add({11: {"clip": [0.2]}})
    assert notes.begin() == FIRST | SECOND | {11: {"clip": [0.2]}}
    notes.remove()
    assert notes.begin() == {}


def test_notes_of_other_settings_are_replaced(tmp_path: Path) -> None:
    UnfinishedPriors(tmp_path, {"seed": "0"}).begin()
    UnfinishedPriors(tmp_path, {"seed": "0"}).add(FIRST)
    other = UnfinishedPriors(tmp_path, {"seed": "1"})
    assert other.begin() == {}
    other.add(SECOND)
    assert other.begin() == SECOND
    assert UnfinishedPriors(tmp_path, {"seed": "0"}).begin() == {}


def test_an_interrupted_estimation_resumes_to_the_same_priors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = make_shards(tmp_path / "shards")
    config = small_recipe(tmp_path / "run", shards, prior={"kind": "reference", "samples": 4})
    mesh, score, sampled = Mesh(0, 1, torch.device("cpu")), estimation.score_prompts, []

    def until_the_third(*arguments: object) -> object:
        prompts = arguments[2]
        assert isinstance(prompts, PromptBatch)
        sampled.extend(prompts.ids.tolist())
        if len(sampled) == 3:
            raise KeyboardInterrupt
        return score(*arguments)

    whole = estimation.estimate_priors(config, mesh, Heartbeat(mesh, timeout=60))
    files = {path: path.read_bytes() for path in (shards / "priors").glob("*.json")}
    assert len(files) == len(config.rewards)
    for path in files:
        path.unlink()
    monkeypatch.setattr(estimation, "PROMPTS_AT_ONCE", 1)
    monkeypatch.setattr(estimation, "score_prompts", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        estimation.estimate_priors(config, mesh, Heartbeat(mesh, timeout=60))
    again = estimation.estimate_priors(config, mesh, Heartbeat(mesh, timeout=60))
    assert len(sampled) == len(PROMPTS["train"]) + 1, "only the interrupted prompts are sampled again"
    for name, scores in whole.items():
        torch.testing.assert_close(again[name], scores, rtol=0, atol=1e-5)  # batches of another shape
    assert {path.name for path in (shards / "priors").iterdir()} == {path.name for path in files}
