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

# Ranks; prompts, samples of each, micro-batch size. Of two ranks the first has two of three prompts; of three ranks the
# second has samples of both prompts, and needs two prefixes. In the last two layouts every rank has samples of every
# prompt, and the ranks exchange their prefixes.
LAYOUTS = ((2, (3, 4, 4)), (3, (2, 5, 1)), (2, (3, 4, 2)), (3, (2, 6, 1)))
Sampled = tuple[tuple[int, int, int], dict[str, Latents]]


@pytest.fixture(scope="module", params=LAYOUTS, ids=["own", "uneven", "spread", "spread_over_three"])
def sampled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sampled:
    """The sizes, and the paths of all ranks' samples by case."""
    ranks, sizes = request.param
    output: Path = tmp_path_factory.mktemp("prefixes")
    run_ranks(ranks, [str(output), *map(str, sizes)], worker="prefix_worker", timeout=240)
    parts = [torch.load(output / f"rank{rank}.pt") for rank in range(ranks)]
    return sizes, {case: {sample: path for part in parts for sample, path in part[case].items()} for case in parts[0]}


@pytest.mark.parametrize("share_steps", ["group", "batch"])
def test_prefixes_on_several_ranks_equal_those_of_one(sampled: Sampled, policy: Policy, share_steps: str) -> None:
    (prompts, group_size, size), found = sampled
    config = drawn(share_steps)
    first = {min(trained_steps_of(policy, config, step)(row)) for step in STEPS for row in range(prompts)}
    assert len(first) > 1, "the draws differ"
    expected = rollout(policy, config, Mesh(0, 1, torch.device("cpu")), prompts, group_size, size)
    sharded, gathered = (found[f"{share_steps}-{parameters}"] for parameters in ("sharded", "gathered"))
    assert sharded.keys() == gathered.keys() == expected.keys()
    for sample, path in expected.items():
        assert torch.equal(sharded[sample], gathered[sample])
        torch.testing.assert_close(sharded[sample], path, rtol=0, atol=1e-5)
