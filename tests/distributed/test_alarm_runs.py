"""Runs whose reward is hacked by construction: they train redness, and hold out its opposite."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

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

STEPS, ALARM = 16, 8
COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("circle", "square", "triangle")


class Hacked(Launches):
    """Launches of the recipe of a hacked reward, on two ranks."""

    def __init__(self, folder: Path) -> None:
        texts = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
        lines = [{"prompt": text, "split": "heldout"} for text in texts]
        lines += [{"prompt": f"a {colour} circle moving up", "split": "train"} for colour in COLOURS]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        run = {"num_steps": STEPS, "resume": "auto", "save_every": ALARM}
        config = small_recipe(folder / "unused", folder / "shards", run=run)
        where, length = config.policy.folder, config.policy.max_sequence_length
        policy = load_policy(where, components=("text_encoder",), max_sequence_length=length)
        stamp = encoder_stamp(resolve_folder(where), length)
        build_shards([folder / "prompts.jsonl"], folder / "shards", policy.encode, stamp)
        super().__init__(folder, folder / "shards")
        heldout = {"cyan": RewardConfig(model="tests.distributed.toy_rewards:Cyan")}
        config = replace(
            rewarded_by(config, "tests.distributed.toy_rewards:Redness"),
            evaluation=replace(config.evaluation, rewards=heldout, every=ALARM),
            optim=replace(config.optim, learning_rate=5e-3, max_grad_norm=0.0),
            loss=replace(config.loss, kl_weight=1e-3, clip_range=(0.5, 0.5)),
            bpgo=replace(config.bpgo, alpha=0.0, zeta=0.0),
            ema=replace(config.ema, decay=0.9),
        )
        (folder / "recipe.yaml").write_text(to_yaml(config))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Launch]:
    launches, found = Hacked(tmp_path_factory.mktemp("hacked")), {}
    try:
        for kind in ("warn", "stop", "kl"):
            found[kind] = launches.ranks(TRAIN, kind, "--evaluation.alarm", kind).end()
        found["stop again"] = launches.ranks(TRAIN, "stop", "--evaluation.alarm", "stop").end()
        first = launches.ranks(TRAIN, "halves", "--evaluation.alarm", "kl")
        metrics = first.run_dir / "metrics.jsonl"
        first.wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > ALARM)
        (first.run_dir / "save_quit").touch()
        found["first half"] = first.end()
        found["halves"] = launches.ranks(TRAIN, "halves", "--evaluation.alarm", "kl").end()
    finally:
        launches.end_what_is_left()
    for launch in found.values():
        assert launch.codes == [0, 0], launch.output[-3000:]
    return found


def summary(launch: Launch) -> dict[str, Any]:
    return json.loads((launch.run_dir / "summary.json").read_text())


def test_a_hacked_reward_is_said_once_and_recorded(runs: dict[str, Launch]) -> None:
    launch = runs["warn"]
    assert launch.output.count("reward hacking: held-out cyan fell") == 1
    alarms = [record.get("alarm/cyan") for record in read_metrics(launch.run_dir / "metrics.jsonl")]
    at = {step: alarm for step, alarm in enumerate(alarms, start=1) if alarm is not None}
    assert at == {ALARM: 1.0, STEPS: 1.0}
    found = summary(launch)
    assert (found["steps"], found["alarms"], found["ended"]) == (STEPS, {"cyan": ALARM}, None)
    assert any("Reward hacking" in sentence for sentence in found["diagnosis"])
    assert "Reward hacking" in (launch.run_dir / "report.html").read_text()


def test_a_run_that_stops_has_its_results_and_stays_ended(runs: dict[str, Launch]) -> None:
    launch = runs["stop"]
    assert summary(launch)["steps"] == ALARM
    assert f"The run ended after step {ALARM} of {STEPS}" in launch.output
    assert len(read_metrics(launch.run_dir / "metrics.jsonl")) == ALARM
    assert launch.checkpoint == f"step-{ALARM:06d}"
    for name in ("report.html", "export/model_index.json", f"samples/step-{ALARM:06d}"):
        assert (launch.run_dir / name).exists(), name
    assert f"The run ended after step {ALARM}" in runs["stop again"].output


def test_a_raised_kl_weight_survives_a_resume_to_the_bit(runs: dict[str, Launch]) -> None:
    weights = [record["kl_weight"] for record in read_metrics(runs["kl"].run_dir / "metrics.jsonl")]
    assert weights == pytest.approx([1e-3] * ALARM + [4e-3] * (STEPS - ALARM))
    assert "stopped on request" in runs["first half"].output
    assert records(runs["halves"].run_dir) == records(runs["kl"].run_dir)
    assert_same_run(runs["kl"].run_dir, runs["halves"].run_dir)
