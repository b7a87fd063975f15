"""Worker for shared prefixes: rollouts of the embedded policy under ZeRO-3, with sharded and with gathered weights.

    python -m tests.distributed.ranks prefix_worker OUTPUT PROMPTS GROUP_SIZE MICRO_BATCH_SIZE [BRANCHES ...]

Each rank writes the latents of its samples by case to OUTPUT/rankN.pt. With branches the prompts' steps are the same.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from bpgo_video.config.bpgo import Config
from bpgo_video.config.deepspeed import read_ds_config
from bpgo_video.config.reading import read_yaml
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.policies import Policy
from bpgo_video.randomness import keyed_noise
from bpgo_video.rollouts.denoiser import training_denoiser
from bpgo_video.rollouts.rollout import sample_chunks
from bpgo_video.rollouts.rules import trained_steps_of
from bpgo_video.training.session import build_engine, builder, sampling_policy
from bpgo_video.types import PromptBatch
from tests.made.recipes import RECIPE

STEPS = (2, 3, 5)  # training steps: draws of trained steps that begin at 0 to 3
TEXT = (16, 64)  # tokens and width of the embedded text encoder
Latents = dict[tuple[int, int, int], torch.Tensor]  # (training step, prompt, sample) -> its path


def drawn(share_steps: str) -> Config:
    """Two of five steps, so that most prompts have a prefix."""
    recipe = read_yaml(RECIPE)
    sampler = {"num_steps": 6, "train_fraction": 0.4, "solver": "adams_bashforth", "share_steps": share_steps}
    return replace(recipe, sampler=replace(recipe.sampler, **sampler))


def rollout(
    policy: Policy, config: Config, mesh: Mesh, prompts: int, group_size: int, size: int, *branches: int
) -> Latents:
    """The paths of this rank's samples in a rollout of every training step."""
    ids, texts = torch.arange(prompts), keyed_noise(TEXT, [("text", row) for row in range(prompts)], mesh.device)
    batch = PromptBatch(ids, tuple(map(str, range(prompts))), {"prompt_embeds": texts})
    found: Latents = {}
    for step in STEPS:
        chunks = sample_chunks(
            training_denoiser(policy, config), batch, mesh, group_size=group_size, micro_batch_size=size,
            latent_shape=policy.latent_shape(config.video), key=(0, "rollout", step),
            trained_steps=trained_steps_of(policy, config, step), same_start=True, branching=branches,
        )  # fmt: skip
        for trajectory in (trajectory for chunk in chunks for trajectory in chunk.trajectories):
            samples = zip(trajectory.prompt_rows.tolist(), trajectory.sample_index.tolist(), strict=True)
            found |= {(step, *own): path for own, path in zip(samples, trajectory.latents, strict=True)}
    return found


def main(mesh: Mesh, output: str, *sizes: str) -> None:
    ds_config, config = read_ds_config("ds_configs/zero3.json"), drawn("group")
    policy = sampling_policy(config, ds_config, mesh, builder(ds_config))
    engine = build_engine(config, policy, ds_config, mesh)
    found: dict[str, Latents] = {}
    for share_steps in ("batch",) if len(sizes) > 3 else ("group", "batch"):
        for parameters, weights in (("sharded", nullcontext), ("gathered", engine.whole_weights)):
            with weights():
                sampled = rollout(policy, drawn(share_steps), mesh, *map(int, sizes))
            found[f"{share_steps}-{parameters}"] = sampled
    torch.save(found, Path(output) / f"rank{mesh.rank}.pt")
