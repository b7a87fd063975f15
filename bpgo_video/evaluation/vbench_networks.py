"""Networks behind VBench's formulas: VBench's own architectures, stand-ins, and a user's own.

A folder's network is labelled native if its architecture is VBench's, proxy otherwise; the fingerprint next to the
results tells whether its weights are the published ones. All run in fp32; VBench's CLIP runs in fp16 on GPUs.

A user's own network is a factory by its dotted path, `my_pkg.vbench:build`, called with the device (a string). The
functions `of_...` say what a factory must return, and turn it into what the formula calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate, linear, normalize
from transformers import AutoModel, AutoTokenizer, CLIPModel

from bpgo_video.data.fingerprint import fingerprint
from bpgo_video.evaluation.vbench_formulas import GRID, Footage, Picture, Tracks
from bpgo_video.evaluation.vbench_pixels import CLIP, MUSIQ, UNCHANGED, VICLIP, Encoder, Frames, Preparation, replicated
from bpgo_video.paths import resolve_folder
from bpgo_video.rewards.backbones import Backbones
from bpgo_video.rewards.base import Clips
from bpgo_video.rewards.checkpoints import linear_layers, read_weights, unpickled
from bpgo_video.rewards.motion import DYNAMIC, DynamicDegree, FrameConsistency, speed
from bpgo_video.rewards.text import XClipScore

Label = Literal["exact", "native", "proxy"]

DINO_B16, CLIP_B32, CLIP_L14 = "facebook/dino-vitb16", "openai/clip-vit-base-patch32", "openai/clip-vit-large-patch14"
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {  # of config.json; of its vision part for CLIP
    DINO_B16: {"model_type": "vit", "hidden_size": 768, "num_hidden_layers": 12, "patch_size": 16},
    CLIP_B32: {"hidden_size": 768, "num_hidden_layers": 12, "patch_size": 32},
    CLIP_L14: {"hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14},
}
LAION_HEAD = "sa_0_4_vit_l_14_linear.pth"
FLOW_DIVISOR, INTERPOLATION_DIVISOR = 8, 16  # RAFT's and AMT's sides are multiples of these
VICLIP_FRAMES = 8


@dataclass(frozen=True)
class Network:
    """A network of a dimension.

    Attributes:
        call: as the formula calls it.
        label: exact (VBench's numbers, no network), native (VBench's formula and kind of network) or proxy.
        name: where it comes from; written next to the results.
    """

    call: Any
    label: Label
    name: str


@dataclass(frozen=True)
class Sources:
    """Where networks come from, and the device they go to.

    Attributes:
        head: file of the aesthetic head's weights.
    """

    device: torch.device
    backbones: Backbones = field(default_factory=Backbones)
    head: Path | None = None


def label_of(folder: Path, native: str) -> Label:
    """native if the folder's network has the architecture of `native`."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    vision = config.get("vision_config", config)
    return "native" if all(vision.get(key) == value for key, value in ARCHITECTURES[native].items()) else "proxy"


def named(spec: str, folder: Path) -> str:
    return f"{spec} {fingerprint(folder, ('.',))}"


def file_name(path: Path) -> str:
    return f"{path.name} {sha256(path.read_bytes()).hexdigest()[:16]}"


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

    encoder = Encoder(encode, preparation, sources.device)
    return Network(encoder, label_of(folder, DINO_B16), named(spec, folder))


