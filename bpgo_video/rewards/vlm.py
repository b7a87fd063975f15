"""Rewards by Qwen vision-language models, one score per video: a judge's P(yes), and VideoAlign (VideoReward).

The input of the models is computed in torch alone, since their own video processors need torchvision. Videos are scored
one at a time: nothing is padded, and memory does not grow with the batch.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from bpgo_video.errors import unknown
from bpgo_video.files import resolve_folder
from bpgo_video.policies.lora import add_adapter_in
from bpgo_video.rewards.base import Clips, Device, FrameSampling, FrameScores, RewardError
from bpgo_video.rewards.networks import (
    WITHOUT_WEIGHTS,
    Backbone,
    Backbones,
    Dtype,
    NetworkReward,
    Preprocessing,
    Weights,
    read_preprocessor,
    read_weights,
)
from bpgo_video.weights import load_network

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
START, PAD, END = "<|vision_start|>", "<|video_pad|>", "<|vision_end|>"
MIN_PIXELS, MAX_PIXELS = 128 * 28 * 28, 256 * 28 * 28  # of a frame
QUESTION = 'Does this video show "{prompt}"? Answer with Yes or No.'

PARTS = ("VQ", "MQ", "TA")
SCORES: dict[str, tuple[int, ...]] = {"VQ": (0,), "MQ": (1,), "TA": (2,), "overall": (0, 1, 2)}
TOKENS = tuple(f"<|{part}_reward|>" for part in PARTS)
MIN_FRAMES = 4  # of VideoAlign's input
VIDEOALIGN_FILES = ("model_config.json", "checkpoint-*/model.pth")

Frames = Float[Tensor, "frames 3 height width"]
Times = Float[Tensor, "frames"]  # in seconds


@dataclass(frozen=True)
class PatchLayout:
    """The patches of a model's vision tower.

    Attributes:
        patch: pixels of a patch's side.
        steps: frames that share a patch.
        merge: patches of a side that become one token.
        mean, std: per channel.
        min_pixels, max_pixels: of a resized frame.
    """

    patch: int
    steps: int
    merge: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    min_pixels: int = MIN_PIXELS
    max_pixels: int = MAX_PIXELS

    def patches(self, frames: Frames) -> tuple[Float[Tensor, "patches dim"], tuple[int, int, int]]:
        """Pixels by patch, in the order of the tokens, and the grid (time, height, width) of patches.

        Frames are resized to multiples of a token's side (bicubic), and the last one is repeated to fill a step.
        """
        height, width = frames.shape[-2:]
        size = smart_resize(height, width, self.patch * self.merge, self.min_pixels, self.max_pixels)
        pixels = Preprocessing("stretch", size, self.mean, self.std)(frames)
        pixels = torch.cat([pixels, pixels[-1:].expand(-len(pixels) % self.steps, -1, -1, -1)])
        patches = rearrange(
            pixels,
            "(t s) c (h mh ph) (w mw pw) -> (t h w mh mw) (c s ph pw)",
            s=self.steps, mh=self.merge, mw=self.merge, ph=self.patch, pw=self.patch,
        )  # fmt: skip
        return patches, (len(pixels) // self.steps, size[0] // self.patch, size[1] // self.patch)


class QwenVL:
    """A Qwen2-VL, Qwen2.5-VL or Qwen3-VL network with its tokenizer.

    Args:
        config: of the whole model.
        folder: of tokenizer, chat template and preprocessor_config.json.
        min_pixels, max_pixels: of a resized frame.

    Raises:
        ValueError: another kind of model, or a chat template without videos.
    """

    def __init__(self, backbone: Backbone, config: Any, folder: Path, min_pixels: int, max_pixels: int):
        if config.model_type not in KINDS:
            raise ValueError(unknown(f"model_type in {folder}", config.model_type, KINDS))
        self.backbone, self.config = backbone, config
        vision, preprocessor = config.vision_config, read_preprocessor(folder)
        sizes = vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size
        statistics = tuple(preprocessor["image_mean"]), tuple(preprocessor["image_std"])
        self.layout = PatchLayout(*sizes, *statistics, min_pixels, max_pixels)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        # Older folders have two chat templates: the tokenizer's may lack videos, the model was trained with the other.
        path, self.template = folder / "chat_template.json", None
        if path.is_file() and not (folder / "chat_template.jinja").is_file():
            self.template = json.loads(path.read_text("utf-8"))["chat_template"]
        chat, video = self._chat(""), START + PAD + END
        if chat.count(video) != 1:
            raise ValueError(f"{folder}: the chat template must write {video} for a video; it wrote {chat!r}")

    def inputs(self, frames: Frames, times: Times, question: str) -> dict[str, Tensor]:
        """The network's arguments for one video and one question, without positions."""
        patches, grid = self.layout.patches(frames.to(self.backbone.device))
        ids = self._tokens(question, grid, times.tolist())
        return {
            "input_ids": ids,
            "pixel_values_videos": patches.to(self.backbone.dtype),
            "video_grid_thw": torch.tensor([grid], device=ids.device),
        }

    def _tokens(self, question: str, grid: tuple[int, int, int], times: list[float]) -> Int[Tensor, "1 tokens"]:
        pads = PAD * (grid[1] * grid[2] // self.layout.merge**2)  # of one step
        if self.config.model_type == "qwen3_vl":  # each step after its mean time
            times = times + times[-1:] * (-len(times) % self.layout.steps)
            ends = zip(times[:: self.layout.steps], times[self.layout.steps - 1 :: self.layout.steps], strict=True)
            video = "".join(f"<{(first + last) / 2:.1f} seconds>{START}{pads}{END}" for first, last in ends)
        else:
            video = START + pads * grid[0] + END
        chat = self._chat(question).replace(START + PAD + END, video, 1)
        return self.tokenizer(chat, add_special_tokens=False, return_tensors="pt").input_ids.to(self.backbone.device)

    def _chat(self, question: str) -> str:
        """The video and the question, up to the start of the answer."""
        messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, tokenize=False, add_generation_prompt=True
        )


