"""Universal checkpoints: whole parameters converted from verified files, or no output."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bpgo_video.distributed.manifest import CheckpointError
from bpgo_video.distributed.zero_files import to_universal
from tests.made.zero_checkpoints import write_checkpoint

SHAPES = {"weight": (3, 5), "bias": (3,), "gate": (1,)}
STATES = ("fp32", "exp_avg", "exp_avg_sq")


def write_zero3(folder: Path, world_size: int, moments: bool = True) -> dict[str, dict[str, torch.Tensor]]:
    """Write a ZeRO-3 checkpoint; return its unsharded states by name."""
    generator = torch.Generator().manual_seed(0)
    states = {
        state: {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for state in STATES
    }
    adam = [states["exp_avg"], states["exp_avg_sq"]] if moments else None
    write_checkpoint(folder, [states["fp32"]], 3, world_size, adam)
    return states


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_state_of_every_parameter_is_whole(tmp_path: Path, world_size: int) -> None:
    states = write_zero3(tmp_path / "step-000002", world_size)
    output = to_universal(tmp_path / "step-000002", tmp_path / "universal")
    for state, tensors in states.items():
        for name, tensor in tensors.items():
            found = torch.load(output / "zero" / name / f"{state}.pt", weights_only=True)
            assert torch.equal(found, tensor.flatten())
    assert torch.load(output / "zero_pp_rank_0_mp_rank_00_model_states.pt")["progress"]["step"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"step-000002", "universal"}


class Payload:
    def __reduce__(self):
        return print, ("code in a checkpoint has run",)


@pytest.mark.parametrize("damage", ["code", "cut", "missing", "sgd"])
def test_an_inconvertible_checkpoint_leaves_no_output(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "step-000002"
    write_zero3(folder, 2, moments=damage != "sgd")
    last = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    if damage == "code":
        torch.save({"optimizer_state_dict": Payload()}, last)
    if damage == "cut":
        last.write_bytes(last.read_bytes()[:500])
    if damage == "missing":
        last.unlink()
    words = {"code": "print", "cut": "damaged", "missing": "written by 2 ranks", "sgd": "no moments"}
    with pytest.raises(CheckpointError, match=words[damage]):
        to_universal(folder, tmp_path / "universal")
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]
    assert "has run" not in capsys.readouterr().out


def test_a_conversion_that_fails_midway_leaves_no_output_and_names_the_error(tmp_path: Path) -> None:
    folder = tmp_path / "step-000002"
    write_zero3(folder, 2)
    (folder / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="mismatch"):
        to_universal(folder, tmp_path / "universal")
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


def test_an_existing_output_is_never_overwritten(tmp_path: Path) -> None:
    write_zero3(tmp_path / "step-000002", 1)
    (tmp_path / "universal").mkdir()
    (tmp_path / "universal" / "mine").write_text("kept")
    with pytest.raises(FileExistsError, match="universal exists"):
        to_universal(tmp_path / "step-000002", tmp_path / "universal")
    assert {path.name for path in tmp_path.iterdir()} == {"step-000002", "universal"}
