"""Secrets stay out of recipes: runs copy them into config.yaml, checkpoints, reports, model cards and trackers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from bpgo_video.config.bpgo import ConfigError

WORDS = r"(?:api_?key|secret(?:_?key)?|passw(?:or)?d|credentials?|(?:access|auth)_?token)"
NAME = re.compile(rf"(?i:(?:.*_)?{WORDS})|[A-Z0-9_]*(?:TOKEN|KEY)")  # of an option or an environment variable
SECRETS = tuple(  # what precedes a secret, and the secret; `$NAME` is none: a shell reads it from its environment
    re.compile(rf"({before})(?!\$)({secret})", re.IGNORECASE)
    for before, secret in (
        (r"\b[a-z][a-z0-9+.-]*://[^/\s?#@:]*:", r"[^/\s?#@]+(?=@)"),
        (r"\bhttps?://", r"[^/\s?#@:]+(?=@)"),
        (rf"[?&;](?:[\w.-]*{WORDS}|token|key|sig|[\w-]*signature|[\w-]*security-token)=", r"[^&\s]+"),
        (r"\bauthorization['\"]?\s*[:=]\s*['\"]?(?:bearer|basic) +", r"[\w.~+/=-]{8,}"),
        (r"\bbearer +", r"(?=\S*\d)[\w.~+/=-]{16,}"),  # prose has bearers, too
        (r"\b", r"(?:hf_|gh[opsu]_|github_pat_|glpat-|sk-|xox[abp]-|AKIA)\w[\w-]{15,}"),
    )
)
WAYS_OUT = {  # by a part of the key
    "url": "name the environment variable that holds the token with token_env",
    "environment": "export the variable where the run starts: a worker has the run's environment",
    "shards": 'let a command read it from the environment, as in pipe:curl -sf -H "Authorization: Bearer $TOKEN" URL',
}
OTHERWISE = "read it from an environment variable"


def check_secrets(tree: dict[str, Any], source: str) -> None:
    """
    Raises:
        ConfigError: a value holds a secret; names its key, not the value.
    """
    for path, value in _strings(tree, ()):
        if without_secrets(value) != value or (value and NAME.fullmatch(path[-1])):
            way_out = next((way for part, way in WAYS_OUT.items() if part in path), OTHERWISE)
            raise ConfigError(
                f"{source}: {'.'.join(path)} holds a password or token, which the run would copy into its config.yaml, "
                f"reports and trackers; {way_out}"
            )


def without_secrets(text: str) -> str:
    """The text with *** for passwords and tokens in URLs, authorization headers, and tokens of known forms."""
    for pattern in SECRETS:
        text = pattern.sub(r"\1***", text)
    return text


def _strings(node: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(node, str):
        yield path, node
    elif isinstance(node, dict | list | tuple):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _strings(value, (*path, str(key)))
