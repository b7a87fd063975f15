"""Sequence groups: outputs, losses and all gradients equal those of a single process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.conftest import run_ranks

BOUND = 1e-5
HUNYUAN = {
    "patch embedding": "x_embedder", "time embedding": "timestep_embedder", "text embedding": "context_embedder",
    "joint attention": ".attn.", "text's side of it": "add_q_proj", "modulation": "norm1.linear",
    "feed-forward": ".ff.", "single blocks": "single_transformer_blocks", "head": "proj_out",
}  # fmt: skip
CLASSES = {  # name patterns of each class of parameters
    "wan": {
        "patch embedding": "patch_embedding", "time embedding": "time_embedder", "text embedding": "text_embedder",
        "self-attention": "attn1", "cross-attention": "attn2", "modulation": "scale_shift_table",
        "feed-forward": "ffn", "head": "proj_out",
    },
    "hunyuan": HUNYUAN,
    "hunyuan_first_frame": HUNYUAN,
    "cogvideox": {
        "patch embedding": "patch_embed.proj", "text embedding": "text_proj", "time embedding": "time_embedding",
        "joint attention": ".attn1.to_q", "its normalisation": "norm_k", "modulation": "norm1.linear",
        "feed-forward": ".ff.", "modulation of the output": "norm_out", "head": "proj_out",
    },
    "ltx": {
        "patch embedding": "proj_in", "time embedding": "time_embed", "text embedding": "caption_projection",
        "self-attention": "attn1", "cross-attention": "attn2", "modulation": "scale_shift_table",
        "feed-forward": ".ff.", "head": "proj_out",
    },
}  # fmt: skip


@pytest.fixture(
    scope="module", params=[2, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, "2, every", 4))]
)
def sequences(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shared: dict[str, dict[int, Path]]
) -> list[dict[str, Any]]:
    """Results of every rank of a world; only the slow ones run every combination."""
    folder = shared["sequences"][2]
    if request.param != 2:
        folder = tmp_path_factory.mktemp("sequences")
        run_ranks(int(str(request.param)[0]), [str(folder), "every"], worker="sequence_worker")
    return [result for path in sorted(folder.glob("rank*.json")) for result in json.loads(path.read_text())]


def sound(sequences: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for result in sequences:
        if not result["breaks_scaling"]:
            keys = ("family", "tokens", "stage", "sequence", "checkpointing", "compiled")
            yield ", ".join(f"{key} {result[key]}" for key in keys), result


def test_output_loss_and_every_gradient_equal_those_of_a_single_process(sequences: list[dict[str, Any]]) -> None:
    for name, result in sound(sequences):
        assert result["output"] < BOUND, name
        assert result["loss"] < BOUND, name
        for parameter, error in result["gradients"].items():
            assert error < BOUND, f"{name}: {parameter}"


def test_every_class_of_parameters_is_compared(sequences: list[dict[str, Any]]) -> None:
    for name, result in sound(sequences):
        for title, part in CLASSES[result["family"]].items():
            assert any(part in parameter for parameter in result["gradients"]), f"{name}: {title}"


def test_replay_is_bit_equal_to_rollout(sequences: list[dict[str, Any]]) -> None:
    assert all(result["replay_is_exact"] for _, result in sound(sequences))


def test_a_gather_without_the_sum_of_gradients_is_detected(sequences: list[dict[str, Any]]) -> None:
    broken = [result for result in sequences if result["breaks_scaling"]]
    assert broken or max(result["sequence"] for result in sequences) == 1
    for result in broken:
        assert result["output"] < BOUND, "only the gradient is wrong"
        blocks = {name: error for name, error in result["gradients"].items() if name.startswith("blocks")}
        assert min(blocks.values()) > 0.4, "off by a factor of the sequence group's size"
