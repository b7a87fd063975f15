"""Measure the prior of every prompt: the rewards that the starting policy earns on it, stored with the prompts.

    bpgo-video priors --config tiny_wan_bpgo --ranks 2
    deepspeed --hostfile HOSTS --module bpgo_video.commands.priors --config my_recipe.yaml

Samples `prior.samples` videos for each prompt of `data.split` with the recipe's sampler, scores them with its rewards,
and writes SHARDS/priors/REWARD.json: mean, standard deviation and count per prompt, the scale s_ref (pooled
within-group standard deviation), the reward's version and the policy's hash. Measure again after a change of reward
version or starting policy. To continue an interrupted measurement, repeat the command.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bpgo_video.cli import help_of, launch_if_ranks
from bpgo_video.config.command_line import load_config
from bpgo_video.distributed import engine
from bpgo_video.distributed.heartbeat import Heartbeat
from bpgo_video.training.loop import INPUT_ERRORS, launched
from bpgo_video.training.prior_estimation import estimate


def main(arguments: Sequence[str] | None = None, script: str | None = None) -> int:
    words = launch_if_ranks("bpgo_video.commands.priors", arguments)
    config = load_config(words, **help_of("priors", __doc__, script, ranks=True))
    with launched():
        mesh = engine.start_ranks()
        with Heartbeat(mesh, config.parallel.heartbeat_timeout, expected=INPUT_ERRORS) as heartbeat:
            heartbeat.enter("priors")
            estimate(config, mesh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
