"""Every method of every table is used by a shipped recipe, or stands here with the reason why none uses it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, get_args, get_type_hints

import pytest

from bpgo_video.config.bpgo import Config
from bpgo_video.config.learner import CreditConfig
from bpgo_video.config.reading import read_recipe
from bpgo_video.diffusion.sde import SAMPLERS
from bpgo_video.diffusion.steps import STEP_SELECTIONS, STEP_WEIGHTS
from bpgo_video.learner.advantages import COMBINATIONS, NORMALISERS
from bpgo_video.learner.losses import RATIOS, TRUST_REGIONS
from bpgo_video.learner.priors import PRIORS
from bpgo_video.learner.settings import OWN_TRUST
from bpgo_video.learner.trust import TRUSTS
from bpgo_video.rollouts.objectives import OBJECTIVES
from tests.made.recipes import ROOT

CREDITS = get_args(get_type_hints(CreditConfig)["kind"])
ONE_KEY = "one key away from a recipe, and nothing else has to change with it"

TABLES: dict[str, tuple[Collection[str], Callable[[Config], str]]] = {  # what there is, and which of it a recipe uses
    "sampler": (SAMPLERS, lambda config: config.sampler.name),
    "trained steps": (STEP_SELECTIONS, lambda config: config.sampler.train_steps),
    "step weights": (STEP_WEIGHTS, lambda config: config.loss.step_weights),
    "ratio": (RATIOS, lambda config: config.loss.ratio),
    "trust region": (TRUST_REGIONS, lambda config: config.loss.trust_region),
    "objective": (OBJECTIVES, lambda config: config.loss.objective),
    "form": (OWN_TRUST, lambda config: config.bpgo.form),
    "trust": (
        TRUSTS,
        lambda config: (config.bpgo.trust or OWN_TRUST[config.bpgo.form]) if config.bpgo.alpha else "none",
    ),
    "prior": (PRIORS, lambda config: config.prior.kind),
    "advantage": (NORMALISERS, lambda config: config.advantage.normalise),
    "combination": (COMBINATIONS, lambda config: config.advantage.combine),
    "credit": (CREDITS, lambda config: config.credit.kind),
}
WITHOUT_RECIPE = {
    ("sampler", "ode"): "it has no density: the steps that no recipe trains follow it",
    ("prior", "shrunk"): f"{ONE_KEY}: it reads the same files as reference",
    ("prior", "global"): f"{ONE_KEY}: ema with one average",
    ("prior", "constant"): "a number of the user's own, in the unit of the user's reward",
    ("advantage", "global"): ONE_KEY,
    ("advantage", "none"): "it takes zeta 0 and a learning rate in the unit of the user's reward",
    ("advantage", "win_rate"): f"{ONE_KEY} of tiny_wan_grpo.yaml",
    ("combination", "gdpo"): ONE_KEY,
    ("step weights", "tempflow"): ONE_KEY,
}

RECIPES = [read_recipe(path) for path in sorted((ROOT / "pipelines" / "configs").glob("*.yaml"))]
METHODS = [(table, name) for table, (names, _) in TABLES.items() for name in names]


def users(table: str, name: str) -> list[Any]:
    _, used = TABLES[table]
    return [recipe for recipe in RECIPES if isinstance(recipe, Config) and used(recipe) == name]


@pytest.mark.parametrize(("table", "name"), METHODS, ids=[" ".join(method) for method in METHODS])
def test_a_method_is_used_by_a_recipe_or_listed_with_a_reason(table: str, name: str) -> None:
    reason = WITHOUT_RECIPE.get((table, name))
    assert bool(users(table, name)) != bool(reason), reason or "add a recipe, or a reason why there is none"


def test_reasons_are_given_for_methods_that_exist() -> None:
    assert set(WITHOUT_RECIPE) <= set(METHODS)


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_says_first_what_it_is(path: Any) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert len(first.split()) > 4
