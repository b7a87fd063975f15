"""Kandinsky 5 text-to-video and image-to-video (arXiv 2511.14993): latents have channels last, VAE of HunyuanVideo.

Folders with `visual_cond` take further channels for given frames, zeros without an image.

diffusers' transformer has no mask for padded text. Here all texts have one length, and each gives the same result as
alone. The mask travels in the rotary embeddings, since a block that is recomputed in the backward must see the same
mask: padding has a rotation of zeros, and after the text's blocks states of zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import Kandinsky5T2VPipeline
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.transformers.transformer_kandinsky import get_freqs
from jaxtyping import Bool, Float
from torch import Tensor, nn

from bpgo_video.config.bpgo import ConfigError, VideoConfig
from bpgo_video.distributed.ulysses import Ulysses
from bpgo_video.policies.attention import SequencePlan
from bpgo_video.policies.base import AllFrames, Arguments, Images, LatentShape, Policy, Shapes
from bpgo_video.policies.schedule import scheduled_sigmas
from bpgo_video.types import Conditioning, Latents, Velocity, Videos

PADDING = -1  # position of a padding token
POSITIONS = 128  # of the transformer's tokens along each axis
ADJUSTED_FRAMES = 4  # first latent frames whose mean and spread image-to-video adjusts to the frames after them


class TextAttention:
    """Attention to text tokens, of the text itself (rotated by its positions) or of the video.

    It uses PyTorch's backend, since others take no mask; `policy.attention_backend` applies to the video's tokens.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "samples tokens dim"],
        encoder_hidden_states: Float[Tensor, "samples text dim"] | None = None,
        rotary_emb: Tensor | None = None,
        sparse_params: None = None,
    ) -> Float[Tensor, "samples tokens dim"]:
        """The attention's output for the tokens."""
        texts = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            layer(x).unflatten(2, (attn.num_heads, -1))
            for layer, x in ((attn.to_query, hidden_states), (attn.to_key, texts), (attn.to_value, texts))
        )
        query, key = attn.query_norm(query.float()).type_as(value), attn.key_norm(key.float()).type_as(value)
        if rotary_emb is None:
            mask = texts.any(dim=2)
        else:
            mask, (query, key) = real_tokens(rotary_emb), (rotated(x, rotary_emb) for x in (query, key))
        output = dispatch_attention_fn(
            query, key, value, attn_mask=mask[:, None, None], backend=AttentionBackendName.NATIVE
        )
        return attn.out_layer(output.flatten(2))


class Rounded(torch.autograd.Function):
    """fp32 numbers rounded to bf16; gradients are not rounded.

    The ranks of a sequence group compute parts of a text's gradient, whose sum must be that of a single process.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def rotated(x: Float[Tensor, "samples tokens heads head_dim"], rope: Tensor) -> Tensor:
    """Each pair of numbers times its token's matrix, rounded to bf16 as diffusers does in every dtype."""
    pairs = x.float().unflatten(3, (-1, 1, 2))
    return Rounded.apply((rope * pairs).sum(dim=-1).reshape(x.shape)).type_as(x)


def real_tokens(rope: Tensor) -> Bool[Tensor, "samples text"]:
    """Text tokens that are no padding, by their rotations [1 samples text 1 half 2 2]; one row if all samples agree."""
    return rope.flatten(-4).any(dim=-1).reshape(-1, rope.shape[-5])


def text_positions(mask: Tensor) -> Tensor:
    """[samples, text] positions from 0; `PADDING` where the mask [samples, text] is false."""
    return torch.where(mask, torch.arange(mask.shape[1], device=mask.device), PADDING)


