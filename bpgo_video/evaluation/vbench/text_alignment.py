"""Does the video show what its prompt says? VBench's overall consistency and its two styles (arXiv 2311.17982)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoTokenizer

from bpgo_video.data.fingerprint import fingerprint
from bpgo_video.evaluation.vbench.dimension import Dimension, DimensionError, Footage, Measured, Network, Sources
from bpgo_video.evaluation.vbench.encoders import CLIP_B32, clip_encoder, clip_model, label_of
from bpgo_video.evaluation.vbench.pixels import CLIP, VICLIP, Frames, Preparation
from bpgo_video.rewards.base import Clips
from bpgo_video.rewards.video_text import XClipScore

Likeness = Callable[[Footage], float]
COUNT = 8  # frames that ViCLIP is shown


def likeness(network: Likeness, footage: Footage) -> Measured:
    """cos(video, prompt)."""
    return Measured(network(footage))


def adopt_video_text(built: Any, sources: Sources) -> Likeness:
    """A user's video-text network.

    It takes prepared frames on the device, (1, 8, 3, 224, 224), and a text, and gives a feature of each, (1, dim).
    """

    @torch.no_grad()
    def cosine(footage: Footage) -> float:
        chosen = footage.frames[middles(COUNT, len(footage.frames))]
        video, text = built(VICLIP.frames(chosen)[None].to(sources.device), footage.prompt.text)
        return float(cosine_similarity(video.float(), text.float(), dim=-1))

    return cosine


def middles(count: int, total: int) -> list[int]:
    """The middle frame of each of `count` equal parts of a video; a shorter one repeats its last frame."""
    parts = min(count, total)
    starts = np.linspace(0, total, parts + 1).astype(int)
    found = [int((start + stop - 1) // 2) for start, stop in itertools.pairwise(starts)]
    return found + [found[-1]] * (count - parts)


def xclip(spec: str, sources: Sources) -> Network:
    """X-CLIP (arXiv 2208.02816) in ViCLIP's place."""
    reward = XClipScore(spec, device=sources.device, backbones=sources.backbones)

    @torch.no_grad()
    def cosine(footage: Footage) -> float:
        clips = Clips(footage.frames[None].float() / 255, footage.fps, (footage.prompt.text,))
        return float(reward(clips).values)

    return Network(cosine, "proxy", f"{spec} {reward.version}")


@dataclass(frozen=True)
class ImageText:
    """scale cos(image, text) of frames.

    Attributes:
        network: prepared frames on the device and a text -> a number for each frame.
    """

    network: Callable[[Tensor, str], Float[Tensor, "frames"]]
    preparation: Preparation
    device: torch.device

    @torch.no_grad()
    def frames(self, frames: Frames, text: str) -> Float[Tensor, "frames"]:
        pictures = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
        found = [self.network(self.preparation.picture(picture).to(self.device), text) for picture in pictures]
        return torch.cat([part.float().cpu() for part in found])


def appearance(network: ImageText, footage: Footage) -> Measured:
    """exp(scale) cos(frame, style)/100, of the style that the suite's entry names; a video counts by its frames."""
    styles = footage.prompt.info.get("auxiliary_info", {}).get("appearance_style", {})
    if "appearance_style" not in styles:
        raise DimensionError(
            f"the suite names no style for {footage.prompt.text!r}: appearance_style is measured on VBench's own list"
        )
    found = network.frames(footage.frames, styles["appearance_style"]).double() / 100
    return Measured(float(found.mean()), weight=len(found))


def clip_text(spec: str, sources: Sources) -> Network:
    """CLIP's logits of images and a text."""
    encoder, folder = clip_encoder(CLIP, spec, sources)
    network, _ = clip_model(spec, sources)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def logits(pixels: Tensor, text: str) -> Tensor:
        tokens = tokenizer([text], return_tensors="pt").input_ids.to(sources.device)
        return network(input_ids=tokens, pixel_values=pixels).logits_per_image[:, 0]

    call = ImageText(logits, encoder.preparation, sources.device)
    return Network(call, label_of(folder, CLIP_B32), f"{spec} {fingerprint(folder, ('.',))}")


def adopt_image_text(built: Any, sources: Sources) -> ImageText:
    """A user's image-text network: prepared frames on the device, (frames, 3, 224, 224), and a text -> logits."""
    return ImageText(built, CLIP, sources.device)


_TEXT = partial(Dimension, likeness, folder=xclip, adopt=adopt_video_text, usual="ViCLIP, or X-CLIP as a proxy")
OVERALL_CONSISTENCY = _TEXT()
TEMPORAL_STYLE = _TEXT()
APPEARANCE_STYLE = Dimension(appearance, default=CLIP_B32, folder=clip_text, adopt=adopt_image_text)
