"""The example family of docs/new_family.md (`example`), which also runs through the tests of all families.

These tests cover what an external family must define, and the errors if it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.distributed import ulysses
from bpgo_video.planning.fake import alone_in_a_group
from bpgo_video.planning.footprint import footprint
from bpgo_video.planning.job import Job
from bpgo_video.planning.memory import reckon
from bpgo_video.planning.models import find_model
from bpgo_video.policies.attention import SequencePlan, check_heads, parallelise
from tests.families import CASES, Policy
from tests.families.page import CODE
from tests.families.skyreels import random_skyreels

CASE = CASES["example"]
TRANSFORMER = "SkyReelsV2Transformer3DModel"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_skyreels(tmp_path_factory.mktemp("skyreels") / "pipeline")


@pytest.fixture
def policy(folder: Path) -> Policy:
    return CASE.policy(folder)


def job_of(folder: Path, **policy: Any) -> Job:
    config = CASE.recipe(folder)
    config = replace(config, policy=replace(config.policy, **policy), parallel=replace(config.parallel, sequence=2))
    return Job(config, {"zero_optimization": {"stage": 3}}, ranks=2, model=find_model(str(folder)))


def test_the_example_is_short() -> None:
    assert len([line for line in CODE.splitlines() if line.strip()]) <= 20


def test_without_policy_family_the_error_names_the_remedy(folder: Path, tmp_path: Path) -> None:
    unknown = tmp_path / "unknown"
    copytree(folder, unknown)
    index = unknown / "model_index.json"
    index.write_text(index.read_text().replace("SkyReelsV2Pipeline", "AllegroPipeline"))
    message = r"is a AllegroPipeline; known .*new_family.md.*policy.family"
    with pytest.raises(ConfigError, match=message):
        CASES["wan"].policy(unknown)
    with pytest.raises(ConfigError, match=message):
        reckon(job_of(unknown, family=None))


def test_the_plan_of_the_family_splits_its_tokens(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a group of two, a block gets half of the tokens, and self-attention gets all of them."""
    seen: dict[str, list[int]] = {"tokens": [], "attended": []}

    def dispatched(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
        seen["attended"].append(query.shape[1])
        return query

    monkeypatch.setattr(ulysses, "dispatch_attention_fn", dispatched)
    latents, _ = policy.example()
    conditioning = {"prompt_embeds": torch.zeros(1, 6, 16)}
    module: Any = policy.transformers["transformer"]
    whole = latents[0, 0].numel() // 4
    with alone_in_a_group(2) as mesh, torch.no_grad():
        parallelise(module, mesh, policy.sequence_plan)
        count: Callable[..., None] = lambda _, args: seen["tokens"].append(args[0].shape[1])  # noqa: E731
        module.blocks[0].register_forward_pre_hook(count)
        velocity = policy.velocity(latents, torch.tensor(0.5), conditioning)
    assert velocity.shape == latents.shape
    assert seen["tokens"] == [whole // 2]
    assert seen["attended"] == [whole, whole // 2] * 2, (
        "self-attention of two blocks, and cross-attention of local tokens"
    )


def test_a_missing_text_shapes_or_sequence_plan_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = job_of(folder)
    assert reckon(shared).phases["denoise"]["forward"] > 0
    policy_class: Any = type(shared.policy)
    footprint.cache_clear()
    with monkeypatch.context() as patched:
        patched.delattr(policy_class, "text_shapes")
        with pytest.raises(
            ConfigError, match=r"memory of SkyReelsPolicy cannot be planned: .* needs a method text_shapes"
        ):
            reckon(job_of(folder))
    monkeypatch.setattr(policy_class, "sequence_plan", None)
    with pytest.raises(ConfigError, match=rf"{TRANSFORMER} cannot be split.*sequence_plan"):
        reckon(job_of(folder))


def test_a_plan_without_an_attention_layer_is_refused() -> None:
    """Ranks would attend only to local tokens."""

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(2, 2)])
            self.head = nn.Linear(2, 2)

    plan = SequencePlan(blocks=("blocks",), rope=lambda *_: None, head="head")
    check_heads({"_class_name": "Written", "num_attention_heads": 4}, 2, plan)
    with (
        alone_in_a_group(2) as mesh,
        pytest.raises(ConfigError, match=r"attention of Written in \['blocks'\].*`attention`"),
    ):
        parallelise(Written(), mesh, plan)
