"""Does segment credit spread a video's advantage over its frames without changing it?"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bpgo_video.advantages import group_relative
from bpgo_video.credit import latent_frame_scores, segment_advantages


def test_latent_frames_by_hand():
    scores = torch.tensor([[[7.0, 1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 2.0, 2.0]]])  # 9 pixel frames, stride 4: 1, 4, 4
    assert latent_frame_scores(scores, 4).tolist() == [[[7.0, 2.5, 1.0]]]
    assert latent_frame_scores(scores[:, :, :1], 4).tolist() == [[[7.0]]]
    assert latent_frame_scores(scores, 1).tolist() == scores.tolist()
    with pytest.raises(ValueError, match="8 frame scores at a temporal stride of 4"):
        latent_frame_scores(scores[:, :, :8], 4)


def test_segment_credit_by_hand():
    # two samples, two latent frames at stride 2: sample 0 is better in the first, worse in the second; z = +-1/sqrt(2)
    scores = torch.tensor([[[3.0, 0.0, 0.0], [1.0, 2.0, 4.0]]], dtype=torch.float64)
    advantage = torch.tensor([[0.5, -0.5]], dtype=torch.float64)
    z = 1 / math.sqrt(2)
    expected = torch.tensor([[[0.5 + 0.3 * z, 0.5 - 0.3 * z], [-0.5 - 0.3 * z, -0.5 + 0.3 * z]]], dtype=torch.float64)
    torch.testing.assert_close(segment_advantages(advantage, scores, 2, 0.3), expected, rtol=0, atol=1e-6)


@settings(deadline=None)  # a first call into torch may take long
@given(st.integers(0, 2**31), st.floats(0, 3), st.sampled_from([1, 2, 4]))
def test_segment_credit_is_the_formula_and_its_mean_the_video_advantage(seed, gamma, stride):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(3, 5, 9))
    latent = np.stack([scores[..., 0], *(scores[..., i : i + stride].mean(-1) for i in range(1, 9, stride))], axis=-1)
    z = (latent - latent.mean(1, keepdims=True)) / (latent.std(1, ddof=1, keepdims=True) + 1e-6)
    advantage = group_relative(torch.from_numpy(scores.mean(-1)))
    expected = advantage.numpy()[..., None] + gamma * (z - z.mean(-1, keepdims=True))
    found = segment_advantages(advantage, torch.from_numpy(scores), stride, gamma)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.mean(dim=2), advantage)


def test_equal_frame_scores_give_the_video_advantage_everywhere():
    rewards = torch.randn(3, 6, dtype=torch.float64)
    advantage = group_relative(rewards)
    found = segment_advantages(advantage, rewards[:, :, None].expand(3, 6, 9), 4, 2.0)
    torch.testing.assert_close(found, advantage[:, :, None].expand(3, 6, 3))
    flat = segment_advantages(torch.zeros(1, 4), torch.full((1, 4, 5), 0.1), 4, 1.0)
    assert torch.equal(flat, torch.zeros(1, 4, 2))


def test_no_weight_on_frames_is_the_video_advantage_and_a_negative_one_is_refused():
    advantage, scores = torch.randn(2, 4), torch.randn(2, 4, 5)
    assert torch.equal(segment_advantages(advantage, scores, 4, 0.0), advantage[:, :, None].expand(2, 4, 2))
    with pytest.raises(ValueError, match="gamma=-1"):
        segment_advantages(advantage, scores, 4, -1.0)