class VlmJudge(NetworkReward):
    """p = P(yes)/(P(yes) + P(no)) of the first generated token, of Qwen2.5-VL or Qwen3-VL (VQAScore, arXiv 2404.01291).

    p is the mean of an answer that is 1 for yes and 0 for no. Its std, sqrt(p (1 - p)), is the std of the score.

    Args:
        model: local folder or hub id (Qwen/Qwen2.5-VL-7B-Instruct, Qwen/Qwen3-VL-8B-Instruct).
        question: {prompt} is replaced by the video's prompt.
        answers: the two words, one token each.
        frames, frames_per_second: the frames of the input.
        min_pixels, max_pixels: of a resized frame; a token is 28x28 (Qwen3-VL: 32x32) pixels of two frames.

    Raises:
        ValueError: another kind of model, or an answer of several tokens.
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
        p = (yes - no).sigmoid()[:, None]
        return FrameScores(p, std=(p * (no - yes).sigmoid()[:, None]).sqrt())

    def _logits(self, frames: Frames, times: Times, prompt: str) -> Float[Tensor, "answers"]:
        qwen = self.qwen
        inputs: dict[str, Any] = qwen.inputs(frames, times, self.question.replace("{prompt}", prompt))
        inputs["mm_token_type_ids"] = 2 * (inputs["input_ids"] == qwen.config.video_token_id).int()
        if qwen.config.model_type == "qwen2_5_vl":  # its positions in time are in seconds
            spacing = float(times[-1] - times[0]) / max(1, len(times) - 1)
            inputs["second_per_grid_ts"] = torch.tensor([spacing * qwen.layout.steps])
        return qwen.backbone.network(**inputs, use_cache=False, logits_to_keep=1).logits[0, -1, self.answers]

    def _token(self, word: str) -> int:
        ids = self.qwen.tokenizer.encode(word, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"the answer {word!r} is {len(ids)} tokens; the judge needs answers of one token")
        return ids[0]


class VideoRewardNetwork(nn.Module):
    """VideoAlign's network: Qwen2-VL without the vocabulary's head, and the reward's head on its last hidden states."""

    def __init__(self, model: nn.Module, head: Tensor):
        super().__init__()
        self.model: Any = model
        self.head = nn.Parameter(head)


