"""What the policy's networks add to records besides plain texts: texts encoded with their image, and video clips.

The content of an image-text embedding depends on how the image is cropped, so a folder is built for one video size. The
index states the size and the networks in a stamp, which training compares with its recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bpgo_video.config.bpgo import VideoConfig
from bpgo_video.data.clips import read_clip
from bpgo_video.data.fingerprint import fingerprint
from bpgo_video.data.media import decode_image, fit_image
from bpgo_video.data.prompt_files import Line, Plan, PromptFileError
from bpgo_video.data.reader import PromptShards
from bpgo_video.data.records import LATENTS, PromptRecord, ShardError, without_batch
from bpgo_video.data.stream import Size
from bpgo_video.data.writer import Content, with_media

Load = Callable[[], Any]  # loads the policy at the first call


def image_text_content(policy: Load, folder: Path, size: Size) -> Content:
    """Records with embeddings of text and image together. Equal texts with different images differ.

    Args:
        folder: the policy's pipeline folder.
        size: of the videos that will be made.
    """

    def complete(line: Line) -> PromptRecord:
        record = with_media(line)
        image = fit_image(decode_image(record.media["image"].data, f"prompt {record.prompt!r}"), *size)
        return replace(record, conditioning=without_batch(policy().encode_with_images([record.prompt], image[None])))

    return Content(complete=complete, stamp=image_stamp(folder, size))


def clip_content(policy: Load, described: Any, folder: Path, video: VideoConfig, dtype: torch.dtype) -> Content:
    """Records with clips, encoded by the VAE; for image-to-video also with the conditioning on the first frame.

    Args:
        described: the policy without networks.
        folder: the policy's pipeline folder.
        dtype: of the stored tensors.
    """

    def complete(line: Line) -> PromptRecord:
        frames = read_clip(line.media["video"], line.record.info["start"], video)
        clip = {LATENTS: policy().encode_video(frames[None])}
        if described.takes_images:
            clip |= policy().image_conditioning(frames[:1], video)
        conditioning = {}
        if described.texts_see_images:
            conditioning = without_batch(policy().encode_with_images([line.record.prompt], frames[:1]))
        stored = {name: value.to("cpu", dtype) for name, value in without_batch(clip).items()}
        return replace(line.record, clip=stored, conditioning=conditioning)

    images = image_stamp(folder, (video.height, video.width)) if described.texts_see_images else {}
    return Content("clips", complete, clip_stamp(folder, video, described.takes_images) | images)


def image_stamp(folder: Path, size: Size) -> dict[str, Any]:
    """The index's entry on images that texts were encoded with: their size and the hash of the image processor."""
    height, width = size
    return {"images": {"height": height, "width": width, "processor": fingerprint(folder, ("image_processor",))}}


def clip_stamp(folder: Path, video: VideoConfig, takes_images: bool) -> dict[str, Any]:
    """The index's entry on clips: frames, size, frame rate, and the hash of the networks that encode them."""
    parts = ("vae", "image_encoder") if takes_images and (folder / "image_encoder").is_dir() else ("vae",)
    return {"video": {**asdict(video), "encoder": fingerprint(folder, parts)}}


def require_images(plan: Plan) -> None:
    """Raise PromptFileError, naming the line, if a prompt of the plan has no image."""
    for line in plan.lines():
        if isinstance(line, Line) and "image" not in line.media:
            raise PromptFileError(
                f"{line.place}: the prompt has no image, and this policy's text encoder reads the image with the text; "
                "give .jsonl or .csv lines with an 'image'"
            )


def check_image_stamp(shards: PromptShards, folder: Path, size: Size) -> None:
    """Raise ShardError, naming what differs, if the texts were not encoded with their images at this size."""
    expected, found = image_stamp(folder, size)["images"], shards.index.get("images", {})
    changes = [f"{k} {found.get(k)!r}, here {value!r}" for k, value in expected.items() if found.get(k) != value]
    if changes:
        raise ShardError(
            f"{shards.directory} holds texts that were encoded with other images ({'; '.join(changes)}): set the "
            "recipe's `video`, or build shards for it with bpgo-video prompts build --height H --width W"
        )
