"""Worker of one world: python -m torch.distributed.run ... -m tools.bench.worker RECIPE OUTPUT

Two ranks measure the cost of sharding, one rank compares with diffusers, and both measure the scaling of a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from torch import Tensor, nn

from bpgo_video.cli import show_loading_once
from bpgo_video.config.bpgo import BPGOConfig, Config
from bpgo_video.config.reading import read_yaml
from bpgo_video.config.run import ParallelConfig
from bpgo_video.data.stream import PromptStream, as_batch
from bpgo_video.distributed import engine as engines
from bpgo_video.distributed import process_group
from bpgo_video.distributed.heartbeat import Heartbeat
from bpgo_video.distributed.mesh import Mesh, make_mesh
from bpgo_video.learner.losses import PolicyShift, bpgo_loss
from bpgo_video.policies import Policy
from bpgo_video.randomness import keyed_noise
from bpgo_video.rollouts.denoiser import training_denoiser
from bpgo_video.rollouts.replay import Replay
from bpgo_video.rollouts.rollout import sample_chunks
from bpgo_video.rollouts.rules import trained_steps_of
from bpgo_video.rollouts.updates import optimise
from bpgo_video.training.estimation import estimate_advantages
from bpgo_video.training.inputs import check_inputs
from bpgo_video.training.loop import Stopwatch
from bpgo_video.training.rl import RL
from bpgo_video.training.sampling import sample_and_score
from bpgo_video.training.session import Session, build_engine, build_session, sampling_policy
from bpgo_video.types import PromptBatch
from tools.bench.overlap import in_chunks, overlap
from tools.bench.timing import Clock, in_turn, seconds, waiting
from tools.bench.update import updates

ROUNDS = 15
STEP_ROUNDS = 3
SAMPLES_PER_RANK = 16
GROWTH = {  # changes of the recipe's step, one size at a time
    "frames": (5, 9, 17),
    "group_size": (4, 8, 16),
    "steps": (4, 8, 16),
    "sequence": (1, 2),
}


def zero(stage: int) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}


def prompts_for(config: Config, mesh: Mesh) -> PromptBatch:
    _, shards = check_inputs(config, mesh)
    return as_batch([shards.record(int(row)) for row in shards.rows(config.evaluation.split)[:2]])


def rollout(policy: Policy, config: Config, mesh: Mesh) -> Callable[[], object]:
    """A function that samples and decodes SAMPLES_PER_RANK videos on every rank, with log-probs."""
    prompts = prompts_for(config, mesh)
    settings = {
        "group_size": SAMPLES_PER_RANK * mesh.world_size // len(prompts),
        "micro_batch_size": SAMPLES_PER_RANK,
        "latent_shape": policy.latent_shape(config.video),
        "key": (0, "bench"),
        "trained_steps": trained_steps_of(policy, config, 0),
    }
    denoiser = training_denoiser(policy, config)
    return lambda: list(sample_chunks(denoiser, prompts, mesh, **settings))


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters on this rank."""
    held = [p.ds_tensor if hasattr(p, "ds_tensor") else p.data for p in module.parameters()]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def sharding(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Rollout time and parameter memory under ZeRO-0 and ZeRO-3."""
    policies = {stage: sampling_policy(config, zero(stage), mesh) for stage in (0, 3)}
    learners = {stage: build_engine(config, policy, zero(stage), mesh) for stage, policy in policies.items()}
    memory = {stage: parameter_bytes(learner.module) for stage, learner in learners.items()}
    plain, sharded = (rollout(policies[stage], config, mesh) for stage in (0, 3))

    def gathered() -> None:
        with learners[3].whole_weights():
            sharded()

    times = in_turn({"zero0": plain, "zero3_sharded": sharded, "zero3_gathered": gathered}, ROUNDS)
    return {
        "rollout_seconds": times,
        "parameter_bytes": {f"zero{stage}": size for stage, size in memory.items()},
        "zero3_gathered_over_zero0": times["zero3_gathered"] / times["zero0"],
        "zero3_sharded_over_zero0": times["zero3_sharded"] / times["zero0"],
        "zero3_memory_over_zero0": memory[3] / memory[0],
    }


def against_diffusers(config: Config, mesh: Mesh, clock: Clock = time.perf_counter) -> dict[str, Any]:
    """Our rollout with log-probs against WanPipeline's call, decoded both, with the same videos, steps and embeddings.

    `decoding` compares the VAEs alone.
    """
    policy = sampling_policy(config, zero(0), mesh)
    pipeline = WanPipeline.from_pretrained(policy.folder, text_encoder=None, tokenizer=None)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=pipeline.scheduler.config.flow_shift)
    pipeline.set_progress_bar_config(disable=True)
    prompts = prompts_for(config, mesh)
    each = SAMPLES_PER_RANK // len(prompts)
    embeddings = prompts.conditioning["prompt_embeds"].repeat_interleave(each, 0)
    latents = keyed_noise(policy.latent_shape(config.video), [("bench", i) for i in range(SAMPLES_PER_RANK)], "cpu")

    def theirs(guidance_scale: float) -> None:
        pipeline(
            prompt_embeds=embeddings, negative_prompt_embeds=prompts.negative["prompt_embeds"].expand_as(embeddings),
            height=config.video.height, width=config.video.width, num_frames=config.video.num_frames,
            num_inference_steps=config.sampler.num_steps, guidance_scale=guidance_scale, latents=latents,
            max_sequence_length=config.policy.max_sequence_length, output_type="pt",
        )  # fmt: skip

    results = {}
    for scale in (1.0, 3.0):
        guided = replace(config, sampler=replace(config.sampler, guidance_scale=scale))
        times = in_turn({"ours": rollout(policy, guided, mesh), "diffusers": partial(theirs, scale)}, ROUNDS, clock)
        results[f"guidance_scale {scale}"] = {**times, "ratio": times["ours"] / times["diffusers"]}
    vaes = {"ours": policy.pipeline.vae, "diffusers": pipeline.vae}
    times = in_turn({name: partial(decoded, vae, latents) for name, vae in vaes.items()}, ROUNDS, clock)
    return {
        "rollout_over_diffusers": max(case["ratio"] for case in results.values()),
        "against_diffusers": results,
        "decoding_over_diffusers": times["ours"] / times["diffusers"],
    }


@torch.no_grad()
def decoded(vae: Any, latents: Tensor) -> Tensor:
    pixels: Tensor = vae.decode(latents, return_dict=False)[0]
    return pixels


def session_and_prompts(config: Config, mesh: Mesh) -> tuple[Session, Iterator[PromptBatch]]:
    ds_config, shards = check_inputs(config, mesh)
    session = build_session(config, mesh, ds_config, shards)
    split, count, priors = config.data.split, config.rollout.prompts_per_step, session.priors.values()
    return session, PromptStream(shards, split, 0, count, priors=priors)


def idle_heartbeat(mesh: Mesh) -> Heartbeat:
    """A heartbeat that is never started: a failed benchmark is simply rerun."""
    return Heartbeat(mesh, timeout=60)


def step_seconds(config: Config, mesh: Mesh) -> dict[str, float]:
    """Median seconds of a few complete steps by phase, with a temporary engine."""
    trainer = RL(config, mesh, check_inputs(config, mesh), idle_heartbeat(mesh))
    records = [trainer.train_step(step) for step in range(STEP_ROUNDS + 1)][1:]
    names = ("seconds", "seconds/rollout", "seconds/reward", "seconds/update")
    return {name: statistics.median(record[name] for record in records) for name in names}


class TimedLearner:
    """An engine that times its optimizer steps, excluding waiting."""

    def __init__(self, engine: engines.Engine):
        self.engine = engine
        self.optimizer_seconds = 0.0

        self.replaying = engine.replaying

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.engine.backward(loss, last=last)

    def step(self) -> float:
        started = time.perf_counter()
        with waiting() as inside:
            norm = self.engine.step()
        self.optimizer_seconds += time.perf_counter() - started - inside.seconds
        return norm


def phases(config: Config, mesh: Mesh) -> dict[str, float]:
    """Seconds of one update: replay (forward, backward and their hooks), communication, and the optimizer."""
    trainer = RL(config, mesh, check_inputs(config, mesh), idle_heartbeat(mesh))
    trainer.train_step(0)
    session, prompts, watch = trainer.session, next(trainer.batches), Stopwatch(idle_heartbeat(mesh), 1)
    trajectories, rewards = sample_and_score(session, prompts, 1, watch)
    advantages = estimate_advantages(session, prompts, rewards)
    learner = TimedLearner(session.engine)
    objective = Replay(session.policy, config, prompts, advantages, 1, mesh.device)
    with waiting() as exposed:
        total = seconds(lambda: optimise(learner, objective, trajectories, config.optim.updates_per_rollout))
    updates = config.optim.updates_per_rollout
    return {
        "replay": (total - exposed.seconds - learner.optimizer_seconds) / updates,
        "communication": exposed.seconds / updates,
        "optimizer": learner.optimizer_seconds / updates,
    }


def learner_overhead(config: Config, mesh: Mesh) -> dict[str, float]:
    """Additional seconds of BPGO over GRPO in one step: for advantages, and for the losses of all passes."""
    session, stream = session_and_prompts(config, mesh)
    prompts, watch = next(stream), Stopwatch(idle_heartbeat(mesh), 0)
    trajectories, rewards = sample_and_score(session, prompts, 0, watch)
    plain = replace(session, config=replace(config, bpgo=BPGOConfig(alpha=0.0, zeta=0.0)))
    estimates = in_turn(
        {
            "bpgo": lambda: estimate_advantages(session, prompts, rewards),
            "grpo": lambda: estimate_advantages(plain, prompts, rewards),
        },
        ROUNDS,
    )
    rng = torch.Generator().manual_seed(0)
    ratio, advantage, contrastive, trust = (
        torch.randn(config.rollout.micro_batch_size, generator=rng) for _ in range(4)
    )

    def loss(zeta: float) -> None:
        bpgo_loss(
            PolicyShift(ratio.requires_grad_()), advantage, contrastive, trust, zeta, config.loss
        ).value.backward()

    losses = in_turn({"bpgo": partial(loss, config.bpgo.zeta), "grpo": partial(loss, 0.0)}, 10 * ROUNDS)
    passes = len(trajectories) * config.sampler.trained_count
    return {
        "advantages": estimates["bpgo"] - estimates["grpo"],
        "losses": passes * (losses["bpgo"] - losses["grpo"]),
    }


def changed(config: Config, name: str, value: int) -> Config:
    """The recipe with one size changed."""
    if name == "frames":
        return replace(config, video=replace(config.video, num_frames=value))
    if name == "steps":
        return replace(config, sampler=replace(config.sampler, num_steps=value))
    if name == "sequence":
        return replace(config, parallel=ParallelConfig(sequence=value))
    return replace(config, rollout=replace(config.rollout, group_size=value, micro_batch_size=min(16, 2 * value)))


def growth(config: Config, world_size: int) -> list[dict[str, Any]]:
    rows = []
    for name, values in GROWTH.items():
        for value in values:
            if name == "sequence" and value > world_size:
                continue
            resized = changed(config, name, value)
            mesh = make_mesh(torch.device("cpu"), resized.parallel.sequence)
            rows.append({"ranks": world_size, name: value, **step_seconds(resized, mesh)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    config = read_yaml(args.recipe)
    config = replace(config, evaluation=replace(config.evaluation, max_prompts=2))
    show_loading_once()
    mesh = process_group.start_ranks()

    results: dict[str, Any] = {}
    if mesh.world_size == 1:
        results |= against_diffusers(config, mesh)
        session, stream = session_and_prompts(in_chunks(config), mesh)
        results["overlap"] = overlap(session, next(stream))
    else:
        results |= sharding(config, mesh) | {"phases": phases(config, mesh)}
        results["updates"] = updates(config, mesh, idle_heartbeat(mesh), ROUNDS)
        results["learner_seconds"] = learner_overhead(config, mesh)
        results["learner_over_step"] = sum(results["learner_seconds"].values()) / step_seconds(config, mesh)["seconds"]
    results["scaling"] = growth(config, mesh.world_size)
    if mesh.is_main:
        args.output.write_text(json.dumps(results), "utf-8")
    process_group.stop_ranks()


if __name__ == "__main__":
    main()
