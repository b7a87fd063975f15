"""Anchors of each kind of prior, computed by hand; running averages are updated after use and survive a resume."""

import copy
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bpgo_video.config.learner import BPGOConfig, PriorConfig, RewardConfig
from bpgo_video.data.priors import PriorTable
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.learner.bpgo import step_advantages
from bpgo_video.learner.priors import (
    PRIORS,
    PriorInputs,
    image_key,
    pooled_scale,
    pooled_spread,
    reference_moments,
    shrunk_means,
    update_running_rewards,
)
from bpgo_video.rewards import FrameSampling, FrameScores
from bpgo_video.rewards.suite import RewardSuite
from bpgo_video.types import PromptBatch

FIRST = torch.tensor([[1.0, 3.0], [5.0, 5.0]])  # means 2 and 5, variances 2 and 0
SECOND = torch.tensor([[4.0, 8.0], [0.0, 0.0]])  # means 6 and 0, variances 8 and 0


def prompts(*ids: int) -> PromptBatch:
    return PromptBatch(torch.tensor(ids), tuple(map(str, ids)), {})


def anchor(kind, batch, rewards, running=None, **keys):
    seen = PriorInputs(batch, {"clip": "v1"}, {"clip": rewards}, running or {})
    return PRIORS[kind](PriorConfig(kind=kind, **keys), seen)["clip"]


def after(batch, rewards, running=None, decay=0.75, scale=None):
    return update_running_rewards(running or {}, batch.ids.tolist(), {"clip": rewards}, decay, scale)


def test_a_constant_prior_has_the_values_of_the_recipe():
    found = anchor("constant", prompts(1, 2), FIRST, mean=0.3, scale=0.02)
    assert found.mean.tolist() == pytest.approx([0.3, 0.3])
    assert (found.scale, found.version) == (0.02, "v1")
    assert anchor("constant", prompts(1, 2), FIRST).scale == 1.0


def test_moving_averages_equal_values_computed_by_hand():
    first = after(prompts(7, 8), FIRST)
    assert first["clip"]["mean"] == pytest.approx(3.5)
    assert first["clip"]["prompts"] == {7: 2.0, 8: 5.0}
    assert first["clip"]["spread"] == pytest.approx(1.0)  # sqrt((2 + 0)/2)
    second = after(prompts(8, 9), SECOND, first)
    assert second["clip"]["mean"] == pytest.approx(0.75 * 3.5 + 0.25 * 3)
    assert second["clip"]["prompts"] == pytest.approx({7: 2.0, 8: 0.75 * 5 + 0.25 * 6, 9: 0.0})
    assert second["clip"]["spread"] == pytest.approx(0.75 * 1 + 0.25 * 2)
    assert first["clip"]["prompts"] == {7: 2.0, 8: 5.0}, "an update returns new averages"


@pytest.mark.parametrize(("kind", "expected"), [("ema", [5.0, 3.5]), ("global", [3.5, 3.5])])
def test_a_running_prior_is_the_average_of_earlier_batches(kind, expected):
    running = after(prompts(7, 8), FIRST)
    found = anchor(kind, prompts(8, 9), SECOND, running)  # prompt 8 occurred before, 9 did not
    assert found.mean.tolist() == pytest.approx(expected)
    assert found.scale == pytest.approx(1.0)
    assert found.count.tolist() == [0, 0]


@pytest.mark.parametrize("kind", ["ema", "global"])
def test_the_first_batch_uses_its_averages_or_the_scale_of_the_recipe(kind):
    found = anchor(kind, prompts(7, 8), FIRST)
    assert found.mean.tolist() == [3.5, 3.5]
    assert found.scale == pytest.approx(1.0)
    assert anchor(kind, prompts(7, 8), FIRST, scale=0.3).scale == 0.3
    assert after(prompts(7, 8), FIRST, scale=0.2)["clip"]["spread"] == pytest.approx(0.75 * 0.2 + 0.25 * 1)


def test_a_batch_without_variance_leaves_the_scale_unchanged():
    flat = torch.full((2, 8), 0.1)
    assert pooled_spread(flat) is None
    assert after(prompts(1, 2), flat, after(prompts(7, 8), FIRST))["clip"]["spread"] == pytest.approx(1.0)
    never = after(prompts(1, 2), flat)
    assert never["clip"]["spread"] is None
    found = anchor("ema", prompts(1, 2), flat, never)
    result = step_advantages({"clip": flat}, {"clip": found}, {"clip": 1.0}, BPGOConfig())
    assert torch.equal(result.advantage, torch.zeros(2, 8))
    assert after(prompts(7, 8), FIRST, never)["clip"]["spread"] == pytest.approx(1.0)


