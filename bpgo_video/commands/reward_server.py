"""Serve one reward of a recipe to runs on other machines (`model: remote`): docs/rewards.md.

    bpgo-video reward-server --config my_recipe.yaml --reward quality --port 8011
    bpgo-video reward-server --config my_recipe.yaml --reward quality --port 8011 --host 0.0.0.0 --token-env TOKEN

Runs until SIGTERM or Ctrl-C, and scores received requests before it stops. Binds to loopback; with --host, other
machines can send requests, and need the token in the variable that --token-env names.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from bpgo_video.cli import Parser, device, positive, run_command, shown_as
from bpgo_video.config.bpgo import ConfigError, RewardConfig
from bpgo_video.config.reading import read_yaml
from bpgo_video.rewards.building import build_models
from bpgo_video.rewards.server import Limits, RewardServer, RewardService, check_exposure


def reward_named(recipe: Path, name: str) -> RewardConfig:
    """The recipe's entry, of `rewards` or `evaluation.rewards`.

    Raises:
        ConfigError: there is none, or it is itself a client of a server.
    """
    config = read_yaml(recipe)
    rewards = {**config.evaluation.rewards, **config.rewards}
    if name not in rewards:
        raise ConfigError(f"{recipe} has no reward {name!r}; it has {sorted(rewards)}")
    if rewards[name].model == "remote":
        rule = "this server needs a recipe that names the model itself"
        raise ConfigError(f"rewards.{name}.model of {recipe} is 'remote', the client of a server; {rule}")
    return rewards[name]


def serve(args: argparse.Namespace) -> None:
    token = os.environ.get(args.token_env) if args.token_env else None
    if args.token_env and not token:
        raise ConfigError(f"--token-env names {args.token_env}, which is not set or empty")
    check_exposure(args.host, token)
    device = torch.device(args.device)
    model, *_ = build_models(args.reward, reward_named(args.config, args.reward), device)
    service = RewardService(model, device, args.kept)
    limits = Limits(waiting=args.waiting, bytes=args.max_megabytes * 2**20)
    with RewardServer(service, args.host, args.port, token, limits) as server:

        def stop(*_: object) -> None:
            threading.Thread(target=server.shutdown).start()  # it waits for serve_forever, which runs in this thread

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        host, port = map(str, server.server_address[:2])
        print(f"reward {args.reward} ({model.version}) at http://{host}:{port}", flush=True)
        server.serve_forever()
    service.close()


def main(arguments: Sequence[str] | None = None, script: str | None = None) -> int:
    shown = shown_as("reward-server", __doc__, script)
    parser = Parser(**shown, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="recipe")
    parser.add_argument("--reward", required=True, help="its name in the recipe's rewards or evaluation.rewards")
    parser.add_argument("--port", type=int, required=True, help="0 takes a free one")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--token-env", help="environment variable with the token that clients must send")
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=gpu, help="cpu, cuda or cuda:1 (cuda where there is one)")
    parser.add_argument("--waiting", type=positive, default=8, help="requests in memory at once (8)")
    parser.add_argument("--max-megabytes", type=positive, default=1024, help="of one request (1024)")
    parser.add_argument("--kept", type=positive, default=4096, help="scores kept for repeated requests (4096)")
    parser.set_defaults(run=serve)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    return run_command(parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
