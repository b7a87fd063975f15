"""Models without their weights, for memory plans: found by name, and run on fake tensors.

Fake tensors have a shape and a dtype but no storage, so a policy of 14B parameters runs in seconds on any machine: with
its checkpointing, its adapters, and the exchanges of a sequence group. Attention counts as tiled (flash or
memory-efficient): it saves queries, keys, values, output and one number per row.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from bpgo_video.config.bpgo import ConfigError, LoraConfig, VideoConfig
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.files import resolve_folder
from bpgo_video.policies import Policy, family_of
from bpgo_video.policies.attention import check_heads, parallelise
from bpgo_video.policies.base import LatentShape
from bpgo_video.policies.lora import add_lora
from bpgo_video.policies.networks import split_vae_work
from bpgo_video.weights import WeightsError, read_json, without_weights

VAE_DTYPE = torch.float32  # as policies load it
NO_ADAPTERS = LoraConfig()
TRAIN_TIMESTEPS = 1000
SCHEDULER = SimpleNamespace(  # its numbers change values, not the shapes of the transformer's inputs
    config=SimpleNamespace(num_train_timesteps=TRAIN_TIMESTEPS), alphas_cumprod=torch.linspace(1, 0, TRAIN_TIMESTEPS)
)


@dataclass(frozen=True, eq=False)
class Model:
    """A diffusers video pipeline without its weights.

    Attributes:
        name: in the table, or the folder that it was read from.
        source: where its numbers come from.
        index: its model_index.json without the parts: the pipeline's `_class_name`, and settings.
        transformers: names of its transformers, all of one shape: two if experts share the denoising.
        transformer, vae: their config.json; `_class_name` is a class of diffusers.
        text_tokens: the length that the model was trained with; None for a folder, which does not state it.
        image_encoder_parameters: of the encoder of conditioning images; 0 if there is none.
        folder: that it was read from; None for the table.
        hub: ids of the hub's repositories that hold it.
    """

    name: str
    source: str
    index: Mapping[str, Any]
    transformers: tuple[str, ...]
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_tokens: int | None = None
    image_encoder_parameters: int = 0
    folder: Path | None = None
    hub: Sequence[str] = ()


@cache
def known_models() -> dict[str, Model]:
    """The table by short names."""
    table = json.loads(files(__package__).joinpath("plan_models.json").read_text("utf-8"))
    return {
        name: Model(name, **{**entry, "transformers": tuple(entry["transformers"])}) for name, entry in table.items()
    }


def find_model(name: str) -> Model:
    """A model by its short name, its hub id or its folder; those of the table are not downloaded.

    Raises:
        ConfigError: neither a known name nor a folder; the message lists the known names.
    """
    for model in known_models().values():
        if name in (model.name, *model.hub):
            return model
    try:
        return _from_folder(name)
    except FileNotFoundError as error:
        raise ConfigError(f"{error}; known without a download are {sorted(known_models())}") from error


@cache
def _from_folder(name: str) -> Model:
    folder = resolve_folder(name, only=["*.json"])
    configs = {
        part: read_json(folder / part / "config.json")
        for part in ("transformer", "transformer_2", "vae")
        if (folder / part / "config.json").is_file()
    }
    for part, config in configs.items():
        network = without_weights(diffusers_class(config), folder / part)
        if part != "vae" and not repeated_blocks(network):
            raise WeightsError(f"{folder / part}/config.json makes a transformer without blocks; correct its layers")
    return Model(
        name=name,
        source=str(folder),
        index=read_json(folder / "model_index.json"),
        transformers=tuple(part for part in configs if part != "vae"),
        transformer=configs["transformer"],
        vae=configs["vae"],
        image_encoder_parameters=_parameters(folder / "image_encoder"),
        folder=folder,
    )


def _parameters(folder: Path) -> int:
    """The number of parameters of a part from its config; 0 if the part is absent."""
    if not (folder / "config.json").is_file():
        return 0
    from transformers import AutoConfig, AutoModel  # slow to import, and few pipelines have such a part

    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    return sum(parameter.numel() for parameter in model.parameters())


@cache
def policy_of(model: Model, family: str | None, max_sequence_length: int) -> Policy:
    """The model's policy without networks, with a stand-in for the scheduler.

    Raises:
        ConfigError: an unknown family, or one that is no `Policy`.
    """
    parts = {**dict.fromkeys(model.transformers, model.transformer), "vae": model.vae}
    index = {**model.index, **{name: ["diffusers", config["_class_name"]] for name, config in parts.items()}}
    policy_class = family_of(model.name, index, family)
    if not issubclass(policy_class, Policy):
        raise ConfigError(f"policy.family {family!r} is no subclass of bpgo_video.policies.Policy, so it has no plan")
    networks: dict[str, Any] = dict.fromkeys(model.transformers)
    pipeline = SimpleNamespace(**networks, scheduler=SCHEDULER, config=SimpleNamespace(boundary_ratio=None))
    with _folder_of(model, index, parts) as folder:
        return policy_class.variant(folder)(folder, pipeline, max_sequence_length)


@contextmanager
def _folder_of(model: Model, index: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> Iterator[Path]:
    """A pipeline folder without weights: the model's own, or one written from the table."""
    if model.folder is not None:
        yield model.folder
        return
    with TemporaryDirectory() as scratch:
        (Path(scratch) / "model_index.json").write_text(json.dumps(index), "utf-8")
        for name, config in parts.items():
            (Path(scratch) / name).mkdir()
            (Path(scratch) / name / "config.json").write_text(json.dumps(dict(config)), "utf-8")
        yield Path(scratch)


