"""The examples of docs/api.md: each runs alone and prints the output shown below it."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from io import StringIO

import pytest

from tests.made.recipes import ROOT

PAGE = ROOT / "docs" / "api.md"
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:```text\n(?P<printed>.*?)^```$)?", re.DOTALL | re.MULTILINE)
EXAMPLES = list(BLOCK.finditer(PAGE.read_text()))


def printed_by(code: str) -> str:
    with redirect_stdout(StringIO()) as printed:
        exec(compile(code, str(PAGE), "exec", dont_inherit=True), {"__name__": "__main__"})
    return printed.getvalue()


def test_every_python_block_of_the_page_is_an_example() -> None:
    assert len(EXAMPLES) == PAGE.read_text().count("```python") > 0


@pytest.mark.parametrize(
    "example", EXAMPLES, ids=lambda example: f"line {PAGE.read_text()[: example.start()].count(chr(10)) + 1}"
)
def test_an_example_prints_the_output_shown_below_it(example: re.Match[str]) -> None:
    assert example["printed"] is not None, "show the output below the example"
    assert printed_by(example["code"]) == example["printed"]
