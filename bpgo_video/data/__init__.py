"""Data on disk: prompt files, prompt and video shards, reward priors, images and videos.

What the flags of a build say is here: nothing in this file imports torch.
"""

from collections.abc import Mapping, Sequence

Columns = Mapping[str, Sequence[str]]  # field -> the columns that may hold it, of which a row's first counts
FIELDS: Mapping[str, tuple[type, Sequence[str]]] = {  # field -> type, columns
    "prompt": (str, ("prompt", "text", "caption")),
    "negative_prompt": (str, ("negative_prompt",)),
    "id": (int, ("id",)),
    "split": (str, ("split",)),
    "tags": (list, ("tags", "tag")),
    "image": (object, ("image", "file_name")),
    "video": (object, ("video",)),
    "info": (dict, ("info",)),
}
MAX_CHARACTERS = 2000  # of a prompt: about 512 tokens of English; encoders drop the rest
HELDOUT = "heldout"  # split of the prompts that a plan holds out
SKIPPED = "skipped.jsonl"  # lists the prompts that a build left out, and why


def column_flag(name: str) -> str:
    """The flag that names the column of a field."""
    return f"--{'text' if name == 'prompt' else name.replace('_', '-')}-column"
