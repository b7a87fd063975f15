"""Input of Qwen-VL models: a video's patches, its placeholder tokens and a question, in torch alone.

The models' own video processors need torchvision. Videos are scored one at a time: nothing is padded, and memory does
not grow with the batch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from bpgo_video.rewards.backbones import Backbone
from bpgo_video.rewards.preprocessing import Preprocessing, read_config

VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"  # what a chat template writes for a video
MIN_PIXELS, MAX_PIXELS = 128 * 28 * 28, 256 * 28 * 28  # of a frame
Frames = Float[Tensor, "frames 3 height width"]


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

    @classmethod
    def of(cls, vision: Any, folder: Path, min_pixels: int, max_pixels: int) -> PatchLayout:
        """Of a model's `vision_config` and its folder's preprocessor_config.json."""
        found = read_config(folder)
        sizes = vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size
        return cls(*sizes, tuple(found["image_mean"]), tuple(found["image_std"]), min_pixels, max_pixels)

    def patches(self, frames: Frames) -> tuple[Float[Tensor, "patches dim"], tuple[int, int, int]]:
        """Pixels by patch, in the order of the tokens, and the grid (time, height, width) of patches.

        Frames are resized to multiples of a token's side (bicubic), the last one is repeated to fill a step.
        """
        height, width = frames.shape[-2:]
        size = smart_resize(height, width, self.patch * self.merge, self.min_pixels, self.max_pixels)
        pixels = Preprocessing("stretch", size, self.mean, self.std)(frames)
        pixels = torch.cat([pixels, pixels[-1:].expand(-len(pixels) % self.steps, -1, -1, -1)])
        found = rearrange(
            pixels,
            "(t s) c (h mh ph) (w mw pw) -> (t h w mh mw) (c s ph pw)",
            s=self.steps, mh=self.merge, mw=self.merge, ph=self.patch, pw=self.patch,
        )  # fmt: skip
        return found, (len(pixels) // self.steps, size[0] // self.patch, size[1] // self.patch)


def one_block(step_tokens: int, step_times: Sequence[float]) -> str:
    return f"<|vision_start|>{'<|video_pad|>' * step_tokens * len(step_times)}<|vision_end|>"


def timed_steps(step_tokens: int, step_times: Sequence[float]) -> str:
    """Each step after its time."""
    pads = "<|video_pad|>" * step_tokens
    return "".join(f"<{time:.1f} seconds><|vision_start|>{pads}<|vision_end|>" for time in step_times)


PLACEHOLDERS: dict[str, Callable[[int, Sequence[float]], str]] = {
    "qwen2_vl": one_block,
    "qwen2_5_vl": one_block,
    "qwen3_vl": timed_steps,
}


class QwenVL:
    """A Qwen2-VL, Qwen2.5-VL or Qwen3-VL network with its tokenizer.

    Args:
        config: of the whole model.
        folder: of tokenizer, chat template and preprocessor_config.json.
        min_pixels, max_pixels: of a resized frame.

    Raises:
        ValueError: another kind of model, or a chat template that shows no video.
    """

    def __init__(self, backbone: Backbone, config: Any, folder: Path, min_pixels: int, max_pixels: int):
        if config.model_type not in PLACEHOLDERS:
            raise ValueError(f"{folder} is of type {config.model_type!r}; must be one of {sorted(PLACEHOLDERS)}")
        self.backbone, self.config = backbone, config
        self.layout = PatchLayout.of(config.vision_config, folder, min_pixels, max_pixels)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.template = processor_template(folder)
        if self._chat("").count(VIDEO) != 1:
            raise ValueError(f"{folder}: the chat template must write {VIDEO} for a video; it wrote {self._chat('')!r}")

    def inputs(self, frames: Frames, times: Float[Tensor, "frames"], question: str) -> dict[str, Tensor]:
        """The network's arguments for one video and one question, without positions.

        Args:
            times: seconds of the frames.
        """
        patches, grid = self.layout.patches(frames.to(self.backbone.device))
        ids = self._tokens(question, grid, times)
        return {
            "input_ids": ids,
            "pixel_values_videos": patches.to(self.backbone.dtype),
            "video_grid_thw": torch.tensor([grid], device=ids.device),
        }

    def _tokens(
        self, question: str, grid: tuple[int, int, int], times: Float[Tensor, "frames"]
    ) -> Int[Tensor, "1 tokens"]:
        per_step, moments = self.layout.steps, times.tolist()
        moments += moments[-1:] * (-len(moments) % per_step)
        steps = [(moments[i] + moments[i + per_step - 1]) / 2 for i in range(0, len(moments), per_step)]
        shown = PLACEHOLDERS[self.config.model_type](grid[1] * grid[2] // self.layout.merge**2, steps)
        chat = self._chat(question).replace(VIDEO, shown, 1)
        return self.tokenizer(chat, add_special_tokens=False, return_tensors="pt").input_ids.to(self.backbone.device)

    def _chat(self, question: str) -> str:
        """The video, then the question, up to where the answer begins."""
        content = [{"type": "video"}, {"type": "text", "text": question}]
        messages, settings = [{"role": "user", "content": content}], {"tokenize": False, "add_generation_prompt": True}
        return self.tokenizer.apply_chat_template(messages, chat_template=self.template, **settings)


def processor_template(folder: Path) -> str | None:
    """The chat template of a folder's chat_template.json; None for the tokenizer's own.

    Older folders hold two: the tokenizer's may not support videos, and the model was trained with this one.
    """
    path = folder / "chat_template.json"
    if (folder / "chat_template.jinja").is_file() or not path.is_file():
        return None
    return json.loads(path.read_text("utf-8"))["chat_template"]
