"""How does a policy's answer to a suite become a folder that VBench reads? Generation under VBench's names.

DIR/{prompt}-{i}.mp4        H.264, yuv420p, the true frames a second; nothing else is in the folder
DIR.generation.json         settings, fingerprints of the weights; prompt, generation prompt, seed and sample of each
DIR.sheets/00003.jpg        five frames of each sample of prompt 3

The noise of a video is a function of the seed, the prompt and i alone: no video is drawn again for being bad.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from bpgo_video.data.media import read_media
from bpgo_video.data.prompt_files import prompt_id
from bpgo_video.data.prompt_records import PromptRecord
from bpgo_video.data.video import VideoError, VideoHeader, check_video, read_header
from bpgo_video.evaluation.vbench_suite import Suite, SuiteError, folder_problems, foreign_problems, image_path, listing
from bpgo_video.generation import ALONE, Reader, generate
from bpgo_video.generation_files import MANIFEST, TOLD, Places, clear_unfinished
from bpgo_video.generation_settings import GenerationSettings
from bpgo_video.parallel.agreement import same_verdict
from bpgo_video.parallel.mesh import Mesh

ENCODING = {"codec": "h264", "pixel format": "yuv420p"}
MEASURES = ("fps", "frames", "size", *ENCODING)


def lay_out(
    settings: GenerationSettings,
    suite: Suite,
    mesh: Mesh = ALONE,
    images: Path | None = None,
    told: Mapping[str, str] | None = None,
) -> Path:
    """Make every video of the suite that is not there yet; the path of the manifest. Every rank calls it.

    Args:
        settings: `output` is the folder of the videos, `prompts` the suite's source, `samples_per_prompt` the suite's.
        images: folder of what image-to-video continues, for suites that name images by themselves.
        told: what the model is told in place of each prompt.

    Raises:
        SuiteError: the folder holds other files; an image or a generation prompt is missing.
        GenerationError and others: see `generate`.
    """
    places = places_of(settings.output)
    with same_verdict(mesh):
        if mesh.is_main and places.videos.is_dir():
            clear_unfinished(places)
            if wrong := foreign_problems(places.videos, suite):
                raise SuiteError(f"{places.videos} is no folder of this suite alone:{listing(wrong)}")
    manifest = generate(settings, mesh, reader_of(suite, images, told), places)
    with same_verdict(mesh):
        if mesh.is_main and (wrong := folder_problems(places.videos, suite)):
            raise SuiteError(f"{places.videos} is not what VBench reads:{listing(wrong)}")
    return manifest


def places_of(folder: Path) -> Places:
    """The videos in the folder, the rest beside it."""
    videos = Path(os.path.abspath(folder))
    return Places(
        videos,
        lambda record, _, sample: f"{record.prompt}-{sample}.mp4",
        videos.with_name(f"{videos.name}.{MANIFEST}"),
        videos.with_name(f"{videos.name}.sheets"),
    )


def reader_of(suite: Suite, images: Path | None, told: Mapping[str, str] | None) -> Reader:
    """Reads the suite's prompts for a generation, with their images where the model continues images."""
    image = cache(lambda path: read_media("image", path))  # VBench-I2V asks seven camera motions of one image

    def read(_: GenerationSettings, with_images: bool) -> list[PromptRecord]:
        return [
            PromptRecord(
                prompt_id(prompt.text),
                prompt.text,
                media={"image": image(image_path(prompt, images))} if with_images else {},
                info={} if told is None else {TOLD: told[prompt.text]},
            )
            for prompt in suite.prompts
        ]

    return read


def read_told(path: Path, suite: Suite) -> dict[str, str]:
    """What the model is told in place of each prompt: a .jsonl file, {"prompt", "generation_prompt"} a line.

    Raises:
        SuiteError: a line of another form, a prompt that the suite lacks or that comes twice, or one without a line.
    """
    told: dict[str, str] = {}
    wanted = {prompt.text for prompt in suite.prompts}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            prompt, text = entry["prompt"], entry[TOLD]
        except (ValueError, TypeError, KeyError) as error:
            raise SuiteError(f'{path}:{number} must be {{"prompt": ..., "{TOLD}": ...}}: {error!r}') from error
        if prompt not in wanted or prompt in told:
            problem = "is there twice" if prompt in told else f"is no prompt of {suite.source}"
            raise SuiteError(f"{path}:{number}: {prompt!r} {problem}")
        told[prompt] = str(text)
    if lacking := sorted(wanted - told.keys()):
        raise SuiteError(f"{path} has no {TOLD} for:{listing(map(repr, lacking))}")
    return told


def layout_problems(folder: Path, suite: Suite, fps: float | None = None) -> list[str]:
    """Everything that keeps VBench from scoring the folder as it should; every video is decoded.

    Args:
        fps: that the videos must have; None: that of the manifest beside the folder, or of most videos.

    Raises:
        SuiteError: there is no such folder.
    """
    found = folder_problems(folder, suite)
    headers = {}
    for name in suite.names():
        if (folder / name).is_file():
            try:
                headers[name] = _whole(folder / name)
            except VideoError as error:
                found.append(str(error))
    return found + header_problems(headers, fps or written_fps(folder))


def header_problems(headers: Mapping[str, VideoHeader], fps: float | None) -> list[str]:
    """Videos of another encoding than VBench's, or of another rate or size than the rest.

    Args:
        headers: by the file's name.
        fps: that all must have; None: what most have.
    """
    if not headers:
        return []
    expected = dict(ENCODING) if fps is None else {**ENCODING, "fps": f"{fps:.4g}"}
    told = {name: _as_text(header) for name, header in headers.items()}
    usual = {what: Counter(video[what] for video in told.values()).most_common(1)[0][0] for what in MEASURES}
    usual |= expected
    return [
        f"{name!r} has {what} {video[what]} where {usual[what]} is expected"
        for name, video in told.items()
        for what in MEASURES
        if video[what] != usual[what]
    ]


def _as_text(header: VideoHeader) -> dict[str, str]:
    return {
        "fps": f"{header.fps:.4g}",
        "frames": str(header.frames),
        "size": f"{header.width}x{header.height}",
        "codec": header.codec,
        "pixel format": header.pixel_format,
    }


def _whole(path: Path) -> VideoHeader:
    header = read_header(path)
    if (count := check_video(str(path), str(path))) < header.frames:
        raise VideoError(f"{path} holds {count} of {header.frames} frames; is it complete?")
    return header


def written_fps(folder: Path) -> float | None:
    """Frames a second of the generation whose manifest lies beside the folder; None where there is none."""
    manifest = places_of(folder).manifest
    return float(json.loads(manifest.read_text("utf-8"))["settings"]["fps"]) if manifest.is_file() else None
