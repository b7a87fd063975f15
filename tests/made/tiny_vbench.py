"""Factories for --backbone: the small networks of vbench_side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tests.vbench_side import tiny_networks as tiny


def encoder(device: str) -> Callable[[Tensor], Tensor]:
    return tiny.features


def points(device: str) -> Callable[[Tensor], Tensor]:
    return tiny.points


def flow(device: str) -> Callable[[Tensor, Tensor], Tensor]:
    return tiny.flow


def between(device: str) -> Callable[[Tensor, Tensor], Tensor]:
    return tiny.between


def video_text(device: str) -> Callable[[Tensor, str], tuple[Tensor, Tensor]]:
    return lambda frames, text: (tiny.video_feature(frames), tiny.text_feature(text))


def image_text(device: str) -> Callable[[Tensor, str], Tensor]:
    return tiny.logits


def tracks(device: str) -> Callable[[Tensor, int], Tensor]:
    return tiny.tracks


def broken(device: str) -> Any:
    raise ValueError("no weights here")


BACKBONES = {
    "subject_consistency": "tests.made.tiny_vbench:encoder",
    "background_consistency": "tests.made.tiny_vbench:encoder",
    "motion_smoothness": "tests.made.tiny_vbench:between",
    "dynamic_degree": "tests.made.tiny_vbench:flow",
    "aesthetic_quality": "tests.made.tiny_vbench:encoder",
    "imaging_quality": "tests.made.tiny_vbench:points",
    "overall_consistency": "tests.made.tiny_vbench:video_text",
    "temporal_style": "tests.made.tiny_vbench:video_text",
    "appearance_style": "tests.made.tiny_vbench:image_text",
    "i2v_subject": "tests.made.tiny_vbench:encoder",
    "i2v_background": "tests.made.tiny_vbench:encoder",
    "camera_motion": "tests.made.tiny_vbench:tracks",
}
