"""What do all families share that diffusers has a pipeline for? How parts are loaded, and the plain way to do each job.

A family says what differs: its blocks' names, its text embeddings, its schedule, its forward and its latents.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import diffusers
import torch
from jaxtyping import Float
from torch import Tensor, nn

from bpgo_video.config.bpgo import ConfigError, VideoConfig
from bpgo_video.policies.base import Build
from bpgo_video.policies.sequence import SequencePlan
from bpgo_video.policies.transformers import Transformers, read_index, transformer_names
from bpgo_video.types import Conditioning, Latents, Videos

LIBRARIES = {"diffusers": "torch_dtype", "transformers": "dtype"}  # of a pipeline's networks: what each calls the dtype
COMPONENTS = ("transformer", "text_encoder", "image_encoder", "vae")


class PipelinePolicy:
    """A diffusers pipeline's parts. Text encoders and VAE may be absent where they are not needed.

    Attributes:
        pipeline_name: diffusers' class; looked up late, since importing a pipeline that is not used may print warnings.
        block_names: class names of the transformer's repeated blocks.
        fps: frames a second that the family's authors train on.
        given_frames: latent frames that the image fixes and the policy does not sample.
        texts_see_images: the text encoder reads a prompt together with the image.
        padding_frames: latent frames that are sampled in front, and that the video does not show.
        one_dtype: diffusers' pipeline hands latents from network to network without a cast.
        one_text_a_call: diffusers' pipeline pads the texts of a call to one length and does not mask it.
        options: settings that are the family's own, of the class with its pipeline's values.
        guidance_argument: what the pipeline's call names classifier-free guidance.
        sequence_plan: where the transformer parts its tokens; None takes the one of its class in `sequence.PLANS`.
        transformer_inputs: what the transformer takes in, as shapes; None takes the function of its class in
            `planning.inputs.INPUTS`.
    """

    pipeline_name: ClassVar[str]
    block_names: ClassVar[tuple[str, ...]]
    fps: float
    takes_images: ClassVar[bool] = False
    texts_see_images: ClassVar[bool] = False
    given_frames: ClassVar[int] = 0
    padding_frames: int = 0
    one_dtype: ClassVar[bool] = False
    one_text_a_call: ClassVar[bool] = False
    options: Mapping[str, float | None] = MappingProxyType({})
    guidance_argument: ClassVar[str] = "guidance_scale"
    sequence_plan: ClassVar[SequencePlan | None] = None
    transformer_inputs: ClassVar[Callable[[Mapping[str, Any], Any], dict[str, Any]] | None] = None

    def __init__(self, folder: Path, pipeline: Any, max_sequence_length: int):
        self.folder = folder
        self.pipeline = pipeline
        self.max_sequence_length = max_sequence_length
        self.transformer_names = transformer_names(folder)
        loaded = {name: getattr(pipeline, name) for name in self.transformer_names}
        self.transformers: Any = Transformers({name: module for name, module in loaded.items() if module is not None})
        networks = networks_of(folder)
        first = self.transformer_names[0]
        self.transformer_config = read_config(folder / first, networks[first])
        self.vae_config = read_config(folder / "vae", networks["vae"])

    @classmethod
    def load(
        cls,
        folder: Path,
        max_sequence_length: int,
        components: frozenset[str],
        dtype: torch.dtype,
        device: torch.device,
        build: Build,
    ) -> PipelinePolicy:
        """The networks of the folder whose kind is in `components`; see `load_policy`."""
        cls.check(folder)
        policy_class = cls.variant(folder)
        networks = networks_of(folder)
        parts: dict[str, nn.Module | None] = dict.fromkeys(networks)
        for name, model_class in networks.items():
            kind = kind_of(name)
            if kind not in components or not (folder / name).is_dir():
                continue
            if kind == "transformer":
                parts[name] = build(model_class, folder / name, dtype).to(device)
            else:
                parts[name] = frozen(model_class, folder / name, torch.float32 if kind == "vae" else dtype, device)
        return policy_class(folder, cls.assemble(folder, parts), max_sequence_length)

    @classmethod
    def assemble(cls, folder: Path, parts: Mapping[str, nn.Module | None]) -> Any:
        """diffusers' pipeline of the folder with these networks, None for those that are not loaded."""
        return getattr(diffusers, cls.pipeline_name).from_pretrained(folder, **parts)

    @classmethod
    def check(cls, folder: Path) -> None:
        """Whether the folder is one that the family knows how to sample.

        Raises:
            ConfigError: it is not; the message names what it has.
        """

    @classmethod
    def variant(cls, folder: Path) -> type[PipelinePolicy]:
        """The class for this folder, where one pipeline samples models of several kinds."""
        return cls

    def transformer_at(self, sigma: float) -> str:
        """Which transformer computes at a noise level."""
        return self.transformer_names[0]

    def image_conditioning(
        self, images: Float[Tensor, "prompts 3 height width"], video: VideoConfig
    ) -> dict[str, Tensor]:
        raise TypeError(f"{type(self).__name__} makes videos of texts alone")

    def encode_with_images(
        self, texts: Sequence[str], images: Float[Tensor, "prompts 3 height width"]
    ) -> dict[str, Tensor]:
        raise TypeError(f"{type(self).__name__} encodes texts alone")

    def start(self, noise: Latents, conditioning: Conditioning) -> Latents:
        """Where sampling begins: the noise itself."""
        return noise

    def encode_video(self, videos: Videos) -> Latents:
        raise TypeError(f"{type(self).__name__} does not encode videos, so that there is no warm start for it")

    def video_conditioning(self, video: VideoConfig) -> dict[str, Tensor]:
        """What of the video itself the transformer is told: nothing."""
        return {}

    def call_defaults(self) -> dict[str, int]:
        """Size, text tokens and guidance by default, where they are not what the pipeline's call says."""
        return {}

    def take_settings(self, pipeline: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Steps, size, guidance and text tokens as the call's arguments: guidance under the name that it has there."""
        others = dict(settings)
        return {self.guidance_argument: others.pop("guidance_scale"), **others}

    def call_arguments(
        self,
        pipeline: Any,
        latents: Latents,
        video: VideoConfig,
        images: Float[Tensor, "samples 3 height width"] | None,
    ) -> dict[str, Any]:
        """What the pipeline's call takes beside prompt, image, size and guidance: the initial noise in its layout."""
        return {"latents": latents}

    def check_size(self, video: VideoConfig, temporal: int, multiple: int) -> None:
        """Whether the VAE's and the patches' strides divide a video.

        Args:
            temporal: video frames in a latent frame, but the first.
            multiple: of height and width.

        Raises:
            ConfigError: names the nearest size that works.
        """
        if video.num_frames % temporal != 1 % temporal:
            raise ConfigError(
                f"video.num_frames is {video.num_frames}; this policy makes {temporal} n + 1 frames, for example "
                f"{video.num_frames // temporal * temporal + 1}"
            )
        for name, size in (("height", video.height), ("width", video.width)):
            if size % multiple:
                raise ConfigError(f"video.{name} is {size}; this policy needs a multiple of {multiple}")


def read_config(folder: Path, model_class: Any) -> dict[str, Any]:
    """A network's config.json over its class's defaults: a folder of an older diffusers lacks what came later."""
    arguments = inspect.signature(model_class.__init__).parameters.values()
    defaults = {one.name: one.default for one in arguments if one.default is not one.empty}
    return {**defaults, **json.loads((folder / "config.json").read_text("utf-8"))}


def networks_of(folder: Path) -> dict[str, Any]:
    """The classes of a pipeline's networks by their names in it."""
    return {
        name: getattr(importlib.import_module(part[0]), part[1])
        for name, part in read_index(folder).items()
        if kind_of(name) and part[0] in LIBRARIES
    }


def kind_of(name: str) -> str | None:
    """The component that a part belongs to, text_encoder_2 to text_encoder; None of tokenizers and the like."""
    return next((kind for kind in COMPONENTS if name.startswith(kind)), None)


def frozen(model_class: Any, folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A network that is used and never trained."""
    library = model_class.__module__.partition(".")[0]
    model: nn.Module = model_class.from_pretrained(folder, **{LIBRARIES[library]: dtype})
    return model.to(device).eval().requires_grad_(False)
