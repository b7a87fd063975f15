"""Sections of a recipe: strict, frozen dataclasses with help texts and value ranges."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pkgutil import resolve_name
from typing import Annotated, Any, TypeVar, dataclass_transform, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Field, ValidationError, WrapValidator
from pydantic.dataclasses import dataclass

from bpgo_video.errors import InputError, likely, meant, shown

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
HELD = 2**20  # no machine holds more videos, tokens, pixels of a side or steps at once
LARGEST = 2**31 - 1
Switch = Annotated[bool, Field(strict=True)]
Positive = Annotated[int, Field(strict=True, ge=1, le=LARGEST)]
Count = Annotated[int, Field(strict=True, ge=0, le=LARGEST)]
Held = Annotated[int, Field(strict=True, ge=1, le=HELD)]
Several = Annotated[int, Field(strict=True, ge=2, le=HELD)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Real = Annotated[float, Field(strict=True)]
Unit = Annotated[Real, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[Real, Field(ge=0.0)]
AboveZero = Annotated[Real, Field(gt=0.0)]
Share = Annotated[Real, Field(gt=0.0, le=1.0)]
BelowOne = Annotated[Real, Field(ge=0.0, lt=1.0)]
AtLeastOne = Annotated[Real, Field(ge=1.0)]
Sigmas = tuple[Share, ...]  # noise levels at which denoising steps start

Section = TypeVar("Section")


def _or_function(value: Any, known: Callable[[Any], Any], info: Any) -> Any:
    if not isinstance(value, str) or ":" not in value:
        return known(value)
    try:
        resolve_name(value)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{info.field_name} is {value!r}, which cannot be imported: {error}; write my_package.module:function, and "
            "install the package or put its folder on PYTHONPATH"
        ) from None
    return value


OrFunction = WrapValidator(_or_function)  # a name of a table, or `my_package.module:function` (bpgo_video.types)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, Field))
def section(cls: type[Section]) -> type[Section]:
    """Make a frozen dataclass that checks its values; the docstrings of its fields are their help texts.

    Its constructor raises InputError, which names each wrong value and its rule.
    """
    checked: Any = dataclass(cls, frozen=True, config=STRICT)
    construct = checked.__init__

    @functools.wraps(construct)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            construct(self, *args, **kwargs)
        except ValidationError as error:
            raise InputError(explain(error, cls.__name__, checked)) from None

    checked.__init__ = __init__
    return checked


def explain(error: ValidationError, source: str, root: type) -> str:
    """A line for each value that pydantic refuses.

    Args:
        source: where the values come from, such as the name of a file.
        root: class of the tree, for the nearest known key.
    """
    lines = []
    for problem in error.errors():
        path = [str(part) for part in problem["loc"]]
        name = ".".join(path)
        if problem["type"] == "unexpected_keyword_argument":
            lines.append(f"{name}: unknown key{_meant_key(name, root)}")
        elif problem["type"] in ("missing", "missing_argument"):
            lines.append(f"{name}: required, and not given")
        elif problem["type"] == "value_error":
            lines.append(str(problem["ctx"]["error"]))
        else:
            lines.append(f"{name}: {problem['msg']} (given: {shown(problem['input'])})")
    return f"{source}:\n  " + "\n  ".join(lines)


def _meant_key(name: str, root: type) -> str:
    """The keys that an unknown one may mean, without the section's name if that is the same."""
    section = name[: name.rfind(".") + 1]
    return meant([key.removeprefix(section) for key in likely(name, [*_keys(root, name), "--ranks"])])


def _keys(tree: Any, name: str, above: str = "") -> Iterator[str]:
    """Every key, such as policy.lora.rank; below rewards only those of the reward in `name`."""
    hints = get_type_hints(tree)
    for field in dataclasses.fields(tree):
        key, hint = f"{above}{field.name}", hints[field.name]
        yield key
        if get_origin(hint) is dict and name.startswith(f"{key}."):
            key, hint = f"{key}.{name.removeprefix(f'{key}.').partition('.')[0]}", get_args(hint)[1]
        if dataclasses.is_dataclass(hint):
            yield from _keys(hint, name, f"{key}.")
