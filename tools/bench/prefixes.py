"""What shared prefixes save of a rollout: python -m tools.bench.prefixes --recipe tiny_wan_bpgo

One rank samples and decodes the recipe's videos with and without `rollout.same_start`, in turn, over several draws of
the trained steps. Prints the ratio of processor seconds, and that of samples in forwards: of these draws, and expected.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace

import torch

from bpgo_video.commands.shipped import PROMPTS
from bpgo_video.config.bpgo import Config
from bpgo_video.config.reading import read_yaml
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.policies import Policy, load_policy
from bpgo_video.rollouts.denoiser import training_denoiser
from bpgo_video.rollouts.forwards import expected_forwards
from bpgo_video.rollouts.prefixes import branches
from bpgo_video.rollouts.rollout import sample_chunks
from bpgo_video.rollouts.rules import sampled_steps
from bpgo_video.types import PromptBatch

DRAWS = 20
ALONE = Mesh(0, 1, torch.device("cpu"))


def prompts_of(policy: Policy, count: int) -> PromptBatch:
    texts = tuple(json.loads(line)["prompt"] for line in PROMPTS.read_text("utf-8").splitlines()[:count])
    return PromptBatch(torch.arange(count), texts, policy.encode(texts), policy.encode([""]))


def sample(policy: Policy, config: Config, prompts: PromptBatch, step: int, same_start: bool) -> None:
    """The rollout of a training step."""
    for _ in sample_chunks(
        training_denoiser(policy, config), prompts, ALONE, group_size=config.rollout.group_size,
        micro_batch_size=config.rollout.micro_batch_size, latent_shape=policy.latent_shape(config.video),
        key=(config.run.seed, "rollout", step), trained_steps=sampled_steps(policy, config, step),
        same_start=same_start,
    ):  # fmt: skip
        pass


def samples_in_forwards(policy: Policy, config: Config, prompts: PromptBatch, step: int) -> int:
    """Samples of all forwards of a rollout with shared prefixes."""
    trained, rollout, num_steps = sampled_steps(policy, config, step), config.rollout, config.sampler.num_steps
    first = [min(trained(prompt), default=num_steps) for prompt in prompts.ids.tolist()]
    planned = branches(first, ALONE, rollout.group_size, rollout.micro_batch_size)
    prefixes = sum(len(rows) * end for rows, end in zip(planned.batches, planned.ends, strict=True))
    return prefixes + sum(rollout.micro_batch_size * (num_steps - branch) for branch in planned.steps)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.prefixes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="tiny_wan_bpgo", help="a shipped recipe of the embedded policy, or a file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = read_yaml(args.recipe)
    policy = load_policy(config.policy.folder, max_sequence_length=config.policy.max_sequence_length)
    prompts = prompts_of(policy, config.rollout.prompts_per_step)
    times: dict[bool, list[float]] = {True: [], False: []}
    for step in range(-1, DRAWS):  # the first is a warm-up
        for same_start in (True, False) if step % 2 else (False, True):
            started = time.process_time()
            sample(policy, config, prompts, step, same_start)
            times[same_start] += [time.process_time() - started] * (step >= 0)
    ratios = [shared / apart for shared, apart in zip(times[True], times[False], strict=True)]
    apart = replace(config, rollout=replace(config.rollout, same_start=False))
    whole = len(prompts) * config.rollout.group_size * config.sampler.num_steps
    counted = statistics.mean(samples_in_forwards(policy, config, prompts, step) for step in range(DRAWS))
    print(f"{DRAWS} rollouts, with shared prefixes relative to without:")
    print(f"  processor seconds    {sum(times[True]) / sum(times[False]):.3f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"  samples in forwards  {counted / whole:.3f}")
    print(f"  the same, expected   {expected_forwards(config, 1) / expected_forwards(apart, 1):.3f}")


if __name__ == "__main__":
    main()
