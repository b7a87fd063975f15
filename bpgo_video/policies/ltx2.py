"""LTX-2 text-to-video with sound (arXiv 2601.03233): one transformer denoises video and audio together.

Video tokens and audio tokens have equally many features, so the latents are one row of tokens, the video's first:
[samples, features, tokens, 1, 1]. Samplers, replay and log-probs treat them as one state, in which each number counts
the same. The tokens' positions, from which the transformer tells seconds, are part of the conditioning, and their
shapes say where the video ends.

In a sequence group each rank computes a part of the video's tokens, and all of the few audio tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers.models.transformers.transformer_ltx2 import LTX2AudioVideoRotaryPosEmbed
from jaxtyping import Float
from torch import Tensor, nn

from bpgo_video.config.bpgo import ConfigError, VideoConfig
from bpgo_video.distributed.ulysses import Ulysses
from bpgo_video.policies.attention import SequencePlan, split_rope
from bpgo_video.policies.base import Arguments, Images, LatentShape, Policy, Shapes
from bpgo_video.policies.ltx import LTXPolicy
from bpgo_video.policies.networks import class_of
from bpgo_video.policies.schedule import sigmas_by_size
from bpgo_video.types import Audio, Conditioning, Latents, Velocity, Videos
from bpgo_video.weights import read_config

AUDIO_COMPRESSION = 4  # of diffusers' audio VAE, along time and along mel bins
SHIFT_DEFAULTS = {"base_image_seq_len": 1024, "base_shift": 0.95, "max_shift": 2.05}
PATCHES = ("patch_size", "patch_size_t", "audio_patch_size", "audio_patch_size_t")
TOKENS = 2  # dimension of rotary embeddings, after heads
OFF = {  # the pipeline's other guidance terms, which take two more forwards; the audio's scale is then the video's
    "stg_scale": 0.0, "audio_stg_scale": 0.0, "spatio_temporal_guidance_blocks": None,
    "modality_scale": 1.0, "audio_modality_scale": 1.0,
    "guidance_rescale": 0.0, "audio_guidance_rescale": 0.0, "audio_guidance_scale": None,
}  # fmt: skip


def split_positions(transformer: Any, ulysses: Ulysses) -> None:
    """Split the video's rotary embeddings for its own queries, and join its tokens where audio attends to them."""
    split_rope("rope", TOKENS)(transformer, ulysses)

    def split_queries(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "query_rotary_emb": tuple(ulysses.split(x, TOKENS) for x in kwargs["query_rotary_emb"])}

    def join_keys(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "encoder_hidden_states": ulysses.join(kwargs["encoder_hidden_states"], 1)}

    for block in transformer.transformer_blocks:
        block.audio_to_video_attn.register_forward_pre_hook(split_queries, with_kwargs=True)
        block.video_to_audio_attn.register_forward_pre_hook(join_keys, with_kwargs=True)


