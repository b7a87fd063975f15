"""Serve one reward of a recipe to runs on other machines, which name it as `model: remote` (docs/rewards.md).

    bpgo-video reward-server --config my_recipe.yaml --reward quality --port 8011
    bpgo-video reward-server --config my_recipe.yaml --reward quality --port 8011 --host 0.0.0.0 --token-env TOKEN

Runs until SIGTERM or Ctrl-C, and scores received requests before it stops. Listens on loopback only; --host lets other
machines send requests, and then requires a token from --token-env.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

from bpgo_video.cli import Parser, device, help_of, port, positive, run_command
from bpgo_video.config.bpgo import ConfigError, RewardConfig
from bpgo_video.config.reading import read_yaml
from bpgo_video.errors import unknown


def reward_named(recipe: Path, name: str) -> RewardConfig:
    """The recipe's entry in `rewards` or `evaluation.rewards`.

    Raises:
        ConfigError: there is none, or the entry itself names a server.
    """
    config = read_yaml(recipe)
    rewards = {**config.evaluation.rewards, **config.rewards}
    if name not in rewards:
        raise ConfigError(f"{recipe}: {unknown('--reward', name, sorted(rewards))}")
    if rewards[name].model == "remote":
        raise ConfigError(
            f"rewards.{name}.model of {recipe} is 'remote', a client of a server; give --config a recipe that names "
            "the model to serve"
        )
    return rewards[name]


def serve(args: argparse.Namespace) -> None:
    token = os.environ.get(args.token_env) if args.token_env else None
    if args.token_env and not token:
        raise ConfigError(f"--token-env names {args.token_env}, which is unset or empty; export {args.token_env}=...")
    reward = reward_named(args.config, args.reward)

    import torch

    from bpgo_video.rewards.reward import build_models
    from bpgo_video.rewards.server import Limits, RewardServer, RewardService, check_exposure

    check_exposure(args.host, token)
    run_on = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, *_ = build_models(args.reward, reward, run_on)
    service = RewardService(model, run_on, args.kept)
    limits = Limits(waiting=args.waiting, bytes=args.max_megabytes * 2**20)
    with RewardServer(service, args.host, args.port, token, limits) as server:

        def stop(*_: object) -> None:
            threading.Thread(target=server.shutdown).start()  # shutdown waits for serve_forever, in this thread

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        host, port = map(str, server.server_address[:2])
        print(f"reward {args.reward} ({model.version}) at http://{host}:{port}", flush=True)
        server.serve_forever()
    service.close()


def main(words: Sequence[str], script: str | None = None) -> int:
    parser = Parser(**help_of("reward-server", __doc__, script))
    add = parser.add_argument
    add("--config", type=Path, required=True, help="recipe")
    add("--reward", required=True, help="name in the recipe's rewards or evaluation.rewards")
    add("--port", type=port, required=True, help="0 takes a free one")
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add("--token-env", help="environment variable with the token that clients must send")
    add("--device", type=device, help="cpu, cuda or cuda:1 (cuda if there is one)")
    for name, number, text in (
        ("--waiting", 8, "requests held in memory at once"),
        ("--max-megabytes", 1024, "size limit of one request"),
        ("--kept", 4096, "scores kept for requests that are sent again"),
    ):
        add(name, type=positive, default=number, help=f"{text} (%(default)s)")
    parser.set_defaults(run=serve)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    return run_command(parser, words)