@settings(deadline=None)  # the first call into torch may be slow
@given(st.integers(0, 2**31), st.sampled_from(["ema", "global"]))
def test_averages_do_not_depend_on_the_order_of_prompts_in_a_batch(seed, kind):
    rng = torch.Generator().manual_seed(seed)
    rewards, order = torch.randn(5, 4, generator=rng, dtype=torch.float64), torch.randperm(5, generator=rng)
    batch = prompts(*range(5))
    moved = prompts(*order.tolist())
    one, other = after(batch, rewards), after(moved, rewards[order])
    found, expected = anchor(kind, moved, rewards, other), anchor(kind, batch, rewards, one)
    torch.testing.assert_close(found.mean, expected.mean[order])
    assert found.scale == pytest.approx(expected.scale)


def test_averages_survive_a_checkpoint_bit_for_bit(tmp_path):
    running = after(prompts(8, 2**62 + 1), torch.rand(2, 6), after(prompts(7, 8), torch.rand(2, 6)))
    torch.save({"running_rewards": copy.deepcopy(running)}, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["running_rewards"] == running


def test_shrunk_means_equal_values_computed_by_hand():
    # K = 4; variances 4, 0, 2, mean 2, so v = 3, 1, 2 and v/K = .75, .25, .5; means 0, 6, 3: p_g = 3, variance 9,
    # tau2 = 9 - .5 = 8.5
    means, stds = torch.tensor([0.0, 6.0, 3.0]), torch.tensor([2.0, 0.0, math.sqrt(2)])
    expected = [
        (4 * mean / v + 3 / 8.5) / (4 / v + 1 / 8.5) for mean, v in zip([0.0, 6.0, 3.0], [3.0, 1.0, 2.0], strict=True)
    ]
    assert shrunk_means(means, stds, torch.full((3,), 4)).tolist() == pytest.approx(expected)


def test_means_that_differ_only_by_sampling_noise_are_shrunk_to_one_value():
    means = torch.tensor([0.9, 1.0, 1.1])
    found = shrunk_means(means, torch.full((3,), 5.0), torch.full((3,), 4))
    assert found.tolist() == pytest.approx([statistics.mean(means.tolist())] * 3)
    assert shrunk_means(means[:1], torch.ones(1), torch.full((1,), 4)).tolist() == pytest.approx([0.9])


@settings(deadline=None)
@given(st.integers(0, 2**31))
def test_shrunk_means_are_between_the_prompts_mean_and_the_common_one(seed):
    rng = torch.Generator().manual_seed(seed)
    means, stds = torch.randn(6, generator=rng).double(), torch.rand(6, generator=rng).double()
    found = shrunk_means(means, stds, torch.randint(2, 9, (6,), generator=rng))
    low, high = torch.minimum(means, means.mean()), torch.maximum(means, means.mean())
    assert ((found >= low - 1e-12) & (found <= high + 1e-12)).all()


def test_a_stored_table_can_be_shrunk():
    rows = torch.tensor([[0.0, 2.0, 4, 1.0], [6.0, 0.0, 4, 1.0], [3.0, math.sqrt(2), 4, 1.0]]).double()
    anchors = dict(zip((4, 5, 9), map(tuple, rows.tolist()), strict=True))
    table = PriorTable(reward="clip", version="v1", scale=1.4, policy="policy", settings={}, anchors=anchors).shrunk()
    found = table.anchor(prompts(9, 4))
    expected = shrunk_means(rows[:, 0], rows[:, 1], rows[:, 2].long())
    torch.testing.assert_close(found.mean, expected[[2, 0]].float())
    assert found.std.tolist() == pytest.approx([math.sqrt(2), 2.0])
    assert found.scale == 1.4


def test_moments_of_pairs_by_hand():
    """Pairs (1, 3) and (4, 8): means 2 and 6, variances 2 and 8."""
    mean, std, count, spread = reference_moments(torch.tensor([[1.0, 3.0], [4.0, 8.0]]))
    assert (mean, count) == (4.0, 2)
    assert std == pytest.approx(math.sqrt(8))
    assert spread == pytest.approx(math.sqrt(5))
    mean, std, count, spread = reference_moments(torch.tensor([[1.0, 3.0, 4.0, 8.0]]))  # samples of their own starts
    assert (mean, count) == (4.0, 4)
    assert std == spread == pytest.approx(statistics.stdev([1, 3, 4, 8]))


def test_the_pooled_scale_does_not_depend_on_the_order():
    spreads = [0.1 * i**3 for i in range(1, 200)]
    assert pooled_scale(spreads) == pooled_scale(reversed(spreads))
    assert pooled_scale([3.0, 4.0]) == pytest.approx(math.sqrt(12.5))


@pytest.mark.parametrize("groups", [2, 4])
def test_moments_find_the_variance_within_a_start_and_that_of_the_mean(groups):
    """R = mu + a_start + e with B = 4 and W = 1: each estimate is within four standard errors over 4,000 prompts."""
    prompts, between, within = 4000, 4.0, 1.0
    rng = torch.Generator().manual_seed(groups)
    starts = between**0.5 * torch.randn(prompts, groups, 1, generator=rng).double()
    rewards = starts + within**0.5 * torch.randn(prompts, groups, 2, generator=rng).double()
    rows = torch.tensor([reference_moments(prompt) for prompt in rewards]).double()
    mean, std, count, spread = rows.T

    def check(values, expected):
        assert abs(values.mean() - expected) < 4 * values.std() / prompts**0.5

    variance = (between + within / 2) / groups
    check(spread**2, within)
    check(mean**2, variance)  # the actual variance of the means, around mu = 0
    check(std**2 / count, variance)  # what shrunk_means takes it for
    assert pooled_scale(spread.tolist()) == pytest.approx(within**0.5, abs=4 / (2 * groups * prompts) ** 0.5)
    # As if all samples had their own start, both would be wrong: the spread too large, the mean too certain.
    together = torch.tensor([reference_moments(prompt.reshape(1, -1)) for prompt in rewards]).double()
    assert pooled_scale(together[:, 3].tolist()) > 1.5 * within**0.5
    assert (together[:, 1] ** 2 / together[:, 2]).mean() < 0.8 * variance


class Darkness:
    name, version, range, kind = "darkness", "1", (0.0, 1.0), "test"
    higher_is_better, differentiable, frames = False, True, FrameSampling()

    def __call__(self, clips):
        brightness = clips.videos.mean(dim=(2, 3, 4))
        return FrameScores(brightness * torch.tensor([len(text) for text in clips.texts])[:, None], clips.times)


class Steadiness:
    """A reward of 1 where no frame differs from the previous one."""

    name, version, range, kind = "steadiness", "1", (0.0, 1.0), "test"
    higher_is_better, differentiable, frames = True, False, FrameSampling()

    def __call__(self, clips):
        assert clips.videos.shape[1] == 5, "the same number of frames as the policy's videos"
        same = (clips.videos.diff(dim=1) == 0).flatten(1).all(dim=1)
        return FrameScores(same.float()[:, None])


def test_a_first_frame_prior_is_the_reward_of_the_image():
    models = {"dark": "tests.learner.test_priors:Darkness", "steady": "tests.learner.test_priors:Steadiness"}
    suite = RewardSuite(
        {name: RewardConfig(model=model) for name, model in models.items()}, torch.device("cpu"), fps=8.0
    )
    images = torch.stack([torch.full((3, 4, 4), 0.5), torch.full((3, 4, 4), 0.25)])
    prompted = PromptBatch(torch.tensor([1, 2]), ("ab", "abcd"), {}, images=images)
    scored = suite.score_images(prompted, 5, Mesh(0, 1, torch.device("cpu")))
    assert scored["dark"].tolist() == [-1.0, -1.0]  # with the reward's sign, and each prompt's text
    assert scored.pop("steady").tolist() == [1.0, 1.0]  # a reward on several frames receives a still video
    suite = RewardSuite({"dark": RewardConfig(model=models["dark"])}, torch.device("cpu"), fps=8.0)
    batch, rewards = prompts(1, 2), {"dark": FIRST}
    seen = PriorInputs(batch, suite.versions, rewards, {}, scored)
    found = PRIORS["first_frame"](PriorConfig(kind="first_frame"), seen)["dark"]
    assert found.mean.tolist() == [-1.0, -1.0]
    assert found.scale == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"first_frame.*'dark'"):
        PRIORS["first_frame"](PriorConfig(kind="first_frame"), PriorInputs(batch, suite.versions, rewards))


