"""Starts a run on the nodes of a Ray cluster: one torchrun on each, with the node's GPUs. Not run where it was written.

    ray job submit --working-dir . -- python docs/examples/ray_train.py 2 8 \
        --config my_recipe.yaml --run.dir /shared/runs/mine --run.resume auto

The first two numbers are nodes and GPUs of each. Nodes share the run's folder, prompt shards, models and an environment
with this package. If a node fails, the ranks of the others end too, and so does the job: submit it again.
"""

from __future__ import annotations

import os
import subprocess
import sys

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

PORT = 29500


@ray.remote(num_cpus=0)
def address() -> str:
    return ray.util.get_node_ip_address()


@ray.remote(max_retries=0)
def start(rank: int, nodes: int, gpus: int, first: str, words: list[str]) -> int:
    command = [
        *("torchrun", "--nnodes", str(nodes), "--nproc-per-node", str(gpus), "--node-rank", str(rank)),
        *("--master-addr", first, "--master-port", str(PORT), "--module", "bpgo_video.train"),
        *words,
    ]
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "8"}, check=False).returncode


def main(nodes: int, gpus: int, words: list[str]) -> int:
    ray.init()
    group = placement_group([{"CPU": 1, "GPU": gpus}] * nodes, strategy="STRICT_SPREAD")
    ray.get(group.ready())
    places = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i) for i in range(nodes)]
    first = ray.get(address.options(scheduling_strategy=places[0]).remote())
    running = [
        start.options(num_gpus=gpus, scheduling_strategy=place).remote(rank, nodes, gpus, first, words)
        for rank, place in enumerate(places)
    ]
    return max(ray.get(running))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