class VideoAlign(NetworkReward):
    """(head(h) - mean)/std at a special token of the question, of a fine-tuned Qwen2-VL-2B (arXiv 2501.13918).

    VQ (visual quality), MQ (motion quality), TA (text alignment) or their sum `overall`, one score per video: 0 is an
    average video of the authors' validation set, negative scores are common. Rewards with different scores share one
    run of the network. Differences to the authors' code: frames are resized as floats, not rounded to 8 bits; a video
    of one frame is repeated once.

    Args:
        model: local folder or hub id (KwaiVGI/VideoReward) with model_config.json and checkpoint-*/model.pth.
        template: file of the question: text with {text_prompt} and the three tokens, or the authors' own
            prompt_template.py, of which DETAILED_PROMPT_WITH_SPECIAL_TOKEN is read (nothing is run).
        score: name in `SCORES`.
        frames_per_second: of the model's input; None takes what it was trained with. Another number sees other frames,
            for a further scoring of the same videos.
        base: folder or hub id of the Qwen2-VL that was fine-tuned, whose configuration, tokenizer and chat template are
            used; its weights are not read.

    Raises:
        RewardError: (from a call) a prompt contains one of the special tokens.
        ValueError: no such score; a template without its tokens; weights of another model.
    """

    name = "videoalign"
    range = (-math.inf, math.inf)
    network = VideoRewardNetwork
    files = VIDEOALIGN_FILES

    def __init__(
        self, template: str, score: str = "overall", model: str = "KwaiVGI/VideoReward",
        base: str = "Qwen/Qwen2-VL-2B-Instruct", frames_per_second: float | None = None,
        device: Device = "cpu", dtype: Dtype = "float32", backbones: Backbones | None = None,
    ):  # fmt: skip
        if score not in SCORES:
            raise ValueError(unknown("score", score, SCORES))
        self.template, self.columns = read_template(Path(template)), SCORES[score]
        self.settings = (score, self.template, *([] if frames_per_second is None else [frames_per_second]))
        self.own_sampling, self.processor = frames_per_second, resolve_folder(base, only=WITHOUT_WEIGHTS)
        super().__init__(model, None, None, device, dtype, backbones)

    def check(self, folder: Path) -> None:
        path = folder / "model_config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no model_config.json; is it a folder like KwaiVGI/VideoReward?")
        self.trained = json.loads(path.read_text("utf-8"))
        if not self.trained.get("inference_config"):
            raise ValueError(f"{path} has no inference_config: the mean and std that normalise the scores")

    def build(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        assert self.processor is not None
        return load_videoalign(folder, self.processor, self.trained["peft_lora_config"], dtype)

    def use(self, backbone: Backbone, folder: Path) -> None:
        data, statistics = self.trained["data_config"], self.trained["inference_config"]
        self.frames = FrameSampling(fps=self.own_sampling or data["fps"])
        config = Qwen2VLConfig.from_pretrained(folder)
        self.qwen = QwenVL(backbone, config, folder, MIN_PIXELS, data["max_frame_pixels"])
        self._add_tokens()
        self.mean, self.std = (torch.tensor([statistics[f"{p}_{which}"] for p in PARTS]) for which in ("mean", "std"))

    def __call__(self, clips: Clips) -> FrameScores:
        key = (self.qwen.backbone.key, self.template, self.frames)
        parts = clips.cached(key, lambda: torch.stack([self._parts(clips, row) for row in range(len(clips))]))
        return FrameScores(parts[:, self.columns].sum(dim=1, keepdim=True))

    def _parts(self, clips: Clips, row: int) -> Float[Tensor, "parts"]:
        """The three normalised scores of one video.

        Positions count tokens, the same on all three of Qwen2-VL's axes, as in the model's training.
        """
        network, total = self.qwen.backbone.network, clips.videos.shape[1]
        indices = FrameSampling(count=frame_count(total, clips.fps, self.frames.fps or 0.0)).of(clips)
        question = self.template.replace("{text_prompt}", clips.texts[row])
        inputs = self.qwen.inputs(clips.videos[row, indices], clips.times[indices], question)
        ids = inputs["input_ids"]
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, 1, -1)
        hidden = network.model(**inputs, position_ids=positions, use_cache=False).last_hidden_state[0]
        scores = hidden[[self._position(ids[0], token) for token in TOKENS]].float() @ network.head.float().T
        raw = scores.diagonal() if scores.shape[1] == len(PARTS) else scores[:, 0]
        return (raw - self.mean.to(raw.device)) / self.std.to(raw.device)

    def _add_tokens(self) -> None:
        """Adds the special tokens, which are the last rows of the checkpoint's embeddings."""
        tokenizer, embeddings = self.qwen.tokenizer, self.qwen.backbone.network.model.get_input_embeddings()
        tokenizer.add_special_tokens({"additional_special_tokens": list(TOKENS)})
        ids, rows = tokenizer.convert_tokens_to_ids(list(TOKENS)), embeddings.num_embeddings
        if ids != list(range(rows - len(TOKENS), rows)):
            raise ValueError(f"{TOKENS} are the tokens {ids} of base; the checkpoint has {rows}: they must be its last")

    def _position(self, ids: Tensor, token: str) -> int:
        positions = (ids == self.qwen.tokenizer.convert_tokens_to_ids(token)).nonzero()
        if len(positions) != 1:
            raise RewardError(f"a question holds {token} {len(positions)} times; a prompt must not contain it")
        return int(positions[0])


