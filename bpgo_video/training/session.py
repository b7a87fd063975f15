"""Construction of a run: inputs are checked on every rank first, then policy, engine and data are built once."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bpgo_video
from bpgo_video.config.bpgo import Config
from bpgo_video.config.reading import ds_config_file
from bpgo_video.config.sft import Recipe, SftConfig
from bpgo_video.data.priors import PriorTable, load_priors, prior_path, require_priors
from bpgo_video.data.reader import PromptShards
from bpgo_video.data.records import LATENTS, ShardError, encoder_stamp
from bpgo_video.data.stream import EndlessOrder, PromptStream, as_batch
from bpgo_video.data.writer import clip_stamp, image_stamp
from bpgo_video.distributed import engine as engines
from bpgo_video.distributed.ds_config import compute_dtype, read_ds_config, zero_stage
from bpgo_video.distributed.ema import EMA
from bpgo_video.distributed.mesh import Mesh, all_or_none, from_all, same_everywhere
from bpgo_video.distributed.optimizer import learning_rate_factor
from bpgo_video.files import fingerprint, resolve_folder
from bpgo_video.inference.hub import this_code
from bpgo_video.learner.priors import STORED
from bpgo_video.policies import Policy, family, load_policy
from bpgo_video.policies.execution import check_backend, choose_attention, compile_blocks, save_memory
from bpgo_video.policies.lora import add_lora
from bpgo_video.policies.networks import (
    Build,
    Transformers,
    blocks_of,
    from_pretrained,
    trained_names,
    transformer_names,
)
from bpgo_video.policies.sequence import check_heads, parallelise
from bpgo_video.rewards.backbones import Backbones
from bpgo_video.rewards.building import reward_factory
from bpgo_video.rewards.suite import RewardSuite
from bpgo_video.rollouts.conditioning import conditioned, image_size
from bpgo_video.rollouts.reference import Reference, adapters_off
from bpgo_video.rollouts.rules import check_experts, check_images
from bpgo_video.training.memory import fits_everywhere
from bpgo_video.training.trackers import check_trackers
from bpgo_video.types import PromptBatch

PACKAGES = ("torch", "deepspeed", "diffusers", "transformers")  # a run's numbers depend on their versions


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
        reference: the policy of the KL term, unless that is the policy that sampled.
    """

    config: Config
    shards: PromptShards
    heldout: Heldout | None
    priors: Mapping[str, PriorTable]
    suite: RewardSuite
    reference: Reference | None

    def batches(self, start: int = 0) -> Iterator[tuple[PromptBatch, int]]:
        """The conditioned prompts of each training step, and the number of prompts consumed after it.

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
            ready = conditioned(prompts, self.policy, config, self.dtype, self.mesh, rollout.group_size)
            yield ready, stream.position

    def rollout_weights(self) -> AbstractContextManager[None]:
        """The block in which videos are sampled: ZeRO-3 weights gathered, or fetched block by block in every step."""
        parameters = self.config.rollout.parameters
        if parameters == "auto":  # decided at each rollout: the first update allocates the optimiser's state
            gather = fits_everywhere(self.engine.missing_bytes, self.mesh)
        else:
            gather = parameters == "gathered"
        return self.engine.whole_weights() if gather else nullcontext()


Inputs = tuple[dict[str, Any], PromptShards]  # the DeepSpeed configuration and the shards


def environment(session: PolicySession) -> dict[str, Any]:
    """Code, package versions and hardware of a run, the same on every rank; every rank calls it."""
    device = session.mesh.device
    ranks = from_all((platform.node(), hardware(device)), session.mesh)
    models, hosts = Counter(model for _, model in ranks), len({host for host, _ in ranks})
    found = ", ".join(f"{count} x {model}" for model, count in models.items())
    return {
        "code": session.code,
        "packages": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "hardware": f"{found} on {hosts} {'host' if hosts == 1 else 'hosts'}",
        "device": device.type,
    }


def hardware(device: torch.device) -> str:
    """The model of a rank's device; of a CPU, with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text("utf-8").splitlines() if listed.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()} (threads: {torch.get_num_threads()})"


