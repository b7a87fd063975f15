"""Do subject and background stay what they are? Cosines between features of frames (VBench, arXiv 2311.17982).

    mean over t >= 1 of (max(0, cos(f_t, f_{t-1})) + max(0, cos(f_t, f_0)))/2

f is DINO's class token of frames of 224 pixels on the shorter side, not cut, for the subject, and CLIP's embedding for
the background. The dimension's score is the mean over all frames of all videos.
"""

from __future__ import annotations

from functools import partial

from torch.nn.functional import cosine_similarity

from bpgo_video.evaluation.vbench.dimension import Dimension, DimensionError, Footage, Measured
from bpgo_video.evaluation.vbench.encoders import CLIP_B32, DINO_B16, adopt_encoder, clip, dino, efficientnet
from bpgo_video.evaluation.vbench.pixels import CLIP, DINO, Encoder


def consistency(encoder: Encoder, footage: Footage) -> Measured:
    """VBench's formula; a video counts by its frames after the first."""
    features = encoder.frames(footage.frames)
    if len(features) < 2:
        raise DimensionError(f"{footage.path} has one frame; consistency compares frames")
    before = cosine_similarity(features[1:], features[:-1], dim=-1).clamp(min=0).double()
    first = cosine_similarity(features[1:], features[:1], dim=-1).clamp(min=0).double()
    return Measured(float((before + first).mean() / 2), weight=len(features) - 1)


SUBJECT_CONSISTENCY = Dimension(
    consistency,
    default=DINO_B16,
    named={"efficientnet": efficientnet},
    folder=partial(dino, DINO),
    adopt=partial(adopt_encoder, DINO),
)
BACKGROUND_CONSISTENCY = Dimension(
    consistency,
    default=CLIP_B32,
    named={"efficientnet": efficientnet},
    folder=partial(clip, CLIP, CLIP_B32),
    adopt=partial(adopt_encoder, CLIP),
)
