"""Checks that need a GPU, on the embedded policy: NCCL, bf16 replay, attention backends, and resume.

Each check is a function of a `Bench` that returns results including `holds`. `tests/gpu` asserts the same functions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from diffusers import WanPipeline
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor

from bpgo_video.config.bpgo import Config
from bpgo_video.config.learner import PriorConfig
from bpgo_video.config.reading import read_yaml
from bpgo_video.data.records import encoder_stamp
from bpgo_video.data.writer import build_shards
from bpgo_video.distributed.ds_config import read_tensor, tensor_files
from bpgo_video.distributed.heartbeat import Heartbeat
from bpgo_video.files import resolve_folder, write_json
from bpgo_video.policies import load_policy
from bpgo_video.randomness import keyed_noise
from bpgo_video.rollouts.conditioning import guidance_of
from bpgo_video.rollouts.denoiser import training_denoiser
from bpgo_video.training.doctor import examine
from bpgo_video.training.inputs import check_inputs
from bpgo_video.training.rl import train
from bpgo_video.training.sampling import rollout_chunks
from bpgo_video.training.session import Session, build_session, builder, sampling_policy
from bpgo_video.types import PromptBatch, Trajectory
from tools.gpu.bench import EMBEDDED, ROOT, Bench, release
from tools.gpu.speed import TIMED_BACKENDS, result_or_reason
from tools.gpu.stages import Note, attempt

RECIPE = ROOT / "pipelines" / "configs" / "tiny_wan_full.yaml"
PROMPTS = ("a red circle moving left", "a blue square moving up")
BUCKET = 5_000_000  # elements; the default takes a gigabyte of GPU memory per engine
VELOCITY_BOUND = 0.02  # relative error of bf16 against fp32; bf16 has 8 bits


def recipe(bench: Bench, name: str, dtype: torch.dtype = torch.bfloat16, backend: str | None = None) -> Config:
    """A recipe of seconds with full trajectories of the embedded policy, under ZeRO-3 with every parameter sharded."""
    config = read_yaml(RECIPE)
    precision = {"bf16": {"enabled": dtype == torch.bfloat16}}
    ds_config = bench.scratch / f"zero3-{dtype}.json"
    write_json(
        ds_config, {**bench.ds_config(stage3_param_persistence_threshold=0, reduce_bucket_size=BUCKET), **precision}
    )
    return replace(
        config,
        run=replace(config.run, dir=str(bench.scratch / name), num_steps=2, save_every=1),
        data=replace(config.data, shards=str(prompt_shards(bench, config))),
        deepspeed=str(ds_config),
        policy=replace(config.policy, attention_backend=backend, gradient_checkpointing=True),
        prior=PriorConfig(kind="constant", mean=0.5, scale=0.1),
        sampler=replace(config.sampler, num_steps=bench.sizes.checked_steps),
        rollout=replace(config.rollout, prompts_per_step=2, group_size=4, micro_batch_size=4),
        evaluation=replace(config.evaluation, rewards={}),
    )


def prompt_shards(bench: Bench, config: Config) -> Path:
    folder = bench.scratch / "prompts"
    if not (folder / "index.json").exists():
        length = config.policy.max_sequence_length
        lines = bench.scratch / "prompts.jsonl"
        lines.write_text("".join(json.dumps({"prompt": text, "split": "train"}) + "\n" for text in PROMPTS), "utf-8")
        encoder = load_policy(EMBEDDED, components=("text_encoder",), max_sequence_length=length)
        build_shards([lines], folder, encoder.encode, encoder_stamp(resolve_folder(EMBEDDED), length))
    return folder


@contextmanager
def session_of(bench: Bench, config: Config) -> Iterator[Session]:
    ds_config, shards = check_inputs(config, bench.mesh)
    session = build_session(config, bench.mesh, ds_config, shards)
    try:
        yield session
    finally:
        release(session.engine)


def construction(bench: Bench) -> dict[str, Any]:
    """A policy constructed sharded has the values of its files, rounded to the dtype of each parameter."""
    config = recipe(bench, "construction")
    ds_config = json.loads(Path(config.deepspeed).read_text("utf-8"))
    policy = sampling_policy(config, ds_config, bench.mesh, builder(ds_config), components=("transformer",))
    model = policy.transformers["transformer"]
    files = tensor_files(policy.folder / "transformer", type(model))
    different = []
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            expected = read_tensor(files[name], name).to(parameter)
            different += [] if torch.equal(parameter, expected) else [name]
    dtypes = {str(parameter.dtype) for parameter in model.parameters()}
    backend = dist.get_backend()
    return {
        "holds": not different and backend == ("nccl" if bench.device.type == "cuda" else "gloo"),
        "process_group": backend,
        "dtypes": sorted(dtypes),
        "different": different,
    }


def ratio(bench: Bench, dtype: torch.dtype, backend: str) -> dict[str, Any]:
    """Replay reproduces the rollout's log-probs exactly, and the doctor's checks hold: ODE, rewards, ratio, gradient.

    Also measures how far log-probs drift when a sample is replayed in a smaller batch, relative to the recipe's clip
    range.
    """
    config = recipe(bench, "ratio", dtype, backend)
    with attention_backend("native"), session_of(bench, config) as session:
        prompts = next(session.batches())
        with session.rollout_weights():
            chunks = list(rollout_chunks(session, prompts, 0))
        trajectories = [trajectory for chunk in chunks for trajectory in chunk.trajectories]
        same = drift(session, prompts, trajectories)
        halves = drift(session, prompts, [half for whole in trajectories for half in split_in_two(whole)])
        findings = examine(session, prompts, Heartbeat(bench.mesh, timeout=60))
    clip = min(config.loss.clip_range)
    largest = max(float(row.max()) for row in same.values())
    return {
        "holds": largest == 0 and all(finding.holds for finding in findings),
        "log_prob_drift_max": largest,
        "log_prob_drift_max_in_half_the_batch": max(float(row.max()) for row in halves.values()),
        "share_outside_the_clip_range_in_half_the_batch": float((torch.cat([*halves.values()]) > clip).float().mean()),
        "clip_range": clip,
        "by_step": by_step(same),
        "by_step_in_half_the_batch": by_step(halves),
        "doctor": {finding.name: {"holds": finding.holds, "words": finding.words} for finding in findings},
    }


def by_step(drifts: dict[int, Tensor]) -> dict[str, dict[str, float]]:
    return {str(index): {"max": float(row.max()), "mean": float(row.mean())} for index, row in drifts.items()}


def drift(session: Session, prompts: PromptBatch, trajectories: list[Trajectory]) -> dict[int, Tensor]:
    """|log-prob in replay - log-prob in the rollout| of each sample by denoising step; NaN where either is NaN."""
    denoiser = training_denoiser(session.policy, session.config)
    drifts: dict[int, list[Tensor]] = {}
    for trajectory in trajectories:
        guidance = guidance_of(prompts, trajectory.prompt_rows, session.mesh.device)
        for index in trajectory.trained_steps:
            latents = trajectory.latents[:, index].detach().requires_grad_()
            log_prob = denoiser.transition(latents, index, guidance).log_prob(trajectory.latents[:, index + 1])
            session.engine.backward(log_prob.mean() * 0, last=False)  # frees parameters that ZeRO-3 fetched
            drifts.setdefault(index, []).append((log_prob.detach() - trajectory.log_probs[:, index]).abs().cpu())
    return {index: torch.cat(rows) for index, rows in drifts.items()}


def split_in_two(trajectory: Trajectory) -> list[Trajectory]:
    """The two halves of a micro-batch."""
    names = ("prompt_rows", "sample_index", "latents", "log_probs")
    parts = zip(*(getattr(trajectory, name).chunk(2) for name in names), strict=True)
    return [replace(trajectory, **dict(zip(names, part, strict=True))) for part in parts]


def ratio_if_usable(bench: Bench, backend: str) -> dict[str, Any]:
    """`ratio` in bf16, or the reason why the backend cannot run here."""
    return result_or_reason(partial(ratio, bench, torch.bfloat16, backend))


def velocity(bench: Bench) -> dict[str, Any]:
    """Relative error of the bf16 velocity against fp32 at each noise level of the schedule."""
    config = recipe(bench, "velocity")

    velocities = {}
    with exact_fp32():
        for dtype in (torch.float32, torch.bfloat16):
            policy = load_policy(
                EMBEDDED, components=("transformer",), max_sequence_length=config.policy.max_sequence_length,
                dtype=dtype, device=bench.device,
            )  # fmt: skip
            shape = policy.latent_shape(config.video)
            latents = keyed_noise(shape, [("gpu", "velocity", row) for row in range(4)], bench.device)
            text = (config.policy.max_sequence_length, policy.transformer_config["text_dim"])
            texts = keyed_noise(text, [("gpu", "text", row) for row in range(4)], bench.device).to(dtype)
            sigmas = policy.sigmas(config.sampler.num_steps, config.video)[:-1]
            with torch.no_grad():
                velocities[dtype] = [policy.velocity(latents, sigma, {"prompt_embeds": texts}) for sigma in sigmas]
    pairs = zip(velocities[torch.bfloat16], velocities[torch.float32], strict=True)
    errors = [float((rounded - exact).norm() / exact.norm()) for rounded, exact in pairs]
    return {"holds": max(errors) < VELOCITY_BOUND, "relative_error": errors}


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Disable TF32, which has 10 bits and is the default of cuDNN's convolutions."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def resume(bench: Bench) -> dict[str, Any]:
    """Two steps have the same records as one step, a checkpoint and a second step, except for timings and sizes.

    Algorithms are deterministic: flash attention's backward otherwise adds in no fixed order.
    """
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        train(recipe(bench, "whole"))
        interrupted = recipe(bench, "parted")
        train(replace(interrupted, run=replace(interrupted.run, num_steps=1)))
        train(replace(interrupted, run=replace(interrupted.run, resume="auto")))
    finally:
        torch.use_deterministic_algorithms(False)
    uninterrupted, resumed = (records(bench.scratch / name) for name in ("whole", "parted"))
    different = {
        name: [uninterrupted[step][name], resumed[step][name]] for step in range(2) for name in uninterrupted[step]
        if uninterrupted[step][name] != resumed[step][name]
    }  # fmt: skip
    steps = [{name: record[name] for name in ("reward", "grad_norm")} for record in uninterrupted]
    return {
        "holds": not different and all(map(math.isfinite, uninterrupted[1].values())),
        "different": different,
        "steps": steps,
    }


def records(run_dir: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()]
    timed = ("seconds", "checkpoint", "memory")
    return [{name: value for name, value in line.items() if not name.startswith(timed)} for line in lines]


def export(bench: Bench) -> dict[str, Any]:
    """The export of a run is a pipeline that diffusers loads in bf16 and samples with."""
    run = recipe(bench, "exported")
    train(replace(run, run=replace(run.run, num_steps=1)))
    folder = Path(run.run.dir) / "export"
    pipeline = WanPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16).to(bench.device)
    pipeline.set_progress_bar_config(disable=True)
    video = pipeline(
        PROMPTS[0], height=64, width=64, num_frames=9, num_inference_steps=2, guidance_scale=1.0,
        max_sequence_length=16, output_type="pt",
    ).frames  # fmt: skip
    return {"holds": bool(video.isfinite().all()) and video.shape[:2] == (1, 9), "shape": list(video.shape)}


CHECKS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "construction": construction,
    "velocity": velocity,
    "ratio native bf16": partial(ratio, dtype=torch.bfloat16, backend="native"),
    "ratio native fp32": partial(ratio, dtype=torch.float32, backend="native"),
    "resume": resume,
    "export": export,
    **{
        f"ratio {name} bf16": partial(ratio_if_usable, backend=name)
        for name in (*TIMED_BACKENDS, "_native_math")
        if name != "native"
    },
}


def checks(bench: Bench, note: Note) -> None:
    """Run every check; an exception is recorded and the next check runs."""
    for name, check in CHECKS.items():
        attempt(note, name, partial(check, bench))
