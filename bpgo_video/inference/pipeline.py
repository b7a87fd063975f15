"""The diffusers pipeline of a generation: the arguments of its call, its scheduler, its weights, and its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch

from bpgo_video.config.bpgo import VideoConfig
from bpgo_video.config.generation import GenerationError, GenerationSettings
from bpgo_video.inference.model_files import load_lora
from bpgo_video.inference.run_weights import DTYPES, WEIGHTS, Model, load_trained
from bpgo_video.policies import Policy
from bpgo_video.policies.attention_backends import check_backend, choose_attention
from bpgo_video.policies.networks import Transformers, component_of, networks_of, split_vae_work
from bpgo_video.policies.schedule import at_levels
from bpgo_video.rollouts.rules import guidance_rules
from bpgo_video.weights import WeightsError, load_network, read_json

Schedulers = dict[str, Callable[[Any, float], Any]]  # name -> scheduler of (the pipeline's scheduler config, shift)


def _multistep(kind: Any, own: Any, shift: float) -> Any:
    return kind(
        num_train_timesteps=own.num_train_timesteps,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
    )


FLOW: Schedulers = {
    "unipc": partial(_multistep, diffusers.UniPCMultistepScheduler),
    "dpm": partial(_multistep, diffusers.DPMSolverMultistepScheduler),
    "euler": lambda own, shift: diffusers.FlowMatchEulerDiscreteScheduler(own.num_train_timesteps, shift=shift),
    "lcm": lambda own, shift: diffusers.FlowMatchLCMScheduler(own.num_train_timesteps, shift=shift),
}
V_PREDICTION: Schedulers = {  # CogVideoX; without a shift
    "ddim": lambda own, _: diffusers.CogVideoXDDIMScheduler.from_config(own),
    "dpm": lambda own, _: diffusers.CogVideoXDPMScheduler.from_config(own),
}
OFFLOADS: dict[str, Callable[[Any, torch.device], object]] = {
    "none": lambda pipeline, device: pipeline.to(device),
    "model": lambda pipeline, device: pipeline.enable_model_cpu_offload(device=device),
    "sequential": lambda pipeline, device: pipeline.enable_sequential_cpu_offload(device=device),
}


@contextmanager
def naming_flags() -> Iterator[None]:
    """Turn errors about a recipe's keys (`video.height`, `policy.vae_tiling`) into GenerationErrors about flags."""
    try:
        yield
    except ValueError as error:
        raise GenerationError(str(error).replace("policy.", "").replace("video.", "")) from error


@dataclass(frozen=True)
class CallSettings:
    """Arguments of the pipeline's call, with its defaults filled in, and the frame rate of the files."""

    num_inference_steps: int
    guidance_scale: float
    num_frames: int
    height: int
    width: int
    max_sequence_length: int
    guidance_scale_2: float | None
    fps: float

    def given(self) -> dict[str, Any]:
        """The arguments that are set, without fps: pipelines with one transformer take no guidance_scale_2."""
        return {name: value for name, value in asdict(self).items() if value is not None and name != "fps"}

    @property
    def video(self) -> VideoConfig:
        """Size and frame rate of each file."""
        return VideoConfig(self.num_frames, self.height, self.width, self.fps)


def resolve(settings: GenerationSettings, policy: Policy) -> CallSettings:
    """The call's arguments, checked against the policy.

    Raises:
        GenerationError: a size that the policy cannot make, adapters, a scheduler or an attention backend that it
            cannot use, or a value out of range.
    """
    defaults = policy.pipeline_defaults() | policy.call_defaults()
    defaults |= {"guidance_scale": defaults[policy.guidance_argument], "fps": policy.fps}
    if (limit := tokenizer_limit(policy.folder / policy.length_tokenizer)) is not None:
        defaults["max_sequence_length"] = min(defaults["max_sequence_length"], limit)
    given = asdict(settings) | {"num_inference_steps": len(settings.sigmas) or settings.num_steps}
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
    if policy.whole_timesteps and (settings.sigmas or settings.scheduler in ("euler", "lcm")):
        chosen = f"scheduler {settings.scheduler!r}" if settings.scheduler else "sigmas"
        raise GenerationError(
            f"{chosen} cannot be used: {policy.pipeline_name} passes whole timesteps, which diffusers' Euler and LCM "
            "schedulers do not take; leave it out, or write --scheduler unipc or dpm"
        )
    shipped = read_json(policy.folder / "model_index.json")["scheduler"][1]
    chosen_scheduler(settings, getattr(diffusers, shipped).from_pretrained(policy.folder / "scheduler"))
    with naming_flags():
        policy.latent_shape(call.video)
        check_backend(settings.attention_backend, trains=False)
    return call


