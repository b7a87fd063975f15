"""What became of the cases of a part of torture, and the table of all parts.

held       the fault changed nothing: the result equals the undisturbed one
detected   the command refused what was wrong, with a sentence and exit code 2
silent     a wrong result, or a wrong input, without a word
traceback  what the user sees is no sentence
unclear    another exit code, or no message
slow       longer than allowed
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

OUTCOMES = ("held", "detected", "silent", "traceback", "unclear", "slow")
MISTAKES = ("silent", "traceback", "unclear", "slow")


@dataclass
class Tally:
    """The cases of one kind.

    Attributes:
        tried: faults; one case may hold several.
        at: faults by place, if that is of interest.
        slowest: seconds.
        mistakes: outcomes that are mistakes of the product.
    """

    tried: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    at: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    mistakes: tuple[str, ...] = MISTAKES

    def add(self, outcome: str, seconds: float, at: str = "") -> None:
        """Count a case of one fault."""
        self.tried += 1
        self.outcomes[outcome] += 1
        self.slowest = max(self.slowest, seconds)
        if at:
            self.at[at] += 1

    @property
    def failed(self) -> bool:
        return any(self.outcomes[outcome] for outcome in self.mistakes)


Tallies = Mapping[str, Tally]
Part = Callable[[int, int], Tallies]  # (seed, number of faults) -> tallies by name


def table(tallies: Tallies) -> Table:
    shown = Table("cases", "tried", *OUTCOMES, "slowest", "by place")
    for name, tally in tallies.items():
        at = ", ".join(f"{place} {count}" for place, count in tally.at.most_common())
        outcomes = [str(tally.outcomes[outcome]) for outcome in OUTCOMES]
        shown.add_row(name, str(tally.tried), *outcomes, f"{tally.slowest:.1f} s", at)
    return shown


def show(tallies: Tallies) -> int:
    """Print the table; the exit code, 1 if there is a mistake."""
    Console(width=160).print(table(tallies))
    return int(any(tally.failed for tally in tallies.values()))


def main_of(part: Part, doc: str | None, count: int) -> int:
    """The command of one part."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=count, help="of faults (%(default)s)")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return show(part(args.seed, args.count))
