"""Parameters joined from ZeRO shards one at a time: bit-equal to the result of DeepSpeed's tool."""

from __future__ import annotations

import io
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from bpgo_video.distributed.manifest import CheckpointError
from bpgo_video.distributed.zero_files import ZeroParameters
from tests.distributed.worker import resident_megabytes
from tests.made.zero_checkpoints import write_checkpoint

SHAPES = st.lists(st.lists(st.integers(1, 7), max_size=3), min_size=1, max_size=6)


def joined_by_deepspeed(folder: Path) -> dict[str, torch.Tensor]:
    with redirect_stdout(io.StringIO()):
        return get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), folder.name, exclude_frozen_parameters=True)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([1, 2, 3]), st.integers(1, 5), SHAPES, SHAPES)
def test_every_joined_parameter_equals_the_original(stage: int, world_size: int, first: list, second: list) -> None:
    groups = [
        {f"{group}.{number}": torch.randn(shape) for number, shape in enumerate(shapes)}
        for group, shapes in enumerate((first, second))
    ]
    with tempfile.TemporaryDirectory() as folder:
        found = ZeroParameters(write_checkpoint(Path(folder) / "step", groups, stage, world_size))
        expected = joined_by_deepspeed(Path(folder) / "step")
        assert list(found) == list(expected) == [*groups[0], *groups[1]]
        for name, tensor in {**groups[0], **groups[1]}.items():
            assert torch.equal(found[name], tensor)
            assert torch.equal(found[name], expected[name])


def test_buffers_and_shared_parameters_are_included(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "step", [{"weight": torch.randn(3, 2)}], stage=2, world_size=1)
    model = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=True)
    model["module"] = {"scale": torch.ones(2).bfloat16(), "count": torch.tensor([3]), "weight": torch.zeros(3, 2)}
    model |= {"buffer_names": ["scale", "count"], "shared_params": {"tied": "weight"}}
    torch.save(model, folder / "mp_rank_00_model_states.pt")
    found, expected = dict(ZeroParameters(folder)), joined_by_deepspeed(folder)
    assert list(found) == list(expected) == ["scale", "count", "weight", "tied"]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [tensor.dtype for tensor in found.values()] == [torch.float32, torch.int64, torch.float32, torch.float32]


def test_values_that_align_parameters_are_skipped(tmp_path: Path) -> None:
    tensors = {"first": torch.randn(3), "alignment": torch.full((5,), 9.0), "second": torch.randn(2, 2)}
    folder = write_checkpoint(tmp_path / "step", [tensors], stage=2, world_size=2)
    model = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=True)
    del model["param_shapes"][0]["alignment"]
    torch.save(model, folder / "mp_rank_00_model_states.pt")
    for path in folder.glob("*_optim_states.pt"):
        content = torch.load(path, weights_only=False)
        content["optimizer_state_dict"]["param_alignment_paddings"] = [[5, 0]]
        torch.save(content, path)
    found = ZeroParameters(folder)
    assert list(found) == ["first", "second"]
    assert all(torch.equal(found[name], tensors[name]) for name in found)


@pytest.mark.parametrize("stage", [2, 3])
def test_only_one_parameter_is_in_memory_at_a_time(tmp_path: Path, stage: int) -> None:
    megabytes, count = 8, 20
    tensors = {str(i): torch.full((megabytes, 250_000), float(i)) for i in range(count)}
    folder = write_checkpoint(tmp_path / "step", [tensors], stage)
    del tensors
    parameters = ZeroParameters(folder)
    sum(float(tensor[0, 0]) for tensor in parameters.values())  # allocations of the first use
    before = resident_megabytes("RssAnon")  # without the mapped files, whose pages the kernel can drop
    found = [(float(tensor[0, 0]), resident_megabytes("RssAnon")) for tensor in parameters.values()]
    assert sum(value for value, _ in found) == sum(range(count))
    assert max(resident for _, resident in found) - before < 4 * megabytes < count * megabytes / 4


@pytest.mark.parametrize("stage", [2, 3])
def test_shards_of_the_wrong_length_are_an_error(tmp_path: Path, stage: int) -> None:
    folder = write_checkpoint(tmp_path / "step", [{"weight": torch.randn(100)}], stage)
    write_checkpoint(tmp_path / "other", [{"weight": torch.randn(90)}], stage)
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    (folder / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(CheckpointError, match="the parameters take"):
        ZeroParameters(folder)
