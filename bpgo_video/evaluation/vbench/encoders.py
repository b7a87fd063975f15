"""Which networks make features of frames? DINO and CLIP, as VBench takes them, and EfficientNet-Lite0 as a stand-in.

A folder's network is called native where its architecture is VBench's, else proxy; that its weights are the published
ones is told by the fingerprint beside the results. Everything is computed in fp32; VBench's CLIP is fp16 on GPUs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import AutoModel, CLIPModel

from bpgo_video.data.fingerprint import fingerprint
from bpgo_video.evaluation.vbench.dimension import Label, Network, Sources
from bpgo_video.evaluation.vbench.pixels import UNCHANGED, Encoder, Preparation
from bpgo_video.paths import resolve_folder
from bpgo_video.rewards.consistency import FrameConsistency

DINO_B16 = "facebook/dino-vitb16"
CLIP_B32 = "openai/clip-vit-base-patch32"
CLIP_L14 = "openai/clip-vit-large-patch14"
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {  # of config.json, its vision part in CLIP
    DINO_B16: {"model_type": "vit", "hidden_size": 768, "num_hidden_layers": 12, "patch_size": 16},
    CLIP_B32: {"hidden_size": 768, "num_hidden_layers": 12, "patch_size": 32},
    CLIP_L14: {"hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14},
}


def dino(preparation: Preparation, spec: str, sources: Sources) -> Network:
    """The class token of a vision transformer's last layer (DINO, arXiv 2104.14294; DINOv2 too)."""
    folder = resolve_folder(spec)
    network = sources.backbones.load(AutoModel, folder, sources.device, "float32", unused=("pooler.",)).network
    options = {}
    if network.config.model_type == "vit":
        network.embeddings.interpolate_pos_encoding = partial(dino_positions, network.embeddings)
        options = {"interpolate_pos_encoding": True}

    def encode(pixels: Tensor) -> Tensor:
        return network(pixel_values=pixels, **options).last_hidden_state[:, 0]

    return _network(Encoder(encode, preparation, sources.device), folder, spec, DINO_B16)


def dino_positions(embeddings: Any, tokens: Tensor, height: int, width: int) -> Tensor:
    """Position embeddings of a picture of another size, as DINO's own code resizes them.

    It adds .1 to the patches a side before it divides, so that none is lost to rounding; transformers does not, and
    samples the embeddings at slightly other places.
    """
    positions = embeddings.position_embeddings
    count = positions.shape[1] - 1
    if tokens.shape[1] - 1 == count and height == width:
        return positions
    side = round(count**0.5)
    grid = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scales = [(length // embeddings.patch_size + 0.1) / side for length in (height, width)]
    resized = interpolate(grid, scale_factor=scales, mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat((positions[:, :1], resized), dim=1)


def clip_model(spec: str, sources: Sources) -> tuple[Any, Path]:
    """The CLIPModel of a folder or hub id, and its folder."""
    folder = resolve_folder(spec)
    return sources.backbones.load(CLIPModel, folder, sources.device, "float32").network, folder


def clip_encoder(preparation: Preparation, spec: str, sources: Sources) -> tuple[Encoder, Path]:
    """CLIP's image embedding (arXiv 2103.00020), of squares of the network's own size: 224 in VBench's."""
    network, folder = clip_model(spec, sources)
    side = network.config.vision_config.image_size

    def encode(pixels: Tensor) -> Tensor:
        return network.get_image_features(pixel_values=pixels).pooler_output

    return Encoder(encode, replace(preparation, edge=side, crop=side), sources.device), folder


def clip(preparation: Preparation, native: str, spec: str, sources: Sources) -> Network:
    encoder, folder = clip_encoder(preparation, spec, sources)
    return _network(encoder, folder, spec, native)


def efficientnet(sources: Sources) -> Network:
    """Unit features of EfficientNet-Lite0, whose weights come with a package: a stand-in for DINO and CLIP."""
    reward = FrameConsistency(device=sources.device)
    encoder = Encoder(lambda pixels: reward.embed(pixels[None])[0], UNCHANGED, sources.device)
    return Network(encoder, "proxy", reward.version)


def adopt_encoder(preparation: Preparation, built: Any, sources: Sources) -> Encoder:
    """A user's features: prepared frames on the device, (frames, 3, rows, columns), -> (frames, dim)."""
    return Encoder(built, preparation, sources.device)


def label_of(folder: Path, native: str) -> Label:
    """Whether the folder's network is built as `native` is."""
    config = json.loads((folder / "config.json").read_text())
    vision = config.get("vision_config", config)
    return "native" if all(vision.get(key) == value for key, value in ARCHITECTURES[native].items()) else "proxy"


def _network(call: Callable[..., Any] | Encoder, folder: Path, spec: str, native: str) -> Network:
    return Network(call, label_of(folder, native), f"{spec} {fingerprint(folder, ('.',))}")
