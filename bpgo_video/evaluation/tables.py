"""Tables as text for the terminal."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

WIDTH = 110


def text_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A boxed table; the first `words` columns are aligned left, the others right."""
    table = Table(box=box.ROUNDED, title=title)
    for place, label in enumerate(header):
        table.add_column(label, justify="left" if place < words else "right")
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=WIDTH, color_system=None).print(table)
    return text.getvalue().rstrip()
