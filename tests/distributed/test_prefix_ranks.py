"""Shared prefixes on several ranks under ZeRO-3: no rank waits, and the latents are those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bpgo_video.distributed.mesh import Mesh
from bpgo_video.policies import Policy
from bpgo_video.rollouts.rules import trained_steps_of
from tests.distributed.conftest import run_ranks
from tests.distributed.prefix_worker import STEPS, Latents, drawn, rollout

pytestmark = pytest.mark.slow

# Ranks -> prompts, samples of each, micro-batch size. Two ranks divide the second of three prompts; of three ranks the
# second has samples of both prompts, and the others of one: it needs two prefixes, and they one.
LAYOUTS = {2: (3, 4, 2), 3: (2, 6, 1)}


@pytest.fixture(scope="module", params=LAYOUTS)
def sampled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Latents]]:
    """The number of ranks, and the paths of all their samples by case."""
    ranks: int = request.param
    output: Path = tmp_path_factory.mktemp("prefixes")
    run_ranks(ranks, [str(output), *map(str, LAYOUTS[ranks])], worker="prefix_worker", timeout=240)
    parts = [torch.load(output / f"rank{rank}.pt") for rank in range(ranks)]
    return ranks, {case: {sample: path for part in parts for sample, path in part[case].items()} for case in parts[0]}


@pytest.mark.parametrize("share_steps", ["group", "batch"])
def test_prefixes_on_several_ranks_equal_those_of_one(
    sampled: tuple[int, dict[str, Latents]], policy: Policy, share_steps: str
) -> None:
    ranks, found = sampled
    config, (prompts, group_size, size) = drawn(share_steps), LAYOUTS[ranks]
    first = {min(trained_steps_of(policy, config, step)(row)) for step in STEPS for row in range(prompts)}
    assert len(first) > 1, "the draws differ"
    expected = rollout(policy, config, Mesh(0, 1, torch.device("cpu")), prompts, group_size, size)
    sharded, gathered = (found[f"{share_steps}-{parameters}"] for parameters in ("sharded", "gathered"))
    assert sharded.keys() == gathered.keys() == expected.keys()
    for sample, path in expected.items():
        assert torch.equal(sharded[sample], gathered[sample])
        torch.testing.assert_close(sharded[sample], path, rtol=0, atol=1e-5)
