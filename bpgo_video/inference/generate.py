"""Generation of videos with diffusers' own pipelines: each rank makes its share and writes mp4 files.

Initial latents and all further draws are keyed by (seed, prompt id, sample). A video therefore does not depend on the
number of ranks, on batches, or on the videos that exist. The same command continues an interrupted generation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import diffusers
import torch
from jaxtyping import Float
from more_itertools import chunked
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from bpgo_video.data.fingerprint import fingerprint
from bpgo_video.data.media import as_bytes, decode_image, fit_image, write_video
from bpgo_video.data.records import PromptRecord
from bpgo_video.distributed.mesh import Mesh, all_or_none, from_all, same_everywhere
from bpgo_video.inference.model_call import CallSettings, Model, chosen_scheduler, find_model, naming_flags, resolve
from bpgo_video.inference.model_files import load_lora
from bpgo_video.inference.run_weights import DTYPES, WEIGHTS, load_trained
from bpgo_video.inference.settings import GenerationError, GenerationSettings
from bpgo_video.inference.video_files import (
    GENERATION_PROMPT,
    Job,
    OutputPaths,
    Reader,
    check_and_show,
    check_manifest,
    plan,
    read_records,
    whole_video,
    write_manifest,
)
from bpgo_video.policies import Policy
from bpgo_video.policies.execution import choose_attention, split_vae_work
from bpgo_video.policies.networks import Transformers
from bpgo_video.randomness import FixedDraws, generator_of, keyed_noise
from bpgo_video.types import Latents, Videos

ALONE = Mesh(rank=0, world_size=1, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
PATIENCE = timedelta(days=1)  # longest wait for the videos of the slowest rank; a dead rank is noticed at once
OFFLOADS: dict[str, Callable[[Any, torch.device], object]] = {
    "none": lambda pipeline, device: pipeline.to(device),
    "model": lambda pipeline, device: pipeline.enable_model_cpu_offload(device=device),
    "sequential": lambda pipeline, device: pipeline.enable_sequential_cpu_offload(device=device),
}


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
    paths = paths or OutputPaths.within(settings.output)
    with all_or_none(mesh):
        model = find_model(settings)
        settings = model.complete(settings)
        prompts = read(settings, model.policy.takes_images)
        call = resolve(settings, model.policy)
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
    images = b"".join(file.data for record in records for file in record.media.values())
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
        "images_sha256": short_hash(images) if model.policy.takes_images else None,
        **{name: getattr(settings, name) for name in own},
        "vae_tiling": bool(settings.vae_tiling),
        "attention_backend": settings.attention_backend,
        **asdict(call),
        **model.policy.options,
    }


def short_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def check_offload(offload: str, device: torch.device) -> None:
    """Check that there is a GPU for an offload.

    Raises:
        GenerationError: ranks compute on the CPU.
    """
    if offload != "none" and device.type == "cpu":
        raise GenerationError(f"offload is {offload!r}, but this machine has no GPU; remove --offload")


def make(jobs: Sequence[Job], settings: GenerationSettings, model: Model, call: CallSettings, mesh: Mesh) -> None:
    """Make this rank's videos batch by batch, and write each batch when it is done."""
    if not jobs:
        return
    pipeline = load_pipeline(model, settings, mesh.device)
    with tqdm(total=len(jobs), desc="Videos", unit="video", disable=not mesh.is_main) as bar:
        for batch in chunked(jobs, settings.batch_size):
            videos = sample(pipeline, model.policy, batch, settings, call)
            for job, frames in zip(batch, videos, strict=True):
                write_video(job.file, frames, call.fps)
                bar.update()


def load_pipeline(model: Model, settings: GenerationSettings, device: torch.device) -> Any:
    """The diffusers pipeline of the model's family, with the checkpoint's weights and the adapters.

    Raises:
        GenerationError: the adapters fit no layer, or the model does not support a memory setting.
    """
    dtype, policy = DTYPES[settings.dtype], model.policy
    dtypes = {"default": dtype, "vae": dtype if policy.one_dtype else torch.float32}
    pipeline = getattr(diffusers, policy.pipeline_name).from_pretrained(policy.folder, dtype=dtypes)
    pipeline.scheduler = chosen_scheduler(settings, pipeline.scheduler)
    if model.checkpoint is not None:
        weights = WEIGHTS[settings.weights](model.checkpoint.folder)
        for name in model.checkpoint.trained:
            load_trained(getattr(pipeline, name), model.checkpoint, name, weights, dtype)
    for name, file in settings.adapters.items():
        add_adapters(pipeline, file, name, policy.folder)
    pipeline.set_progress_bar_config(leave=False, disable=None)  # denoising steps, on a terminal only
    save_memory(pipeline, settings, policy)
    OFFLOADS[settings.offload](pipeline, device)
    return pipeline


def add_adapters(pipeline: Any, file: Path, name: str, folder: Path) -> None:
    """Load the adapters of a file into the pipeline's transformer `name`.

    Raises:
        GenerationError: they fit no layer.
    """
    try:
        load_lora(pipeline, file, name)
    except ValueError as error:
        raise GenerationError(f"{file}: {error}") from error
    if not hasattr(getattr(pipeline, name), "peft_config"):
        raise GenerationError(f"{file} has no adapter for a layer of {folder / name}; give adapters of this model")


def save_memory(pipeline: Any, settings: GenerationSettings, policy: Policy) -> None:
    """Apply vae_tiling, vae_slicing and attention_backend.

    Raises:
        GenerationError: the VAE does not support it, or the backend is not installed or not for this transformer.
    """
    transformers = Transformers({name: getattr(pipeline, name) for name in policy.transformer_names})
    with naming_flags():
        split_vae_work(pipeline.vae, tiling=bool(settings.vae_tiling), slicing=bool(settings.vae_slicing))
        choose_attention(transformers, settings.attention_backend, policy.sequence_plan, trains=False)


def initial_latents(jobs: Sequence[Job], shape: tuple[int, int, int, int]) -> Latents:
    """Standard normal noise of each video, fp32, the same in any batch."""
    return keyed_noise(shape, [job.latents_key for job in jobs], "cpu")


def sample(
    pipeline: Any, policy: Policy, jobs: Sequence[Job], settings: GenerationSettings, call: CallSettings
) -> Videos:
    """Videos in [0, 1] of the jobs in one call of the pipeline, or one call each where it takes one text or image."""
    if len(jobs) > 1 and (jobs[0].prompt.media or policy.one_text_a_call):
        return torch.cat([sample(pipeline, policy, [job], settings, call) for job in jobs])
    images = first_frame(jobs[0], call)[None] if jobs[0].prompt.media else None
    latents = initial_latents(jobs, policy.latent_shape(call.video))
    arguments = policy.take_settings(pipeline, call.given())
    arguments["generator"] = [generator_of(*job.latents_key, "pipeline") for job in jobs]  # for noise of the steps
    arguments |= policy.call_arguments(pipeline, latents, call.video, images)
    if images is not None:
        arguments["image"] = Image.fromarray(as_bytes(images)[0])
    with FixedDraws():
        output = pipeline(
            prompt=[job.text for job in jobs],
            negative_prompt=[job.negative_prompt(settings.negative_prompt) for job in jobs],
            output_type="pt",
            **arguments,
        )
    return output.frames.float().clamp(0, 1).cpu()


def first_frame(job: Job, call: CallSettings) -> Float[Tensor, "3 height width"]:
    """The job's image in [0, 1], fitted to the video's size as in training."""
    pixels = decode_image(job.prompt.media["image"].data, f"prompt {job.prompt.prompt!r}")
    return fit_image(pixels, call.height, call.width)