def dino_positions(embeddings: Any, tokens: Tensor, height: int, width: int) -> Tensor:
    """Position embeddings of another image size, resized as in DINO's own code.

    DINO adds .1 to the patches a side before it divides, so that none is lost to rounding. transformers does not, and
    samples the embeddings at slightly different places.
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


def load_clip(spec: str, sources: Sources) -> tuple[Any, Callable[[Tensor], Tensor], Preparation, Path]:
    """A CLIPModel (arXiv 2103.00020), its image embedding, the preparation for its own image size, and its folder."""
    folder = resolve_folder(spec)
    network = sources.backbones.load(CLIPModel, folder, sources.device, "float32").network
    side = network.config.vision_config.image_size

    def embed(pixels: Tensor) -> Tensor:
        return network.get_image_features(pixel_values=pixels).pooler_output

    return network, embed, replace(CLIP, edge=side, crop=side), folder


def clip(spec: str, sources: Sources) -> Network:
    """CLIP's image embedding."""
    _, embed, preparation, folder = load_clip(spec, sources)
    return Network(Encoder(embed, preparation, sources.device), label_of(folder, CLIP_B32), named(spec, folder))


def clip_text(spec: str, sources: Sources) -> Network:
    """CLIP's logits of images and a text."""
    network, _, preparation, folder = load_clip(spec, sources)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def logits(pixels: Tensor, text: str) -> Tensor:
        tokens = tokenizer([text], return_tensors="pt").input_ids.to(sources.device)
        return network(input_ids=tokens, pixel_values=pixels).logits_per_image[:, 0]

    return Network(Encoder(logits, preparation, sources.device), label_of(folder, CLIP_B32), named(spec, folder))


def clip_aesthetic(spec: str, sources: Sources) -> Network:
    """CLIP's image embedding followed by LAION's head."""
    _, embed, preparation, folder = load_clip(spec, sources)
    encoder = replace(of_embedding(embed, sources), preparation=preparation)
    return Network(encoder, label_of(folder, CLIP_L14), f"{spec}, {file_name(head_file(sources))}")


def head_file(sources: Sources) -> Path:
    if sources.head is None:
        raise ValueError(f"aesthetic_quality needs LAION's head, a file like {LAION_HEAD}: --head FILE")
    return sources.head


def musiq(spec: str, sources: Sources) -> Network:
    """MUSIQ (arXiv 2108.05997) by pyiqa with the weights of a local file; VBench's is musiq_spaq_ckpt-358bb6af.pth."""
    path = Path(spec).expanduser()
    unpickled(path)  # refuses more than tensors; pyiqa unpickles without a check
    try:
        from pyiqa.archs.musiq_arch import MUSIQ as Musiq  # needs torchvision and more: no dependency of ours
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error}; MUSIQ's weights are read by pyiqa: pip install pyiqa, or name a factory"
        ) from error
    network = Musiq(pretrained_model_path=str(path)).to(sources.device).eval()
    return Network(of_points(network, sources), "native", file_name(path))


def xclip(spec: str, sources: Sources) -> Network:
    """X-CLIP (arXiv 2208.02816) in place of ViCLIP."""
    reward = XClipScore(spec, device=sources.device, backbones=sources.backbones)

    @torch.no_grad()
    def compare(footage: Footage) -> float:
        return float(reward(Clips(footage.frames[None].float() / 255, footage.fps, (footage.prompt.text,))).values)

    return Network(compare, "proxy", f"{spec} {reward.version}")


def efficientnet(sources: Sources) -> Network:
    """Unit features of EfficientNet-Lite0, whose weights come with a package, in place of DINO and CLIP."""
    reward = FrameConsistency(device=sources.device)
    encoder = Encoder(lambda pixels: reward.embed(pixels[None])[0], UNCHANGED, sources.device)
    return Network(encoder, "proxy", reward.version)


def dis(_: Sources) -> Network:
    """OpenCV's DIS flow in place of RAFT, on frames of at most 256 pixels on the shorter side."""
    reward = DynamicDegree()

    def pairs(frames: Frames) -> list[bool]:
        pictures = [reward.shrink(frame) for frame in frames.permute(0, 2, 3, 1).contiguous().numpy()]
        flows = [reward.flow(before, after, None) for before, after in pairwise(pictures)]
        return [speed(flow) > DYNAMIC * min(flow.shape[:2]) for flow in flows]

    return Network(pairs, "proxy", f"DIS {reward.version}")


