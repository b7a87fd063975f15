"""What does a run of kind bpgo stand on? Everything checked first, cheap things before models, then built once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from bpgo_video.config.bpgo import Config
from bpgo_video.data.fingerprint import fingerprint
from bpgo_video.data.priors import PriorTable, load_priors, prior_path, require_priors
from bpgo_video.data.reader import PromptShards
from bpgo_video.data.stream import PromptStream, as_batch
from bpgo_video.distributed import engine as engines
from bpgo_video.distributed.agreement import all_or_none, same_everywhere
from bpgo_video.distributed.ds_config import compute_dtype
from bpgo_video.distributed.ema import EMA
from bpgo_video.distributed.memory import fits_everywhere
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.learner.priors import STORED
from bpgo_video.paths import resolve_folder
from bpgo_video.policies import Policy
from bpgo_video.policies.networks import Transformers, trained_names, transformer_names
from bpgo_video.policies.sequence import parallelise
from bpgo_video.rewards.backbones import Backbones
from bpgo_video.rewards.building import reward_factory
from bpgo_video.rewards.suite import RewardSuite
from bpgo_video.rollouts.conditioning import check_images, conditioned, image_size
from bpgo_video.rollouts.experts import check_experts
from bpgo_video.rollouts.reference import Averaged, FrozenCopy, Reference, WithoutAdapters
from bpgo_video.training.policy_session import (
    PolicySession,
    averaged,
    build_engine,
    builder,
    describe_policy,
    identity,
    read_foundations,
    sampling_policy,
)
from bpgo_video.types import PromptBatch


@dataclass(frozen=True)
class Prompts:
    """What is read of the shards: their folder, and the held-out prompts."""

    shards: PromptShards
    heldout: PromptBatch | None


@dataclass(frozen=True)
class Session(PolicySession):
    """The parts of a run of kind bpgo, built and ready."""

    config: Config
    prompts: Prompts
    priors: Mapping[str, PriorTable]
    suite: RewardSuite
    heldout_suite: RewardSuite | None
    reference: Reference | None

    def batches(self, start: int = 0) -> Iterator[tuple[PromptBatch, int]]:
        """The prompts of each step with all that the policy is conditioned on, and the position behind them.

        Args:
            start: how many prompts were consumed before.
        """
        config = self.config
        stream = PromptStream(
            self.prompts.shards,
            config.data.split,
            config.run.seed,
            config.rollout.prompts_per_step,
            start=start,
            priors=self.priors.values(),
            size=image_size(config, self.policy),
        )
        for prompts in stream:
            ready = conditioned(prompts, self.policy, config, self.dtype, self.mesh, config.rollout.group_size)
            yield ready, stream.position

    def rollout_weights(self) -> AbstractContextManager[None]:
        """Where videos are sampled: with all weights at hand, or with each block fetched for every step."""
        gathers = gathers_for_rollout(self.config, self.engine, self.mesh)
        return self.engine.whole_weights() if gathers else nullcontext()


def reads_priors(config: Config) -> bool:
    return config.prior.kind in STORED and config.bpgo.needs_prior


def check_inputs(config: Config, mesh: Mesh, need_priors: bool = True) -> tuple[dict[str, Any], PromptShards]:
    """Everything that can be wrong before a model is loaded, on any rank; that all ranks read the same.

    Raises:
        ConfigError, ShardError, FileNotFoundError: state the value, the rule and the way out.
    """
    with all_or_none(mesh):
        ds_config, shards = read_inputs(config, need_priors)
        stands_on = identity(config, ds_config, shards) | (priors_read(config, shards) if need_priors else {})
    same_everywhere(stands_on, mesh)
    return ds_config, shards


def read_inputs(config: Config, need_priors: bool) -> tuple[dict[str, Any], PromptShards]:
    """The DeepSpeed configuration and the prompts, checked on this rank."""
    for name, reward in {**config.rewards, **config.evaluation.rewards}.items():
        reward_factory(name, reward)
    ds_config, shards = read_foundations(config)
    splits = [config.data.split, *([config.evaluation.split] if config.evaluation.rewards else [])]
    for split in splits:
        shards.rows(split)
    policy = describe_policy(config)
    policy.latent_shape(config.video)  # a size that the family cannot make ends the run here
    check_experts(policy, config)
    check_images(config, policy.takes_images, shards, splits)
    if need_priors and reads_priors(config):
        require_priors(shards.directory, config.rewards)
    return ds_config, shards


def priors_read(config: Config, shards: PromptShards) -> dict[str, str]:
    """The priors that a run's numbers depend on, as text by what they are called."""
    if not reads_priors(config):
        return {}
    return {"priors": "".join(prior_path(shards.directory, name).read_text("utf-8") for name in config.rewards)}


