"""Runs whose reward is hacked by construction: they train redness, and hold out its opposite."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bpgo_video.config.bpgo import RewardConfig
from bpgo_video.config.reading import to_yaml
from bpgo_video.data.records import encoder_stamp
from bpgo_video.data.writer import build_shards
from bpgo_video.files import resolve_folder
from bpgo_video.policies import load_policy
from bpgo_video.training.metrics import read_metrics
from tests.distributed.sameness import assert_same_run, records
from tests.distributed.test_failures import TRAIN, Launch, Launches
from tests.made.recipes import rewarded_by, small_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = "16"
COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("circle", "square", "triangle")


class Hacked(Launches):
    """Launches of the recipe of a hacked reward, on two ranks."""

    def __init__(self, folder: Path) -> None:
        lines = [
            {"prompt": f"a {colour} {shape}", "split": "heldout" if shape != "triangle" else "train"}
            for colour in COLOURS
            for shape in SHAPES
        ]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        config = small_recipe(folder / "unused", folder / "shards", run={"num_steps": int(STEPS), "resume": "auto"})
        where, length = config.policy.folder, config.policy.max_sequence_length
        policy = load_policy(where, components=("text_encoder",), max_sequence_length=length)
        build_shards(
            [folder / "prompts.jsonl"], folder / "shards", policy.encode, encoder_stamp(resolve_folder(where), length)
        )
        super().__init__(folder, folder / "shards")
        heldout = {"cyan": RewardConfig(model="tests.distributed.toy_rewards:Cyan")}
        evaluation = replace(config.evaluation, rewards=heldout, every=8)
        config = rewarded_by(config, "tests.distributed.toy_rewards:Redness")
        config = replace(config, evaluation=evaluation, loss=replace(config.loss, kl_weight=0.1))
        config = replace(config, optim=replace(config.optim, learning_rate=1e-3))
        (folder / "recipe.yaml").write_text(to_yaml(config))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Launch]:
    launches, found = Hacked(tmp_path_factory.mktemp("hacked")), {}
    try:
        for kind in ("warn", "stop", "kl"):
            found[kind] = launches.ranks(TRAIN, kind, "--evaluation.alarm", kind).end()
        found["stop again"] = launches.ranks(TRAIN, "stop", "--evaluation.alarm", "stop").end()
        halves = ("--evaluation.alarm", "kl", "--run.save-every", "4")
        first = launches.ranks(TRAIN, "halves", *halves)
        metrics = first.run_dir / "metrics.jsonl"
        first.wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 9)
        (first.run_dir / "save_quit").touch()
        found["first half"] = first.end()
        found["halves"] = launches.ranks(TRAIN, "halves", *halves).end()
    finally:
        launches.end_what_is_left()
    assert all(launch.codes == [0, 0] for launch in found.values()), [
        launch.output[-3000:] for launch in found.values()
    ]
    return found


def summary(launch: Launch) -> dict[str, object]:
    return json.loads((launch.run_dir / "summary.json").read_text())


def test_a_hacked_reward_is_said_once_and_recorded(runs: dict[str, Launch]) -> None:
    launch = runs["warn"]
    assert launch.output.count("reward hacking: held-out cyan fell") == 1
    evaluated = [
        record["alarm/cyan"] for record in read_metrics(launch.run_dir / "metrics.jsonl") if "alarm/cyan" in record
    ]
    assert evaluated[-1] == 1.0
    found = summary(launch)
    assert found["steps"] == int(STEPS)
    assert set(found["alarms"]) == {"cyan"}
    assert any("Reward hacking" in sentence for sentence in found["diagnosis"])
    assert "Reward hacking" in (launch.run_dir / "report.html").read_text()


def test_a_run_that_stops_has_its_results_and_stays_ended(runs: dict[str, Launch]) -> None:
    launch = runs["stop"]
    found = summary(launch)
    step = found["alarms"]["cyan"]
    assert found["steps"] == step == 8
    assert f"The run ended after step {step} of {STEPS}" in launch.output
    assert len(read_metrics(launch.run_dir / "metrics.jsonl")) == step
    assert launch.checkpoint == f"step-{step:06d}"
    for name in ("report.html", "export/model_index.json", f"samples/step-{step:06d}"):
        assert (launch.run_dir / name).exists(), name
    assert summary(runs["stop again"])["steps"] == step


def test_a_raised_kl_weight_survives_a_resume_to_the_bit(runs: dict[str, Launch]) -> None:
    weights = [record["kl_weight"] for record in read_metrics(runs["kl"].run_dir / "metrics.jsonl")]
    assert weights[:8] == [0.1] * 8
    assert weights[8:] == [pytest.approx(0.4)] * 8
    assert records(runs["halves"].run_dir) == records(runs["kl"].run_dir)
    assert_same_run(runs["kl"].run_dir, runs["halves"].run_dir)
    assert "stopped on request" in runs["first half"].output
