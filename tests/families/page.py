"""The example family of docs/new_family.md, SkyReels-V2, built from the code on that page."""

from __future__ import annotations

import re
import sys
from types import ModuleType

from tests.families.case import Case
from tests.families.skyreels import VIDEO, random_skyreels
from tests.families.wan import euler
from tests.made.random_wan import TEXT_TOKENS
from tests.made.recipes import ROOT

PAGE = ROOT / "docs" / "new_family.md"
MODULE = "skyreels_of_the_page"
(CODE,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def as_module() -> ModuleType:
    """The page's Python code as an importable module."""
    found = sys.modules[MODULE] = ModuleType(MODULE)
    exec(compile(CODE, str(PAGE), "exec"), found.__dict__)
    return found


as_module()
EXAMPLE = Case(random_skyreels, VIDEO, TEXT_TOKENS, family=f"{MODULE}:SkyReelsPolicy", euler=euler)
