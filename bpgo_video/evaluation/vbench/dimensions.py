"""The dimensions that are measured here, VBench's by name; others need its own package (bpgo-video evaluate vbench)."""

from __future__ import annotations

from bpgo_video.evaluation.vbench.consistency import BACKGROUND_CONSISTENCY, SUBJECT_CONSISTENCY
from bpgo_video.evaluation.vbench.dimension import Dimension, DimensionError
from bpgo_video.evaluation.vbench.image_alignment import CAMERA_MOTION, I2V_BACKGROUND, I2V_SUBJECT
from bpgo_video.evaluation.vbench.motion import DYNAMIC_DEGREE, MOTION_SMOOTHNESS, TEMPORAL_FLICKERING
from bpgo_video.evaluation.vbench.quality import AESTHETIC_QUALITY, IMAGING_QUALITY
from bpgo_video.evaluation.vbench.text_alignment import APPEARANCE_STYLE, OVERALL_CONSISTENCY, TEMPORAL_STYLE
from bpgo_video.evaluation.vbench.totals import BENCHMARKS

DIMENSIONS: dict[str, Dimension] = {
    "subject_consistency": SUBJECT_CONSISTENCY,
    "background_consistency": BACKGROUND_CONSISTENCY,
    "temporal_flickering": TEMPORAL_FLICKERING,
    "motion_smoothness": MOTION_SMOOTHNESS,
    "dynamic_degree": DYNAMIC_DEGREE,
    "aesthetic_quality": AESTHETIC_QUALITY,
    "imaging_quality": IMAGING_QUALITY,
    "appearance_style": APPEARANCE_STYLE,
    "temporal_style": TEMPORAL_STYLE,
    "overall_consistency": OVERALL_CONSISTENCY,
    "i2v_subject": I2V_SUBJECT,
    "i2v_background": I2V_BACKGROUND,
    "camera_motion": CAMERA_MOTION,
}
OF_IMAGES = ("i2v_subject", "i2v_background")  # compare with the image that was to be continued


def find_dimension(name: str) -> Dimension:
    """
    Raises:
        DimensionError: it is measured by VBench's own code alone, or no dimension at all.
    """
    if name in DIMENSIONS:
        return DIMENSIONS[name]
    if any(name in benchmark.dimensions for benchmark in BENCHMARKS.values()):
        raise DimensionError(f"{name} is measured by VBench's own package alone: bpgo-video evaluate vbench")
    raise DimensionError(f"there is no dimension {name!r}; known are {', '.join(DIMENSIONS)}")
