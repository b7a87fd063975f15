"""BPGO in one process with plain torch, to be read from top to bottom.

    python examples/minimal_bpgo.py --steps 3

It post-trains the embedded tiny Wan policy on the reward defined below. Each step samples a group of videos per prompt
by Flow-SDE (arXiv 2505.05470), scores them, computes trust and advantages relative to the prompt's anchor (BPGO,
arXiv 2511.18919), replays the recorded transitions with gradients, and updates the policy.

What the package adds, with the files in bpgo_video/:

    rollout      noise independent of the number of ranks, guidance, ODE steps between trained: rollouts/denoiser.py
    rewards      several models, scored during the rollout or on other machines: rewards/, docs/rewards.md
    priors       measured once and stored with the prompts, or running averages: learner/priors.py
    advantages   other trusts and norms, several rewards, best-of-n, step size: learner/bpgo.py, learner/trust.py
    losses       step weights, divergence masks, a reference penalty: diffusion/steps.py, learner/losses.py
    replay       micro-batches over ranks, and a check that the first ratio is 1: rollouts/replay.py
    updates      DeepSpeed ZeRO, mixed precision, schedules: distributed/engine.py
    the loop     held-out evaluation, checkpoints, resume, reports: training/loop.py, training/rl.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bpgo_video.config.bpgo import VideoConfig
from bpgo_video.diffusion import Step, Transition, steps_of, transition
from bpgo_video.learner import BPGOAdvantages, PriorAnchor, bpgo_advantages
from bpgo_video.policies import Policy, guided_velocity, load_policy
from bpgo_video.rewards import Clips, FrameSampling, FrameScores
from bpgo_video.types import Guidance

PROMPTS = ("a red circle moving left", "a green object", "a blue square moving up", "a red triangle")
VIDEO = VideoConfig(num_frames=9, height=64, width=64, fps=8)  # the size that the embedded policy generates

GROUP_SIZE = 8  # G, samples per prompt
REFERENCE_SAMPLES = 4  # K, samples of the starting policy per anchor
NUM_STEPS = 8  # denoising steps; all but the last are stochastic and trained
ETA = 0.7  # noise of Flow-SDE, as in its paper
GUIDANCE = 1.0  # the embedded policy works without classifier-free guidance

ALPHA, K, CONTRAST, ZETA = 0.5, 1.0, 1.0, 0.5  # trust, transformation, and weight of the second surrogate
CLIP_RANGE = 1e-3  # log-probs are means over latent dimensions, so ratios stay near 1
UPDATES = 2  # optimizer updates per rollout; only the second has ratios other than 1
LEARNING_RATE, WEIGHT_DECAY, MAX_NORM = 1e-4, 0.01, 1.0


class NamedColour:
    """Example of a custom reward: the share of each frame in the colour that the prompt names."""

    name, version, kind = "named_colour", "1", "real"
    range = (0.0, 1.0)
    higher_is_better, differentiable = True, True
    frames = FrameSampling()  # scores all frames
    colours = {"red": (0.9, 0.15, 0.15), "green": (0.15, 0.8, 0.2), "blue": (0.2, 0.3, 0.95)}

    def __call__(self, clips: Clips) -> FrameScores:  # clips.videos: (samples, frames, 3, height, width) in [0, 1]
        target = torch.tensor([self.colours[text.split()[1]] for text in clips.texts])[:, None, :, None, None]
        distance = (clips.videos - target).square().sum(dim=2).sqrt()
        return FrameScores((-((distance / 0.3) ** 2)).exp().mean(dim=(2, 3)), clips.times)


class Group(NamedTuple):
    """The data of one prompt's samples for replay.

    Attributes:
        path: latents at each noise level, from noise to data.
        log_probs: log-probs of each transition of the path except the last.
    """

    guidance: Guidance
    path: list[Tensor]
    log_probs: list[Tensor]


def step_of(policy: Policy, latents: Tensor, step: Step, guidance: Guidance, sampler: str) -> Transition:
    """The transition of one denoising step; rollout and replay share it, so that replay is exact."""
    velocity = guided_velocity(policy, latents, step.sigma.float(), guidance, GUIDANCE)
    return transition(sampler, velocity, latents, step, ETA)


@torch.no_grad()
def sample(policy: Policy, prompt: str, count: int, steps: list[Step], generator: torch.Generator) -> Group:
    """Sample videos of one prompt as latents. Every step draws noise except the last, which follows the ODE."""
    conditioning = {name: value.repeat_interleave(count, dim=0) for name, value in policy.encode([prompt]).items()}
    guidance = Guidance(towards=conditioning, away={})
    shape = (count, *policy.latent_shape(VIDEO))
    path, log_probs = [policy.start(torch.randn(shape, generator=generator), conditioning)], []
    for step in steps[:-1]:
        taken = step_of(policy, path[-1], step, guidance, "flow_sde")
        path.append(taken.sample(torch.randn(shape, generator=generator)))
        log_probs.append(taken.log_prob(path[-1]))
    path.append(step_of(policy, path[-1], steps[-1], guidance, "ode").mean)
    return Group(guidance, path, log_probs)


def sample_and_score(
    policy: Policy, reward: NamedColour, count: int, steps: list[Step], generator: torch.Generator
) -> tuple[list[Group], Tensor]:
    """A group per prompt, and rewards [prompts x group], each the mean over a video's frames."""
    groups, rewards = [], []
    for prompt in PROMPTS:
        group = sample(policy, prompt, count, steps, generator)
        videos = policy.decode(group.path[-1], group.guidance.towards)
        rewards.append(reward(Clips(videos, VIDEO.fps, (prompt,) * count)).values.mean(dim=1))
        groups.append(group)
    return groups, torch.stack(rewards)


