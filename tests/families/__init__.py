"""Cases for the tests of all model families: small pipeline folders of random weights, by name.

To add a family, add a file that writes such a folder in diffusers' layout from configs, and a row below.
"""

from __future__ import annotations

from bpgo_video.policies import Policy, load_policy
from tests.families.case import Case
from tests.families.cogvideox import (
    COGVIDEOX,
    COGVIDEOX_IMAGE,
    COGVIDEOX_PAIRS,
    COGVIDEOX_PAIRS_IMAGE,
    COGVIDEOX_PAIRS_ONE_FRAME,
)
from tests.families.flux import FLUX, FLUX_SCHNELL
from tests.families.hunyuan import HUNYUAN, HUNYUAN_CONCAT, HUNYUAN_FIRST_FRAME
from tests.families.hunyuan15 import HUNYUAN_15, HUNYUAN_15_IMAGE
from tests.families.kandinsky5 import KANDINSKY5, KANDINSKY5_IMAGE
from tests.families.ltx import LTX, LTX_IMAGE
from tests.families.ltx2 import LTX2
from tests.families.mochi import MOCHI
from tests.families.page import EXAMPLE
from tests.families.qwen_image import QWEN_IMAGE
from tests.families.sd3 import SD3, SD35
from tests.families.skyreels import SKYREELS_FORCING, SKYREELS_IMAGE, SKYREELS_TEXT
from tests.families.vace import VACE, VACE_BOTH, VACE_IMAGE
from tests.families.wan import WAN, WAN_IMAGE, WAN_ONE_FRAME
from tests.families.wan22 import WAN_22, WAN_22_IMAGE, WAN_22_TI2V, WAN_22_TI2V_IMAGE

CASES: dict[str, Case] = {
    "wan": WAN,
    "wan_one_frame": WAN_ONE_FRAME,
    "wan_image": WAN_IMAGE,
    "wan22": WAN_22,
    "wan22_image": WAN_22_IMAGE,
    "wan22_ti2v": WAN_22_TI2V,
    "wan22_ti2v_image": WAN_22_TI2V_IMAGE,
    "cogvideox": COGVIDEOX,
    "cogvideox_image": COGVIDEOX_IMAGE,
    "cogvideox_pairs": COGVIDEOX_PAIRS,
    "cogvideox_pairs_one_frame": COGVIDEOX_PAIRS_ONE_FRAME,
    "cogvideox_pairs_image": COGVIDEOX_PAIRS_IMAGE,
    "mochi": MOCHI,
    "ltx": LTX,
    "ltx_image": LTX_IMAGE,
    "ltx2": LTX2,
    "hunyuan": HUNYUAN,
    "hunyuan_image": HUNYUAN_FIRST_FRAME,
    "hunyuan_image_concat": HUNYUAN_CONCAT,
    "hunyuan15": HUNYUAN_15,
    "hunyuan15_image": HUNYUAN_15_IMAGE,
    "kandinsky5": KANDINSKY5,
    "kandinsky5_image": KANDINSKY5_IMAGE,
    "flux": FLUX,
    "flux_schnell": FLUX_SCHNELL,
    "sd3": SD3,
    "sd35": SD35,
    "qwen_image": QWEN_IMAGE,
    "vace": VACE,
    "vace_image": VACE_IMAGE,
    "vace_both": VACE_BOTH,
    "skyreels": SKYREELS_TEXT,
    "skyreels_image": SKYREELS_IMAGE,
    "skyreels_forcing": SKYREELS_FORCING,
    "example": EXAMPLE,
}

__all__ = ["CASES", "Case", "Policy", "load_policy"]
