"""Sampling ahead: which weights sample which step, pauses, requests, and resumed runs, with numbers for weights."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

import pytest
import torch
import yaml

from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.config.reading import config_from_dict, to_yaml
from bpgo_video.distributed.heartbeat import Heartbeat
from bpgo_video.rollouts.updates import EXACT, OLDER, UpdateStats
from bpgo_video.training import loop, rl
from bpgo_video.training.lease import Lease
from bpgo_video.training.metrics import RunLog
from bpgo_video.training.run_folder import check_run_dir
from bpgo_video.training.sampling import Rollout
from bpgo_video.training.stopping import Request, StopRequests
from bpgo_video.training.summary import diagnose
from tests.made.recipes import RECIPE, small_recipe

STEPS = 12
Saves = dict[int, tuple[dict[str, Any], str]]  # by step: progress and weights


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def tree(**changes: dict[str, Any]) -> dict[str, Any]:
    """The demo recipe with `rollout.sample_ahead` and further changes by section."""
    found = yaml.safe_load(RECIPE.read_text())
    settings = {"rollout": {"sample_ahead": True}, "run": {"save_minutes": 0.0}, "bpgo": {"alpha": 0.0}}
    for section, values in settings.items():
        changes[section] = {**values, **changes.get(section, {})}
    return {**found, **{section: {**found.get(section, {}), **values} for section, values in changes.items()}}


class Toy(rl.RL):
    """The trainer with weights that are a number, which each update hashes with what it learns from."""

    def __init__(self, config: Config, saved: tuple[dict[str, Any], str] | None = None) -> None:
        self.progress, self.next_rollout, self.heartbeat = rl.Progress(), None, MagicMock(spec=Heartbeat)
        self.warned = set()
        weights = "start"
        if saved is not None:
            progress, weights = copy.deepcopy(saved)
            vars(self.progress).update(progress)
        engine = SimpleNamespace(weights=weights, learning_rate=0.1, stage=3)
        parts = dataclasses.make_dataclass("Parts", ["config", "mesh", "suite", "engine", "old", "averages"])
        self.session = cast(Any, parts(config, SimpleNamespace(is_main=False), MagicMock(), engine, None, ()))

    @property
    def batches(self) -> Iterator[list[int]]:  # type: ignore[override]
        def stream() -> Iterator[list[int]]:
            position = self.progress.position
            while True:
                yield [position, position + 1]
                position += 2

        return cast(Iterator[list[int]], self.__dict__.setdefault("stream", stream()))

    def evaluate(self, step: int, last: bool, log: Any) -> dict[str, float]:
        assert self.next_rollout is None, "a rollout would be scored during the evaluation"
        return {}


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions of a step, on the toy's numbers."""

    def sample(session: Any, prompts: list[int], step: int, watch: Any, after: Any = None) -> Any:
        rollout = MagicMock(spec=Rollout, prompts=prompts, age=int(after is not None))
        rollout.trajectories = digest("rollout", session.engine.weights, prompts, step)
        rollout.rewards.return_value.total = torch.ones(len(prompts))
        return rollout

    def estimate_advantages(session: Any, prompts: Any, rewards: Any, progress: Any) -> str:
        progress.running_rewards = digest(progress.running_rewards, prompts)
        return cast(str, progress.running_rewards)

    def optimise(engine: Any, objective: Any, trajectories: str, updates: int) -> UpdateStats:
        engine.weights = digest("update", engine.weights, trajectories, objective)
        return UpdateStats({EXACT: 0.5}, [])

    def build_objective(session: Any, prompts: Any, advantages: Any, step: int) -> Any:
        objective = digest(prompts, advantages)
        return SimpleNamespace(arranged=lambda trajectories, mesh: (objective, trajectories))

    def step_record(session: Any, rewards: Any, advantages: Any, stats: UpdateStats) -> dict[str, float]:
        return {**stats.metrics, "reward": 0.0, "weights": float(int(session.engine.weights, 16))}

    for function in (sample, estimate_advantages, optimise, step_record):
        monkeypatch.setattr(rl, function.__name__, function)
    monkeypatch.setattr(rl, "to_be_scored", lambda session, prompts, progress: prompts)
    monkeypatch.setattr(rl, "worth_replaying", lambda session, trajectories, advantages: (trajectories, advantages))
    monkeypatch.setattr(rl, "build_objective", build_objective)
    monkeypatch.setattr(loop.checkpoint, "Saver", MagicMock())


