"""Generation of videos with diffusers' own pipelines: each rank makes its share and writes mp4 files.

OUTPUT/00003-01.mp4        sample 1 of prompt 3, .png if it has one frame; prompts and samples count from 0
OUTPUT/sheets/00003.jpg    five frames of each sample of prompt 3, one sample per row
OUTPUT/generation.json     {"complete", "settings", "videos": [{"prompt", "generation_prompt"?, "negative_prompt"?,
                           "id", "seed", "sample", "file"}]}

Other programs' layouts have other `OutputPaths`. Initial latents and all further draws are keyed by (seed, prompt id,
sample). A video therefore does not depend on the number of ranks, on batches, or on the videos that exist. The same
command continues an interrupted generation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchLCMScheduler
from jaxtyping import Float
from more_itertools import chunked
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from bpgo_video.config.bpgo import VideoConfig
from bpgo_video.config.generation import GenerationError, GenerationSettings
from bpgo_video.data.clips import read_clip
from bpgo_video.data.media import (
    ImageError,
    VideoError,
    as_bytes,
    decode_image,
    fit_image,
    joined,
    read_media,
    read_video,
    strip,
    write_video,
)
from bpgo_video.data.prompt_plan import read_prompts
from bpgo_video.data.reader import PromptShards
from bpgo_video.data.records import PromptRecord
from bpgo_video.distributed.mesh import Mesh, all_or_none, from_all, same_everywhere
from bpgo_video.files import atomic_file, fingerprint, write_json
from bpgo_video.inference.pipeline import CallSettings, check_offload, load_pipeline, resolve
from bpgo_video.inference.run_weights import Model, find_model
from bpgo_video.policies import Policy
from bpgo_video.randomness import FixedDraws, generator_of, keyed_noise
from bpgo_video.types import Audio, Latents

ALONE = Mesh(rank=0, world_size=1, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
PATIENCE = timedelta(days=1)  # longest wait for the videos of the slowest rank; a dead rank is noticed at once
MANIFEST = "generation.json"
KINDS = ("mp4", "png")  # of files: videos, and images of one frame
GENERATION_PROMPT = "generation_prompt"  # key of a prompt's info: the text for the model, if it is not the prompt

Reader = Callable[[GenerationSettings, Sequence[str]], list[PromptRecord]]  # (settings, kinds of files) -> prompts


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
    def within(cls, output: Path, kind: str = "mp4") -> OutputPaths:
        """All files in one folder, videos by number."""
        return cls(
            output, lambda _, number, sample: f"{number:05d}-{sample:02d}.{kind}", output / MANIFEST, output / "sheets"
        )


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


def read_records(settings: GenerationSettings, needed: Sequence[str] = ()) -> list[PromptRecord]:
    """The prompts of a file or of shards, without embeddings; with their images or videos, if the model needs them.

    Args:
        needed: kinds of files, "image" and "video".

    Raises:
        GenerationError: a prompt lacks a file of these kinds, or a split is named without shards.
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
        for kind in needed:
            if kind not in media:
                raise GenerationError(
                    f"the model needs the {kind} of each prompt, but {record.prompt!r} has none; add {kind!r} to it"
                )
        files = {kind: media[kind] for kind in needed}
        records.append(replace(record, conditioning={}, negative={}, clip={}, media=files))
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
        frames = decode_image(file.read_bytes(), str(file))[None] if file.suffix == ".png" else read_video(file)[0]
    except (ImageError, VideoError):
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
    if not any(any(folder.glob(f"*.{kind}")) for kind in KINDS):
        return
    if not manifest.is_file():
        raise GenerationError(f"{folder} holds videos, but no {manifest.name}; name another --output")
    try:
        earlier = json.loads(manifest.read_text("utf-8"))["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise GenerationError(
            f"{manifest} is damaged ({error!r}); name another --output, or delete the folder"
        ) from error
    now = sorted(settings.items())
    if changes := [f"{key} {earlier.get(key)!r} (now {value!r})" for key, value in now if earlier.get(key) != value]:
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


