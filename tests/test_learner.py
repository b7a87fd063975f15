"""What the loop makes of a step's rewards: anchors that were there before, second scores, averages after use."""

from types import SimpleNamespace

import pytest
import torch

from bpgo_video.advantages import AdvantageSettings
from bpgo_video.bpgo import bpgo_advantages
from bpgo_video.bpgo_settings import BPGOSettings
from bpgo_video.learner_config import CreditConfig, PriorConfig
from bpgo_video.priors import PRIORS, Seen
from bpgo_video.session import Session
from bpgo_video.trainer import estimate_advantages
from bpgo_video.types import PromptBatch, Rewards

PROMPTS = PromptBatch(torch.tensor([4, 9]), ("first", "second"), {})


def rewards_of(seed: int, second: bool = False) -> Rewards:
    rng = torch.Generator().manual_seed(seed)
    scores, again = torch.randn(2, 6, generator=rng), torch.randn(2, 6, generator=rng)
    return Rewards(
        {"clip": scores}, scores, {"clip": scores[..., None]}, {"clip": None}, {"clip": again} if second else {}
    )


def session(learner: BPGOSettings, prior: PriorConfig) -> Session:
    """The parts that advantages are estimated with, and no others."""
    parts = {
        "config": SimpleNamespace(prior=prior, credit=CreditConfig()),
        "suite": SimpleNamespace(versions={"clip": "v1"}, weights={"clip": 1.0}),
        "learner": learner,
        "advantages": AdvantageSettings(),
    }
    found = object.__new__(Session)
    for name, part in parts.items():
        object.__setattr__(found, name, part)
    return found


@pytest.mark.parametrize("kind", ["ema", "global"])
def test_a_running_prior_sees_the_batches_before_and_not_this_one(kind: str) -> None:
    prior, settings, running = PriorConfig(kind=kind), BPGOSettings(), {}
    for seed in range(3):
        rewards = rewards_of(seed)
        before = {name: dict(values) for name, values in running.items()}
        found = estimate_advantages(session(settings, prior), PROMPTS, rewards, running)
        anchors = PRIORS[kind](prior, Seen(PROMPTS, {"clip": "v1"}, rewards.by_name, before))
        expected = bpgo_advantages(rewards.by_name, anchors, {"clip": 1.0}, settings)
        assert torch.equal(found.trust, expected.trust)
        assert torch.equal(found.contrastive, expected.contrastive)
        assert running != before
        assert set(running["clip"]["prompts"]) == {4, 9}


def test_a_prior_that_follows_nothing_keeps_no_averages() -> None:
    running = {}
    estimate_advantages(session(BPGOSettings(), PriorConfig(kind="constant")), PROMPTS, rewards_of(0), running)
    assert running == {}


def test_second_scores_reach_the_trust() -> None:
    settings = BPGOSettings(trust="reliability", zeta=0.0)
    rewards = rewards_of(3, second=True)
    found = estimate_advantages(session(settings, PriorConfig(kind="none")), PROMPTS, rewards)
    expected = bpgo_advantages(rewards.by_name, {}, {"clip": 1.0}, settings, second=rewards.second)
    assert torch.equal(found.trust, expected.trust)
    assert found.trust.std() > 0
    assert "icc/clip" in found.metrics
