"""ZeRO-3's limits on what is fetched ahead: derived from the model, and without an effect on what is learned."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch

from bpgo_video.distributed.ds_config import fetching_ahead
from bpgo_video.distributed.engine import largest_block, zero_settings
from tests.distributed.conftest import run_ranks
from tests.distributed.fetching_worker import TRANSFORMER

ZERO_3 = {"zero_optimization": {"stage": 3}}
LIMITS = ("prefetch_bucket_size", "max_live_parameters", "max_reuse_distance")


def limits(ds_config: dict[str, object]) -> tuple[int, ...]:
    settings = zero_settings(ds_config)
    return tuple(getattr(settings, name) for name in LIMITS)


def test_a_large_models_next_block_is_fetched_ahead_and_four_are_held() -> None:
    block = 351_394_304  # Wan2.1-14B
    assert limits(fetching_ahead(ZERO_3, block)) == (block, 4 * block, 10**9)
    assert limits(fetching_ahead(ZERO_3, 3 * 10**9)) == (3 * 10**9, 12 * 10**9, 3 * 10**9)


def test_deepspeeds_defaults_stay_for_a_small_model_and_the_jsons_values_for_any() -> None:
    assert limits(fetching_ahead(ZERO_3, 10**6)) == limits(ZERO_3) == (5 * 10**7, 10**9, 10**9)
    stated = {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 7, "stage3_max_live_parameters": 8}}
    assert limits(fetching_ahead(stated, 10**10)) == (7, 8, 10**10)
    assert fetching_ahead({"zero_optimization": {"stage": 2}}, 10**10) == {"zero_optimization": {"stage": 2}}


@pytest.mark.slow
def test_training_is_equal_to_the_bit_whatever_is_fetched_ahead_and_after_whole_weights(tmp_path: Path) -> None:
    run_ranks(2, [str(tmp_path)], worker="fetching_worker")
    with torch.device("meta"):
        module = diffusers.WanTransformer3DModel.from_config(dict(TRANSFORMER))
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["ahead"] == [5 * 10**7, largest_block(module, (type(module.blocks[0]),))]
        for kind in ("default", "derived", "after whole weights"):
            assert all(found[kind].values()), [name for name, equal in found[kind].items() if not equal]
