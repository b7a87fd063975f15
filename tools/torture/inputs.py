"""Malformed inputs for every command that reads a file: does each end within seconds, with one sentence and code 2?

    python -m tools.torture.inputs --seed 0 --count 300

First come the cases that are written out here, which are known to be wrong, then random changes of right inputs. The
exit code is 0 only if no case ends with a traceback, in silence, without a clear message, or after more than 5 s of
processor time.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from tools.torture.changes import changed
from tools.torture.forks import Case, run_case
from tools.torture.known import BUILD, READERS, scores, written_out
from tools.torture.tally import Tallies, Tally, main_of


def make_base(folder: Path) -> None:
    """Write the right inputs, with prompt shards of the embedded policy and stale priors."""
    from bpgo_video.__main__ import main
    from bpgo_video.data.priors import PriorTable, write_priors
    from bpgo_video.data.reader import PromptShards

    for name, (content, _) in READERS.items():
        if content:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(content, "utf-8")
    (folder / "a").mkdir()
    (folder / "a" / "scores.json").write_text(json.dumps(scores("a")), "utf-8")
    (folder / "videos").mkdir()
    if code := main([*BUILD[:3], str(folder / "shards"), *BUILD[4:], str(folder / "prompts.txt")]):
        raise SystemExit(code)
    shards = PromptShards(folder / "shards")
    anchors = {int(id_): (0.1, 0.1, 4, 0.1) for id_ in shards.ids(shards.rows())}
    table = PriorTable(reward="alignment", version="0", scale=0.1, policy="x", settings={}, anchors=anchors)
    write_priors(folder / "shards", table)


def command(argv: tuple[str, ...]) -> int:
    """The command, or the module that writes a report."""
    from bpgo_video.__main__ import main
    from bpgo_video.training import report

    if argv[0] == "report":
        sys.argv = list(argv)
        report.main()
        return 0
    return main(list(argv))


def mutated(base: Path, rng: random.Random) -> Iterator[Case]:
    """Random changes of right inputs, without end."""
    while True:
        file = rng.choice(list(READERS))
        argv = rng.choice(READERS[file][1])
        content = changed(file, (base / file).read_text("utf-8"), rng)
        codes = (0, 1) if argv[0] == "plan" else (0,)
        name = f"{file}: change {rng.randrange(10**6)} for {' '.join(argv[:2])}"
        yield Case(name, argv, {file: content}, codes=codes)


def cases(seed: int, count: int, base: Path) -> Iterator[Case]:
    """`count` cases: those that are written out, in random order, are at most half of them."""
    rng = random.Random(seed)
    known, more = list(written_out()), mutated(base, rng)
    rng.shuffle(known)
    yield from known[: count // 2]
    for _ in range(count - min(len(known), count // 2)):
        yield next(more)


def import_everything() -> None:
    """Import once what commands import, so that a case takes no time for it."""
    import bpgo_video.commands.evaluate
    import bpgo_video.evaluation.compare
    import bpgo_video.evaluation.heldout
    import bpgo_video.evaluation.vbench_layout
    import bpgo_video.evaluation.vbench_scoring
    import bpgo_video.inference.conversion
    import bpgo_video.inference.generate
    import bpgo_video.planning.report
    import bpgo_video.rewards.server
    import bpgo_video.training.doctor
    import bpgo_video.training.estimation
    import bpgo_video.training.rl
    import bpgo_video.training.sft  # noqa: F401


def judge(chosen: Iterable[Case], base: Path) -> Tallies:
    """Run cases on the right inputs in `base`; prints the mistakes."""
    tally = Tally()
    for case in chosen:
        outcome = run_case(case, base, command)
        tally.add(outcome.verdict, outcome.seconds)
        if outcome.verdict in tally.mistakes:
            print(f"\n{outcome.verdict}, code {outcome.code}, {outcome.seconds:.1f} s: {outcome.case.name}")
            print("    " + outcome.text[-1500:].strip().replace("\n", "\n    "), flush=True)
    return {"malformed input": tally}


def run(seed: int, count: int) -> Tallies:
    """The cases that are written out, then random ones."""
    import_everything()
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        make_base(base)
        return judge(cases(seed, count, base), base)


def run_known(every: int) -> Tallies:
    """Every nth of the cases that are written out."""
    import_everything()
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        make_base(base)
        return judge(islice(written_out(), 0, None, every), base)


if __name__ == "__main__":
    sys.exit(main_of(run, __doc__, 300))