def frame_count(total: int, fps: float, per_second: float) -> int:
    """Number of VideoAlign's input frames: `per_second` per second, an even number, at least 4 if there are as many."""
    count = min(max(total / fps * per_second, MIN_FRAMES), total // 2 * 2)
    return max(1, 2 * round(count / 2))


def read_template(path: Path) -> str:
    """The question's text, from a text file or from the authors' prompt_template.py.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it lacks the prompt's placeholder, or does not have each of the tokens once.
    """
    if not path.is_file():
        raise FileNotFoundError(f"template {path} does not exist; it is prompt_template.py of KwaiVGI/VideoAlign")
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        name = "DETAILED_PROMPT_WITH_SPECIAL_TOKEN"
        assigned = [node for node in ast.parse(text).body if isinstance(node, ast.Assign)]
        values = [node.value for node in assigned for t in node.targets if isinstance(t, ast.Name) and t.id == name]
        if not values:
            raise ValueError(f"{path} defines no {name}")
        text = str(ast.literal_eval(values[0]))
    if "{text_prompt}" not in text or any(text.count(token) != 1 for token in TOKENS):
        raise ValueError(f"{path} must hold {{text_prompt}} and each of {TOKENS} once")
    return text


def load_videoalign(folder: Path, base: Path, lora: dict[str, Any], dtype: torch.dtype) -> VideoRewardNetwork:
    """The network of the folder's last checkpoint with its LoRA updates merged, in `dtype`.

    The vocabulary has the checkpoint's size: its embeddings were cut when the special tokens were added.

    Args:
        base: folder of the fine-tuned Qwen2-VL's configuration.

    Raises:
        FileNotFoundError: no checkpoint-*/model.pth.
        ValueError: weights are missing, or of another model.
    """
    files = sorted(folder.glob(VIDEOALIGN_FILES[1]), key=lambda path: int(path.parent.name.split("-")[-1]))
    if not files:
        raise FileNotFoundError(f"{folder} has no {VIDEOALIGN_FILES[1]}")
    scale = lora["lora_alpha"] / (math.sqrt(lora["lora_r"]) if lora.get("use_rslora") else lora["lora_r"])
    weights = merge_lora(read_weights(files[-1]), scale)
    if "rm_head.weight" not in weights or "language_model.embed_tokens.weight" not in weights:
        raise ValueError(f"{files[-1]} has no rm_head.weight and embeddings; it is no reward on Qwen2-VL")
    config: Any = Qwen2VLConfig.from_pretrained(base)
    config.text_config.vocab_size = weights["language_model.embed_tokens.weight"].shape[0]
    head = weights.pop("rm_head.weight").to(dtype)
    return VideoRewardNetwork(load_network(Qwen2VLModel, files[-1], dtype, config=config, weights=weights), head)


def merge_lora(weights: Weights, scale: float) -> dict[str, Tensor]:
    """W + scale B A under Qwen2VLModel's names, from a state dict of a model that peft wraps.

    Raises:
        ValueError: an update of another form, or one without its weight.
    """
    layers = {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}
    updates = {name: layers.pop(name) for name in list(layers) if ".lora_" in name}
    merged = {}
    for name, weight in layers.items():
        layer = name.removesuffix(".base_layer.weight")
        if f"{layer}.lora_A.default.weight" in updates:
            down, up = (updates.pop(f"{layer}.lora_{part}.default.weight") for part in "AB")
            weight = add_adapter_in(weight, down, up, scale)
        if not name.startswith("lm_head."):
            name = re.sub(r"^model\.(visual|language_model)\.", r"\1.", name.replace(".base_layer.", "."))
            # transformers had no prefix for the language model when the checkpoint was made
            merged[re.sub(r"^model\.", "language_model.", name)] = weight
    if updates:
        raise ValueError(f"{len(updates)} LoRA updates have no linear layer, the first is {sorted(updates)[0]}")
    return merged
