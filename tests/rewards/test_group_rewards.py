"""Rewards that compare the samples of a prompt: whole groups, win rates, a judge of pairs, and what is refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from bpgo_video.config.bpgo import Config, ConfigError, RewardConfig
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.evaluation.compare import compared_rewards
from bpgo_video.planning.rewards import reward_size
from bpgo_video.policies import Policy
from bpgo_video.rewards import Clips
from bpgo_video.rewards.base import RewardError
from bpgo_video.rewards.pairwise import pairs, win_rates
from bpgo_video.rewards.score_ahead import ScoreAhead
from bpgo_video.rewards.suite import RewardSuite
from bpgo_video.rewards.vlm import VlmPairwise
from bpgo_video.rewards.wire import describe
from bpgo_video.training import inputs
from bpgo_video.types import Audio, Rewards, RolloutChunk
from tests.made.random_qwen import random_qwen, tokenizer
from tests.rewards.test_score_ahead import step_of
from tests.rewards.test_vlm_rewards import PIXELS, some_clips
from tests.rewards.toys import CPU, MESH, PROMPTS, chunks_of, suite_of, toy

JUDGE = RewardConfig(model="vlm_pairwise", options={"model": "Qwen/Qwen2.5-VL-7B-Instruct"})


@pytest.mark.parametrize("size", [2, 3, 5, 8, 16, 24])
def test_every_sample_meets_equally_many_others_and_the_pairs_connect_the_group(size: int) -> None:
    assert pairs(size) == pairs(size, size - 1) == list(combinations(range(size), 2))
    for opponents in range(1, size):
        if opponents * size % 2:
            with pytest.raises(ValueError, match=rf"opponents is {opponents} in a group of {size} .*and even"):
                pairs(size, opponents)
            continue
        met = pairs(size, opponents)
        assert Counter(sample for pair in met for sample in pair) == dict.fromkeys(range(size), opponents)
        reached = {0}
        for _ in range(size):
            reached |= {sample for pair in met if reached & set(pair) for sample in pair}
        assert len(reached) == (2 if opponents == 1 else size)


def test_a_group_of_one_and_too_many_opponents_are_refused() -> None:
    with pytest.raises(ValueError, match="a group of 1 sample has no pairs"):
        pairs(1)
    with pytest.raises(ValueError, match="opponents is 8 in a group of 8 samples; it must be from 1 to 7"):
        pairs(8, 8)


def test_win_rates_are_those_of_bradley_and_terry() -> None:
    """P(i beats j) = sigma(s_i - s_j), with a judge that favours the video that it sees first."""
    strength, favour, met = np.array([0.3, -1.0, 2.0, 0.1]), 0.5, pairs(4)
    answers = [[1 / (1 + np.exp(-(strength[i] - strength[j] + order * favour))) for order in (1, -1)] for i, j in met]
    rates, stds = win_rates(4, met, torch.tensor(answers, dtype=torch.float32))
    for sample in range(4):
        won = []
        for (i, j), both in zip(met, answers, strict=True):
            won += both if sample == i else [1 - p for p in both] if sample == j else []
        assert len(won) == 6
        assert float(rates[sample]) == pytest.approx(np.mean(won), abs=1e-6)
        assert float(stds[sample]) == pytest.approx(np.sqrt(np.sum([p * (1 - p) for p in won])) / 6, abs=1e-6)
    assert float(rates.mean()) == pytest.approx(0.5)
    assert rates.argsort().tolist() == strength.argsort().tolist()


def first_wins(folder: Path, judge: VlmPairwise, clips: Clips, shown: tuple[int, int]) -> float:
    """P(the first of two videos), from the first token that the library generates for a question written out here."""
    model, indices = AutoModelForImageTextToText.from_pretrained(folder).eval(), [0, 4, 8, 12]
    found = [judge.qwen.layout.patches(clips.videos[row, indices]) for row in shown]
    steps = [(indices[i] + indices[i + 1]) / 16 for i in (0, 2)]
    chat = "<|im_start|>user\n"
    for _, grid in found:
        pads = "<|video_pad|>" * (grid[1] * grid[2] // 4)
        if model.config.model_type == "qwen3_vl":
            chat += "".join(f"<{step:.1f} seconds><|vision_start|>{pads}<|vision_end|>" for step in steps)
        else:
            chat += f"<|vision_start|>{pads * len(steps)}<|vision_end|>"
    chat += f"rate {clips.texts[shown[0]]}<|im_end|>\n<|im_start|>assistant\nit show"
    words = tokenizer()
    ids = words(chat, return_tensors="pt").input_ids
    extra = {"second_per_grid_ts": [1.0, 1.0]} if model.config.model_type == "qwen2_5_vl" else {}
    scores = model.generate(
        input_ids=ids, pixel_values_videos=torch.cat([patches for patches, _ in found]), max_new_tokens=1,
        video_grid_thw=torch.tensor([grid for _, grid in found]), do_sample=False, output_scores=True,
        mm_token_type_ids=2 * (ids == words.convert_tokens_to_ids("<|video_pad|>")).int(),
        return_dict_in_generate=True, **extra,
    ).scores[0][0]  # fmt: skip
    first, second = (scores.softmax(0)[words.convert_tokens_to_ids(word)] for word in ("red", "circle"))
    return float(first / (first + second))


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_the_judge_of_pairs_sees_both_orders_and_returns_win_rates(tmp_path: Path, kind: str) -> None:
    """Of a group of three and one of two, whose samples alternate."""
    folder = random_qwen(tmp_path, kind)
    options = {"question": "rate {prompt}", "answers": ("red", "circle"), "opening": "it show", "frames": 4}
    judge, one = VlmPairwise(str(folder), **options, **PIXELS), some_clips(13)
    videos = torch.cat([one.videos, one.videos.flip(1), one.videos[:1].flip(3)])
    groups = torch.tensor([7, 3, 7, 3, 7])
    texts = tuple("a red circle" if group == 7 else "circle a" for group in groups.tolist())
    clips = Clips(videos, 8.0, texts, groups=groups)
    actual = judge(clips)
    assert actual.times is None
    for members in ([0, 2, 4], [1, 3]):
        for sample in members:
            won = [first_wins(folder, judge, clips, (sample, other)) for other in members if other != sample]
            won += [1 - first_wins(folder, judge, clips, (other, sample)) for other in members if other != sample]
            assert float(actual.values[sample, 0]) == pytest.approx(np.mean(won), abs=1e-5)
            std = np.sqrt(np.sum([p * (1 - p) for p in won])) / len(won)
            assert float(actual.std[sample, 0]) == pytest.approx(std, abs=1e-5)
        assert float(actual.values[members].mean()) == pytest.approx(0.5, abs=1e-6)
    assert actual.values.std() > 1e-3


def rewards_of(suite: RewardSuite, each: int, samples: int = 4) -> Rewards:
    """Of two prompts of `samples` samples, `each` per chunk."""
    with ScoreAhead(suite, PROMPTS, 1, CPU, group_size=4) as scoring:
        for chunk in chunks_of(videos=samples, each=each):
            scoring.put(chunk)
        return suite.gather(scoring.scores(), PROMPTS, samples, MESH)


@pytest.mark.parametrize("each", [1, 3, 4, 8])
def test_a_reward_that_compares_samples_gets_whole_groups_of_any_chunks(each: int) -> None:
    both = {"rank": toy("Ranked"), "bright": toy("Brightness")}
    suite = RewardSuite(both, CPU, fps=2.0)
    rewards = rewards_of(suite, each)
    assert rewards.by_name["rank"].tolist() == [[0.0, 1.0, 2.0, 3.0]] * 2
    torch.testing.assert_close(rewards.by_name["bright"], torch.arange(8.0).view(2, 4) / 8)
    assert suite.rewards["rank"].model.received == {"first": 1, "second": 1}
    assert suite.rewards["bright"].model.received.total() == -(-8 // each)


def test_a_group_is_scored_again_as_a_whole() -> None:
    suite = suite_of("Ranked", rescorings=({"low": 1.0},))
    again = replace(PROMPTS, again=torch.tensor([False, True]))
    with ScoreAhead(suite, again, 1, CPU, group_size=4) as scoring:
        for chunk in chunks_of(videos=4, each=2):
            scoring.put(chunk)
        rewards = suite.gather(scoring.scores(), again, 4, MESH)
    assert rewards.by_name["toy"].tolist() == [[0.0, 1.0, 2.0, 3.0], [0.5, 1.5, 2.5, 3.5]]
    assert rewards.scorings["toy"][0, :, 1].isnan().all()


def test_half_a_group_is_an_error_with_its_prompt() -> None:
    half = r"this rank has samples 0, 1 of prompt 'first' \(id 5\) of a group of 4, which a reward is to compare"
    with pytest.raises(RewardError, match=half):
        rewards_of(suite_of("Ranked"), 2, samples=2)
    suite, chunk = suite_of("Ranked"), next(chunks_of())
    with pytest.raises(RewardError, match="compares the samples of a prompt, but these videos are not whole groups"):
        suite.total(chunk, PROMPTS)


def test_the_sound_of_a_group_is_put_together() -> None:
    suite, heard = suite_of("Ranked"), []
    model = suite.rewards["toy"].model
    model.hear = lambda clips: heard.append(clips.audio)
    with ScoreAhead(suite, PROMPTS, 1, CPU, group_size=4) as scoring:
        for number, chunk in enumerate(chunks_of(videos=4, each=2)):
            scoring.put(replace(chunk, audio=Audio(torch.full((2, 1, 5), number / 4), 1000)))
        scoring.scores()
    assert [sound.waveform[:, 0, 0].tolist() for sound in heard] == [[0.0, 0.0, 0.25, 0.25], [0.5, 0.5, 0.75, 0.75]]


def test_a_training_rollout_ranks_its_groups(policy: Policy, recipe: Config) -> None:
    _, rewards, _ = step_of(policy, recipe, toy="Ranked")
    assert rewards.by_name["toy"].sort(dim=1).values.tolist() == [[0.0, 1.0, 2.0, 3.0]] * 2


def test_rewards_that_compare_are_refused_where_they_say_nothing(recipe: Config) -> None:
    held = replace(recipe, evaluation=replace(recipe.evaluation, rewards={"pairs": JUDGE}))
    with pytest.raises(ConfigError, match=r"evaluation\.rewards\.pairs is vlm_pairwise, .*same for every policy; hold"):
        inputs.check_group_rewards(held)
    assert recipe.prior.kind == "reference"
    trained = replace(recipe, rewards={"pairs": JUDGE}, bpgo=replace(recipe.bpgo, zeta=0.5))
    with pytest.raises(ConfigError, match=r"rewards\.pairs is .* and prior\.kind is 'reference', .*set prior\.kind to"):
        inputs.check_group_rewards(trained)
    inputs.check_group_rewards(replace(trained, prior=replace(trained.prior, kind="ema")))
    both = replace(recipe, rewards={**recipe.rewards, "pairs": JUDGE})
    assert compared_rewards(both).keys() == recipe.evaluation.rewards.keys() | recipe.trained_rewards.keys()
    inputs.check_group_rewards(replace(trained, rewards={**recipe.rewards, "pairs": replace(JUDGE, weight=0.0)}))


@pytest.mark.parametrize(
    ("mesh", "rollout", "message"),
    [
        (Mesh(0, 8, CPU, sequence=4), {}, r"parallel\.sequence = 4 decodes them on so many; set parallel\.sequence"),
        (Mesh(0, 4, CPU), {"prompts_per_step": 6}, r"6 does not divide over 4 ranks; set it to a multiple of 4"),
        (Mesh(0, 2, CPU), {"same_start": True, "micro_batch_size": 2}, r"spreads them over 2 ranks; set rollout\.same"),
        (Mesh(0, 64, CPU), {"prompts_per_step": 128, "micro_batch_size": 1}, None),
    ],
)
def test_groups_must_be_whole_on_a_rank(
    recipe: Config, mesh: Mesh, rollout: dict[str, object], message: str | None
) -> None:
    sizes = {"prompts_per_step": 8, "group_size": 8, "micro_batch_size": 4, "same_start": False, "branches": ()}
    config = replace(recipe, rewards={"pairs": JUDGE}, rollout=replace(recipe.rollout, **sizes | rollout))
    if message is None:
        inputs.check_whole_groups(config, mesh)
        return
    with pytest.raises(ConfigError, match=rf"rewards\.pairs compares .*which must be on one rank, but .*{message}"):
        inputs.check_whole_groups(config, mesh)
    inputs.check_whole_groups(replace(config, rewards=recipe.rewards), mesh)


def test_servers_receive_no_groups() -> None:
    with pytest.raises(ConfigError, match="compares the samples of a prompt, but a server receives no groups"):
        describe(suite_of("Ranked").rewards["toy"].model)


def test_a_plan_counts_both_orders_of_all_pairs(recipe: Config) -> None:
    def operations(model: str, **options: object) -> float:
        reward = replace(JUDGE, model=model, options={**JUDGE.options, **options})
        config = replace(recipe, rewards={"r": reward}, rollout=replace(recipe.rollout, group_size=8))
        return reward_size(config).operations

    assert operations("vlm_pairwise") == 14 * operations("vlm_judge")
    assert operations("vlm_pairwise", opponents=2) == 4 * operations("vlm_judge")


def test_chunks_need_no_trajectories_to_wait() -> None:
    suite = suite_of("Ranked")
    chunk = RolloutChunk((), torch.zeros(4, 3, 3, 4, 4), torch.zeros(4, dtype=torch.int64), torch.arange(4))
    scored = suite.score(chunk, PROMPTS, groupwise=True)
    assert scored.videos["toy"].shape == (4, 1)
    assert not suite.score(chunk, PROMPTS).videos
