"""How well does each frame show the prompt? The cosine between embeddings of SigLIP or SigLIP 2."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, SiglipModel

from bpgo_video.rewards.clip import ClipScore


class SiglipScore(ClipScore):
    """cos(image, text) of a SiglipModel (arXiv 2303.15343, 2502.14786), per frame.

    The cosine, not the sigmoid of the scaled one: that is flat far from its threshold, and a group of one prompt's
    samples lies on one side. Frames are stretched to the network's square, as in its training.

    Args:
        model: local folder or hub id of a fixed resolution (google/siglip2-so400m-patch14-384).
        frames, frames_per_second: as in ClipScore.

    Raises:
        ValueError: a NaFlex checkpoint, whose patches are of another form.
    """

    name = "siglip_score"
    network = SiglipModel
    as_siglip = True

    def check(self, folder: Path) -> None:
        found = AutoConfig.from_pretrained(folder).model_type
        if found != "siglip":
            raise ValueError(
                f"{folder} is of type {found!r}; must be 'siglip', as SigLIP and SigLIP 2 of a fixed resolution are "
                "(google/siglip2-base-patch16-224, not its naflex sibling)"
            )
