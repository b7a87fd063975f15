"""When ZeRO-3 gathers all weights for an update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from bpgo_video.distributed import gathering
from bpgo_video.distributed.gathering import WhenGathered
from bpgo_video.distributed.memory import Growth
from bpgo_video.distributed.mesh import Mesh

CPU, GPU = (Mesh(rank=0, world_size=1, device=torch.device(kind)) for kind in ("cpu", "cuda"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The work that each decision of `auto` left room for; up to 100 bytes leave enough. Work takes 70 bytes."""
    found: list[int] = []

    @contextmanager
    def whole(engine: object) -> Iterator[None]:
        yield

    @contextmanager
    def measured(device: torch.device) -> Iterator[Growth]:
        growth = Growth()
        yield growth
        growth.bytes = 70

    def fits(missing: int, mesh: Mesh, work: int) -> bool:
        found.append(work)
        return work <= 100

    monkeypatch.setattr(gathering, "whole_weights", whole)
    monkeypatch.setattr(gathering, "missing_bytes", lambda engine: 1)
    monkeypatch.setattr(gathering, "peak_growth", measured)
    monkeypatch.setattr(gathering, "fits_everywhere", fits)
    return found


def decisions(when: WhenGathered) -> list[bool]:
    found = []
    for _ in range(3):
        with when() as gathered:
            found.append(gathered)
    return found


@pytest.mark.parametrize(
    ("setting", "mesh", "measures", "expected", "left"),
    [
        ("gathered", GPU, True, [True] * 3, []),
        ("sharded", GPU, True, [False] * 3, []),
        ("auto", CPU, True, [True] * 3, [0] * 3),  # a CPU's work cannot be measured
        ("auto", GPU, False, [True] * 3, [0] * 3),
        ("auto", GPU, True, [False, True, True], [70, 70]),  # the first update is measured
    ],
)
def test_weights_are_gathered_by_setting_or_room(
    asked: list[int], setting: str, mesh: Mesh, measures: bool, expected: list[bool], left: list[int]
) -> None:
    assert decisions(WhenGathered(setting, None, mesh, measures=measures)) == expected
    assert asked == left
