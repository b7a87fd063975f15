"""Signals of trust on groups whose validity is known, and dumps of groups."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from bpgo_video.documents import MalformedFile
from bpgo_video.study.groups import Groups, Sample, line_of, read_groups
from bpgo_video.study.preregistration import read_preregistration
from bpgo_video.study.signals import (
    GRPO,
    NOISY,
    cosines,
    reference_anchor,
    resampled,
    signal_table,
    spearman,
    trusts,
    weighted,
)

PLAN = replace(read_preregistration().signals, noise=(0.1, 3.0), noise_draws=4, resamples=60)
CLEAR, OPEN = "a red circle moving left", "a red object"


@pytest.fixture(scope="module")
def groups() -> Groups:
    """60 groups of 8: a reward with noise of single frames, small on clear prompts and large on open ones."""
    generator = torch.Generator().manual_seed(0)
    prompts = [CLEAR, OPEN] * 30
    oracle = torch.randn(60, 8, 1, generator=generator).expand(-1, -1, 9).double()
    std = torch.tensor([0.2, 3.0] * 30).double()[:, None, None] * 3
    first, second = (oracle + std * torch.randn(60, 8, 9, generator=generator).double() for _ in range(2))
    return Groups(prompts, oracle, {"clip": first, "clip of 9 frames": second, "motion": first[..., :1]})


def test_agreement_knows_the_validity_and_turns_the_update_towards_the_truth(groups: Groups) -> None:
    table = {(row.score, row.trust): row for row in signal_table(groups, PLAN)}
    assert {score for score, _ in table} == {"clip", NOISY}  # motion has no frames, the second scoring is no score
    plain, frames = table["clip", GRPO], table["clip", "agreement of frames"]
    assert plain.change.value == 0
    assert plain.spearman is None
    assert frames.spearman is not None
    assert frames.spearman.low > 0.3
    assert frames.change.low > 0
    two = table["clip", "mean of two scorings, their agreement"]
    assert two.cosine.value > table["clip", "mean of two scorings"].cosine.value > plain.cosine.value
    oracle = table["clip", "the oracle's validity"]
    assert oracle.spearman is not None
    assert oracle.spearman.value > 0.99  # a validity below 0 counts as 0
    assert table[NOISY, "agreement of frames"].change.low > 0
    assert table[NOISY, GRPO].spearman is None


def test_cosines_are_those_of_the_flat_vectors_and_resamples_repeat_groups(groups: Groups) -> None:
    one, oracle = torch.randn(5, 8).double(), torch.randn(5, 8).double()
    counts = np.array([[1, 1, 1, 1, 1], [0, 2, 0, 3, 0]]).astype(float)
    expected = torch.cosine_similarity(one.flatten(), oracle.flatten(), dim=0)
    repeated = [torch.stack([of[1]] * 2 + [of[3]] * 3).flatten() for of in (one, oracle)]
    found = cosines([one], oracle, counts)
    assert found == pytest.approx([float(expected), float(torch.cosine_similarity(*repeated, dim=0))])
    assert cosines([one, -one], oracle, counts) == pytest.approx([0, 0])
    assert (resampled(5, 7, seed=0).sum(axis=1) == 5).all()


def test_spearman_is_scipys_and_undefined_for_a_constant_signal() -> None:
    signal, validity = np.array([1.0, 2, 2, 4, 0]), np.array([0.1, 0.3, 0.2, 0.9, 0.5])
    found = spearman(signal, validity, resampled(5, 20, seed=0))
    assert found is not None
    assert found.value == pytest.approx(stats.spearmanr(signal, validity).statistic)
    assert spearman(np.ones(5), validity, resampled(5, 20, seed=0)) is None


def test_the_reference_is_the_mean_of_the_prompts_other_groups() -> None:
    scores = torch.tensor([[0.0, 2], [4, 6], [10, 12], [7, 9]]).double()
    anchor = reference_anchor(["a", "b", "a", "a"], scores)
    assert anchor.mean.tolist() == [(11 + 8) / 2, 5, (1 + 8) / 2, (1 + 11) / 2]
    assert anchor.scale == pytest.approx(2**0.5)


def test_every_trust_weighs_with_the_learner(groups: Groups) -> None:
    found = trusts(groups, groups.rewards["clip"], None)
    assert "mean of two scorings" not in found
    one = groups.rewards["clip"].mean(dim=2)
    half = weighted(one, "reliability", reliability=torch.full((60,), 0.5).double())
    torch.testing.assert_close(half.advantage, found[GRPO].advantage)


def test_dumps_are_read_in_both_forms(tmp_path: Path) -> None:
    new, old = tmp_path / "new.jsonl", tmp_path / "old.jsonl.gz"
    samples = [Sample(OPEN, [0.1 * i, 0.2], {"clip_score": [0.3, 0.1 * i], "motion": [0.5]}) for i in range(4)]
    new.write_text("".join(map(line_of, samples)), "utf-8")
    short = [{"t": s.prompt, "o": s.oracle, "c": s.rewards["clip_score"], "m": s.rewards["motion"]} for s in samples]
    with gzip.open(old, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in short)
    one, other = read_groups(new, 2), read_groups(old, 2)
    assert one.prompts == other.prompts == [OPEN, OPEN]
    assert one.clear.tolist() == [False, False]
    for name in ("clip_score", "motion"):
        torch.testing.assert_close(one.rewards[name], other.rewards[name], atol=1e-6, rtol=0)
    torch.testing.assert_close(one.oracle[1, 1], torch.tensor([0.3, 0.2]).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([Sample(OPEN, [1.0], {})] * 3, "has 3 lines: it needs groups of 2"),
        ([], "has 0 lines"),
        ([Sample(OPEN, [1.0], {}), Sample(CLEAR, [1.0], {})], "lines 1 to 2, a group of 2, has 2 prompts"),
        ([Sample(OPEN, [1.0], {}), Sample(OPEN, [1.0, 2.0], {})], "all lines must have the same rewards"),
        (['{"t": "a red object"}\n'], "line 1 has the keys ['t']"),
        (['{"prompt": 1, "oracle": [], "rewards": {}}\n'], "line 1: prompt: Input should be a valid string"),
    ],
)
def test_a_damaged_dump_is_named(lines: list[Sample | str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "dump.jsonl"
    path.write_text("".join(line if isinstance(line, str) else line_of(line) for line in lines), "utf-8")
    with pytest.raises(MalformedFile, match=r"dump\.jsonl") as raised:
        read_groups(path, 2)
    assert message in str(raised.value)
