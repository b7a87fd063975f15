"""JSON that is checked against a type when it is read."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from bpgo_video.training.metrics import MalformedFile


def checked(form: Any, data: bytes, place: object, remedy: str) -> Any:
    """`data` as what `form` describes.

    Args:
        form: a TypeAdapter.
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
