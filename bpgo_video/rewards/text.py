"""Rewards for the prompt's text: image-text scores per frame, video-text scores per video, and OCR.

CLIPScore, CLIP-I, SigLIP, PickScore, HPSv2, LAION's aesthetic predictors; X-CLIP and VideoPrism; PP-OCRv4.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, linear, normalize
from transformers import AutoConfig, CLIPConfig, CLIPModel, SiglipModel, VideoPrismClipModel, XCLIPModel

from bpgo_video.data.media import as_bytes
from bpgo_video.files import resolve_folder
from bpgo_video.rewards.base import (
    Clips,
    Device,
    FrameReward,
    FrameSampling,
    FrameScores,
    RewardError,
    Scores,
    evenly_spread,
)
from bpgo_video.rewards.networks import (
    WITHOUT_WEIGHTS,
    Backbone,
    Backbones,
    Dtype,
    NetworkReward,
    Preprocessing,
    Weights,
    imported,
    read_weights,
    release,
)
from bpgo_video.weights import load_network

QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')


class ClipScore(NetworkReward):
    """cos(frame, prompt) of any CLIPModel (arXiv 2103.00020, 2104.08718). Options as in `NetworkReward`.

    Usual weights: openai/clip-vit-large-patch14.
    """

    name = "clip_score"
    range = (-1.0, 1.0)
    network: Any = CLIPModel
    padding = "longest"  # CLIP's text feature is that of the end token, which precedes the padding
    lowercase = False

    def use(self, backbone: Backbone, folder: Path) -> None:
        super().use(backbone, folder)
        self.tokenizer, self.text_key = backbone.tokenizer(folder, self.padding), (backbone.key, "texts", folder)

    def score(self, clips: Clips, indices: list[int]) -> Scores:
        return torch.einsum("sfd,sd->sf", self.embed_frames(clips, indices), self.embed_texts(clips))

    def embed_frames(self, clips: Clips, indices: list[int]) -> Float[Tensor, "samples scored dim"]:
        """Unit vectors."""
        return normalize(self.backbone.frame_features(clips, indices, self.preprocessing, self.encode), dim=-1)

    def encode(self, pixels: Tensor) -> Tensor:
        return self.backbone.network.get_image_features(pixel_values=pixels).pooler_output

    def embed_texts(self, clips: Clips) -> Float[Tensor, "samples dim"]:
        """Unit vectors; texts are truncated to the network's length. Equal prompts are encoded once."""

        def compute() -> Tensor:
            texts = [text.lower() if self.lowercase else text for text in clips.texts]
            unique = list(dict.fromkeys(texts))
            ids = self.tokenizer(unique).input_ids
            # Attention is causal in CLIP and unmasked in SigLIP: padding is never masked out.
            features = self.backbone.network.get_text_features(input_ids=ids).pooler_output.float()
            return normalize(features, dim=-1)[[unique.index(text) for text in texts]]

        return clips.cached(self.text_key, compute)


class ClipImageScore(ClipScore):
    """cos(frame, conditioning image) of any CLIPModel: CLIP-I (arXiv 2208.12242); frame 0 where there is no image.

    A still video scores highest: train on it only together with a text-alignment reward.
    """

    name = "clip_image_score"

    def score(self, clips: Clips, indices: list[int]) -> Scores:
        frames = self.embed_frames(clips, indices)
        images = frames[:, :1] if clips.images is None else self.embed_frames(clips.stills(), [0])
        return (frames * images).sum(dim=-1)


class SiglipScore(ClipScore):
    """cos(frame, prompt) of a SigLIP or SigLIP 2 of fixed resolution (arXiv 2303.15343, 2502.14786).

    The cosine, not the sigmoid of the scaled cosine: the sigmoid saturates far from its threshold, and the samples of
    one prompt are mostly on one side of it. Usual weights: google/siglip2-so400m-patch14-384.
    """

    name = "siglip_score"
    network = SiglipModel
    padding = "max_length"  # as in SigLIP's training; its text feature is that of the last token
    lowercase = True

    def check(self, folder: Path) -> None:
        kind = AutoConfig.from_pretrained(folder).model_type
        if kind != "siglip":
            usual = "a SigLIP or SigLIP 2 of fixed resolution such as google/siglip2-base-patch16-224"
            raise ValueError(f"{folder} is of type {kind!r}; must be 'siglip', {usual}")


