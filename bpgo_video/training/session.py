"""Construction of a run from its checked inputs: policy, engine, data and rewards, each built once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from bpgo_video.config.bpgo import Config
from bpgo_video.config.deepspeed import zero_stage
from bpgo_video.config.sft import Recipe
from bpgo_video.data.priors import PriorTable, load_priors
from bpgo_video.data.reader import PromptShards
from bpgo_video.data.stream import PromptStream, as_batch
from bpgo_video.distributed import engine as engines
from bpgo_video.distributed.ds_config import compute_dtype
from bpgo_video.distributed.ema import EMA, rising_decay
from bpgo_video.distributed.gathering import WhenGathered, not_gathered
from bpgo_video.distributed.mesh import Mesh, all_or_none
from bpgo_video.distributed.optimizer import learning_rate_factor
from bpgo_video.distributed.sharded_build import build_sharded
from bpgo_video.files import fingerprint, resolve_folder
from bpgo_video.inference.hub import this_code
from bpgo_video.policies import Policy
from bpgo_video.policies.attention import parallelise
from bpgo_video.policies.attention_backends import set_up_attention
from bpgo_video.policies.lora import add_lora
from bpgo_video.policies.networks import (
    Build,
    Transformers,
    blocks_of,
    checkpoint_blocks,
    compile_blocks,
    from_pretrained,
    load_frozen,
    save_memory,
    trained_names,
    transformer_names,
)
from bpgo_video.rewards.look import WATCHED
from bpgo_video.rewards.networks import Backbones
from bpgo_video.rewards.suite import RewardSuite
from bpgo_video.rollouts.conditioning import conditioned, image_size
from bpgo_video.rollouts.prior_sampling import check_anchors, positions_of, reads_priors
from bpgo_video.rollouts.updates import Reference, adapters_off
from bpgo_video.training.inputs import check_whole_groups, heldout_rows, recipe_policy
from bpgo_video.types import PromptBatch


@dataclass(frozen=True)
class PolicySession:
    """The parts that every kind of run has.

    Attributes:
        code: the program versions that trained so far, in order; several if a run resumed with another one.
    """

    config: Recipe
    mesh: Mesh
    policy: Policy
    engine: engines.Engine
    ema: EMA | None
    code: list[str] = field(default_factory=lambda: [this_code()], kw_only=True)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the transformers and their conditioning."""
        return self.engine.dtype

    @property
    def averages(self) -> list[EMA]:
        """The averages of the weights that checkpoints keep."""
        return [self.ema] if self.ema else []

    def weights(self, kind: str) -> AbstractContextManager[None]:
        """The block in which the policy computes with its weights (`raw`) or their average (`ema`)."""
        return self.ema.weights() if self.ema and kind == "ema" else nullcontext()


@dataclass(frozen=True)
class Heldout:
    """Held-out prompts and the rewards that score their videos."""

    prompts: PromptBatch
    suite: RewardSuite


@dataclass(frozen=True)
class Session(PolicySession):
    """The parts of a run on rewards.

    Attributes:
        heldout: None if the recipe has no held-out rewards.
        reference: see `build_reference`.
        old: the average of the weights that samples rollouts; None if the weights themselves do.
    """

    config: Config
    shards: PromptShards
    heldout: Heldout | None
    priors: Mapping[str, PriorTable]
    suite: RewardSuite
    reference: Reference | None
    old: EMA | None = None

    @property
    def averages(self) -> list[EMA]:
        return [*super().averages, *([self.old] if self.old else [])]

    def sampling_weights(self) -> AbstractContextManager[None]:
        """The block in which the policy computes with the weights that sample rollouts."""
        return self.old.weights() if self.old else nullcontext()

    def batches(self, start: int = 0) -> Iterator[PromptBatch]:
        """The conditioned prompts of each training step.

        Args:
            start: number of prompts consumed before.
        """
        config, rollout = self.config, self.config.rollout
        size, priors = image_size(config, self.policy), self.priors.values()
        stream = PromptStream(
            self.shards,
            config.data.split,
            config.run.seed,
            rollout.prompts_per_step,
            start=start,
            priors=priors,
            size=size,
        )
        for prompts in stream:
            yield conditioned(prompts, self.policy, config, self.dtype, self.mesh, rollout.group_size)

    def rollout_weights(self) -> AbstractContextManager[bool]:
        """The block in which videos are sampled, see `rollout_weights`."""
        return rollout_weights(self.config, self.engine.wrapped, self.engine.stage, self.mesh)