class Allocations(TorchDispatchMode):
    """Counts, inside its block, each storage that an operation makes until nothing refers to it.

    What a kernel allocates and frees while it runs (workspaces, a tile of softmax) is not counted.

    Args:
        apart: tensors that are not counted, such as a module's weights.

    Attributes:
        live, peak: bytes now, and the most since the start or since `mark`.
    """

    def __init__(self, apart: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in apart)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        weakref.finalize(storage, self._free, size).atexit = False
        self.live += size
        self.peak = max(self.peak, self.live)

    def _free(self, size: int) -> None:
        self.live -= size

    def mark(self) -> int:
        """The peak so far; the next one starts from what is live now."""
        peak, self.peak = self.peak, self.live
        return peak


class EveryTokenReal(TorchFunctionMode):
    """Inside its block, indexing by a mask keeps all rows, indexing by its complement none, and conditions are false.

    Fake masks have no values. HunyuanVideo 1.5 tests whether an image's features are all zero, and sorts real tokens
    before padding.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is Tensor.__bool__:
            return False
        if function is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            return args[0][:0] if hasattr(args[1], "keeps_none") else args[0].clone()
        result = function(*args, **(kwargs or {}))
        if function is Tensor.__invert__:
            result.keeps_none = True
        return result


@dataclass(frozen=True)
class Weights:
    """The parameters that an engine shards.

    Attributes:
        trained, frozen: elements of each parameter; with adapters a transformer's own are frozen.
        largest_block: elements of the largest unit that ZeRO-3 fetches at once.
    """

    trained: tuple[int, ...]
    frozen: tuple[int, ...]
    largest_block: int

    @property
    def elements(self) -> int:
        return sum(self.trained) + sum(self.frozen)


@dataclass(frozen=True)
class Footprint:
    """What one transformer takes on a rank.

    Attributes:
        weights: its parameters.
        forward: bytes at the peak of a forward without gradients, besides weights.
        replay: bytes at the peak of a forward and its backward, which releases each parameter's gradient at once.
    """

    weights: Weights
    forward: int
    replay: int


@cache
def footprint(
    policy: Policy,
    video: VideoConfig,
    samples: int,
    dtype: torch.dtype,
    *,
    gradient_checkpointing: bool = False,
    lora: LoraConfig = NO_ADAPTERS,
    sequence: int = 1,
) -> Footprint:
    """One of the policy's transformers, run on fake tensors.

    Args:
        samples: rows of a forward, both halves of classifier-free guidance counted.
        dtype: that the transformer computes in.
        sequence: ranks of a sequence group.

    Raises:
        ConfigError: the heads do not divide over the sequence group, or the policy lacks something that a plan needs.
    """
    check_heads(policy.transformer_config, sequence, policy.sequence_plan)
    inputs = transformer_inputs(policy, video, samples, dtype)
    with torch.device("meta"):  # fake tensors cannot be moved or cast in place, so modules are made here
        module: Any = diffusers_class(policy.transformer_config).from_config(dict(policy.transformer_config))
        if lora.rank:
            add_lora(module, lora, seed=0)
    with alone_in_a_group(sequence) as mesh, FakeTensorMode(), EveryTokenReal():
        make_fake(module, dtype)
        policy.prepare(module)
        if gradient_checkpointing:
            module.enable_gradient_checkpointing()
        if policy.sequence_plan is not None:
            policy.sequence_plan.attention(module)  # on one rank, too: Mochi's own processor needs values of the mask
        parallelise(module, mesh, policy.sequence_plan)
        forward, replay = measure(module, tree_map(_fake, inputs))
        trained, frozen = (
            tuple(parameter.numel() for parameter in module.parameters() if parameter.requires_grad == learns)
            for learns in (True, False)
        )
        return Footprint(Weights(trained, frozen, max(map(_elements, repeated_blocks(module)))), forward, replay)


def transformer_inputs(policy: Policy, video: VideoConfig, samples: int, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments that the policy's `velocity` passes to its transformer, on the meta device.

    Raises:
        ConfigError: see `footprint`.
    """

    class Recorded(Exception):
        """The transformer was called."""

    recorded: dict[str, Any] = {}

    def record(name: str, **inputs: Any) -> None:
        recorded.update(inputs)
        raise Recorded

    recorder, shape = copy(policy), policy.latent_shape(video)
    recorder.transformers = record
    try:
        shapes = policy.conditioning_shapes(shape, policy.max_sequence_length)
        conditioning = {
            name: torch.empty(samples, *size, dtype=torch.bool if "mask" in name else dtype, device="meta")
            for name, size in shapes.items()
        }
        for name, row in policy.video_conditioning(video).items():
            conditioning[name] = row.to("meta").expand(samples, *row.shape[1:])
        recorder.velocity(torch.empty(samples, *shape, device="meta"), torch.tensor(0.5), conditioning)
    except Recorded:
        pass
    except (AttributeError, NotImplementedError) as error:
        raise ConfigError(f"the memory of {type(policy).__name__} cannot be planned: {error}") from error
    return recorded


