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


@pytest.mark.parametrize("sizes", [(2, 4, 1, 2, 2), (1, 8, 2, 4, 2)], ids=["whole_trees", "parts_of_a_tree"])
def test_trees_on_two_ranks_equal_those_of_one(policy: Policy, tmp_path: Path, sizes: tuple[int, ...]) -> None:
    """Several forwards for each step of a tree, with sharded weights."""
    run_ranks(2, [str(tmp_path), *map(str, sizes)], worker="prefix_worker", timeout=240)
    found: dict[str, Latents] = {}
    for rank in range(2):
        for case, paths in torch.load(tmp_path / f"rank{rank}.pt").items():
            found[case] = found.get(case, {}) | paths
    expected = rollout(policy, drawn("batch"), Mesh(0, 1, torch.device("cpu")), *sizes)
    assert found["batch-sharded"].keys() == found["batch-gathered"].keys() == expected.keys()
    for sample, path in expected.items():
        assert torch.equal(found["batch-sharded"][sample], found["batch-gathered"][sample])
        torch.testing.assert_close(found["batch-sharded"][sample], path, rtol=0, atol=1e-5)


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
