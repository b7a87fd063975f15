"""The family that docs/new_family.md shows is a whole one: the very text of the page trains and samples SkyReels-V2."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SkyReelsV2Pipeline, SkyReelsV2Transformer3DModel, WanPipeline

from bpgo_video.config.bpgo import ConfigError, VideoConfig
from tests.families import Case
from tests.made.random_wan import TEXT_TOKENS, random_wan
from tests.made.recipes import ROOT
from tests.policies import test_families as every

PAGE = ROOT / "docs" / "new_family.md"
MODULE = "skyreels_of_the_page"


def random_skyreels(folder: Path) -> Path:
    """Wan's random encoder and VAE around a transformer of SkyReels' class."""
    parts = WanPipeline.from_pretrained(random_wan(folder.with_name("wan"))).components
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = SkyReelsV2Transformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
            ffn_dim=32, num_layers=2, rope_max_seq_len=32,
        )  # fmt: skip
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
    names = ("tokenizer", "text_encoder", "vae", "scheduler")
    pipeline = SkyReelsV2Pipeline(**{name: parts[name] for name in names}, transformer=transformer)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def module() -> Iterator[ModuleType]:
    """The page's Python, as a module that a recipe can name."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(code.splitlines()) < 75
    found = sys.modules[MODULE] = ModuleType(MODULE)
    exec(compile(code, str(PAGE), "exec"), found.__dict__)
    yield found
    del sys.modules[MODULE]


@pytest.fixture(scope="module")
def case() -> Case:
    return Case(
        random_skyreels, VideoConfig(9, 64, 64, 24.0), TEXT_TOKENS, family=f"{MODULE}:SkyReelsPolicy",
        euler=lambda unipc: FlowMatchEulerDiscreteScheduler(shift=unipc.config.flow_shift),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_skyreels(tmp_path_factory.mktemp("skyreels") / "pipeline")


policy = every.policy
test_the_ode_rollout_is_the_pipelines_own = every.test_the_ode_rollout_is_the_pipelines_own
test_the_ratio_is_one_and_an_update_lowers_its_own_loss = every.test_the_ratio_is_one_and_an_update_lowers_its_own_loss
test_what_is_trained_leaves_in_files_that_diffusers_reads = (
    every.test_what_is_trained_leaves_in_files_that_diffusers_reads
)


def test_without_the_recipes_word_the_family_is_unknown_and_the_way_out_is_told(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a SkyReelsV2Pipeline; known .*new_family.md.*policy.family"):
        every.CASES["wan"].policy(folder)
