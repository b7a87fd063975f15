"""Tables of functions by name, which recipes extend with functions of their own."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any, TypeVar

Row = TypeVar("Row")


class Table(dict[str, Row]):
    """Functions by name. A name `my_package.module:function` is the function that Python imports under it."""

    def __missing__(self, name: str) -> Any:
        """Import a function by its dotted name.

        Raises:
            KeyError: the name is neither a row nor of that form.
            ImportError, AttributeError: no such module or function.
        """
        if ":" not in name:
            raise KeyError(name)
        return resolve_name(name)
