"""Check a recipe on its own ranks, in minutes, before a long run.

    bpgo-video doctor --config tiny_wan_bpgo --ranks 2
    deepspeed --hostfile HOSTS --module bpgo_video.commands.doctor --config my_recipe.yaml

Checks in this order: the velocity equals that of the folder's transformer in fp32; the ODE rollout equals diffusers'
sampling loop; rewards differ between samples of a prompt; replay gives a ratio of 1; the gradient flows; time and
memory of a step. Takes every flag of training, reads the same inputs, and saves nothing. Exit code: 0 if every check
passes, 1 if one fails, 2 if the inputs are wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bpgo_video.cli import help_of, launch_if_ranks
from bpgo_video.config.bpgo import Config
from bpgo_video.config.command_line import load_config
from bpgo_video.config.rules import check_world
from bpgo_video.distributed import engine
from bpgo_video.distributed.heartbeat import Heartbeat
from bpgo_video.distributed.mesh import Mesh, make_mesh
from bpgo_video.training.doctor import diagnose
from bpgo_video.training.loop import INPUT_ERRORS, launched
from bpgo_video.training.session import build_session, check_inputs


def is_healthy(config: Config, mesh: Mesh, heartbeat: Heartbeat) -> bool:
    """Run every check on the first batch of prompts; prints the results."""
    check_world(config, mesh.world_size)
    mesh = make_mesh(mesh.device, config.parallel.sequence)
    session = build_session(config, mesh, *check_inputs(config, mesh))
    prompts, _ = next(session.batches())
    return diagnose(session, prompts, heartbeat)


def main(arguments: Sequence[str] | None = None, script: str | None = None) -> int:
    words = launch_if_ranks("bpgo_video.commands.doctor", arguments)
    config = load_config(words, **help_of("doctor", __doc__, script, ranks=True))
    with launched():
        mesh = engine.start_ranks()
        with Heartbeat(mesh, config.parallel.heartbeat_timeout, expected=INPUT_ERRORS) as heartbeat:
            healthy = is_healthy(config, mesh, heartbeat)
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