def measure(module: nn.Module, inputs: dict[str, Any]) -> tuple[int, int]:
    """Bytes at the peak of a forward without gradients, and of a forward with its backward."""
    for parameter in module.parameters():
        if parameter.requires_grad:  # ZeRO reduces gradients as they come; the plan counts what it keeps
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    with Allocations([*module.parameters(), *module.buffers()]) as counted:
        with torch.no_grad():
            module(**inputs)
        forward = counted.mark()
        inputs["hidden_states"].requires_grad_()  # as in replay
        module(**inputs)[0].float().square().mean().backward()
    return forward, counted.peak


def make_fake(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Replace a module's meta tensors by fake ones; call it under a FakeTensorMode."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=dtype)
                part._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = _fake(buffer)
    return module


def _fake(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value


@contextmanager
def alone_in_a_group(ranks: int) -> Iterator[Mesh]:
    """Rank 0 of a sequence group without the other ranks: exchanges have the right shapes and send nothing.

    Raises:
        RuntimeError: this process is a rank of a real group.
    """
    device = torch.device("cpu")
    if ranks == 1:
        yield Mesh(0, 1, device)
        return
    if dist.is_initialized():
        raise RuntimeError("a plan for sequence groups needs its own process; run bpgo-video plan")
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield Mesh(0, ranks, device, ranks, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def diffusers_class(config: Mapping[str, Any]) -> Any:
    """The class of diffusers that a config.json names.

    Raises:
        ConfigError: the installed diffusers has no such class.
    """
    name = config["_class_name"]
    if not hasattr(diffusers, name):
        raise ConfigError(f"the installed diffusers {diffusers.__version__} has no {name}; install a newer one")
    return getattr(diffusers, name)


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The members of a transformer's lists of blocks: ZeRO-3 fetches, and checkpointing recomputes, each as one."""
    return [block for part in module.children() if isinstance(part, nn.ModuleList) for block in part]


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def _fake_vae(policy: Policy) -> Iterator[Any]:
    with torch.device("meta"):
        vae = diffusers_class(policy.vae_config).from_config(dict(policy.vae_config)).eval()
    for part in vae.modules():
        if hasattr(part, "prepare_causal_attention_mask"):  # HunyuanVideo 1.5 fills it row by row, which takes minutes
            part.prepare_causal_attention_mask = _empty_mask
    with FakeTensorMode(), torch.no_grad():
        yield make_fake(vae, VAE_DTYPE)


def _empty_mask(
    n_frame: int, n_hw: int, dtype: torch.dtype, device: torch.device, batch_size: int
) -> Float[Tensor, "samples tokens tokens"]:
    return torch.empty(n_frame * n_hw, n_frame * n_hw, dtype=dtype, device=device).expand(batch_size, -1, -1)


@cache
def vae_bytes(policy: Policy) -> int:
    """Bytes of the VAE's weights."""
    with _fake_vae(policy) as vae:
        return _elements(vae) * VAE_DTYPE.itemsize


@cache
def decoding_bytes(
    policy: Policy, latents: LatentShape, samples: int, *, tiling: bool = False, slicing: bool = False
) -> int:
    """Bytes at the peak of decoding that many videos at once, besides the VAE's weights."""
    with _fake_vae(policy) as vae:
        split_vae_work(vae, tiling=tiling, slicing=slicing or policy.slices_vae)
        timestep = {"temb": torch.empty(samples)} if vae.config.get("timestep_conditioning") else {}
        with Allocations([*vae.parameters(), *vae.buffers()]) as counted:
            vae.decode(torch.empty(samples, *latents), return_dict=False, **timestep)
    return counted.peak
