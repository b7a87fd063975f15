"""What do a family's authors call each tensor? ComfyUI and the original code read files by these names."""

from __future__ import annotations

from collections.abc import Callable

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.policies.wan_names import original_name

ORIGINAL_NAMES: dict[
    str, Callable[[str], str]
] = {  # diffusers' pipeline -> (its transformer's tensor or layer -> theirs)
    "WanPipeline": original_name,
    "WanImageToVideoPipeline": original_name,
}


def original_names(pipeline_class: str) -> Callable[[str], str]:
    """The authors' name of a tensor, or of a layer, of the pipeline's transformers.

    Raises:
        ConfigError: they are not known for this pipeline.
    """
    if pipeline_class not in ORIGINAL_NAMES:
        raise ConfigError(
            f"the names that ComfyUI has for a {pipeline_class} are not known, only those of {sorted(ORIGINAL_NAMES)}; "
            "write --format lora or diffusers"
        )
    return ORIGINAL_NAMES[pipeline_class]
