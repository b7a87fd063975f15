"""Malformed inputs for every command that reads a file: does each end within seconds, with one sentence and code 2?

    python -m tools.torture.inputs --seed 0 --count 300

First come the cases that are written out here, which are known to be wrong, then random changes of right inputs. The
exit code is 0 only if no case ends with a traceback, in silence, without a clear message, or after more than 5 s.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tools.torture.changes import changed
from tools.torture.forks import BAD, Case, run_case
from tools.torture.known import BUILD, READERS, scores, written_out


def make_base(folder: Path) -> None:
    """Write the right inputs, with prompt shards of the embedded policy and stale priors."""
    from bpgo_video.__main__ import main
    from bpgo_video.data.priors import write_priors
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
    anchors = {int(id_): (0.1, 0.1, 4) for id_ in shards.ids(shards.rows())}
    write_priors(folder / "shards", "alignment", "0", 0.1, "x", anchors)


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
    import bpgo_video.rewards.server
    import bpgo_video.training.doctor
    import bpgo_video.training.estimation
    import bpgo_video.training.plan_report
    import bpgo_video.training.rl
    import bpgo_video.training.sft  # noqa: F401


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--known", type=int, metavar="N", help="only every Nth of the cases that are written out")
    parser.add_argument("--only", default="", help="cases with this in their name")
    args = parser.parse_args()
    import_everything()
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        make_base(base)
        chosen = islice(written_out(), 0, None, args.known) if args.known else cases(args.seed, args.count, base)
        outcomes = [run_case(case, base, command) for case in chosen if args.only in case.name]
    for outcome in (one for one in outcomes if one.verdict in BAD):
        print(f"\n{outcome.verdict}, code {outcome.code}, {outcome.seconds:.1f} s: {outcome.case.name}")
        print("    " + outcome.text[-1500:].strip().replace("\n", "\n    "))
    counts = Counter(one.verdict for one in outcomes)
    print(f"\n{len(outcomes)} cases, seed {args.seed}; the slowest took {max(one.seconds for one in outcomes):.1f} s")
    print("\n".join(f"{verdict:10} {counts[verdict]}" for verdict in ("held", "detected", *BAD)))
    return int(any(counts[verdict] for verdict in BAD))


if __name__ == "__main__":
    sys.exit(main())
