"""Clips of several lengths, and dimensions for them: two weight videos equally, one by their frames."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from bpgo_video.data.media import write_video
from bpgo_video.evaluation.vbench_scoring import Request
from tests.made.real_clips import real_clip
from tests.vbench_side import tiny_networks

DIMENSIONS = ("temporal_flickering", "dynamic_degree", "subject_consistency")
BACKBONE = {"subject_consistency": "tests.made.scored_clips:encoder"}


def clips(folder: Path, count: int = 5) -> Path:
    """Real clips of 3, 4, 5 ... frames at 8 fps, all of one prompt."""
    for number in range(count):
        write_video(folder / f"a man talks-{number}.mp4", real_clip("carphone_pristine", 6 * number, 7 * number + 3), 8)
    return folder


def request_of(folder: Path) -> Request:
    return Request(folder, DIMENSIONS, BACKBONE)


def score_command(folder: Path, output: Path) -> list[str]:
    """`request_of` as a command line."""
    backbones = [text for name, spec in BACKBONE.items() for text in ("--backbone", f"{name}={spec}")]
    return ["score", "--videos", str(folder), "--output", str(output), "--dimensions", *DIMENSIONS, *backbones]


def encoder(device: str) -> Callable[[Tensor], Tensor]:
    """Features; raises an error for videos with REFUSED frames."""
    refused = int(os.environ.get("REFUSED", "0"))

    def features(frames: Tensor) -> Tensor:
        if len(frames) == refused:
            raise RuntimeError(f"out of memory for {refused} frames")
        return tiny_networks.features(frames)

    return features
