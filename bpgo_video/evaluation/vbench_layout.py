"""The command `evaluate layout`: generates a suite's videos under VBench's names, or checks a folder of them.

DIR/{prompt}-{i}.mp4        H.264, yuv420p, the true frame rate; the folder contains nothing else
DIR.generation.json         settings, fingerprints of the weights; prompt, generation prompt, seed and sample of each
DIR.sheets/00003.jpg        five frames of each sample of prompt 3

The noise of a video is a function of the seed, the prompt and i: bad videos are not sampled again.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from bpgo_video.cli import show_loading_once
from bpgo_video.config.command_line import read_settings
from bpgo_video.config.generation import GenerationSettings
from bpgo_video.data.media import read_media
from bpgo_video.data.records import PromptRecord, prompt_id
from bpgo_video.distributed import process_group
from bpgo_video.distributed.mesh import Mesh, all_or_none
from bpgo_video.documents import MAX_JSON, parse_json, read_text
from bpgo_video.evaluation import vbench_files as suites
from bpgo_video.evaluation.vbench_files import Suite, SuiteError, listing, read_suite
from bpgo_video.inference.generate import (
    ALONE,
    GENERATION_PROMPT,
    MANIFEST,
    PATIENCE,
    OutputPaths,
    Reader,
    clear_unfinished,
    generate,
)


class GenerationPrompt(TypedDict):
    """A line of --generation-prompts: the text that the model receives in place of a prompt."""

    prompt: str
    generation_prompt: str


LINE = TypeAdapter(GenerationPrompt)


def run(args: argparse.Namespace) -> None:
    """Runs the command. Settings are read as `bpgo-video generate` reads them, before ranks meet; files are read when
    all ranks can fail together.
    """
    if args.check:
        check(args)
        return
    flags = {"policy": args.policy, "seed": args.seed, "output": args.output, "prompts": args.suite}
    samples = args.samples or suites.SAMPLES
    flags |= {"samples-per-prompt": samples, "fps": args.fps}
    words = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
    settings = read_settings(GenerationSettings, [*words, *args.more], prog="bpgo-video evaluate layout")
    show_loading_once()
    mesh = process_group.start_ranks(PATIENCE) if "RANK" in os.environ else ALONE
    with all_or_none(mesh):
        suite = read_suite(args.suite, samples)
        texts = args.generation_prompts and read_texts(args.generation_prompts, suite)
    manifest = lay_out(replace(settings, prompts=suite.source), suite, mesh, args.images, texts)
    if mesh.is_main:
        print(manifest)
    process_group.stop_ranks()


def check(args: argparse.Namespace) -> None:
    if args.more:
        raise SuiteError(f"--check generates nothing; remove {' '.join(args.more)}")
    suite = read_suite(args.suite, suites.samples_of(args.output, args.samples))
    if problems := suites.video_problems(args.output, suite, fps=args.fps, whole=True):
        raise SuiteError(f"{args.output} has {len(problems)} problems:{listing(problems)}")
    print(f"{args.output}: {len(suite.names())} videos, complete")


def lay_out(
    settings: GenerationSettings,
    suite: Suite,
    mesh: Mesh = ALONE,
    images: Path | None = None,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Generates every missing video of the suite; returns the path of the manifest. Every rank calls it.

    Args:
        settings: `output` is the folder of the videos, `prompts` the suite's source, `samples_per_prompt` the suite's.
        images: folder of the images for image-to-video, if the suite names no files.
        texts: what the model receives in place of each prompt.

    Raises:
        SuiteError: the folder has other files; an image or a generation prompt is missing.
        GenerationError and others: see `generate`.
    """
    places = places_of(settings.output)
    with all_or_none(mesh):
        if mesh.is_main and places.videos.is_dir():
            clear_unfinished(places)
            if problems := suites.foreign_problems(places.videos, suite):
                raise SuiteError(f"{places.videos} has files outside this suite:{listing(problems)}")
    manifest = generate(settings, mesh, reader_of(suite, images, texts), places)
    with all_or_none(mesh):
        if mesh.is_main and (problems := suites.video_problems(places.videos, suite)):
            raise SuiteError(f"VBench cannot measure {places.videos}:{listing(problems)}")
    return manifest


def places_of(folder: Path) -> OutputPaths:
    """The videos in the folder, the other files next to it."""
    manifest, sheets = suites.sibling(folder, MANIFEST), suites.sibling(folder, "sheets")
    return OutputPaths(folder, lambda record, _, sample: f"{record.prompt}-{sample}.mp4", manifest, sheets)


def reader_of(suite: Suite, images: Path | None, texts: Mapping[str, str] | None) -> Reader:
    """A reader of the suite's prompts for `generate`, with their images if the model continues images."""
    image = cache(lambda path: read_media("image", path))  # VBench-I2V has seven camera motions of one image

    def read(_: GenerationSettings, needed: Sequence[str]) -> list[PromptRecord]:
        return [
            PromptRecord(
                prompt_id(prompt.text),
                prompt.text,
                negative_prompt=prompt.negative_prompt,
                media={"image": image(suites.image_path(prompt, images))} if "image" in needed else {},
                info=prompt.info if texts is None else {GENERATION_PROMPT: texts[prompt.text]},
            )
            for prompt in suite.prompts
        ]

    return read


def read_texts(path: Path, suite: Suite) -> dict[str, str]:
    """The model's text for each prompt, from a .jsonl file of GenerationPrompt.

    Raises:
        MalformedFile: a line has another form.
        SuiteError: a prompt is not in the suite, appears twice, or has no line.
    """
    rule = f'a line must be {{"prompt": TEXT, "{GENERATION_PROMPT}": TEXT}}'
    lines = enumerate(read_text(path, MAX_JSON).splitlines(), start=1)
    entries = [parse_json(LINE, line, f"{path}:{number}", rule) for number, line in lines]
    counts, prompts = Counter(entry["prompt"] for entry in entries), {prompt.text for prompt in suite.prompts}
    problems = [f"{prompt!r} appears twice" for prompt, count in counts.items() if count > 1]
    problems += [f"{prompt!r} is not a prompt of {suite.source}" for prompt in sorted(counts.keys() - prompts)]
    problems += [f"{prompt!r} has no line" for prompt in sorted(prompts - counts.keys())]
    if problems:
        raise SuiteError(f"{path} must have one line for each prompt:{listing(problems)}")
    return {entry["prompt"]: entry["generation_prompt"] for entry in entries}
