"""Whether a rollout gathers all weights is a stated rule about free memory."""

from __future__ import annotations

import pytest
import torch

from bpgo_video.distributed import memory
from bpgo_video.distributed.mesh import Mesh

ALONE = Mesh(0, 1, torch.device("cpu"))


@pytest.mark.parametrize(("missing", "fits"), [(400, True), (500, True), (501, False)])
def test_weights_may_take_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch, missing: int, fits: bool) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    assert memory.fits_everywhere(missing, ALONE) is fits


def test_ranks_of_one_host_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = memory.free_bytes(ALONE.device)
    monkeypatch.setenv("LOCAL_SIZE", "4")
    assert memory.free_bytes(ALONE.device) == pytest.approx(alone / 4, rel=0.2)
