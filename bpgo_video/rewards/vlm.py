"""Judges by Qwen vision-language models, which answer a question about one video, or about two videos of a prompt.

Videos and pairs are judged one at a time: nothing is padded, and memory does not grow with the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForImageTextToText

from bpgo_video.rewards.base import Clips, Device, FrameScores
from bpgo_video.rewards.networks import Backbone, Backbones, Dtype, NetworkReward
from bpgo_video.rewards.pairwise import Pair, pairs, win_rates
from bpgo_video.rewards.qwen_vl import MAX_PIXELS, MIN_PIXELS, Patches, QwenVL, Times

QUESTION = 'Does this video show "{prompt}"? Answer with Yes or No.'
COMPARISON = (
    'Two videos were made for the prompt "{prompt}". Which of them shows it better, and looks better? '
    "Answer with 1 for the first video or 2 for the second video."
)


class QwenJudge(NetworkReward):
    """The probabilities of one-token answers to a question; a subclass scores with them.

    Args:
        words: the answers.
        reasoning: tokens that the judge may write first. The answer is read where it last wrote the opening and a word;
            a judge that wrote none in time is given the opening then.
    """

    network = AutoModelForImageTextToText

    def __init__(
        self, model: str, question: str, opening: str, words: Sequence[str], reasoning: int,
        settings: tuple[object, ...],
        frames: int | None, frames_per_second: float | None, pixels: tuple[int, int],
        device: Device, dtype: Dtype, backbones: Backbones | None,
    ):  # fmt: skip
        if reasoning and not opening:
            raise ValueError(f"reasoning is {reasoning} without an opening; set the text that the answer follows")
        self.question, self.opening, self.words, self.reasoning = question, opening, list(words), reasoning
        self.pixels, self.settings = pixels, (*pixels, question, opening, *words, reasoning, *settings)
        frames = frames if frames_per_second is None else None
        super().__init__(model, frames, frames_per_second, device, dtype, backbones)
        self.answers = [self.qwen.token(word) for word in words]

    def use(self, backbone: Backbone, folder: Path) -> None:
        self.qwen = QwenVL(backbone, backbone.network.config, folder, *self.pixels)

    def log_probabilities(self, videos: Sequence[Patches], times: Times, prompt: str) -> Float[Tensor, "answers"]:
        """Of the answers about these videos, among each other."""
        question, opening = self.question.replace("{prompt}", prompt), self.opening
        if self.reasoning:
            opening = up_to_answer(self.qwen.written(videos, times, question, self.reasoning), opening, self.words)
        return self.qwen.answer_logits(videos, times, question, opening, self.answers).log_softmax(dim=0)


def up_to_answer(text: str, opening: str, words: Sequence[str]) -> str:
    """What was written up to the last answer, which is a word after the opening; all of it and the opening if none."""
    place = max(text.rfind(opening + word) for word in words)
    return text[:place] + opening if place >= 0 else f"{text}\n{opening}"


class VlmJudge(QwenJudge):
    """The mean of the answers' values, sum_a p_a v_a, of a Qwen-VL: p = P(yes) by default (VQAScore, arXiv 2404.01291).

    Its std is that of the values, sqrt(sum_a p_a (v_a - mean)^2): sqrt(p (1 - p)) by default.

    Args:
        model: local folder or hub id (Qwen/Qwen2.5-VL-7B-Instruct, Qwen/Qwen3-VL-8B-Instruct).
        question: {prompt} is replaced by the video's prompt.
        answers: two words, worth 1 and 0, or words with their values ({"1": 1, "2": 2}); one token each.
        opening: the beginning of the answer, which the answers follow ("Final Score: ").
        reasoning: tokens that the judge may write before the opening; 0 asks for the answer at once.
        frames, frames_per_second: the frames of the input.
        min_pixels, max_pixels: of a resized frame; a token is 28x28 (Qwen3-VL: 32x32) pixels of two frames.

    Raises:
        ValueError: another kind of model, an answer of several tokens, or fewer than two values.
    """

    name = "vlm_judge"

    def __init__(
        self, model: str, question: str = QUESTION, answers: Sequence[str] | Mapping[str, float] = ("Yes", "No"),
        opening: str = "", reasoning: int = 0, frames: int | None = 8, frames_per_second: float | None = None,
        min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS,
        device: Device = "cpu", dtype: Dtype = "float32", backbones: Backbones | None = None,
    ):  # fmt: skip
        values = dict(answers) if isinstance(answers, Mapping) else dict(zip(answers, (1.0, 0.0), strict=True))
        if len(set(values.values())) < 2:
            raise ValueError(f"answers are {values}; a score needs two different values or more")
        super().__init__(
            model, question, opening, list(values), reasoning, tuple(values.values()), frames, frames_per_second,
            (min_pixels, max_pixels), device, dtype, backbones,
        )  # fmt: skip
        self.values = torch.tensor(list(values.values()), dtype=torch.float32)
        self.range = (float(self.values.min()), float(self.values.max()))

    def __call__(self, clips: Clips) -> FrameScores:
        indices = self.frames.of(clips)
        times = clips.times[indices]
        found = [
            self.log_probabilities([self.qwen.patches(video[indices])], times, text)
            for video, text in zip(clips.videos, clips.texts, strict=True)
        ]
        p = torch.stack(found).exp()
        values = self.values.to(p.device)
        mean = (p @ values)[:, None]
        return FrameScores(mean, std=(p * (values - mean).square()).sum(dim=1, keepdim=True).sqrt())


class VlmPairwise(QwenJudge):
    """The win rate of each sample in its group, by a Qwen-VL that compares two videos (Pref-GRPO, arXiv 2508.20751).

    Both orders of a pair are asked. Rates are means of probabilities, where the paper counts wins. Without a gradient.

    Args:
        model: as for `VlmJudge`; also CodeGoat24/UnifiedReward-qwen-7b with its own question.
        question: about two videos; {prompt} is replaced by their prompt.
        answers: the words for the first and the second video, one token each.
        opening: the beginning of the answer, which the answers follow ("Video ").
        reasoning: as for `VlmJudge`.
        opponents: others that each sample meets; None for all of its group.
        frames, frames_per_second, min_pixels, max_pixels: as for `VlmJudge`.

    Raises:
        ValueError: another kind of model, or an answer of several tokens; (from a call) no such number of opponents.
    """

    name, differentiable, groupwise = "vlm_pairwise", False, True

    def __init__(
        self, model: str, question: str = COMPARISON, answers: Sequence[str] = ("1", "2"), opening: str = "",
        reasoning: int = 0,
        opponents: int | None = None, frames: int | None = 8, frames_per_second: float | None = None,
        min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS,
        device: Device = "cpu", dtype: Dtype = "float32", backbones: Backbones | None = None,
    ):  # fmt: skip
        first, second = answers
        super().__init__(
            model, question, opening, [first, second], reasoning, (opponents,), frames, frames_per_second,
            (min_pixels, max_pixels), device, dtype, backbones,
        )  # fmt: skip
        self.opponents = opponents

    @torch.no_grad()
    def __call__(self, clips: Clips) -> FrameScores:
        assert clips.groups is not None
        rates = torch.empty(len(clips), 1)
        stds = torch.empty_like(rates)
        for group in clips.groups.unique():
            rows = (clips.groups == group).nonzero().flatten()
            met = pairs(len(rows), self.opponents)
            rates[rows, 0], stds[rows, 0] = win_rates(len(rows), met, self._compared(clips.select(rows), met))
        return FrameScores(rates, std=stds)

    def _compared(self, group: Clips, met: Sequence[Pair]) -> Float[Tensor, "pairs orders"]:
        """P(the first of each pair is better) with it shown first, then second."""
        indices = self.frames.of(group)
        times, patches = group.times[indices], [self.qwen.patches(video[indices]) for video in group.videos]

        def first_shown(pair: Pair) -> Tensor:
            shown = [patches[sample] for sample in pair]
            return self.log_probabilities(shown, times, group.texts[0])[0].exp()

        answers = [torch.stack([first_shown((i, j)), 1 - first_shown((j, i))]) for i, j in met]
        return torch.stack(answers).cpu()
