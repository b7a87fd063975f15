"""The minimal example (examples/minimal_bpgo.py): it runs, learns, and replays exactly."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
import torch

from bpgo_video.policies import load_policy
from tests.made.recipes import ROOT

PATH = ROOT / "examples" / "minimal_bpgo.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minimal_bpgo", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_first_ratio_is_exactly_one_and_a_step_changes_the_weights(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "PROMPTS", example.PROMPTS[:2])
    policy = load_policy("package:bpgo_video.tiny/weights/wan", max_sequence_length=16)
    before = [weight.detach().clone() for weight in policy.transformers.parameters()]
    (record,) = example.train(policy, 1, seed=0)
    assert record["first_ratio_error"] == 0
    assert record["last_ratio_error"] > 0, "the second update replays against the log-probs of the rollout"
    after = [weight.detach() for weight in policy.transformers.parameters()]
    moved = [float((now - then).abs().max()) for now, then in zip(after, before, strict=True)]
    assert max(moved) > 0
    assert max(moved) < 3 * example.UPDATES * example.LEARNING_RATE, "AdamW moves a weight by about its learning rate"


def test_a_step_raises_the_density_of_samples_above_their_groups_mean(example: ModuleType) -> None:
    """At ratio 1 the gradient is that of -mean [(w A + zeta A~) log-prob]."""
    advantage, ratio = torch.tensor([1.5, -0.5]), torch.ones(2, requires_grad=True)
    example.surrogate(ratio, advantage).sum().backward()
    assert torch.equal(ratio.grad, -advantage)
    beyond = torch.tensor([1 + 2 * example.CLIP_RANGE, 1 - 2 * example.CLIP_RANGE], requires_grad=True)
    example.surrogate(beyond, advantage).sum().backward()
    assert torch.equal(beyond.grad, torch.zeros(2)), "the gradient vanishes beyond the clip range"


def test_the_example_is_short_and_names_existing_files(example: ModuleType) -> None:
    assert len(PATH.read_text().splitlines()) <= 250
    named = [word.rstrip(",:") for word in str(example.__doc__).split() if "/" in word and word[0].isalpha()]
    assert "examples/minimal_bpgo.py" in named
    assert len(named) >= 10
    assert not [path for path in named if not ((ROOT / path).exists() or (ROOT / "bpgo_video" / path).exists())]
