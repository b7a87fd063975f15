"""Videos of a finished policy, by diffusers' own pipeline: each rank its own videos, into mp4 files.

Initial latents and further draws are keyed by (seed, prompt id, sample): how videos are dealt to ranks and batched, and
what was made before, changes none. A rank writes a video when it is made; what a killed rank leaves is continued by the
same command.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import diffusers
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from bpgo_video.data.media import decode_image, fit_image, write_video
from bpgo_video.distributed.agreement import all_or_none, from_all, same_everywhere
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.inference.loading import OFFLOADS, apply, check_offload, means_of
from bpgo_video.inference.lora_files import load_lora
from bpgo_video.inference.run_weights import DTYPES, WEIGHTS, put_into
from bpgo_video.inference.settings import (
    CallSettings,
    GenerationError,
    GenerationSettings,
    Model,
    chosen_scheduler,
    find_model,
    resolve,
    video_of,
)
from bpgo_video.inference.share import Reader, describe, plan, read_records
from bpgo_video.inference.video_files import (
    Job,
    Places,
    by_prompt,
    check_and_show,
    check_manifest,
    whole_video,
    within,
    write_manifest,
)
from bpgo_video.policies import Policy
from bpgo_video.randomness import FixedDraws, generator_of, keyed_noise
from bpgo_video.types import Latents, Videos

ALONE = Mesh(rank=0, world_size=1, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
PATIENCE = timedelta(days=1)  # that a rank waits for the slowest one's videos; a rank that dies is noticed at once


def generate(
    settings: GenerationSettings, mesh: Mesh = ALONE, read: Reader | None = None, places: Places | None = None
) -> Path:
    """Make every video that is not there yet, and check all of them; the path of the manifest. Every rank calls it.

    Args:
        read: reads the prompts; `read_records` where it is None.
        places: of the files; all in `settings.output` where it is None.

    Raises:
        FileNotFoundError, ConfigError: no such model folder, a family that is not known, or an error of another rank.
        CheckpointError: a training checkpoint that cannot be used.
        PromptFileError, ShardError: the prompts are missing, empty or damaged.
        GenerationError: a size that the policy cannot make, adapters or memory settings that do not fit, an output
            folder that holds videos of other settings, or a video that is not whole after all.
    """
    places = places or within(settings.output)
    with all_or_none(mesh):
        model = find_model(settings)
        prompts = (read or read_records)(settings, model.policy.takes_images)
        call = resolve(settings, model.policy)
        record = describe(settings, model, call, prompts)
        check_manifest(places, record)
        check_offload(settings.offload, mesh.device)
    same_everywhere({"generation settings": repr(record), "output folder": str(settings.output.absolute())}, mesh)
    jobs = plan(settings, prompts, places)
    video = video_of(settings, call, model.policy)
    mine = [job for job in mesh.dealt(jobs) if whole_video(job.file, video) is None]
    todo = sorted(chain(*from_all(mine, mesh)), key=lambda job: (job.number, job.sample))
    if mesh.is_main:
        write_manifest(places.manifest, record, jobs, todo)
    with all_or_none(mesh):
        make(mesh.dealt(todo), settings, model, call, mesh)
    with all_or_none(mesh):
        for group in mesh.dealt(by_prompt(jobs)):
            if damaged := list(check_and_show(group, video)):
                raise GenerationError(f"{damaged[0].file} was written and is not a whole video; start again")
    if mesh.is_main:
        write_manifest(places.manifest, record, jobs, todo=())
    return places.manifest


def make(jobs: Sequence[Job], settings: GenerationSettings, model: Model, call: CallSettings, mesh: Mesh) -> None:
    """This rank's videos, batch by batch; each is written when its batch is done."""
    if not jobs:
        return
    pipeline, video = load_pipeline(model, settings, mesh.device), video_of(settings, call, model.policy)
    with tqdm(total=len(jobs), desc="Videos", unit="video", disable=not mesh.is_main) as bar:
        for start in range(0, len(jobs), settings.batch_size):
            batch = jobs[start : start + settings.batch_size]
            videos = sample(pipeline, model.policy, batch, settings, call)
            for job, frames in zip(batch, videos, strict=True):
                write_video(job.file, frames, video.fps)
                bar.update()


