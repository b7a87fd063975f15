"""The process and shapes for the stages: Wan2.1's published shapes, or small ones in a dry run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bpgo_video.config.bpgo import Config, VideoConfig
from bpgo_video.config.reading import ds_config_file, read_yaml
from bpgo_video.config.run import EmaConfig
from bpgo_video.distributed.engine import Engine
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.distributed.process_group import start_ranks
from bpgo_video.files import resolve_folder
from bpgo_video.planning.models import Model, find_model

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "pipelines" / "configs" / "wan21_1.3b_480p_8x80gb.yaml"
EMBEDDED = "package:bpgo_video.tiny/weights/wan"
TINY_TRANSFORMER = {
    "_class_name": "WanTransformer3DModel", "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4,
    "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 64, "num_layers": 2, "rope_max_seq_len": 32,
}  # fmt: skip
TINY_VAE = {
    "_class_name": "AutoencoderKLWan", "base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 1,
    "temperal_downsample": [True, True], "in_channels": 12, "out_channels": 12, "patch_size": 2,
    "scale_factor_temporal": 4, "scale_factor_spatial": 8, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4,
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """The models, videos and repetitions of the timings.

    Attributes:
        small, large: models measured completely, and by a few blocks.
        recipe: steps, guidance, sampler and DeepSpeed settings of both.
        videos: sizes in the order of measurement.
        blocks: two numbers of blocks of the large model; the difference gives the cost of a block.
        matrix: rows of the square matrices that measure the GPU's rate.
        rounds: timings per median, after a warm-up call.
        checked_steps: denoising steps per rollout in the checks.
        stance: argument of `torch.compiler.set_stance`.
    """

    small: Model
    large: Model
    recipe: Config
    videos: tuple[VideoConfig, ...]
    blocks: tuple[int, int]
    matrix: int
    rounds: int
    checked_steps: int
    stance: str


@dataclass(frozen=True)
class Bench:
    """The single measuring rank, a folder for its files, and the sizes."""

    mesh: Mesh
    scratch: Path
    sizes: Sizes
    timed: list[Any] = field(default_factory=list)  # results that the stage memory_plan compares with the plan

    @property
    def device(self) -> torch.device:
        return self.mesh.device

    def ds_config(self, **zero: Any) -> dict[str, Any]:
        """The recipe's DeepSpeed configuration with changes to `zero_optimization`."""
        config = json.loads(ds_config_file(self.sizes.recipe.deepspeed).read_text("utf-8"))
        return {**config, "zero_optimization": {**config["zero_optimization"], **zero}}


def start(scratch: Path, sizes: Sizes) -> Bench:
    """Start the single rank of a process group, with NCCL on a GPU and gloo elsewhere."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS starts: reproducible sums
    return Bench(start_ranks(), scratch, sizes)


def published() -> Sizes:
    recipe = replace(read_yaml(RECIPE), ema=EmaConfig())  # timings of a step's parts exclude the average of the weights
    videos = tuple(replace(recipe.video, num_frames=frames) for frames in (33, 81))
    small, large = find_model("wan2.1-t2v-1.3b"), find_model("wan2.1-t2v-14b")
    return Sizes(
        small, large, recipe, videos, blocks=(2, 4), matrix=8192, rounds=3, checked_steps=8, stance="default"
    )  # fmt: skip


def tiny() -> Sizes:
    """A transformer of two blocks for a dry run on a CPU, without the compiler, which takes a minute there."""
    full = published()
    policy = replace(full.recipe.policy, max_sequence_length=8)
    videos = tuple(VideoConfig(num_frames=frames, height=64, width=64, fps=16) for frames in (5, 9))
    model = Model("tiny", "this file", {"_class_name": "WanPipeline"}, ("transformer",), TINY_TRANSFORMER, TINY_VAE)
    return Sizes(
        model, model, replace(full.recipe, policy=policy), videos, blocks=(1, 2), matrix=64, rounds=1, checked_steps=3,
        stance="force_eager",
    )  # fmt: skip


def random_folder(bench: Bench, model: Model) -> Path:
    """Write a pipeline of this shape with random bf16 weights, so that it is loaded like any other."""
    folder = bench.scratch / f"{model.name}-{model.transformer.get('num_layers')}"
    if folder.exists():
        return folder
    unweighted = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(resolve_folder(EMBEDDED), folder, ignore=unweighted)
    for part, config in (("transformer", model.transformer), ("vae", model.vae)):
        (folder / part / "config.json").unlink()
        random_network(config, bench.device).save_pretrained(folder / part)
    return folder


def random_network(config: Mapping[str, Any], device: torch.device) -> Any:
    torch.manual_seed(0)
    with device:
        return getattr(diffusers, config["_class_name"]).from_config(dict(config)).bfloat16()


def release(engine: Engine) -> None:
    """Free an engine's memory. DeepSpeed's hooks keep it alive after `destroy`, so its storages are emptied."""
    engine.wrapped.destroy()
    optimizer, parameters = engine.wrapped.optimizer, list(engine.module.parameters())
    shards = [parameter.ds_tensor for parameter in parameters if hasattr(parameter, "ds_tensor")]
    for leaf in tree_leaves([vars(optimizer), dict(optimizer.optimizer.state), parameters, shards]):
        if isinstance(leaf, Tensor):
            leaf.untyped_storage().resize_(0)


def with_blocks(model: Model, blocks: int) -> Model:
    return replace(model, transformer={**model.transformer, "num_layers": blocks})
