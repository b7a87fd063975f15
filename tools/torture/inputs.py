"""Malformed inputs for every command that reads a file: does each end within seconds, with one sentence and code 2?

    python -m tools.torture.inputs --seed 0 --count 300

First come the cases that are written out here, which are known to be wrong, then random changes of right inputs. The
exit code is 0 only if no case ends with a traceback, in silence, without a clear message, or after more than 5 s.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tools.torture.forks import BAD, Case, run_case

WAN = "package:bpgo_video.tiny/weights/wan"
RECIPE = f"""run: {{dir: run, num_steps: 1}}
policy: {{folder: "{WAN}", max_sequence_length: 16}}
video: {{num_frames: 9, height: 64, width: 64, fps: 8}}
data: {{shards: nowhere}}
deepspeed: ds.json
rewards:
  alignment: {{model: clip_score, options: {{model: "package:bpgo_video.tiny/weights/clip"}}}}
prior: {{kind: constant, mean: 0.1, scale: 0.1}}
rollout: {{prompts_per_step: 2, group_size: 4, micro_batch_size: 4}}
optim: {{learning_rate: 1e-4, updates_per_rollout: 2}}
"""
DS = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 1000000}}
PROMPTS = [{"prompt": "a red circle", "id": 1, "tags": ["x"]}, {"prompt": "a blue square", "info": {"depth": [1, 2.5]}}]
VBENCH = [{"prompt_en": "a red circle", "dimension": ["color"]}, {"prompt_en": "a blue square", "dimension": ["scene"]}]
TABLE = "prompt,id,tags\na red circle,1,x|y\na blue square,2,\n"
RECORDS = [{"step": step, "reward": 0.5, "trust_mean": 1.0, "grad_norm": 0.1, "ratio_mean": 1.0, "seconds": 1.0}
           for step in range(6)]  # fmt: skip
RESULTS = {"color": [0.5, [{"video_path": "a red circle-0.mp4", "video_results": 0.5}]]}
MANIFEST = {"complete": True, "settings": {"samples_per_prompt": 1, "fps": 8.0}, "videos": []}
GENERATION = [{"prompt": "a red circle", "generation_prompt": "a red circle, in detail"}]


def scores(label: str) -> dict[str, Any]:
    """The content of a scores.json."""
    lines = [{"id": number, "prompt": f"prompt {number}", "tags": [], "scores": {"oracle": [0.1 * number, 0.5]}}
             for number in range(3)]  # fmt: skip
    return {
        "label": label,
        "source": label,
        "settings": {"deployment": {}, "seed": 0, "samples_per_prompt": 2, "prompts": "x", "measures": {}},
        "measures": {"oracle": {"role": "heldout", "version": "1", "weight": 1.0}},
        "prompts": lines,
        "starts_from": "x",
        "form": 1,
    }


def lines_of(entries: list[Any]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


BUILD = ("prompts", "build", "--output", "out", "--policy", WAN, "--max-sequence-length", "16", "--input")
SUITE = ("evaluate", "layout", "--check", "--output", "videos", "--suite")
# A file, its right content, the commands that read it, and whether they refuse the right content for another reason.
READERS: dict[str, tuple[str, list[tuple[str, ...]]]] = {
    "recipe.yaml": (RECIPE, [("train", "recipe.yaml"), ("plan", "recipe.yaml", "--gpus", "2"), ("priors", "recipe.yaml")]),
    "ds.json": (json.dumps(DS), [("train", "recipe.yaml"), ("plan", "recipe.yaml", "--gpus", "2")]),
    "prompts.jsonl": (lines_of(PROMPTS), [(*BUILD, "prompts.jsonl"), (*SUITE, "prompts.jsonl")]),
    "prompts.csv": (TABLE, [(*BUILD, "prompts.csv")]),
    "prompts.txt": ("a red circle\na blue square\n", [(*BUILD, "prompts.txt"), (*SUITE, "prompts.txt")]),
    "info.json": (json.dumps(VBENCH), [(*BUILD, "info.json"), (*SUITE, "info.json")]),
    "run/metrics.jsonl": (lines_of(RECORDS), [("report", "run")]),
    "run/summary.json": ('{"steps": 6, "world_size": 2}', [("report", "run")]),
    "b/scores.json": (json.dumps(scores("b")), [("evaluate", "compare", "a", "b", "--output", "out")]),
    "results.json": (json.dumps(RESULTS), [("evaluate", "total", "results.json", "--partial")]),
    "videos.generation.json": (json.dumps(MANIFEST), [(*SUITE, "prompts.txt")]),
    "texts.jsonl": (
        lines_of(GENERATION),
        [("evaluate", "layout", "--suite", "prompts.txt", "--generation-prompts", "texts.jsonl", "--policy", WAN,
          "--seed", "0", "--output", "videos")],
    ),
    "shards/index.json": ("", [("prompts", "verify", "shards"), ("prompts", "stats", "shards")]),
    "shards/priors/alignment.json": ("", [("train", "recipe.yaml", "--data.shards", "shards", "--prior.kind", "reference")]),
}  # fmt: skip


def make_base(folder: Path) -> None:
    """Write the right inputs, with prompt shards of the embedded policy and stale priors."""
    from bpgo_video.__main__ import main
    from bpgo_video.data.priors import write_priors
    from bpgo_video.data.reader import PromptShards

    for name, (content, _) in READERS.items():
        if content:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(content)
    (folder / "a").mkdir()
    (folder / "a" / "scores.json").write_text(json.dumps(scores("a")))
    (folder / "videos").mkdir()
    if code := main([*BUILD[:3], str(folder / "shards"), *BUILD[4:], str(folder / "prompts.txt")]):
        raise SystemExit(code)
    shards = PromptShards(folder / "shards")
    write_priors(folder / "shards", "alignment", "0", 0.1, "x", {int(id_): (0.1, 0.1, 4) for id_ in shards.ids(shards.rows())})


def command(argv: tuple[str, ...]) -> int:
    """The command, or the module that writes a report."""
    from bpgo_video.__main__ import main
    from bpgo_video.training import report

    if argv[0] == "report":
        sys.argv = list(argv)
        report.main()
        return 0
    return main(list(argv))


def bomb() -> str:
    """A YAML file of ten lines that stands for a billion values."""
    names = "abcdefghi"
    rest = (f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in zip(names, names[1:], strict=False))
    return "\n".join(["a: &a [x]", *rest, ""])


TEXTS: dict[str, bytes] = {  # wrong as any file that people write
    "empty": b"",
    "utf-16": "run: {dir: x}".encode("utf-16"),
    "latin-1": b"run: {dir: caf\xe9}\n",
    "zero bytes": b"run: {dir: x}\0\0\n",
    "gzip": gzip.compress(b"run: {dir: x}", mtime=0),
    "zip": b"PK\x03\x04" + bytes(range(256)),
    "nested": b"[" * 100_000,
    "nested and closed": b"[" * 500 + b"]" * 500,
    "open brackets of mappings": b'{"a":' * 5000,
    "5000 digits": b'{"prompt": ' + b"9" * 5000 + b"}",
    "a number alone": b"17",
    "list": b"[1, 2]",
    "large line": b'{"prompt": "' + b"x" * 10_000_000 + b'"}',
    "a key twice": b'{"prompt": "a", "prompt": "b"}',
    "half a character": b'{"prompt": "\\ud800"}',
    "not a number": b'{"prompt": NaN}',
}
RIGHT_TEXTS = {("prompts.txt", name) for name in ("5000 digits", "a number alone", "list", "a key twice", "half a character",
               "not a number", "nested and closed")}  # fmt: skip
FLAGS = {  # of `train recipe.yaml`
    "--run.dir": ["recipe.yaml", "recipe.yaml/run", "x" * 300, "a/" + "x" * 300, "a\0b", "dangling/run"],
    "--rollout.group-size": ["1000000000", "1e9", "-1", "9" * 5000, "true", "4.0", "1048576"],
    "--rollout.prompts-per-step": ["1000000000", "9223372036854775808"],
    "--rollout.micro-batch-size": ["100000000"],
    "--sampler.num-steps": ["1000000000"],
    "--video.num-frames": ["1000000001", "1048576"],
    "--video.height": ["1000000000"],
    "--policy.lora.rank": ["1000000000", "-1"],
    "--policy.max-sequence-length": ["1000000000"],
    "--run.num-steps": ["1000000000000", "0", "x"],
    "--run.seed": ["-1", "9" * 30],
    "--optim.learning-rate": ["inf", "nan", "-1", "x", "1e999"],
    "--optim.betas": ["0.9", "0.9 2"],
    "--loss.clip-range": ["nan nan"],
    "--data.shards": ["p/prompts-{0..999999999}.tar", "p/prompts-{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}.tar",
                      "p/prompts-" + "{a,b{c,d}}" * 40 + ".tar", "p/prompts-{0..1.tar", "recipe.yaml", "x" * 300],
    "--deepspeed": ["recipe.yaml", "x" * 300, "shards"],
    "--policy.folder": ["recipe.yaml", "x" * 300, "shards"],
    "--ranks": ["1000000000", "0", "x"],
    "--parallel.sequence": ["1000000000"],
}  # fmt: skip
RECIPES: dict[str, tuple[str, str]] = {  # a name: what is replaced in RECIPE, and by what
    "infinite": ("1e-4", ".inf"),
    "not a number": ("1e-4", ".nan"),
    "true as a number": ("num_steps: 1", "num_steps: true"),
    "text as a number": ("num_steps: 1", 'num_steps: "1"'),
    "a fraction": ("num_steps: 1", "num_steps: 1.5"),
    "thousands of digits": ("num_steps: 1", "num_steps: 1" + "0" * 5000),
    "a billion samples": ("group_size: 4", "group_size: 1000000000"),
    "a section twice": ("video:", "run: {dir: b}\nvideo:"),
    "a key twice": ("num_steps: 1", "num_steps: 1, num_steps: 2"),
    "a list as a section": ("{prompts_per_step: 2, group_size: 4, micro_batch_size: 4}", "[1, 2]"),
    "a section without keys": ("{prompts_per_step: 2, group_size: 4, micro_batch_size: 4}", "null"),
    "a date": ("num_steps: 1", "num_steps: 2024-13-45"),
    "a number as a key": ("video:", "17: 3\nvideo:"),
    "a number as an inner key": ("num_steps: 1", "17: 1"),
    "a list as a key": ("num_steps: 1", "? [1]\n: 1"),
    "a list as the kind": ("video:", "recipe: [bpgo]\nvideo:"),
    "its own base": ("video:", "base: recipe.yaml\nvideo:"),
    "a list as a base": ("video:", "base: [x]\nvideo:"),
    "a tag of Python": ("num_steps: 1", "num_steps: !!python/object/apply:os.getcwd []"),
    "an empty tag": ("num_steps: 1", "num_steps: !!int ''"),
    "a wrong bool": ("num_steps: 1", "num_steps: !!bool maybe"),
    "a bomb": ("video:", bomb() + "video:"),
    "a bomb in options": ("rewards:", "rewards:\n  x: {model: clip_score, options: &a {a: *a}}"),
    "a tab": ("video:", "\tvideo:"),
    "a closing brace too many": ("video:", "}\nvideo:"),
}
DS_JSONS: dict[str, Any] = {
    "a list": [DS],
    "a text": "zero3",
    "nothing": None,
    "no stage": {"zero_optimization": {}},
    "stage 7": {"zero_optimization": {"stage": 7}},
    "stage as text": {"zero_optimization": {"stage": "3"}},
    "stage true": {"zero_optimization": {"stage": True}},
    "stage as a list": {"zero_optimization": {"stage": [3]}},
    "zero as a list": {"zero_optimization": [3]},
    "zero as nothing": {"zero_optimization": None},
    "zero as a number": {"zero_optimization": 3},
    "bf16 as true": {**DS, "bf16": True},
    "bf16 as text": {**DS, "bf16": {"enabled": "yes"}},
    "fp16 as a list": {**DS, "fp16": [1]},
    "offload as text": {"zero_optimization": {"stage": 3, "offload_optimizer": "cpu"}},
    "offload to nowhere": {"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}},
    "buckets as a list": {"zero_optimization": {"stage": 3, "reduce_bucket_size": [1]}},
    "buckets below 0": {"zero_optimization": {"stage": 3, "reduce_bucket_size": -5}},
    "an unknown key of zero": {"zero_optimization": {"stage": 3, "reduce_buckets": 5}},
    "a batch size": {**DS, "train_batch_size": 8},
    "a list as aio": {**DS, "aio": [1]},
    "text as the log of communication": {**DS, "comms_logger": "yes"},
}
OTHER_FLAGS = [  # wrong by themselves
    ("plan", "recipe.yaml", "--gpus", "x"),
    ("plan", "recipe.yaml", "--gpus", "9" * 5000),
    ("plan", "recipe.yaml", "--gpus", "2", "--size", "1x2"),
    ("plan", "recipe.yaml", "--gpus", "2", "--size", f"{'9' * 30}x480x81"),
    ("plan", "--model", "x" * 300, "--gpus", "2"),
    ("plan", "--model", "recipe.yaml", "--gpus", "2"),
    ("train", "x" * 300),
    ("train", "shards"),
    ("train", "dangling.yaml"),
    ("train", "recipe.yaml", "--ranks", "2", "--deepspeed", "shards"),
    ("recipes", "show", "x" * 300),
    ("prompts", "inspect", "recipe.yaml"),
    ("prompts", "inspect", "x" * 300),
    ("prompts", "inspect", "shards", "--limit", "x"),
    ("prompts", "stats", "a"),
    ("prompts", "verify", "shards/prompts-{000000..999999999}.tar"),
    ("prompts", "build", "--input", "prompts.txt", "--output", "recipe.yaml", "--policy", WAN),
    ("prompts", "build", "--input", "prompts.txt", "--output", "x" * 300, "--policy", WAN),
    ("prompts", "build", "--input", "prompts.txt", "--output", "out", "--policy", "recipe.yaml"),
    ("prompts", "build", "--input", "prompts.txt", "--output", "out", "--policy", WAN, "--holdout", "nan"),
    ("prompts", "build", "--input", "x" * 300, "--output", "out", "--policy", WAN),
    ("prompts", "build", "--input", "videos", "--output", "out", "--policy", WAN),
    ("generate", "--policy", WAN, "--prompts", "x" * 300, "--output", "out", "--seed", "0"),
    ("generate", "--policy", WAN, "--prompts", "prompts.txt", "--output", "recipe.yaml", "--seed", "0"),
    ("generate", "--policy", WAN, "--prompts", "prompts.txt", "--output", "out", "--seed", "9" * 30),
    ("generate", "--policy", WAN, "--prompts", "prompts.txt", "--output", "out", "--seed", "0", "--height", "1000000000"),
    ("generate", "--policy", WAN, "--prompts", "prompts.txt", "--output", "out", "--seed", "0", "--fps", "nan"),
    ("generate", "--policy", "recipe.yaml", "--prompts", "prompts.txt", "--output", "out", "--seed", "0"),
    ("generate", "--policy", "run", "--prompts", "prompts.txt", "--output", "out", "--seed", "0"),
    ("evaluate", "compare", "a", "--output", "out"),
    ("evaluate", "compare", "a", "x" * 300, "--output", "out"),
    ("evaluate", "compare", "a", "b", "--output", "recipe.yaml"),
    ("evaluate", "total", "x" * 300),
    ("evaluate", "total", "videos"),
    ("evaluate", "layout", "--check", "--suite", "prompts.txt", "--output", "recipe.yaml"),
    ("evaluate", "layout", "--check", "--suite", "shards", "--output", "videos"),
    ("evaluate", "layout", "--check", "--suite", "prompts.txt", "--output", "videos", "--samples", "1000000000"),
    ("evaluate", "heldout", "--config", "x" * 300),
    ("evaluate", "score", "--videos", "recipe.yaml", "--dimensions", "color", "--output", "s.json"),
    ("convert", "--checkpoint", "recipe.yaml", "--output", "out", "--format", "lora"),
    ("convert", "--checkpoint", "x" * 300, "--output", "out", "--format", "lora"),
    ("convert", "--checkpoint", "run", "--output", "out", "--format", "lora", "--shard-gigabytes", "nan"),
    ("reward-server", "--config", "recipe.yaml", "--reward", "alignment", "--port", "99999999"),
    ("reward-server", "--config", "shards", "--reward", "alignment", "--port", "0"),
]  # fmt: skip


def written_out() -> Iterator[Case]:
    """The cases whose input is known to be wrong."""
    wrong = partial(Case, must_fail=True)
    for name, (old, new) in RECIPES.items():
        yield wrong(f"recipe: {name}", ("train", "recipe.yaml"), {"recipe.yaml": RECIPE.replace(old, new).encode()})
    for name, content in DS_JSONS.items():
        yield wrong(f"ds.json: {name}", ("train", "recipe.yaml"), {"ds.json": json.dumps(content).encode()})
    for flag, values in FLAGS.items():
        for value in values:
            argv = ("train", "recipe.yaml", flag, *value.split(" "))
            yield wrong(f"{flag} {value:.40}", argv, {"dangling": lambda path: path.symlink_to("nowhere")})
    for argv in OTHER_FLAGS:
        files = {"dangling.yaml": lambda path: path.symlink_to("nowhere")}
        yield wrong(" ".join(word[:40] for word in argv), argv, files)
    for file, (_, commands) in READERS.items():
        for name, content in TEXTS.items():
            is_right = (file, name) in RIGHT_TEXTS
            yield Case(f"{file}: {name}", commands[0], {file: content}, not is_right)
        yield wrong(f"{file}: a folder", commands[0], {file: Path.mkdir})
        yield wrong(f"{file}: a pipe", commands[0], {file: os.mkfifo})
    yield wrong("prompts.csv: a column twice", (*BUILD, "prompts.csv"), {"prompts.csv": b"prompt,prompt\na,b\n"})
    yield wrong("prompts.csv: a quote without end", (*BUILD, "prompts.csv"), {"prompts.csv": b'prompt\n"' + b"a\n" * 10**6})


WEIRD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 10**400, 1e308, float("inf"), float("nan"), 0.5, -0.0),
    *("", "x", "1", "1e-4", "a" * 10_000, "\ud800", "a\x00b", "ü", "a\nb"),
    *([], {}, [[]], {"": 0}, [None] * 3, {"a": {"b": [1, {"c": None}]}}),
]


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def change_tree(tree: Any, rng: random.Random) -> Any:
    """Plain data with one value dropped, replaced, renamed, repeated, or nested deeply."""
    places = [(above, key) for above in parts(tree) for key in (above if isinstance(above, dict) else range(len(above)))]
    if not places or rng.random() < 0.03:
        return rng.choice(WEIRD)
    above, key = rng.choice(places)
    kind = rng.choice(["drop", "retype", "retype", "retype", "rename", "deep", "move", "repeat"])
    if kind == "drop":
        del above[key]
    elif kind == "rename" and isinstance(above, dict):
        above[f"{key}{rng.choice(['x', ' ', '.', '😀'])}"] = above.pop(key)
    elif kind == "deep":
        above[key] = nested(rng.choice([50, 300, 900]))
    elif kind == "move":
        above[key] = json.loads(json.dumps(rng.choice(list(parts(tree)))))
    elif kind == "repeat" and isinstance(above, list):
        above.extend(above[key : key + 1] * rng.choice([1, 3]))
    else:
        above[key] = rng.choice(WEIRD)
    return tree


def parts(tree: Any) -> Iterator[Any]:
    """Every list and object of plain data."""
    if isinstance(tree, (dict, list)):
        yield tree
        for child in tree.values() if isinstance(tree, dict) else tree:
            yield from parts(child)


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    changes: list[Callable[[], bytes]] = [
        lambda: data[:place],
        lambda: data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :],
        lambda: data[:place] + rng.choice([b"\0", b"\xff", b"\xef\xbb\xbf", b"\r", b'"', b"{", b"\x1b[2J"]) + data[place:],
        lambda: data[:place] + data[max(0, place - 40) :],
        lambda: data.replace(b"\n", b"\r\n"),
        lambda: b"\xef\xbb\xbf" + data,
        lambda: data.decode("utf-8", "replace").encode(rng.choice(["utf-16", "utf-32", "cp1252"]), "replace"),
        lambda: gzip.compress(data, mtime=0),
        lambda: data * rng.choice([2, 50]),
        lambda: bytes(rng.randrange(256) for _ in range(rng.choice([1, 100, 5000]))),
    ]
    return rng.choice(changes)()


def dumped(file: str, content: str, rng: random.Random) -> bytes:
    """A changed file: a value of its data, or some of its bytes."""
    import yaml

    suffix = Path(file).suffix
    if suffix not in (".yaml", ".json", ".jsonl") or rng.random() < 0.4:
        return change_bytes(content.encode(), rng)
    if suffix == ".yaml":
        return yaml.safe_dump(change_tree(yaml.safe_load(content), rng), sort_keys=False).encode("utf-8", "surrogatepass")
    if suffix == ".json":
        return json.dumps(change_tree(json.loads(content), rng)).encode()
    return lines_of(change_tree([json.loads(line) for line in content.splitlines()], rng)).encode()


def mutated(base: Path, rng: random.Random) -> Iterator[Case]:
    """Random changes of right inputs, without end."""
    while True:
        file = rng.choice(list(READERS))
        argv = rng.choice(READERS[file][1])
        content = dumped(file, (base / file).read_text(), rng)
        codes = (0, 1) if argv[0] == "plan" else (0,)
        yield Case(f"{file}: change {rng.randrange(10**6)} for {' '.join(argv[:2])}", argv, {file: content}, codes=codes)


def cases(seed: int, count: int, base: Path) -> Iterator[Case]:
    """`count` cases: those that are written out, in random order, are at most half of them."""
    rng = random.Random(seed)
    known, changed = list(written_out()), mutated(base, rng)
    rng.shuffle(known)
    yield from known[: count // 2]
    for _ in range(count - min(len(known), count // 2)):
        yield next(changed)


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
    parser.add_argument("--known", action="store_true", help="only the cases that are written out, all of them")
    parser.add_argument("--only", default="", help="cases with this in their name")
    args = parser.parse_args()
    import_everything()
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        make_base(base)
        chosen = written_out() if args.known else cases(args.seed, args.count, base)
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
