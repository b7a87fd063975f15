"""Image-text rewards, per frame: CLIPScore, CLIP-I, SigLIP, PickScore, HPSv2 and LAION's aesthetic predictors."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear, normalize
from transformers import AutoConfig, CLIPConfig, CLIPModel, SiglipModel

from bpgo_video.data.fingerprint import fingerprint, fingerprint_of
from bpgo_video.paths import resolve_folder
from bpgo_video.rewards.backbones import WITHOUT_WEIGHTS, Backbone, Backbones, Dtype, NetworkReward, version
from bpgo_video.rewards.base import Clips, Device, FrameSampling
from bpgo_video.rewards.checkpoints import from_open_clip, from_weights, linear_layers, read_weights

Scores = Float[Tensor, "samples scored"]


class ClipScore(NetworkReward):
    """cos(frame, prompt) of any CLIPModel (arXiv 2103.00020, 2104.08718). Options as in `NetworkReward`.

    Usual weights: openai/clip-vit-large-patch14.
    """

    name = "clip_score"
    range = (-1.0, 1.0)
    network: Any = CLIPModel
    padding = "longest"  # CLIP reads the end token, which comes before the padding
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
        """Unit vectors; texts are cut to the network's length. Equal prompts are encoded once."""

        def compute() -> Tensor:
            texts = [text.lower() if self.lowercase else text for text in clips.texts]
            unique = list(dict.fromkeys(texts))
            ids = self.tokenizer(unique).input_ids
            # Attention is causal in CLIP and unmasked in SigLIP: padding is never masked out.
            found = normalize(self.backbone.network.get_text_features(input_ids=ids).pooler_output.float(), dim=-1)
            return found[[unique.index(text) for text in texts]]

        return clips.once(self.text_key, compute)


class ClipImageScore(ClipScore):
    """cos(frame, image to continue) of any CLIPModel: CLIP-I (arXiv 2208.12242); frame 0 where there is no image.

    A still video scores highest: train on it only next to a reward for what the prompt says.
    """

    name = "clip_image_score"

    def score(self, clips: Clips, indices: list[int]) -> Scores:
        found = self.embed_frames(clips, indices)
        image = found[:, :1] if clips.images is None else self.embed_frames(clips.stills(), [0])
        return (found * image).sum(dim=-1)


class SiglipScore(ClipScore):
    """cos(frame, prompt) of a SigLIP or SigLIP 2 of fixed resolution (arXiv 2303.15343, 2502.14786).

    The cosine, not the sigmoid of the scaled one: that is flat far from its threshold, and a group of one prompt's
    samples lies on one side. Usual weights: google/siglip2-so400m-patch14-384.
    """

    name = "siglip_score"
    network = SiglipModel
    padding = "max_length"  # SigLIP was trained so, and reads the last token
    lowercase = True

    def check(self, folder: Path) -> None:
        found = AutoConfig.from_pretrained(folder).model_type
        if found != "siglip":
            usual = "a SigLIP or SigLIP 2 of fixed resolution such as google/siglip2-base-patch16-224"
            raise ValueError(f"{folder} is of type {found!r}; must be 'siglip', {usual}")


class PickScore(ClipScore):
    """exp(logit_scale) cos(frame, prompt) of a CLIPModel trained on human choices (arXiv 2305.01569).

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
        folder = resolve_folder(model)
        texts = folder if processor is None else resolve_folder(processor, only=WITHOUT_WEIGHTS)
        self.frames = FrameSampling(frames, frames_per_second)
        self.use((backbones or Backbones()).load(CLIPModel, folder, device, dtype), texts)
        self.scale = float(self.backbone.network.logit_scale.float().exp())
        self.range = (-self.scale, self.scale)
        also = [] if processor is None else [fingerprint_of(texts, WITHOUT_WEIGHTS)]
        self.version = version([fingerprint(folder, (".",)), *also], self.frames, dtype)

    def score(self, clips: Clips, indices: list[int]) -> Scores:
        return self.scale * super().score(clips, indices)


class HPSv2(ClipScore):
    """cos(whole frame, prompt) of open_clip's ViT-H-14 fine-tuned on human preferences, v2.1 (arXiv 2306.09341).

    The frame's longer side is resized to the network's size, the rest is black. Good frames score .2 to .35.

    Args:
        model: local folder or hub id that holds `checkpoint`, of open_clip's format.
        base: folder or hub id of a CLIPModel of the same shape, for its configuration, tokenizer and preprocessing; its
            weights are not read.
    """

    name = "hpsv2"

    def __init__(
        self, model: str = "xswu/HPSv2", base: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        checkpoint: str = "HPS_v2.1_compressed.pt", frames: int | None = None, frames_per_second: float | None = None,
        device: Device = "cpu", dtype: Dtype = "float32", backbones: Backbones | None = None,
    ):  # fmt: skip
        folder, shape = resolve_folder(model, only=(checkpoint,)), resolve_folder(base, only=WITHOUT_WEIGHTS)
        path = folder / checkpoint
        self.frames = FrameSampling(frames, frames_per_second)

        def build(dtype: torch.dtype) -> torch.nn.Module:
            weights = from_open_clip(read_weights(path))
            return from_weights(CLIPModel, CLIPConfig.from_pretrained(shape), weights, path, dtype)

        source = (CLIPModel.__name__, str(path.resolve()), str(shape.resolve()))
        self.use((backbones or Backbones()).once(source, device, dtype, build), shape)
        self.preprocessing = replace(self.preprocessing, fit="pad", edge=0)
        read = fingerprint_of(folder, (checkpoint,)), fingerprint_of(shape, WITHOUT_WEIGHTS)
        self.version = version(read, self.frames, dtype)


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
