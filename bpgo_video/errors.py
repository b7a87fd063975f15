"""Sentences that many error messages share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggestion(word: str, known: Iterable[str], limit: int = 1, cutoff: float = 0.6) -> str:
    """`; perhaps you meant --output`, the nearest of the known names; empty if none is near."""
    near = difflib.get_close_matches(word, list(known), n=limit, cutoff=cutoff)
    return f"; perhaps you meant {' or '.join(near)}" if near else ""


def unknown(name: str, value: object, known: Iterable[str], otherwise: str = "") -> str:
    """`scheduler is 'eular'; known are ddim, dpm, euler; perhaps you meant euler`

    Args:
        name: the setting, flag or key as the user writes it.
        otherwise: what is valid besides the known names, such as `, or module:Name`.
    """
    names = list(known)
    return f"{name} is {value!r}; known are {', '.join(names) or 'none'}{otherwise}{suggestion(str(value), names)}"


def some_of(names: Iterable[str], limit: int = 3) -> str:
    """`a, b, c and 5 more`, in sorted order."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more
