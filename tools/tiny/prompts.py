"""The embedded world's prompts: every caption of bpgo_video/tiny/world.py, as lines of prompts.jsonl.

Run `python -m tools.tiny.prompts` to rewrite the file after a change of the world.
"""

from __future__ import annotations

import json
from pathlib import Path

import bpgo_video
from bpgo_video.tiny import world as world

PATH = Path(bpgo_video.__file__).parent / "tiny" / "prompts.jsonl"


def lines() -> list[str]:
    """One JSON object per caption: prompt, split, and the tag "clear" or "open"."""
    return [
        json.dumps({"prompt": c.text, "split": split, "tags": ["clear" if c.is_clear else "open"]})
        for split in ("train", "heldout")
        for c in world.captions(split)
    ]


if __name__ == "__main__":
    PATH.write_text("\n".join(lines()) + "\n", "utf-8")
