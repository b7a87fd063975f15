"""How do single frames look? VBench's aesthetic and imaging quality (arXiv 2311.17982): means over a video's frames."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

from bpgo_video.evaluation.vbench.dimension import Dimension, Footage, Measured, Network, Sources
from bpgo_video.evaluation.vbench.encoders import CLIP_L14, clip_encoder, label_of
from bpgo_video.evaluation.vbench.pixels import CLIP, Encoder, Inputs, fitted
from bpgo_video.rewards.checkpoints import linear_layers, read_weights, unpickled

Points = Callable[[Inputs], Tensor]  # a frame in [0, 1], (1, 3, rows, columns), -> its points of 100

LONGEST = 512  # pixels that MUSIQ is shown
LAION_HEAD = "sa_0_4_vit_l_14_linear.pth"


def aesthetic(encoder: Encoder, footage: Footage) -> Measured:
    """mean_t head(f_t/|f_t|)/10, where f is CLIP-L's embedding and the head LAION's linear one."""
    return Measured(float((encoder.frames(footage.frames) / 10).mean()))


def aesthetic_of_clip(spec: str, sources: Sources) -> Network:
    """CLIP of a folder or hub id with the head behind it.

    Raises:
        ValueError: no head is named, or its weights do not fit CLIP's embedding.
    """
    encoder, folder = clip_encoder(CLIP, spec, sources)
    name = f"{spec}, {head_name(sources)}"
    return Network(adopt_embedding(encoder.network, sources, encoder), label_of(folder, CLIP_L14), name)


def adopt_embedding(built: Any, sources: Sources, like: Encoder | None = None) -> Encoder:
    """A user's image embedding: prepared frames on the device, (frames, 3, 224, 224), -> (frames, dim)."""
    layers = [(weight.to(sources.device), bias.to(sources.device)) for weight, bias in _head(sources)]

    def points(pixels: Tensor) -> Tensor:
        found = normalize(built(pixels).float(), dim=-1)
        for weight, bias in layers:
            found = linear(found, weight, bias)
        return found

    return Encoder(points, CLIP if like is None else like.preparation, sources.device)


def head_name(sources: Sources) -> str:
    path = _head_path(sources)
    return f"{path.name} {sha256(path.read_bytes()).hexdigest()[:16]}"


def _head(sources: Sources) -> list[tuple[Tensor, Tensor]]:
    path = _head_path(sources)
    return linear_layers(read_weights(path), path)


def _head_path(sources: Sources) -> Path:
    if sources.head is None:
        raise ValueError(f"aesthetic_quality needs LAION's head, a file like {LAION_HEAD}: --head FILE")
    return sources.head


@torch.no_grad()
def imaging(points: Points, footage: Footage) -> Measured:
    """mean_t MUSIQ(frame t), of 100, on frames of 512 pixels at most on the longer side."""
    found = [float(points(fitted(frame[None], LONGEST))) for frame in footage.frames]
    return Measured(sum(found) / len(found))


def musiq(spec: str, sources: Sources) -> Network:
    """MUSIQ (arXiv 2108.05997) by pyiqa with the weights of a local file; VBench's is musiq_spaq_ckpt-358bb6af.pth.

    Raises:
        ImportError: pyiqa is not installed.
        ValueError: the file holds more than tensors.
    """
    path = Path(spec).expanduser()
    unpickled(path)  # pyiqa unpickles the file without looking at it
    try:
        from pyiqa.archs.musiq_arch import MUSIQ  # brings torchvision and more: no dependency
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error}; MUSIQ's weights are read by pyiqa: pip install pyiqa, or name a factory"
        ) from error
    network = MUSIQ(pretrained_model_path=str(path)).to(sources.device).eval()
    return Network(
        adopt_points(network, sources), "native", f"{path.name} {sha256(path.read_bytes()).hexdigest()[:16]}"
    )


def adopt_points(built: Any, sources: Sources) -> Points:
    """A user's image quality: a frame in [0, 1] on the device, (1, 3, rows, columns), -> its points, 0 to 100."""
    return lambda frame: built(frame.to(sources.device))


AESTHETIC_QUALITY = Dimension(aesthetic, default=CLIP_L14, folder=aesthetic_of_clip, adopt=adopt_embedding)
IMAGING_QUALITY = Dimension(
    imaging, folder=musiq, adopt=adopt_points, usual="MUSIQ's weights (VBench's file is musiq_spaq_ckpt-358bb6af.pth)",
    scale=0.01,
)  # fmt: skip
