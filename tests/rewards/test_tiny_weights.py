"""The shipped weights: they reach the scores printed by their training scripts."""

from __future__ import annotations

import pytest
from diffusers import AutoencoderKLWan

from bpgo_video.files import resolve_folder
from tools.tiny.train_policy import heldout_score
from tools.tiny.train_vae import round_trip

WAN = resolve_folder("package:bpgo_video.tiny/weights/wan")


def test_the_vae_reconstructs_heldout_clips() -> None:
    actual = round_trip(AutoencoderKLWan.from_pretrained(WAN / "vae"), 48, seed=5)
    assert actual["heldout_psnr_db"] >= 30
    assert actual["heldout_oracle_share"] >= 0.95


@pytest.mark.slow
def test_the_base_policy_leaves_room_for_improvement(recipe) -> None:
    """Between .45 and .60 with the demo's guidance, over 384 videos."""
    assert 0.45 <= heldout_score(WAN, 16, recipe.evaluation.guidance_scale)["oracle"] <= 0.60