def check_inputs(config: Recipe, mesh: Mesh, need_priors: bool = True) -> Inputs:
    """Check everything that can be checked before a model is loaded, and that all ranks read the same inputs.

    Raises:
        ConfigError, ShardError, FileNotFoundError: on every rank; with the value, the rule and the way out.
    """
    with all_or_none(mesh):
        if mesh.is_main:
            check_trackers(config)
        ds_config, shards = read_common_inputs(config)
        if isinstance(config, SftConfig):
            check_clips(config, shards)
            priors = []
        else:
            check_prompts(config, shards)
            priors = list(config.rewards) if need_priors and reads_priors(config) else []
            require_priors(shards.directory, priors)
        identity = run_identity(config, ds_config, shards)
        identity["priors"] = "".join(prior_path(shards.directory, name).read_text("utf-8") for name in priors)
    same_everywhere(identity, mesh)
    return ds_config, shards


def read_common_inputs(config: Recipe) -> tuple[dict[str, Any], PromptShards]:
    """The DeepSpeed configuration and the shards, checked on this rank against the policy's folder."""
    ds_config = read_ds_config(str(ds_config_file(config.deepspeed)))
    engines.require_supported(ds_config)
    check_backend(config.policy.attention_backend, trains=True)
    folder = resolve_folder(config.policy.folder)
    policy_class = family(folder, config.policy.family)
    for name in trained_names(folder, config.policy.trained):
        transformer = json.loads((folder / name / "config.json").read_text("utf-8"))
        check_heads(transformer, config.parallel.sequence, policy_class.sequence_plan)
    shards = PromptShards(config.data.shards, config.data.cache)
    shards.check_policy(encoder_stamp(folder, config.policy.max_sequence_length))
    if policy_class.texts_see_images:
        shards.check_stamp(image_stamp(folder, (config.video.height, config.video.width)))
    return ds_config, shards


def run_identity(config: Recipe, ds_config: Mapping[str, Any], shards: PromptShards) -> dict[str, str]:
    """Everything that a run's numbers depend on, as text by name."""
    folder = resolve_folder(config.policy.folder)
    code = sorted(Path(bpgo_video.__file__).parent.rglob("*.py"))
    return {
        **{f"{name} section": repr(section) for name, section in vars(config).items()},
        "DeepSpeed configuration": repr(ds_config),
        "prompt shards": repr(shards.index),
        "model": fingerprint(folder, (*transformer_names(folder), "vae")),
        "bpgo_video code": "".join(path.read_text("utf-8") for path in code),
        "package versions": repr({name: version(name) for name in PACKAGES}),
    }


def check_prompts(config: Config, shards: PromptShards) -> None:
    """Check rewards, splits, video size, trained steps and images of a run on rewards."""
    for name, reward in {**config.rewards, **config.evaluation.rewards}.items():
        reward_factory(name, reward)
    splits = [config.data.split, *([config.evaluation.split] if config.evaluation.rewards else [])]
    for split in splits:
        shards.rows(split)
    policy = describe_policy(config)
    policy.latent_shape(config.video)  # raises for a video size that the family cannot make
    check_experts(policy, config)
    check_images(config, policy.takes_images, shards, splits)


def check_clips(config: SftConfig, shards: PromptShards) -> None:
    """Check that the shards hold clips of the recipe's video size, encoded by this policy's VAE, in its splits.

    Raises:
        ShardError: names the difference and the command to run.
    """
    shards.require_clips()
    folder = resolve_folder(config.policy.folder)
    takes_images = family(folder, config.policy.family).takes_images
    shards.check_stamp(clip_stamp(folder, config.video, takes_images))
    if takes_images != (set(shards.clip) != {LATENTS}):
        raise ShardError(
            f"{shards.directory} holds {sorted(shards.clip)} of each clip, but {config.policy.folder} makes videos of "
            f"{'images' if takes_images else 'texts alone'}: build shards for it with bpgo-video videos build"
        )
    EndlessOrder(shards, config.data.split, config.run.seed, config.sft.batch_size)
    if config.evaluation.split is not None:
        shards.rows(config.evaluation.split)


def reads_priors(config: Config) -> bool:
    """Whether the run reads measured priors from the shards' folder."""
    return config.prior.kind in STORED and config.bpgo.needs_prior


def heldout_rows(config: Config, shards: PromptShards) -> list[int]:
    """Rows of the held-out prompts: at most `evaluation.max_prompts`, evenly spread over the split."""
    return spread_rows(shards, config.evaluation.split, config.evaluation.max_prompts).tolist()


