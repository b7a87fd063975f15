"""JSON that is checked against a type when it is read."""

from __future__ import annotations

from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from bpgo_video.reports.metrics import MalformedFile

T = TypeVar("T")


def checked(form: TypeAdapter[T], data: bytes, place: object, remedy: str) -> T:
    """`data` as what `form` describes.

    Args:
        place: where the data is from, for the message.
        remedy: what the user can do.

    Raises:
        MalformedFile: it is something else; names the place, the first wrong value and the remedy.
    """
    try:
        return form.validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "content"
        raise MalformedFile(f"{place}: {name}: {first['msg']} (given: {first['input']!r:.100}); {remedy}") from error