def test_a_centred_first_frame_prior_has_the_mean_of_the_runs_videos():
    """Images score 5 and 7, videos 1 on average: anchors are 0 and 2, with and without averages."""
    versions, batch, prior = {"clip": "v1"}, prompts(1, 2), PriorConfig(kind="first_frame_centred")
    images = {"clip": torch.tensor([5.0, 7.0])}
    rewards = {"clip": torch.tensor([[0.0, 1.0], [1.0, 2.0]]), image_key("clip"): images["clip"][:, None]}
    found = PRIORS[prior.kind](prior, PriorInputs(batch, versions, rewards, {}, images))["clip"]
    assert found.mean.tolist() == [0.0, 2.0]
    running = update_running_rewards({}, [1, 2], rewards, decay=0.5, scale=None)
    later = {"clip": rewards["clip"] + 2, image_key("clip"): rewards[image_key("clip")] + 1}
    running = update_running_rewards(running, [1, 2], later, decay=0.5, scale=None)  # levels 2 and 6.5
    found = PRIORS[prior.kind](prior, PriorInputs(batch, versions, later, running, images))["clip"]
    assert found.mean.tolist() == pytest.approx([0.5, 2.5])
    inputs = PriorInputs(batch, versions, later, running, images)
    plain = PRIORS["first_frame"](PriorConfig(kind="first_frame"), inputs)["clip"]
    assert found.scale == plain.scale