def spread_rows(shards: PromptShards, split: str | None, most: int) -> np.ndarray:
    """At most `most` rows of a split, evenly spread over it; none without a split."""
    if split is None:
        return np.empty(0, dtype=np.int64)
    rows = shards.rows(split)
    count = min(len(rows), most)
    return rows[np.arange(count) * len(rows) // count]


def describe_policy(config: Recipe) -> Policy:
    """The recipe's policy without any network."""
    return _load_policy(config, components=())


def _load_policy(config: Recipe, **arguments: Any) -> Policy:
    policy = config.policy
    arguments |= {"max_sequence_length": policy.max_sequence_length, "name": policy.family, "options": policy.options}
    return load_policy(policy.folder, **arguments)


def sampling_policy(
    config: Recipe,
    ds_config: Mapping[str, Any],
    mesh: Mesh,
    build: Build = from_pretrained,
    components: Collection[str] = ("transformer", "vae", "image_encoder"),
) -> Policy:
    """The recipe's policy without its text encoder, whose embeddings come with the prompts.

    Args:
        build: loads a transformer; by default whole on every rank. See `builder`.
    """
    dtype = compute_dtype(ds_config)
    policy = _load_policy(config, components=components, dtype=dtype, device=mesh.device, build=build)
    save_memory(policy, config.policy, mesh.device)
    choose_attention(policy.transformers, config.policy.attention_backend, policy.sequence_plan)
    return policy


def builder(ds_config: Mapping[str, Any]) -> Build:
    """The function that loads a transformer for training: under ZeRO-3 it is created sharded."""
    return partial(engines.build_sharded, ds_config) if zero_stage(ds_config) == 3 else from_pretrained


def build_engine(config: Recipe, policy: Policy, ds_config: Mapping[str, Any], mesh: Mesh) -> engines.Engine:
    """Add adapters, checkpointing, sequence groups and compiled blocks to the transformers; wrap them in the engine."""
    trained = trained_names(policy.folder, config.policy.trained)
    blocks = blocks_of(policy.transformers, policy.block_names)
    for name, module in policy.transformers.items():
        if name not in trained:
            module.requires_grad_(False)
        elif config.policy.lora.rank:
            add_lora(module, config.policy.lora, config.run.seed)
        if config.policy.gradient_checkpointing:
            module.enable_gradient_checkpointing()
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
    policy.transformers = engine.wrapped
    return engine


def build_ema(config: Recipe, engine: engines.Engine) -> EMA | None:
    """The average of the engine's weights, updated after each update; None if `ema.decay` is 0."""
    if not config.ema.decay:
        return None
    ema = EMA(engine.masters, config.ema)
    engine.after_update = ema.update
    return ema


def build_reference(
    config: Config, policy: Policy, engine: engines.Engine, ds_config: Mapping[str, Any], mesh: Mesh, ema: EMA | None
) -> Reference | None:
    """The policy of the KL term; None without one, or if it is the policy that sampled."""
    loss = config.loss
    if loss.kl_weight == 0 or loss.kl_reference == "previous":
        return None
    if loss.kl_reference == "ema":
        assert ema is not None  # config/rules.py requires ema.decay > 0
        return Reference(policy, ema.weights)
    if config.policy.lora.rank:
        return Reference(policy, partial(adapters_off, engine.module))
    frozen = sampling_policy(config, ds_config, mesh, builder(ds_config), components=("transformer",))
    trained = trained_names(frozen.folder, config.policy.trained)  # steps of the others are not trained
    transformers = Transformers({name: frozen.transformers[name] for name in trained}).requires_grad_(False)
    for module in transformers.values():
        parallelise(module, mesh, frozen.sequence_plan)
    frozen.transformers = engines.frozen(transformers, ds_config)
    return Reference(frozen)


def build_session(config: Config, mesh: Mesh, ds_config: Mapping[str, Any], shards: PromptShards) -> Session:
    """Build rewards, policy and engine; call it after `check_inputs`."""
    with all_or_none(mesh):
        evaluation, fps, backbones = config.evaluation, config.video.fps, Backbones()
        suite = RewardSuite(config.rewards, mesh.device, fps, config.bpgo.scores_twice, backbones)
        heldout_suite = RewardSuite(evaluation.rewards, mesh.device, fps, backbones=backbones)
        priors = load_priors(shards.directory, suite.versions) if reads_priors(config) else {}
        folder = resolve_folder(config.policy.folder)
        starting_policy = fingerprint(folder, transformer_names(folder))
        for prior in priors.values():
            prior.check_policy(starting_policy)
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
    ema = build_ema(config, engine)
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
        reference=build_reference(config, policy, engine, ds_config, mesh, ema),
    )
