"""Trees: the samples of a prompt share their denoising until they split, at trained steps (`rollout.branches`).

BranchGRPO (arXiv 2509.06040). The samples are the leaves, in the order of their paths. A node is a latent that all
samples below it share; it is computed once, and each transition is replayed once. Departures from the paper: its
children draw independent noise, the samples below an edge count alike, each depth has the same weight in the loss, and
nothing is pruned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from bpgo_video.config.branching import leaves_below


@dataclass(frozen=True)
class Tree:
    """How samples that are denoised together share it; by default none shares anything.

    Attributes:
        samples: leaves, of whole trees or of an equal part of one.
        branches: children of each node at the first, second ... trained step; later ones have one.
        at_once: nodes of a forward.
    """

    samples: int
    branches: tuple[int, ...] = ()
    at_once: int | None = None

    def stride(self, depth: int) -> int:
        """Samples of a node before trained step `depth`; a part of a tree includes the nodes above it."""
        return min(self.samples, leaves_below(self.branches, depth))

    def batches(self, nodes: int) -> Iterator[slice]:
        """Nodes of each forward."""
        size = self.at_once or nodes
        return (slice(first, min(first + size, nodes)) for first in range(0, nodes, size))

    def of_samples(self, of_nodes: Tensor) -> Tensor:
        """The rows of nodes, for each of the samples below them."""
        below = self.samples // len(of_nodes)
        return of_nodes if below == 1 else of_nodes.repeat_interleave(below, dim=0)
