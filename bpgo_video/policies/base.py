"""Base class of all policies: a video diffusion model in rectified-flow coordinates, loaded from a diffusers folder.

x_sigma = (1 - sigma) data + sigma noise. Samplers, replay, guidance, LoRA, sharding and export use the methods below
and know nothing else of a family. The defaults fit a family like Wan; a family overrides what differs.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import diffusers
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bpgo_video.config.bpgo import ConfigError, VideoConfig
from bpgo_video.diffusion import sde
from bpgo_video.policies.attention import SequencePlan
from bpgo_video.policies.networks import Transformers, class_of, transformer_names
from bpgo_video.types import Audio, Conditioning, Guidance, Latents, Velocity, Videos
from bpgo_video.weights import read_config

Shapes = dict[str, tuple[int, ...]]
Arguments = dict[str, Any]  # of a transformer's or a pipeline's call
LatentShape = tuple[int, int, int, int]  # channels, latent_frames, latent_height, latent_width
Images = Float[Tensor, "prompts 3 height width"]  # RGB in [0, 1]
AllFrames = Float[Tensor, "samples channels all_frames latent_height latent_width"]  # given frames, then sampled ones
EXAMPLE_TOKENS = 4  # text tokens of `example`


class Policy:
    """A diffusers pipeline's networks. Text encoders, VAE and transformers may be None where they are not needed.

    Attributes:
        folder: the diffusers pipeline that it was loaded from.
        pipeline: diffusers' object with the loaded networks and the scheduler.
        pipeline_name: diffusers' class; imported late, since importing an unused pipeline may print warnings.
        transformers: the loaded ones, a `Transformers`; training replaces them with the engine's wrapper.
        transformer_names: all transformers of the folder.
        block_names: class names of the repeated blocks; ZeRO-3 fetches each block as one unit.
        max_sequence_length: text tokens; changes the result where padding is not masked.
        fps: frames per second that the authors train on.
        takes_images: image-to-video.
        takes_videos: each prompt has a video that its samples follow, see `control_conditioning`.
        makes_audio: the latents hold sound with the video, see `decode_audio`.
        texts_see_images: the text encoder reads a prompt together with its image.
        given_frames: latent frames at the start that the image fixes; they are not sampled.
        image_channels: the transformer takes the image's latents as further channels of every frame.
        token_timesteps: the transformer takes a timestep for each token, 0 for those of given frames.
        padding_frames: latent frames sampled before the others and not part of the video.
        length_tokenizer: the tokenizer whose tokens `max_sequence_length` counts.
        one_dtype: diffusers' pipeline needs all its networks, the VAE too, in one dtype.
        whole_timesteps: diffusers' pipeline passes whole timesteps, which its Euler schedulers do not take.
        one_video_a_call: diffusers' pipeline makes one video a call, of a prompt that is no list.
        image_argument: the pipeline call's name for the prompt's image.
        one_text_a_call: diffusers' pipeline pads the texts of a call to one length without a mask.
        slices_vae: diffusers' VAE computes correct attention masks for a batch of one only.
        options: the family's own settings of the recipe's section `policy`, with the pipeline's default values.
        guidance_argument: the pipeline call's name for the scale of classifier-free guidance.
        sequence_plan: how sequence groups split the transformer's tokens; None refuses them.
        required_settings: a part of the folder -> its config's setting -> the values that the family can sample.
    """

    folder: Path
    pipeline: Any
    transformers: Any
    transformer_names: tuple[str, ...]
    max_sequence_length: int
    pipeline_name: ClassVar[str]
    block_names: ClassVar[tuple[str, ...]]
    fps: float
    takes_images: ClassVar[bool] = False
    takes_videos: ClassVar[bool] = False
    makes_audio: ClassVar[bool] = False
    texts_see_images: ClassVar[bool] = False
    given_frames: ClassVar[int] = 0
    image_channels: ClassVar[bool] = False
    token_timesteps: ClassVar[bool] = False
    padding_frames: int = 0
    length_tokenizer: ClassVar[str] = "tokenizer"
    one_dtype: ClassVar[bool] = False
    whole_timesteps: ClassVar[bool] = False
    one_video_a_call: ClassVar[bool] = False
    image_argument: ClassVar[str] = "image"
    one_text_a_call: ClassVar[bool] = False
    slices_vae: ClassVar[bool] = False
    options: Mapping[str, float | None] = MappingProxyType({})
    guidance_argument: ClassVar[str] = "guidance_scale"
    sequence_plan: ClassVar[SequencePlan | None] = None
    required_settings: ClassVar[Mapping[str, Mapping[str, tuple[Any, ...]]]] = MappingProxyType({})

    def __init__(self, folder: Path, pipeline: Any, max_sequence_length: int):
        self.folder = folder
        self.pipeline = pipeline
        self.max_sequence_length = max_sequence_length
        self.transformer_names = transformer_names(folder)
        loaded = {name: getattr(pipeline, name) for name in self.transformer_names}
        self.transformers: Any = Transformers({name: module for name, module in loaded.items() if module is not None})
        for transformer in self.transformers.values():
            self.prepare(transformer)
        first = self.transformer_names[0]
        self.transformer_config = read_config(folder / first, class_of(folder, first))
        self.vae_config = read_config(folder / "vae", class_of(folder, "vae"))

    # Loading

    @classmethod
    def assemble(cls, folder: Path, parts: Mapping[str, nn.Module | None]) -> Any:
        """diffusers' pipeline of the folder with these networks, None for those that are not loaded."""
        pipeline = getattr(diffusers, cls.pipeline_name).from_pretrained(folder, **parts)
        if cls.slices_vae and pipeline.vae is not None:
            pipeline.vae.enable_slicing()
        return pipeline

    @classmethod
    def check(cls, folder: Path) -> None:
        """Check that the family can sample the folder: by default its `required_settings`.

        Raises:
            ConfigError: it cannot; the message names the setting.
        """
        for part, required in cls.required_settings.items():
            settings = read_config(folder / part, class_of(folder, part))
            for name, values in required.items():
                if settings[name] not in values:
                    raise ConfigError(
                        f"{folder / part} sets {name} to {settings[name]!r}; {cls.pipeline_name} samples only "
                        f"{list(values)}: use another folder, or leave policy.family out if it is set"
                    )

    @classmethod
    def variant(cls, folder: Path) -> type[Policy]:
        """The class for this folder, where one diffusers pipeline samples models of several kinds."""
        return cls

    def prepare(self, transformer: Any) -> None:
        """Change a transformer that was just loaded, before adapters or an engine."""

    # Conditioning

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Conditioning of prompts, axis 0 over prompts; needs the text encoder.

        Where texts see images, this encodes negative prompts, which have no image.
        """
        embeddings, _ = self.pipeline.encode_prompt(
            list(texts), do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        return {"prompt_embeds": embeddings}

    def encode_with_images(self, texts: Sequence[str], images: Images) -> dict[str, Tensor]:
        """As `encode`, of prompts with an image each, for families whose texts see images."""
        raise TypeError(f"{type(self).__name__} encodes texts without images")

    @torch.no_grad()
    def image_conditioning(self, images: Images, video: VideoConfig) -> dict[str, Tensor]:
        """Conditioning from images, axis 0 over prompts. By default the latent frame of each image, `image_latents`."""
        if not self.takes_images:
            raise TypeError(f"{type(self).__name__} makes videos from texts only")
        return {"image_latents": self.clean_latents(self.pipeline.vae, images[:, None])}

    def control_conditioning(self, videos: Videos, images: Images | None, video: VideoConfig) -> dict[str, Tensor]:
        """Conditioning from the control video of one prompt, and its image for a policy that takes both.

        Args:
            videos: of one row, of the size and frame rate of `video`.
        """
        raise TypeError(f"{type(self).__name__} makes videos without control videos")

    @property
    def media(self) -> tuple[str, ...]:
        """The kinds of files that each prompt must have: image, video."""
        return tuple(kind for kind, taken in (("image", self.takes_images), ("video", self.takes_videos)) if taken)

    def video_conditioning(self, video: VideoConfig) -> dict[str, Tensor]:
        """Conditioning from the video's own settings, such as its frame rate: one row, fp32."""
        return {}

    def text_shapes(self, text_tokens: int) -> Shapes:
        """The shapes that `encode` gives one text, without the axis of prompts; names with `mask` are boolean.

        Args:
            text_tokens: the length that texts are padded to.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a method text_shapes (docs/new_family.md)")

    def conditioning_shapes(self, latents: LatentShape, text_tokens: int) -> Shapes:
        """`text_shapes` and the shapes of `image_conditioning`: `example` and `bpgo-video plan` make inputs from them.

        Args:
            latents: of the sample, as `latent_shape` gives it.
        """
        channels, _, height, width = latents
        image: Shapes = {"image_latents": (channels, 1, height, width)} if self.takes_images else {}
        return {**self.text_shapes(text_tokens), **image}

    def example(self) -> tuple[Latents, Conditioning]:
        """A small, fixed input of one sample, to compare two sets of weights."""
        generator, shape = torch.Generator().manual_seed(0), self.example_shape()
        latents = torch.randn(1, *shape, generator=generator)
        conditioning: dict[str, Tensor] = {}
        for name, size in self.conditioning_shapes(shape, EXAMPLE_TOKENS).items():
            is_mask = "mask" in name
            conditioning[name] = torch.ones(1, *size).bool() if is_mask else torch.randn(1, *size, generator=generator)
        return latents, {**conditioning, **self.video_conditioning(self.example_video)}

    @property
    def example_video(self) -> VideoConfig:
        """The video of `example`, as far as `video_conditioning` reads it."""
        return VideoConfig(num_frames=1, height=1, width=1, fps=self.fps)

    def example_shape(self) -> LatentShape:
        """The latents of `example`: two patches along each axis."""
        frames, height, width = self.patch
        return self.latent_channels, 2 * frames, 2 * height, 2 * width

    # Sizes

    @property
    def latent_channels(self) -> int:
        config = self.vae_config
        return int(config["latent_channels"] if "latent_channels" in config else config["z_dim"])

    @property
    def strides(self) -> tuple[int, int]:
        """Video frames in a latent frame, and pixels in a side of a latent pixel."""
        config = self.vae_config
        if "scale_factor_temporal" in config:
            return config["scale_factor_temporal"], config["scale_factor_spatial"]
        return config["temporal_compression_ratio"], config["spatial_compression_ratio"]

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latent frames, height and width in a token of the transformer."""
        size = self.transformer_config["patch_size"]
        if isinstance(size, int):
            return self.transformer_config.get("patch_size_t") or 1, size, size
        return size[0], size[1], size[2]

    def grid(self, latents: AllFrames) -> tuple[int, int, int]:
        """Tokens along each axis of the latents: frames, rows, columns."""
        frames, rows, columns = (size // patch for size, patch in zip(latents.shape[2:], self.patch, strict=True))
        return frames, rows, columns

    def latent_shape(self, video: VideoConfig) -> LatentShape:
        """The shape of the sampled latents, without given frames.

        Raises:
            ConfigError: the family cannot make this size; the message names one that it can.
        """
        temporal, spatial = self.strides
        self.check_size(video, temporal, spatial * self.patch[1])
        frames = (video.num_frames - 1) // temporal + 1
        if frames == self.given_frames:
            raise ConfigError(
                f"video.num_frames is {video.num_frames}, and the image is the first of them: no frame is left to "
                f"sample; take {1 + temporal} frames or more"
            )
        return self.latent_channels, frames - self.given_frames, video.height // spatial, video.width // spatial

    def video_shape(self, video: VideoConfig) -> LatentShape:
        """The sampled latents of the pictures: all of them where there is no sound."""
        return self.latent_shape(video)

    def check_size(self, video: VideoConfig, temporal: int, multiple: int) -> None:
        """Check a video's size.

        Args:
            temporal: video frames in each latent frame after the first.
            multiple: must divide height and width.

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

    # Sampling

    def sigmas(self, num_steps: int, video: VideoConfig, shift: float | None = None) -> Tensor:
        """The family's noise levels for such a video: [num_steps + 1] in fp32, from 1 down to 0.

        Args:
            shift: replaces the folder's; sigma' = shift sigma / (1 + (shift - 1) sigma).
        """
        scheduler = self.pipeline.scheduler.config
        default = scheduler.get("flow_shift", scheduler.get("shift", 1.0))
        return sde.shifted_sigmas(num_steps, default if shift is None else shift)

    def start(self, noise: Latents, conditioning: Conditioning) -> Latents:
        """Latents at the first noise level from standard normal noise; by default the noise itself."""
        return noise

    def velocity(self, latents: Latents, sigma: Tensor, conditioning: Conditioning) -> Velocity:
        """The predicted noise - data at noise level `sigma`, fp32; differentiable.

        Args:
            sigma: 0-dim, or one for each sample, all of the same transformer; on the CPU.
        """
        texts = conditioning["prompt_embeds"]
        arguments = {
            "hidden_states": self.hidden_states(latents, conditioning).to(texts.dtype),
            "timestep": self.timesteps(latents, sigma),
            "encoder_hidden_states": texts,
            **self.transformer_arguments(latents, sigma, conditioning),
        }
        return self.sampled_frames(self.predict(sigma, **arguments)[0], latents).float()

    def sampled_frames(self, prediction: Tensor, latents: Latents) -> Velocity:
        """The sampled frames of the transformer's output, in the layout of the latents."""
        return prediction[:, :, self.given_frames :]

    def rescaled(self, guided: Velocity, prompted: Velocity) -> Velocity:
        """A velocity of classifier-free guidance as the pipeline uses it, given the velocity of the prompt alone."""
        return guided

    def predict(self, sigma: Tensor, /, **inputs: Any) -> Any:
        """The output of the transformer for a noise level."""
        return self.transformers(self.transformer_at(float(sigma.max())), **inputs, return_dict=False)

    def transformer_at(self, sigma: float) -> str:
        """The name of the transformer that computes at a noise level."""
        return self.transformer_names[0]

    def all_frames(self, latents: Latents, conditioning: Conditioning) -> AllFrames:
        """Given and sampled frames."""
        return torch.cat([conditioning["image_latents"].to(latents), latents], dim=2) if self.given_frames else latents

    def hidden_states(self, latents: Latents, conditioning: Conditioning) -> Tensor:
        """The transformer's input: all frames, or with `image_channels` the frames and those of the image."""
        if self.image_channels:
            return torch.cat([latents, conditioning["image_latents"].to(latents.dtype)], dim=1)
        return self.all_frames(latents, conditioning)

    def timesteps(self, latents: Latents, sigma: Tensor) -> Tensor:
        """The noise level in the transformer's unit, fp32: [samples], or [samples, tokens] with `token_timesteps`."""
        steps = (sigma.to(latents.device) * self.pipeline.scheduler.config.num_train_timesteps).expand(len(latents))
        if not self.token_timesteps:
            return steps
        frames, height, width = self.grid(latents)
        sampled = steps[:, None].expand(-1, frames * height * width)
        return torch.cat([sampled.new_zeros(len(latents), self.given_frames * height * width), sampled], dim=1)

    @property
    def embedded_guidance(self) -> float:
        """The guidance scale that a distilled transformer takes as an input."""
        scale = self.options["embedded_guidance"]
        assert scale is not None
        return scale

    def transformer_arguments(self, latents: Latents, sigma: Tensor, conditioning: Conditioning) -> Arguments:
        """Further arguments of the transformer, or replacements."""
        return {}

    # Pixels

    def latent_statistics(self, vae: Any, device: torch.device) -> tuple[Any, Any, float]:
        """Mean and standard deviation of the VAE's latents by channel, and a scale: (x - mean) scale / std."""
        config = self.vae_config
        mean, std = (
            torch.tensor(config[name], device=device).view(1, -1, 1, 1, 1) if config.get(name) else default
            for name, default in (("latents_mean", 0.0), ("latents_std", 1.0))
        )
        return mean, std, config.get("scaling_factor", 1.0)

    @torch.no_grad()
    def clean_latents(self, vae: Any, videos: Videos, device: torch.device | None = None) -> AllFrames:
        """Normalised latents of pixels in [0, 1], fp32: the mode of the VAE's posterior, one video at a time.

        Args:
            device: where the VAE computes, if its weights are offloaded; None means where they are.
        """
        encoded = self.vae_latents(vae, videos, device)
        mean, std, scale = self.latent_statistics(vae, encoded.device)
        return (encoded - mean) * scale / std

    def vae_latents(self, vae: Any, videos: Videos, device: torch.device | None = None) -> AllFrames:
        """Latents in the VAE's own range, fp32."""
        pixels = (2 * videos - 1).transpose(1, 2).to(device or vae.device, vae.dtype)
        return torch.cat([vae.encode(video).latent_dist.mode().float() for video in pixels.split(1)])

    def encode_video(self, videos: Videos) -> Latents:
        """Clean latents of pixels in [0, 1], without given frames; no gradient. `decode` is its inverse."""
        return self.clean_latents(self.pipeline.vae, videos)[:, :, self.given_frames :]

    @torch.no_grad()
    def decode(self, latents: Latents, conditioning: Conditioning) -> Videos:
        """Pixels in [0, 1] of clean latents and the given frames; no gradient."""
        return self.pixels(latents, conditioning)

    def pixels(self, latents: Latents, conditioning: Conditioning) -> Videos:
        """As `decode`, differentiable in the latents."""
        return self.decode_frames(self.all_frames(latents, conditioning))

    def decode_audio(self, latents: Latents, conditioning: Conditioning) -> Audio | None:
        """The sound of clean latents; None of a family without `makes_audio`."""
        return None

    def decode_frames(self, latents: AllFrames) -> Videos:
        """Pixels in [0, 1] of all latent frames."""
        return self.vae_pixels(self.denormalised(latents))

    def denormalised(self, latents: AllFrames) -> AllFrames:
        """Latents in the VAE's own range."""
        mean, std, scale = self.latent_statistics(self.pipeline.vae, latents.device)
        return latents * std / scale + mean

    def vae_pixels(self, latents: AllFrames, *arguments: Any) -> Videos:
        """The VAE's pixels, in [0, 1]."""
        vae = self.pipeline.vae
        pixels = vae.decode(latents.to(vae.dtype), *arguments, return_dict=False)[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1).transpose(1, 2)

    def decoded_shape(self, latents: LatentShape) -> tuple[int, ...]:
        """The shape of one sample that the VAE decodes: sampled and given frames, without padding."""
        channels, frames, height, width = latents
        return channels, frames + self.given_frames - self.padding_frames, height, width

    # Generation with diffusers' own pipeline

    def videos_of(self, output: Any) -> Videos:
        """The videos in what the pipeline's call returned, in [0, 1]."""
        videos: Videos = output.frames
        return videos

    def call_defaults(self) -> dict[str, int]:
        """Size, text tokens and guidance by the names of `CallSettings`, where the pipeline call's defaults differ."""
        return {}

    def pipeline_defaults(self) -> dict[str, Any]:
        """What the pipeline's call takes where nobody sets it; None where it takes that from its inputs."""
        call = inspect.signature(getattr(diffusers, self.pipeline_name).__call__)
        return {name: parameter.default for name, parameter in call.parameters.items()} | dict(self.default_size())

    def default_size(self) -> Mapping[str, Any]:
        """`num_frames`, `height` and `width` among `call_defaults`, without what only a loaded pipeline knows."""
        return self.call_defaults()

    def take_settings(self, pipeline: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the pipeline's call; settings that the call does not take are set on the pipeline's parts.

        Args:
            settings: `num_inference_steps`, `num_frames`, `height`, `width`, `guidance_scale`, `max_sequence_length`,
                and `guidance_scale_2` where there are two transformers.
        """
        others = dict(settings)
        return {self.guidance_argument: others.pop("guidance_scale"), **others}

    def call_arguments(self, pipeline: Any, latents: Latents, video: VideoConfig, images: Images | None) -> Arguments:
        """Arguments of the pipeline's call besides `take_settings`, prompt and image: the initial noise in its layout.

        Args:
            pipeline: with all its networks.
            latents: the noise of the sampled frames.
        """
        return {"latents": self.call_frames(pipeline, latents, images)}

    def audio_of(self, pipeline: Any, output: Any) -> Audio | None:
        """The sound of a pipeline call's output; None of a family without `makes_audio`."""
        return None

    def call_frames(self, pipeline: Any, latents: Latents, images: Images | None) -> AllFrames:
        """The image's latent frame and the noise: pipelines that are given noise expect all frames."""
        if not self.given_frames:
            return latents
        assert images is not None
        device = pipeline._execution_device  # the networks' own `device` is wrong while they are offloaded
        return self.all_frames(latents, {"image_latents": self.clean_latents(pipeline.vae, images[:, None], device)})


def then_zeros(first: Tensor, frames: int) -> Tensor:
    """Channels of the first latent frame, followed by zeros up to this number of frames."""
    return F.pad(first, (0, 0, 0, 0, 0, frames - 1))


def given_first(image: Tensor, frames: int) -> Tensor:
    """Channels of an image's latents and, last, of a mask of given frames: the first of this number of frames."""
    return then_zeros(torch.cat([image, torch.ones_like(image[:, :1])], dim=1), frames)


def guided_velocity(policy: Policy, latents: Latents, sigma: Tensor, guidance: Guidance, scale: float) -> Velocity:
    """v = v_away + scale (v_towards - v_away): classifier-free guidance (arXiv 2207.12598). Scale 1 needs no v_away.

    Raises:
        ValueError: `scale` is not 1 and there is no negative prompt.
    """
    if scale == 1.0:
        return policy.velocity(latents, sigma, guidance.towards)
    if not guidance.away:
        raise ValueError(f"guidance_scale is {scale}, but the prompts have no negative prompt; encode one, or set 1.0")
    prompted, unprompted = both_velocities(policy, latents, sigma, guidance)
    return policy.rescaled(unprompted + scale * (prompted - unprompted), prompted)


def both_velocities(policy: Policy, latents: Latents, sigma: Tensor, guidance: Guidance) -> tuple[Velocity, Velocity]:
    """v_towards and v_away, as one batch, so that ZeRO-3 gathers the transformer's parameters once."""
    both = {name: torch.cat([value, guidance.away.get(name, value)]) for name, value in guidance.towards.items()}
    levels = sigma if sigma.ndim == 0 else torch.cat([sigma, sigma])
    prompted, unprompted = policy.velocity(torch.cat([latents, latents]), levels, both).chunk(2)
    return prompted, unprompted