class LTX2Policy(LTXPolicy):
    """LTX-2 text-to-video with sound."""

    pipeline_name = "LTX2Pipeline"
    block_names = ("LTX2VideoTransformerBlock",)
    fps = 24.0
    makes_audio = True
    options = MappingProxyType({})
    required_settings = MappingProxyType(
        {
            "transformer": {"rope_type": ("split",), **dict.fromkeys(PATCHES, (1,))},
            "vae": {"timestep_conditioning": (False,)},
        }
    )
    sequence_plan = SequencePlan(
        blocks=("transformer_blocks",),
        rope=split_positions,
        head="proj_out",
        local_attention=("attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn"),
    )

    @classmethod
    def check(cls, folder: Path) -> None:
        """Also that audio tokens have the features of video tokens, and that the parts agree about them."""
        super().check(folder)
        transformer, vae, audio, connectors = (
            read_config(folder / part, class_of(folder, part))
            for part in ("transformer", "vae", "audio_vae", "connectors")
        )
        audio_features = audio["latent_channels"] * audio["mel_bins"] // AUDIO_COMPRESSION
        names = ("in_channels", "audio_in_channels", "audio_sampling_rate", "audio_hop_length", "audio_scale_factor")
        found = [transformer[name] for name in names]
        channels = vae["latent_channels"]
        expected = [channels, audio_features, audio["sample_rate"], audio["mel_hop_length"], AUDIO_COMPRESSION]
        for name, value, needed in zip(names, found, expected, strict=True):
            if value != needed:
                raise ConfigError(f"{folder / 'transformer'} sets {name} to {value}, but the VAEs make {needed}")
        if channels != audio_features:
            raise ConfigError(
                f"{folder}: video tokens have {channels} features and audio tokens {audio_features}; {cls.__name__} "
                "samples both as one row of tokens, which must have equally many"
            )
        for kind in ("video", "audio"):
            name = f"{kind}_connector_num_learnable_registers"
            if connectors[name] is None:
                raise ConfigError(
                    f"{folder / 'connectors'} sets {name} to None; {cls.__name__} needs them in place of padding"
                )

    @classmethod
    def assemble(cls, folder: Path, parts: Mapping[str, nn.Module | None]) -> Any:
        """Given classes that it does not export, diffusers would warn with a list of all their layers."""
        own = {name: part for name, part in parts.items() if name in ("connectors", "vocoder")}
        pipeline = super().assemble(folder, {**parts, **dict.fromkeys(own)})
        pipeline.register_modules(**own)
        return pipeline

    # Conditioning

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The connectors' outputs for video and audio, of Gemma's states. Registers take the place of padding."""
        pipeline = self.pipeline
        states, mask, _, _ = pipeline.encode_prompt(
            list(texts), do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        video, audio, _ = pipeline.connectors(states, mask, padding_side=pipeline.tokenizer.padding_side)
        return {"prompt_embeds": video, "audio_prompt_embeds": audio}

    def text_shapes(self, text_tokens: int) -> Shapes:
        config = self.transformer_config
        if config["use_prompt_embeddings"]:
            video = audio = config["caption_channels"]
        else:
            video, audio = config["cross_attention_dim"], config["audio_cross_attention_dim"]
        return {"prompt_embeds": (text_tokens, video), "audio_prompt_embeds": (text_tokens, audio)}

    def video_conditioning(self, video: VideoConfig) -> dict[str, Tensor]:
        """Bounds of each token in seconds and pixels: [1, 3, frames, rows, columns, 2], [1, 1, audio tokens, 2]."""
        config, cpu = self.transformer_config, torch.device("cpu")
        grid, offset = self.video_shape(video)[1:], config["causal_offset"]
        of_video = LTX2AudioVideoRotaryPosEmbed(1, scale_factors=config["vae_scale_factors"], causal_offset=offset)
        of_audio = LTX2AudioVideoRotaryPosEmbed(
            1, modality="audio", scale_factors=(config["audio_scale_factor"],), causal_offset=offset,
            sampling_rate=config["audio_sampling_rate"], hop_length=config["audio_hop_length"],
        )  # fmt: skip
        return {
            "video_coords": of_video.prepare_video_coords(1, *grid, cpu, fps=video.fps).unflatten(2, grid),
            "audio_coords": of_audio.prepare_audio_coords(1, self.audio_tokens(video), cpu),
        }

    @property
    def example_video(self) -> VideoConfig:
        """Two latent frames of two by two latent pixels."""
        temporal, spatial = self.strides
        return VideoConfig(num_frames=1 + temporal, height=2 * spatial, width=2 * spatial, fps=self.fps)

    def example_shape(self) -> LatentShape:
        return self.latent_shape(self.example_video)

    # Sizes

    def video_shape(self, video: VideoConfig) -> LatentShape:
        return Policy.latent_shape(self, video)

    def audio_tokens(self, video: VideoConfig) -> int:
        """The number of audio tokens: 25 a second, as the pipeline rounds it."""
        config = self.transformer_config
        rate = config["audio_sampling_rate"] / config["audio_hop_length"] / float(config["audio_scale_factor"])
        return round(video.num_frames / video.fps * rate)

    def latent_shape(self, video: VideoConfig) -> LatentShape:
        """Features, and the number of all tokens."""
        features, *grid = self.video_shape(video)
        return features, prod(grid) + self.audio_tokens(video), 1, 1

    # Sampling

    def sigmas(self, num_steps: int, video: VideoConfig, shift: float | None = None) -> Tensor:
        """The default shift grows with the number of the video's tokens; sound has the same levels."""
        tokens = prod(self.video_shape(video)[1:])
        return sigmas_by_size(self.pipeline.scheduler, num_steps, tokens, shift, **SHIFT_DEFAULTS)

    def velocity(self, latents: Latents, sigma: Tensor, conditioning: Conditioning) -> Velocity:
        texts, timestep = conditioning["prompt_embeds"], self.timesteps(latents, sigma)
        coords = {
            "video_coords": conditioning["video_coords"].flatten(2, 4),
            "audio_coords": conditioning["audio_coords"],
        }
        video, audio = tokens_of(latents).to(texts.dtype).split([x.shape[2] for x in coords.values()], dim=1)
        predictions = self.predict(
            sigma,
            hidden_states=video,
            audio_hidden_states=audio,
            encoder_hidden_states=texts,
            audio_encoder_hidden_states=conditioning["audio_prompt_embeds"],
            timestep=timestep,
            sigma=timestep,
            **coords,
        )
        return torch.cat(predictions, dim=1).float().mT[..., None, None]

    # Pixels and sound

    def pixels(self, latents: Latents, conditioning: Conditioning) -> Videos:
        grid = conditioning["video_coords"].shape[2:5]
        return self.decode_frames(latents.flatten(2)[..., : prod(grid)].unflatten(2, grid))

    @torch.no_grad()
    def decode_audio(self, latents: Latents, conditioning: Conditioning) -> Audio:
        vae, vocoder = self.pipeline.audio_vae, self.pipeline.vocoder
        tokens = tokens_of(latents)[:, -conditioning["audio_coords"].shape[2] :]
        clean = tokens * vae.latents_std.to(tokens) + vae.latents_mean.to(tokens)
        channels = clean.unflatten(2, (vae.config.latent_channels, -1)).transpose(1, 2)
        waveform = vocoder(vae.decode(channels.to(vae.dtype), return_dict=False)[0])
        return Audio(waveform.float(), vocoder.config.output_sampling_rate)

    def encode_video(self, videos: Videos) -> Latents:
        """Refused: clips have no sound, without which there is no clean state.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{type(self).__name__} cannot be trained on clips, which have no sound; train on rewards")

    # Generation with diffusers' own pipeline

    def call_defaults(self) -> dict[str, int]:
        return {"num_frames": 121}

    def call_arguments(self, pipeline: Any, latents: Latents, video: VideoConfig, images: Images | None) -> Arguments:
        """Tokens and the frame rate. The pipeline normalizes audio latents that it is given, so here they are not."""
        count, vae, tokens = self.audio_tokens(video), pipeline.audio_vae, tokens_of(latents)
        audio = tokens[:, -count:] * vae.latents_std.to(tokens) + vae.latents_mean.to(tokens)
        return {**OFF, "latents": tokens[:, :-count], "audio_latents": audio, "frame_rate": video.fps}

    def audio_of(self, pipeline: Any, output: Any) -> Audio:
        return Audio(output.audio.float().cpu(), pipeline.vocoder.config.output_sampling_rate)


def tokens_of(latents: Latents) -> Float[Tensor, "samples tokens features"]:
    return latents.flatten(2).mT
