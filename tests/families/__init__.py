"""Which families do the tests of all families go through? Each a small pipeline folder of random weights, by its name.

A family of its own is a file here that writes such a folder in diffusers' layout, from configs, and a line below.
"""

from __future__ import annotations

from bpgo_video.policies import Policy, load_policy
from tests.families.case import Case
from tests.families.wan import WAN, WAN_IMAGE, WAN_ONE_FRAME

CASES: dict[str, Case] = {"wan": WAN, "wan_one_frame": WAN_ONE_FRAME, "wan_image": WAN_IMAGE}

__all__ = ["CASES", "Case", "Policy", "load_policy"]
