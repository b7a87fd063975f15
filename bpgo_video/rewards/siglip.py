"""How well does each frame show the prompt? The cosine between embeddings of SigLIP or SigLIP 2."""

from __future__ import annotations

import torch
from transformers import AutoConfig, SiglipModel

from bpgo_video.data.fingerprint import fingerprint
from bpgo_video.paths import resolve_folder
from bpgo_video.rewards.backbones import Backbones, Dtype, version
from bpgo_video.rewards.base import Clips, FrameSampling, FrameScores
from bpgo_video.rewards.image_text import ImageTextEncoder
from bpgo_video.rewards.preprocessing import Preprocessing


class SiglipScore:
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
    range = (-1.0, 1.0)
    higher_is_better = True
    differentiable = True
    kind = "real"

    def __init__(
        self,
        model: str,
        frames: int | None = None,
        frames_per_second: float | None = None,
        device: torch.device | str = "cpu",
        dtype: Dtype = "float32",
        backbones: Backbones | None = None,
    ):
        folder = resolve_folder(model)
        found = AutoConfig.from_pretrained(folder).model_type
        if found != "siglip":
            raise ValueError(
                f"{model} is of type {found!r}; must be 'siglip', as SigLIP and SigLIP 2 of a fixed resolution are "
                "(google/siglip2-base-patch16-224, not its naflex sibling)"
            )
        self.frames = FrameSampling(frames, frames_per_second)
        backbone = (backbones or Backbones()).load(SiglipModel, folder, device, dtype)
        self.encoder = ImageTextEncoder(backbone, folder, Preprocessing.of_folder(folder), as_siglip=True)
        self.version = version([fingerprint(folder, (".",))], self.frames, dtype)

    def __call__(self, clips: Clips) -> FrameScores:
        return self.encoder.scores(clips, self.frames)
