"""EMA of sharded weights: its formula, bit-exact swapping, and files readable on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bpgo_video.config.bpgo import EmaConfig
from bpgo_video.distributed.ema import EMA, AverageParameters, decay_after, load_average, save_average
from bpgo_video.distributed.manifest import CheckpointError
from bpgo_video.distributed.optimizer import Shard, ZeroMasters

SHAPES = {"a.weight": (5, 7), "a.bias": (5,), "b.weight": (3, 2, 2)}
NO_WARMUP = EmaConfig(decay=0.9, warmup=False)


class Masters(ZeroMasters):
    """One rank's shard of random parameters: the elements of each between two fractions of its length."""

    def __init__(self, seed: int, cuts: tuple[float, float] = (0.0, 1.0)) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.whole = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        self.computed_with = {name: tensor.bfloat16() for name, tensor in self.whole.items()}
        self.cuts = cuts

    def shards(self) -> list[Shard]:
        found = []
        for name, tensor in self.whole.items():
            start, stop = (round(cut * tensor.numel()) for cut in self.cuts)
            if start < stop:
                found.append(Shard(name, tuple(tensor.shape), start, tensor.view(-1)[start:stop]))
        return found

    def publish(self) -> None:
        self.computed_with = {name: tensor.bfloat16() for name, tensor in self.whole.items()}


def parts(cuts: Sequence[float]) -> list[tuple[float, float]]:
    edges = [0.0, *sorted(cuts), 1.0]
    return list(pairwise(edges))


def test_the_average_is_the_weighted_sum_of_all_weights() -> None:
    masters = Masters(0)
    ema = EMA(masters, NO_WARMUP)
    weights, d, n = [masters.whole["a.weight"].double().numpy().copy()], 0.9, 20
    generator = torch.Generator().manual_seed(1)
    for _ in range(n):
        masters.whole["a.weight"].add_(torch.randn(5, 7, generator=generator))
        ema.update()
        weights.append(masters.whole["a.weight"].double().numpy().copy())
    expected = d**n * weights[0] + sum((1 - d) * d ** (n - k) * weights[k] for k in range(1, n + 1))
    np.testing.assert_allclose(ema.shards[0].values.view(5, 7).numpy(), expected, atol=1e-6)


def test_warm_up_weighs_the_first_updates_like_a_growing_window() -> None:
    config = EmaConfig(decay=0.999)
    assert decay_after(0, config) == 0.1
    assert decay_after(90, config) == 0.91
    assert decay_after(10**6, config) == 0.999
    assert decay_after(0, EmaConfig(decay=0.999, warmup=False)) == 0.999
    assert decay_after(0, EmaConfig(decay=0.05)) == 0.05


def test_small_changes_accumulate_that_bfloat16_would_lose() -> None:
    masters = Masters(0)
    masters.whole["a.bias"].fill_(1.0)
    masters.publish()
    ema = EMA(masters, EmaConfig(decay=0.999, warmup=False))
    rounded = masters.computed_with["a.bias"].clone()
    masters.whole["a.bias"].add_(0.01)
    masters.publish()
    for _ in range(1000):
        ema.update()
        rounded.lerp_(masters.computed_with["a.bias"], 1 - 0.999)
    assert torch.equal(rounded, torch.ones(5).bfloat16())
    moved = next(shard.values for shard in ema.shards if shard.name == "a.bias") - 1.0
    torch.testing.assert_close(moved, torch.full((5,), 0.01 * (1 - 0.999**1000)), atol=1e-5, rtol=0)


def test_weights_and_average_are_swapped_and_swapped_back_bit_for_bit() -> None:
    masters = Masters(0)
    ema = EMA(masters, NO_WARMUP)
    for tensor in masters.whole.values():
        tensor.mul_(1.1)
    masters.publish()
    ema.update()
    weights = {name: tensor.clone() for name, tensor in masters.whole.items()}
    computed_with = {name: tensor.clone() for name, tensor in masters.computed_with.items()}
    average = {shard.name: shard.values.clone() for shard in ema.shards}
    with ema.weights():
        for name, tensor in masters.computed_with.items():
            assert torch.equal(tensor.view(-1), average[name].bfloat16())
            assert not torch.equal(tensor, computed_with[name])
    for name in SHAPES:
        assert torch.equal(masters.whole[name], weights[name])
        assert torch.equal(masters.computed_with[name], computed_with[name])
    assert all(torch.equal(shard.values, average[shard.name]) for shard in ema.shards)


@given(st.lists(st.floats(0, 1), max_size=5), st.lists(st.floats(0, 1), max_size=5))
def test_files_are_readable_on_any_number_of_ranks(
    tmp_path_factory: pytest.TempPathFactory, writers: list[float], readers: list[float]
) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    for rank, cuts in enumerate(parts(writers)):
        ema = EMA(Masters(0, cuts), NO_WARMUP)
        ema.updates = 17
        save_average(ema, folder, rank)
    written = Masters(0).whole
    assert all(torch.equal(tensor, written[name]) for name, tensor in AverageParameters(folder).items())
    assert AverageParameters(folder).keys() == SHAPES.keys()
    for cuts in parts(readers):
        ema = EMA(Masters(1, cuts), NO_WARMUP)
        load_average(ema, folder)
        assert ema.updates == 17
        for found, expected in zip(ema.shards, Masters(0, cuts).shards(), strict=True):
            assert torch.equal(found.values, expected.values)


def test_missing_files_another_model_and_a_missing_average_are_reported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"ema.decay above 0"):
        dict(AverageParameters(tmp_path))
    for rank, cuts in enumerate(parts([0.5])):
        save_average(EMA(Masters(0, cuts), NO_WARMUP), tmp_path, rank)
    other = Masters(0)
    other.whole["a.bias"] = torch.zeros(6)
    with pytest.raises(CheckpointError, match=r"a.bias as \(5,\), the model as \(6,\)"):
        load_average(EMA(other, NO_WARMUP), tmp_path)
    (tmp_path / "ema-rank-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks \d+ elements of a"):
        dict(AverageParameters(tmp_path))


def test_a_parameter_of_the_average_is_read_on_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_average(EMA(Masters(0), NO_WARMUP), tmp_path, 0)
    read_elements, read = AverageParameters._read, []
    monkeypatch.setattr(
        AverageParameters, "_read", lambda saved, name, *run: read.append(name) or read_elements(saved, name, *run)
    )
    average = AverageParameters(tmp_path)
    assert set(average) == set(SHAPES)
    assert len(average) == len(SHAPES)
    assert read == []
    assert torch.equal(average["a.bias"], Masters(0).whole["a.bias"])
    assert read == ["a.bias"]