def surrogate(ratio: Tensor, advantage: Tensor) -> Tensor:
    """The clipped surrogate of PPO (arXiv 1707.06347), per sample, to be minimised."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE) * advantage)


def replay(policy: Policy, groups: list[Group], estimate: BPGOAdvantages, trained: range, steps: list[Step]) -> Tensor:
    """Accumulate gradients of the total loss over some of the denoising steps; return ratios (transitions, samples).

    Each transition has a separate forward and backward, so memory does not depend on the length of the path.
    """
    ratios = []
    for row, group in enumerate(groups):
        for index in trained:
            replayed = step_of(policy, group.path[index], steps[index], group.guidance, "flow_sde")
            ratio = (replayed.log_prob(group.path[index + 1]) - group.log_probs[index]).exp()
            loss = estimate.trust[row] * surrogate(ratio, estimate.advantage[row])
            if estimate.contrastive is not None:
                loss = loss + ZETA * surrogate(ratio, estimate.contrastive[row])
            (loss.mean() / (len(groups) * len(trained))).backward()
            ratios.append(ratio.detach())
    return torch.stack(ratios)


def train(policy: Policy, num_steps: int, seed: int) -> Iterator[dict[str, float]]:
    """Train the policy's transformer in place; yield a record for each step."""
    generator, reward = torch.Generator().manual_seed(seed), NamedColour()
    steps = steps_of(policy.sigmas(NUM_STEPS, VIDEO))
    parameters = list(policy.transformers.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    # Mean reward of the starting policy on each prompt, R_prior, and the standard deviation of its samples, s_ref.
    _, reference = sample_and_score(policy, reward, REFERENCE_SAMPLES, steps, generator)
    anchor = PriorAnchor.of_samples(reference, reward.version)

    for _ in range(num_steps):
        began = time.perf_counter()

        groups, rewards = sample_and_score(policy, reward, GROUP_SIZE, steps, generator)

        # Trust w of each group; advantages A of the rewards and A~ of the transformed rewards.
        estimate = bpgo_advantages(rewards, anchor.mean, anchor.scale, ALPHA, K, CONTRAST, ZETA)

        # Each update replays its share of the denoising steps, relative to the log-probs of the rollout.
        ratios = []
        for update in range(UPDATES):
            optimizer.zero_grad()
            ratios.append(replay(policy, groups, estimate, range(update, NUM_STEPS - 1, UPDATES), steps))
            norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
            optimizer.step()

        yield {
            "reward": float(rewards.mean()),
            "trust_min": float(estimate.trust.min()),
            "trust_max": float(estimate.trust.max()),
            "first_ratio_error": float((ratios[0] - 1).abs().max()),  # exactly 0: the policy is unchanged
            "last_ratio_error": float((ratios[-1] - 1).abs().max()),
            "clipped": float(((ratios[-1] - 1).abs() > CLIP_RANGE).float().mean()),
            "gradient_norm": float(norm),
            "seconds": time.perf_counter() - began,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="training steps (20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all noise (0)")
    arguments = parser.parse_args()
    policy = load_policy("package:bpgo_video.tiny/weights/wan", max_sequence_length=16)
    for step, record in enumerate(train(policy, arguments.steps, arguments.seed)):
        print(f"step {step}  " + "  ".join(f"{name} {value:.5g}" for name, value in record.items()), flush=True)


if __name__ == "__main__":
    main()
