"""Would a vision-language model say yes? The probability of its first word, as a score of the whole video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForImageTextToText

from bpgo_video.data.fingerprint import fingerprint
from bpgo_video.paths import resolve_folder
from bpgo_video.rewards.backbones import Backbones, Dtype, version
from bpgo_video.rewards.base import Clips, FrameSampling, FrameScores
from bpgo_video.rewards.qwen_vl import MAX_PIXELS, MIN_PIXELS, QwenVL

QUESTION = 'Does this video show "{prompt}"? Answer with Yes or No.'


class VlmJudge:
    """P(yes)/(P(yes) + P(no)) of the first generated token, of Qwen2.5-VL or Qwen3-VL (VQAScore, arXiv 2404.01291).

    Args:
        model: local folder or hub id (Qwen/Qwen2.5-VL-7B-Instruct, Qwen/Qwen3-VL-8B-Instruct).
        question: what is asked; {prompt} stands for the video's prompt.
        answers: the two words, one token each.
        frames, frames_per_second: which frames are shown.
        min_pixels, max_pixels: of a resized frame; a token is 28x28 (Qwen3-VL: 32x32) pixels of two frames.

    Raises:
        ValueError: the model is of another kind, or an answer is several tokens.
    """

    name = "vlm_judge"
    range = (0.0, 1.0)
    higher_is_better = True
    differentiable = True
    kind = "real"

    def __init__(
        self,
        model: str,
        question: str = QUESTION,
        answers: Sequence[str] = ("Yes", "No"),
        frames: int | None = 8,
        frames_per_second: float | None = None,
        min_pixels: int = MIN_PIXELS,
        max_pixels: int = MAX_PIXELS,
        device: torch.device | str = "cpu",
        dtype: Dtype = "float32",
        backbones: Backbones | None = None,
    ):
        folder, self.question = resolve_folder(model), question
        self.frames = FrameSampling(frames if frames_per_second is None else None, frames_per_second)
        backbone = (backbones or Backbones()).load(AutoModelForImageTextToText, folder, device, dtype)
        self.qwen = QwenVL(backbone, backbone.network.config, folder, min_pixels, max_pixels)
        self.answers = [self._token(word) for word in answers]
        self.version = version(
            [fingerprint(folder, (".",))], self.frames, dtype, min_pixels, max_pixels, question, *answers
        )

    def __call__(self, clips: Clips) -> FrameScores:
        indices = self.frames.indices(clips.videos.shape[1], clips.fps)
        times = clips.times[indices]
        logits = [self._logits(video[indices], times, t) for video, t in zip(clips.videos, clips.texts, strict=True)]
        yes, no = torch.stack(logits).float().unbind(dim=1)
        return FrameScores((yes - no).sigmoid()[:, None])

    def _logits(self, frames: Tensor, times: Tensor, prompt: str) -> Float[Tensor, "answers"]:
        network, qwen = self.qwen.backbone.network, self.qwen
        inputs: dict[str, Any] = qwen.inputs(frames, times, self.question.replace("{prompt}", prompt))
        inputs["mm_token_type_ids"] = 2 * (inputs["input_ids"] == qwen.config.video_token_id).int()
        if qwen.config.model_type == "qwen2_5_vl":  # positions in time are in seconds
            spacing = float(times[-1] - times[0]) / max(1, len(times) - 1)
            inputs["second_per_grid_ts"] = torch.tensor([spacing * qwen.layout.steps])
        return network(**inputs, use_cache=False, logits_to_keep=1).logits[0, -1, self.answers]

    def _token(self, word: str) -> int:
        ids = self.qwen.tokenizer.encode(word, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"the answer {word!r} is {len(ids)} tokens; the judge compares single ones")
        return ids[0]