def run(
    monkeypatch: pytest.MonkeyPatch,
    config: Config,
    saved: tuple[dict[str, Any], str] | None = None,
    requests: Mapping[int, Request] = {},
) -> tuple[dict[int, dict[str, float]], Saves]:
    """Records by step and checkpoints; `requests` come during a step, and are there until a checkpoint."""
    trainer, records, saves = Toy(config, saved), dict[int, dict[str, float]](), Saves()
    waiting: list[Request] = []

    def agreed() -> Request:
        if (step := trainer.progress.step - 1) in requests:
            waiting.append(requests[step])
        return max(waiting, default=Request.NONE)

    def save(saver: object, session: Any, progress: Any) -> None:
        assert trainer.next_rollout is None, "a checkpoint does not hold the next rollout"
        saves[progress.step] = (copy.deepcopy(vars(progress)), session.engine.weights)

    monkeypatch.setattr(loop, "save", save)
    asked = MagicMock(spec=StopRequests, agreed=agreed, fulfilled=lambda *_: waiting.clear())
    log = MagicMock(spec=RunLog, log=records.__setitem__)
    loop.run_steps(trainer, 0.0, log, MagicMock(spec=Lease), asked, MagicMock(spec=Heartbeat))
    return records, saves


def same(one: Mapping[int, dict[str, float]], other: Mapping[int, dict[str, float]]) -> bool:
    def timeless(record: dict[str, float]) -> dict[str, float]:
        return {key: value for key, value in record.items() if not key.startswith("seconds")}

    return {step: timeless(record) for step, record in one.items()} == {
        step: timeless(record) for step, record in other.items()
    }


def ahead_in(records: Mapping[int, dict[str, float]]) -> list[int]:
    assert all((OLDER in record) != (EXACT in record) for record in records.values())
    return [step for step, record in records.items() if OLDER in record]


def ahead(**run: Any) -> Config:
    config = config_from_dict(tree(run={"num_steps": STEPS, "save_every": 5, **run}, evaluation={"every": 4}))
    assert isinstance(config, Config)
    return config


