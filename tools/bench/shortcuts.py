"""What `rollout.guidance_every` saves of a rollout: python -m tools.bench.shortcuts

One rank samples and decodes the videos of `tiny_wan_bpgo` with guidance 3, with each setting in turn, over several
draws of the trained steps. Prints processor seconds relative to 1. `bpgo-video doctor` measures what the videos lose.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from bpgo_video.config.reading import read_yaml
from bpgo_video.policies import load_policy
from tools.bench.prefixes import prompts_of, sample

EVERY = (1, 2, 3)
DRAWS = 10
GUIDANCE_SCALE = 3.0


def main() -> None:
    torch.set_num_threads(1)
    config = read_yaml("tiny_wan_bpgo")
    config = replace(config, sampler=replace(config.sampler, guidance_scale=GUIDANCE_SCALE))
    policy = load_policy(config.policy.folder, max_sequence_length=config.policy.max_sequence_length)
    prompts, times = prompts_of(policy, config.rollout.prompts_per_step), dict.fromkeys(EVERY, 0.0)
    for step in range(-1, DRAWS):  # the first is a warm-up
        for every in EVERY if step % 2 else EVERY[::-1]:
            changed = replace(config, rollout=replace(config.rollout, guidance_every=every))
            started = time.process_time()
            sample(policy, changed, prompts, step)
            times[every] += (time.process_time() - started) * (step >= 0)
    print(f"{DRAWS} rollouts, guidance {GUIDANCE_SCALE:g}, processor seconds relative to guidance_every 1:")
    for every in EVERY[1:]:
        print(f"  guidance_every {every}  {times[every] / times[1]:.3f}")


if __name__ == "__main__":
    main()