class PickScore(ClipScore):
    """exp(logit_scale) cos(frame, prompt) of a CLIPModel trained on human preferences (arXiv 2305.01569).

    Frames of good videos score 18 to 24.

    Args:
        processor: folder or hub id of tokenizer and preprocessor_config.json where `model` lacks them
            (laion/CLIP-ViT-H-14-laion2B-s32B-b79K, which the authors use).
    """

    name = "pickscore"

    def __init__(
        self, model: str = "yuvalkirstain/PickScore_v1", processor: str | None = None,
        frames: int | None = None, frames_per_second: float | None = None,
        device: Device = "cpu", dtype: Dtype = "float32", backbones: Backbones | None = None,
    ):  # fmt: skip
        if processor is not None:
            self.processor = resolve_folder(processor, only=WITHOUT_WEIGHTS)
        super().__init__(model, frames, frames_per_second, device, dtype, backbones)
        self.scale = float(self.backbone.network.logit_scale.float().exp())
        self.range = (-self.scale, self.scale)

    def score(self, clips: Clips, indices: list[int]) -> Scores:
        return self.scale * super().score(clips, indices)


class HPSv2(ClipScore):
    """cos(whole frame, prompt) of open_clip's ViT-H-14 fine-tuned on human preferences, v2.1 (arXiv 2306.09341).

    The frame's longer side is resized to the network's size, the rest is black. Good frames score .2 to .35.

    Args:
        model: local folder or hub id with the file `checkpoint`, in open_clip's format.
        base: folder or hub id of a CLIPModel of the same shape, whose configuration, tokenizer and preprocessing are
            used; its weights are not read.
    """

    name = "hpsv2"

    def __init__(
        self, model: str = "xswu/HPSv2", base: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        checkpoint: str = "HPS_v2.1_compressed.pt", frames: int | None = None, frames_per_second: float | None = None,
        device: Device = "cpu", dtype: Dtype = "float32", backbones: Backbones | None = None,
    ):  # fmt: skip
        self.files, self.processor = (checkpoint,), resolve_folder(base, only=WITHOUT_WEIGHTS)
        super().__init__(model, frames, frames_per_second, device, dtype, backbones)

    def build(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        assert self.processor is not None
        path = folder / self.files[0]
        config, weights = CLIPConfig.from_pretrained(self.processor), from_open_clip(read_weights(path))
        return load_network(CLIPModel, path, dtype, config=config, weights=weights)

    def preprocessing_of(self, backbone: Backbone, folder: Path) -> Preprocessing:
        return replace(super().preprocessing_of(backbone, folder), fit="pad", edge=0)


class Aesthetic(ClipScore):
    """head(CLIP's unit image embedding), about 1 to 10 points.

    Both published heads are chains of linear layers, without activations between them: `sa_0_4_vit_l_14_linear.pth`
    (768-1; VBench's aesthetic_quality is its mean over ten) and `sac+logos+ava1-l14-linearMSE.pth`
    (768-1024-128-64-16-1, with dropout in training).

    Args:
        head: local file of the head's weights, .pth (only tensors are unpickled) or .safetensors.
        model: folder or hub id of the CLIPModel that the head was trained on.
    """

    name = "aesthetic"
    range = (0.0, 10.0)

    def __init__(
        self, head: str, model: str = "openai/clip-vit-large-patch14",
        frames: int | None = None, frames_per_second: float | None = None,
        device: Device = "cpu", dtype: Dtype = "float32", backbones: Backbones | None = None,
    ):  # fmt: skip
        path = Path(head).expanduser()
        self.layers = [(w.to(device), b.to(device)) for w, b in linear_layers(read_weights(path), path)]
        self.settings = (sha256(path.read_bytes()).hexdigest(),)
        super().__init__(model, frames, frames_per_second, device, dtype, backbones)

    def score(self, clips: Clips, indices: list[int]) -> Scores:
        points = self.embed_frames(clips, indices)
        for weight, bias in self.layers:
            points = linear(points, weight, bias)
        return points.squeeze(-1)


class VideoTextScore(NetworkReward):
    """cos(video, prompt) on the network's own number of frames, evenly spread.

    Args:
        model: local folder or hub id.

    Attributes:
        padding: of the texts, see `Backbone.tokenizer`.
    """

    range = (-1.0, 1.0)
    padding = "longest"

    def __init__(
        self, model: str, device: Device = "cpu", dtype: Dtype = "float32", backbones: Backbones | None = None
    ):
        super().__init__(model, None, None, device, dtype, backbones)

    def use(self, backbone: Backbone, folder: Path) -> None:
        super().use(backbone, folder)
        self.frames = FrameSampling(count=backbone.network.config.vision_config.num_frames)
        self.tokenizer = backbone.tokenizer(folder, self.padding)

    @abstractmethod
    def cosines(self, texts: tuple[str, ...]) -> Callable[[Tensor, slice], Tensor]:
        """A function (pixels of some videos, their rows among the texts) -> their cosines."""

    def __call__(self, clips: Clips) -> FrameScores:
        indices = evenly_spread(self.frames.count or 1, clips.videos.shape[1])
        cosines = self.backbone.video_features(clips, indices, self.preprocessing, self.cosines(clips.texts))
        return FrameScores(cosines[:, None])


class XClipScore(VideoTextScore):
    """cos(video, text given the video) of an XCLIPModel (arXiv 2208.02816): 8 frames in microsoft/xclip-base-patch32.

    Attention over the video's patches shifts the text's embedding.
    """

    name = "xclip_score"
    network = XCLIPModel

    def cosines(self, texts: tuple[str, ...]) -> Callable[[Tensor, slice], Tensor]:
        network, tokens = self.backbone.network, self.tokenizer(texts)

        def compare(pixels: Tensor, rows: slice) -> Tensor:
            output = network(input_ids=tokens.input_ids[rows], pixel_values=pixels)
            return (output.logits_per_video / network.logit_scale.exp()).diagonal()

        return compare


class VideoPrismScore(VideoTextScore):
    """cos(video, text) of a VideoPrismClipModel (arXiv 2402.13217).

    Frames are stretched to the network's size, as values in [0, 1]: 16 frames of 288x288 in
    google/videoprism-lvt-base-f16r288.
    """

    name = "videoprism_score"
    network = VideoPrismClipModel
    padding = "max_length"

    def preprocessing_of(self, backbone: Backbone, folder: Path) -> Preprocessing:
        side = backbone.network.config.vision_config.image_size
        size = (side, side) if isinstance(side, int) else tuple(side)
        return Preprocessing("stretch", size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    def cosines(self, texts: tuple[str, ...]) -> Callable[[Tensor, slice], Tensor]:
        network, tokens = self.backbone.network, self.tokenizer(texts)
        embedded = network.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output.float()

        def compare(pixels: Tensor, rows: slice) -> Tensor:
            videos = network.get_video_features(pixels).pooler_output.flatten(1).float()
            return cosine_similarity(videos, embedded[rows], dim=-1)

        return compare


class OcrText(FrameReward):
    """max(0, 1 - levenshtein(recognised, quoted) / len(quoted)) per frame, without case and spaces (PP-OCRv4).

    `quoted` is all text in double quotes in the prompt; `recognised` is the text of the frame from top to bottom. The
    text reward of Flow-GRPO (arXiv 2505.05470), per frame. Weights come with rapidocr-onnxruntime (Apache-2.0).

    Args:
        frames: number of scored frames, evenly spread; None scores all.
        frames_per_second: number of scored frames per second, instead of `frames`.

    Raises:
        RewardError: (from a call) a prompt quotes no text.
    """

    name = "ocr_text"

    def __init__(self, frames: int | None = 4, frames_per_second: float | None = None):
        self.frames = FrameSampling(None if frames_per_second else frames, frames_per_second)
        # By default the runtime starts a thread for every core of the machine, in every rank.
        threads = {"intra_op_num_threads": torch.get_num_threads(), "inter_op_num_threads": 1}
        self.reader = imported("rapidocr_onnxruntime").RapidOCR(**threads)
        self.distance = imported("rapidfuzz.distance").Levenshtein.distance
        self.version = f"{release('rapidocr-onnxruntime')}-{self.frames}"

    def score(self, clips: Clips, indices: list[int]) -> Scores:
        quoted = [quoted_text(text) for text in clips.texts]
        scores = [
            [max(0.0, 1 - self.distance(self.read(frame), text) / len(text)) for frame in as_bytes(video[indices])]
            for video, text in zip(clips.videos, quoted, strict=True)
        ]
        return torch.tensor(scores)

    def read(self, frame: UInt8[np.ndarray, "height width 3"]) -> str:
        """The text of an RGB picture, without case and spaces."""
        lines, _ = self.reader(frame[..., ::-1])
        return folded("".join(text for _, text, _ in lines or []))


def quoted_text(prompt: str) -> str:
    """The text in double quotes in the prompt, without case and spaces.

    Raises:
        RewardError: nothing is quoted.
    """
    text = folded("".join(straight or curly for straight, curly in QUOTED.findall(prompt)))
    if not text:
        fix = 'use prompts such as: a shop sign that says "open"'
        raise RewardError(f"reward 'ocr_text' reads text in double quotes of the prompt; {prompt!r} has none; {fix}")
    return text


def folded(text: str) -> str:
    return "".join(text.split()).casefold()


def linear_layers(weights: Weights, path: Path) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of each layer of an aesthetic head, in order, fp32.

    Raises:
        ValueError: the file is not a chain of linear layers that ends in one number.
    """
    names = [name.removesuffix("weight") for name in weights if name.endswith("weight")]
    names.sort(key=lambda name: [int(digits) for digits in re.findall(r"\d+", name)])
    layers = [(weights[f"{n}weight"].float(), weights[f"{n}bias"].float()) for n in names if f"{n}bias" in weights]
    fits = all(before.shape[0] == after.shape[1] for (before, _), (after, _) in pairwise(layers))
    if not layers or 2 * len(layers) != len(weights) or not fits or layers[-1][0].shape[0] != 1:
        raise ValueError(f"{path} holds {sorted(weights)}; an aesthetic head is a chain of linear layers to one number")
    return layers


OPEN_CLIP = {  # open_clip's names outside of the two transformers -> CLIPModel's
    "logit_scale": "logit_scale",
    "text_projection": "text_projection.weight",
    "visual.proj": "visual_projection.weight",
}
OPEN_CLIP_TOWER = [  # the same inside one of them, without its prefix
    ("positional_embedding", "embeddings.position_embedding.weight"),
    (r"token_embedding\.weight", "embeddings.token_embedding.weight"),
    ("class_embedding", "embeddings.class_embedding"),
    (r"conv1\.weight", "embeddings.patch_embedding.weight"),
    (r"ln_pre\.(\w+)", r"pre_layrnorm.\1"),
    (r"ln_post\.(\w+)", r"post_layernorm.\1"),
    (r"ln_final\.(\w+)", r"final_layer_norm.\1"),
    (r"transformer\.resblocks\.(\d+)\.ln_([12])\.(\w+)", r"encoder.layers.\1.layer_norm\2.\3"),
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.(\w+)", r"encoder.layers.\1.self_attn.out_proj.\2"),
    (r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(\w+)", r"encoder.layers.\1.self_attn.*_proj.\2"),  # q, k and v
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(\w+)", r"encoder.layers.\1.mlp.fc1.\2"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(\w+)", r"encoder.layers.\1.mlp.fc2.\2"),
]


def from_open_clip(weights: Weights) -> dict[str, Tensor]:
    """An open_clip checkpoint under CLIPModel's names, with separate q, k and v and projections as linear layers.

    Raises:
        ValueError: a weight that a CLIP of vision and text transformers does not have.
    """
    renamed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        tower = "vision_model." if name.startswith("visual.") else "text_model."
        matches = ((re.fullmatch(old, name.removeprefix("visual.")), new) for old, new in OPEN_CLIP_TOWER)
        new = OPEN_CLIP.get(name) or next((tower + match.expand(new) for match, new in matches if match), None)
        if new is None:
            raise ValueError(f"{name!r} is no weight of open_clip's CLIP with two transformers")
        if "*" in new:
            renamed |= {new.replace("*", part): rows.clone() for part, rows in zip("qkv", weight.chunk(3), strict=True)}
        else:
            renamed[new] = weight.T.contiguous() if "projection" in new else weight
    return renamed
