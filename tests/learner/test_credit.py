"""Segment credit: values by hand, and a video's advantage as the mean over its latent frames."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bpgo_video.learner.advantages import FrameLayout, frame_credit, group_relative, segment_credit


def test_frame_scores_are_averaged_over_latent_frames() -> None:
    scores = torch.tensor([7.0, 1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 2.0, 2.0], dtype=torch.float64)
    layout = FrameLayout(9, 8.0, 4)  # 1, 4, 4
    assert (scores @ layout.weights(torch.arange(9) / 8)).tolist() == [7.0, 2.5, 1.0]
    assert FrameLayout(1, 8.0, 4).weights(torch.zeros(1)).tolist() == [[1.0]]
    with pytest.raises(ValueError, match="8 frames at a temporal stride of 4"):
        FrameLayout(8, 8.0, 4)


def test_given_frames_are_excluded_from_the_mean() -> None:
    scores = torch.randn(2, 4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times, whole, layout = torch.arange(9) / 8, FrameLayout(9, 8.0, 4), FrameLayout(9, 8.0, 4, given=1)
    torch.testing.assert_close(layout.weights(times), whole.weights(times)[:, 1:], rtol=0, atol=0)
    z = torch.stack([group_relative(scores[..., 1 + 4 * i : 5 + 4 * i].mean(-1)) for i in range(2)], dim=2)
    torch.testing.assert_close(frame_credit(scores, times, layout), z - z.mean(dim=2, keepdim=True))


def test_scores_of_some_frames_are_interpolated() -> None:
    layout = FrameLayout(5, 2.0, 2)  # frames at 0, .5, 1, 1.5, 2 seconds
    sparse = torch.tensor([2.0, 4.0], dtype=torch.float64) @ layout.weights(torch.tensor([0.5, 1.5]))
    assert sparse.tolist() == [2.0, 2.5, 4.0]  # extended, mean of (2, 3), mean of (4, extended)


def test_segment_credit_equals_values_computed_by_hand() -> None:
    # two samples, two latent frames: sample 0 is better in the first, worse in the second; z = +-1/sqrt(2)
    scores = torch.tensor([[[3.0, 0.0, 0.0], [1.0, 2.0, 4.0]]], dtype=torch.float64)
    times, layout, z = torch.arange(3) / 8, FrameLayout(3, 8.0, 2), 1 / math.sqrt(2)
    expected = torch.tensor([[[z, -z], [-z, z]]])
    per_frame, weights = {"a": scores, "b": scores[..., :1], "c": scores}, {"a": 2.0, "b": 1.0, "c": 0.0}
    found = segment_credit(per_frame, {"a": times, "b": None, "c": times}, weights, layout, 0.3)
    assert list(found) == ["a"]
    torch.testing.assert_close(found["a"], 0.3 * expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"\['b'\] score videos as a whole"):
        segment_credit({"b": scores[..., :1]}, {"b": None}, weights, layout, 0.3)


@settings(deadline=None)  # the first call into torch may be slow
@given(st.integers(0, 2**31), st.sampled_from([1, 2, 4]))
def test_credit_equals_the_formula_and_has_mean_0_over_frames(seed: int, stride: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(3, 5, 9))
    latent = np.stack([scores[..., 0], *(scores[..., i : i + stride].mean(-1) for i in range(1, 9, stride))], axis=-1)
    z = (latent - latent.mean(1, keepdims=True)) / (latent.std(1, ddof=1, keepdims=True) + 1e-6)
    found = frame_credit(torch.from_numpy(scores), torch.arange(9) / 8, FrameLayout(9, 8.0, stride))
    np.testing.assert_allclose(found.numpy(), z - z.mean(-1, keepdims=True), rtol=1e-9, atol=1e-9)
    assert found.mean(dim=2).abs().max() < 1e-12


def test_equal_z_scores_over_frames_give_no_credit() -> None:
    alike = torch.randn(3, 6, 1, dtype=torch.float64).expand(3, 6, 9)
    assert frame_credit(alike, torch.arange(9) / 8, FrameLayout(9, 8.0, 4)).abs().max() < 1e-9
    assert not frame_credit(torch.full((1, 4, 5), 0.1), torch.arange(5) / 8, FrameLayout(5, 8.0, 4)).any()
    assert group_relative(alike[..., 0]).abs().max() > 0.5
