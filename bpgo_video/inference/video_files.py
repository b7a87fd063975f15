"""Files of a generation: videos, contact sheets, and a manifest of both.

OUTPUT/00003-01.mp4        sample 1 of prompt 3; prompts and samples count from 0
OUTPUT/sheets/00003.jpg    five frames of each sample of prompt 3, one sample per row
OUTPUT/generation.json     {"complete", "settings", "videos": [{"prompt", "generation_prompt"?, "negative_prompt"?,
                           "id", "seed", "sample", "file"}]}

Other programs' layouts have other `OutputPaths`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from bpgo_video.config.bpgo import VideoConfig
from bpgo_video.data.contact_sheets import joined, strip
from bpgo_video.data.media import VideoError, read_media, read_video
from bpgo_video.data.prompt_files import read_prompts
from bpgo_video.data.reader import PromptShards
from bpgo_video.data.records import PromptRecord
from bpgo_video.files import atomic_file, write_json
from bpgo_video.inference.settings import GenerationError, GenerationSettings

MANIFEST = "generation.json"
GENERATION_PROMPT = "generation_prompt"  # key of a prompt's info: the text for the model, if it is not the prompt

Reader = Callable[[GenerationSettings, bool], list[PromptRecord]]  # (settings, with images) -> prompts


@dataclass(frozen=True)
class OutputPaths:
    """OutputPaths of a generation's files.

    Attributes:
        videos: folder of the videos.
        name: file name of a video, given its prompt, the prompt's number and the sample's number.
        manifest: the manifest file.
        sheets: folder of the contact sheets.
    """

    videos: Path
    name: Callable[[PromptRecord, int, int], str]
    manifest: Path
    sheets: Path

    @classmethod
    def within(cls, output: Path) -> OutputPaths:
        """All files in one folder, videos by number."""

        def name(prompt: PromptRecord, number: int, sample: int) -> str:
            return f"{number:05d}-{sample:02d}.mp4"

        return cls(output, name, output / MANIFEST, output / "sheets")


@dataclass(frozen=True)
class Job:
    """A video to make, `file`: sample `sample` of the `number`-th prompt, whose contact sheet is `sheet`."""

    prompt: PromptRecord
    number: int
    seed: int
    sample: int
    file: Path
    sheet: Path

    @property
    def text(self) -> str:
        """The text for the model."""
        return str(self.prompt.info.get(GENERATION_PROMPT, self.prompt.prompt))

    def negative_prompt(self, default: str) -> str:
        """The prompt's own, or the default."""
        return default if self.prompt.negative_prompt is None else self.prompt.negative_prompt

    @property
    def latents_key(self) -> tuple[int | str, ...]:
        return (self.seed, "generation", self.prompt.id, self.sample)


def read_records(settings: GenerationSettings, with_images: bool = False) -> list[PromptRecord]:
    """The prompts of a file or of shards, without embeddings; with their images for image-to-video.

    Raises:
        GenerationError: a prompt lacks its image, or a split is named without shards.
    """
    if settings.prompts.is_dir():
        pairs = ((record, record.media) for record in PromptShards(settings.prompts).records(settings.split))
    elif settings.split is not None:
        raise GenerationError(
            f"split is {settings.split!r}, but {settings.prompts} is no folder of prompt shards; remove --split"
        )
    else:
        lines = read_prompts([settings.prompts])
        pairs = ((line.record, {kind: read_media(kind, path) for kind, path in line.media.items()}) for line in lines)
    records = []
    for record, media in pairs:
        if with_images and "image" not in media:
            raise GenerationError(
                f"the model makes videos of images, but prompt {record.prompt!r} has none; add 'image' to it"
            )
        image = {"image": media["image"]} if with_images else {}
        records.append(replace(record, conditioning={}, negative={}, clip={}, media=image))
    return records


def plan(settings: GenerationSettings, prompts: Sequence[PromptRecord], paths: OutputPaths | None = None) -> list[Job]:
    """Every video of the generation, the samples of a prompt in a row; all in `settings.output` without `paths`."""
    paths = paths or OutputPaths.within(settings.output)
    return [
        Job(
            prompt,
            number,
            settings.seed,
            sample,
            file=paths.videos / paths.name(prompt, number, sample),
            sheet=paths.sheets / f"{number:05d}.jpg",
        )
        for number, prompt in enumerate(prompts)
        for sample in range(settings.samples_per_prompt)
    ]


def whole_video(file: Path, video: VideoConfig) -> Float[Tensor, "frames 3 height width"] | None:
    """The frames in `file`; None if it does not hold a whole video of this size."""
    if not file.is_file():
        return None
    try:
        frames, _ = read_video(file)
    except VideoError:
        return None
    return frames if frames.shape == (video.num_frames, 3, video.height, video.width) else None


def check_and_show(jobs: Sequence[Job], video: VideoConfig) -> list[Job]:
    """Read the finished videos of a prompt and write its contact sheet; returns the videos that are not whole."""
    strips, damaged = [], []
    for job in jobs:
        if (frames := whole_video(job.file, video)) is None:
            damaged.append(job)
        else:
            strips.append(strip(frames))
    if not damaged:
        with atomic_file(jobs[0].sheet) as aside:
            joined(strips, below=True).save(aside, format="jpeg", quality=85)
    return damaged


def check_manifest(paths: OutputPaths, settings: Mapping[str, Any]) -> None:
    """Check that the output holds videos of the same settings, or none.

    Raises:
        GenerationError: it holds videos of other settings, which the message names, or of unknown ones.
    """
    manifest, folder = paths.manifest, paths.videos
    if not manifest.is_file():
        if list(folder.glob("*.mp4")):
            raise GenerationError(f"{folder} holds videos, but no {manifest.name}; name another --output")
        return
    try:
        earlier = json.loads(manifest.read_text("utf-8"))["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise GenerationError(
            f"{manifest} is damaged ({error!r}); name another --output, or delete the folder"
        ) from error
    changes = [
        f"{name} {earlier.get(name)!r} (now {settings[name]!r})"
        for name in sorted(settings)
        if earlier.get(name) != settings[name]
    ]
    if changes:
        raise GenerationError(
            f"{folder} holds videos of other settings: {', '.join(changes)}; repeat them, or name another --output"
        )


def clear_unfinished(paths: OutputPaths) -> None:
    """Remove the unfinished files of a killed generation, for layouts that hold nothing but videos."""
    for path in paths.videos.glob(".*.mp4.partial-*"):
        path.unlink()


def write_manifest(path: Path, settings: Mapping[str, Any], jobs: Sequence[Job], todo: Sequence[Job]) -> None:
    """Write the manifest of the existing videos, `jobs` without `todo`."""
    missing = {job.file for job in todo}
    videos = [
        {
            "prompt": job.prompt.prompt,
            **({GENERATION_PROMPT: job.text} if GENERATION_PROMPT in job.prompt.info else {}),
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
