"""A WanPipeline folder of random weights, the shipped one made smaller; for tests that need no trained policy."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from bpgo_video.tiny import world

TEXT_TOKENS = 16
LATENTS = (4, 3, 8, 8)  # of 9 frames of 64x64


def random_wan(folder: Path, seed: int = 0) -> Path:
    """Write the pipeline, deterministic in its seed; `folder`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
            ffn_dim=32, num_layers=2, rope_max_seq_len=32,
        )  # fmt: skip
        for parameter in transformer.proj_out.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        vae = AutoencoderKLWan(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True], in_channels=12,
            out_channels=12, patch_size=2, scale_factor_temporal=4, scale_factor_spatial=8, latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        )  # fmt: skip
        tokenizer = _tokenizer()
        encoder = UMT5EncoderModel(
            UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    WanPipeline(tokenizer, encoder, vae, scheduler, transformer).save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    words = sorted({word for caption in world.all_captions() for word in caption.text.split()})
    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TEXT_TOKENS
    )
