"""What does a build of video shards add to a prompt? Its clip, as the policy's own VAE encodes it, once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.config.bpgo import VideoConfig
from bpgo_video.data.build import Content
from bpgo_video.data.clips import read_clip
from bpgo_video.data.fingerprint import fingerprint
from bpgo_video.data.image_texts import ImageTextEncoder, image_stamp, text_beside
from bpgo_video.data.prompt_files import Line
from bpgo_video.data.prompt_records import LATENTS, PromptRecord
from bpgo_video.types import Latents, Videos


@runtime_checkable
class ClipEncoder(ImageTextEncoder, Protocol):
    """What a clip needs of the policy."""

    takes_images: bool
    texts_see_images: bool

    def encode_video(self, videos: Videos) -> Latents: ...

    def image_conditioning(
        self, images: Float[Tensor, "prompts 3 height width"], video: VideoConfig
    ) -> dict[str, Tensor]: ...


def clip_content(
    policy: Callable[[], ClipEncoder], described: ClipEncoder, folder: Path, video: VideoConfig, dtype: torch.dtype
) -> Content:
    """Records with clips of these frames, size and rate.

    Args:
        policy: loads the policy when the first clip is encoded.
        described: it without networks.
        folder: its pipeline folder.
        dtype: in which latents are kept.
    """
    complete = partial(with_clip, policy=policy, video=video, dtype=dtype)
    seen = image_stamp(folder, (video.height, video.width)) if described.texts_see_images else {}
    return Content("clips", complete, {**clip_stamp(folder, video, described.takes_images), **seen})


def clip_stamp(folder: Path, video: VideoConfig, takes_images: bool) -> dict[str, Any]:
    """What an index says of clips: their size, and the hash of what encodes them."""
    parts = ("vae", "image_encoder") if takes_images and (folder / "image_encoder").is_dir() else ("vae",)
    return {"video": {**asdict(video), "encoder": fingerprint(folder, parts)}}


def with_clip(line: Line, policy: Callable[[], ClipEncoder], video: VideoConfig, dtype: torch.dtype) -> PromptRecord:
    """The line's record with its clip, whose first frame is the image that a text sees; raises as `read_clip`."""
    frames = read_clip(line.media["video"], line.record.info["start"], video)
    found = encode_clip(policy(), frames, video)
    clip = {name: value.to("cpu", dtype) for name, value in found.items()}
    sees = policy().texts_see_images
    conditioning = text_beside(policy(), line.record.prompt, frames[0]) if sees else {}
    return replace(line.record, clip=clip, conditioning=conditioning)


def encode_clip(
    policy: ClipEncoder, frames: Float[Tensor, "frames 3 height width"], video: VideoConfig
) -> Mapping[str, Any]:
    """Latents of one clip and, where the policy continues images, what its first frame adds to the conditioning."""
    images = policy.image_conditioning(frames[:1], video) if policy.takes_images else {}
    found = {LATENTS: policy.encode_video(frames[None]), **images}
    return {name: value[0] for name, value in found.items()}
