"""The intraclass correlation: the published example and its invariances."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bpgo_video.learner.agreement import frame_agreement, group_icc, pooled_icc, spearman_brown
from bpgo_video.learner.rescoring import icc_by_reward

# Shrout and Fleiss (1979), table 2: six targets by four judges; their ICC(3,1) is .71, their ICC(1,1) .17
RATINGS = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]


def test_the_published_example_is_reproduced():
    assert group_icc(torch.tensor([RATINGS]).float()).item() == pytest.approx(0.7148, abs=1e-4)


def test_two_scorings_equal_values_computed_by_hand():
    # {0, 2, 4} and {1, 5, 3}: variances 4 and 4, covariance (-2 * -2 + 0 + 2 * 0)/2 = 2: 2 * 2/(4 + 4) = .5
    # {0, 0, 6} and {6, 0, 0}: variances 12, covariance (-2 * 4 + 4 + 4 * -2)/2 = -6: -.5
    scores = torch.tensor([[[0.0, 1.0], [2.0, 5.0], [4.0, 3.0]], [[0.0, 6.0], [0.0, 0.0], [6.0, 0.0]]])
    assert group_icc(scores).tolist() == pytest.approx([0.5, -0.5])
    assert pooled_icc(scores).item() == pytest.approx((2 * 2 - 2 * 6) / (8 + 24))


def test_a_group_without_spread_has_icc_0():
    flat = torch.full((1, 8, 2), 0.1)
    flat[:, :, 1] = 1 / 3
    assert group_icc(flat).tolist() == [0.0]
    assert pooled_icc(flat) == 0
    one_sided = torch.stack([torch.arange(4.0), torch.full((4,), 0.1)], dim=1)[None]
    assert group_icc(one_sided).item() == pytest.approx(0, abs=1e-6)


@settings(deadline=None)  # the first call into torch may be slow
@given(st.integers(0, 2**31), st.floats(-10, 10), st.sampled_from([1e-6, 1.0, 1e6]))
def test_the_icc_is_invariant_to_scale_offset_and_order(seed, shift, unit):
    rng = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, 6, 2, generator=rng, dtype=torch.float64)
    moved = scores.clone()
    moved[..., 1] += shift
    order = torch.randperm(6, generator=rng)
    torch.testing.assert_close(group_icc(unit * moved[:, order].flip(2)), group_icc(scores))
    assert (group_icc(scores).abs() <= 1 + 1e-12).all()


@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 4, 1)])
def test_too_few_scores_are_refused(shape):
    with pytest.raises(ValueError, match="2 or more of each"):
        group_icc(torch.zeros(shape))


def test_a_step_that_scores_no_prompt_twice_keeps_the_last_icc_without_a_warning():
    scores = {"judge": torch.randn(1, 8, 2)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = icc_by_reward({7: {"icc": {"judge": 0.4}, "passed": 1}}, [7], scores, torch.tensor([False]), memory=0.5)
    assert found["judge"].tolist() == [0.4]


@pytest.mark.parametrize("memory", [0.0, 0.25])
def test_a_prompt_keeps_a_share_of_its_last_icc(memory):
    scores = torch.randn(3, 8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own, last = group_icc(scores).tolist(), {"icc": {"judge": 0.4}, "passed": 1}
    again = torch.tensor([True, True, False])
    found = icc_by_reward({7: last, 9: last}, [7, 8, 9], {"judge": scores}, again, memory)["judge"]
    assert found.tolist() == pytest.approx([memory * 0.4 + (1 - memory) * own[0], own[1], 0.4], rel=1e-12)


def test_frame_agreement_is_the_reliability_of_the_mean_over_frames():
    scores = torch.randn(20, 8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores += torch.randn(20, 8, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(frame_agreement(scores), spearman_brown(group_icc(scores), 5))
    # Shrout and Fleiss, table 4: BMS 11.24, EMS 1.02, so ICC(3,4) = .91
    assert frame_agreement(torch.tensor([RATINGS]).double()).item() == pytest.approx(1 - 1.0194 / 11.2417, abs=1e-4)
    assert frame_agreement(torch.full((1, 8, 2), 0.1)).tolist() == [0.0]


def test_frame_agreement_estimates_the_share_of_variance_that_is_not_noise_of_frames():
    # signal of variance 1, noise of a frame 4, so that of a mean of 8 frames is 1/2: rho = 1/(1 + 1/2)
    rng = torch.Generator().manual_seed(0)
    signal = torch.randn(1, 40_000, 1, generator=rng, dtype=torch.float64)
    noise = 2 * torch.randn(1, 40_000, 8, generator=rng, dtype=torch.float64)
    assert frame_agreement(signal + noise).item() == pytest.approx(2 / 3, abs=0.01)
    # noise that all frames share is seen as signal
    shared = torch.randn(1, 40_000, 1, generator=rng, dtype=torch.float64)
    assert frame_agreement(signal + shared + noise).item() == pytest.approx(2 / 2.5, abs=0.01)


def test_spearman_brown_equals_values_computed_by_hand():
    assert spearman_brown(torch.tensor([-0.2, 0.0, 0.5, 1.0]), 2).tolist() == pytest.approx([0, 0, 2 / 3, 1])
    assert spearman_brown(torch.tensor([0.5]), 1).tolist() == [0.5]
