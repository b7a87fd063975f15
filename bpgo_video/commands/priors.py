"""Measure the prior anchor of every prompt: what the starting policy earns on it. Stored with the prompts.

    bpgo-video priors --config tiny_wan_bpgo --ranks 2
    deepspeed --hostfile HOSTS --module bpgo_video.commands.priors --config my_recipe.yaml

Takes `prior.samples` videos per prompt of `data.split` with the recipe's own sampler, scores them with the recipe's
rewards, and writes SHARDS/priors/<reward>.json: mean, standard deviation and count per prompt, the scale s_ref (pooled
within-group standard deviation), the reward's version and the policy's hash. A recipe with another reward version or
starting policy needs its own measurement. An interrupted estimation continues where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bpgo_video.cli import on_ranks, shown_as
from bpgo_video.config.command_line import load_config
from bpgo_video.distributed import engine
from bpgo_video.distributed.heartbeat import Heartbeat
from bpgo_video.training.loop import launched
from bpgo_video.training.prior_estimation import estimate


def main(arguments: Sequence[str] | None = None, script: str | None = None) -> int:
    """Takes every flag of a run."""
    words = on_ranks("bpgo_video.commands.priors", arguments)
    config = load_config(words, **shown_as("priors", __doc__, script, ranks=True))
    with launched():
        mesh = engine.start_ranks()
        with Heartbeat(mesh, config.parallel.heartbeat_timeout) as heartbeat:
            heartbeat.enter("priors")
            estimate(config, mesh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
