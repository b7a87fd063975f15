"""Memory settings of recipes (tiling, offloading, attention, compilation): applied, or refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_wan
from torch import Tensor, nn

from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.distributed import ulysses
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.planning.fake import alone_in_a_group
from bpgo_video.policies import load_policy
from bpgo_video.policies.attention import parallelise
from bpgo_video.policies.attention_backends import choose_attention
from bpgo_video.policies.networks import (
    Transformers,
    blocks_of,
    checkpoint_blocks,
    compile_blocks,
    save_memory,
    split_vae_work,
)
from bpgo_video.policies.wan import WanPolicy
from bpgo_video.training.session import sampling_policy
from tests.distributed.small_transformers import inputs, random_transformer
from tests.made.random_wan import LATENTS, TEXT_TOKENS, random_wan

CPU = torch.device("cpu")
FP32: dict[str, Any] = {"zero_optimization": {"stage": 1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_wan(tmp_path_factory.mktemp("wan") / "pipeline", images=True, image_encoder=True)


def built(recipe: Config, folder: Path, **settings: object) -> Any:
    """The policy as a session builds it, with these settings of `policy:`."""
    policy = replace(recipe.policy, folder=str(folder), max_sequence_length=TEXT_TOKENS, **settings)
    return sampling_policy(replace(recipe, policy=policy), FP32, Mesh(0, 1, CPU))


def test_slicing_and_offloading_are_bit_exact(recipe: Config, folder: Path) -> None:
    latents = torch.randn(3, *LATENTS, generator=torch.Generator().manual_seed(0))
    plain = built(recipe, folder)
    expected = plain.decode(latents, {})
    assert torch.equal(built(recipe, folder, frozen_rest_on="cpu").decode(latents, {}), expected)
    sliced = built(recipe, folder, vae_slicing=True)
    assert sliced.pipeline.vae.use_slicing
    torch.testing.assert_close(sliced.decode(latents, {}), expected, rtol=0, atol=1e-5)
    assert built(recipe, folder, vae_tiling=True).pipeline.vae.use_tiling
    assert not plain.pipeline.vae.use_tiling


class Part(nn.Module):
    """A network that reports its device."""

    def __init__(self) -> None:
        super().__init__()
        self.place = "device"

    def to(self, place: object) -> Part:  # type: ignore[override]
        self.place = str(place)
        return self


class StubPolicy:
    """A policy that reports the devices of its parts during each operation."""

    def __init__(self, fails: bool = False) -> None:
        self.parts: dict[str, object] = {
            "vae": Part(),
            "image_encoder": Part(),
            "text_encoder": Part(),
            "vocoder": Part(),
        } | {"scheduler": object()}
        self.pipeline = SimpleNamespace(components=self.parts, vae=self.parts["vae"])
        self.fails = fails

    def places(self) -> list[str]:
        return [part.place for part in self.parts.values() if isinstance(part, Part)]

    def decode(self, latents: Tensor, conditioning: object) -> list[str]:
        if self.fails:
            raise RuntimeError("out of memory")
        return self.places()

    def decode_audio(self, latents: Tensor, conditioning: object) -> list[str]:
        return self.places()

    def control_conditioning(self, videos: Tensor, images: object, video: object) -> list[str]:
        return self.places()

    def image_conditioning(self, images: Tensor, video: object) -> list[str]:
        return self.places()


def test_parts_are_on_the_device_only_while_they_are_used(recipe: Config) -> None:
    stub, settings = StubPolicy(), replace(recipe.policy, frozen_rest_on="cpu")
    save_memory(stub, settings, torch.device("cuda", 1))
    assert stub.places() == ["cpu", "cpu", "device", "cpu"], "the text encoder is not offloaded by these operations"
    assert stub.decode(torch.zeros(1), None) == ["cuda:1", "cuda:1", "device", "cuda:1"]
    assert stub.decode_audio(torch.zeros(1), None)[3] == "cuda:1"
    assert stub.image_conditioning(torch.zeros(1), None)[:2] == ["cuda:1", "cuda:1"]
    assert stub.control_conditioning(torch.zeros(1), None, None)[:2] == ["cuda:1", "cuda:1"]
    assert stub.places()[:2] == ["cpu", "cpu"]


def test_parts_are_offloaded_again_after_a_failure(recipe: Config) -> None:
    stub = StubPolicy(fails=True)
    save_memory(stub, replace(recipe.policy, frozen_rest_on="cpu"), torch.device("cuda"))
    with pytest.raises(RuntimeError, match="out of memory"):
        stub.decode(torch.zeros(1), None)
    assert stub.places()[:2] == ["cpu", "cpu"]


def test_an_unsupported_vae_option_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"policy\.vae_tiling is true, but Linear does not support it"):
        split_vae_work(nn.Linear(2, 2), tiling=True, slicing=False)


def test_sequence_groups_use_the_chosen_attention_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def dispatched(query: Tensor, key: Tensor, value: Tensor, *, backend: object = None, **options: object) -> Tensor:
        calls.append((backend, query.shape[2]))
        return query

    monkeypatch.setattr(ulysses, "dispatch_attention_fn", dispatched)
    for ranks in (1, 2):
        module = random_transformer("wan")
        choose_attention(Transformers({"transformer": module}), "_native_math")
        with alone_in_a_group(ranks) as mesh, torch.no_grad():
            parallelise(module, mesh, WanPolicy.sequence_plan)
            monkeypatch.setattr(type(module).__module__ + ".dispatch_attention_fn", ulysses.attend)
            module(**inputs("wan", "even")[0], return_dict=False)
    assert {str(backend) for backend, _ in calls} == {"AttentionBackendName._NATIVE_MATH"}
    assert {heads for _, heads in calls} == {4, 2}, "two ranks of a sequence group have half of the heads each"


def test_another_backend_gives_the_same_attention() -> None:
    arguments, _ = inputs("wan", "even")
    module = random_transformer("wan")
    expected = module(**arguments, return_dict=False)[0]
    choose_attention(Transformers({"transformer": module}), "_native_math")
    torch.testing.assert_close(module(**arguments, return_dict=False)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "message"),
    [("fastest", "diffusers knows"), ("sage", "no backward"), ("flash", "cannot be used here")],
)
def test_a_backend_that_cannot_train_here_is_refused(backend: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_attention(Transformers({"transformer": random_transformer("wan")}), backend)


def test_a_backend_is_refused_for_hard_coded_attention() -> None:
    with pytest.raises(ConfigError, match="Linear calls torch's"):
        choose_attention(Transformers({"transformer": nn.Linear(2, 2)}), "native")


@pytest.mark.parametrize(
    ("share", "again"), [(0.3, (0, 0, 0, 1, 0, 0, 1, 0, 0, 1)), (0.5, (0, 1) * 5), (1.0, (1,) * 10)]
)
def test_a_share_of_the_blocks_is_computed_again_with_the_same_gradients(share: float, again: tuple[int, ...]) -> None:
    config = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 16,
              "freq_dim": 16, "ffn_dim": 32, "num_layers": 10}  # fmt: skip
    torch.manual_seed(0)
    module: Any = transformer_wan.WanTransformer3DModel(**config)
    inputs = (torch.randn(2, 4, 2, 4, 4), torch.tensor([500.0, 500.0]), torch.randn(2, 8, 16))
    module(*inputs, return_dict=False)[0].square().sum().backward()
    expected = {name: parameter.grad for name, parameter in module.named_parameters()}
    module.zero_grad(set_to_none=True)
    calls = [0] * 10
    for i, block in enumerate(module.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    checkpoint_blocks(module, share)
    module(*inputs, return_dict=False)[0].square().sum().backward()
    assert tuple(count - 1 for count in calls) == again
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_blocks_are_bit_equal_in_rollout_and_replay(
    folder: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Earlier tests with sequence groups leave our processors installed, whose checked annotations cannot be compiled.
    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", dispatch_attention_fn)
    policy: Any = load_policy(str(folder), max_sequence_length=TEXT_TOKENS, components=("transformer",), dtype=dtype)
    latents, conditioning = policy.example()
    conditioning = {name: value.to(dtype) for name, value in conditioning.items()}
    sigma = torch.tensor(0.5)
    eager = policy.velocity(latents, sigma, conditioning)
    for module in policy.transformers.values():
        module.enable_gradient_checkpointing()
        compile_blocks(module, blocks_of(policy.transformers, policy.block_names))
    with torch.no_grad():
        rollout = policy.velocity(latents, sigma, conditioning)
    replay = policy.velocity(latents.requires_grad_(), sigma, conditioning)
    assert torch.equal(rollout, replay)
    torch.testing.assert_close(replay, eager, rtol=1e-4, atol=1e-5)
    replay.square().mean().backward()
    assert all(parameter.grad is not None for parameter in policy.transformers.parameters())
