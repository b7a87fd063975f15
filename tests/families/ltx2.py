"""LTX-2: text-to-video with sound."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

from bpgo_video.config.bpgo import VideoConfig
from tests.families.case import Case
from tests.made.random_wan import TEXT_TOKENS, word_tokenizer

VIDEO = VideoConfig(num_frames=9, height=64, width=96, fps=20.0)  # the pipeline's default is 24
TEXT_LAYERS = 2


VOCODER = {"in_channels": 32, "hidden_channels": 64, "resnet_kernel_sizes": [3], "resnet_dilations": [[1, 3, 5]]}
NEWER = {  # of LTX-2.3's transformer
    "gated_attn": True, "cross_attn_mod": True, "audio_gated_attn": True, "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False, "perturbed_attn": True,
}  # fmt: skip


def random_ltx2(folder: Path, newer: bool = False) -> None:
    """Write the pipeline: 8 channels of the video, and 2 x 4 mel bins of the audio, so that tokens have 8 features.

    Args:
        newer: with the transformer and the connectors of LTX-2.3.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = LTX2VideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
            audio_in_channels=8, audio_out_channels=8, audio_num_attention_heads=2, audio_attention_head_dim=8,
            audio_cross_attention_dim=16, num_layers=2, caption_channels=16, rope_type="split",
            **(NEWER if newer else {}),
        )  # fmt: skip
        vae = AutoencoderKLLTX2Video(
            latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 16, 32),
            layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1),
            spatial_compression_ratio=32, temporal_compression_ratio=8,
        )  # fmt: skip
        audio_vae = AutoencoderKLLTX2Audio(
            base_channels=8, ch_mult=(1, 1, 1), num_res_blocks=1, latent_channels=2, mel_bins=16
        )
        for network in (vae, audio_vae):
            torch.nn.init.normal_(network.latents_mean)
            torch.nn.init.uniform_(network.latents_std, 0.5, 1.5)
        vocoder = LTX2Vocoder(**VOCODER)
        for parameter in vocoder.parameters():
            if parameter.ndim > 1:
                torch.nn.init.kaiming_normal_(
                    parameter, nonlinearity="linear"
                )  # small weights would make the same sound of any latents
        projections = (
            {"per_modality_projections": True, "video_hidden_dim": 32, "audio_hidden_dim": 16} if newer else {}
        )
        shape = {"attention_head_dim": 8, "num_layers": 1, "num_learnable_registers": TEXT_TOKENS // 2}
        shapes = {f"{kind}_connector_{name}": value for kind in ("video", "audio") for name, value in shape.items()}
        connectors = LTX2TextConnectors(
            caption_channels=16, text_proj_in_factor=TEXT_LAYERS + 1, rope_type="split", **shapes, **projections,
            video_connector_num_attention_heads=4 if newer else 2, audio_connector_num_attention_heads=2,
        )  # fmt: skip
        tokenizer = word_tokenizer()
        text = Gemma3TextConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=TEXT_LAYERS,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, pad_token_id=0,
        )  # fmt: skip
        vision = SiglipVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
        encoder = Gemma3ForConditionalGeneration(
            Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift_terminal=0.1, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024,
        max_image_seq_len=4096,
    )  # fmt: skip
    pipeline = LTX2Pipeline(scheduler, vae, audio_vae, encoder, tokenizer, connectors, transformer, vocoder)
    pipeline.save_pretrained(folder)


LTX2 = Case(random_ltx2, VIDEO, TEXT_TOKENS, encodes_clips=False)
