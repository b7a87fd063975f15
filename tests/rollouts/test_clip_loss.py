"""The supervised flow-matching loss: random draws, value and gradient against numpy, and training with adapters."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bpgo_video.config.bpgo import VideoConfig
from bpgo_video.config.policy import LoraConfig
from bpgo_video.diffusion.flow_matching import LevelDistribution, noised, on_schedule, without_captions
from bpgo_video.policies import Policy, load_policy
from bpgo_video.policies.lora import add_lora
from bpgo_video.rollouts.forward_process import ClipBatch, ClipLoss
from tests.made.random_wan import LATENTS, TEXT_TOKENS, random_wan

VIDEO = VideoConfig(num_frames=9, height=64, width=64, fps=8.0)
UNIFORM, LOGIT_NORMAL = LevelDistribution("uniform"), LevelDistribution("logit_normal")
EVEN = torch.linspace(1, 0, 1001)
CAPTIONS = ("a red circle moving left", "a blue square moving up", "a green triangle moving right", "a red object")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_wan(tmp_path_factory.mktemp("wan") / "policy")


@pytest.fixture
def small(folder: Path) -> Policy:
    return load_policy(str(folder), max_sequence_length=TEXT_TOKENS)


def clips_of(policy: Policy, count: int = 4) -> ClipBatch:
    generator = torch.Generator().manual_seed(3)
    texts = policy.encode([CAPTIONS[i % len(CAPTIONS)] for i in range(count)])
    return ClipBatch(list(range(10, 10 + count)), torch.randn(count, *LATENTS, generator=generator), texts)


def loss_of(policy: Policy, levels: LevelDistribution = UNIFORM, dropout: float = 0.0, **changes) -> ClipLoss:
    schedule, settings = policy.sigmas(1000, VIDEO), {"trained": ("transformer",), "seed": 7, **changes}
    return ClipLoss(policy, policy.encode([""]), levels, dropout, schedule, **settings)


@given(st.floats(0, 1), st.floats(0.5, 12))
def test_a_position_on_a_schedule_maps_to_the_shifted_level(level: float, shift: float) -> None:
    schedule = shift * EVEN / (1 + (shift - 1) * EVEN)
    expected = shift * level / (1 + (shift - 1) * level)
    assert float(on_schedule(torch.tensor(level), schedule)) == pytest.approx(expected, abs=1e-4)


def test_levels_lie_on_the_familys_schedule(small: Policy) -> None:
    levels = torch.linspace(0, 1, 101)
    found = on_schedule(levels, small.sigmas(1000, VIDEO))
    assert (found - 3 * levels / (1 + 2 * levels)).abs().max() < 7e-3, "the family's shift of 3; the last step is large"
    assert (found[0], found[-1]) == (0, 1)
    assert bool((found.diff() > 0).all())


@pytest.mark.parametrize(
    ("levels", "quantile"),
    [
        (UNIFORM, lambda p: p),
        (
            LevelDistribution("logit_normal", 0.3, 0.8),
            lambda p: 1 / (1 + np.exp(-(0.3 + 0.8 * np.sqrt(2) * erfinv(2 * p - 1)))),
        ),
    ],
)
def test_levels_follow_their_density(levels: LevelDistribution, quantile: Callable[[np.ndarray], np.ndarray]) -> None:
    count = 4000
    draws = torch.stack([levels.draw(("level", i), EVEN) for i in range(count)])
    shares = np.linspace(0.05, 0.95, 19)
    found = np.array([(draws.numpy() <= quantile(share)).mean() for share in shares])
    assert np.abs(found - shares).max() < 4 * math.sqrt(0.25 / count), "four standard errors"


def erfinv(value: np.ndarray) -> np.ndarray:
    return torch.erfinv(torch.as_tensor(value, dtype=torch.float64)).numpy()


def test_draws_depend_only_on_the_key(small: Policy) -> None:
    loss, ids = loss_of(small, LOGIT_NORMAL, dropout=0.5), range(100, 132)
    together = loss.draw(ClipBatch(ids, torch.zeros(32, *LATENTS), {}), 3, "transformer")
    for row in (0, 13, 31):
        alone = loss.draw(ClipBatch([ids[row]], torch.zeros(1, *LATENTS), {}), 3, "transformer")
        for one, many in zip(alone, together, strict=True):
            assert torch.equal(one[0], many[row])
    _, noise, drops = together
    assert 0 < int(drops.sum()) < 32
    assert abs(float(noise.mean())) < 0.02
    assert float(noise.std()) == pytest.approx(1, abs=0.02)


def test_dropped_captions_become_the_negative_prompt_and_images_are_kept() -> None:
    conditioning = {"prompt_embeds": torch.ones(3, 4, 2), "image_latents": torch.full((3, 2, 1, 1, 1), 5.0)}
    negative = {"prompt_embeds": torch.full((1, 4, 2), -1.0)}
    found = without_captions(conditioning, negative, torch.tensor([True, False, True]))
    assert found["prompt_embeds"][:, 0, 0].tolist() == [-1, 1, -1]
    assert torch.equal(found["image_latents"], conditioning["image_latents"])


def test_loss_and_gradient_equal_the_formula(small: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the velocity a x + b sigma + c t, where t is the caption's first number; numpy has its analytic gradient."""
    weights = torch.tensor([0.7, -0.4, 0.2], requires_grad=True)

    def velocity(self, latents, sigma, conditioning):
        text = conditioning["prompt_embeds"][:, 0, 0].view(-1, 1, 1, 1, 1)
        return weights[0] * latents + weights[1] * sigma.view(-1, 1, 1, 1, 1) + weights[2] * text

    monkeypatch.setattr(type(small), "velocity", velocity)
    clips, loss = clips_of(small), loss_of(small, LOGIT_NORMAL, dropout=0.5)
    value = loss.errors(clips, 5, "transformer").mean()
    value.backward()

    levels, drawn, drops = loss.draw(clips, 5, "transformer")
    assert 0 < int(drops.sum()) < 4, "some captions must be dropped, and some kept"
    data, noise = clips.latents.double().numpy(), drawn.double().numpy()
    sigma = levels.double().numpy()[:, None, None, None, None]
    texts = clips.conditioning["prompt_embeds"][:, 0, 0].double().numpy()
    empty = float(small.encode([""])["prompt_embeds"][0, 0, 0])
    text = np.where(drops.numpy(), empty, texts)[:, None, None, None, None]
    mixed = (1 - sigma) * data + sigma * noise
    error = 0.7 * mixed - 0.4 * sigma + 0.2 * text - (noise - data)
    assert float(value.detach()) == pytest.approx((error**2).mean(), rel=1e-5)
    expected = [2 * (error * part).mean() for part in (mixed, sigma * np.ones_like(mixed), text * np.ones_like(mixed))]
    np.testing.assert_allclose(weights.grad.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_image_to_video_uses_the_first_frame_even_for_dropped_captions(tmp_path: Path) -> None:
    folder = random_wan(tmp_path / "policy", images=True)
    policy = load_policy(str(folder), max_sequence_length=TEXT_TOKENS)
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    plain = clips_of(policy)
    own = policy.image_conditioning(images, VIDEO)
    clips = ClipBatch(plain.ids, plain.latents, {**plain.conditioning, **own})
    other = ClipBatch(plain.ids, plain.latents, {**plain.conditioning, **{k: v.flip(0) for k, v in own.items()}})
    texts = ClipBatch(plain.ids, plain.latents, {**own, "prompt_embeds": plain.conditioning["prompt_embeds"].flip(0)})
    loss = loss_of(policy, dropout=1.0)
    found = loss.errors(clips, 0, "transformer")
    assert torch.equal(found, loss.errors(texts, 0, "transformer")), "every caption is dropped"
    assert not torch.allclose(found, loss.errors(other, 0, "transformer"), rtol=1e-4)


def test_noised_latents_are_data_at_level_0_and_noise_at_level_1() -> None:
    data, noise = torch.randn(2, *LATENTS), torch.randn(2, *LATENTS)
    found = noised(data, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(found[0], data[0])
    assert torch.equal(found[1], noise[1])


def test_gradients_of_micro_batches_add_up_to_that_of_the_batch(small: Policy) -> None:
    clips, loss = clips_of(small), loss_of(small, dropout=0.3)
    whole = loss.errors(clips, 2, "transformer")
    parts = [
        ClipBatch(
            clips.ids[i : i + 2], clips.latents[i : i + 2], {k: v[i : i + 2] for k, v in clips.conditioning.items()}
        )
        for i in (0, 2)
    ]
    torch.testing.assert_close(torch.cat([loss.errors(part, 2, "transformer") for part in parts]), whole)


@pytest.mark.parametrize("rank", [0, 4])
def test_training_lowers_the_loss_of_random_weights(small: Policy, rank: int) -> None:
    """Clips differ only by noise; with all weights and with adapters."""
    if rank:
        add_lora(small.transformers["transformer"], LoraConfig(rank=rank, alpha=8), seed=0)
    weights = [parameter for parameter in small.transformers.parameters() if parameter.requires_grad]
    clips, loss = clips_of(small, count=8), loss_of(small)
    clips = ClipBatch(clips.ids, clips.latents[:1].expand_as(clips.latents), clips.conditioning)
    before = loss.errors_at(clips, loss.heldout_levels(4))
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    for step in range(30):
        optimizer.zero_grad()
        loss.errors(clips, step, "transformer").mean().backward()
        optimizer.step()
    after = loss.errors_at(clips, loss.heldout_levels(4))
    assert after.mean() < 0.9 * before.mean()
    assert not after.requires_grad


def test_each_expert_is_trained_in_proportion_to_its_noise_levels(
    small: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(small), "transformer_at", lambda self, sigma: "high" if sigma > 0.8 else "low")
    both = loss_of(small, trained=("high", "low"))
    steps = [both.transformer_of(step) for step in range(1000)]
    share = 1 - 0.8 / (3 - 2 * 0.8)  # sigma = 3u / (1 + 2u) > .8
    assert steps.count("high") / 1000 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 1000))
    assert {loss_of(small, trained=("low",)).transformer_of(step) for step in range(50)} == {"low"}
    levels, _, _ = both.draw(ClipBatch(range(50), torch.zeros(50, *LATENTS), {}), 0, "high")
    assert bool((levels > 0.8).all())
    with pytest.raises(ValueError, match=r"none of 1000 noise levels .* change sft.density_mean or policy.trained"):
        UNIFORM.draw((0,), both.schedule, lambda sigma: False)


def test_heldout_errors_use_separate_noise_and_drop_no_captions(small: Policy) -> None:
    loss, clips = loss_of(small, dropout=1.0), clips_of(small, 2)
    levels = loss.heldout_levels(3)
    expected_levels = [3 * u / (1 + 2 * u) for u in (1 / 6, 1 / 2, 5 / 6)]
    assert levels.tolist() == pytest.approx(expected_levels, abs=5e-3)
    found = loss.errors_at(clips, levels)
    assert torch.equal(found, loss.errors_at(clips, levels)), "the same at every evaluation"
    other = ClipBatch(clips.ids, clips.latents, {k: v.flip(0) for k, v in clips.conditioning.items()})
    assert not torch.allclose(found, loss.errors_at(other, levels)), "captions affect the error"
