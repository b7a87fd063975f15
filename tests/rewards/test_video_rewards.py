"""Rewards on video encoders and frame consistency: published formulas, recomputed independently."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, VideoPrismClipModel, VJEPA2Model, XCLIPModel

from bpgo_video.rewards import networks
from bpgo_video.rewards.base import RewardError
from bpgo_video.rewards.motion import FirstFrameConsistency, SubjectConsistency, VJepaPrediction
from bpgo_video.rewards.text import ClipScore, SiglipScore, VideoPrismScore, XClipScore
from tests.made import random_rewards as folders
from tests.made.pil_reference import TEXTS, cut, resized, some_clips, unit


@pytest.mark.parametrize("make", [folders.random_dino, folders.random_vit])
def test_subject_consistency_is_vbenchs_formula(tmp_path: Path, make) -> None:
    folder, clips = make(tmp_path), some_clips(4)
    model = AutoModel.from_pretrained(folder).eval()
    actual = SubjectConsistency(str(folder))(clips)
    for sample, video in enumerate(clips.videos):
        f = [unit(model(pixel_values=cut(frame, 32, 28)).last_hidden_state[:, 0]) for frame in video]
        expected = [(max(0.0, f[t] @ f[t - 1]) + max(0.0, f[t] @ f[0])) / 2 for t in range(1, 4)]
        np.testing.assert_allclose(actual.values[sample].numpy(), expected, atol=1e-4)
    assert actual.times.tolist() == [0.125, 0.25, 0.375]


def test_consistency_of_a_still_video_and_of_a_single_frame_is_one(tmp_path: Path) -> None:
    reward, clips = SubjectConsistency(str(folders.random_dino(tmp_path))), some_clips()
    still = replace(clips, videos=clips.videos[:, :1].expand(-1, 4, -1, -1, -1), _cache={})
    torch.testing.assert_close(reward(still).values, torch.ones(2, 3))
    torch.testing.assert_close(reward(replace(clips, videos=clips.videos[:, :1], _cache={})).values, torch.ones(2, 1))


def test_the_reference_is_the_conditioning_image_or_frame_0(tmp_path: Path) -> None:
    reward, clips = FirstFrameConsistency(str(folders.random_dino(tmp_path)), frames=3), some_clips()
    own = reward(clips).values
    torch.testing.assert_close(own[:, 0], torch.ones(2))
    pictured = replace(clips, images=clips.videos[:, 4], _cache={})
    features = reward.features(clips, [0, 2, 4])
    expected = torch.cosine_similarity(features, features[:, 2:], dim=-1)
    torch.testing.assert_close(reward(pictured).values, expected)
    assert not torch.allclose(own, expected, atol=1e-3)


def test_xclip_score_is_the_logit_of_the_model_for_each_video_alone(tmp_path: Path) -> None:
    folder, clips = folders.random_xclip(tmp_path), some_clips(7)
    model = XCLIPModel.from_pretrained(folder).eval()
    expected = []
    for video, text in zip(clips.videos, TEXTS, strict=True):
        frames = [cut(video[i], 28, 28, Image.Resampling.BILINEAR)[0] for i in (0, 2, 4, 6)]
        tokens = folders.tokenizer()([text], return_tensors="pt")
        logits = model(input_ids=tokens.input_ids, pixel_values=torch.stack(frames)[None]).logits_per_video
        expected.append(logits[0] / model.logit_scale.exp())
    torch.testing.assert_close(XClipScore(str(folder))(clips).values, torch.stack(expected), atol=1e-5, rtol=0)


def test_videoprism_score_is_the_cosine_of_the_embeddings_of_the_model(tmp_path: Path) -> None:
    folder, clips = folders.random_videoprism(tmp_path), some_clips(7)
    model = VideoPrismClipModel.from_pretrained(folder).eval()
    tokens = folders.tokenizer(ends=False)(
        list(TEXTS), padding="max_length", max_length=folders.LENGTH, return_tensors="pt"
    )
    frames = [[resized(video[i], 12, 12, Image.Resampling.BICUBIC) for i in (0, 2, 4, 6)] for video in clips.videos]
    actual = model(torch.tensor(np.array(frames), dtype=torch.float32), tokens.input_ids, tokens.attention_mask)
    expected = [[unit(v) @ unit(t)] for v, t in zip(actual.video_embeds, actual.text_embeds, strict=True)]
    np.testing.assert_allclose(VideoPrismScore(str(folder))(clips).values.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 3])
def test_frames_of_a_short_video_are_repeated(tmp_path: Path, frames: int) -> None:
    reward, clips = XClipScore(str(folders.random_xclip(tmp_path))), some_clips(frames)
    repeated = clips.videos[:, {1: [0, 0, 0, 0], 3: [0, 1, 1, 2]}[frames]]
    torch.testing.assert_close(reward(clips).values, reward(replace(clips, videos=repeated, _cache={})).values)


def test_videos_are_encoded_in_small_batches(tmp_path: Path, monkeypatch) -> None:
    reward, clips, seen = XClipScore(str(folders.random_xclip(tmp_path))), some_clips(4), []
    whole, forward = reward(clips).values, reward.backbone.network.forward
    monkeypatch.setattr(networks, "FRAMES_AT_ONCE", 4)
    monkeypatch.setattr(
        reward.backbone.network, "forward", lambda **k: seen.append(len(k["pixel_values"])) or forward(**k)
    )
    torch.testing.assert_close(reward(clips).values, whole)
    assert seen == [1, 1]


def test_vjepa_compares_predicted_and_observed_features_of_the_second_half(tmp_path: Path) -> None:
    """Seven frames are three steps of two frames: the first predicts two."""
    folder, clips = folders.random_vjepa(tmp_path), some_clips(7)
    model = VJEPA2Model.from_pretrained(folder).eval()
    actual = VJepaPrediction(str(folder))(clips)
    assert actual.times.tolist() == [0.25, 0.5]
    for sample, video in enumerate(clips.videos):
        pixels = torch.cat([cut(frame, 32, 28, Image.Resampling.BILINEAR) for frame in video[:6]])[None]
        saw = model(pixels, skip_predictor=True).last_hidden_state[0].detach().double().numpy()
        begun = model(pixels[:, :2], skip_predictor=True).last_hidden_state
        tokens = torch.arange(12)[None]
        foresaw = model.predictor(begun, [tokens[:, :4]], [tokens[:, 4:]]).last_hidden_state[0]
        for step in (0, 1):
            expected = []
            for token in range(4 * step, 4 * step + 4):
                seen = saw[4 + token]
                seen = (seen - seen.mean()) / np.sqrt(seen.var() + 1e-5)
                expected.append(unit(foresaw[token]) @ seen / np.linalg.norm(seen))
            assert actual.values[sample, step].item() == pytest.approx(np.mean(expected), abs=1e-4)


def test_vjepa_predicts_from_the_first_half_alone_and_needs_two_steps(tmp_path: Path, monkeypatch) -> None:
    reward, clips, foreseen = VJepaPrediction(str(folders.random_vjepa(tmp_path))), some_clips(8), []
    predict = reward.backbone.network.predictor.forward
    monkeypatch.setattr(
        reward.backbone.network.predictor,
        "forward",
        lambda *a: foreseen.append(predict(*a).last_hidden_state) or predict(*a),
    )
    other = clips.videos.clone()
    other[:, 4:] = other[:, 4:].flip(-1)
    first, second = reward(clips).values, reward(replace(clips, videos=other)).values
    torch.testing.assert_close(foreseen[0], foreseen[1])
    assert not torch.allclose(first, second, atol=1e-3)
    with pytest.raises(RewardError, match="it needs at least 4"):
        reward(replace(clips, videos=clips.videos[:, :3]))


MAKERS = {
    ClipScore: folders.random_clip,
    SiglipScore: folders.random_siglip,
    SubjectConsistency: folders.random_dino,
    XClipScore: folders.random_xclip,
    VideoPrismScore: folders.random_videoprism,
    VJepaPrediction: folders.random_vjepa,
}


@pytest.mark.parametrize("reward", MAKERS)
def test_gradients_of_scores_increase_them(tmp_path: Path, reward) -> None:
    model, clips = reward(str(MAKERS[reward](tmp_path))), some_clips()
    pixels = clips.videos.clone().requires_grad_()
    before = model(replace(clips, videos=pixels, _cache={})).values.mean()
    (gradient,) = torch.autograd.grad(before, pixels)
    better = (clips.videos + 0.02 * gradient / gradient.abs().max()).clamp(0, 1)
    assert model.differentiable
    assert model(replace(clips, videos=better, _cache={})).values.mean() > before