def of_encoder(preparation: Preparation) -> Callable[[Any, Sources], Encoder]:
    """Prepared frames on the device, (frames, 3, rows, columns) -> (frames, dim).

    For appearance_style: the frames (frames, 3, 224, 224) and a text -> CLIP's logits, (frames,).
    """
    return lambda built, sources: Encoder(built, preparation, sources.device)


def of_embedding(built: Any, sources: Sources) -> Encoder:
    """An image embedding for LAION's head: prepared frames on the device, (frames, 3, 224, 224) -> (frames, dim)."""
    path = head_file(sources)
    layers = [
        (weight.to(sources.device), bias.to(sources.device)) for weight, bias in linear_layers(read_weights(path), path)
    ]

    def points(pixels: Tensor) -> Tensor:
        found = normalize(built(pixels).float(), dim=-1)
        for weight, bias in layers:
            found = linear(found, weight, bias)
        return found / 10

    return Encoder(points, CLIP, sources.device)


def of_points(built: Any, sources: Sources) -> Encoder:
    """Image quality: one frame in [0, 1] on the device, (1, 3, rows, columns) -> its points, 0 to 100."""
    return Encoder(lambda frame: built(frame).reshape(1), MUSIQ, sources.device, at_once=1)


def of_video_text(built: Any, sources: Sources) -> Callable[[Footage], float]:
    """Prepared frames on the device, (1, 8, 3, 224, 224), and a text -> a feature of each, (1, dim)."""

    @torch.no_grad()
    def compare(footage: Footage) -> float:
        chosen = footage.frames[middles(VICLIP_FRAMES, len(footage.frames))]
        video, text = built(VICLIP.frames(chosen)[None].to(sources.device), footage.prompt.text)
        return float(cosine_similarity(video.float(), text.float(), dim=-1))

    return compare


def middles(count: int, total: int) -> list[int]:
    """The middle frame of each of `count` equal parts of a video; a shorter one repeats its last frame."""
    parts = min(count, total)
    starts = np.linspace(0, total, parts + 1).astype(int)
    found = [int((start + stop - 1) // 2) for start, stop in pairwise(starts)]
    return found + [found[-1]] * (count - parts)


def of_flow(built: Any, sources: Sources) -> Callable[[Frames], list[bool]]:
    """Optical flow: two frames of 0 to 255 on the device, (1, 3, height, width), sides multiples of 8 -> the flow in
    pixels, (1, 2, height, width).
    """

    @torch.no_grad()
    def pairs(frames: Frames) -> list[bool]:
        padded = (replicated(frame[None].float().to(sources.device), FLOW_DIVISOR)[0] for frame in frames)
        flows = (built(before, after)[0].permute(1, 2, 0).float().cpu() for before, after in pairwise(padded))
        return [speed(flow.numpy()) > DYNAMIC * min(frames.shape[-2:]) for flow in flows]

    return pairs


def of_interpolator(built: Any, sources: Sources) -> Callable[[Picture, Picture], Picture]:
    """Two frames in [0, 1] on the device, (1, 3, height, width), sides multiples of 16 -> the frame between them."""

    @torch.no_grad()
    def between(*frames: Picture) -> Picture:
        (before, edges), (after, _) = (replicated(frame.to(sources.device), INTERPOLATION_DIVISOR) for frame in frames)
        left, right, top, bottom = edges
        made = built(before, after)
        return made[..., top : made.shape[-2] - bottom, left : made.shape[-1] - right].float().cpu()

    return between


def of_tracker(built: Any, sources: Sources) -> Callable[[Frames], Tracks]:
    """Point tracking: a video of 0 to 255 on the device, (1, frames, 3, height, width), and the points a side, 10 ->
    x and y of each point, row by row, (1, frames, 100, 2).
    """

    @torch.no_grad()
    def track(frames: Frames) -> Tracks:
        found = built(frames[None].float().to(sources.device), GRID)
        return found[0].long().cpu().unflatten(1, (GRID, GRID))

    return track
