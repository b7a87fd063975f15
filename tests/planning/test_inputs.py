"""What a rehearsal takes in is what the real class takes, and its count is the real tensors'."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import Kandinsky5Transformer3DModel

from bpgo_video.planning import rehearsal
from bpgo_video.planning.allocations import Allocations
from bpgo_video.planning.inputs import Batch, arguments
from bpgo_video.planning.models import Model
from bpgo_video.policies.kandinsky5_transformer import prepare

KANDINSKY5 = Model(
    name="small",
    source="this test",
    transformers=("transformer",),
    transformer={
        "_class_name": "Kandinsky5Transformer3DModel", "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 32,
        "in_text_dim2": 16, "time_dim": 16, "model_dim": 32, "ff_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 2,
        "axes_dims": (4, 6, 6), "visual_cond": True,
    },
    vae={},
)  # fmt: skip
BATCH = Batch(samples=2, latents=(4, 3, 16, 16), text_tokens=8, dtype=torch.float32)


def test_a_rehearsal_of_kandinsky_counts_what_real_tensors_take() -> None:
    planned = rehearsal.footprint(KANDINSKY5, BATCH, rehearsal.Treatment())
    module = Kandinsky5Transformer3DModel.from_config(dict(KANDINSKY5.transformer))
    prepare(module)
    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    taken_in = arguments("Kandinsky5Transformer3DModel", module.config, BATCH)
    with Allocations([*module.parameters(), *module.buffers()]) as counted:
        with torch.no_grad():
            module(**taken_in, return_dict=False)
        forward = counted.mark()
        taken_in["hidden_states"].requires_grad_()
        module(**taken_in, return_dict=False)[0].square().mean().backward()
    assert planned.forward == pytest.approx(forward, rel=0.02)
    assert planned.replay == pytest.approx(counted.peak, rel=0.02)
    assert sum(planned.trained) == sum(parameter.numel() for parameter in module.parameters())


def test_kandinsky_is_rehearsed_in_bfloat16_and_by_sequence_groups() -> None:
    large = replace(BATCH, latents=(4, 8, 32, 32), dtype=torch.bfloat16)
    plain, shared = (
        rehearsal.footprint(KANDINSKY5, large, rehearsal.Treatment(sequence=sequence)).replay for sequence in (1, 2)
    )
    assert 0.45 * plain < shared < 0.75 * plain