def generate(
    settings: GenerationSettings, mesh: Mesh = ALONE, read: Reader = read_records, paths: OutputPaths | None = None
) -> Path:
    """Make every missing video and check all; returns the path of the manifest. Every rank calls it.

    Args:
        read: reads the prompts.
        paths: places of the files; None puts all into `settings.output`.

    Raises:
        FileNotFoundError, ConfigError: no such model folder, an unknown family, or an error of another rank.
        CheckpointError: a training checkpoint that cannot be used.
        PromptFileError, ShardError: the prompts are missing, empty or damaged.
        GenerationError: a size that the policy cannot make, adapters or memory settings that do not fit, an output
            folder with videos of other settings, or a video that is damaged after it was written.
    """
    with all_or_none(mesh):
        model = find_model(settings, mesh.rank, mesh.world_size)
        settings = model.complete(settings)
        prompts = read(settings, model.policy.media)
        call = resolve(settings, model.policy)
        silent_image = call.num_frames == 1 and not model.policy.makes_audio
        paths = paths or OutputPaths.within(settings.output, "png" if silent_image else "mp4")
        record = describe(settings, model, call, prompts)
        check_manifest(paths, record)
        check_offload(settings.offload, mesh.device)
    same_everywhere({"generation settings": repr(record), "output folder": str(settings.output.absolute())}, mesh)
    jobs = plan(settings, prompts, paths)
    missing = [job for job in mesh.round_robin(jobs) if whole_video(job.file, call.video) is None]
    todo = sorted(chain(*from_all(missing, mesh)), key=lambda job: (job.number, job.sample))
    if mesh.is_main:
        write_manifest(paths.manifest, record, jobs, todo)
    with all_or_none(mesh):
        make(mesh.round_robin(todo), settings, model, call, mesh)
    of_prompts = [list(group) for _, group in groupby(jobs, key=lambda job: job.number)]
    with all_or_none(mesh):
        for group in mesh.round_robin(of_prompts):
            if damaged := check_and_show(group, call.video):
                raise GenerationError(f"{damaged[0].file} was written, but is not a whole video; repeat the command")
    if mesh.is_main:
        write_manifest(paths.manifest, record, jobs, todo=())
    return paths.manifest


