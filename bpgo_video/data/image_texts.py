"""How are texts encoded by an encoder that reads the image with the text? Each with its own, fitted to the video.

What the encoder sees depends on where an image is cut, so the size is the build's, the index says it, and training
compares it with the recipe's. Equal texts have embeddings of their own. Negative prompts have no image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from bpgo_video.data.build import Content, with_media
from bpgo_video.data.fingerprint import fingerprint
from bpgo_video.data.images import decode_image, fit_image
from bpgo_video.data.prompt_files import Line, PromptFileError
from bpgo_video.data.prompt_plan import Plan
from bpgo_video.data.prompt_records import PromptRecord, ShardError
from bpgo_video.data.prompt_stream import Size
from bpgo_video.data.shards import PromptShards


@runtime_checkable
class ImageTextEncoder(Protocol):
    """What a text that sees an image needs of the policy."""

    def encode_with_images(
        self, texts: Sequence[str], images: Float[Tensor, "prompts 3 height width"]
    ) -> dict[str, Tensor]: ...


def image_text_content(policy: Callable[[], ImageTextEncoder], folder: Path, size: Size) -> Content:
    """Records whose conditioning is of text and image.

    Args:
        policy: loads the policy when the first prompt is encoded.
        folder: its pipeline folder.
        size: height and width of the videos that will be made.
    """
    return Content(complete=partial(with_image_text, policy=policy, size=size), stamp=image_stamp(folder, size))


def image_stamp(folder: Path, size: Size) -> dict[str, Any]:
    """What an index says of the images that texts were encoded with: their size, and the hash of what reads them."""
    height, width = size
    return {"images": {"height": height, "width": width, "processor": fingerprint(folder, ("image_processor",))}}


def with_image_text(line: Line, policy: Callable[[], ImageTextEncoder], size: Size) -> PromptRecord:
    """The line's record with its media and its conditioning; raises ImageError where the image does not decode."""
    record = with_media(line)
    image = fit_image(decode_image(record.media["image"].data, f"prompt {record.prompt!r}"), *size)
    return replace(record, conditioning=text_beside(policy(), record.prompt, image))


def text_beside(policy: ImageTextEncoder, text: str, image: Float[Tensor, "3 height width"]) -> dict[str, Tensor]:
    """The conditioning of one text and its image, without a batch axis."""
    return {name: value[0] for name, value in policy.encode_with_images([text], image[None]).items()}


def require_images(plan: Plan) -> None:
    """Whether every prompt has an image, before anything is encoded.

    Raises:
        PromptFileError: names the first that has none.
    """
    for line in plan.lines():
        if isinstance(line, Line) and "image" not in line.media:
            raise PromptFileError(
                f"{line.place}: the prompt has no image, and this policy's text encoder reads the image with the text; "
                "give .jsonl or .csv lines with an 'image'"
            )


def check_image_stamp(shards: PromptShards, folder: Path, size: Size) -> None:
    """Whether the texts were encoded with their images at this size.

    Raises:
        ShardError: names what differs, and the tool.
    """
    expected, found = image_stamp(folder, size)["images"], shards.index.get("images", {})
    if differing := [name for name in expected if found.get(name) != expected[name]]:
        told = "; ".join(f"{name} {found.get(name)!r}, here {expected[name]!r}" for name in differing)
        raise ShardError(
            f"{shards.directory} holds texts that were encoded with other images ({told}): set the recipe's `video`, "
            "or build shards for it with bpgo-video prompts build --height H --width W"
        )
