"""What does a generation leave, and is all of it there? Videos, contact sheets and the manifest of both.

OUTPUT/00003-01.mp4        sample 1 of prompt 3 (both from 0, prompts in their order)
OUTPUT/sheets/00003.jpg    five frames of each sample of prompt 3, one sample a row
OUTPUT/generation.json     {"complete", "settings", "videos": [{"prompt", "negative_prompt"?, "id", "seed", "sample",
                           "file"}]}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from bpgo_video.config import VideoConfig
from bpgo_video.contact_sheets import stacked, strip
from bpgo_video.data.atomic import atomic_file, write_json
from bpgo_video.data.prompt_records import PromptRecord
from bpgo_video.data.video import VideoError, read_video
from bpgo_video.generation_settings import GenerationError

MANIFEST = "generation.json"
SHEETS = "sheets"


@dataclass(frozen=True)
class Job:
    """One video to make: sample `sample` of `prompt`, the `number`-th, into `file`."""

    prompt: PromptRecord
    number: int
    seed: int
    sample: int
    file: Path

    def negative_prompt(self, default: str) -> str:
        """The prompt's own, or the default."""
        return default if self.prompt.negative_prompt is None else self.prompt.negative_prompt

    @property
    def latents_key(self) -> tuple[int | str, ...]:
        return (self.seed, "generation", self.prompt.id, self.sample)


def whole_video(file: Path, video: VideoConfig) -> Float[Tensor, "frames 3 height width"] | None:
    """The frames in `file`; None where it does not hold a whole video of this size."""
    if not file.is_file():
        return None
    try:
        frames, _ = read_video(file)
    except VideoError:
        return None
    return frames if frames.shape == (video.num_frames, 3, video.height, video.width) else None


def by_prompt(jobs: Sequence[Job]) -> list[list[Job]]:
    """The videos of each prompt."""
    return [list(group) for _, group in groupby(jobs, key=lambda job: job.number)]


def sheet_path(job: Job) -> Path:
    """The contact sheet of a video's prompt."""
    return job.file.parent / SHEETS / f"{job.number:05d}.jpg"


def check_and_show(jobs: Sequence[Job], video: VideoConfig) -> Iterator[Job]:
    """Read one prompt's finished videos and write its contact sheet; yields the videos that are not whole."""
    strips = []
    for job in jobs:
        frames = whole_video(job.file, video)
        if frames is None:
            yield job
        else:
            strips.append(strip(frames))
    if len(strips) == len(jobs):
        with atomic_file(sheet_path(jobs[0])) as aside:
            stacked(strips).save(aside, format="jpeg", quality=85)


def check_manifest(path: Path, settings: Mapping[str, Any]) -> None:
    """Whether the folder of the manifest `path` may be written to.

    Raises:
        GenerationError: it holds videos of other settings (names them), or of nobody knows which.
    """
    if not path.is_file():
        if list(path.parent.glob("*.mp4")):
            raise GenerationError(f"{path.parent} holds videos and no {MANIFEST}; name another --output")
        return
    try:
        earlier = json.loads(path.read_text("utf-8"))["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise GenerationError(f"{path} is damaged ({error!r}); name another --output, or delete the folder") from error
    names = sorted(name for name in settings if earlier.get(name) != settings[name])
    if names:
        changes = ", ".join(f"{name} {earlier.get(name)!r} (now {settings[name]!r})" for name in names)
        raise GenerationError(
            f"{path.parent} was generated with other settings: {changes}; use the same ones, or name another --output"
        )


def write_manifest(path: Path, settings: Mapping[str, Any], jobs: Sequence[Job], todo: Sequence[Job]) -> None:
    """The manifest of the videos that are there: `jobs` without `todo`."""
    missing = {job.file for job in todo}
    videos = [
        {
            "prompt": job.prompt.prompt,
            "id": job.prompt.id,
            "seed": job.seed,
            "sample": job.sample,
            "file": job.file.name,
            **({} if job.prompt.negative_prompt is None else {"negative_prompt": job.prompt.negative_prompt}),
        }
        for job in jobs
        if job.file not in missing
    ]
    write_json(path, {"complete": not todo, "settings": dict(settings), "videos": videos})
