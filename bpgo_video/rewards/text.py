"""Text reward: whether the video shows the text that its prompt quotes, by optical character recognition (PP-OCRv4)."""

from __future__ import annotations

import re

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from bpgo_video.data.media import as_bytes
from bpgo_video.rewards.base import Clips, FrameReward, FrameSampling, RewardError
from bpgo_video.rewards.packaged import imported, release

QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')


class OcrText(FrameReward):
    """max(0, 1 - levenshtein(read, wanted) / len(wanted)) per frame, without case and spaces.

    `wanted` is all that the prompt has in double quotes; `read` is what the recogniser found, from top to bottom. The
    text reward of Flow-GRPO (arXiv 2505.05470), on frames. Weights come with rapidocr-onnxruntime (Apache-2.0).

    Args:
        frames: how many frames are read, spread evenly; None reads all.
        frames_per_second: how many of each second are read instead.

    Raises:
        RewardError: (of a call) a prompt quotes no text.
    """

    name = "ocr_text"

    def __init__(self, frames: int | None = 4, frames_per_second: float | None = None):
        self.frames = FrameSampling(None if frames_per_second else frames, frames_per_second)
        # The runtime would otherwise start a thread for every core of the machine, in every rank.
        threads = {"intra_op_num_threads": torch.get_num_threads(), "inter_op_num_threads": 1}
        self.reader = imported("rapidocr_onnxruntime").RapidOCR(**threads)
        self.distance = imported("rapidfuzz.distance").Levenshtein.distance
        self.version = f"{release('rapidocr-onnxruntime')}-{self.frames}"

    def score(self, clips: Clips, indices: list[int]) -> Float[Tensor, "samples scored"]:
        wanted = [quoted_text(text) for text in clips.texts]
        scores = [
            [max(0.0, 1 - self.distance(self.read(frame), text) / len(text)) for frame in as_bytes(video[indices])]
            for video, text in zip(clips.videos, wanted, strict=True)
        ]
        return torch.tensor(scores)

    def read(self, frame: UInt8[np.ndarray, "height width 3"]) -> str:
        """The text of an RGB picture, folded."""
        lines, _ = self.reader(frame[..., ::-1])
        return folded("".join(text for _, text, _ in lines or []))


def quoted_text(prompt: str) -> str:
    """What the prompt has in double quotes, folded.

    Raises:
        RewardError: nothing is in quotes.
    """
    text = folded("".join(straight or curly for straight, curly in QUOTED.findall(prompt)))
    if not text:
        fix = 'use prompts such as: a shop sign that says "open"'
        raise RewardError(f"reward 'ocr_text' reads text in double quotes of the prompt; {prompt!r} has none; {fix}")
    return text


def folded(text: str) -> str:
    """Without case and spaces."""
    return "".join(text.split()).casefold()
