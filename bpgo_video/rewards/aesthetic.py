"""How beautiful is each frame? LAION's aesthetic predictors: a small head on CLIP's image embedding."""

from __future__ import annotations

import re
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import CLIPModel

from bpgo_video.data.fingerprint import fingerprint
from bpgo_video.paths import resolve_folder
from bpgo_video.rewards.backbones import Backbones, Dtype, version
from bpgo_video.rewards.base import Clips, FrameSampling, FrameScores
from bpgo_video.rewards.image_text import ImageTextEncoder
from bpgo_video.rewards.preprocessing import Preprocessing
from bpgo_video.rewards.weights import read_weights


class Aesthetic:
    """head(unit embedding), about 1 to 10 points, per frame.

    Both published heads are chains of linear layers, without activations between them: `sa_0_4_vit_l_14_linear.pth`
    (768-1; VBench's aesthetic_quality is its mean over ten) and `sac+logos+ava1-l14-linearMSE.pth`
    (768-1024-128-64-16-1, with dropout in training).

    Args:
        head: local file of the head's weights, .pth (tensors alone are unpickled) or .safetensors.
        model: folder or hub id of the CLIPModel that the head was trained on.
        frames, frames_per_second: as in ClipScore.
    """

    name = "aesthetic"
    range = (0.0, 10.0)
    higher_is_better = True
    differentiable = True
    kind = "real"

    def __init__(
        self,
        head: str,
        model: str = "openai/clip-vit-large-patch14",
        frames: int | None = None,
        frames_per_second: float | None = None,
        device: torch.device | str = "cpu",
        dtype: Dtype = "float32",
        backbones: Backbones | None = None,
    ):
        folder, path = resolve_folder(model), Path(head).expanduser()
        self.frames = FrameSampling(frames, frames_per_second)
        backbone = (backbones or Backbones()).load(CLIPModel, folder, device, dtype)
        self.encoder = ImageTextEncoder(backbone, folder, Preprocessing.of_folder(folder))
        self.layers = [(w.to(device), b.to(device)) for w, b in chain(read_weights(path), path)]
        self.version = version([fingerprint(folder, (".",))], self.frames, dtype, sha256(path.read_bytes()).hexdigest())

    def __call__(self, clips: Clips) -> FrameScores:
        indices = self.frames.indices(clips.videos.shape[1], clips.fps)
        points = self.encoder.embed_frames(clips, indices)
        for weight, bias in self.layers:
            points = linear(points, weight, bias)
        return FrameScores(points.squeeze(-1), clips.times[indices])


def chain(weights: dict[str, Tensor], path: Path) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of each linear layer, in order, fp32.

    Raises:
        ValueError: the file holds something else than linear layers that lead to one number.
    """
    found = [name.removesuffix("weight") for name in weights if name.endswith("weight")]
    found.sort(key=lambda name: [int(digits) for digits in re.findall(r"\d+", name)])
    layers = [(weights[f"{n}weight"].float(), weights[f"{n}bias"].float()) for n in found if f"{n}bias" in weights]
    joins = [before.shape[0] == after.shape[1] for (before, _), (after, _) in pairwise(layers)]
    if not layers or 2 * len(layers) != len(weights) or not all(joins) or layers[-1][0].shape[0] != 1:
        raise ValueError(f"{path} holds {sorted(weights)}; an aesthetic head is a chain of linear layers to one number")
    return layers
