"""Rollouts and decoding against diffusers, in processor seconds of one thread, which other load disturbs little.

    bpgo-video demo --prepare
    python -m tools.bench.decoding

Prints the embedded policy's ratios, as in `make bench`, and then a line for each published model's VAE that policies
change when they load it, with random weights: the ratio of decoding, and the largest difference of pixels in [-1, 1].
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bpgo_video.config.reading import read_yaml
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.planning.models import diffusers_class, known_models
from bpgo_video.policies.vae import CHANNELS_LAST, prepare_vae
from tools.bench.timing import in_turn
from tools.bench.worker import against_diffusers, decoded

RECIPE = Path("pipelines/configs/tiny_wan_full.yaml")
LATENTS = (3, 6, 6)  # frames, height, width
SAMPLES, ROUNDS = 4, 5


def embedded() -> None:
    config = read_yaml(RECIPE)
    config = replace(config, evaluation=replace(config.evaluation, max_prompts=2))
    results = against_diffusers(config, Mesh(0, 1, torch.device("cpu")), time.process_time)
    for name, case in results["against_diffusers"].items():
        print(f"embedded policy, rollout, {name}: {case['ratio']:.2f}")
    print(f"embedded policy, decoding: {results['decoding_over_diffusers']:.2f}", flush=True)


def published() -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The first model with each VAE that `prepare_vae` changes on a CPU, and the VAE's config."""
    seen: list[Mapping[str, Any]] = []
    for name, model in known_models().items():
        if model.vae not in seen and model.vae["_class_name"] in CHANNELS_LAST:
            seen.append(model.vae)
            yield name, model.vae


def compare(name: str, config: Mapping[str, Any]) -> None:
    theirs, ours = (diffusers_class(config).from_config(dict(config)).eval().requires_grad_(False) for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    prepare_vae(ours, torch.float32)
    channels = ours.config.get("z_dim") or ours.config.latent_channels
    latents = torch.randn(SAMPLES, channels, *LATENTS, generator=torch.Generator().manual_seed(0))
    difference = (decoded(ours, latents) - decoded(theirs, latents)).abs().max()
    works = {"ours": partial(decoded, ours, latents), "diffusers": partial(decoded, theirs, latents)}
    times = in_turn(works, ROUNDS, time.process_time)
    print(f"{name}, decoding: {times['ours'] / times['diffusers']:.2f}, difference {difference:.0e}", flush=True)


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m tools.bench.decoding", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    torch.set_num_threads(1)
    embedded()
    for name, config in published():
        compare(name, config)


if __name__ == "__main__":
    main()
