"""The input of Qwen vision-language models, computed in torch alone: their own video processors need torchvision."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from bpgo_video.errors import unknown
from bpgo_video.rewards.networks import Backbone, Preprocessing, read_preprocessor

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
START, PAD, END = "<|vision_start|>", "<|video_pad|>", "<|vision_end|>"
VIDEO = START + PAD + END  # a video, as a chat template writes it
MIN_PIXELS, MAX_PIXELS = 128 * 28 * 28, 256 * 28 * 28  # of a frame

Frames = Float[Tensor, "frames 3 height width"]
Times = Float[Tensor, "frames"]  # in seconds
Grid = tuple[int, int, int]  # patches of time, height, width
Patches = tuple[Float[Tensor, "patches dim"], Grid]


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

    def patches(self, frames: Frames) -> Patches:
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
        for videos in (1, 2):
            chat = self._chat("", videos)
            if chat.count(VIDEO) != videos:
                raise ValueError(f"{folder}: the chat template must write {VIDEO} for each video; it wrote {chat!r}")

    def patches(self, frames: Frames) -> Patches:
        return self.layout.patches(frames.to(self.backbone.device))

    def inputs(self, videos: Sequence[Patches], times: Times, question: str, opening: str = "") -> dict[str, Tensor]:
        """The network's arguments for a question about videos with the same frame times, without positions.

        Args:
            opening: the beginning of the answer.
        """
        ids = self._tokens(question, [grid for _, grid in videos], times.tolist(), opening)
        return {
            "input_ids": ids,
            "pixel_values_videos": torch.cat([patches for patches, _ in videos]).to(self.backbone.dtype),
            "video_grid_thw": torch.tensor([grid for _, grid in videos], device=ids.device),
        }

    def _tokens(
        self, question: str, grids: Sequence[Grid], times: list[float], opening: str
    ) -> Int[Tensor, "1 tokens"]:
        before, *after = self._chat(question, len(grids)).split(VIDEO, len(grids))
        shown = "".join(self._video(grid, times) + text for grid, text in zip(grids, after, strict=True))
        chat = before + shown + opening
        return self.tokenizer(chat, add_special_tokens=False, return_tensors="pt").input_ids.to(self.backbone.device)

    def _video(self, grid: Grid, times: list[float]) -> str:
        """A video's placeholders."""
        pads = PAD * (grid[1] * grid[2] // self.layout.merge**2)  # of one step
        if self.config.model_type != "qwen3_vl":
            return START + pads * grid[0] + END
        times = times + times[-1:] * (-len(times) % self.layout.steps)  # each step follows its mean time
        ends = zip(times[:: self.layout.steps], times[self.layout.steps - 1 :: self.layout.steps], strict=True)
        return "".join(f"<{(first + last) / 2:.1f} seconds>{START}{pads}{END}" for first, last in ends)

    def _chat(self, question: str, videos: int) -> str:
        """The videos and the question, up to the start of the answer."""
        content = [*({"type": "video"} for _ in range(videos)), {"type": "text", "text": question}]
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=self.template, tokenize=False,
            add_generation_prompt=True,
        )  # fmt: skip

    def answer_logits(
        self, videos: Sequence[Patches], times: Times, question: str, opening: str, answers: Sequence[int]
    ) -> Float[Tensor, "answers"]:
        """Of these tokens as the one that follows the opening of the answer; of a network with a vocabulary's head."""
        inputs = self._positioned(videos, times, question, opening)
        logits = self.backbone.network(**inputs, use_cache=False, logits_to_keep=1).logits
        return logits[0, -1, list(answers)].float()

    @torch.no_grad()
    def written(self, videos: Sequence[Patches], times: Times, question: str, most: int) -> str:
        """The most probable answer, token by token, of at most so many tokens."""
        inputs = self._positioned(videos, times, question, "")
        # Other ranks write other answers: the lengths must not be synchronised, whatever shards the policy.
        ids = self.backbone.network.generate(**inputs, max_new_tokens=most, do_sample=False, synced_gpus=False)
        return self.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _positioned(self, videos: Sequence[Patches], times: Times, question: str, opening: str) -> dict[str, Any]:
        """The arguments with what positions are computed from."""
        inputs: dict[str, Any] = self.inputs(videos, times, question, opening)
        inputs["mm_token_type_ids"] = 2 * (inputs["input_ids"] == self.config.video_token_id).int()
        if self.config.model_type == "qwen2_5_vl":  # its positions in time are in seconds
            spacing = float(times[-1] - times[0]) / max(1, len(times) - 1)
            inputs["second_per_grid_ts"] = torch.tensor([spacing * self.layout.steps] * len(videos))
        return inputs

    def token(self, word: str) -> int:
        """
        Raises:
            ValueError: the word has several tokens.
        """
        ids = self.tokenizer.encode(word, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"the answer {word!r} is {len(ids)} tokens; the judge needs answers of one token")
        return ids[0]
