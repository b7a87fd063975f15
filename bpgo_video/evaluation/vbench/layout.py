"""Generation of a suite's videos under VBench's names.

DIR/{prompt}-{i}.mp4        H.264, yuv420p, the true frames a second; nothing else is in the folder
DIR.generation.json         settings, fingerprints of the weights; prompt, generation prompt, seed and sample of each
DIR.sheets/00003.jpg        five frames of each sample of prompt 3

The noise of a video is a function of the seed, the prompt and i: no video is drawn again for being bad.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from bpgo_video.data.media import read_media
from bpgo_video.data.prompt_files import prompt_id
from bpgo_video.data.prompt_records import PromptRecord
from bpgo_video.evaluation.vbench.folder import beside, folder_problems, foreign_problems
from bpgo_video.evaluation.vbench.suite import Suite, SuiteError, image_path, listing
from bpgo_video.generation.files import MANIFEST, TOLD, Places, clear_unfinished
from bpgo_video.generation.generate import ALONE, generate
from bpgo_video.generation.plan import Reader
from bpgo_video.generation.settings import GenerationSettings
from bpgo_video.parallel.agreement import same_verdict
from bpgo_video.parallel.mesh import Mesh


def lay_out(
    settings: GenerationSettings,
    suite: Suite,
    mesh: Mesh = ALONE,
    images: Path | None = None,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Makes every video of the suite that is not there yet; returns the path of the manifest. Every rank calls it.

    Args:
        settings: `output` is the folder of the videos, `prompts` the suite's source, `samples_per_prompt` the suite's.
        images: folder of what image-to-video continues, for suites that don't name image files.
        texts: what the model receives in place of each prompt.

    Raises:
        SuiteError: the folder holds other files; an image or a generation prompt is missing.
        GenerationError and others: see `generate`.
    """
    places = places_of(settings.output)
    with same_verdict(mesh):
        if mesh.is_main and places.videos.is_dir():
            clear_unfinished(places)
            if wrong := foreign_problems(places.videos, suite):
                raise SuiteError(f"{places.videos} holds more than this suite:{listing(wrong)}")
    manifest = generate(settings, mesh, reader_of(suite, images, texts), places)
    with same_verdict(mesh):
        if mesh.is_main and (wrong := folder_problems(places.videos, suite)):
            raise SuiteError(f"{places.videos} is not what VBench reads:{listing(wrong)}")
    return manifest


def places_of(folder: Path) -> Places:
    """The videos in the folder, the rest next to it."""
    manifest, sheets = beside(folder, MANIFEST), beside(folder, "sheets")
    return Places(folder, lambda record, _, sample: f"{record.prompt}-{sample}.mp4", manifest, sheets)


def reader_of(suite: Suite, images: Path | None, texts: Mapping[str, str] | None) -> Reader:
    """Reads the suite's prompts for a generation, with their images if the model continues images."""
    image = cache(lambda path: read_media("image", path))  # VBench-I2V has seven camera motions of one image

    def read(_: GenerationSettings, with_images: bool) -> list[PromptRecord]:
        return [
            PromptRecord(
                prompt_id(prompt.text),
                prompt.text,
                negative_prompt=prompt.negative_prompt,
                media={"image": image(image_path(prompt, images))} if with_images else {},
                info=prompt.info if texts is None else {TOLD: texts[prompt.text]},
            )
            for prompt in suite.prompts
        ]

    return read


def read_texts(path: Path, suite: Suite) -> dict[str, str]:
    """What the model receives in place of each prompt: a .jsonl file, {"prompt", "generation_prompt"} a line.

    Raises:
        SuiteError: a line of another form, a prompt that is not in the suite or comes twice, or one without a line.
    """
    texts: dict[str, str] = {}
    wanted = {prompt.text for prompt in suite.prompts}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            prompt, text = entry["prompt"], entry[TOLD]
        except (ValueError, TypeError, KeyError) as error:
            raise SuiteError(f'{path}:{number} must be {{"prompt": ..., "{TOLD}": ...}}: {error!r}') from error
        if prompt not in wanted or prompt in texts:
            problem = "is there twice" if prompt in texts else f"is not a prompt of {suite.source}"
            raise SuiteError(f"{path}:{number}: {prompt!r} {problem}")
        texts[prompt] = str(text)
    if lacking := sorted(wanted - texts.keys()):
        raise SuiteError(f"{path} has no {TOLD} for:{listing(map(repr, lacking))}")
    return texts
