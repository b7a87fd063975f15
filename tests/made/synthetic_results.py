"""Synthetic model results for comparison tests: scores by formula, and grey videos."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bpgo_video.data.media import write_video
from bpgo_video.evaluation.comparison import Measure, ModelScores, PromptLine, video_path, write_scores

MEASURES = {
    "oracle": Measure("heldout", "1"),
    "second": Measure("heldout", "1"),
    "alignment": Measure("trained", "1", 1.0),
    "smooth": Measure("trained", "1", 0.5),
    "pixel_motion": Measure("video", "1"),
    "pixel_diversity": Measure("video", "1"),
}
SAMPLES = 3
DEPLOYMENT = {
    "video": {"num_frames": 9, "height": 32, "width": 48, "fps": 8.0},
    "num_steps": 8,
    "guidance_scale": 1.0,
}


def results(
    label: str,
    prompts: int = 12,
    gains: dict[str, float] | None = None,
    seed: int = 0,
    run: str | None = None,
    step: int | None = None,
    spread: float = 0.02,
) -> ModelScores:
    """Standard normal scores, the same for all models of one seed, shifted by `gains` and slightly by the label."""
    lines = []
    for row in range(prompts):
        rng = np.random.default_rng([seed, row])
        own = np.random.default_rng([seed, row, *label.encode()])
        scores = {
            name: (rng.normal(size=SAMPLES) + (gains or {}).get(name, 0.0) + spread * own.normal(size=SAMPLES)).tolist()
            for name in MEASURES
        }
        lines.append(PromptLine(row, f"prompt {row} <b>&", ["clear" if row % 2 else "open"], scores))
    settings = {"seed": seed, "samples_per_prompt": SAMPLES, "pipeline": "base", "deployment": DEPLOYMENT}
    return ModelScores(label, f"models/{label}", settings, MEASURES, lines, "base", run, step)


def model_results(path: Path, scores: ModelScores, shade: float | None = None) -> ModelScores:
    """The scores in a folder, with videos that brighten to `shade`."""
    scores = replace(scores, folder=path)
    write_scores(scores)
    if shade is not None:
        for row in range(len(scores.prompts)):
            video = torch.linspace(0, shade, 9)[:, None, None, None].expand(9, 3, 32, 48)
            write_video(video_path(path, row), video, fps=8.0)
    return scores
