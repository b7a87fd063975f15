"""YAML and JSON of users, read strictly: a mistake is one sentence that names the file, the place and the rule.

Refused before they cost time or memory: text that is not UTF-8, a key that appears twice, NaN and infinities in JSON,
numbers of thousands of digits, deep nesting, and YAML aliases that expand to very many values. Nothing here imports
torch.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import xxhash
import yaml
from pydantic import ValidationError

from bpgo_video.errors import SHOWN, InputError, shown

MAX_BYTES = 2**18  # of a file that a person writes
MAX_JSON = 2**28  # bytes of a file that a program writes
MAX_VALUES = 100_000  # of a YAML file, after its aliases are expanded
MAX_DEPTH = 64  # levels of nesting
FLOAT = re.compile(r"[-+]?\d[\d_]*(?:\.[\d_]*)?[eE][-+]?\d+$")  # 1e-5, which is text in YAML 1.1
HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
SEAL = "xxh3"  # key of a document's hash


class MalformedFile(InputError):
    """A file that does not have the expected form; the message names the file."""


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-5 is a number."""


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads."""


for kind in (_Loader, _Dumper):
    kind.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789"))


def read_text(path: Path, limit: int = MAX_BYTES) -> str:
    """The text of a file.

    Raises:
        MalformedFile: it is no file, is larger than `limit` bytes, or is not UTF-8.
    """
    with open_file(path) as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise MalformedFile(f"{path} has more than {limit:,} bytes, the limit for such a file; is it the right one?")
    return decoded(data, path)


def open_file(path: Path) -> BinaryIO:
    """A file opened to read bytes. Raises MalformedFile for a folder, and for a pipe, which may never end."""
    if path.exists() and not path.is_file():
        raise MalformedFile(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}; a file is needed")
    return path.open("rb")


def decoded(data: bytes, source: object) -> str:
    """UTF-8 as text, without a byte order mark. Raises MalformedFile."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MalformedFile(
            f"{source} is not UTF-8 text: byte {error.start + 1} is 0x{data[error.start]:02x}; save it as UTF-8"
        ) from None


def plain_yaml(text: str, source: object) -> Any:
    """Plain data of a YAML document; None if it is empty. Raises MalformedFile."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except RecursionError:
        raise _too_deep(source) from None
    except yaml.MarkedYAMLError as error:
        raise MalformedFile(f"{source}{_line(error.problem_mark)} is not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise MalformedFile(f"{source} is not YAML: {' '.join(str(error).split())}") from None
    if node is None:
        return None
    _check_nodes(node, source)
    try:
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise MalformedFile(f"{source}{_line(error.problem_mark)} is not plain data: {error.problem}") from None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:  # PyYAML's own, of numbers and dates
        raise MalformedFile(f"{source} has a number, date or tag that YAML does not accept: {error}") from None


def to_yaml(tree: Any) -> str:
    """Plain data as YAML, in the order of its keys."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _line(mark: yaml.Mark | None) -> str:
    return "" if mark is None else f", line {mark.line + 1},"


def _too_deep(source: object) -> MalformedFile:
    return MalformedFile(f"{source} is nested more than {MAX_DEPTH} levels deep; is it the right file?")


def _check_nodes(root: yaml.Node, source: object) -> None:
    """Raise MalformedFile for a key that appears twice, deep nesting, or very many values."""
    waiting, count = [(root, 1)], 0
    while waiting:
        node, depth = waiting.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise _too_deep(source)
        if count > MAX_VALUES:
            raise MalformedFile(
                f"{source} has more than {MAX_VALUES:,} values once its aliases (*name) are written out; use fewer"
            )
        if isinstance(node, yaml.MappingNode):
            _check_keys(node, source)
            waiting += [(part, depth + 1) for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(part, depth + 1) for part in node.value]


def _check_keys(mapping: yaml.MappingNode, source: object) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in mapping.value:
        if isinstance(key, yaml.ScalarNode):
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise MalformedFile(
                    f"{source} has the key {key.value!r} twice in one mapping, in lines {lines[name]} and {line}; "
                    "remove one"
                )
            lines[name] = line


def plain_json(data: bytes | str, source: object, finite: bool = True) -> Any:
    """Plain data of a JSON document. Raises MalformedFile, for NaN and infinities too if `finite`."""
    text = decoded(data, source) if isinstance(data, bytes) else data
    try:
        numbers: dict[str, Any] = {"parse_constant": _not_a_number, "parse_float": _finite} if finite else {}
        value = json.loads(text, object_pairs_hook=_distinct, **numbers)
    except RecursionError:
        raise _too_deep(source) from None
    except ValueError as error:  # also an integer of more than 4300 digits
        raise MalformedFile(f"{source} is not JSON: {error if text.strip() else 'it is empty'}") from None
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value, source)
    if HALF_CHARACTER.search(text):
        _check_characters(value, source)
    return value


def parse_json(form: Any, data: bytes | str, source: object, remedy: str) -> Any:
    """JSON data as the type of `form`.

    Args:
        form: a pydantic TypeAdapter.
        source: the file, and line if there is one, for the message.
        remedy: the rule, or what the user can do, for the message.

    Raises:
        MalformedFile: the data has another form; names the source, the first wrong value and the remedy.
    """
    try:
        text = decoded(data, source) if isinstance(data, bytes) else data
        value = form.validate_json(text)
        plain_json(text, source, finite=False)  # pydantic takes keys that appear twice
        return value
    except MalformedFile as error:
        raise MalformedFile(f"{error}; {remedy}") from None
    except ValidationError as error:
        raise MalformedFile(f"{source}: {wrong_value(error)}; {remedy}") from None


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON data with a hash of itself, which finds a flipped bit; see `check_seal`."""
    return {**content, SEAL: _digest(json.loads(json.dumps(content)))}


def check_seal(content: Mapping[str, Any], source: object) -> None:
    """Raise MalformedFile if JSON data does not have the hash that it names; without one it may have been edited."""
    rest = {key: value for key, value in content.items() if key != SEAL}
    if SEAL in content and content[SEAL] != _digest(rest):
        raise MalformedFile(f"{source} is damaged: its content does not have the hash that it names")


def _digest(content: Any) -> str:
    return str(xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest())


def read_json(form: Any, path: Path, remedy: str) -> Any:
    """The content of a JSON file as the type of `form`. Raises MalformedFile."""
    return parse_json(form, read_text(path, MAX_JSON), path, remedy)


def wrong_value(error: ValueError) -> str:
    """`shards.0.count: Input should be a valid integer (given: 'x')`, the first value that pydantic refuses."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"]) or "content"
    rule = "it must be an object, {...}" if first["type"] == "model_type" else first["msg"]
    return f"{name}: {rule} (given: {shown(first['input'])})"


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {shown(repeated)} appears twice in one object")
    return found


def _not_a_number(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number; only finite numbers are")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:SHOWN]} is too large for a number")
    return value


def _check_characters(value: Any, source: object) -> None:
    """Raise MalformedFile if a text has one half of a pair of surrogates, which no file and no terminal takes."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise MalformedFile(f"{source} has U+{code:04X}, text that is not UTF-8; remove it") from None


def _check_depth(root: Any, source: object) -> None:
    waiting = [(root, 1)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise _too_deep(source)
        children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        waiting += [(child, depth + 1) for child in children]
