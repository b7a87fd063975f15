"""What does a transformer take in? Its arguments as shapes, by its class or its family; their values play no part.

They are what the family's `velocity` passes; numbers that say how positions are stretched are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bpgo_video.config.bpgo import ConfigError

IMAGE_TOKENS = 257  # of CLIP ViT-H at 224 pixels, which Wan 2.1's image-to-video attends to
SIGLIP_TOKENS = 729  # at 384 pixels, which HunyuanVideo 1.5's does
GLYPH_TOKENS = 256  # of ByT5, in HunyuanVideo 1.5's pipelines
LLAVA_TOKENS = 576 // 2 - 4  # of an image before HunyuanVideo's text, less four that its pipeline cuts from the text


@dataclass(frozen=True)
class Batch:
    """What goes through a transformer at once.

    Attributes:
        samples: rows, both halves of classifier-free guidance counted.
        latents: (channels, latent_frames, latent_height, latent_width) of all that passes: sampled frames behind those
            that an image gives.
        text_tokens: of each row.
        dtype: that the transformer computes in.
        given_frames: latent frames of an image, without noise: each token then has a noise level of its own.
    """

    samples: int
    latents: tuple[int, int, int, int]
    text_tokens: int
    dtype: torch.dtype
    given_frames: int = 0

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(self.samples, *shape, dtype=dtype or self.dtype)

    def timesteps(self, tokens: int) -> torch.Tensor:
        """A noise level of each sample, or of each of its tokens."""
        return self.empty(*([tokens] if self.given_frames else []), dtype=torch.float32)


Config = Mapping[str, Any]
Arguments = dict[str, Any]
Inputs = Callable[[Config, Batch], Arguments]


def wan(config: Config, batch: Batch) -> Arguments:
    _, frames, height, width = batch.latents
    tokens = frames * height * width // math.prod(config["patch_size"])
    arguments: Arguments = {
        "hidden_states": batch.empty(config["in_channels"], frames, height, width),
        "timestep": batch.timesteps(tokens),
        "encoder_hidden_states": batch.empty(batch.text_tokens, config["text_dim"]),
    }
    if config.get("image_dim"):
        arguments["encoder_hidden_states_image"] = batch.empty(IMAGE_TOKENS, config["image_dim"])
    return arguments


def hunyuan_video(config: Config, batch: Batch) -> Arguments:
    _, frames, height, width = batch.latents
    tokens = batch.text_tokens + (LLAVA_TOKENS if config["image_condition_type"] else 0)
    arguments: Arguments = {
        "hidden_states": batch.empty(config["in_channels"], frames, height, width),
        "timestep": batch.empty(dtype=torch.float32),
        "encoder_hidden_states": batch.empty(tokens, config["text_embed_dim"]),
        "encoder_attention_mask": batch.empty(tokens, dtype=torch.bool),
        "pooled_projections": batch.empty(config["pooled_projection_dim"]),
    }
    if config["guidance_embeds"]:
        arguments["guidance"] = batch.empty()
    return arguments


def hunyuan_video_15(config: Config, batch: Batch) -> Arguments:
    _, frames, height, width = batch.latents
    image_tokens = SIGLIP_TOKENS if config["task_type"] == "i2v" else 1
    return {
        "hidden_states": batch.empty(config["in_channels"], frames, height, width),
        "timestep": batch.empty(),
        "encoder_hidden_states": batch.empty(batch.text_tokens, config["text_embed_dim"]),
        "encoder_attention_mask": batch.empty(batch.text_tokens, dtype=torch.bool),
        "encoder_hidden_states_2": batch.empty(GLYPH_TOKENS, config["text_embed_2_dim"]),
        "encoder_attention_mask_2": batch.empty(GLYPH_TOKENS, dtype=torch.bool),
        "image_embeds": batch.empty(image_tokens, config["image_embed_dim"]),
    }


def cogvideox(config: Config, batch: Batch) -> Arguments:
    _, frames, height, width = batch.latents
    arguments: Arguments = {
        "hidden_states": batch.empty(frames, config["in_channels"], height, width),
        "timestep": batch.empty(dtype=torch.int64),
        "encoder_hidden_states": batch.empty(batch.text_tokens, config["text_embed_dim"]),
    }
    if config["use_rotary_positional_embeddings"]:
        patch, patch_frames = config["patch_size"], config["patch_size_t"] or 1
        tokens = frames // patch_frames * (height // patch) * (width // patch)
        rope = torch.empty(tokens, config["attention_head_dim"], dtype=torch.float32)
        arguments["image_rotary_emb"] = (rope, rope)
    if config.get("ofs_embed_dim"):
        arguments["ofs"] = torch.empty(1, dtype=torch.float32)  # one for all samples
    return arguments


def ltx_video(config: Config, batch: Batch) -> Arguments:
    _, frames, height, width = batch.latents
    return {
        "hidden_states": batch.empty(frames * height * width, config["in_channels"]),
        "timestep": batch.timesteps(frames * height * width),
        "encoder_hidden_states": batch.empty(batch.text_tokens, config["caption_channels"]),
        "encoder_attention_mask": batch.empty(batch.text_tokens, dtype=torch.bool),
        "num_frames": frames,
        "height": height,
        "width": width,
    }


def kandinsky5(config: Config, batch: Batch) -> Arguments:
    _, frames, height, width = batch.latents
    sizes = zip((frames, height, width), config["patch_size"], strict=True)
    channels = config["in_visual_dim"] * (2 if config["visual_cond"] else 1) + bool(config["visual_cond"])
    return {
        "hidden_states": batch.empty(frames, height, width, channels),
        "timestep": batch.empty(),
        "encoder_hidden_states": batch.empty(batch.text_tokens, config["in_text_dim"]),
        "pooled_projections": batch.empty(config["in_text_dim2"]),
        "visual_rope_pos": [torch.arange(size // patch) for size, patch in sizes],
        "text_rope_pos": torch.arange(batch.text_tokens).expand(batch.samples, -1),
    }


def mochi(config: Config, batch: Batch) -> Arguments:
    _, frames, height, width = batch.latents
    return {
        "hidden_states": batch.empty(config["in_channels"], frames, height, width),
        "encoder_hidden_states": batch.empty(batch.text_tokens, config["text_embed_dim"]),
        "timestep": batch.empty(),
        "encoder_attention_mask": batch.empty(batch.text_tokens, dtype=torch.bool),
    }


INPUTS: dict[str, Inputs] = {
    "WanTransformer3DModel": wan,
    "HunyuanVideoTransformer3DModel": hunyuan_video,
    "HunyuanVideo15Transformer3DModel": hunyuan_video_15,
    "CogVideoXTransformer3DModel": cogvideox,
    "LTXVideoTransformer3DModel": ltx_video,
    "Kandinsky5Transformer3DModel": kandinsky5,
    "MochiTransformer3DModel": mochi,
}


def arguments(class_name: str, config: Config, batch: Batch, own: Inputs | None = None) -> Arguments:
    """Keyword arguments of one forward.

    Args:
        config: of the transformer, with its class's defaults filled in.
        own: the family's function, where it brings one.

    Raises:
        ConfigError: a class whose arguments are not known.
    """
    if own is None and class_name not in INPUTS:
        raise ConfigError(
            f"what {class_name} takes in is not known, so that its activations cannot be counted; known are "
            f"{sorted(INPUTS)}. Give the family's class `transformer_inputs` (docs/new_family.md)"
        )
    return (own or INPUTS[class_name])(config, batch)
