"""The diagnosis of a run: findings with numbers and a remedy, and none for an ordinary run."""

from types import SimpleNamespace

import pytest

from bpgo_video.config.learner import BPGOConfig
from bpgo_video.training.rl import RL
from bpgo_video.training.summary import NOTHING, diagnose, reversals, summary_table

QUIET = {
    "trust_mean": 1.02,
    "trust_min": 0.7,
    "trust_max": 1.3,
    "trust_std": 0.2,
    "rms_ratio": 1.05,
    "zero_std_share": 0.1,
}


def run(steps=12, rising=0.0, **changed):
    hist = {f"trust/hist/{place:02d}": 0.1 for place in range(10)}
    noise = [0.01 * (-1) ** step for step in range(steps)]
    return [
        {"step": step, "reward": 0.2 + rising * step + noise[step], "reward_std": 0.02, **hist, **QUIET, **changed}
        for step in range(steps)
    ]


def test_an_ordinary_run_has_no_findings():
    assert diagnose(run(), {}) == [NOTHING]
    assert diagnose(run(rising=0.01), {"heldout_before": 0.5, "heldout_after": 0.6}) == [NOTHING]
    assert diagnose([], {}) == []


def test_a_matched_step_size_is_no_learning_rate():
    assert diagnose(run(trust_mean=1.45, trust_std=0.02, rms_ratio=1.0), {}) == [NOTHING]


def test_records_of_grpo_and_with_few_keys_are_accepted():
    grpo = [{k: v for k, v in record.items() if "hist" not in k} for record in run(trust_min=1.0, trust_max=1.0)]
    assert diagnose(grpo, {}) == [NOTHING]
    assert diagnose([{"step": 0, "reward": 0.5}], {}) == [NOTHING]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"trust_min": 0.998, "trust_max": 1.002},
            (
                "Trust had no effect: w stayed within 0.998-1.002",
                "standardise",
                "raise bpgo.k",
            ),
        ),
        (
            {"trust_validity/clip+truth": -0.3, "trust_validity/motion+truth": 0.2},
            ("Trust in clip weighs the wrong groups", "of clip and truth is -0.30"),
        ),
        ({"trust_mean": 1.45, "trust_std": 0.02}, ("Trust acted as a learning rate", "near 1.45", "batch_mean")),
        ({"rms_ratio": 1.6}, ("1.60 times GRPO's", "bpgo.match_rms")),
        ({"rms_ratio": 0.5}, ("0.50 times GRPO's",)),
        ({"zero_std_share": 0.6}, ("Zero-std groups: 60%",)),
        ({"crt/rank_inversion": 0.09}, ("reversed 9% of the pairs", "bpgo.standardise")),
        ({"icc/clip": 0.31, "icc/motion": 0.9}, ("ICC of clip 0.31)",)),
        ({"crt/distrusted_rms": 1.2}, ("w < 1 still get 1.20 times", "bpgo.ras_on_crt: true")),
        ({"agreement/a+b": 0.95, "agreement/a+c": 0.5}, ("nearly every sample: a and b (0.95),", "another kind")),
        ({"agreement/a+b": -0.3, "agreement/a+c": 0.02}, ("oppose each other", "a and b (-0.30),", "weight")),
    ],
)
def test_each_finding_has_its_numbers_and_a_remedy(changed, words):
    found = diagnose(run(**changed), {})
    assert len(found) == 1
    assert all(word in found[0] for word in words), found


def test_trust_that_varies_between_steps_is_not_a_learning_rate():
    steps = [record | {"trust_mean": 1.2 + 0.25 * (-1) ** i, "trust_std": 0.0} for i, record in enumerate(run())]
    assert diagnose(steps, {}) == [NOTHING]


@pytest.mark.parametrize(
    ("rising", "after", "shown", "reported"),
    [(0.01, 0.4, -1, True), (0.01, 0.4, 0, False), (0.0, 0.4, -1, False), (0.01, 0.6, 1, False)],
)
def test_a_reward_that_is_exploited_is_reported(rising, after, shown, reported):
    summary = {"heldout_before": 0.5, "heldout_after": after, "heldout_shown": shown}
    found = diagnose(run(rising=rising), summary)
    assert ("Held-out scores fell from 0.500 to 0.400 while the training reward rose" in found[0]) == reported


def test_quiet_values_of_several_rewards_are_no_finding():
    watched = {"validity/a+truth": -0.5}  # what a watched reward thinks is nothing to weigh
    assert diagnose(run(**{"crt/distrusted_rms": 0.9, "agreement/a+b": 0.5, **watched}), {}) == [NOTHING]


@pytest.mark.parametrize(("form", "remedy"), [("released", "or bpgo.zeta: 0"), ("released_exact", "standardise: true")])
def test_a_reversed_order_is_said_with_reward_share_and_remedy(form, remedy):
    record = {"crt/rank_inversion": 0.25, "crt/rank_inversion/clip": 0.25, "crt/rank_inversion/motion": 0.0}
    found = reversals(record, form)
    assert list(found) == ["clip"]
    assert all(words in found["clip"] for words in ("reverses 25.0% of the pairs", "'clip'", form))
    assert found["clip"].endswith(remedy)


def test_a_launch_says_so_once_per_reward():
    trainer = object.__new__(RL)  # the method uses the recipe's form and what was said
    trainer.session, trainer.warned = SimpleNamespace(config=SimpleNamespace(bpgo=BPGOConfig(form="released"))), set()
    first = {"crt/rank_inversion/clip": 0.25, "crt/rank_inversion/motion": 0.0}
    both = {**first, "crt/rank_inversion/motion": 0.1}
    assert [len(trainer.notices(record)) for record in (first, first, both, both)] == [1, 0, 1, 0]


def test_the_findings_follow_the_table():
    table = summary_table({"steps": 12, "diagnosis": diagnose(run(zero_std_share=0.6), {})})
    assert "- Zero-std groups: 60%" in table


def test_a_look_that_drifted_by_a_deviation_is_named():
    look = {
        "look/clipped": {"before": 0.01, "after": 0.12, "drift": 2.34},
        "look/contrast": {"before": 0.2, "after": 0.25, "drift": 0.9},
    }
    (sentence,) = diagnose(run(), {"look": look})
    assert "clipped 0.010 to 0.120 (+2.3 standard deviations)." in sentence
    assert "contrast" not in sentence
