"""Rewards that listen: what they measure, and who is refused that cannot hear."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel

from bpgo_video.config.bpgo import ConfigError, RewardConfig
from bpgo_video.rewards import Clips
from bpgo_video.rewards.audio import Audible, ClapScore
from bpgo_video.rewards.base import RewardError
from bpgo_video.rewards.suite import RewardSuite
from bpgo_video.rewards.wire import describe
from bpgo_video.types import Audio, PromptBatch, RolloutChunk
from tests.made.random_rewards import random_clap

TEXTS = ("a red circle moving left", "a green square")
CPU = torch.device("cpu")


def clips(waveform: Tensor, rate: int) -> Clips:
    """Black videos with this sound, [samples, channels, audio samples]."""
    return Clips(torch.zeros(len(waveform), 2, 3, 4, 4), 8.0, TEXTS[: len(waveform)], audio=Audio(waveform, rate))


def tone(frequency: float, rate: int, seconds: float, amplitude: float = 0.5) -> Tensor:
    return amplitude * (2 * math.pi * frequency * torch.arange(round(seconds * rate)) / rate).sin()


def test_silent_and_clipped_windows_score_0() -> None:
    """A sine of amplitude a has the level 20 log10(a / sqrt 2)."""
    rate = 1000
    loud, quiet = tone(50, rate, 0.4), tone(50, rate, 0.4, amplitude=1e-3)  # -9 dB, -63 dB
    clipped = loud.clone()
    clipped[120] = -1.0  # of the second window
    half = torch.cat([loud[:200], torch.zeros(200)])
    sounds = torch.stack([torch.stack([sound, sound]) for sound in (loud, quiet, clipped, half)])
    found = Audible()(Clips(torch.zeros(4, 1, 3, 4, 4), 8.0, ("",) * 4, audio=Audio(sounds, rate)))
    assert found.values.tolist() == [[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 1], [1, 1, 0, 0]]
    torch.testing.assert_close(found.times, torch.tensor([0.0, 0.1, 0.2, 0.3], dtype=torch.float64))
    assert Audible(silence=-64.0)(clips(sounds[1:2], rate)).values.tolist() == [[1, 1, 1, 1]]


@pytest.mark.parametrize(("silence", "window"), [(0.0, 0.1), (-60.0, 0.0)])
def test_settings_without_a_meaning_are_refused(silence: float, window: float) -> None:
    with pytest.raises(ValueError, match="silence must be below 0, window above 0"):
        Audible(silence, window)


@pytest.fixture(scope="module")
def clap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_clap(tmp_path_factory.mktemp("clap") / "model")


@torch.no_grad()
def test_clap_equals_the_cosine_of_transformers(clap: Path) -> None:
    sounds = torch.stack([tone(440, 48_000, 1.0), torch.randn(48_000, generator=torch.Generator().manual_seed(1)) / 9])
    model, extractor, tokenizer = (
        kind.from_pretrained(clap) for kind in (ClapModel, ClapFeatureExtractor, AutoTokenizer)
    )
    texts = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    features = extractor(list(sounds.numpy()), sampling_rate=48_000, return_tensors="pt")
    output = model(texts.input_ids, features.input_features, attention_mask=texts.attention_mask)
    expected = (output.audio_embeds * output.text_embeds).sum(dim=1)
    found = ClapScore(str(clap))(clips(sounds[:, None], 48_000))
    assert found.times is None
    torch.testing.assert_close(found.values[:, 0], expected, rtol=1e-5, atol=1e-6)
    assert abs(expected[0] - expected[1]) > 1e-3


def test_sound_is_mixed_and_resampled(clap: Path) -> None:
    slow, fast = tone(440, 24_000, 1.0), tone(440, 48_000, 1.0)
    reward = ClapScore(str(clap))
    (found,) = reward.parts(Audio(torch.stack([1.5 * slow, 0.5 * slow])[None], 24_000))
    inner = slice(1000, -1000)  # the filter of the resampling sees zeros beyond both ends
    torch.testing.assert_close(torch.from_numpy(found[0])[inner], fast[inner], rtol=0, atol=1e-3)


@torch.no_grad()
def test_long_sound_is_scored_in_parts(clap: Path) -> None:
    """Parts of at most 10 s, whose cosines are averaged; the same twice."""
    sound = torch.cat([tone(440, 48_000, 8.0), tone(90, 48_000, 8.0)])
    reward = ClapScore(str(clap))
    whole, *halves = (
        reward(clips(part[None, None], 48_000)).values for part in (sound, sound[:384_000], sound[384_000:])
    )
    torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2)
    assert torch.equal(whole, reward(clips(sound[None, None], 48_000)).values)


def test_a_clap_that_fuses_random_parts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fuses parts of a sound at random"):
        ClapScore(str(random_clap(tmp_path, fusion=True)))


def test_a_suite_passes_the_sound_on() -> None:
    suite = RewardSuite({"heard": RewardConfig(model="audible")}, CPU, 8.0)
    prompts = PromptBatch(torch.tensor([1, 2]), TEXTS, {}, again=torch.tensor([False, True]))
    rows = torch.tensor([0, 1])
    sounds = torch.stack([tone(50, 1000, 0.1), torch.zeros(100)])[:, None]
    chunk = RolloutChunk((), torch.zeros(2, 2, 3, 4, 4), rows, torch.zeros(2, dtype=torch.int64), Audio(sounds, 1000))
    assert suite.score(chunk, prompts).videos["heard"].tolist() == [[1.0], [0.0]]
    with pytest.raises(RewardError, match=r"reward 'heard' on .* listens, but the videos have no sound"):
        suite.score(RolloutChunk((), chunk.videos, rows, chunk.sample_index), prompts)


def test_selected_clips_keep_their_sound() -> None:
    both = clips(torch.stack([torch.zeros(1, 10), torch.ones(1, 10)]), 1000)
    chosen = both.select(torch.tensor([1])).audio
    assert chosen is not None
    assert torch.equal(chosen.waveform, torch.ones(1, 1, 10))
    assert chosen.sampling_rate == 1000


def test_a_server_refuses_a_reward_that_listens() -> None:
    with pytest.raises(ConfigError, match="reward 'audible' listens, but a server receives no sound"):
        describe(Audible())