def rollout_weights(config: Config, wrapped: Any, stage: int, mesh: Mesh) -> AbstractContextManager[bool]:
    """The block in which videos are sampled: whether ZeRO-3 weights are gathered, or fetched in every step."""
    return WhenGathered(config.rollout.parameters, wrapped, mesh)() if stage == 3 else not_gathered()


def sampling_policy(
    config: Recipe,
    ds_config: Mapping[str, Any],
    mesh: Mesh,
    build: Build | None = None,
    components: Collection[str] = ("transformer", "vae", "image_encoder"),
) -> Policy:
    """The recipe's policy without its text encoder, whose embeddings come with the prompts.

    Args:
        build: loads a transformer; None loads the whole on every rank. See `builder`.

    Raises:
        WeightsError: on every rank; the folder of one of them is damaged.
    """
    policy = recipe_policy(
        config,
        components=components,
        dtype=compute_dtype(ds_config),
        device=mesh.device,
        build=build or together(from_pretrained, mesh),
        load=together(load_frozen, mesh),
    )
    save_memory(policy, config.policy, mesh.device)
    of_ode = config.rollout.attention_backend if isinstance(config, Config) else None
    with all_or_none(mesh):  # hosts may have other kernels
        set_up_attention(policy, config.policy.attention_backend, of_ode, compute_dtype(ds_config), mesh.device)
    return policy


def together(load: Callable[..., nn.Module], mesh: Mesh) -> Callable[..., nn.Module]:
    """`load`, which raises on all ranks if it does on one: the files of one host alone may be damaged."""

    def loaded(*arguments: Any) -> nn.Module:
        with all_or_none(mesh):
            return load(*arguments)

    return loaded


def builder(ds_config: Mapping[str, Any]) -> Build | None:
    """The function that loads a transformer for training: under ZeRO-3 it is created sharded."""
    return partial(build_sharded, ds_config) if zero_stage(ds_config) == 3 else None


def build_engine(config: Recipe, policy: Policy, ds_config: Mapping[str, Any], mesh: Mesh) -> engines.Engine:
    """Add adapters, checkpointing, sequence groups and compiled blocks to the transformers; wrap them in the engine."""
    trained = trained_names(policy.folder, config.policy.trained)
    blocks = blocks_of(policy.transformers, policy.block_names)
    for name, module in policy.transformers.items():
        if name not in trained:
            module.requires_grad_(False)
        elif config.policy.lora.rank:
            add_lora(module, config.policy.lora, config.run.seed)
        if config.policy.checkpointed:
            checkpoint_blocks(module, config.policy.checkpointed)
        parallelise(module, mesh, policy.sequence_plan)
        if config.policy.compile_blocks:
            compile_blocks(module, blocks_of(module, policy.block_names))
    optim = config.optim
    engine = engines.Engine(
        policy.transformers,
        optim,
        ds_config,
        micro_batch_size=config.micro_batch_size,
        learning_rate_factor=learning_rate_factor(optim.schedule, optim.warmup_updates, config.num_updates),
        block_classes=blocks,
    )
    if engine.stage == 3:
        engine.gathers = WhenGathered(optim.parameters, engine.wrapped, mesh, measures=True)
    policy.transformers = engine.wrapped
    return engine


def build_ema(config: Recipe, engine: engines.Engine) -> EMA | None:
    """The average of the engine's weights, updated after each update; None if `ema.decay` is 0."""
    if not config.ema.decay:
        return None
    ema = EMA(engine.masters, config.ema)
    engine.after_update = ema.update
    return ema


