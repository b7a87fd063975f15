"""A loaded VAE computes what diffusers' own does, up to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bpgo_video.policies import load_policy
from bpgo_video.policies.networks import class_of, split_vae_work
from bpgo_video.policies.vae import CHANNELS_LAST
from tests.families import CASES

WAN = "package:bpgo_video.tiny/weights/wan"
SIZES = ((1, 1), (2, 2), (1, 3), (2, 5))  # samples and latent frames


def loaded(folder: str) -> tuple[Any, Any]:
    """A policy with its VAE, and diffusers' own VAE of the same folder."""
    policy = load_policy(folder, max_sequence_length=16, components=("vae",))
    return policy, class_of(policy.folder, "vae").from_pretrained(policy.folder / "vae").requires_grad_(False)


def folder_of(case: str, scratch: Path) -> str:
    if case == WAN:
        return WAN
    CASES[case].write(scratch / "pipeline")
    return str(scratch / "pipeline")


@torch.no_grad()
def compare(policy: Any, theirs: Any, samples: int, frames: int) -> None:
    """Pixels of random latents, and their latents again."""
    ours = policy.pipeline.vae
    noise = 3 * torch.randn(samples, policy.latent_channels, frames, 4, 6, generator=torch.Generator().manual_seed(0))
    found, expected = (vae.decode(policy.denormalised(noise), return_dict=False)[0] for vae in (ours, theirs))
    assert expected.std() > 0.02
    assert (expected.abs() < 1).float().mean() > 0.5, "clipped pixels hide differences"
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)
    found, expected = (vae.encode(expected).latent_dist.mode() for vae in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("case", [WAN, "wan22_ti2v"])
def test_wans_vae_computes_as_diffusers_for_any_number_of_frames(case: str, tmp_path: Path) -> None:
    policy, theirs = loaded(folder_of(case, tmp_path))
    for samples, frames in SIZES:
        compare(policy, theirs, samples, frames)


@pytest.mark.parametrize("case", [WAN, "wan22_ti2v"])
@pytest.mark.parametrize("setting", ["tiling", "slicing"])
def test_wans_vae_computes_as_diffusers_in_tiles_and_slices(case: str, setting: str, tmp_path: Path) -> None:
    policy, theirs = loaded(folder_of(case, tmp_path))
    for vae in (policy.pipeline.vae, theirs):
        split_vae_work(vae, tiling=setting == "tiling", slicing=setting == "slicing")
        vae.tile_sample_min_height = vae.tile_sample_min_width = 2 * policy.strides[1]
        vae.tile_sample_stride_height = vae.tile_sample_stride_width = policy.strides[1]
    compare(policy, theirs, samples=2, frames=2)


@pytest.mark.parametrize("case", ["wan", "cogvideox_pairs", "mochi", "ltx", "hunyuan", "hunyuan15"])
def test_weights_have_channels_last_where_that_is_faster(case: str, tmp_path: Path) -> None:
    policy, theirs = loaded(folder_of(case, tmp_path))
    expected = type(theirs).__name__ in CHANNELS_LAST
    convolutions = [part for part in policy.pipeline.vae.modules() if isinstance(part, nn.Conv2d | nn.Conv3d)]
    for weight in (part.weight for part in convolutions if min(part.weight.shape[1:]) > 1):
        layout = torch.channels_last if weight.ndim == 4 else torch.channels_last_3d
        assert weight.is_contiguous(memory_format=layout) == expected
    moved = policy.pipeline.vae.state_dict()
    assert all(torch.equal(moved[name], value) for name, value in theirs.state_dict().items())


@torch.no_grad()
def test_bfloat16_pixels_are_within_55_decibels_of_float32() -> None:
    """Of a range of 1, on latents of the embedded VAE; its norms are taken in fp32."""
    exact, rounded = (
        load_policy(WAN, max_sequence_length=16, components=("vae",), vae_dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    noise = 3 * torch.randn(4, exact.latent_channels, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found, expected = (policy.decode(noise, {}) for policy in (rounded, exact))
    assert found.dtype == torch.float32
    decibels = -10 * (found - expected).square().mean().log10()
    assert 55 < decibels < 75, "it differs, but not visibly"


@torch.no_grad()
@pytest.mark.parametrize("case", ["wan22_ti2v", "cogvideox_pairs", "mochi", "ltx", "hunyuan", "hunyuan15"])
def test_every_vae_decodes_in_bfloat16(case: str, tmp_path: Path) -> None:
    folder = folder_of(case, tmp_path)
    exact, rounded = (
        load_policy(folder, max_sequence_length=16, components=("vae",), vae_dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert {weight.dtype for weight in rounded.pipeline.vae.parameters()} == {torch.bfloat16}
    buffers = dict(exact.pipeline.vae.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in rounded.pipeline.vae.named_buffers())
    noise = torch.randn(1, exact.latent_channels, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found, expected = (policy.decode_frames(noise) for policy in (rounded, exact))
    assert 0 < (found - expected).std() / expected.std() < 0.03
