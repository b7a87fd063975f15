"""Validation of config sections: out-of-range values are refused by name, and method keys match their tables."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, get_args, get_type_hints

import pytest

from bpgo_video.config.bpgo import SamplerConfig
from bpgo_video.config.learner import FORM_TRUST, AdvantageConfig, BPGOConfig, LossConfig, PriorConfig, RewardConfig
from bpgo_video.config.run import OptimizerConfig
from bpgo_video.config.sft import MatchingConfig
from bpgo_video.diffusion.flow_matching import DENSITIES
from bpgo_video.diffusion.sde import SAMPLERS, SOLVERS
from bpgo_video.diffusion.steps import STEP_SELECTIONS, STEP_WEIGHTS
from bpgo_video.distributed.optimizer import SCHEDULES
from bpgo_video.learner.advantages import COMBINATIONS, NORMALISERS
from bpgo_video.learner.equations import TRANSFORMS
from bpgo_video.learner.losses import RATIOS, TRUST_REGIONS
from bpgo_video.learner.priors import PRIORS
from bpgo_video.learner.trust import TRUSTS
from bpgo_video.rollouts.replay import OBJECTIVES
from bpgo_video.rollouts.updates import DIVERGENCES


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (BPGOConfig, {"form": "papers"}),
        (BPGOConfig, {"trust": "sigmoids"}),
        (BPGOConfig, {"ras_center": "median"}),
        (BPGOConfig, {"alpha": -0.1}),
        (BPGOConfig, {"alpha": 2}),
        (BPGOConfig, {"alpha": 1.0}),
        (BPGOConfig, {"alpha": math.nan}),
        (BPGOConfig, {"k": 0.0}),
        (BPGOConfig, {"k": math.inf}),
        (BPGOConfig, {"contrast": -1.0}),
        (BPGOConfig, {"zeta": -0.5}),
        (BPGOConfig, {"zeta": math.inf}),
        (BPGOConfig, {"prior_var": 0.0}),
        (AdvantageConfig, {"normalise": "std"}),
        (AdvantageConfig, {"combine": "sum"}),
        (AdvantageConfig, {"best_of": 0}),
        (LossConfig, {"advantage_clip": 0.0}),
        (LossConfig, {"advantage_clip": math.nan}),
        (LossConfig, {"clip_range": (-0.1, 0.1)}),
        (RewardConfig, {"model": "clip_score", "weight": -1.0}),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(section: type, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{section.__name__}:\n  .*{[*values][-1]}.*"):
        section(**values)


def test_an_error_has_one_readable_line_per_value() -> None:
    with pytest.raises(ValueError, match="alpha") as error:
        BPGOConfig(alpha=2, zetta=1)  # type: ignore[call-arg]
    assert str(error.value).splitlines() == [
        "BPGOConfig:",
        "  alpha: Input should be less than or equal to 1 (given: 2)",
        "  zetta: unknown key; perhaps you meant zeta",
    ]


def test_only_the_released_form_with_its_default_trust_accepts_alpha_1() -> None:
    for trust in (None, "posterior"):
        assert BPGOConfig(form="released", trust=trust, alpha=1).trust_kind == "posterior"
    for wrong in ({"form": "paper"}, {"form": "released", "trust": "sigmoid"}):
        with pytest.raises(ValueError, match="only released forms"):
            BPGOConfig(alpha=1, **wrong)


@pytest.mark.parametrize(
    ("section", "key", "table"),
    [
        (BPGOConfig, "form", {*TRANSFORMS, "released_exact"}),
        (BPGOConfig, "form", FORM_TRUST),
        (BPGOConfig, "trust", TRUSTS),
        (PriorConfig, "kind", PRIORS),
        (AdvantageConfig, "normalise", NORMALISERS),
        (AdvantageConfig, "combine", COMBINATIONS),
        (LossConfig, "ratio", RATIOS),
        (LossConfig, "trust_region", TRUST_REGIONS),
        (LossConfig, "objective", OBJECTIVES),
        (LossConfig, "kl_space", DIVERGENCES),
        (LossConfig, "step_weights", STEP_WEIGHTS),
        (SamplerConfig, "name", set(SAMPLERS) - {"ode"}),
        (SamplerConfig, "solver", SOLVERS),
        (SamplerConfig, "train_steps", STEP_SELECTIONS),
        (MatchingConfig, "density", DENSITIES),
        (OptimizerConfig, "schedule", SCHEDULES),
    ],
)
def test_the_choices_of_a_key_match_its_table(section: type, key: str, table: Collection[str]) -> None:
    hint = get_type_hints(section)[key]
    options = {name for part in get_args(hint) for name in get_args(part) or (part,)} - {type(None)}
    assert options == set(table)
