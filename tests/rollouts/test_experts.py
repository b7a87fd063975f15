"""Policies of two transformers: trained steps, guidance, refused recipes, and updated transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.diffusion.sde import SAMPLERS
from bpgo_video.diffusion.steps import step_weights
from bpgo_video.distributed.optimizer import TouchedParts, trained_parts
from bpgo_video.policies import Policy
from bpgo_video.rollouts.denoiser import training_denoiser
from bpgo_video.rollouts.replay import Replay
from bpgo_video.rollouts.rules import check_experts, trainable_steps, trained_steps_of
from tests.families import CASES

HIGH, LOW = (0, 1), (2, 3, 4)  # of six steps, as the boundary is .875 and the shift 3; the last is never trained


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder = tmp_path_factory.mktemp("experts") / "pipeline"
    CASES["wan22"].write(folder)
    return CASES["wan22"].policy(folder, components=("transformer",))


def config_of(policy: Policy, trained: tuple[str, ...] = (), **sections: dict[str, Any]) -> Config:
    config = CASES["wan22"].recipe(policy.folder)
    sections["sampler"] = {"num_steps": 6, **sections.get("sampler", {})}
    config = replace(config, policy=replace(config.policy, trained=trained))
    return replace(config, **{name: replace(getattr(config, name), **values) for name, values in sections.items()})


def replay_of(policy: Policy, config: Config) -> Replay:
    nothing: Any = None
    return Replay(policy, config, nothing, nothing, 0, torch.device("cpu"))


@pytest.mark.parametrize(
    ("trained", "steps"),
    [
        ((), HIGH + LOW),
        (("transformer",), HIGH),
        (("transformer_2",), LOW),
        (("transformer_2", "transformer"), HIGH + LOW),
    ],
)
def test_only_steps_of_trained_transformers_are_trained(
    policy: Policy, trained: tuple[str, ...], steps: tuple[int, ...]
) -> None:
    assert trainable_steps(policy, config_of(policy, trained)) == steps
    assert trained_steps_of(policy, config_of(policy, trained), 0)(7) == steps


def test_fractions_and_windows_refer_to_steps_of_trained_transformers(policy: Policy) -> None:
    drawn = config_of(policy, ("transformer_2",), sampler={"train_steps": "random", "train_fraction": 0.67})
    found = {trained_steps_of(policy, drawn, step)(0) for step in range(40)}
    assert found == {(2, 3), (2, 4), (3, 4)}
    window = {"train_steps": "window", "train_fraction": 0.34, "window_every": 1}
    moving = config_of(policy, ("transformer_2",), sampler=window)
    assert [trained_steps_of(policy, moving, step)(0) for step in range(4)] == [(2,), (3,), (4,), (2,)]


def test_step_weights_have_mean_1_over_steps_of_trained_transformers(policy: Policy) -> None:
    config = config_of(policy, ("transformer_2",), loss={"step_weights": "flash"})
    denoiser = training_denoiser(policy, config)
    weights = replay_of(policy, config).step_weights
    assert sum(weights[step] for step in LOW) == pytest.approx(3)
    whole = step_weights("flash", SAMPLERS[denoiser.sampler], denoiser.steps, denoiser.eta)
    for step in range(5):
        assert weights[step] / weights[2] == pytest.approx(whole[step] / whole[2])


def test_each_step_is_guided_by_its_transformers_scale(policy: Policy) -> None:
    one = training_denoiser(policy, config_of(policy, sampler={"guidance_scale": 4.0}))
    two = training_denoiser(policy, config_of(policy, sampler={"guidance_scale": 4.0, "guidance_scale_2": 3.0}))
    assert [one.guidance_at(index) for index in range(6)] == [4.0] * 6
    assert [two.guidance_at(index) for index in range(6)] == [4.0, 4.0, 3.0, 3.0, 3.0, 3.0]


def test_consistent_recipes_are_accepted(policy: Policy) -> None:
    check_experts(policy, config_of(policy, optim={"updates_per_rollout": 5}))
    each = {"train_steps": "random", "train_fraction": 0.5, "share_steps": "group"}
    check_experts(policy, config_of(policy, ("transformer_2",), sampler=each, optim={"updates_per_rollout": 1}))


@pytest.mark.parametrize(
    ("trained", "sections", "message"),
    [
        (("transformer_2",), {"sampler": {"num_steps": 3, "shift": 12.0}},
         r"transformer_2 is trained, but with sampler.num_steps = 3 and sampler.shift = 12.0 it computes only the"),
        (("transformer_2",), {"sampler": {"num_steps": 3, "shift": 100.0}}, "transformer_2 is trained, .* no step"),
        (("transformer",), {"optim": {"updates_per_rollout": 3}},
         r"updates_per_rollout is 3, but a rollout trains 2 of the denoising steps \[0, 1\].*lower it to 2"),
        ((), {"sampler": {"train_steps": "random", "share_steps": "group", "train_fraction": 0.5}},
         r"share_steps is 'group'.*\['transformer', 'transformer_2'\].*'batch'"),
        ((), {"sampler": {"guidance_scale": 1.0, "guidance_scale_2": 3.0}},
         "sampler.guidance_scale_2 is 3.0 with sampler.guidance_scale = 1"),
        ((), {"evaluation": {"guidance_scale": 1.0, "guidance_scale_2": 3.0}}, "evaluation.guidance_scale_2 is 3.0"),
    ],
)  # fmt: skip
def test_inconsistent_recipes_are_refused(
    policy: Policy, trained: tuple[str, ...], sections: dict[str, dict[str, Any]], message: str
) -> None:
    config = config_of(policy, trained, **{"optim": {"updates_per_rollout": 1}, **sections})
    with pytest.raises(ConfigError, match=message):
        check_experts(policy, config)


def test_a_second_guidance_scale_is_refused_for_one_transformer(tmp_path: Path) -> None:
    case = CASES["wan"]
    case.write(tmp_path / "pipeline")
    policy, config = case.policy(tmp_path / "pipeline", components=()), case.recipe(tmp_path / "pipeline")
    check_experts(policy, config)
    config = replace(config, sampler=replace(config.sampler, guidance_scale=4.0, guidance_scale_2=3.0))
    with pytest.raises(ConfigError, match=r"guidance_scale_2 is 3\.0, but the policy has one transformer"):
        check_experts(policy, config)


def test_only_transformers_with_gradients_are_updated() -> None:
    parts = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2), "frozen": nn.Linear(2, 2)})
    parts["frozen"].requires_grad_(False)
    assert trained_parts(parts) == [parts["first"], parts["second"]]
    stepped: list[int] = []
    groups = [{"part": 0}, {"part": 0}, {"part": 1}, {"part": 1}]  # a part has one group per dtype
    zero = SimpleNamespace(
        _optimizer_step=stepped.append,
        sub_group_to_group_id={0: 0, 1: 0, 2: 1, 3: 2, 4: 3},
        optimizer=SimpleNamespace(param_groups=groups),
    )
    engine = SimpleNamespace(optimizer=zero, zero_cpu_offload=lambda: False)
    touched = TouchedParts(trained_parts(parts), stage=3)
    touched.attach(engine)
    with torch.no_grad():
        parts["first"](torch.ones(1, 2))
    parts["second"](torch.ones(1, 2))
    for number in range(5):
        zero._optimizer_step(number)
    assert stepped == [3, 4]


def test_optimizers_that_update_all_parameters_together_are_refused() -> None:
    engine = SimpleNamespace(optimizer=SimpleNamespace(_optimizer_step=None), zero_cpu_offload=lambda: True)
    with pytest.raises(ConfigError, match="2 transformers are trained under ZeRO 2 with an offloaded optimizer"):
        TouchedParts([nn.Linear(1, 1), nn.Linear(1, 1)], stage=2).attach(engine)
