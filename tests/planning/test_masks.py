"""Planning with value-free masks: the plan treats all tokens as real and counts as much memory as real, full masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15Transformer3DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from bpgo_video.config.bpgo import VideoConfig
from bpgo_video.planning.fake import Allocations, EveryTokenReal
from bpgo_video.planning.footprint import decoding, footprint, measure, transformer_inputs
from bpgo_video.planning.models import Model, policy_of
from bpgo_video.policies.hunyuan15 import mask_keys

NAME = "HunyuanVideo15Transformer3DModel"
MODEL = Model(
    name="small", source="this test", index={"_class_name": "HunyuanVideo15Pipeline"}, transformers=("transformer",),
    transformer={
        "_class_name": NAME, "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 9, "out_channels": 4,
        "num_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 16, "text_embed_2_dim": 16, "image_embed_dim": 16,
        "rope_axes_dim": (4, 6, 6),
    },
    vae={"_class_name": "AutoencoderKLHunyuanVideo15", "latent_channels": 4, "block_out_channels": (8, 8, 8, 8, 8)},
)  # fmt: skip
POLICY = policy_of(MODEL, family=None, max_sequence_length=100)
VIDEO = VideoConfig(num_frames=29, height=512, width=512, fps=24.0)  # latents of 8 x 32 x 32


def test_a_symbolic_mask_keeps_all_tokens_and_its_complement_none() -> None:
    with FakeTensorMode(), EveryTokenReal():
        rows, mask = torch.empty(5, 3), torch.empty(5, dtype=torch.bool)
        assert rows[mask].shape == (5, 3)
        assert rows[~mask].shape == (0, 3)
        assert rows[1:3].shape == (2, 3)
        assert not torch.all(rows == 0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_dry_run_counts_the_memory_of_full_masks(checkpointing: bool) -> None:
    planned = footprint(POLICY, VIDEO, 2, torch.float32, checkpointed=checkpointing)
    module: Any = HunyuanVideo15Transformer3DModel.from_config(dict(MODEL.transformer))
    mask_keys(module)
    if checkpointing:
        module.enable_gradient_checkpointing()
    shapes = transformer_inputs(POLICY, VIDEO, 2, torch.float32)
    real = tree_map_only(torch.Tensor, lambda value: torch.ones(value.shape, dtype=value.dtype), shapes)
    forward, replay = measure(module, real)
    assert planned.forward.peak == pytest.approx(forward.peak, rel=0.01)
    assert planned.replay.peak == pytest.approx(replay.peak, rel=0.01)


def test_sequence_groups_divide_the_activations() -> None:
    alone, shared = (
        footprint(POLICY, VIDEO, 2, torch.float32, checkpointed=1.0, sequence=ranks).replay.peak for ranks in (1, 2)
    )
    assert shared < 0.75 * alone


@pytest.mark.parametrize("samples", [1, 3])
def test_the_memory_of_the_vae_includes_its_mask(samples: int) -> None:
    """As on real tensors, where diffusers fills the mask row by row."""
    latents = (4, 3, 12, 12)
    vae = AutoencoderKLHunyuanVideo15.from_config(dict(MODEL.vae))
    vae.enable_slicing()
    with Allocations([*vae.parameters()]) as counted, torch.no_grad():
        vae.decode(torch.empty(samples, *latents), return_dict=False)
    assert decoding(POLICY, latents, samples).peak == pytest.approx(counted.peak, rel=0.01)


def test_the_vae_decodes_one_video_at_a_time() -> None:
    one, three = (decoding(POLICY, (4, 2, 4, 4), samples).peak for samples in (1, 3))
    assert one < three < 2 * one
