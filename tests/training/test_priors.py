"""Measuring priors on the embedded policy: interrupted, extended and replaced tables, samples as training makes them.

All videos of a measurement have the same batch shape, so that tables are compared to the bit.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.data.priors import PriorError, PriorTable, load_priors, prior_path
from bpgo_video.data.reader import PromptShards
from bpgo_video.distributed.heartbeat import Heartbeat
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.rewards import Clips, FrameSampling, FrameScores
from bpgo_video.rollouts.denoiser import Denoiser
from bpgo_video.rollouts.paths import PartialPath
from bpgo_video.rollouts.prior_sampling import check_anchors, positions_of
from bpgo_video.training import priors, session
from bpgo_video.training.inputs import check_inputs
from tests.made.recipes import PROMPTS, make_shards, rewarded_by, small_recipe

MESH = Mesh(0, 1, torch.device("cpu"))
REDNESS = "tests.distributed.toy_rewards:Redness"


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("priors") / "shards")


@pytest.fixture
def config(tmp_path: Path, embedded: Path) -> Config:
    """Two pairs of each of two prompts: the run has one step of two of the four."""
    shards = shutil.copytree(embedded, tmp_path / "shards")
    prior = {"kind": "reference", "samples": 4}
    config = small_recipe(tmp_path / "run", shards, prior=prior, sampler={"num_steps": 3})
    return replace(rewarded_by(config, REDNESS), deepspeed="zero1")  # without ranks; test_prior_ranks.py has ZeRO-3


def with_steps(config: Config, num_steps: int) -> Config:
    return replace(config, run=replace(config.run, num_steps=num_steps))


def estimate(config: Config) -> PriorTable:
    return priors.estimate_priors(config, MESH, Heartbeat(MESH, timeout=60))["only"]


def counted(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[tuple[int, int]]:
    """The prompts and groups that are sampled from now on; a further group interrupts the command."""
    score, sampled = priors.score_group, []

    def record(*arguments: Any) -> Any:
        if stop_after is not None and len(sampled) >= stop_after:
            raise KeyboardInterrupt
        sampled.extend((id_, arguments[5]) for id_ in arguments[2].ids.tolist())
        return score(*arguments)

    monkeypatch.setattr(priors, "score_group", record)
    return sampled


def table_file(config: Config) -> Path:
    return prior_path(config.data.shards, "only")


def test_an_interrupted_measurement_continues_to_the_same_table(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_steps(config, 2)
    whole = estimate(config)
    assert len(whole.anchors) == len(PROMPTS["train"])
    content = table_file(config).read_bytes()
    table_file(config).unlink()
    with monkeypatch.context() as patched:
        first = counted(patched, stop_after=6)
        with pytest.raises(KeyboardInterrupt):
            estimate(config)
    assert not table_file(config).exists()
    rest = counted(monkeypatch)
    assert estimate(config) == whole
    assert table_file(config).read_bytes() == content
    assert len(first) == 6
    assert sorted(first + rest) == sorted((id_, group) for id_ in whole.anchors for group in (0, 1))
    assert [path.name for path in table_file(config).parent.iterdir()] == ["only.json"]


def test_a_longer_run_measures_only_the_missing_prompts(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = estimate(config)
    assert len(first.anchors) == 2
    assert "2 of the 2 prompts that the run visits have no anchors of these settings\n" in capsys.readouterr().out
    sampled = counted(monkeypatch)
    longer = estimate(with_steps(config, 2))
    assert "2 of the 4 prompts that the run visits have no" in capsys.readouterr().out
    assert {id_ for id_, _ in sampled} == longer.anchors.keys() - first.anchors.keys()
    assert {id_: longer.anchors[id_] for id_ in first.anchors} == first.anchors
    table_file(config).unlink()
    everything = replace(config, prior=replace(config.prior, prompts="all"))
    assert estimate(everything) == longer, "the same in one measurement of all prompts"
    shorter = estimate(config)
    assert shorter == longer, "a shorter run keeps what is stored"


def test_nothing_is_built_or_sampled_if_nothing_is_missing(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    table, content = estimate(config), table_file(config).read_bytes()
    monkeypatch.setattr(priors, "frozen_policy", None)
    assert estimate(replace(config, run=replace(config.run, dir="elsewhere"))) == table
    assert table_file(config).read_bytes() == content


def test_another_seed_has_the_same_anchors(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_steps(config, 2)
    table = estimate(config)
    sampled = counted(monkeypatch)
    other = replace(config, run=replace(config.run, seed=1))
    assert estimate(other) == table
    assert not sampled
    table_file(config).unlink()
    assert estimate(other) == table
    assert len(sampled) == 8


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"sampler": {"eta": 0.5}}, "sampler"),
        ({"video": {"num_frames": 5}}, "video"),
        ({"policy": {"vae_dtype": "bfloat16"}, "rollout": {"guidance_every": 2}}, "policy, sampler"),
        ({"prior": {"samples": 6}}, "draws"),
    ],
)
def test_anchors_of_other_settings_are_replaced_and_a_line_says_so(
    config: Config, changed: dict[str, dict[str, Any]], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = estimate(config)
    capsys.readouterr()
    other = replace(config, **{part: replace(getattr(config, part), **keys) for part, keys in changed.items()})
    second = estimate(other)
    path = re.escape(str(table_file(config)))
    assert re.search(
        rf"2 of the 2 prompts .*; the 2 anchors of {path} were measured with another {name}, and will be replaced\n",
        capsys.readouterr().out,
    )
    assert second.anchors.keys() == first.anchors.keys()
    assert not set(second.anchors.values()) & set(first.anchors.values()), "sampled and scored again"


def test_pairs_share_a_start_and_nothing_else(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    starts, complete = [], Denoiser.complete

    def recorded(self: Denoiser, path: PartialPath, *arguments: Any) -> Any:
        assert path.step == 0, "all steps are stochastic"
        denoised = complete(self, path, *arguments)
        starts.append((path.latents, denoised.latents[:, -1]))
        return denoised

    monkeypatch.setattr(Denoiser, "complete", recorded)
    estimate(config)
    noise, videos = (torch.cat(parts) for parts in zip(*starts, strict=True))
    assert len(noise) == 8
    equal = (noise.flatten(1)[:, None] == noise.flatten(1)).all(dim=2)
    assert torch.equal(equal, torch.block_diag(*[torch.ones(2, 2)] * 4).bool())
    assert len(videos.flatten(1).unique(dim=0)) == 8, "the stochastic steps differ"


def test_a_reward_that_cannot_tell_samples_apart_is_refused(config: Config) -> None:
    config = rewarded_by(config, "tests.training.test_priors:Constant")
    with pytest.raises(ConfigError, match=r"reward 'only': s_ref is 0\.0, .* use another reward"):
        estimate(config)


class Constant:
    """Scores every video 1."""

    name, version, range, kind = "constant", "1", (0.0, 1.0), "test"
    higher_is_better, differentiable, frames = True, False, FrameSampling()

    def __call__(self, clips: Clips) -> FrameScores:
        return FrameScores(torch.ones(len(clips), len(clips.times)), clips.times)


def test_a_run_without_an_anchor_for_each_prompt_ends_before_its_policy_is_built(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimate(config)
    longer = with_steps(config, 2)
    monkeypatch.setattr(session, "sampling_policy", None)
    with pytest.raises(PriorError, match=r"has no anchor for 2 of the 4 prompts that the run visits, the first '"):
        session.build_session(longer, MESH, *check_inputs(longer, MESH))


def test_a_resumed_run_needs_the_anchors_of_the_prompts_ahead(config: Config) -> None:
    estimate(config)
    shards = PromptShards(config.data.shards)
    tables = load_priors(shards.directory, {"only": estimate(config).version})

    def check(positions: range) -> Callable[[], None]:
        return check_anchors(config, shards, tables, positions, "--prior.prompts", "all")

    check(positions_of(config))
    with pytest.raises(PriorError, match=r"2 of the 2 prompts .* bpgo-video priors RECIPE --prior.prompts all$"):
        check(range(2, 4))
    with pytest.raises(PriorError, match=r"2 of the 4 prompts"):
        check(range(10**6, 2 * 10**6))
