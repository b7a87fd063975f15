"""What does every run train, and what does it stand on? A policy under its engine; all is checked before it is built.

What a recipe adds is its own: rewards and priors in session.py, clips in sft_session.py.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import bpgo_video
from bpgo_video.code_version import this_code
from bpgo_video.config.sft import Recipe
from bpgo_video.config.shipped import ds_config_file
from bpgo_video.data.encoding import check_image_stamp
from bpgo_video.data.fingerprint import encoder_stamp, fingerprint
from bpgo_video.data.reader import PromptShards
from bpgo_video.distributed import engine as engines
from bpgo_video.distributed.ds_config import compute_dtype, read_ds_config, zero_stage
from bpgo_video.distributed.ema import EMA
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.distributed.optimizer import learning_rate_factor
from bpgo_video.paths import resolve_folder
from bpgo_video.policies import Policy, family, load_policy
from bpgo_video.policies.execution import check_backend, choose_attention, compile_blocks, save_memory
from bpgo_video.policies.lora import add_lora
from bpgo_video.policies.networks import Build, blocks_of, from_pretrained, trained_names, transformer_names
from bpgo_video.policies.sequence import check_heads, parallelise

PACKAGES = ("torch", "deepspeed", "diffusers", "transformers")


@dataclass(frozen=True)
class PolicySession:
    """The parts that every run has, built and ready.

    Attributes:
        code: the versions of the program that train, in order; more than one where a run went on with another.
    """

    config: Recipe
    mesh: Mesh
    policy: Policy
    engine: engines.Engine
    ema: EMA | None
    code: list[str] = field(default_factory=lambda: [this_code()], kw_only=True)

    @property
    def dtype(self) -> torch.dtype:
        """Of the transformers and what they are conditioned on."""
        return self.engine.dtype

    def weights(self, kind: str) -> AbstractContextManager[None]:
        """Where the policy is measured: with its weights (`raw`), or with their average (`ema`)."""
        return self.ema.weights() if self.ema and kind == "ema" else nullcontext()


def read_foundations(config: Recipe) -> tuple[dict[str, Any], PromptShards]:
    """The DeepSpeed configuration and the shards, checked on this rank against the policy's folder."""
    ds_config = read_ds_config(str(ds_config_file(config.deepspeed)))
    engines.require_supported(ds_config)
    check_backend(config.policy.attention_backend, trains=True)
    folder = resolve_folder(config.policy.folder)
    plan = family(folder, config.policy.family).sequence_plan
    for name in trained_names(folder, config.policy.trained):
        check_heads(json.loads((folder / name / "config.json").read_text("utf-8")), config.parallel.sequence, plan)
    shards = PromptShards(config.data.shards, config.data.cache)
    shards.check_policy(encoder_stamp(folder, config.policy.max_sequence_length))
    if family(folder, config.policy.family).texts_see_images:
        check_image_stamp(shards, folder, (config.video.height, config.video.width))
    return ds_config, shards


def identity(config: Recipe, ds_config: Mapping[str, Any], shards: PromptShards) -> dict[str, str]:
    """All that the numbers of any run depend on, as text by what it is called."""
    found = {f"{name} section": repr(section) for name, section in vars(config).items()}
    found["DeepSpeed configuration"] = repr(ds_config)
    found["prompt shards"] = repr(shards.index)
    folder = resolve_folder(config.policy.folder)
    found["model"] = fingerprint(folder, (*transformer_names(folder), "vae"))
    code = sorted(Path(bpgo_video.__file__).parent.rglob("*.py"))
    found["bpgo_video code"] = "".join(path.read_text("utf-8") for path in code)
    found["package versions"] = repr({name: version(name) for name in PACKAGES})
    return found


def sampling_policy(
    config: Recipe,
    ds_config: Mapping[str, Any],
    mesh: Mesh,
    build: Build = from_pretrained,
    components: Collection[str] = ("transformer", "vae", "image_encoder"),
) -> Policy:
    """The recipe's policy without its text encoder: embeddings come with the prompts.

    Args:
        build: how the transformers come into being; by default whole on every rank.
    """
    policy = load_policy(
        config.policy.folder,
        components=components,
        max_sequence_length=config.policy.max_sequence_length,
        dtype=compute_dtype(ds_config),
        device=mesh.device,
        build=build,
        name=config.policy.family,
        options=config.policy.options,
    )
    save_memory(policy, config.policy, mesh.device)
    choose_attention(policy.transformers, config.policy.attention_backend, policy.sequence_plan)
    return policy


def describe_policy(config: Recipe) -> Policy:
    """The recipe's policy without any network: what its folder says of it."""
    return load_policy(
        config.policy.folder,
        components=(),
        max_sequence_length=config.policy.max_sequence_length,
        name=config.policy.family,
        options=config.policy.options,
    )


def build_engine(config: Recipe, policy: Policy, ds_config: Mapping[str, Any], mesh: Mesh) -> engines.Engine:
    """Adapters, checkpointing and sequence groups on the policy's transformers, which the engine then takes over."""
    trained = trained_names(policy.folder, config.policy.trained)
    blocks = blocks_of(policy.transformers, policy.block_names)
    for name, module in policy.transformers.items():
        prepare(module, config, mesh, policy, trains=name in trained)
    optim = config.optim
    engine = engines.Engine(
        policy.transformers,
        optim,
        ds_config,
        micro_batch_size=config.micro_batch_size,
        learning_rate_factor=learning_rate_factor(optim.schedule, optim.warmup_updates, config.num_updates),
        block_classes=blocks,
    )
    policy.transformers = engine.wrapped
    return engine


def averaged(config: Recipe, engine: engines.Engine) -> EMA | None:
    """The average of the engine's weights, which each update extends, if the recipe asks for one."""
    if not config.ema.decay:
        return None
    ema = EMA(engine.masters, config.ema)
    engine.after_update = ema.update
    return ema


def prepare(module: Any, config: Recipe, mesh: Mesh, policy: Policy, trains: bool) -> None:
    """A transformer as the recipe wants it, before an engine takes it."""
    if not trains:
        module.requires_grad_(False)
    elif config.policy.lora.rank:
        add_lora(module, config.policy.lora, config.run.seed)
    if config.policy.gradient_checkpointing:
        module.enable_gradient_checkpointing()
    parallelise(module, mesh, policy.sequence_plan)
    if config.policy.compile_blocks:
        compile_blocks(module, blocks_of(module, policy.block_names))


def builder(ds_config: Mapping[str, Any]) -> Build:
    """How transformers come into being: sharded from birth under ZeRO-3."""
    return partial(engines.build_sharded, ds_config) if zero_stage(ds_config) == 3 else from_pretrained
