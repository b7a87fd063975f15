"""Networks of VBench's formulas, with their preprocessing: VBench's own architectures, stand-ins, and the user's own.

VBench resizes most frames without antialiasing. It calls torchvision, whose operations are written in torch and Pillow
here, so that torchvision is not a dependency. Rewards have their own preprocessing (antialiased, differentiable), so
their scores differ from these.

A folder's network is labelled native if its architecture is VBench's, proxy otherwise; the fingerprint in the results
identifies its weights. All run in fp32; VBench's CLIP runs in fp16 on GPUs.

A user's own network is a factory with a dotted path, `my_pkg.vbench:build`, called with the device (a string). The
functions `adapt_...` document what a factory must return, and turn it into what the formula calls.
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
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate, linear, normalize, pad
from transformers import AutoModel, AutoTokenizer, CLIPModel

from bpgo_video.evaluation.vbench_files import SuitePrompt
from bpgo_video.files import fingerprint, resolve_folder
from bpgo_video.rewards.base import Clips
from bpgo_video.rewards.motion import DYNAMIC, DynamicDegree, FrameConsistency, speed
from bpgo_video.rewards.networks import Backbones, read_weights, unpickled
from bpgo_video.rewards.text import XClipScore, linear_layers

Frames = UInt8[Tensor, "frames 3 height width"]
Inputs = Float[Tensor, "frames 3 rows columns"]
Picture = Float[Tensor, "1 3 height width"]
Tracks = Int[Tensor, "frames 10 10 2"]  # x and y of grid points in each frame, whole pixels
Channels = tuple[float, float, float]
Label = Literal["exact", "native", "proxy"]

GRID = 10  # points per side that camera motion tracks
DINO_B16, CLIP_B32, CLIP_L14 = "facebook/dino-vitb16", "openai/clip-vit-base-patch32", "openai/clip-vit-large-patch14"
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {  # of config.json; of its vision part for CLIP
    DINO_B16: {"model_type": "vit", "hidden_size": 768, "num_hidden_layers": 12, "patch_size": 16},
    CLIP_B32: {"hidden_size": 768, "num_hidden_layers": 12, "patch_size": 32},
    CLIP_L14: {"hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14},
}
LAION_HEAD = "sa_0_4_vit_l_14_linear.pth"
FLOW_DIVISOR, INTERPOLATION_DIVISOR = 8, 16  # RAFT and AMT need sides that are multiples of these
VICLIP_FRAMES = 8


@dataclass(frozen=True)
class Footage:
    """One video.

    Attributes:
        frames: RGB, as bytes.
        image: the image that the video continues (image-to-video).
    """

    path: Path
    prompt: SuitePrompt
    frames: Frames
    fps: float
    image: Path | None = None


@dataclass(frozen=True)
class Preparation:
    """Resize, crop, scale to [0, 1], normalise.

    Attributes:
        mean, std: of the normalisation, per channel.
        edge: pixels of the shorter side after resizing; None keeps the size.
        square: both sides become `edge`, whatever the aspect ratio.
        longest: larger frames shrink until their longer side has this many pixels.
        crop: pixels of a square cut out of the centre; None cuts nothing.
        antialias: for frames; Pillow always antialiases single images.
        rounded: frames are rounded to bytes after resizing, and cubic overshoot is clipped; otherwise neither.
    """

    edge: int | None = None
    square: bool = False
    longest: int | None = None
    crop: int | None = None
    mode: str = "bilinear"
    antialias: bool = False
    rounded: bool = False
    mean: Channels = (0.0, 0.0, 0.0)
    std: Channels = (1.0, 1.0, 1.0)

    def frames(self, frames: Frames) -> Inputs:
        resized, size = frames.float(), self.size_of(*frames.shape[-2:])
        if size != tuple(frames.shape[-2:]):
            resized = interpolate(resized, size, mode=self.mode, align_corners=False, antialias=self.antialias)
            resized = resized.clamp(0, 255).round() if self.rounded else resized
        return self._normalised(resized)

    def picture(self, image: Image.Image) -> Inputs:
        """A single image, as VBench prepares images that Pillow opened."""
        height, width = self.size_of(image.height, image.width)
        resized = image.convert("RGB").resize((width, height), Image.Resampling[self.mode.upper()])
        return self._normalised(torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].float())

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns after resizing; fractions of a pixel are dropped."""
        if self.longest is not None:
            scale = min(1.0, self.longest / max(height, width))
            return int(scale * height), int(scale * width)
        if self.edge is None:
            return height, width
        longer = self.edge if self.square else int(self.edge * max(height, width) / min(height, width))
        return (self.edge, longer) if height <= width else (longer, self.edge)

    def _normalised(self, images: Inputs) -> Float[Tensor, "frames 3 cut_rows cut_columns"]:
        if self.crop is not None:
            top, left = (round((side - self.crop) / 2) for side in images.shape[-2:])
            images = images[..., top : top + self.crop, left : left + self.crop]
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (images / 255 - mean) / std


