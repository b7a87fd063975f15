"""What shared prefixes and trees save: python -m tools.bench.prefixes --recipe tiny_wan_branch

One rank samples, decodes and replays the recipe's videos as it says, and without `rollout.branches` or without
`rollout.same_start` too, in turn, over several draws of the trained steps. Prints ratios of processor seconds and of
samples in the transformer's forwards: those of these draws, and the expected ones.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from typing import Any

import torch

from bpgo_video.commands.shipped import PROMPTS
from bpgo_video.config.bpgo import Config
from bpgo_video.config.reading import read_yaml
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.learner.bpgo import GroupAdvantages
from bpgo_video.policies import Policy, load_policy
from bpgo_video.randomness import keyed_noise
from bpgo_video.rollouts.denoiser import training_denoiser
from bpgo_video.rollouts.forwards import expected_forwards, expected_replays
from bpgo_video.rollouts.replay import Replay
from bpgo_video.rollouts.rollout import sample_chunks
from bpgo_video.rollouts.rules import sampled_steps
from bpgo_video.types import PromptBatch, Trajectory

DRAWS = 20
ALONE = Mesh(0, 1, torch.device("cpu"))
Spent = dict[str, float]  # processor seconds and samples in forwards, of rollout and of replay


def prompts_of(policy: Policy, count: int) -> PromptBatch:
    texts = tuple(json.loads(line)["prompt"] for line in PROMPTS.read_text("utf-8").splitlines()[:count])
    return PromptBatch(torch.arange(count), texts, policy.encode(texts), policy.encode([""]))


def variants(config: Config) -> dict[str, Config]:
    """The recipe, and what it is compared with."""

    def changed(**values: Any) -> Config:
        return replace(config, rollout=replace(config.rollout, **values))

    found = {"recipe": config, "without rollout.same_start": changed(same_start=False, branches=())}
    return found | ({"without rollout.branches": changed(branches=())} if config.rollout.branches else {})


def sample(policy: Policy, config: Config, prompts: PromptBatch, step: int) -> list[Trajectory]:
    """The rollout of a training step."""
    chunks = sample_chunks(
        training_denoiser(policy, config), prompts, ALONE, group_size=config.rollout.group_size,
        micro_batch_size=config.rollout.micro_batch_size, latent_shape=policy.latent_shape(config.video),
        key=(config.run.seed, "rollout", step), trained_steps=sampled_steps(policy, config, step),
        same_start=config.rollout.same_start, branching=config.rollout.branches,
    )  # fmt: skip
    return [trajectory for chunk in chunks for trajectory in chunk.trajectories]


def replay(policy: Policy, config: Config, prompts: PromptBatch, trajectories: list[Trajectory]) -> None:
    """The forwards and backwards of a rollout's updates, with advantages drawn at random."""
    drawn = keyed_noise((len(prompts), config.rollout.group_size), [("advantages",)], "cpu")[0]
    advantages = GroupAdvantages(drawn, drawn.flip(1), torch.ones(len(prompts)))
    objective = Replay(policy, config, prompts, advantages, 0, ALONE.device)
    for trajectory in trajectories:
        for index in objective.passes(trajectory):
            for part in objective.parts(trajectory, index):
                objective.loss(part, index).value.backward()
    policy.transformers.zero_grad()


def measure(policy: Policy, config: Config, prompts: PromptBatch, step: int, rows: list[int]) -> Spent:
    """One rollout and its replay; `rows` gets the samples of each forward."""
    spent: Spent = {}
    trajectories: list[Trajectory] = []
    works = {"rollout": lambda: trajectories.extend(sample(policy, config, prompts, step)),
             "replay": lambda: replay(policy, config, prompts, trajectories)}  # fmt: skip
    for name, work in works.items():
        rows.clear()
        started = time.process_time()
        work()
        spent |= {
            f"{name}: processor seconds": time.process_time() - started,
            f"{name}: samples in forwards": sum(rows),
        }
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.prefixes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="tiny_wan_bpgo", help="a shipped recipe of the embedded policy, or a file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = read_yaml(args.recipe)
    policy = load_policy(config.policy.folder, max_sequence_length=config.policy.max_sequence_length)
    rows: list[int] = []
    for transformer in policy.transformers.values():
        transformer.register_forward_pre_hook(
            lambda _, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
        )
    prompts, compared = prompts_of(policy, config.rollout.prompts_per_step), variants(config)
    spent: dict[str, list[Spent]] = {name: [] for name in compared}
    for step in range(-1, DRAWS):  # the first is a warm-up
        for name in list(compared)[:: 1 if step % 2 else -1]:
            spent[name] += [measure(policy, compared[name], prompts, step, rows)] * (step >= 0)
    for other in list(compared)[1:]:
        print(f"{DRAWS} rollouts and replays, relative to those {other} (single draws):")
        for key in spent["recipe"][0]:
            ours, theirs = ([each[key] for each in spent[name]] for name in ("recipe", other))
            ratios = [one / base for one, base in zip(ours, theirs, strict=True)]
            print(f"  {key:30} {sum(ours) / sum(theirs):.3f} ({min(ratios):.2f} to {max(ratios):.2f})")
        pair = (config, compared[other])
        forwards, replays = [expected_forwards(one, 1) for one in pair], [sum(expected_replays(one, 1)) for one in pair]
        print(f"  {'rollout: forwards, expected':30} {forwards[0] / forwards[1]:.3f}")
        print(f"  {'replay: forwards, expected':30} {replays[0] / replays[1]:.3f}")


if __name__ == "__main__":
    main()