def heldout_rows(config: Config, shards: PromptShards) -> list[int]:
    """Where the held-out prompts are in the shards: at most `evaluation.max_prompts`, evenly spread over the split."""
    rows = shards.rows(config.evaluation.split)
    count = min(len(rows), config.evaluation.max_prompts)
    return [int(rows[i * len(rows) // count]) for i in range(count)]


def heldout_prompts(config: Config, shards: PromptShards, policy: Policy) -> PromptBatch | None:
    """The held-out prompts, where there are rewards to score them with."""
    if not config.evaluation.rewards:
        return None
    return as_batch([shards.record(row) for row in heldout_rows(config, shards)], image_size(config, policy))


def gathers_for_rollout(config: Config, engine: engines.Engine, mesh: Mesh) -> bool:
    """What `rollout.parameters` means for this policy on these ranks now: its optimiser grows with the first update."""
    if config.rollout.parameters == "auto":
        return fits_everywhere(engine.missing_bytes, mesh)
    return config.rollout.parameters == "gathered"


def build_reference(
    config: Config, engine: engines.Engine, ds_config: Mapping[str, Any], mesh: Mesh, ema: EMA | None
) -> Reference | None:
    """The policy that the loss pulls to, where it is another than the one that sampled."""
    if config.loss.kl_weight == 0 or config.loss.kl_reference == "previous":
        return None
    if config.loss.kl_reference == "ema":
        assert ema is not None  # config_rules refuses this reference without an average
        return Averaged(ema)
    if config.policy.lora.rank:
        return WithoutAdapters(engine.module)
    policy = sampling_policy(config, ds_config, mesh, builder(ds_config), components=("transformer",))
    trained = trained_names(policy.folder, config.policy.trained)  # steps of the others are never compared
    kept = Transformers({name: policy.transformers[name] for name in trained}).requires_grad_(False)
    for module in kept.values():
        parallelise(module, mesh, policy.sequence_plan)
    policy.transformers = engines.frozen(kept, ds_config)
    return FrozenCopy(policy)


def build_session(config: Config, mesh: Mesh, ds_config: Mapping[str, Any], shards: PromptShards) -> Session:
    """Rewards, policy (sharded from birth under ZeRO-3) and engine, once `check_inputs` has passed."""
    with all_or_none(mesh):
        fps, heldout_rewards = config.video.fps, config.evaluation.rewards
        backbones = Backbones()
        suite = RewardSuite(config.rewards, mesh.device, fps, config.bpgo.scores_twice, backbones)
        heldout_suite = RewardSuite(heldout_rewards, mesh.device, fps, backbones=backbones) if heldout_rewards else None
        priors = load_priors(shards.directory, suite.versions) if reads_priors(config) else {}
        folder = resolve_folder(config.policy.folder)
        starting_policy = fingerprint(folder, transformer_names(folder))
        for prior in priors.values():
            prior.check_policy(starting_policy)
        if config.prior.kind == "shrunk":
            priors = {name: prior.shrunk() for name, prior in priors.items()}
    dtype = compute_dtype(ds_config)

    policy = sampling_policy(config, ds_config, mesh, builder(ds_config))
    heldout = heldout_prompts(config, shards, policy)
    if heldout is not None:
        heldout = conditioned(heldout, policy, config, dtype, mesh, config.evaluation.samples_per_prompt)
    engine = build_engine(config, policy, ds_config, mesh)
    ema = averaged(config, engine)
    return Session(
        config=config,
        mesh=mesh,
        prompts=Prompts(shards, heldout),
        priors=priors,
        suite=suite,
        heldout_suite=heldout_suite,
        policy=policy,
        engine=engine,
        reference=build_reference(config, engine, ds_config, mesh, ema),
        ema=ema,
    )
