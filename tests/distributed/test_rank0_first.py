"""Work of rank 0 alone: the others poll for its marker and not in a collective, and a failure is seen, too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bpgo_video.distributed import agreement
from bpgo_video.distributed.mesh import Mesh

CPU = torch.device("cpu")


def test_rank_0_works_and_leaves_a_marker(tmp_path: Path) -> None:
    done: list[str] = []
    agreement.rank0_first(lambda: done.append("work"), Mesh(0, 1, CPU), tmp_path / "aside" / "done")
    assert done == ["work"]
    assert (tmp_path / "aside" / "done").is_dir()


def test_a_failure_leaves_a_marker_so_that_nobody_waits_for_ever(tmp_path: Path) -> None:
    def fails() -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        agreement.rank0_first(fails, Mesh(0, 1, CPU), tmp_path / "done")
    assert (tmp_path / "done").is_dir()


def test_another_rank_does_not_work_and_goes_on_when_the_marker_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "POLL_SECONDS", 0.01)
    looked, marker = [], tmp_path / "done"
    monkeypatch.setattr(
        agreement.time, "sleep", lambda seconds: looked.append(seconds) or (len(looked) == 3 and marker.mkdir())
    )
    agreement.rank0_first(lambda: pytest.fail("rank 1 must not work"), Mesh(1, 1, CPU), marker)
    assert looked == [0.01] * 3
