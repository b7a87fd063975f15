"""Does a video go on as the world would? How near V-JEPA 2's prediction comes to what then is seen."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, layer_norm
from transformers import VJEPA2Model

from bpgo_video.data.fingerprint import fingerprint
from bpgo_video.paths import resolve_folder
from bpgo_video.rewards.backbones import Backbones, Dtype, version
from bpgo_video.rewards.base import Clips, FrameSampling, FrameScores, RewardError
from bpgo_video.rewards.preprocessing import Preprocessing, video_features


class VJepaPrediction:
    """Mean over a step's patches of cos(predicted, observed feature), for each step of the video's second half.

    The encoder sees the first half alone, the predictor continues it in feature space, and the encoder of the whole
    video says what was there (V-JEPA 2, arXiv 2506.09985; low similarity is the surprise by which arXiv 2502.11831
    finds impossible physics). Observed features are normalised as in its training, without an affine map. A step is two
    frames. A still video is the easiest to predict: train on it only beside a reward of motion.

    Args:
        model: local folder or hub id (facebook/vjepa2-vitl-fpc64-256).
        frames: how many frames are looked at, spread evenly; whole steps of them count.
        frames_per_second: how many of each second instead.

    Raises:
        RewardError: (of a call) fewer than two steps are looked at.
    """

    name = "vjepa_prediction"
    range = (-1.0, 1.0)
    higher_is_better = True
    differentiable = True
    kind = "real"

    def __init__(
        self,
        model: str,
        frames: int | None = 16,
        frames_per_second: float | None = None,
        device: torch.device | str = "cpu",
        dtype: Dtype = "float32",
        backbones: Backbones | None = None,
    ):
        folder = resolve_folder(model)
        self.frames = FrameSampling(frames if frames_per_second is None else None, frames_per_second)
        self.backbone = (backbones or Backbones()).load(VJEPA2Model, folder, device, dtype)
        self.preprocessing = Preprocessing.of_folder(folder)
        self.version = version([fingerprint(folder, (".",))], self.frames, dtype)

    def __call__(self, clips: Clips) -> FrameScores:
        per_step = self.backbone.network.config.tubelet_size
        indices = self.frames.indices(clips.videos.shape[1], clips.fps)
        steps = len(indices) // per_step
        if steps < 2:
            raise RewardError(
                f"{self.name} looks at {len(indices)} frames of a video of {clips.videos.shape[1]}; it needs at least "
                f"{2 * per_step}: {per_step} to start from and {per_step} to predict"
            )
        indices = indices[: steps * per_step]

        def similarity(pixels: Tensor, _: slice) -> Tensor:
            return self._similarity(pixels, steps // 2 * per_step, steps)

        found = video_features(clips, indices, self.backbone, self.preprocessing, similarity)
        return FrameScores(found, clips.times[indices[steps // 2 * per_step :: per_step]])

    def _similarity(
        self, pixels: Float[Tensor, "samples frames 3 height width"], seen: int, steps: int
    ) -> Float[Tensor, "samples predicted"]:
        """Of each step after the first `seen` frames."""
        network: Any = self.backbone.network
        observed = network.encoder(pixel_values_videos=pixels).last_hidden_state
        context = network.encoder(pixel_values_videos=pixels[:, :seen]).last_hidden_state
        places = torch.arange(observed.shape[1], device=observed.device).expand(len(pixels), -1)
        before, after = places.split([context.shape[1], observed.shape[1] - context.shape[1]], dim=1)
        predicted = network.predictor(context, [before], [after]).last_hidden_state.float()
        wanted = layer_norm(observed[:, context.shape[1] :].float(), observed.shape[-1:])
        return cosine_similarity(predicted, wanted, dim=-1).unflatten(1, (-1, observed.shape[1] // steps)).mean(dim=2)
