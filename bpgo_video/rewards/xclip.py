"""Does the video as a whole show what the prompt says? X-CLIP's cosine between video and text."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import XCLIPModel

from bpgo_video.rewards.video_text import VideoTextScore


class XClipScore(VideoTextScore):
    """cos(video, text | video) of an XCLIPModel (arXiv 2208.02816), one score a video.

    8 frames in microsoft/xclip-base-patch32. The text's embedding depends on the video: it is shifted by attention over
    the video's patches.
    """

    name = "xclip_score"
    network = XCLIPModel

    def cosines(self, texts: tuple[str, ...]) -> Callable[[Tensor, slice], Tensor]:
        network, tokens = self.backbone.network, self.words(texts)

        def compare(pixels: Tensor, rows: slice) -> Tensor:
            found = network(input_ids=tokens.input_ids[rows], pixel_values=pixels)
            return (found.logits_per_video / network.logit_scale.exp()).diagonal()

        return compare