def test_steps_after_checkpoints_and_evaluations_are_sampled_with_the_new_weights(
    toys: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, saves = run(monkeypatch, ahead())
    assert list(records) == list(range(STEPS))
    assert ahead_in(records) == [1, 2, 3, 6, 7, 9, 11]  # pauses after 4, 5, 8, 10 and 12 steps
    assert list(saves) == [5, 10, 12]
    progress, _ = saves[5]
    assert (progress["position"], progress["sampled_ahead"], progress["max_ratio_error_first_update"]) == (10, 3, 0.5)


def test_a_run_resumed_from_any_checkpoint_repeats_the_numbers(toys: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from one on request, which waits until nothing is sampled ahead of it, and changes later numbers."""
    config = ahead()
    whole, saves = run(monkeypatch, config)
    asked, more = run(monkeypatch, config, requests={0: Request.SAVE})
    assert set(more) == {2, *saves}, "a request during step 0, in which step 1 was sampled"
    assert ahead_in(asked)[:2] == [1, 3]
    assert not same(asked, whole)
    for expected, found in ((whole, saves), (asked, more)):
        for step, saved in found.items():
            if step < STEPS:
                rest, _ = run(monkeypatch, config, saved)
                assert same(rest, {number: record for number, record in expected.items() if number >= step})


def test_a_stop_ends_the_run_at_a_checkpoint_that_continues_it(toys: None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ahead()
    for step, end in ((1, 3), (3, 4)):  # nothing is sampled during step 3, after which the run is evaluated
        records, saves = run(monkeypatch, config, requests={step: Request.STOP})
        assert list(records) == list(range(end))
        assert list(saves) == [end]
        expected, _ = run(monkeypatch, config, requests={step: Request.SAVE})
        assert same(records | run(monkeypatch, config, saves[end])[0], expected)


def test_without_it_every_step_is_sampled_with_the_new_weights(toys: None, monkeypatch: pytest.MonkeyPatch) -> None:
    off = tree(run={"num_steps": STEPS, "save_every": 5}, rollout={"sample_ahead": False})
    records, saves = run(monkeypatch, cast(Config, config_from_dict(off)), requests={1: Request.SAVE})
    assert ahead_in(records) == []
    assert list(saves) == [2, 5, 10, 12]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": {"save_minutes": 30.0}}, r"run\.save_minutes is 30 .*the clock would change.*set it to 0"),
        ({"run": {"save_every": 1}}, r"run\.save_every is 1 and evaluation\.every is 50 .*raise them"),
        ({"evaluation": {"every": 1}}, r"run\.save_every is 50 and evaluation\.every is 1 .*raise them"),
        ({"rollout": {"score_ahead": 0}}, r"rollout\.score_ahead is 0.*set one of them to its default"),
        ({"prior": {"kind": "first_frame"}}, r"prior\.kind is 'first_frame'.*set it to 'reference'"),
        (
            {"loss": {"objective": "awm", "step_weights": "none"}, "rollout": {"same_start": False}},
            r"rollout\.sample_ahead is True with loss\.objective = 'awm', which records no log-prob of the policy that "
            r"sampled; set it to False, or the objective to 'policy_gradient'",
        ),
    ],
)
def test_what_does_not_go_with_sampling_ahead_is_refused(changes: dict[str, Any], message: str) -> None:
    config_from_dict(tree())
    with pytest.raises(ConfigError, match=message):
        config_from_dict(tree(**changes))


def test_offloaded_rewards_are_refused_and_the_clock_is_off_by_itself() -> None:
    broken = tree()
    broken["rewards"]["motion"]["offload"] = True
    with pytest.raises(ConfigError, match=r"rewards\.motion\.offload is true.*score during updates"):
        config_from_dict(broken)
    shipped = tree()
    del shipped["run"]["save_minutes"]
    assert config_from_dict(shipped, written={"rollout.sample_ahead"}).run.save_minutes == 0


def test_the_policy_that_sampled_can_be_the_reference_with_one_update() -> None:
    loss, optim = {"kl_weight": 1.0, "kl_reference": "previous"}, {"updates_per_rollout": 1}
    config_from_dict(tree(loss=loss, optim=optim))
    with pytest.raises(ConfigError, match="the policy is then the one that sampled"):
        config_from_dict(tree(loss=loss, optim=optim, rollout={"sample_ahead": False}))


def test_a_resume_keeps_the_steps_that_are_sampled_ahead(tmp_path: Path) -> None:
    for sample_ahead in (True, False):
        folder = tmp_path / str(sample_ahead)
        rollout = {"sample_ahead": sample_ahead}
        settings = {"resume": "auto", "save_minutes": 0.0, "save_every": 5}
        saved = small_recipe(folder, tmp_path, run=settings, rollout=rollout)
        os.mkdir(folder)
        (folder / "config.yaml").write_text(to_yaml(saved))
        (folder / "metrics.jsonl").touch()
        check_run_dir(small_recipe(folder, tmp_path, run=settings | {"num_steps": 99}, rollout=rollout))
        changed = small_recipe(folder, tmp_path, run=settings | {"save_every": 6}, rollout=rollout)
        if sample_ahead:
            with pytest.raises(ConfigError, match=r"other run\.save_every \(after which rollout\.sample_ahead"):
                check_run_dir(changed)
        else:
            check_run_dir(changed)
        with pytest.raises(ConfigError, match="other rollout settings"):
            check_run_dir(small_recipe(folder, tmp_path, run=settings, rollout={"sample_ahead": not sample_ahead}))


def test_the_diagnosis_says_why_ratios_differ_from_one() -> None:
    exact = {"step": 0, EXACT: 0.0, "clip_fraction": 0.0}
    older = {"step": 1, OLDER: 0.004, "clip_fraction": 0.25}
    (sentence,) = diagnose([exact, older, older], {})
    assert sentence.startswith("Sampled ahead: 2 of 3 rollouts, with the weights before the last step's update.")
    assert "differed from 1 by up to 0.004, as it should, and 25% of their ratios" in sentence
    assert not any("ahead" in sentence for sentence in diagnose([exact], {}))