def describe(
    settings: GenerationSettings, model: Model, call: CallSettings, records: Sequence[PromptRecord]
) -> dict[str, Any]:
    """Everything that the videos depend on, as JSON data."""
    folder, checkpoint = model.policy.folder, model.checkpoint
    parts = [path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    prompts = settings.prompts / "index.json" if settings.prompts.is_dir() else settings.prompts
    files = b"".join(file.data for record in records for file in record.media.values())
    adapters = {name: short_hash(file.read_bytes()) for name, file in settings.adapters.items()}
    texts = {str(one.id): one.info[GENERATION_PROMPT] for one in records if GENERATION_PROMPT in one.info}
    own = ("split", "seed", "negative_prompt", "samples_per_prompt", "scheduler", "flow_shift", "family", "dtype")
    return {
        "policy_fingerprint": fingerprint(folder, parts),
        "checkpoint_fingerprint": checkpoint and fingerprint(checkpoint.folder.parent, (checkpoint.folder.name,)),
        "weights": checkpoint and settings.weights,
        "lora_sha256": adapters.get("transformer"),
        "lora_2_sha256": adapters.get("transformer_2"),
        "prompts_sha256": short_hash(prompts.read_bytes()),
        "generation_prompts_sha256": short_hash(json.dumps(texts).encode()) if texts else None,
        "images_sha256": short_hash(files) if model.policy.media else None,
        **{name: getattr(settings, name) for name in own},
        "sigmas": list(settings.sigmas) or None,
        "vae_tiling": bool(settings.vae_tiling),
        "attention_backend": settings.attention_backend,
        **asdict(call),
        **model.policy.options,
    }


def short_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def make(jobs: Sequence[Job], settings: GenerationSettings, model: Model, call: CallSettings, mesh: Mesh) -> None:
    """Make this rank's videos batch by batch, and write each batch when it is done."""
    if not jobs:
        return
    pipeline = load_pipeline(model, settings, mesh.device)
    with tqdm(total=len(jobs), desc="Videos", unit="video", disable=not mesh.is_main) as bar:
        for batch in chunked(jobs, settings.batch_size):
            videos = sample(pipeline, model.policy, batch, settings, call)
            for job, (frames, audio) in zip(batch, videos, strict=True):
                if job.file.suffix == ".png":
                    write_image(job.file, frames[0])
                else:
                    write_video(job.file, frames, call.fps, audio=audio)
                bar.update()


def write_image(file: Path, image: Float[Tensor, "3 height width"]) -> None:
    """Write an image in [0, 1] as png, without loss. The file appears complete or not at all."""
    with atomic_file(file) as aside:
        Image.fromarray(as_bytes(image[None])[0]).save(aside, format="png")


def initial_latents(jobs: Sequence[Job], shape: tuple[int, int, int, int]) -> Latents:
    """Standard normal noise of each video, fp32, the same in any batch."""
    return keyed_noise(shape, [job.latents_key for job in jobs], "cpu")


def sample(
    pipeline: Any, policy: Policy, jobs: Sequence[Job], settings: GenerationSettings, call: CallSettings
) -> list[tuple[Float[Tensor, "frames 3 height width"], Audio | None]]:
    """The jobs' videos in [0, 1] and their sound, if any.

    They are made in one call of the pipeline, or in one call each where it takes one text or image.
    """
    if len(jobs) > 1 and (jobs[0].prompt.media or policy.one_text_a_call or policy.one_video_a_call):
        return [made for job in jobs for made in sample(pipeline, policy, [job], settings, call)]
    media = jobs[0].prompt.media
    images = first_frame(jobs[0], call)[None] if "image" in media else None
    latents = initial_latents(jobs, policy.latent_shape(call.video))
    generators = [generator_of(*job.latents_key, "pipeline") for job in jobs]  # for noise of the steps
    of_jobs: dict[str, Any] = {
        "prompt": [job.text for job in jobs],
        "negative_prompt": [job.negative_prompt(settings.negative_prompt) for job in jobs],
        "generator": generators,
    }
    if policy.one_video_a_call:
        of_jobs = {name: values[0] for name, values in of_jobs.items()}
    arguments = {**of_jobs, **policy.take_settings(pipeline, call.given())}
    if isinstance(pipeline.scheduler, FlowMatchLCMScheduler):  # pipelines of flows do not pass generators on
        kind: Any = type(pipeline.scheduler)
        pipeline.scheduler.step = partial(kind.step, pipeline.scheduler, generator=generators)  # type: ignore[attr-defined]
    arguments |= policy.call_arguments(pipeline, latents, call.video, images)
    if images is not None:
        arguments[policy.image_argument] = Image.fromarray(as_bytes(images)[0])
    if "video" in media:
        frames = read_clip(media["video"].data, 0.0, call.video, f"the video of prompt {jobs[0].prompt.prompt!r}")
        arguments["video"] = [Image.fromarray(frame) for frame in as_bytes(frames)]
    with FixedDraws():
        output = pipeline(output_type="pt", **arguments)
    audio = policy.audio_of(pipeline, output)
    sounds = [None if audio is None else audio[row : row + 1] for row in range(len(jobs))]
    return list(zip(policy.videos_of(output).float().clamp(0, 1).cpu(), sounds, strict=True))


def first_frame(job: Job, call: CallSettings) -> Float[Tensor, "3 height width"]:
    """The job's image in [0, 1], fitted to the video's size as in training."""
    pixels = decode_image(job.prompt.media["image"].data, f"prompt {job.prompt.prompt!r}")
    return fit_image(pixels, call.height, call.width)
