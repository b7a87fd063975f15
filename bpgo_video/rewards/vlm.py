"""Rewards by vision-language models, per video: a judge's P(yes), and VideoAlign's scores (VideoReward)."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForImageTextToText, Qwen2VLConfig

from bpgo_video.data.fingerprint import fingerprint_of
from bpgo_video.paths import resolve_folder
from bpgo_video.rewards.backbones import WITHOUT_WEIGHTS, Backbone, Backbones, Dtype, NetworkReward, version
from bpgo_video.rewards.base import Clips, Device, FrameSampling, FrameScores, RewardError, RewardModel
from bpgo_video.rewards.checkpoints import VIDEOALIGN_FILES, load_videoalign, read_videoalign_settings
from bpgo_video.rewards.qwen_vl import MAX_PIXELS, MIN_PIXELS, QwenVL

QUESTION = 'Does this video show "{prompt}"? Answer with Yes or No.'
PARTS = ("VQ", "MQ", "TA")
SCORES: dict[str, tuple[int, ...]] = {"VQ": (0,), "MQ": (1,), "TA": (2,), "overall": (0, 1, 2)}
TOKENS = tuple(f"<|{part}_reward|>" for part in PARTS)
MIN_FRAMES = 4  # that VideoAlign is shown


class VlmJudge(NetworkReward):
    """P(yes)/(P(yes) + P(no)) of the first generated token, of Qwen2.5-VL or Qwen3-VL (VQAScore, arXiv 2404.01291).

    Args:
        model: local folder or hub id (Qwen/Qwen2.5-VL-7B-Instruct, Qwen/Qwen3-VL-8B-Instruct).
        question: {prompt} stands for the video's prompt.
        answers: the two words, one token each.
        frames, frames_per_second: which frames are shown.
        min_pixels, max_pixels: of a resized frame; a token is 28x28 (Qwen3-VL: 32x32) pixels of two frames.

    Raises:
        ValueError: the model is of another kind, or an answer is several tokens.
    """

    name = "vlm_judge"
    network = AutoModelForImageTextToText

    def __init__(
        self, model: str, question: str = QUESTION, answers: Sequence[str] = ("Yes", "No"),
        frames: int | None = 8, frames_per_second: float | None = None,
        min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS,
        device: Device = "cpu", dtype: Dtype = "float32", backbones: Backbones | None = None,
    ):  # fmt: skip
        self.question, self.pixels = question, (min_pixels, max_pixels)
        self.settings = (min_pixels, max_pixels, question, *answers)
        frames = frames if frames_per_second is None else None
        super().__init__(model, frames, frames_per_second, device, dtype, backbones)
        self.answers = [self._token(word) for word in answers]

    def use(self, backbone: Backbone, folder: Path) -> None:
        self.qwen = QwenVL(backbone, backbone.network.config, folder, *self.pixels)

    def __call__(self, clips: Clips) -> FrameScores:
        indices = self.frames.of(clips)
        times = clips.times[indices]
        logits = [self._logits(video[indices], times, t) for video, t in zip(clips.videos, clips.texts, strict=True)]
        yes, no = torch.stack(logits).float().unbind(dim=1)
        return FrameScores((yes - no).sigmoid()[:, None])

    def _logits(self, frames: Tensor, times: Tensor, prompt: str) -> Float[Tensor, "answers"]:
        qwen = self.qwen
        inputs: dict[str, Any] = qwen.inputs(frames, times, self.question.replace("{prompt}", prompt))
        inputs["mm_token_type_ids"] = 2 * (inputs["input_ids"] == qwen.config.video_token_id).int()
        if qwen.config.model_type == "qwen2_5_vl":  # positions in time are in seconds
            spacing = float(times[-1] - times[0]) / max(1, len(times) - 1)
            inputs["second_per_grid_ts"] = torch.tensor([spacing * qwen.layout.steps])
        return qwen.backbone.network(**inputs, use_cache=False, logits_to_keep=1).logits[0, -1, self.answers]

    def _token(self, word: str) -> int:
        ids = self.qwen.tokenizer.encode(word, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"the answer {word!r} is {len(ids)} tokens; the judge compares single ones")
        return ids[0]


class VideoAlign(RewardModel):
    """(head(h) - mean)/std at a special token of the question, of a fine-tuned Qwen2-VL-2B (arXiv 2501.13918).

    VQ (visual quality), MQ (motion quality), TA (text alignment) or their sum `overall`, one score per video: 0 is an
    average video of its authors' validation set, negative scores are common. Rewards of several scores run the network
    once. Departures: frames are resized as floats, not rounded to 8 bits; a video of one frame is shown as two.

    Args:
        model: local folder or hub id (KwaiVGI/VideoReward) with model_config.json and checkpoint-*/model.pth.
        template: file of the question: text with {text_prompt} and the three tokens, or the authors' own
            prompt_template.py, of which DETAILED_PROMPT_WITH_SPECIAL_TOKEN is read (nothing is run).
        score: name in `SCORES`.
        base: folder or hub id of the Qwen2-VL that it was trained from, for its configuration, tokenizer and chat
            template; its weights are not read.

    Raises:
        RewardError: (of a call) a prompt holds one of the special tokens.
        ValueError: no such score; a template without its tokens; weights of another model.
    """

    name = "videoalign"
    range = (-math.inf, math.inf)
    differentiable = True

    def __init__(
        self, template: str, score: str = "overall", model: str = "KwaiVGI/VideoReward",
        base: str = "Qwen/Qwen2-VL-2B-Instruct",
        device: Device = "cpu", dtype: Dtype = "float32", backbones: Backbones | None = None,
    ):  # fmt: skip
        if score not in SCORES:
            raise ValueError(f"score = {score!r}: must be one of {sorted(SCORES)}")
        folder = resolve_folder(model, only=VIDEOALIGN_FILES)
        qwen = resolve_folder(base, only=WITHOUT_WEIGHTS)
        self.template, self.columns = read_template(Path(template)), SCORES[score]
        settings = read_videoalign_settings(folder)
        data, statistics = settings["data_config"], settings["inference_config"]
        self.frames = FrameSampling(fps=data["fps"])
        source = (VideoAlign.__name__, str(folder.resolve()), str(qwen.resolve()))
        backbone = (backbones or Backbones()).once(
            source, device, dtype, lambda d: load_videoalign(folder, qwen, settings["peft_lora_config"], d)
        )
        config = Qwen2VLConfig.from_pretrained(qwen)
        self.qwen = QwenVL(backbone, config, qwen, MIN_PIXELS, data["max_frame_pixels"])
        self._add_tokens()
        self.mean, self.std = (torch.tensor([statistics[f"{p}_{which}"] for p in PARTS]) for which in ("mean", "std"))
        read = fingerprint_of(folder, VIDEOALIGN_FILES), fingerprint_of(qwen, WITHOUT_WEIGHTS)
        self.version = version(read, self.frames, dtype, score, self.template)

    def __call__(self, clips: Clips) -> FrameScores:
        key = (self.qwen.backbone.key, self.template)
        parts = clips.once(key, lambda: torch.stack([self._parts(clips, row) for row in range(len(clips))]))
        return FrameScores(parts[:, self.columns].sum(dim=1, keepdim=True))

    def _parts(self, clips: Clips, row: int) -> Float[Tensor, "parts"]:
        """The three normalised scores of one video.

        Positions count tokens, the same on all three of Qwen2-VL's axes: the model was trained that way.
        """
        network, total = self.qwen.backbone.network, clips.videos.shape[1]
        indices = FrameSampling(count=frame_count(total, clips.fps, self.frames.fps or 0.0)).of(clips)
        question = self.template.replace("{text_prompt}", clips.texts[row])
        inputs = self.qwen.inputs(clips.videos[row, indices], clips.times[indices], question)
        ids = inputs["input_ids"]
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, 1, -1)
        hidden = network.model(**inputs, position_ids=positions, use_cache=False).last_hidden_state[0]
        scores = hidden[[self._place(ids[0], token) for token in TOKENS]].float() @ network.head.float().T
        raw = scores.diagonal() if scores.shape[1] == len(PARTS) else scores[:, 0]
        return (raw - self.mean.to(raw.device)) / self.std.to(raw.device)

    def _add_tokens(self) -> None:
        """Adds the special tokens, which are the last rows of the checkpoint's embeddings."""
        tokenizer, embeddings = self.qwen.tokenizer, self.qwen.backbone.network.model.get_input_embeddings()
        tokenizer.add_special_tokens({"additional_special_tokens": list(TOKENS)})
        ids, rows = tokenizer.convert_tokens_to_ids(list(TOKENS)), embeddings.num_embeddings
        if ids != list(range(rows - len(TOKENS), rows)):
            raise ValueError(f"{TOKENS} are the tokens {ids} of base; the checkpoint has {rows}: they must be its last")

    def _place(self, ids: Tensor, token: str) -> int:
        places = (ids == self.qwen.tokenizer.convert_tokens_to_ids(token)).nonzero()
        if len(places) != 1:
            raise RewardError(f"a question holds {token} {len(places)} times; a prompt must not contain it")
        return int(places[0])


def frame_count(total: int, fps: float, per_second: float) -> int:
    """How many frames VideoAlign is shown: `per_second` per second, an even number, at least 4 if there are so many."""
    wanted = min(max(total / fps * per_second, MIN_FRAMES), total // 2 * 2)
    return max(1, 2 * round(wanted / 2))


def read_template(path: Path) -> str:
    """The question's text.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it has no place for the prompt, or not each of the tokens once.
    """
    if not path.is_file():
        raise FileNotFoundError(f"template {path} does not exist; it is prompt_template.py of KwaiVGI/VideoAlign")
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        text = _constant(text, "DETAILED_PROMPT_WITH_SPECIAL_TOKEN", path)
    if "{text_prompt}" not in text or any(text.count(token) != 1 for token in TOKENS):
        raise ValueError(f"{path} must hold {{text_prompt}} and each of {TOKENS} once")
    return text


def _constant(source: str, name: str, path: Path) -> str:
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return str(ast.literal_eval(node.value))
    raise ValueError(f"{path} defines no {name}")
