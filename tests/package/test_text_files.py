"""Text encodings: the program's files are UTF-8 in any locale, so every call that opens one states the encoding."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests.made.recipes import ROOT

CODE = sorted(path for folder in ("bpgo_video", "pipelines", "tools") for path in (ROOT / folder).rglob("*.py"))
# Number of positional arguments of a call that includes the encoding; binary modes are handled below.
WITH_ENCODING = {"read_text": 1, "write_text": 2}


def unstated(source: str) -> list[int]:
    """Lines with calls whose text encoding depends on the locale."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return sorted(call.lineno for call in calls if lacks_encoding(call))


def lacks_encoding(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in keywords:
        return False
    if name in WITH_ENCODING:
        return len(call.args) < WITH_ENCODING[name]
    if "text" in keywords or "universal_newlines" in keywords:  # of a process
        return True
    builtin = isinstance(call.func, ast.Name)
    if name != "open" or not (builtin or "mode" in keywords or not call.args or is_mode(call.args[0])):
        return False
    modes = [*call.args[builtin:][:1], *filter(None, [keywords.get("mode")])]
    return not any(is_mode(mode) and "b" in mode.value for mode in modes)


def is_mode(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and not set(node.value) - set("rwxabt+")


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("path.read_text()", True),
        ("path.read_text('utf-8')", False),
        ("path.write_text(text)", True),
        ("path.write_text(text, encoding='utf-8')", False),
        ("path.open()", True),
        ("path.open('a')", True),
        ("path.open('rb')", False),
        ("path.open(mode='wb')", False),
        ("open(path)", True),
        ("open(path, 'w')", True),
        ("open(path, 'rb')", False),
        ("open(path, encoding='utf-8')", False),
        ("Image.open(path)", False),
        ("subprocess.run(command, text=True)", True),
    ],
)
def test_a_call_without_an_encoding_is_detected(code: str, found: bool) -> None:
    assert bool(unstated(code)) is found


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_text_file_has_an_explicit_encoding(path: object) -> None:
    assert unstated(path.read_text("utf-8")) == []


@pytest.mark.parametrize(("utf8", "code"), [("0", 1), ("1", 0)])
def test_a_locale_in_which_torch_cannot_be_imported_is_named(utf8: str, code: int) -> None:
    environment = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": utf8, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "bpgo_video"], env=environment, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == code, done.stderr
    assert ("set PYTHONUTF8=1" in done.stderr) is bool(code)


def test_a_terminal_that_lacks_a_character_does_not_stop_a_command() -> None:
    program = "from bpgo_video.__main__ import main; main(); print('0.5 ± 0.1 ╭─')"
    environment = {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
    assert done.stdout.endswith(b"0.5 ? 0.1 ??\n")
