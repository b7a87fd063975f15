"""A small WanPipeline folder of random weights, for tests that need no trained policy."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from bpgo_video.tiny import world as world

TEXT_TOKENS = 16
LATENTS = (4, 3, 8, 8)  # latent shape of 9 frames of 64x64


def random_wan(folder: Path, seed: int = 0, images: bool = False, image_encoder: bool = False) -> Path:
    """Write the pipeline, deterministic in its seed; return `folder`.

    Args:
        images: image-to-video, with the mask and the image's latents as additional channels.
        image_encoder: also with a CLIP image encoder, as in Wan 2.1.
    """
    own = {"in_channels": 4 + 4 + 4} if images else {"in_channels": 4}
    own |= {"image_dim": 24, "added_kv_proj_dim": 32} if image_encoder else {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32,
            num_layers=2, rope_max_seq_len=32, **own,
        )  # fmt: skip
        for parameter in transformer.proj_out.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        vae = AutoencoderKLWan(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True], in_channels=12,
            out_channels=12, patch_size=2, scale_factor_temporal=4, scale_factor_spatial=8, latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        )  # fmt: skip
        tokenizer = word_tokenizer()
        encoder = UMT5EncoderModel(
            UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        )
        vision = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16,
                patch_size=8,
            )
        )  # fmt: skip
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    parts = (tokenizer, encoder, vae, scheduler)
    if not images:
        WanPipeline(*parts, transformer).save_pretrained(folder)
        return folder
    size = {"height": 16, "width": 16}
    clip = (CLIPImageProcessor(size=size, crop_size=size), vision) if image_encoder else (None, None)
    WanImageToVideoPipeline(*parts, *clip, transformer).save_pretrained(folder)
    return folder


def wan_vae() -> AutoencoderKLWan:
    """A small VAE with the stages of Wan 2.1's, from whose number some pipelines compute strides of 4 x 8 x 8."""
    return AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 0.8, 1.5, 1.2],
    )  # fmt: skip


def word_tokenizer(before: int = 0, after: int = 0, limit: int = TEXT_TOKENS) -> PreTrainedTokenizerFast:
    """A tokenizer of the tiny world's words.

    Args:
        before: number of padding tokens before every text.
        after: whether to append </s>.
        limit: model_max_length.
    """
    words = sorted({word for caption in world.all_captions() for word in caption.text.split()})
    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = " ".join(["<pad>"] * before + ["$A"] + ["</s>"] * after)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<pad>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=limit
    )
