"""How are videos made with a finished policy? By diffusers' own pipeline and its shipped scheduler, into mp4 files.

    OUTPUT/00003-01.mp4      sample 1 of prompt 3 (both from 0, prompts in the file's order)
    OUTPUT/generation.json   {"complete", "settings", "videos": [{"prompt", "id", "seed", "sample", "file"}]}

Initial latents are keyed by (seed, prompt id, sample): how videos are batched, and what was made before, changes none.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from diffusers import DiffusionPipeline
from tqdm import tqdm

from bpgo_video.config import ConfigError, VideoConfig
from bpgo_video.data.atomic import write_json
from bpgo_video.data.fingerprint import fingerprint
from bpgo_video.data.prompt_files import PromptFileError, read_prompts
from bpgo_video.data.prompt_plan import make_plan
from bpgo_video.data.prompt_records import PromptRecord
from bpgo_video.data.video import VideoError, read_pyav, write_video
from bpgo_video.generation_settings import DTYPES, CallSettings, GenerationError, GenerationSettings, resolve
from bpgo_video.policies import Policy
from bpgo_video.randomness import keyed_noise
from bpgo_video.types import Latents, Videos

MANIFEST = "generation.json"


@dataclass(frozen=True)
class Job:
    """One video to make: sample `sample` of `prompt`, into `file`."""

    prompt: PromptRecord
    seed: int
    sample: int
    file: Path

    @property
    def latents_key(self) -> tuple[int | str, ...]:
        return (self.seed, "generation", self.prompt.id, self.sample)


def generate(settings: GenerationSettings) -> Path:
    """Make every video that is not there yet; the path of the manifest.

    Raises:
        FileNotFoundError, ConfigError: no such model folder, or a family that is not known.
        PromptFileError: the prompt file is missing, empty, or has a line that is no prompt.
        GenerationError: a size that the policy cannot make, adapters that do not fit, or an output folder that holds
            videos of other settings.
    """
    make_plan([settings.prompts])
    policy, call = resolve(settings)
    jobs = plan(settings)
    record = describe(settings, policy, call)
    manifest = settings.output / MANIFEST
    check_manifest(manifest, record)
    video = VideoConfig(num_frames=call.num_frames, height=call.height, width=call.width, fps=settings.fps)
    todo = [job for job in jobs if not is_complete(job.file, video)]
    write_manifest(manifest, record, jobs, todo)
    if todo:
        pipeline = load_pipeline(policy.folder, settings)
        with tqdm(total=len(jobs), initial=len(jobs) - len(todo), desc="Videos", unit="video") as bar:
            for start in range(0, len(todo), settings.batch_size):
                batch = todo[start : start + settings.batch_size]
                videos = sample(pipeline, batch, policy.latent_shape(video), call, settings.negative_prompt)
                for job, frames in zip(batch, videos, strict=True):
                    write_video(job.file, frames, settings.fps)
                    bar.update()
    write_manifest(manifest, record, jobs, todo=())
    return manifest


def plan(settings: GenerationSettings) -> list[Job]:
    """Every video of the generation, samples of one prompt side by side."""
    return [
        Job(line.record, settings.seed, sample, settings.output / f"{number:05d}-{sample:02d}.mp4")
        for number, line in enumerate(read_prompts([settings.prompts]))
        for sample in range(settings.samples_per_prompt)
    ]


def describe(settings: GenerationSettings, policy: Policy, call: CallSettings) -> dict[str, Any]:
    """All that the videos depend on; plain JSON data."""
    parts = [path.name for path in policy.folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    lora = settings.lora and hashlib.sha256(settings.lora.read_bytes()).hexdigest()[:16]
    return {
        "policy_fingerprint": fingerprint(policy.folder, parts),
        "lora_sha256": lora,
        "prompts_sha256": hashlib.sha256(settings.prompts.read_bytes()).hexdigest()[:16],
        "seed": settings.seed,
        "negative_prompt": settings.negative_prompt,
        "samples_per_prompt": settings.samples_per_prompt,
        "fps": settings.fps,
        "dtype": settings.dtype,
        **asdict(call),
    }


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
        }
        for job in jobs
        if job.file not in missing
    ]
    write_json(path, {"complete": not todo, "settings": dict(settings), "videos": videos})


def is_complete(file: Path, video: VideoConfig) -> bool:
    """Whether a file holds a whole video of this size."""
    if not file.is_file():
        return False
    try:
        frames, _ = read_pyav(file)
    except VideoError:
        return False
    return frames.shape == (video.num_frames, video.height, video.width, 3)


def load_pipeline(folder: Path, settings: GenerationSettings) -> Any:
    """diffusers' pipeline of the folder's own class, adapters loaded, on the accelerator where there is one.

    Raises:
        GenerationError: the adapters fit no layer.
    """
    dtypes = {"default": DTYPES[settings.dtype], "vae": torch.float32}
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtypes)
    if settings.lora is not None:
        try:
            pipeline.load_lora_weights(str(settings.lora.parent), weight_name=settings.lora.name)
        except ValueError as error:
            raise GenerationError(f"{settings.lora}: {error}") from error
        if not pipeline.get_list_adapters():
            raise GenerationError(f"{settings.lora} has no adapter for a layer of {folder}; is it of this model?")
    pipeline.set_progress_bar_config(leave=False, disable=None)  # per denoising step, on a terminal alone
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def initial_latents(jobs: Sequence[Job], shape: tuple[int, int, int, int]) -> Latents:
    """Standard normal noise of each video, fp32, the same in any batch."""
    return keyed_noise(shape, [job.latents_key for job in jobs], "cpu")


def sample(
    pipeline: Any, jobs: Sequence[Job], shape: tuple[int, int, int, int], call: CallSettings, negative_prompt: str
) -> Videos:
    """Videos in [0, 1] of the jobs, in one batch through the pipeline."""
    output = pipeline(
        prompt=[job.prompt.prompt for job in jobs],
        negative_prompt=[negative_prompt] * len(jobs),
        latents=initial_latents(jobs, shape),
        output_type="pt",
        **asdict(call),
    )
    return output.frames.float().clamp(0, 1).cpu()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of pipelines/generate_video.py; 0 only when every video is there."""
    try:
        manifest = generate(tyro.cli(GenerationSettings, args=arguments))
    except (GenerationError, ConfigError, PromptFileError, OSError) as error:  # wrong input; else keep the traceback
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(manifest)
    return 0