def load_pipeline(model: Model, settings: GenerationSettings, device: torch.device) -> Any:
    """diffusers' pipeline of the folder's own class, with the checkpoint's weights and the adapters in it.

    Raises:
        GenerationError: the adapters fit no layer, or the model cannot decode or attend as it is asked to.
    """
    dtype = DTYPES[settings.dtype]
    pipeline_class = getattr(diffusers, model.policy.pipeline_name)
    of_vae = dtype if model.policy.one_dtype else torch.float32
    pipeline = pipeline_class.from_pretrained(model.policy.folder, dtype={"default": dtype, "vae": of_vae})
    pipeline.scheduler = chosen_scheduler(settings, pipeline.scheduler)
    if model.checkpoint is not None:
        weights = WEIGHTS[settings.weights](model.checkpoint.folder)
        for name in model.checkpoint.trained:
            put_into(getattr(pipeline, name), model.checkpoint, name, weights, dtype)
    for name, file in settings.adapters.items():
        add_adapters(pipeline, file, name, model.policy.folder)
    pipeline.set_progress_bar_config(leave=False, disable=None)  # per denoising step, on a terminal alone
    apply(means_of(settings, model), pipeline, model)
    OFFLOADS[settings.offload](pipeline, device)
    return pipeline


def add_adapters(pipeline: Any, file: Path, name: str, folder: Path) -> None:
    """Adapters of a file on top of the pipeline's transformer `name`.

    Raises:
        GenerationError: they fit no layer.
    """
    try:
        load_lora(pipeline, file, name)
    except ValueError as error:
        raise GenerationError(f"{file}: {error}") from error
    if not hasattr(getattr(pipeline, name), "peft_config"):
        raise GenerationError(f"{file} has no adapter for a layer of {folder / name}; is it of this model?")


def initial_latents(jobs: Sequence[Job], shape: tuple[int, int, int, int]) -> Latents:
    """Standard normal noise of each video, fp32, the same in any batch."""
    return keyed_noise(shape, [job.latents_key for job in jobs], "cpu")


def sample(
    pipeline: Any, policy: Policy, jobs: Sequence[Job], settings: GenerationSettings, call: CallSettings
) -> Videos:
    """Videos in [0, 1] of the jobs, in one batch through the pipeline; some take one text a call, or one image."""
    if len(jobs) > 1 and (jobs[0].prompt.media or policy.one_text_a_call):
        return torch.cat([sample(pipeline, policy, [job], settings, call) for job in jobs])
    images = first_frame(jobs[0], call)[None] if jobs[0].prompt.media else None
    video = video_of(settings, call, policy)
    latents = initial_latents(jobs, policy.latent_shape(video))
    arguments = policy.take_settings(pipeline, call.given())
    arguments["generator"] = [generator_of(*job.latents_key, "pipeline") for job in jobs]  # of noise within the steps
    arguments |= policy.call_arguments(pipeline, latents, video, images)
    if images is not None:
        arguments["image"] = to_picture(images[0])
    with FixedDraws():
        output = pipeline(
            prompt=[job.text for job in jobs],
            negative_prompt=[job.negative_prompt(settings.negative_prompt) for job in jobs],
            output_type="pt",
            **arguments,
        )
    return output.frames.float().clamp(0, 1).cpu()


def first_frame(job: Job, call: CallSettings) -> Float[Tensor, "3 height width"]:
    """The job's image in [0, 1], fitted to the video as training fits it."""
    pixels = decode_image(job.prompt.media["image"].data, f"prompt {job.prompt.prompt!r}")
    return fit_image(pixels, call.height, call.width)


def to_picture(image: Float[Tensor, "3 height width"]) -> Image.Image:
    """What the pipelines take."""
    return Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
