"""Estimation of advantages during training: anchors of earlier batches, second scorings, and running averages."""

from types import SimpleNamespace

import pytest
import torch

from bpgo_video.config.learner import (
    AdvantageConfig,
    BPGOConfig,
    CreditConfig,
    LossConfig,
    PriorConfig,
    ReliabilityConfig,
)
from bpgo_video.learner.bpgo import step_advantages
from bpgo_video.learner.priors import PRIORS, PriorInputs
from bpgo_video.learner.trust import group_icc, pooled_icc
from bpgo_video.training.estimation import Memory, estimate_advantages, to_be_scored
from bpgo_video.training.session import Session
from bpgo_video.types import PromptBatch, Rewards

PROMPTS = PromptBatch(torch.tensor([4, 9]), ("first", "second"), {})


def rewards_of(seed: int, second: bool = False) -> Rewards:
    rng = torch.Generator().manual_seed(seed)
    scores, again = torch.randn(2, 6, generator=rng), torch.randn(2, 6, generator=rng)
    return Rewards(
        {"clip": scores}, scores, {"clip": scores[..., None]}, {"clip": None}, {"clip": again} if second else {}
    )


def session(bpgo: BPGOConfig, prior: PriorConfig, reliability: ReliabilityConfig = ReliabilityConfig()) -> Session:  # noqa: B008
    """A session with only the parts that the estimation needs."""
    config = SimpleNamespace(
        prior=prior,
        bpgo=bpgo,
        reliability=reliability,
        advantage=AdvantageConfig(),
        credit=CreditConfig(),
        loss=LossConfig(),
        video=None,
    )
    found = object.__new__(Session)
    parts = {"config": config, "suite": SimpleNamespace(versions={"clip": "v1"}, weights={"clip": 1.0}), "policy": None}
    for name, part in parts.items():
        object.__setattr__(found, name, part)
    return found


@pytest.mark.parametrize("kind", ["ema", "global"])
def test_a_running_prior_uses_earlier_batches_but_not_the_current_one(kind: str) -> None:
    prior, settings, memory = PriorConfig(kind=kind), BPGOConfig(), Memory()
    running = memory.running_rewards
    for seed in range(3):
        rewards = rewards_of(seed)
        before = {name: dict(values) for name, values in running.items()}
        found = estimate_advantages(session(settings, prior), PROMPTS, rewards, memory)
        anchors = PRIORS[kind](prior, PriorInputs(PROMPTS, {"clip": "v1"}, rewards.by_name, before))
        expected = step_advantages(rewards.by_name, anchors, {"clip": 1.0}, settings)
        assert torch.equal(found.trust, expected.trust)
        assert torch.equal(found.contrastive, expected.contrastive)
        assert running != before
        assert set(running["clip"]["prompts"]) == {4, 9}


def test_a_constant_prior_keeps_no_averages() -> None:
    memory = Memory()
    estimate_advantages(session(BPGOConfig(), PriorConfig(kind="constant")), PROMPTS, rewards_of(0), memory)
    assert memory == Memory()


def test_second_scores_affect_the_trust() -> None:
    settings = BPGOConfig(trust="reliability", zeta=0.0)
    rewards = rewards_of(3, second=True)
    found = estimate_advantages(session(settings, PriorConfig(kind="none")), PROMPTS, rewards)
    icc = group_icc(torch.stack([rewards.by_name["clip"], rewards.second["clip"]], dim=2))
    expected = step_advantages(rewards.by_name, {}, {"clip": 1.0}, settings, icc={"clip": icc})
    assert torch.equal(found.trust, expected.trust)
    assert found.trust.std() > 0
    assert "icc/clip" in found.metrics


def test_a_prompt_with_high_icc_is_scored_once_with_its_last_icc() -> None:
    learner, memory = BPGOConfig(trust="reliability", zeta=0.0), Memory()
    rescoring = session(learner, PriorConfig(kind="none"), ReliabilityConfig(rescore_below=0.5, rescore_every=3))
    first = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    again = torch.stack([first[0] + 3.0, -first[1]])  # prompt 4 agrees with itself, prompt 9 is reversed
    scored_twice, trusts = [], []
    for _ in range(4):
        prompts = to_be_scored(rescoring, PROMPTS, memory)
        scored_twice.append(prompts.twice.tolist())
        second = again.masked_fill(~prompts.twice[:, None], torch.nan)
        rewards = Rewards({"clip": first}, first, {"clip": first[..., None]}, {"clip": None}, {"clip": second})
        found = estimate_advantages(rescoring, prompts, rewards, memory)
        trusts.append(found.trust.tolist())
        pairs = torch.stack([first, again], dim=2)[prompts.twice]
        assert found.metrics["icc/clip"].item() == pytest.approx(float(pooled_icc(pairs)), rel=1e-5)
    assert scored_twice == [[True, True], [False, True], [False, True], [True, True]]
    assert trusts == [pytest.approx([1.5, 0.5])] * 4
    assert to_be_scored(session(BPGOConfig(), PriorConfig()), PROMPTS, memory).twice is None
