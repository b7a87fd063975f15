"""Recipe coverage: every method of every table has a shipped recipe in docs/algorithms.md, or a reason for none."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from bpgo_video.config.bpgo import Config
from bpgo_video.config.learner import FORM_TRUST, CreditConfig
from bpgo_video.config.reading import read_recipe
from bpgo_video.diffusion.sde import SAMPLERS, SOLVERS
from bpgo_video.diffusion.steps import STEP_SELECTIONS, STEP_WEIGHTS
from bpgo_video.learner.advantages import COMBINATIONS, NORMALISERS
from bpgo_video.learner.losses import RATIOS, TRUST_REGIONS
from bpgo_video.learner.priors import PRIORS
from bpgo_video.learner.trust import TRUSTS
from bpgo_video.rollouts.replay import OBJECTIVES
from tests.made.recipes import ROOT

TABLES: dict[str, Collection[str]] = {  # recipe key -> its choices
    "sampler.name": SAMPLERS,
    "sampler.train_steps": STEP_SELECTIONS,
    "sampler.solver": SOLVERS,
    "loss.step_weights": STEP_WEIGHTS,
    "loss.ratio": RATIOS,
    "loss.trust_region": TRUST_REGIONS,
    "loss.objective": OBJECTIVES,
    "bpgo.form": FORM_TRUST,
    "bpgo.trust": TRUSTS,
    "prior.kind": PRIORS,
    "advantage.normalise": NORMALISERS,
    "advantage.combine": COMBINATIONS,
    "credit.kind": get_args(get_type_hints(CreditConfig)["kind"]),
}
WITHOUT_RECIPE = {
    ("sampler.name", "ode"): "it has no density and cannot be trained: sampler.solver takes its steps",
    ("loss.step_weights", "tempflow"): "one key, to be set in any recipe that trains several steps",
    ("bpgo.trust", "uncertainty"): "its reward must state its uncertainty, as vlm_judge or the user's own does",
    ("prior.kind", "shrunk"): "one key in a recipe with the prior reference, whose files it reads",
    ("prior.kind", "global"): "one key in a recipe with the prior ema",
    ("prior.kind", "constant"): "its number is in the units of the user's own reward",
    ("advantage.normalise", "global"): "one key, to be set in any recipe",
    ("advantage.normalise", "none"): "its learning rate depends on the units of the user's own reward",
    ("advantage.normalise", "win_rate"): "one key in tiny_wan_grpo.yaml",
    ("advantage.combine", "gdpo"): "one key in a recipe with several rewards",
}
PATHS = sorted((ROOT / "pipelines" / "configs").glob("*.yaml"))
CONFIGS = {path.name: recipe for path in PATHS if isinstance(recipe := read_recipe(path), Config)}
METHODS = [(key, name) for key, names in TABLES.items() for name in names]
PAGE = (ROOT / "docs" / "algorithms.md").read_text()
ROWS = dict(re.findall(r"^\| `(\w+\.\w+)` \| (.*) \|$", PAGE, re.MULTILINE))


def used(config: Config, key: str) -> set[str]:
    """The method of a recipe; its rewards may have several trusts, which default to that of the form."""
    section, name = key.split(".")
    if key == "bpgo.trust":
        return {bpgo.trust_kind if bpgo.uses_trust else "none" for bpgo in config.bpgo_by_reward.values()}
    return {str(getattr(getattr(config, section), name))}


@pytest.mark.parametrize(("key", "name"), METHODS)
def test_a_method_has_a_recipe_or_a_reason(key: str, name: str) -> None:
    recipes = [recipe for recipe, config in CONFIGS.items() if name in used(config, key)]
    reason = WITHOUT_RECIPE.get((key, name))
    assert bool(recipes) != bool(reason), f"{recipes} use it, and the reason for no recipe is {reason!r}"


def test_reasons_refer_to_existing_methods() -> None:
    assert set(WITHOUT_RECIPE) <= set(METHODS)


@pytest.mark.parametrize("key", TABLES)
def test_the_page_names_a_recipe_for_each_method(key: str) -> None:
    named = dict(re.findall(r"`(\w+)`: (?:`([\w.]+)`|-)", ROWS[key]))
    assert set(named) == set(TABLES[key]) - {"ode"}
    for name, recipe in named.items():
        assert (name in used(CONFIGS[recipe], key)) if recipe else ((key, name) in WITHOUT_RECIPE)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_recipe_begins_with_a_description(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert len(first.split()) > 4


@pytest.mark.parametrize("path", [path for path in PATHS if path.stem.startswith("tiny_")], ids=lambda path: path.stem)
def test_the_page_lists_every_small_recipe(path: Path) -> None:
    assert f"`{path.name}`" in PAGE
