"""What can be asked of a generation? Its flags, and the pipeline's own values where a flag is left out."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import diffusers
from pydantic import Field
from pydantic.dataclasses import dataclass as checked_dataclass

from bpgo_video.config.bpgo import STRICT, Positive, VideoConfig, options_of
from bpgo_video.config.fields import NonNegative, Unit
from bpgo_video.inference.run_weights import Source, find_source, holds_checkpoint
from bpgo_video.policies import Policy, load_policy
from bpgo_video.rollouts.rules import guidance_rules


def _multistep(kind: Any, own: Any, shift: float) -> Any:
    return kind(
        num_train_timesteps=own.num_train_timesteps,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
    )


Schedulers = dict[str, Callable[[Any, float], Any]]  # name -> scheduler of (the shipped one's config, flow shift)

FLOW: Schedulers = {
    "unipc": partial(_multistep, diffusers.UniPCMultistepScheduler),
    "dpm": partial(_multistep, diffusers.DPMSolverMultistepScheduler),
    "euler": lambda own, shift: diffusers.FlowMatchEulerDiscreteScheduler(own.num_train_timesteps, shift=shift),
}
V_PREDICTION: Schedulers = {  # CogVideoX; there is no shift
    "ddim": lambda own, _: diffusers.CogVideoXDDIMScheduler.from_config(own),
    "dpm": lambda own, _: diffusers.CogVideoXDPMScheduler.from_config(own),
}


class GenerationError(ValueError):
    """Settings, or an output folder, with which nothing can be generated; the message says what to change."""


@checked_dataclass(frozen=True, config=STRICT)
class GenerationSettings:
    """Generate videos with a policy: prompts in, mp4 files and a manifest out. What exists already is skipped."""

    policy: str
    """A diffusers pipeline, such as a run's export: local folder, hub id, or `package:module/folder`. Or a training
    checkpoint, RUN/checkpoints/step-XXXXXX, or a RUN for its newest: its weights in the pipeline it started from."""
    prompts: Path
    """.txt, one prompt a line; .jsonl, {"prompt", "negative_prompt"?, "id"?, "split"?, "tags"?} a line; .csv, the
    same as columns; VBench's .json; or a folder of prompt shards."""
    output: Path
    """Folder for the videos; a generation of the same settings that was cut short there is continued."""
    seed: int
    """The initial latents of a video are a function of this, its prompt's id and its sample number."""
    family: str | None = None
    """As policy.family in recipes; None takes what the folder says, or the run of a training checkpoint."""
    lora: Path | None = None
    """Adapters to load on top, a .safetensors file in a layout that diffusers reads; of two experts, for high noise."""
    lora_2: Path | None = None
    """Adapters for the low-noise expert, transformer_2 (Wan 2.2)."""
    weights: Literal["raw", "ema"] = "raw"
    """Of a training checkpoint: raw, as the optimiser holds them, or their average, where the run kept one."""
    split: str | None = None
    """Of prompt shards; None takes all."""
    negative_prompt: str = ""
    """What guidance steers away from, for prompts that have no negative prompt of their own."""
    num_steps: Positive | None = None
    """Denoising steps; None takes the pipeline's own default (50 for Wan), as for guidance_scale, num_frames, height
    and width."""
    guidance_scale: float | None = None
    """Classifier-free guidance; 1 switches it off. HunyuanVideo's pipeline names it true_cfg_scale."""
    guidance_scale_2: float | None = None
    """Of the low-noise expert (Wan 2.2); None takes guidance_scale."""
    embedded_guidance: NonNegative | None = None
    """HunyuanVideo: what its distilled transformer is told, guidance_scale to its pipeline. None takes, as for
    decode_timestep and decode_noise_scale, what a training checkpoint's recipe says, or the pipeline's own."""
    decode_timestep: Unit | None = None
    """LTX-Video from 0.9.1 on: the noise level at which its VAE decodes."""
    decode_noise_scale: Unit | None = None
    """LTX-Video: how much noise is added for it."""
    num_frames: Positive | None = None
    """Frames of a video."""
    height: Positive | None = None
    """Pixels."""
    width: Positive | None = None
    """Pixels."""
    max_sequence_length: Positive | None = None
    """Text tokens, as in training; None takes the tokenizer's own limit where that is below the pipeline's."""
    scheduler: Literal["unipc", "dpm", "euler", "ddim"] | None = None
    """Solver: unipc, dpm, euler of a flow; ddim, dpm of CogVideoX. None takes the pipeline's own, as for flow_shift."""
    flow_shift: Annotated[float, Field(gt=0.0)] | None = None
    """Where a flow's steps lie: larger ones lie nearer to noise. Wan's authors: 3 for 480 lines, 5 for 720."""
    fps: Annotated[float, Field(gt=0.0)] | None = None
    """Frames a second of the files; None takes what the model's authors train on (16 for Wan)."""
    samples_per_prompt: Positive = 1
    """Videos of each prompt."""
    batch_size: Positive = 1
    """Videos made at once; changes the time and memory that they take, and nothing else."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of transformer and text encoder; the VAE stays in fp32, but where a pipeline runs in one dtype."""
    vae_tiling: bool | None = None
    """Decode in overlapping tiles: a fraction of the memory, longer, and pixels above a tile's size differ a little.
    None takes what a training checkpoint's recipe says, or False, as for vae_slicing."""
    vae_slicing: bool | None = None
    """Decode one video of a batch at a time: the memory of one."""
    attention_backend: str | None = None
    """How attention is computed, by diffusers' names (native, _native_cudnn, flash, sage ...). None takes what a
    training checkpoint's recipe says, or diffusers' choice, torch's scaled_dot_product_attention."""
    offload: Literal["none", "model", "sequential"] = "none"
    """What is not at work rests in the host's memory. model: one network at a time is on the GPU, and the largest
    has to fit (14B in bf16: 28 GB); sequential: one layer at a time, all weights are moved in every step."""

    @property
    def adapters(self) -> dict[str, Path]:
        """The files of adapters by the transformer that they are for."""
        files = {"transformer": self.lora, "transformer_2": self.lora_2}
        return {name: file for name, file in files.items() if file is not None}