def build_old_policy(config: Config, engine: engines.Engine) -> EMA | None:
    """The average of the weights that samples rollouts, to be moved after each; None if `loss.old_decay` is 0."""
    loss, updates = config.loss, config.optim.updates_per_rollout
    if not loss.old_decay:
        return None
    return EMA(engine.masters, partial(rising_decay, rate=loss.old_decay_rate * updates, largest=loss.old_decay), "old")


def build_reference(
    config: Config,
    policy: Policy,
    engine: engines.Engine,
    ds_config: Mapping[str, Any],
    mesh: Mesh,
    ema: EMA | None,
    old: EMA | None,
) -> Reference | None:
    """The policy of the KL term, of DPO, or the slowly moving old one; None if the loss compares with none of these."""
    loss = config.loss
    if old is not None:
        return Reference(policy, old.weights)
    if not loss.uses_reference or loss.kl_reference == "previous":
        return None
    if loss.kl_reference == "ema":
        assert ema is not None  # config/rules.py requires ema.decay > 0
        engine.gathers = not_gathered  # swapped weights would have to be gathered in every pass
        return Reference(policy, ema.weights)
    if config.policy.lora.rank:
        return Reference(policy, partial(adapters_off, engine.module))
    trained = trained_names(policy.folder, config.policy.trained)  # steps of the others are not trained
    return Reference(frozen_policy(config, ds_config, mesh, components=("transformer",), names=trained))


def frozen_policy(
    config: Config, ds_config: Mapping[str, Any], mesh: Mesh, names: Collection[str] = (), **arguments: Any
) -> Policy:
    """The starting policy for inference alone, sharded under ZeRO-3, in sequence groups.

    Args:
        names: the transformers that it keeps; all if empty.
        arguments: of `sampling_policy`.
    """
    policy = sampling_policy(config, ds_config, mesh, builder(ds_config), **arguments)
    kept = {name: policy.transformers[name] for name in names or policy.transformers}
    transformers = Transformers(kept).requires_grad_(False)
    for module in transformers.values():
        parallelise(module, mesh, policy.sequence_plan)
    policy.transformers = engines.frozen(transformers, ds_config)
    return policy


def build_session(config: Config, mesh: Mesh, ds_config: Mapping[str, Any], shards: PromptShards) -> Session:
    """Build rewards, policy and engine; call it after `check_inputs`."""
    with all_or_none(mesh):
        check_whole_groups(config, mesh)
        evaluation, fps, backbones = config.evaluation, config.video.fps, Backbones()
        suite = RewardSuite(config.rewards, mesh.device, fps, backbones)
        if config.loss.objective == "draft":
            suite.require_differentiable()
        watched = WATCHED if evaluation.rewards else {}
        heldout_suite = RewardSuite({**evaluation.rewards, **watched}, mesh.device, fps, backbones=backbones)
        priors = load_priors(shards.directory, suite.trained_versions) if reads_priors(config) else {}
        folder = resolve_folder(config.policy.folder)
        starting_policy = fingerprint(folder, transformer_names(folder))
        for prior in priors.values():
            prior.check_policy(starting_policy)
        check_anchors(config, shards, priors, positions_of(config))
        if config.prior.kind == "shrunk":
            priors = {name: prior.shrunk() for name, prior in priors.items()}
    policy = sampling_policy(config, ds_config, mesh, builder(ds_config))
    heldout = None
    if evaluation.rewards:
        records = [shards.record(row) for row in heldout_rows(config, shards)]
        prompts, dtype = as_batch(records, image_size(config, policy)), compute_dtype(ds_config)
        prompts = conditioned(prompts, policy, config, dtype, mesh, evaluation.samples_per_prompt)
        heldout = Heldout(prompts, heldout_suite)
    engine = build_engine(config, policy, ds_config, mesh)
    ema, old = build_ema(config, engine), build_old_policy(config, engine)
    return Session(
        config=config,
        mesh=mesh,
        policy=policy,
        engine=engine,
        ema=ema,
        shards=shards,
        heldout=heldout,
        priors=priors,
        suite=suite,
        reference=build_reference(config, policy, engine, ds_config, mesh, ema, old),
        old=old,
    )
