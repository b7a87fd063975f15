"""Rewards that listen: a guard against silence and clipping, and CLAP's match of sound and prompt."""

from __future__ import annotations

from math import gcd
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.signal import resample_poly
from torch.nn.functional import cosine_similarity
from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel

from bpgo_video.files import fingerprint_of, resolve_folder
from bpgo_video.rewards.base import Clips, Device, FrameScores, RewardModel
from bpgo_video.rewards.networks import DTYPES, Dtype, version
from bpgo_video.types import Audio
from bpgo_video.weights import load_network

CLIPPED = 0.999  # of full scale; vocoders that end in tanh or a clamp come close to 1 where they saturate


class Audible(RewardModel):
    """1 for each window of sound that is neither silent nor clipped, else 0.

    A window is silent if its level, 20 log10 of the root mean square over channels and samples, is below `silence`. It
    is clipped if a sample reaches .999. This is a guard, no measure of quality: noise of any kind scores 1.

    Args:
        silence: dB below full scale, negative.
        window: seconds.
    """

    name, version = "audible", "1"
    listens = True

    def __init__(self, silence: float = -60.0, window: float = 0.1):
        if not (silence < 0 < window):
            raise ValueError(f"silence is {silence} dB and window {window} s; silence must be below 0, window above 0")
        self.silence, self.window = silence, window
        self.version = f"1-{silence:g}dB-{window:g}s"

    def __call__(self, clips: Clips) -> FrameScores:
        assert clips.audio is not None
        waveform, size = clips.audio.waveform.float(), round(self.window * clips.audio.sampling_rate)
        windows = waveform.split(size, dim=2)
        level = torch.stack([10 * part.square().mean(dim=(1, 2)).log10() for part in windows], dim=1)
        peak = torch.stack([part.abs().amax(dim=(1, 2)) for part in windows], dim=1)
        times = torch.arange(len(windows), dtype=torch.float64) * size / clips.audio.sampling_rate
        return FrameScores(((level >= self.silence) & (peak < CLIPPED)).float(), times)


class ClapScore(RewardModel):
    """cos(sound, prompt) of a ClapModel (arXiv 2211.06687), a score per video.

    The sound is mixed to one channel and resampled to the network's rate. Longer sound than the network reads (10 s) is
    cut into parts of equal length, whose cosines are averaged: the network would read a part at random.

    Args:
        model: folder or hub id of a CLAP without feature fusion.
    """

    name = "clap_score"
    range = (-1.0, 1.0)
    listens = True

    def __init__(self, model: str = "laion/clap-htsat-unfused", device: Device = "cpu", dtype: Dtype = "float32"):
        folder = resolve_folder(model)
        network: Any = load_network(ClapModel, folder, DTYPES[dtype], whole=False)
        self.network = network.to(device).eval().requires_grad_(False)
        if network.config.audio_config.enable_fusion:
            raise ValueError(
                f"{model} fuses parts of a sound at random; take one without fusion, laion/clap-htsat-unfused"
            )
        self.extractor: Any = ClapFeatureExtractor.from_pretrained(folder)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.version = version([fingerprint_of(folder, ("**/*",))], self.frames, dtype)

    def __call__(self, clips: Clips) -> FrameScores:
        assert clips.audio is not None
        parts = self.parts(clips.audio)
        rate, device = self.extractor.sampling_rate, self.network.device
        inputs = self.extractor([part for sound in parts for part in sound], sampling_rate=rate, return_tensors="pt")
        features = inputs["input_features"].to(device, self.network.dtype)
        tokens = self.tokenizer(list(clips.texts), padding=True, truncation=True, return_tensors="pt").to(device)
        sounds = self.network.get_audio_features(input_features=features).pooler_output.float()
        texts = self.network.get_text_features(**tokens).pooler_output.float()
        each = cosine_similarity(sounds.unflatten(0, (len(clips), -1)), texts[:, None], dim=2)
        return FrameScores(each.mean(dim=1, keepdim=True))

    def parts(self, audio: Audio) -> list[list[Float[np.ndarray, "samples"]]]:
        """Each sound at the network's rate, in equally many parts that the network reads whole."""
        rate, longest = self.extractor.sampling_rate, self.extractor.nb_max_samples
        divisor = gcd(rate, audio.sampling_rate)
        mono = audio.waveform.float().mean(dim=1).cpu().numpy()
        resampled = resample_poly(mono, rate // divisor, audio.sampling_rate // divisor, axis=1)
        return [np.array_split(sound, -(-len(sound) // longest)) for sound in resampled]
