"""Cheaper steps that are not trained: the guidance's difference is reused, and attention has a backend of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bpgo_video.config.bpgo import Config, VideoConfig
from bpgo_video.policies import Policy
from bpgo_video.policies.attention_backends import with_backend
from bpgo_video.randomness import keyed_noise
from bpgo_video.rollouts.conditioning import guidance_of
from bpgo_video.rollouts.denoiser import Denoiser, training_denoiser
from bpgo_video.rollouts.replay import policy_shift
from bpgo_video.types import Guidance, PromptBatch, Trajectory

CPU = torch.device("cpu")
SCALE, NUM_STEPS, TRAINED = 3.0, 7, (3,)
ROWS = torch.tensor([0, 1])


@pytest.fixture
def guidance(policy: Policy) -> Guidance:
    texts = ("a red circle moving left", "a blue object")
    prompts = PromptBatch(torch.arange(2), texts, policy.encode(texts), policy.encode([""]))
    return guidance_of(prompts, ROWS, CPU)


@pytest.fixture
def start(policy: Policy) -> Tensor:
    return keyed_noise(policy.latent_shape(VideoConfig(9, 64, 64, 8.0)), [("start", row) for row in range(2)], CPU)


def denoiser_of(policy: Policy, recipe: Config, **rollout: Any) -> Denoiser:
    sampler = replace(recipe.sampler, num_steps=NUM_STEPS, guidance_scale=SCALE)
    return training_denoiser(policy, replace(recipe, sampler=sampler, rollout=replace(recipe.rollout, **rollout)))


def noise_of(step: int) -> Tensor:
    return keyed_noise((8, 3, 8, 8), [("step", row, step) for row in range(2)], CPU)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch, policy: Policy) -> list[tuple[int, set[str]]]:
    """Rows and attention backends of every pass through the transformer."""
    found: list[tuple[int, set[str]]] = []
    velocity = policy.velocity

    def counted(latents: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
        processors = [m.processor for m in policy.transformers.modules() if hasattr(m, "processor")]
        found.append((len(latents), {str(one._attention_backend) for one in processors}))
        return velocity(latents, sigma, conditioning)

    monkeypatch.setattr(policy, "velocity", counted)
    return found


@pytest.mark.parametrize(
    ("every", "rows"),
    [(1, [4] * 7), (2, [4, 2, 4, 4, 4, 2, 4]), (3, [4, 2, 2, 4, 4, 2, 2]), (9, [4, 2, 2, 4, 4, 2, 2])],
)
def test_the_negative_prompt_is_computed_once_in_so_many_steps_and_at_trained_ones(
    policy: Policy, recipe: Config, guidance: Guidance, start: Tensor, passes: list[Any], every: int, rows: list[int]
) -> None:
    denoiser_of(policy, recipe, guidance_every=every).denoise(start, guidance, noise_of, TRAINED)
    assert [count for count, _ in passes] == rows


def test_a_reused_difference_gives_the_velocity_by_its_formula(
    policy: Policy, recipe: Config, guidance: Guidance, start: Tensor
) -> None:
    """Against a loop of its own, without the denoiser's code."""
    denoiser = denoiser_of(policy, recipe, guidance_every=2)
    found = denoiser.denoise(start, guidance, noise_of).latents[:, -1]
    latents, difference = start, torch.zeros_like(start)
    with torch.no_grad():
        for index, sigma in enumerate(denoiser.sigmas[:-1]):
            towards = policy.velocity(latents, sigma, guidance.towards)
            if index % 2 == 0:
                difference = towards - policy.velocity(latents, sigma, guidance.away)
            latents = latents + (denoiser.sigmas[index + 1] - sigma) * (towards + (SCALE - 1) * difference)
    torch.testing.assert_close(found, latents, rtol=1e-4, atol=1e-4)
    exact = denoiser_of(policy, recipe).denoise(start, guidance, noise_of).latents[:, -1]
    assert (found - exact).norm() / exact.norm() > 1e-3, "the shortcut changes the videos"


@pytest.mark.parametrize("rollout", [{"guidance_every": 2}, {"attention_backend": "_native_math"}])
def test_the_ratio_of_trained_steps_is_exactly_one(
    policy: Policy, recipe: Config, guidance: Guidance, start: Tensor, rollout: dict[str, Any]
) -> None:
    denoiser = denoiser_of(policy, recipe, **rollout)
    path = denoiser.denoise(start, guidance, noise_of, TRAINED)
    trajectory = Trajectory(ROWS, torch.zeros_like(ROWS), TRAINED, *path)
    transition = denoiser.transition(trajectory.latents[:, TRAINED[0]], TRAINED[0], guidance)
    assert torch.equal(policy_shift(trajectory, TRAINED[0], transition).log_ratio, torch.zeros(2))


def test_untrained_steps_have_an_attention_backend_of_their_own(
    policy: Policy, recipe: Config, guidance: Guidance, start: Tensor, passes: list[Any]
) -> None:
    denoiser_of(policy, recipe, attention_backend="_native_math").denoise(start, guidance, noise_of, TRAINED)
    backends = [{"AttentionBackendName._NATIVE_MATH"} if step not in TRAINED else {"None"} for step in range(NUM_STEPS)]
    assert [found for _, found in passes] == backends


def test_a_backend_is_restored_after_an_error(policy: Policy) -> None:
    with pytest.raises(RuntimeError, match="inside"), with_backend(policy.transformers, "_native_math"):
        raise RuntimeError("inside")
    processors = [module.processor for module in policy.transformers.modules() if hasattr(module, "processor")]
    assert processors
    assert all(processor._attention_backend is None for processor in processors)