UNCHANGED = Preparation()
IMAGENET = Preparation(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
OPENAI = Preparation(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
DINO = replace(IMAGENET, edge=224)
DINO_OF_IMAGES = replace(IMAGENET, edge=256, crop=224, mode="bicubic", antialias=True)
CLIP = replace(OPENAI, edge=224, crop=224, mode="bicubic")
VICLIP = replace(CLIP, rounded=True)
DREAMSIM = Preparation(edge=224, square=True, mode="bicubic", antialias=True)
MUSIQ = Preparation(longest=512)


@dataclass(frozen=True)
class Encoder:
    """A network with its preprocessing; results are fp32 on the CPU.

    Attributes:
        network: prepared frames on the device, and a text if the formula has one -> a row for each frame.
        batch: frames that are resized and encoded together.
    """

    network: Callable[..., Tensor]
    preparation: Preparation
    device: torch.device
    batch: int = 32

    def frames(self, frames: Frames) -> Float[Tensor, "frames ..."]:
        return torch.cat([self._encoded(self.preparation.frames(part)) for part in frames.split(self.batch)])

    def picture(self, image: Image.Image, *text: str) -> Float[Tensor, "one ..."]:
        return self._encoded(self.preparation.picture(image), *text)

    @torch.no_grad()
    def _encoded(self, pixels: Inputs, *text: str) -> Tensor:
        return self.network(pixels.to(self.device), *text).float().cpu()


@dataclass(frozen=True)
class Network:
    """A network of a dimension.

    Attributes:
        call: what the formula calls.
        label: exact (VBench's numbers, no network), native (VBench's formula and kind of network) or proxy.
        name: its origin; part of the results.
    """

    call: Any
    label: Label
    name: str


@dataclass(frozen=True)
class Sources:
    """The device of networks, and files that they are built from.

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


def file_name(path: Path) -> str:
    return f"{path.name} {sha256(path.read_bytes()).hexdigest()[:16]}"


def dino(preparation: Preparation, spec: str, sources: Sources) -> Network:
    """The class token of a vision transformer's last layer (DINO, arXiv 2104.14294; also DINOv2)."""
    folder = resolve_folder(spec)
    network = sources.backbones.load(AutoModel, folder, sources.device, "float32", unused=("pooler.",)).network
    options = {}
    if network.config.model_type == "vit":
        network.embeddings.interpolate_pos_encoding = partial(dino_positions, network.embeddings)
        options = {"interpolate_pos_encoding": True}

    def encode(pixels: Tensor) -> Tensor:
        return network(pixel_values=pixels, **options).last_hidden_state[:, 0]

    name = f"{spec} {fingerprint(folder, ('.',))}"
    return Network(Encoder(encode, preparation, sources.device), label_of(folder, DINO_B16), name)


def dino_positions(embeddings: Any, tokens: Tensor, height: int, width: int) -> Tensor:
    """Position embeddings of another image size, resized as in DINO's own code.

    DINO adds .1 to the patches per side before it divides, so that none is lost to rounding. transformers does not, and
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


def clip(output: Literal["image", "text", "points"], spec: str, sources: Sources) -> Network:
    """CLIP (arXiv 2103.00020) at its own image size: an image embedding, logits of images and a text, or the points
    that LAION's head gives the image embedding.
    """
    folder = resolve_folder(spec)
    network = sources.backbones.load(CLIPModel, folder, sources.device, "float32").network
    tokenizer: Any = AutoTokenizer.from_pretrained(folder) if output == "text" else None
    side = network.config.vision_config.image_size

    def embed(pixels: Tensor) -> Tensor:
        return network.get_image_features(pixel_values=pixels).pooler_output

    def logits(pixels: Tensor, text: str) -> Tensor:
        tokens = tokenizer([text], return_tensors="pt").input_ids.to(sources.device)
        return network(input_ids=tokens, pixel_values=pixels).logits_per_image[:, 0]

    name, native = f"{spec} {fingerprint(folder, ('.',))}", CLIP_B32
    encoder = Encoder(logits if output == "text" else embed, CLIP, sources.device)
    if output == "points":
        encoder, native = adapt_embedding(embed, sources), CLIP_L14
        name = f"{spec}, {file_name(head_file(sources))}"
    encoder = replace(encoder, preparation=replace(CLIP, edge=side, crop=side))
    return Network(encoder, label_of(folder, native), name)


def head_file(sources: Sources) -> Path:
    if sources.head is None:
        raise ValueError(f"aesthetic_quality needs LAION's head, a file like {LAION_HEAD}: --head FILE")
    return sources.head


def musiq(spec: str, sources: Sources) -> Network:
    """MUSIQ (arXiv 2108.05997) by pyiqa with the weights of a local file; VBench's is musiq_spaq_ckpt-358bb6af.pth."""
    path = Path(spec).expanduser()
    unpickled(path)  # refuses anything but tensors; pyiqa unpickles without a check
    try:
        from pyiqa.archs.musiq_arch import MUSIQ as Musiq  # needs torchvision and more, so it is not a dependency
    except ModuleNotFoundError as error:
        raise ImportError(f"{error}; MUSIQ's weights need pyiqa: pip install pyiqa, or give a factory") from error
    network = Musiq(pretrained_model_path=str(path)).to(sources.device).eval()
    return Network(adapt_points(network, sources), "native", file_name(path))


def xclip(spec: str, sources: Sources) -> Network:
    """X-CLIP (arXiv 2208.02816) as a proxy for ViCLIP."""
    reward = XClipScore(spec, device=sources.device, backbones=sources.backbones)

    @torch.no_grad()
    def compare(footage: Footage) -> float:
        return float(reward(Clips(footage.frames[None].float() / 255, footage.fps, (footage.prompt.text,))).values)

    return Network(compare, "proxy", f"{spec} {reward.version}")


def efficientnet(_: str, sources: Sources) -> Network:
    """Unit features of EfficientNet-Lite0, whose weights a Python package contains, as a proxy for DINO and CLIP."""
    reward = FrameConsistency(device=sources.device)
    encoder = Encoder(lambda pixels: reward.embed(pixels[None])[0], UNCHANGED, sources.device)
    return Network(encoder, "proxy", reward.version)


def dis(_: str, sources: Sources) -> Network:
    """OpenCV's DIS flow as a proxy for RAFT, on frames of at most 256 pixels on the shorter side."""
    reward = DynamicDegree()

    def pairs(frames: Frames) -> list[bool]:
        pictures = [reward.shrink(frame) for frame in frames.permute(0, 2, 3, 1).contiguous().numpy()]
        flows = [reward.flow(before, after, None) for before, after in pairwise(pictures)]
        return [speed(flow) > DYNAMIC * min(flow.shape[:2]) for flow in flows]

    return Network(pairs, "proxy", f"DIS {reward.version}")


def adapt_encoder(preparation: Preparation) -> Callable[[Any, Sources], Encoder]:
    """The network maps prepared frames on the device, (frames, 3, rows, columns), to features, (frames, dim).

    For appearance_style it maps the frames, (frames, 3, 224, 224), and a text to CLIP's logits, (frames,).
    """
    return lambda network, sources: Encoder(network, preparation, sources.device)


def adapt_embedding(network: Any, sources: Sources) -> Encoder:
    """The network maps prepared frames on the device, (frames, 3, 224, 224), to embeddings for LAION's head, (frames,
    dim).
    """
    path, device = head_file(sources), sources.device
    layers = [(weight.to(device), bias.to(device)) for weight, bias in linear_layers(read_weights(path), path)]

    def points(pixels: Tensor) -> Tensor:
        features = normalize(network(pixels).float(), dim=-1)
        for weight, bias in layers:
            features = linear(features, weight, bias)
        return features / 10

    return Encoder(points, CLIP, device)


def adapt_points(network: Any, sources: Sources) -> Encoder:
    """The network maps one frame in [0, 1] on the device, (1, 3, rows, columns), to its quality, 0 to 100."""
    return Encoder(lambda frame: network(frame).reshape(1), MUSIQ, sources.device, batch=1)


def adapt_video_text(network: Any, sources: Sources) -> Callable[[Footage], float]:
    """The network maps prepared frames on the device, (1, 8, 3, 224, 224), and a text to two features, (1, dim)."""

    @torch.no_grad()
    def compare(footage: Footage) -> float:
        chosen = footage.frames[middles(VICLIP_FRAMES, len(footage.frames))]
        video, text = network(VICLIP.frames(chosen)[None].to(sources.device), footage.prompt.text)
        return float(cosine_similarity(video.float(), text.float(), dim=-1))

    return compare


def middles(count: int, total: int) -> list[int]:
    """The middle frame of each of `count` equal parts of a video; a shorter video repeats its last frame."""
    parts = min(count, total)
    starts = np.linspace(0, total, parts + 1).astype(int)
    chosen = [int((start + stop - 1) // 2) for start, stop in pairwise(starts)]
    return chosen + [chosen[-1]] * (count - parts)


def adapt_flow(network: Any, sources: Sources) -> Callable[[Frames], list[bool]]:
    """The network maps two frames of 0 to 255 on the device, (1, 3, height, width) with sides that are multiples of 8,
    to the optical flow in pixels, (1, 2, height, width).
    """

    @torch.no_grad()
    def pairs(frames: Frames) -> list[bool]:
        padded = (replicated(frame[None].float().to(sources.device), FLOW_DIVISOR)[0] for frame in frames)
        flows = (network(before, after)[0].permute(1, 2, 0).float().cpu() for before, after in pairwise(padded))
        return [speed(flow.numpy()) > DYNAMIC * min(frames.shape[-2:]) for flow in flows]

    return pairs


def adapt_interpolator(network: Any, sources: Sources) -> Callable[[Picture, Picture], Picture]:
    """The network maps two frames in [0, 1] on the device, (1, 3, height, width) with sides that are multiples of 16,
    to the frame between them.
    """

    @torch.no_grad()
    def between(*frames: Picture) -> Picture:
        (before, edges), (after, _) = (replicated(frame.to(sources.device), INTERPOLATION_DIVISOR) for frame in frames)
        left, right, top, bottom = edges
        middle = network(before, after)
        return middle[..., top : middle.shape[-2] - bottom, left : middle.shape[-1] - right].float().cpu()

    return between


def replicated(images: Tensor, divisor: int) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Pads by repeating the edges until both sides are multiples of `divisor`, as RAFT and AMT do.

    Returns:
        the images, and the padding: left, right, top, bottom.
    """
    height, width = (-side % divisor for side in images.shape[-2:])
    edges = (width // 2, width - width // 2, height // 2, height - height // 2)
    return pad(images, edges, mode="replicate"), edges


def adapt_tracker(network: Any, sources: Sources) -> Callable[[Frames], Tracks]:
    """The network maps a video of 0 to 255 on the device, (1, frames, 3, height, width), and the points per side, 10,
    to x and y of each point, row by row, (1, frames, 100, 2).
    """

    @torch.no_grad()
    def track(frames: Frames) -> Tracks:
        points = network(frames[None].float().to(sources.device), GRID)
        return points[0].long().cpu().unflatten(1, (GRID, GRID))

    return track
