"""What does a generation leave, and is all of it there? Videos, contact sheets and the manifest of both.

OUTPUT/00003-01.mp4        sample 1 of prompt 3 (both from 0, prompts in their order)
OUTPUT/sheets/00003.jpg    five frames of each sample of prompt 3, one sample a row
OUTPUT/generation.json     {"complete", "settings", "videos": [{"prompt", "generation_prompt"?, "negative_prompt"?,
                           "id", "seed", "sample", "file"}]}

That is where a generation's own files lie; another layout has other `Places`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from bpgo_video.atomic import atomic_file, write_json
from bpgo_video.config.bpgo import VideoConfig
from bpgo_video.data.media import VideoError, read_video
from bpgo_video.data.records import PromptRecord
from bpgo_video.inference.contact_sheets import stacked, strip
from bpgo_video.inference.settings import GenerationError

MANIFEST = "generation.json"
SHEETS = "sheets"
TOLD = "generation_prompt"  # in a prompt's info: what the model is told in its place


@dataclass(frozen=True)
class Places:
    """Where the files of a generation lie.

    Attributes:
        videos: their folder.
        name: of a prompt, its number and a sample's number: the name of the video.
        manifest: the file.
        sheets: folder of the contact sheets.
    """

    videos: Path
    name: Callable[[PromptRecord, int, int], str]
    manifest: Path
    sheets: Path


def within(output: Path) -> Places:
    """Everything in one folder, videos by number."""
    return Places(
        output, lambda _, number, sample: f"{number:05d}-{sample:02d}.mp4", output / MANIFEST, output / SHEETS
    )


@dataclass(frozen=True)
class Job:
    """One video to make: sample `sample` of `prompt`, the `number`-th, into `file`; shown on the prompt's `sheet`."""

    prompt: PromptRecord
    number: int
    seed: int
    sample: int
    file: Path
    sheet: Path

    @property
    def text(self) -> str:
        """What the model is told."""
        return str(self.prompt.info.get(TOLD, self.prompt.prompt))

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
        with atomic_file(jobs[0].sheet) as aside:
            stacked(strips).save(aside, format="jpeg", quality=85)


def check_manifest(places: Places, settings: Mapping[str, Any]) -> None:
    """Whether these places may be written to.

    Raises:
        GenerationError: it holds videos of other settings (names them), or of nobody knows which.
    """
    path, folder = places.manifest, places.videos
    if not path.is_file():
        if list(folder.glob("*.mp4")):
            raise GenerationError(f"{folder} holds videos, and there is no {path.name}; name another --output")
        return
    try:
        earlier = json.loads(path.read_text("utf-8"))["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise GenerationError(f"{path} is damaged ({error!r}); name another --output, or delete the folder") from error
    names = sorted(name for name in settings if earlier.get(name) != settings[name])
    if names:
        changes = ", ".join(f"{name} {earlier.get(name)!r} (now {settings[name]!r})" for name in names)
        raise GenerationError(
            f"{folder} was generated with other settings: {changes}; use the same ones, or name another --output"
        )


def clear_unfinished(places: Places) -> None:
    """Remove what a killed generation was writing: a layout holds videos alone."""
    for path in places.videos.glob(".*.mp4.partial-*"):
        path.unlink()


def write_manifest(path: Path, settings: Mapping[str, Any], jobs: Sequence[Job], todo: Sequence[Job]) -> None:
    """The manifest of the videos that are there: `jobs` without `todo`."""
    missing = {job.file for job in todo}
    videos = [
        {
            "prompt": job.prompt.prompt,
            **({TOLD: job.text} if TOLD in job.prompt.info else {}),
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