@dataclass(frozen=True)
class CallSettings:
    """The pipeline's own arguments, its defaults filled in."""

    num_inference_steps: int
    guidance_scale: float
    num_frames: int
    height: int
    width: int
    max_sequence_length: int
    guidance_scale_2: float | None = None

    def given(self) -> dict[str, Any]:
        """Those that are set: a pipeline of one transformer knows no guidance_scale_2."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Model:
    """The model that generates.

    Attributes:
        policy: its description, no weights.
        checkpoint: whose weights take the place of the pipeline's own.
    """

    policy: Policy
    checkpoint: Source | None


def find_model(settings: GenerationSettings) -> Model:
    """The pipeline folder or the training checkpoint that `settings.policy` names; see `named_model`.

    Raises:
        GenerationError: other weights than the only ones of a finished model are asked for.
    """
    model = named_model(settings.policy, settings.family, options_of(settings))
    if model.checkpoint is None and settings.weights != "raw":
        raise GenerationError(
            f"weights is {settings.weights!r}, but {settings.policy} is no training checkpoint or run"
        )
    return model


def named_model(policy: str, family: str | None = None, options: Mapping[str, float] | None = None) -> Model:
    """A pipeline folder, a training checkpoint, or a run for its newest one.

    Args:
        family: see `policies.family`; None takes the run's own, or what the folder says.
        options: settings of the family's own, instead of those of the checkpoint's run.

    Raises:
        FileNotFoundError, ConfigError, CheckpointError: there is none, or it cannot be used.
    """
    path = Path(policy).expanduser()
    checkpoint = find_source(path) if path.is_dir() and holds_checkpoint(path) else None
    folder = policy if checkpoint is None else str(checkpoint.base)
    name = family or (checkpoint.config.policy.family if checkpoint else None)
    own = (checkpoint.config.policy.options if checkpoint else {}) | dict(options or {})
    return Model(load_policy(folder, max_sequence_length=1, components=(), name=name, options=own), checkpoint)


def video_of(settings: GenerationSettings, call: CallSettings, policy: Policy) -> VideoConfig:
    """What each file holds."""
    fps = policy.fps if settings.fps is None else settings.fps
    return VideoConfig(num_frames=call.num_frames, height=call.height, width=call.width, fps=fps)


def resolve(settings: GenerationSettings, policy: Policy) -> CallSettings:
    """The call's settings, checked against the policy.

    Raises:
        GenerationError: a size that the policy cannot make, a scheduler that it cannot use, or a value out of range.
    """
    given = asdict(settings) | {"num_inference_steps": settings.num_steps}
    defaults = pipeline_defaults(policy.pipeline_name)
    defaults |= policy.call_defaults()
    defaults["guidance_scale"] = defaults[policy.guidance_argument]
    limit = tokenizer_limit(policy.folder)
    if limit is not None:
        defaults["max_sequence_length"] = min(defaults["max_sequence_length"], limit)
    names = [field.name for field in fields(CallSettings)]
    values: dict[str, Any] = {name: defaults.get(name) if given[name] is None else given[name] for name in names}
    call = CallSettings(**values)
    if call.guidance_scale < 1:
        raise GenerationError(f"guidance_scale is {call.guidance_scale}; it must be 1 or more, 1 switches it off")
    for message in guidance_rules("", call.guidance_scale, call.guidance_scale_2, policy.transformer_names):
        raise GenerationError(message)
    for name, file in settings.adapters.items():
        if name not in policy.transformer_names:
            raise GenerationError(f"lora_2 is {str(file)!r}, but {policy.folder} has no {name}; give --lora alone")
        if not (file.is_file() and file.suffix == ".safetensors"):
            raise GenerationError(f"lora {str(file)!r} is not a .safetensors file that exists")
    chosen_scheduler(settings, shipped_scheduler(policy.folder))
    try:
        policy.latent_shape(video_of(settings, call, policy))
    except ValueError as error:
        raise GenerationError(str(error).replace("video.", "")) from None
    return call


def chosen_scheduler(settings: GenerationSettings, own: Any) -> Any:
    """The scheduler that is asked for; the pipeline's `own` where nothing is said, and its shift where none is.

    Raises:
        GenerationError: a scheduler that is not for this model, or a shift for one that has none.
    """
    table = schedulers_like(own)
    if settings.flow_shift is not None and table is not FLOW:
        raise GenerationError(f"flow_shift is {settings.flow_shift}, but this model's scheduler has none: leave it out")
    if settings.scheduler is None and settings.flow_shift is not None:
        raise GenerationError(f"flow_shift is {settings.flow_shift}; say for which --scheduler: {sorted(table)}")
    if settings.scheduler is None:
        return own
    if settings.scheduler not in table:
        raise GenerationError(
            f"scheduler is {settings.scheduler!r}; this model can use {sorted(table) or 'its own alone'}"
        )
    shift = own.config.get("flow_shift", own.config.get("shift", 1.0))
    return table[settings.scheduler](own.config, shift if settings.flow_shift is None else settings.flow_shift)


def schedulers_like(own: Any) -> Schedulers:
    """The solvers of the models that ship such a scheduler; none where time runs the other way (Mochi)."""
    if own.config.get("prediction_type") == "v_prediction":
        return V_PREDICTION
    return {} if own.config.get("invert_sigmas") else FLOW


def shipped_scheduler(folder: Path) -> Any:
    """The scheduler of a pipeline folder."""
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    return getattr(diffusers, index["scheduler"][1]).from_pretrained(folder / "scheduler")


def pipeline_defaults(class_name: str) -> dict[str, Any]:
    """What a diffusers pipeline's call takes where it is told nothing."""
    parameters = inspect.signature(getattr(diffusers, class_name).__call__).parameters
    return {name: parameter.default for name, parameter in parameters.items()}


def tokenizer_limit(folder: Path) -> int | None:
    """`model_max_length` of the folder's tokenizer; None where it states none."""
    file = folder / "tokenizer" / "tokenizer_config.json"
    limit = json.loads(file.read_text("utf-8")).get("model_max_length") if file.is_file() else None
    return None if limit is None else int(limit)
