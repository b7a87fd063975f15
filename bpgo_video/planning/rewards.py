"""Size and operations of a recipe's reward models, from a table of known ones, a local folder or the class itself.

Sizes of published networks are our estimates, and operations 2 x parameters x tokens of them: rewards are a small part
of a step's arithmetic. A class of your own states its size in the attributes `gigabytes` and `tera_operations` (of one
video); without them it is unknown, and a plan does not say that the job fits.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from bpgo_video.config.bpgo import Config, ConfigError, RewardConfig
from bpgo_video.files import PACKAGE_PREFIX, resolve_folder
from bpgo_video.rewards.base import FrameSampling
from bpgo_video.rewards.reward import REWARDS, reward_factory
from bpgo_video.weights import WeightsError, headers, read_json, weight_files

WORK = 0.5  # of a model's weights, for its activations: an assumption, not measured
TOKENS = 256  # of a frame, where a folder's config does not state them
HALF = ("bfloat16", "float16")
BYTES = {"float32": 4, **dict.fromkeys(HALF, 2)}
WITHOUT_NETWORK = (
    *("audible", "brisque", "dynamic_degree", "niqe", "ocr_text", "remote", "shapes_oracle", "temporal_flickering"),
)


@dataclass(frozen=True)
class Network:
    """A published network.

    Attributes:
        parameters, frame: its number, and the operations of one frame, in units of 1e9.
        fps: frames that it reads a second, where the recipe does not set them.
    """

    parameters: float
    frame: float
    fps: float | None = None


CLIP_H = Network(0.986, 335)
NETWORKS: Mapping[str, Network] = {  # by hub id; our estimates, not read from the files
    "openai/clip-vit-base-patch32": Network(0.151, 9),
    "openai/clip-vit-large-patch14": Network(0.428, 162),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": CLIP_H,
    "xswu/HPSv2": CLIP_H,
    "yuvalkirstain/PickScore_v1": CLIP_H,
    "google/siglip2-so400m-patch14-384": Network(1.136, 690),
    "facebook/dinov2-base": Network(0.087, 46),
    "facebook/dino-vitb16": Network(0.086, 35),
    "laion/clap-htsat-unfused": Network(0.154, 20, fps=0.1),  # a pass reads 10 s of sound
    "microsoft/xclip-base-patch32": Network(0.197, 10),
    "google/videoprism-lvt-base-f16r288": Network(0.248, 60),
    "facebook/vjepa2-vitl-fpc64-256": Network(0.375, 195),
    "KwaiVGI/VideoReward": Network(2.21, 1100, fps=2.0),
    "Qwen/Qwen2-VL-2B-Instruct": Network(2.21, 1100),
    "Qwen/Qwen2-VL-7B-Instruct": Network(8.29, 2700),
    "Qwen/Qwen2.5-VL-3B-Instruct": Network(3.75, 1500),
    "Qwen/Qwen2.5-VL-7B-Instruct": Network(8.29, 2700),
    "Qwen/Qwen3-VL-4B-Instruct": Network(4.44, 1700),
    "Qwen/Qwen3-VL-8B-Instruct": Network(8.77, 2700),
}
PACKAGED: Mapping[str, Network] = {  # rewards whose network comes with a package
    "frame_consistency": Network(0.005, 0.8),
    "shot_cuts": Network(0.002, 0.1),
}


@dataclass(frozen=True)
class RewardSize:
    """What the reward models of a recipe take on one GPU.

    Attributes:
        resting: bytes of the weights that stay on the GPU.
        offloaded: bytes of the weights that are there while videos are sampled and scored.
        operations, half_operations: of scoring one video with all of them, in fp32 and in 16 bits.
        unknown: names of the recipe's rewards whose size nothing states.
        stated: `resting` was given, and includes the activations.
    """

    resting: int
    offloaded: int
    operations: float = 0.0
    half_operations: float = 0.0
    unknown: tuple[str, ...] = ()
    stated: bool = False

    @property
    def work(self) -> int:
        """Bytes of activations while a video is scored."""
        return 0 if self.stated else int(WORK * (self.resting + self.offloaded))


@dataclass(frozen=True)
class _Entry:
    """One entry's network: its identity, bytes of its weights, and operations of one video."""

    key: tuple[str, ...]
    stored: int
    operations: float
    half: bool = False


def reward_size(config: Config) -> RewardSize:
    """Of the rewards that a run trains on, and of those that evaluate it; a network that several use counts once."""
    weights: dict[tuple[str, ...], tuple[int, bool]] = {}
    operations, missing = {False: 0.0, True: 0.0}, []
    for rewards in (config.rewards, config.evaluation.rewards):
        for name, reward in rewards.items():
            entry = _entry(name, reward, config)
            if entry is None:
                missing.append(name)
                continue
            moves = weights.get(entry.key, (0, True))[1] and reward.offload
            weights[entry.key] = (entry.stored, moves)
            scorings = 1 + len(reward.rescorings) if name in config.rescored else 1
            operations[entry.half] += scorings * entry.operations if rewards is config.rewards else 0
    resting, offloaded = (
        sum(stored for stored, moves in weights.values() if moves == offload) for offload in (False, True)
    )
    return RewardSize(resting, offloaded, operations[False], operations[True], tuple(dict.fromkeys(missing)))


def _entry(name: str, reward: RewardConfig, config: Config) -> _Entry | None:
    """None if nothing states the size of the entry's model."""
    video = config.video
    if reward.model in WITHOUT_NETWORK:
        return _Entry((reward.model,), 0, 0.0)
    try:
        factory = reward_factory(name, reward)
    except ConfigError:
        return None
    defaults = {p.name: p.default for p in inspect.signature(factory).parameters.values() if p.default is not p.empty}
    options = {**defaults, **reward.options}
    if reward.model not in REWARDS:
        gigabytes, tera = getattr(factory, "gigabytes", None), getattr(factory, "tera_operations", 0.0)
        own = (reward.model, repr(reward.options))
        return None if gigabytes is None else _Entry(own, int(1e9 * gigabytes), 1e12 * tera)
    model, dtype = str(options.get("model")), str(options.get("dtype", "float32"))
    network = PACKAGED.get(reward.model) or NETWORKS.get(model) or _stored(model)
    if network is None:
        return None
    fps = options.get("frames_per_second") or (network.fps if "frames" not in options else None)
    frames = FrameSampling(None if fps else options.get("frames"), fps).indices(video.num_frames, video.fps)
    size, operations = BYTES.get(dtype, 4) * network.parameters, network.frame * len(frames)
    if "opponents" in options:  # each pair is shown in two orders
        operations *= 2 * (options["opponents"] or config.rollout.group_size - 1)
    return _Entry((model, dtype), int(1e9 * size), 1e9 * operations, half=dtype in HALF)


def _stored(model: str) -> Network | None:
    """A network by the headers of its local files; all its parameters count for each of a frame's tokens."""
    if not (model.startswith(PACKAGE_PREFIX) or Path(model).expanduser().is_dir()):
        return None  # a hub id: plans download nothing
    try:
        folder = resolve_folder(model)
        elements = sum(prod(shape) for _, shape in headers(weight_files(folder)).values())
        config = read_json(folder / "config.json")
    except (FileNotFoundError, WeightsError):
        return None
    vision = config.get("vision_config", config)
    size, patch = vision.get("image_size"), vision.get("patch_size")
    tokens = (size // patch) ** 2 + 1 if isinstance(size, int) and isinstance(patch, int) else TOKENS
    return Network(elements / 1e9, 2 * tokens * elements / 1e9)
