"""The console command `bpgo-video`: a table of subcommands, each imported when it is called."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from bpgo_video.errors import suggestion

COMMANDS = {  # a module of bpgo_video.commands, with "_" for "-": its `main` takes the arguments, returns the exit code
    "demo": "post-train the embedded policy with BPGO in minutes, on any CPU",
    "recipes": "list, show and copy the recipes that ship with the package",
    "prompts": "embed prompts into shards for training; inspect and verify shards",
    "videos": "encode videos with captions into shards for a warm start",
    "plan": "compute the memory of a recipe on each GPU, before you request one",
    "doctor": "check a recipe on its own ranks, in minutes, before a long run",
    "priors": "measure the prior of every prompt: the rewards that the starting policy earns on it",
    "train": "run a recipe: BPGO on rewards, or a warm start on videos",
    "sft": "run a recipe for a warm start on videos",
    "generate": "make videos with a base model, a run, a checkpoint or adapters",
    "evaluate": "score a policy on held-out prompts, compare models, run VBench",
    "convert": "export a checkpoint for diffusers, as LoRA, for ComfyUI, or for any number of ranks",
    "reward-server": "serve a reward to runs on other machines",
}
USAGE = """usage: bpgo-video COMMAND ...

Post-train video diffusion policies with BPGO under DeepSpeed.

{commands}

Start with `bpgo-video demo`. `bpgo-video COMMAND --help` explains a command with examples; `bpgo-video --version`
prints the version."""


def main(words: Sequence[str] | None = None) -> int:
    """Call the subcommand that the first word names; returns its exit code, or 2 if there is no such subcommand."""
    name, *rest = (sys.argv[1:] if words is None else words) or ["--help"]
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print(USAGE.format(commands="\n".join(f"  {name:<{width}}  {line}" for name, line in COMMANDS.items())))
        return 0
    if name == "--version":
        print(f"bpgo-video {version('bpgo-video')}")
        return 0
    if name not in COMMANDS:
        print(f"error: {name}: unknown command{suggestion(name, COMMANDS)}; --help lists all", file=sys.stderr)
        return 2
    module = import_module(f"bpgo_video.commands.{name.replace('-', '_')}")
    return int(module.main(rest))


if __name__ == "__main__":
    sys.exit(main())