def prepare(transformer: Any) -> None:
    """Mask padded texts and restore the time embedding's frequencies.

    The frequencies are no buffer, so ZeRO-3's construction in bf16 rounds them: angles would be radians off.
    """

    def no_rotation_of_padding(_: nn.Module, args: tuple[Tensor], rope: Tensor) -> Tensor:
        return rope * (args[0] != PADDING)[..., None, None, None, None]

    def no_states_of_padding(_: nn.Module, args: tuple[Tensor, Tensor, Tensor], texts: Tensor) -> Tensor:
        return texts * real_tokens(args[2])[..., None]  # a block's third argument is the rotation

    for block in transformer.text_transformer_blocks:
        block.self_attention.set_processor(TextAttention())
    for block in transformer.visual_transformer_blocks:
        block.cross_attention.set_processor(TextAttention())
    transformer.text_rope_embeddings.register_forward_hook(no_rotation_of_padding)
    transformer.text_transformer_blocks[-1].register_forward_hook(no_states_of_padding)
    time = transformer.time_embeddings
    time.freqs = get_freqs(time.model_dim // 2, time.max_period)


def split_grid(transformer: nn.Module, ulysses: Ulysses) -> None:
    """Split rotary embeddings by frame, row and column, which the transformer flattens later."""

    def split(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        return ulysses.split(output.flatten(1, 3), 1)[:, :, None, None]

    transformer.get_submodule("visual_rope_embeddings").register_forward_hook(split)


def heads_by_width(config: Mapping[str, Any]) -> int:
    """The number of heads: each is as wide as its rotary embeddings."""
    return int(config["model_dim"]) // sum(config["axes_dims"])


class Kandinsky5Policy(Policy):
    """Kandinsky 5 text-to-video."""

    pipeline_name = "Kandinsky5T2VPipeline"
    block_names = ("Kandinsky5TransformerEncoderBlock", "Kandinsky5TransformerDecoderBlock")
    fps = 24.0
    one_text_a_call = True
    sequence_plan = SequencePlan(
        blocks=("visual_transformer_blocks",),
        rope=split_grid,
        head=None,
        local_attention=("cross_attention",),
        heads=heads_by_width,
    )
    required_settings = MappingProxyType({"transformer": {"attention_type": ("regular",)}})  # sparse cannot be trained

    def prepare(self, transformer: Any) -> None:
        prepare(transformer)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Qwen2.5-VL's states of the text in the pipeline's template, their mask, and CLIP's pooled states.

        Each text is encoded alone, since the pipeline does not mask padding, and padded with zeros afterwards.
        """
        rows = [self.pipeline.encode_prompt(text, max_sequence_length=self.max_sequence_length) for text in texts]
        lengths = torch.tensor([states.shape[1] for states, _, _ in rows])
        padded = [F.pad(states, (0, 0, 0, self.max_sequence_length - states.shape[1])) for states, _, _ in rows]
        mask = torch.arange(self.max_sequence_length) < lengths[:, None]
        return {
            "prompt_embeds": torch.cat(padded),
            "prompt_attention_mask": mask.to(padded[0].device),
            "pooled_prompt_embeds": torch.cat([pooled for _, pooled, _ in rows]),
        }

    def text_shapes(self, text_tokens: int) -> Shapes:
        config = self.transformer_config
        return {
            "prompt_embeds": (text_tokens, config["in_text_dim"]),
            "prompt_attention_mask": (text_tokens,),
            "pooled_prompt_embeds": (config["in_text_dim2"],),
        }

    def latent_shape(self, video: VideoConfig) -> LatentShape:
        shape = super().latent_shape(video)
        grid = (shape[1] + self.given_frames, *shape[2:])
        if max(size // patch for size, patch in zip(grid, self.patch, strict=True)) > POSITIONS:
            raise ConfigError(
                f"a video of {video.num_frames} x {video.height} x {video.width} has latents of {grid} in patches of "
                f"{self.patch}; the transformer knows {POSITIONS} positions along each axis"
            )
        return shape

    def sigmas(self, num_steps: int, video: VideoConfig, shift: float | None = None) -> Tensor:
        """Evenly spaced from the scheduler's largest level to its smallest, then shifted."""
        scheduler = self.pipeline.scheduler
        levels = np.linspace(scheduler.sigma_max, scheduler.sigma_min, num_steps)
        return scheduled_sigmas(scheduler, levels.tolist(), shift)

    def velocity(self, latents: Latents, sigma: Tensor, conditioning: Conditioning) -> Velocity:
        texts, device = conditioning["prompt_embeds"], latents.device
        frames = self.all_frames(latents, conditioning)
        inputs = self.channels_last(frames).to(texts.dtype)
        (_, height, width), spatial = inputs.shape[1:4], self.strides[1]
        prediction = self.predict(
            sigma,
            hidden_states=inputs,
            timestep=self.timesteps(latents, sigma).to(texts.dtype),
            encoder_hidden_states=texts,
            pooled_projections=conditioning["pooled_prompt_embeds"],
            visual_rope_pos=[torch.arange(size, device=device) for size in self.grid(frames)],
            text_rope_pos=text_positions(conditioning["prompt_attention_mask"]),
            scale_factor=Kandinsky5T2VPipeline._get_scale_factor(self.pipeline, height * spatial, width * spatial),
        )
        return prediction.movedim(-1, 1)[:, :, self.given_frames :].float()

    def channels_last(self, frames: AllFrames) -> Float[Tensor, "samples all_frames latent_height latent_width more"]:
        """The frames; with `visual_cond` as many channels of zeros follow, and one that marks given frames."""
        if not self.transformer_config["visual_cond"]:
            return frames.movedim(1, -1)
        given = torch.zeros_like(frames[:, :1])
        given[:, :, : self.given_frames] = 1
        return torch.cat([frames, torch.zeros_like(frames), given], dim=1).movedim(1, -1)

    def call_arguments(self, pipeline: Any, latents: Latents, video: VideoConfig, images: Images | None) -> Arguments:
        """The pipeline passes given noise to the transformer unchanged."""
        return {"latents": self.channels_last(self.call_frames(pipeline, latents, images))}


class Kandinsky5ImagePolicy(Kandinsky5Policy):
    """Kandinsky 5 image-to-video: the first latent frame is the image; a mask tells the transformer so.

    Before decoding, the pipeline moves mean and spread of the first frames towards those of later frames, and so does
    `decode`.
    """

    pipeline_name = "Kandinsky5I2VPipeline"
    takes_images = True
    given_frames = 1

    def latent_shape(self, video: VideoConfig) -> LatentShape:
        temporal = self.strides[0]
        frames = (video.num_frames - 1) // temporal + 1
        if frames <= ADJUSTED_FRAMES:
            raise ConfigError(
                f"video.num_frames is {video.num_frames}, {frames} latent frames: the pipeline adjusts the first "
                f"{ADJUSTED_FRAMES} to those after them; take {ADJUSTED_FRAMES * temporal + 1} frames or more"
            )
        return super().latent_shape(video)

    def example_shape(self) -> LatentShape:
        channels, _, height, width = super().example_shape()
        return channels, ADJUSTED_FRAMES, height, width

    def pixels(self, latents: Latents, conditioning: Conditioning) -> Videos:
        channels_last = self.all_frames(latents, conditioning).movedim(1, -1)
        adjusted = [self.pipeline.normalize_first_frame(sample) for sample in channels_last.split(1)]
        return self.decode_frames(torch.cat(adjusted).movedim(-1, 1))
