"""VideoAlign (VideoReward): scores of a fine-tuned Qwen2-VL at special tokens of the question, one video at a time."""

from __future__ import annotations

import ast
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLModel

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
    Weights,
    read_weights,
)
from bpgo_video.rewards.qwen_vl import MIN_PIXELS, QwenVL
from bpgo_video.weights import load_network

PARTS = ("VQ", "MQ", "TA")
SCORES: dict[str, tuple[int, ...]] = {"VQ": (0,), "MQ": (1,), "TA": (2,), "overall": (0, 1, 2)}
TOKENS = tuple(f"<|{part}_reward|>" for part in PARTS)
MIN_FRAMES = 4  # of the network's input
VIDEOALIGN_FILES = ("model_config.json", "checkpoint-*/model.pth")


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
        patches = self.qwen.patches(clips.videos[row, indices])
        inputs = self.qwen.inputs([patches], clips.times[indices], question)
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
