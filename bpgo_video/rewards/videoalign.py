"""How good are a video's picture, its motion and its likeness to the prompt? VideoAlign's reward (VideoReward)."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Qwen2VLConfig

from bpgo_video.data.fingerprint import fingerprint_of
from bpgo_video.paths import resolve_folder
from bpgo_video.rewards.backbones import WITHOUT_WEIGHTS, Backbones, Dtype, version
from bpgo_video.rewards.base import Clips, FrameSampling, FrameScores, RewardError
from bpgo_video.rewards.qwen_vl import MIN_PIXELS, QwenVL
from bpgo_video.rewards.videoalign_checkpoint import FILES, load_videoalign, read_settings

PARTS = ("VQ", "MQ", "TA")
SCORES: dict[str, tuple[int, ...]] = {"VQ": (0,), "MQ": (1,), "TA": (2,), "overall": (0, 1, 2)}
TOKENS = tuple(f"<|{part}_reward|>" for part in PARTS)
MIN_FRAMES = 4


class VideoAlign:
    """(head(h) - mean)/std at a special token of the question, of a fine-tuned Qwen2-VL-2B (arXiv 2501.13918).

    VQ (visual quality), MQ (motion quality), TA (text alignment) or their sum `overall`, one score a video: 0 is an
    average video of its authors' validation set, negative ones are common. Rewards of several scores ask the network
    once. Departures: frames are resized as floats, not rounded to 8 bits; a video of one frame is shown as two of it.

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
    higher_is_better = True
    differentiable = True
    kind = "real"

    def __init__(
        self,
        template: str,
        score: str = "overall",
        model: str = "KwaiVGI/VideoReward",
        base: str = "Qwen/Qwen2-VL-2B-Instruct",
        device: torch.device | str = "cpu",
        dtype: Dtype = "float32",
        backbones: Backbones | None = None,
    ):
        if score not in SCORES:
            raise ValueError(f"score = {score!r}: must be one of {sorted(SCORES)}")
        folder = resolve_folder(model, only=FILES)
        qwen = resolve_folder(base, only=WITHOUT_WEIGHTS)
        self.template, self.columns, settings = read_template(Path(template)), SCORES[score], read_settings(folder)
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
        parts = fingerprint_of(folder, FILES), fingerprint_of(qwen, WITHOUT_WEIGHTS)
        self.version = version(parts, self.frames, dtype, score, self.template)

    def __call__(self, clips: Clips) -> FrameScores:
        key = (self.qwen.backbone.key, self.template)
        parts = clips.once(key, lambda: torch.stack([self._parts(clips, row) for row in range(len(clips))]))
        return FrameScores(parts[:, self.columns].sum(dim=1, keepdim=True))

    def _parts(self, clips: Clips, row: int) -> Float[Tensor, "parts"]:
        """The three normalised scores of one video.

        Positions count tokens, the same in all three of Qwen2-VL's axes: so the model was trained.
        """
        network, total = self.qwen.backbone.network, clips.videos.shape[1]
        indices = FrameSampling(count=frame_count(total, clips.fps, self.frames.fps or 0.0)).indices(total, clips.fps)
        question = self.template.replace("{text_prompt}", clips.texts[row])
        inputs = self.qwen.inputs(clips.videos[row, indices], clips.times[indices], question)
        ids = inputs["input_ids"]
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, 1, -1)
        hidden = network.model(**inputs, position_ids=positions, use_cache=False).last_hidden_state[0]
        places = [self._place(ids[0], token) for token in TOKENS]
        scores = hidden[places].float() @ network.head.float().T
        raw = scores.diagonal() if scores.shape[1] == len(PARTS) else scores[:, 0]
        return (raw - self.mean.to(raw.device)) / self.std.to(raw.device)

    def _add_tokens(self) -> None:
        """The special tokens are the last rows of the embeddings that the checkpoint holds."""
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
    """How many frames are shown: `per_second` of each second, an even number, at least 4 of those there are."""
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
