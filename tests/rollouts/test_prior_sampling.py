"""Which videos `bpgo-video priors` samples: prompts, groups, rounds, and their number on any ranks."""

from __future__ import annotations

from dataclasses import replace
from math import lcm
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.config.reading import config_from_dict, read_yaml, to_yaml
from bpgo_video.config.run import ParallelConfig
from bpgo_video.data.reader import PromptShards
from bpgo_video.data.stream import EndlessOrder, PromptStream
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.documents import plain_yaml
from bpgo_video.policies import Policy
from bpgo_video.rollouts.prior_sampling import (
    as_sampled,
    count_priors,
    prior_groups,
    prompts_per_round,
    rows_to_measure,
    steps_of_group,
)
from tests.made.recipes import RECIPE, make_shards, small_recipe


def changed(config: Config, **sections: dict[str, object]) -> Config:
    return replace(config, **{name: replace(getattr(config, name), **values) for name, values in sections.items()})


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("prior_sampling") / "shards")


@pytest.mark.parametrize(("steps", "per_step"), [(1, 1), (1, 3), (2, 1), (3, 2), (9, 4)])
def test_the_prompts_are_those_of_the_runs_batches_in_their_order(shards: Path, steps: int, per_step: int) -> None:
    config = small_recipe(shards, shards, run={"num_steps": steps, "seed": 5}, rollout={"prompts_per_step": per_step})
    reader = PromptShards(shards)
    stream, visited = PromptStream(reader, "train", 5, per_step), []
    for _ in range(steps):
        visited += next(stream).ids.tolist()
    assert reader.ids(torch.tensor(rows_to_measure(config, reader)).numpy()).tolist() == list(dict.fromkeys(visited))
    everything = rows_to_measure(changed(config, prior={"prompts": "all"}), reader)
    assert everything == reader.rows("train").tolist()


def test_a_part_of_the_order_has_the_rows_of_its_positions_only(shards: Path) -> None:
    config = small_recipe(shards, shards, rollout={"prompts_per_step": 1})
    order = EndlessOrder(PromptShards(shards), "train", config.run.seed, 1)
    for start, stop in ((2, 4), (3, 6), (1, 1), (5, 500)):
        expected = list(dict.fromkeys(order.row(position) for position in range(start, stop)))
        assert order.rows(range(start, stop)) == expected


@given(
    st.integers(1, 4), st.sampled_from([1, 2, 4]), st.integers(1, 8), st.booleans(), st.sampled_from([2, 4, 6, 8, 12]),
    st.integers(1, 40), st.sampled_from(["all", "random"]),
)  # fmt: skip
def test_the_count_is_that_of_the_rounds(
    groups: int, sequence: int, micro_batch: int, same_start: bool, samples: int, steps: int, train_steps: str
) -> None:
    samples = max(samples, 4) if same_start else samples
    config = replace(
        changed(
            read_yaml(RECIPE),
            run={"num_steps": steps},
            rollout={"micro_batch_size": micro_batch, "same_start": same_start, "prompts_per_step": 3},
            prior={"samples": samples},
            sampler={"train_steps": train_steps},
        ),
        parallel=ParallelConfig(sequence=sequence),
    )
    ranks, prompts = groups * sequence, min(3 * steps, 50)
    mesh, together = Mesh(0, ranks, torch.device("cpu"), sequence), prompts_per_round(config, ranks)
    sampled, (draws, size) = as_sampled(config), prior_groups(config)
    micro_batches = 0
    for _ in range(draws):
        for start in range(0, prompts, together):
            part = min(together, prompts - start)
            micro_batches += len(mesh.share(part * size, sampled.rollout.micro_batch_size))
    work = count_priors(config, ranks, 50)
    assert (work.prompts, work.videos) == (prompts, prompts * samples)
    if not same_start or train_steps == "all":  # nothing precedes the first stochastic step
        assert work.forwards == pytest.approx(micro_batches * config.sampler.num_steps)
    else:
        assert work.forwards <= micro_batches * config.sampler.num_steps
    chunk = lcm(sampled.rollout.micro_batch_size, sequence)  # whose videos divide over a sequence group
    chunks = groups * (lcm(chunk, 2) if same_start else chunk)  # pairs are not divided
    whole = [prompts for prompts in range(1, together + 1) if prompts * size % chunks == 0]
    assert whole == [together], "the fewest prompts of which no video is sampled or decoded twice"


def test_a_pair_computes_the_steps_before_its_first_stochastic_one_once() -> None:
    """The least of 2 of the 7 steps 0 to 6 is 5/3 on average; a forward of one sample is half of a pair's."""
    work = count_priors(changed(read_yaml(RECIPE), run={"num_steps": 10}), 1)
    assert work.forwards == pytest.approx(40 * 2 * (8 - 5 / 3 / 2))


def test_the_count_without_shards_and_of_all_prompts() -> None:
    config = changed(read_yaml(RECIPE), run={"num_steps": 10})
    assert count_priors(config, 2).prompts == 40
    assert count_priors(config, 2, 1000).videos == 40 * 4
    assert count_priors(changed(config, prior={"prompts": "all"}), 2, 1000).prompts == 1000


def test_groups_and_prompts_draw_their_own_steps_with_the_distribution_of_training(policy: Policy) -> None:
    config = changed(read_yaml(RECIPE), sampler={"share_steps": "batch"})
    sampled = as_sampled(config)
    draws = [steps_of_group(policy, sampled, group)(prompt) for group in range(20) for prompt in range(20)]
    assert {len(steps) for steps in draws} == {2}
    counts = torch.bincount(torch.tensor(draws).flatten(), minlength=8)
    assert counts[7] == 0, "the last step is never stochastic"
    expected, sigma = 400 * 2 / 7, (400 * 2 / 7 * 5 / 7) ** 0.5
    assert ((counts[:7] - expected).abs() < 4 * sigma).all(), counts
    by_group = [[draws[20 * group + prompt] for prompt in range(20)] for group in range(20)]
    assert all(len(set(row)) > 5 for row in (*by_group, *zip(*by_group, strict=True)))


def test_a_micro_batch_mixes_groups_only_if_all_have_the_same_steps() -> None:
    config = read_yaml(RECIPE)  # micro-batches of 8, random steps, same start
    assert as_sampled(config).rollout.micro_batch_size == 2
    assert as_sampled(changed(config, rollout={"same_start": False})).rollout.micro_batch_size == 4
    assert as_sampled(changed(config, sampler={"train_steps": "window"})).rollout.micro_batch_size == 8


@pytest.mark.parametrize(("samples", "way_out"), [(2, 4), (3, 4), (5, 6), (7, 8)])
def test_pairs_need_an_even_number_of_samples(samples: int, way_out: int) -> None:
    tree = plain_yaml(to_yaml(read_yaml(RECIPE)), "recipe")
    tree["prior"]["samples"] = samples
    with pytest.raises(ConfigError, match=rf"prior\.samples is {samples} .*set it to {way_out}$"):
        config_from_dict(tree, "recipe")
    tree["rollout"]["same_start"] = False
    assert prior_groups(config_from_dict(tree, "recipe")) == (1, samples)