def chosen_scheduler(settings: GenerationSettings, shipped: Any) -> Any:
    """The scheduler of the settings, or the pipeline's `shipped` one; its shift where none is set.

    Raises:
        GenerationError: a scheduler that does not fit the model, or a shift for one without.
    """
    if shipped.config.get("prediction_type") == "v_prediction":
        table = V_PREDICTION
    else:
        table = {} if shipped.config.get("invert_sigmas") else FLOW  # Mochi's time runs backwards
    name, shift, sigmas = settings.scheduler, settings.flow_shift, settings.sigmas
    if sigmas:
        check_sigmas(settings, table)
        return at_levels(table[name or "euler"](shipped.config, 1.0), sigmas)
    if shift is not None and table is not FLOW:
        raise GenerationError(f"flow_shift is {shift}, but this model's scheduler has none; remove --flow-shift")
    if shift is not None and name is None:
        raise GenerationError(f"flow_shift is {shift} without a scheduler; add --scheduler {' or '.join(table)}")
    if name is None:
        return shipped
    if name not in table:
        supported = ", ".join(table) or "only its own"
        raise GenerationError(f"scheduler is {name!r}, but this model supports {supported}; change --scheduler")
    own_shift = shipped.config.get("flow_shift", shipped.config.get("shift", 1.0))
    return table[name](shipped.config, own_shift if shift is None else shift)


def check_sigmas(settings: GenerationSettings, table: Schedulers) -> None:
    """Check noise levels that are taken as they are.

    Args:
        table: the model's schedulers.

    Raises:
        GenerationError: they do not fall, the model has no flow, or another setting has other noise levels.
    """
    sigmas, name = settings.sigmas, settings.scheduler
    shown = " ".join(map(str, sigmas))
    if any(level <= following for level, following in pairwise(sigmas)):
        raise GenerationError(f"sigmas {shown} must fall from each step to the next; order them from noise to data")
    if table is not FLOW:
        raise GenerationError(f"sigmas are {shown}, but this model supports only its own noise levels; remove --sigmas")
    if name not in (None, "euler", "lcm"):
        raise GenerationError(f"sigmas are {shown}, and scheduler {name!r} takes none; write --scheduler euler or lcm")
    for flag, value in (("num_steps", settings.num_steps), ("flow_shift", settings.flow_shift)):
        if value is not None:
            raise GenerationError(f"sigmas {shown} state all noise levels, but {flag} is {value}; remove one of them")


def tokenizer_limit(folder: Path) -> int | None:
    """`model_max_length` of a tokenizer's folder; None if it states none."""
    file = folder / "tokenizer_config.json"
    limit = read_json(file).get("model_max_length") if file.is_file() else None
    return None if limit is None else int(limit)


def check_offload(offload: str, device: torch.device) -> None:
    """Check that there is a GPU for an offload.

    Raises:
        GenerationError: ranks compute on the CPU.
    """
    if offload != "none" and device.type == "cpu":
        raise GenerationError(f"offload is {offload!r}, but this machine has no GPU; remove --offload")


def load_pipeline(model: Model, settings: GenerationSettings, device: torch.device) -> Any:
    """The diffusers pipeline of the model's family, with the checkpoint's weights and the adapters.

    Raises:
        WeightsError: the folder does not hold its networks' weights; see `load_network`.
        GenerationError: the adapters fit no layer, or the model does not support a memory setting.
    """
    dtype, policy = DTYPES[settings.dtype], model.policy
    of_vae = dtype if policy.one_dtype else torch.float32
    networks = {
        name: load_network(kind, policy.folder / name, of_vae if component_of(name) == "vae" else dtype)
        for name, kind in networks_of(policy.folder).items()
    }
    pipeline = policy.assemble(policy.folder, networks)
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
        WeightsError: see `check_lora`.
        GenerationError: they fit no layer.
    """
    try:
        load_lora(pipeline, file, name)
    except WeightsError:
        raise
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
