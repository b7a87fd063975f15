"""Settings for generations of test families with prompts and images, and their videos in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bpgo_video.config.generation import GenerationSettings
from bpgo_video.inference.generate import Job, plan, read_records, sample
from bpgo_video.inference.pipeline import load_pipeline, resolve
from bpgo_video.inference.run_weights import find_model
from tests.families import Case

CPU = torch.device("cpu")


def case_settings(case: Case, folder: Path, root: Path, **changes: Any) -> GenerationSettings:
    """A generation of the family's pipeline in `folder`, with a prompt file and images in `root`."""
    lines, controls = [], case.control_files()
    for row, (text, picture) in enumerate(zip(case.texts, case.pictures(), strict=True)):
        picture.save(root / f"{row}.png")
        (root / f"{row}.mp4").write_bytes(controls[row])
        lines.append(json.dumps({"prompt": text, "image": f"{row}.png", "video": f"{row}.mp4"}))
    (root / "prompts.jsonl").write_text("\n".join(lines))
    settings: dict[str, Any] = {
        "policy": str(folder), "family": case.family, "prompts": root / "prompts.jsonl", "output": root / "videos",
        "seed": 5, "num_steps": 2, "guidance_scale": 2.0, "num_frames": case.video.num_frames,
        "height": case.video.height, "width": case.video.width, "fps": case.video.fps,
        "max_sequence_length": case.text_tokens, "batch_size": 2, **case.options,
    }  # fmt: skip
    return GenerationSettings(**{**settings, **changes})


def jobs_of(settings: GenerationSettings) -> list[Job]:
    """The settings' jobs, with images where the model takes them."""
    return plan(settings, read_records(settings, find_model(settings).policy.media))


def pipeline_of(settings: GenerationSettings) -> Any:
    """The loaded pipeline on the CPU."""
    return load_pipeline(find_model(settings), settings, CPU)


def videos(settings: GenerationSettings, pipeline: Any = None, jobs: list[Job] | None = None) -> Tensor:
    """Videos of all jobs or of the given ones, by the settings' pipeline or the given one."""
    policy = find_model(settings).policy
    pipeline, jobs = pipeline or pipeline_of(settings), jobs_of(settings) if jobs is None else jobs
    return torch.stack([frames for frames, _ in sample(pipeline, policy, jobs, settings, resolve(settings, policy))])
