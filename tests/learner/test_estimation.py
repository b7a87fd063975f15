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
from bpgo_video.learner.advantages import group_relative
from bpgo_video.learner.agreement import group_icc, pooled_icc
from bpgo_video.learner.bpgo import step_advantages
from bpgo_video.learner.priors import PRIORS, PriorInputs
from bpgo_video.training.estimation import Memory, estimate_advantages, to_be_scored
from bpgo_video.training.session import Session
from bpgo_video.types import PromptBatch, Rewards

PROMPTS = PromptBatch(torch.tensor([4, 9]), ("first", "second"), {})


def rewards_of(seed: int, again: bool = False) -> Rewards:
    rng = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, 6, generator=rng), torch.randn(2, 6, generator=rng)
    return scored(first, {"clip": torch.stack([first, second], dim=2)} if again else {})


def scored(first: torch.Tensor, scorings: dict[str, torch.Tensor]) -> Rewards:
    """As a suite gathers them: the mean of all scorings trains."""
    mean = scorings["clip"].nanmean(dim=2) if scorings else first
    return Rewards({"clip": mean}, mean, {"clip": first[..., None]}, {"clip": None}, scorings)


def session(bpgo: BPGOConfig, prior: PriorConfig, reliability: ReliabilityConfig = ReliabilityConfig()) -> Session:  # noqa: B008
    """A session with only the parts that the estimation needs."""
    config = SimpleNamespace(
        prior=prior,
        bpgo=bpgo,
        trusts={},
        needs_prior=bpgo.needs_prior,
        rescored=("clip",) if bpgo.trust == "reliability" else (),
        reliability=reliability,
        advantage=AdvantageConfig(),
        credit=CreditConfig(),
        loss=LossConfig(),
        video=None,
    )
    found = object.__new__(Session)
    parts = {
        "config": config,
        "suite": SimpleNamespace(trained_versions={"clip": "v1"}, weights={"clip": 1.0}),
        "policy": None,
    }
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


def test_the_mean_of_two_scorings_trains_and_their_agreement_is_the_trust() -> None:
    settings = BPGOConfig(trust="reliability", zeta=0.0)
    rewards = rewards_of(3, again=True)
    found = estimate_advantages(session(settings, PriorConfig(kind="none")), PROMPTS, rewards)
    mean = rewards.scorings["clip"].mean(dim=2)
    c = group_icc(rewards.scorings["clip"]).clamp(0, 1)
    trust = 0.5 + 2 * c / (1 + c)
    torch.testing.assert_close(found.trust, trust.float())
    assert trust.std() > 0
    torch.testing.assert_close(found.advantage, (trust[:, None] * group_relative(mean)).float())
    assert "icc/clip" in found.metrics


def test_a_prompt_with_high_icc_is_scored_once_with_its_last_icc() -> None:
    learner, memory = BPGOConfig(trust="reliability", zeta=0.0), Memory()
    rescoring = session(
        learner, PriorConfig(kind="none"), ReliabilityConfig(rescore_below=0.9, rescore_every=3, memory=0)
    )
    first = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    # prompt 4 agrees but for a little noise, prompt 9 is reversed
    second = torch.stack([first[0] + 3.0 + 0.2 * torch.tensor([1.0, -1, 1, -1, 1, -1]), -first[1]])
    both = torch.stack([first, second], dim=2)
    c = float(group_icc(both)[0])
    assert 0.9 < c < 0.999
    again, trusts = [], []
    for _ in range(4):
        prompts = to_be_scored(rescoring, PROMPTS, memory)
        again.append(prompts.again.tolist())
        seen = both.clone()
        seen[..., 1] = second.masked_fill(~prompts.again[:, None], torch.nan)
        found = estimate_advantages(rescoring, prompts, scored(first, {"clip": seen}), memory)
        trusts.append(found.trust.tolist())
        assert found.metrics["icc/clip"].item() == pytest.approx(float(pooled_icc(both[prompts.again])), rel=1e-5)
        assert found.metrics["scored_again"] == prompts.again.float().mean()
    assert again == [[True, True], [False, True], [False, True], [True, True]]
    of_one, of_two = 0.5 + c, 0.5 + 2 * c / (1 + c)
    assert trusts == [pytest.approx([rho, 0.5]) for rho in (of_two, of_one, of_one, of_two)]
    assert to_be_scored(session(BPGOConfig(), PriorConfig()), PROMPTS, memory).again is None
