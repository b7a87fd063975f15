"""Files that commands read, and inputs that are known to be wrong."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from tools.torture.forks import Case

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
# A file, its right content, and the commands that read it; the stale prior and the missing shards stop a training.
READERS: dict[str, tuple[str, list[tuple[str, ...]]]] = {
    "recipe.yaml": (
        RECIPE,
        [("train", "recipe.yaml"), ("plan", "recipe.yaml", "--gpus", "2"), ("priors", "recipe.yaml")],
    ),
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
    "shards/index.json": (
        "",
        [("prompts", "verify", "shards"), ("prompts", "stats", "shards"),
         ("prompts", "build", "--output", "shards", *BUILD[4:], "prompts.txt")],
    ),
    "shards/priors/alignment.json": (
        "",
        [("train", "recipe.yaml", "--data.shards", "shards", "--prior.kind", "reference")],
    ),
}  # fmt: skip


def bomb() -> str:
    """A YAML file of ten lines that stands for a billion values."""
    names = "abcdefghi"
    rest = (f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in pairwise(names))
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
PLAIN = (
    "5000 digits",
    "a number alone",
    "list",
    "a key twice",
    "half a character",
    "not a number",
    "nested and closed",
)
RIGHT_TEXTS = {("prompts.txt", name) for name in PLAIN}
RIGHT_TEXTS |= {("run/metrics.jsonl", name) for name in TEXTS if b"\n" not in TEXTS[name]}  # cut off by a kill
RIGHT_TEXTS |= {("run/metrics.jsonl", name) for name in ("utf-16", "gzip")}  # as random as they are, no whole line
RIGHT_TEXTS |= {("run/summary.json", name) for name in ("large line", "not a number")}  # of an entry that is not read
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
    ("generate", "--policy", WAN, "--prompts", "prompts.txt", "--output", "out", "--seed", "0", "--height", "1" * 10),
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
    yield wrong(
        "prompts.csv: a quote without end", (*BUILD, "prompts.csv"), {"prompts.csv": b'prompt\n"' + b"a\n" * 10**6}
    )
