"""Worker for training tests: each case is a short training run in the same process group.

python -m tests.distributed.ranks worker SHARDS OUTPUT CASE ...
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from bpgo_video.config.bpgo import Config, RewardConfig
from bpgo_video.config.deepspeed import read_ds_config
from bpgo_video.config.learner import ReliabilityConfig
from bpgo_video.config.policy import LoraConfig
from bpgo_video.config.run import ParallelConfig
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.distributed.sharded_build import build_sharded
from bpgo_video.files import resolve_folder
from bpgo_video.training.rl import train
from tests.made.recipes import rewarded_by, small_recipe, without_evaluation

REDNESS = "tests.distributed.toy_rewards:Redness"
SMALL = resolve_folder("package:bpgo_video.tiny/weights/wan") / "transformer"
HUGE_STEP = 1e5  # of SGD: the weights' change is the gradient, to many digits


def gradient(shards: Path, run_dir: Path, stage: str, sequence: str = "1") -> Config:
    """One update of plain SGD without clipping, so that errors of scale cannot hide.

    Samples start from different noise: from the same start, terms of opposite advantage nearly cancel (most of all
    in the key biases, to which softmax is almost invariant) and leave only rounding errors.
    """
    optim: dict[str, Any] = {
        "name": "sgd", "learning_rate": HUGE_STEP, "max_grad_norm": 0.0, "updates_per_rollout": 1, "weight_decay": 0.0,
    }  # fmt: skip
    rollout = {"same_start": False}
    config = small_recipe(run_dir, shards, optim=optim, rollout=rollout, loss={"clip_range": (0.5, 0.5)})
    config = replace(config, parallel=ParallelConfig(sequence=int(sequence)))
    return with_stage(without_evaluation(rewarded_by(config, REDNESS)), stage)


def credited(shards: Path, run_dir: Path, stage: str, micro_batch_size: str) -> Config:
    """`gradient` of the best and worst sample of each group, by frames; a rank may have none or all of them."""
    config = gradient(shards, run_dir, stage)
    return replace(
        config,
        rollout=replace(config.rollout, micro_batch_size=int(micro_batch_size)),
        advantage=replace(config.advantage, best_of=1),
        credit=replace(config.credit, kind="segment"),
    )


def preferred(shards: Path, run_dir: Path, stage: str, lora: str = "full") -> Config:
    """`gradient` of the best against the worst of three groups of four: on two ranks one group is on both."""
    config = gradient(shards, run_dir, stage)
    return replace(
        config,
        rollout=replace(config.rollout, prompts_per_step=3, micro_batch_size=2),
        sampler=replace(config.sampler, share_steps="batch"),
        loss=replace(config.loss, objective="dpo", step_weights="none"),
        bpgo=replace(config.bpgo, trust="frames", zeta=0.0, match_rms=False),
        policy=replace(config.policy, lora=LoraConfig(rank={"full": 0, "lora": 4}[lora])),
    )


def desirable(shards: Path, run_dir: Path, stage: str) -> Config:
    """`gradient` of KTO."""
    config = preferred(shards, run_dir, stage)
    rollout = replace(config.rollout, prompts_per_step=2)
    return replace(config, loss=replace(config.loss, objective="kto"), rollout=rollout)


def drafted(shards: Path, run_dir: Path, stage: str, steps: str, sequence: str = "1") -> Config:
    """`gradient` through the frames and the last denoising steps, with the rewards of the recipe."""
    config = small_recipe(run_dir, shards, optim={"updates_per_rollout": 1})
    rewards, config = config.rewards, gradient(shards, run_dir, stage, sequence)
    return replace(
        config,
        rewards={name: replace(reward, trust=None) for name, reward in rewards.items()},
        rollout=replace(config.rollout, micro_batch_size=2),
        loss=replace(config.loss, objective="draft", draft_steps=int(steps), step_weights="none"),
        bpgo=replace(config.bpgo, alpha=0.0, zeta=0.0, match_rms=False),
    )


def exact_ratio(
    shards: Path, run_dir: Path, stage: str, lora: str, sequence: str = "1", parameters: str = "sharded"
) -> Config:
    """Two updates of one rollout: the ratio is 1 on the first and not on the second."""
    optim = {"updates_per_rollout": 2, "learning_rate": 1e-3, "parameters": parameters}
    config = small_recipe(run_dir, shards, optim=optim, rollout={"parameters": parameters})
    config = with_stage(without_evaluation(rewarded_by(config, REDNESS)), stage)
    config = replace(config, parallel=ParallelConfig(sequence=int(sequence)))
    rank, checkpointing = {"full": 0, "lora": 4}[lora], int(sequence) > 1
    policy = replace(config.policy, lora=LoraConfig(rank=rank), gradient_checkpointing=checkpointing)
    return replace(config, policy=policy)


def held(shards: Path, run_dir: Path, stage: str, lora: str, weight: str, reference: str = "start") -> Config:
    """Two updates of plain SGD with a penalty towards a reference policy, which changes only the second."""
    optim = {"name": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "updates_per_rollout": 2}
    loss: dict[str, Any] = {"kl_weight": float(weight), "kl_reference": reference, "clip_range": (0.5, 0.5)}
    small: dict[str, Any] = {"sampler": {"num_steps": 3}, "ema": {"decay": 0.9, "warmup": False}}
    config = small_recipe(run_dir, shards, optim=optim, loss=loss, **small)
    config = with_stage(without_evaluation(rewarded_by(config, REDNESS)), stage)
    return replace(config, policy=replace(config.policy, lora=LoraConfig(rank={"full": 0, "lora": 4}[lora])))


def uneven(shards: Path, run_dir: Path, parameters: str) -> Config:
    """An evaluation of three videos on two ranks that process four at once."""
    config = small_recipe(run_dir, shards, rollout={"parameters": parameters})
    heldout = replace(config.evaluation, max_prompts=1, samples_per_prompt=3)
    return replace(config, evaluation=heldout)


def steps(shards: Path, run_dir: Path, num_steps: str, resume: str = "never") -> Config:
    """The shipped recipe with its rewards and evaluation."""
    return small_recipe(run_dir, shards, run={"num_steps": int(num_steps), "save_every": 2, "resume": resume})


def branched(
    shards: Path, run_dir: Path, num_steps: str, resume: str = "never", sequence: str = "1", size: str = "1"
) -> Config:
    """Trees of four samples that split at two of three trained steps, in forwards of `size`, with sharded weights."""
    sharded = {"parameters": "sharded"}
    config = small_recipe(
        run_dir,
        shards,
        run={"num_steps": int(num_steps), "save_every": 2, "resume": resume},
        rollout={"branches": (2, 2), "micro_batch_size": int(size), **sharded},
        optim=sharded,
        ema={"decay": 0.9},
    )
    return replace(without_evaluation(config), parallel=ParallelConfig(sequence=int(sequence)))


def ema(shards: Path, run_dir: Path, num_steps: str, resume: str = "never") -> Config:
    """A running prior and an average of the weights; the four prompts repeat after two steps."""
    config = small_recipe(
        run_dir,
        shards,
        run={"num_steps": int(num_steps), "save_every": 3, "resume": resume},
        prior={"kind": "ema"},
        ema={"decay": 0.9},
    )
    config = replace(config, prior=replace(config.prior, scale=None), sampler=replace(config.sampler, num_steps=3))
    return without_evaluation(config)


def exact(shards: Path, run_dir: Path, stage: str, lora: str, num_steps: str, resume: str = "never") -> Config:
    """The same under any stage, with all weights or adapters."""
    config = with_stage(ema(shards, run_dir, num_steps, resume), stage)
    return replace(config, policy=replace(config.policy, lora=LoraConfig(rank={"full": 0, "lora": 4}[lora])))


def slow_policy(
    shards: Path, run_dir: Path, stage: str, lora: str, num_steps: str, decay: str = "0.5", resume: str = "never"
) -> Config:
    """NFT as published: an average of the weights samples, and v_old is its velocity."""
    loss: dict[str, Any] = {"objective": "nft", "step_weights": "none", "nft_adaptive": True, "nft_rescale": True}
    config = small_recipe(
        run_dir,
        shards,
        run={"num_steps": int(num_steps), "save_every": 1, "keep_checkpoints": 9, "resume": resume},
        loss={**loss, "old_decay": float(decay), "old_decay_rate": 0.2, "noise_levels": "uniform"},
        rollout={"same_start": False},
        sampler={"num_steps": 3},
        optim={"learning_rate": 1e-3, "updates_per_rollout": 1},
        ema={"decay": 0.9},
    )
    config = with_stage(without_evaluation(rewarded_by(config, REDNESS)), stage)
    return replace(config, policy=replace(config.policy, lora=LoraConfig(rank={"full": 0, "lora": 4}[lora])))


def experts(shards: Path, run_dir: Path, stage: str, lora: str, num_steps: str, resume: str = "never") -> Config:
    """Both of Wan 2.2's experts, of which each step trains one: a window of one of three steps, which moves on.

    The second is first trained in the third step. The pipeline is next to the shards.
    """
    window = {"train_steps": "window", "train_fraction": 0.34, "window_every": 1, "shift": None}
    config = small_recipe(
        run_dir,
        shards,
        run={"num_steps": int(num_steps), "save_every": 1, "resume": resume},
        policy={"folder": str(shards.parent / "pipeline"), "lora": LoraConfig(rank={"full": 0, "lora": 4}[lora])},
        sampler={"num_steps": 4, "guidance_scale": 3.0, "guidance_scale_2": 2.0, **window},
        optim={"updates_per_rollout": 1, "learning_rate": 1e-3},
        loss={"kl_weight": 1.0},
        ema={"decay": 0.9},
    )
    return with_stage(without_evaluation(rewarded_by(config, REDNESS)), stage)


def sound(shards: Path, run_dir: Path, stage: str) -> Config:
    """Two steps of LTX-2, rewarded for its pictures and for its sound. The pipeline is next to the shards."""
    config = small_recipe(
        run_dir,
        shards,
        run={"num_steps": 2},
        policy={"folder": str(shards.parent / "pipeline")},
        video={"num_frames": 9, "height": 64, "width": 96, "fps": 20.0},
        sampler={"guidance_scale": 2.0, "shift": None},
        optim={"learning_rate": 1e-3},
        evaluation={"guidance_scale": 2.0, "shift": None},
    )
    heard = RewardConfig(model="tests.distributed.toy_rewards:Loudness", weight=1.0)
    evaluation = replace(config.evaluation, rewards={"heldout": RewardConfig(model="audible")})
    rewards = {"seen": RewardConfig(model=REDNESS, weight=1.0), "heard": heard}
    return with_stage(replace(config, rewards=rewards, evaluation=evaluation), stage)


def one_expert(shards: Path, run_dir: Path, trained: str, stage: str) -> Config:
    """Steps drawn per prompt, so that ranks train different ones: of one expert, or of both, which is refused."""
    config = experts(shards, run_dir, stage, "full", "2")
    drawn = {"train_steps": "random", "train_fraction": 0.5, "share_steps": "group", "num_steps": 6}
    names = () if trained == "both" else (trained,)
    policy, sampler = replace(config.policy, trained=names), replace(config.sampler, **drawn)
    return replace(config, policy=policy, sampler=sampler)


def ahead(shards: Path, run_dir: Path, chunks: str) -> Config:
    """Two steps of four chunks per rank, scored inline or concurrently, by random and offloaded rewards."""
    rollout = {"micro_batch_size": 1, "score_ahead": int(chunks), "offload_trajectories": int(chunks) > 0}
    short = {"run": {"num_steps": 2}, "sampler": {"num_steps": 3}}
    config = without_evaluation(small_recipe(run_dir, shards, rollout=rollout, **short))
    rewards = {name: replace(reward, offload=int(chunks) > 0) for name, reward in config.trained_rewards.items()}
    return replace(config, rewards={**rewards, "drawn": RewardConfig(model="tests.distributed.toy_rewards:Drawn")})


def in_advance(
    shards: Path, run_dir: Path, how: str, num_steps: str, rate: str = "1e-4", ahead: str = "on", resume: str = "never"
) -> Config:
    """Steps of two chunks a rank, sampled ahead but after every third; with running anchors and an average."""
    config = ema(shards, run_dir, num_steps, resume)
    rollout = {"micro_batch_size": 2, "sample_ahead": ahead == "on", "parameters": "gathered"}
    if how == "sharded":
        rollout["parameters"] = how
    config = replace(
        config,
        run=replace(config.run, save_minutes=0.0),
        rollout=replace(config.rollout, **rollout),
        optim=replace(config.optim, learning_rate=float(rate)),
    )
    if how == "lora":
        return replace(config, policy=replace(config.policy, lora=LoraConfig(rank=4)))
    if how == "rescored":
        again = replace(config.rewards["alignment"], rescorings=({"frames": 4},))
        bpgo = replace(config.bpgo, trust="reliability")
        return replace(
            config, rewards={"alignment": again}, bpgo=bpgo, reliability=ReliabilityConfig(rescore_below=0.01)
        )
    return config


def evaluated(shards: Path, run_dir: Path, every: str) -> Config:
    """Two steps with a random reward, without evaluation or with a random one of both weights after each step."""
    drawn = {"model": "tests.distributed.toy_rewards:Drawn"}
    short = {"run": {"num_steps": 2}, "sampler": {"num_steps": 3}, "evaluation": {"num_steps": 2}}
    config = small_recipe(run_dir, shards, ema={"decay": 0.9}, **short)
    config = rewarded_by(config, drawn["model"])
    if every == "never":
        return without_evaluation(config)
    heldout = {"rewards": {"heldout": RewardConfig(**drawn)}, "every": int(every), "weights": "both"}
    return replace(config, evaluation=replace(config.evaluation, **heldout))


def smoke(shards: Path, run_dir: Path, stage: str) -> Config:
    """Two steps of the recipe under another DeepSpeed configuration."""
    return with_stage(without_evaluation(small_recipe(run_dir, shards, run={"num_steps": 2})), stage)


def sharded_memory(folder: Path) -> dict[str, float]:
    """Megabytes added by building a model under ZeRO-3, at the peak and at the end, and the size of the whole model.

    Meanwhile the allocator returns freed memory at once, so that the resident size equals the allocated memory.
    """
    set_mmap_threshold(65_536)
    ds_config = read_ds_config("ds_configs/zero3.json")
    build_sharded(ds_config, WanTransformer3DModel, SMALL, torch.float32)  # allocations that the first use never frees
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident_megabytes("VmRSS")
    model = build_sharded(ds_config, WanTransformer3DModel, folder, torch.float32)
    peak, end = resident_megabytes("VmHWM") - before, resident_megabytes("VmRSS") - before
    set_mmap_threshold(32 * 2**20)
    whole = max(parameter.numel() for parameter in model.parameters())
    return {"whole": size, "peak": peak, "end": end, "largest_parameter_in_memory": whole}


def set_mmap_threshold(size: int) -> None:
    """Let glibc map allocations of this many bytes or more from the system, one by one."""
    assert ctypes.CDLL(None).mallopt(-3, size) == 1  # M_MMAP_THRESHOLD


def resident_megabytes(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(field))


def with_stage(config: Config, stage: str) -> Config:
    return replace(config, deepspeed=f"ds_configs/{stage}.json")


CASES: dict[str, Callable[..., Config]] = {
    "gradient": gradient, "exact_ratio": exact_ratio, "steps": steps, "ema": ema, "exact": exact, "smoke": smoke,
    "uneven": uneven, "ahead": ahead, "held": held, "credited": credited, "preferred": preferred, "drafted": drafted,
    "evaluated": evaluated, "in_advance": in_advance, "desirable": desirable, "slow_policy": slow_policy,
    "experts": experts, "one_expert": one_expert, "branched": branched, "sound": sound,
}  # fmt: skip


def main(mesh: Mesh, shards: str, output: str, *cases: str) -> None:
    for case in cases:
        folder, _, call = case.partition("=")
        name, *arguments = call.split(":")
        if name == "sharded_memory":
            found = sharded_memory(Path(arguments[0]))
            (Path(output) / f"{folder}.rank{mesh.rank}.json").write_text(json.dumps(found))
            continue
        config = CASES[name](Path(shards), Path(output) / folder, *arguments)
        summary = train(config)
        if mesh.is_main:
            (Path(output) / f"{folder}.{config.run.num_steps}.json").write_text(json.dumps(summary))
