"""Does a video of the embedded world show what its caption asks for? The world's own rule, for evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from bpgo_video.tiny.oracle import RULE, oracle_scores
from bpgo_video.types import Videos


class ShapesOracle:
    """`bpgo_video.tiny.oracle` as a reward model: a score in [0, 1] per frame."""

    name = "shapes_oracle"
    range = (0.0, 1.0)
    higher_is_better = True
    differentiable = False
    kind = "test"
    version = hashlib.sha256(repr(RULE).encode()).hexdigest()[:16]

    def __call__(self, videos: Videos, texts: Sequence[str]) -> Float[Tensor, "samples frames"]:
        return oracle_scores(videos, texts)
