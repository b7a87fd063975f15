"""The mesh of data and sequence groups: assignment of samples, order of gathered rows, and errors for invalid sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.config.rules import check_world
from bpgo_video.config.run import ParallelConfig
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.policies.attention import check_heads
from bpgo_video.policies.wan import WanPolicy
from tests.made.recipes import small_recipe

CPU = torch.device("cpu")
WAN = {"_class_name": "WanTransformer3DModel", "num_attention_heads": 12}


@given(st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(1, 40), st.integers(1, 5))
def test_every_item_is_sampled_by_a_group_and_decoded_by_a_rank(
    sequence: int, groups: int, total: int, micro_batch_size: int
) -> None:
    world = [Mesh(rank, sequence * groups, CPU, sequence) for rank in range(sequence * groups)]
    shares = [mesh.share(total, micro_batch_size) for mesh in world]
    assert len({len(share) for share in shares}) == 1, "all ranks run equally many forwards"
    assert {len(items) for share in shares for items in share} == {micro_batch_size}, "micro-batches have equal sizes"
    for mesh, share in zip(world, shares, strict=True):
        assert share == shares[mesh.data_rank * sequence], "a sequence group has the same samples"
    flat = [[item for items in share for item in items] for share in shares]
    assert {item for items in flat for item in items} == set(range(total))
    decoded = [[items[row] for row in mesh.part(len(items))] for mesh, items in zip(world, flat, strict=True)]
    assert len({len(items) for items in decoded}) == 1
    assert {item for items in decoded for item in items} == set(range(total))


def test_gathered_rows_are_ordered_by_item() -> None:
    rows = torch.tensor([[30.0], [10.0], [20.0], [30.0]])
    assert Mesh(0, 1, CPU).gather(rows, [2, 0, 1, 2], 3).tolist() == [[10.0], [20.0], [30.0]]


def test_an_error_about_indivisible_heads_names_the_valid_sizes() -> None:
    check_heads(WAN, 4, WanPolicy.sequence_plan)
    with pytest.raises(ConfigError, match=r"sequence is 8, .* 12 attention heads; .* \[1, 2, 3, 4, 6, 12\]"):
        check_heads(WAN, 8, WanPolicy.sequence_plan)
    with pytest.raises(ConfigError, match="AllegroTransformer3DModel cannot be split"):
        check_heads({**WAN, "_class_name": "AllegroTransformer3DModel"}, 2, None)


def test_an_error_about_an_indivisible_world_names_the_valid_sizes() -> None:
    config = small_recipe(Path("unused"), Path("unused"), rollout={"micro_batch_size": 2})
    config = config.__class__(**{**vars(config), "parallel": ParallelConfig(sequence=4)})
    check_world(config, 8)
    with pytest.raises(ConfigError, match=r"parallel.sequence is 4, which does not divide 6 ranks .* \[1, 2, 3, 6\]"):
        check_world(config, 6)
    with pytest.raises(ConfigError, match="do not divide into 3 sequence groups x micro_batch_size 2"):
        check_world(config, 12)
