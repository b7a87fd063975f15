"""The `policy.family` key: it decides how a folder is loaded, and is refused for networks of another family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.planning.models import known_models, policy_of
from bpgo_video.policies import FAMILIES, family, family_of

NETWORKS = {
    "Wan": ("WanTransformer3DModel", "AutoencoderKLWan"),
    "LTX": ("LTXVideoTransformer3DModel", "AutoencoderKLLTXVideo"),
    "Kandinsky5": ("Kandinsky5Transformer3DModel", "AutoencoderKLHunyuanVideo"),
}


def index_of(pipeline: str, networks: str) -> dict[str, Any]:
    parts = dict(zip(("transformer", "vae"), NETWORKS[networks], strict=True))
    return {"_class_name": pipeline, **{part: ["diffusers", name] for part, name in parts.items()}}


@pytest.mark.parametrize(
    ("pipeline", "networks", "name"),
    [
        ("WanPipeline", "Wan", "WanImageToVideoPipeline"),
        ("WanImageToVideoPipeline", "Wan", "WanPipeline"),
        ("LTXPipeline", "LTX", "LTXImageToVideoPipeline"),
        ("WanPipeline", "Wan", None),
        ("MyPipeline", "Wan", "WanPipeline"),
    ],
)
def test_another_pipeline_with_the_same_networks_is_accepted(pipeline: str, networks: str, name: str | None) -> None:
    found = family_of("folder", index_of(pipeline, networks), name)
    module, _, attribute = FAMILIES[name or pipeline].partition(":")
    assert (found.__module__, found.__name__) == (module, attribute)


@pytest.mark.parametrize(
    ("pipeline", "networks", "name", "message"),
    [
        (
            "WanPipeline",
            "Wan",
            "LTXPipeline",
            r"policy\.family is 'LTXPipeline', but folder holds a WanTransformer3DModel and an AutoencoderKLWan; leave "
            r"family out, or name one of \['WanPipeline', 'WanImageToVideoPipeline'\]",
        ),
        ("LTXPipeline", "LTX", "WanImageToVideoPipeline", "holds a LTXVideoTransformer3DModel"),
        ("Kandinsky5T2VPipeline", "Kandinsky5", "HunyuanVideoPipeline", "holds a Kandinsky5Transformer3DModel"),
        ("WanPipeline", "Wan", "Foo", r"policy\.family is 'Foo'; known families are \[.*Write a class for it"),
        ("FooPipeline", "Wan", None, r"folder is a FooPipeline; known families are .*Write a class for it"),
    ],
)
def test_a_family_that_does_not_match_the_folder_is_refused(
    pipeline: str, networks: str, name: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        family_of("folder", index_of(pipeline, networks), name)


def test_folders_and_plans_are_checked_alike(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps(index_of("WanPipeline", "Wan")))
    message = "'LTXPipeline', but .* holds a WanTransformer3DModel"
    with pytest.raises(ConfigError, match=message):
        family(tmp_path, "LTXPipeline")
    with pytest.raises(ConfigError, match=message):
        policy_of(known_models()["wan2.1-t2v-1.3b"], "LTXPipeline", 512)
