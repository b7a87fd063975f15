"""What a generation runs: its settings, completed with the recipe of a run and with the pipeline's defaults."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers

from bpgo_video.config.bpgo import VideoConfig, options_of
from bpgo_video.inference.run_weights import Checkpoint, find_checkpoint, holds_checkpoint
from bpgo_video.inference.settings import GenerationError, GenerationSettings
from bpgo_video.policies import Policy, load_policy
from bpgo_video.policies.execution import check_backend
from bpgo_video.rollouts.rules import guidance_rules

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
}
V_PREDICTION: Schedulers = {  # CogVideoX; without a shift
    "ddim": lambda own, _: diffusers.CogVideoXDDIMScheduler.from_config(own),
    "dpm": lambda own, _: diffusers.CogVideoXDPMScheduler.from_config(own),
}
FROM_RECIPE = {  # setting -> section of a run's recipe with its default
    **dict.fromkeys(("num_frames", "height", "width", "fps"), "video"),
    **dict.fromkeys(("vae_tiling", "vae_slicing", "attention_backend"), "policy"),
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


@dataclass(frozen=True)
class Model:
    """A model for generation.

    Attributes:
        policy: of the pipeline folder, no networks loaded.
        checkpoint: its weights replace the pipeline's; None for a pipeline folder alone.
    """

    policy: Policy
    checkpoint: Checkpoint | None

    def complete(self, settings: GenerationSettings) -> GenerationSettings:
        """The settings, with values of a run's recipe in place of None."""
        if self.checkpoint is None:
            return settings
        recipe = self.checkpoint.config
        missing = {name: section for name, section in FROM_RECIPE.items() if getattr(settings, name) is None}
        return replace(settings, **{name: getattr(getattr(recipe, key), name) for name, key in missing.items()})


def find_model(settings: GenerationSettings) -> Model:
    """The pipeline folder or the training checkpoint that `settings.policy` names; see `named_model`.

    Raises:
        GenerationError: averaged weights of a model that is no checkpoint.
    """
    model = named_model(settings.policy, settings.family, options_of(settings))
    if model.checkpoint is None and settings.weights != "raw":
        raise GenerationError(
            f"weights is {settings.weights!r}, but {settings.policy} is no training checkpoint or run; remove --weights"
        )
    return model


def named_model(policy: str, family: str | None = None, options: Mapping[str, float] | None = None) -> Model:
    """A pipeline folder, a training checkpoint, or the newest one of a run.

    Args:
        family: see `policies.family`; None takes the run's, or what the folder says.
        options: the family's own settings; they replace those of the run.

    Raises:
        FileNotFoundError, ConfigError, CheckpointError: there is no such model, or it cannot be used.
    """
    path = Path(policy).expanduser()
    checkpoint = find_checkpoint(path) if path.is_dir() and holds_checkpoint(path) else None
    folder, recipe = (str(checkpoint.base), checkpoint.config.policy) if checkpoint else (policy, None)
    values = (recipe.options if recipe else {}) | dict(options or {})
    name = family or (recipe.family if recipe else None)
    return Model(load_policy(folder, max_sequence_length=1, components=(), name=name, options=values), checkpoint)


def resolve(settings: GenerationSettings, policy: Policy) -> CallSettings:
    """The call's arguments, checked against the policy.

    Raises:
        GenerationError: a size that the policy cannot make, adapters, a scheduler or an attention backend that it
            cannot use, or a value out of range.
    """
    parameters = inspect.signature(getattr(diffusers, policy.pipeline_name).__call__).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()} | policy.call_defaults()
    defaults |= {"guidance_scale": defaults[policy.guidance_argument], "fps": policy.fps}
    if (limit := tokenizer_limit(policy.folder)) is not None:
        defaults["max_sequence_length"] = min(defaults["max_sequence_length"], limit)
    given = asdict(settings) | {"num_inference_steps": settings.num_steps}
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
    shipped = json.loads((policy.folder / "model_index.json").read_text("utf-8"))["scheduler"][1]
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
    name, shift = settings.scheduler, settings.flow_shift
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


def tokenizer_limit(folder: Path) -> int | None:
    """`model_max_length` of the folder's tokenizer; None if it states none."""
    file = folder / "tokenizer" / "tokenizer_config.json"
    limit = json.loads(file.read_text("utf-8")).get("model_max_length") if file.is_file() else None
    return None if limit is None else int(limit)
