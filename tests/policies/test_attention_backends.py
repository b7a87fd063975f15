"""A backend of attention is tried forward and backward before a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.policies import Policy, attention_backends, load_policy
from bpgo_video.policies.attention_backends import takes_masks, try_attention

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def policy(recipe: Config) -> Policy:
    return load_policy(recipe.policy.folder, max_sequence_length=16, components=())


class WithoutGradient(torch.autograd.Function):
    """A kernel like `_flash_3`, an operator without a formula for its backward."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        return value.clone()


def dispatching(kernel: Any, seen: list[Any]) -> Any:
    def dispatched(query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None, backend: Any) -> Tensor:
        seen.append((tuple(query.shape), attn_mask, backend))
        return kernel(query + key + value)

    return dispatched


def test_torchs_attention_is_tried_without_touching_the_random_state(policy: Policy) -> None:
    before = torch.get_rng_state()
    for dtype in (torch.float32, torch.bfloat16):
        for backend in (None, "native", "_native_math"):
            try_attention(policy, backend, dtype, CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_backend_without_backward_is_refused_only_where_it_trains(
    monkeypatch: pytest.MonkeyPatch, policy: Policy
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(attention_backends, "dispatch_attention_fn", dispatching(WithoutGradient.apply, seen))
    try_attention(policy, "_flash_3", torch.float32, CPU, trains=False)
    with pytest.raises(ConfigError, match=r"backend '_flash_3' fails \(forward and backward, .*set it"):
        try_attention(policy, "_flash_3", torch.float32, CPU)
    config = policy.transformer_config
    heads, channels = config["num_attention_heads"], config["attention_head_dim"]
    assert [(shape[2:], backend) for shape, _, backend in seen] == [((heads, channels), "_flash_3")] * 2


def test_a_gradient_that_is_not_finite_is_refused(monkeypatch: pytest.MonkeyPatch, policy: Policy) -> None:
    monkeypatch.setattr(attention_backends, "dispatch_attention_fn", dispatching(lambda x: (x * 0).sqrt(), []))
    with pytest.raises(ConfigError, match="torch's attention gives results or gradients that are not finite on cpu"):
        try_attention(policy, None, torch.float32, CPU)


def test_a_family_that_masks_padding_is_tried_with_a_mask(monkeypatch: pytest.MonkeyPatch, policy: Policy) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(attention_backends, "dispatch_attention_fn", dispatching(torch.clone, seen))
    for masked in (False, True):
        monkeypatch.setattr(attention_backends, "takes_masks", lambda policy, masked=masked: masked)
        try_attention(policy, "native", torch.float32, CPU)
    without, mask = (attn_mask for _, attn_mask, _ in seen)
    assert without is None
    assert 0 < int(mask.sum()) < mask.numel()


def test_masks_are_known_from_the_conditioning(monkeypatch: pytest.MonkeyPatch, policy: Policy) -> None:
    assert not takes_masks(policy)
    monkeypatch.setattr(policy, "text_shapes", lambda tokens: {"prompt_embeds": (tokens, 4), "prompt_mask": (tokens,)})
    assert takes_masks(policy)
