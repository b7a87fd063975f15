"""Judges on Qwen-VL: patches, placeholders, probabilities and VideoAlign scores, recomputed independently."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bpgo_video.rewards import Clips
from bpgo_video.rewards.base import FrameSampling, RewardError
from bpgo_video.rewards.networks import Backbones
from bpgo_video.rewards.qwen_vl import PatchLayout
from bpgo_video.rewards.videoalign import VideoAlign, frame_count, read_template
from bpgo_video.rewards.vlm import VlmJudge, up_to_answer
from tests.made.random_qwen import CHAT, KINDS, MEAN, NORMALISATION, STD, random_qwen, random_videoalign, tokenizer

PIXELS = {"min_pixels": 64 * 64, "max_pixels": 100 * 100}
TEXTS = ("a red circle", "circle a")
TEMPLATE = "rate the <|VQ_reward|> red <|MQ_reward|> it show {text_prompt} <|TA_reward|> the"


def some_clips(frames: int = 9, height: int = 60, width: int = 84) -> Clips:
    noise = torch.rand(2 * frames, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    videos = torch.nn.functional.interpolate(noise, (height, width), mode="bilinear").unflatten(0, (2, frames))
    return Clips(videos, 8.0, TEXTS)


@pytest.mark.parametrize(("height", "width", "tolerance"), [(56, 84, 1e-5), (61, 100, 0.02)])
def test_patches_of_a_still_equal_those_of_the_image_processor(height: int, width: int, tolerance: float) -> None:
    """Equal without resizing; otherwise up to PIL's rounding to 8 bits."""
    picture = Image.fromarray(np.random.default_rng(0).integers(90, 120, (4, 6, 3), dtype=np.uint8))
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    size = {"shortest_edge": 56 * 56, "longest_edge": 70 * 70}
    theirs = Qwen2VLImageProcessorPil(size=size, image_mean=MEAN, image_std=STD)(picture, return_tensors="pt")
    layout = PatchLayout(14, 2, 2, tuple(MEAN), tuple(STD), 56 * 56, 70 * 70)
    frame = torch.tensor(np.asarray(picture)).permute(2, 0, 1)[None] / 255
    ours, grid = layout.patches(frame)
    assert [grid] == [tuple(row) for row in theirs.image_grid_thw.tolist()]
    torch.testing.assert_close(ours, theirs.pixel_values, atol=tolerance, rtol=0)


def test_patches_are_ordered_by_time_then_token_then_patch() -> None:
    layout = PatchLayout(2, 2, 2, (0.0,) * 3, (1.0,) * 3, 1, 10**6)
    frames = torch.rand(3, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    actual, grid = layout.patches(frames)
    expected = []
    for first, second in ((0, 1), (2, 2)):
        for top in range(0, 8, 4):
            for left in range(0, 12, 4):
                for y in (top, top + 2):
                    for x in (left, left + 2):
                        pair = frames[[first, second], :, y : y + 2, x : x + 2]
                        expected.append(torch.cat([pair[:, channel].flatten() for channel in range(3)]))
    assert grid == (2, 4, 6)
    torch.testing.assert_close(actual, torch.stack(expected))


def test_two_frames_of_480x832_are_252_tokens() -> None:
    patches, grid = PatchLayout(14, 2, 2, tuple(MEAN), tuple(STD)).patches(torch.zeros(2, 3, 480, 832))
    assert grid == (1, 24, 42)
    assert len(patches) == 4 * 252


def probability_by_generation(folder: Path, judge: VlmJudge, clips: Clips, row: int, indices: list[int]) -> float:
    """From the first token that the library generates for a question written out here."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    patches, grid = judge.qwen.layout.patches(clips.videos[row, indices])
    pads = "<|video_pad|>" * (grid[1] * grid[2] // 4)
    steps = [(indices[i] + indices[i + 1]) / 16 for i in range(0, len(indices), 2)]
    shown = {
        "qwen3_vl": "".join(f"<{step:.1f} seconds><|vision_start|>{pads}<|vision_end|>" for step in steps),
        "qwen2_5_vl": f"<|vision_start|>{pads * len(steps)}<|vision_end|>",
    }[model.config.model_type]
    chat = f"<|im_start|>user\n{shown}does it show {clips.texts[row]}<|im_end|>\n<|im_start|>assistant\n"
    words = tokenizer()
    ids = words(chat, return_tensors="pt").input_ids
    extra = {"second_per_grid_ts": [2 * 4 / 8]} if model.config.model_type == "qwen2_5_vl" else {}
    scores = model.generate(
        input_ids=ids, pixel_values_videos=patches, video_grid_thw=torch.tensor([grid]), max_new_tokens=1,
        do_sample=False, output_scores=True, return_dict_in_generate=True, **extra,
        mm_token_type_ids=2 * (ids == words.convert_tokens_to_ids("<|video_pad|>")).int(),
    ).scores[0][0]  # fmt: skip
    yes, no = (scores.softmax(0)[words.convert_tokens_to_ids(word)] for word in ("Yes", "No"))
    return float(yes / (yes + no))


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_the_score_of_the_judge_is_yes_over_yes_and_no_of_the_first_token(tmp_path: Path, kind: str) -> None:
    folder, clips = random_qwen(tmp_path, kind), some_clips(13)
    judge = VlmJudge(str(folder), question="does it show {prompt}", frames=4, **PIXELS)
    expected = [[probability_by_generation(folder, judge, clips, row, [0, 4, 8, 12])] for row in (0, 1)]
    actual = judge(clips)
    assert actual.times is None
    np.testing.assert_allclose(actual.values.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(actual.std.numpy(), np.sqrt(np.multiply(expected, 1 - np.array(expected))), atol=1e-5)
    assert abs(expected[0][0] - expected[1][0]) > 1e-3


def test_a_rating_is_the_mean_of_its_values_after_the_opening_of_the_answer(tmp_path: Path) -> None:
    folder, clips = random_qwen(tmp_path, "qwen2_5_vl"), some_clips(13)
    ratings, opening = {"rate": 1.0, "a": 2.0, "red": 5.0}, "it show"
    judge = VlmJudge(str(folder), question="does {prompt}", answers=ratings, opening=opening, frames=4, **PIXELS)
    assert judge.range == (1.0, 5.0)
    model, words = AutoModelForImageTextToText.from_pretrained(folder).eval(), tokenizer()
    for row, text in enumerate(TEXTS):
        patches, grid = judge.qwen.layout.patches(clips.videos[row, [0, 4, 8, 12]])
        pads = "<|video_pad|>" * (grid[0] * grid[1] * grid[2] // 4)
        chat = f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>does {text}<|im_end|>\n<|im_start|>assistant\n"
        ids = words(chat + opening, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(
                input_ids=ids, pixel_values_videos=patches, video_grid_thw=torch.tensor([grid]),
                second_per_grid_ts=[1.0], mm_token_type_ids=2 * (ids == words.vocab["<|video_pad|>"]).int(),
            ).logits[0, -1]  # fmt: skip
        p = logits[[words.vocab[word] for word in ratings]].softmax(0).numpy()
        values = np.array(list(ratings.values()))
        scores = judge(clips)
        assert float(scores.values[row, 0]) == pytest.approx(float(p @ values), abs=1e-5)
        assert scores.std is not None
        assert float(scores.std[row, 0]) == pytest.approx(float(np.sqrt(p @ (values - p @ values) ** 2)), abs=1e-5)
    with pytest.raises(ValueError, match="a score needs two different values or more"):
        VlmJudge(str(folder), answers={"Yes": 1.0, "No": 1.0})


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_a_judge_that_reasons_is_read_where_it_answers(tmp_path: Path, kind: str) -> None:
    """The answer that it writes by itself, or else the one that follows its text and the opening."""
    folder, clips = random_qwen(tmp_path, kind), some_clips(13)
    plain = VlmJudge(str(folder), frames=4, **PIXELS)
    written = {
        (row, words): written_by_the_library(folder, plain, clips, row, words.replace("{prompt}", TEXTS[row]))
        for row in (0, 1)
        for words in (
            "does {prompt}",
            "rate the {prompt}",
            "{prompt} it show the",
            "{prompt} rate",
            "show {prompt} does",
        )
    }
    (row, question), text = next(item for item in written.items() if len(item[1].split()) > 1)
    last, word = text.split()[-2:]
    ratings = {word: 3.0, "seconds" if word != "seconds" else "it": 1.0}
    one = clips.select(slice(row, row + 1))
    for opening, expected in (
        (f"{last} ", text[: text.rfind(f"{last} {word}")] + f"{last} "),
        ("no such words ", f"{text}\nno such words "),
    ):
        settings = {"question": question, "answers": ratings, "frames": 4, **PIXELS}
        judge = VlmJudge(str(folder), opening=opening, reasoning=6, **settings)
        told = VlmJudge(str(folder), opening=expected, **settings)
        torch.testing.assert_close(judge(one).values, told(one).values)
        assert judge.version != told.version


def written_by_the_library(folder: Path, judge: VlmJudge, clips: Clips, row: int, question: str) -> str:
    """Six tokens at most, the most probable one of each pass without a cache."""
    model, words = AutoModelForImageTextToText.from_pretrained(folder).eval(), tokenizer()
    (patches, grid), times = judge.qwen.patches(clips.videos[row, [0, 4, 8, 12]]), clips.times[[0, 4, 8, 12]]
    ids = judge.qwen.inputs([(patches, grid)], times, question)["input_ids"]
    start, extra = ids.shape[1], {"second_per_grid_ts": [1.0]} if model.config.model_type == "qwen2_5_vl" else {}
    while ids.shape[1] < start + 6 and (ids.shape[1] == start or int(ids[0, -1]) != words.eos_token_id):
        with torch.no_grad():
            logits = model(
                input_ids=ids, pixel_values_videos=patches, video_grid_thw=torch.tensor([grid]),
                mm_token_type_ids=2 * (ids == words.vocab["<|video_pad|>"]).int(), **extra,
            ).logits  # fmt: skip
        ids = torch.cat([ids, logits[:, -1:].argmax(dim=-1)], dim=1)
    text = words.decode(ids[0, start:], skip_special_tokens=True)
    assert judge.qwen.written([(patches, grid)], times, question, 6) == text
    return text


def test_the_last_answer_of_a_text_is_read() -> None:
    text = "alignment: no mark. alignment: 2, physics: 5; alignment: 4"
    assert up_to_answer(text, "alignment: ", "12345") == text[:-1]
    assert up_to_answer(text, "physics: ", "12345") == text[: text.index("5")]
    assert up_to_answer("I think", "quality: ", "12") == "I think\nquality: "


def test_reasoning_needs_an_opening(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reasoning is 8 without an opening"):
        VlmJudge(str(random_qwen(tmp_path, "qwen2_5_vl")), reasoning=8)


def test_the_judge_refuses_long_answers_and_templates_without_videos(tmp_path: Path) -> None:
    folder = random_qwen(tmp_path, "qwen2_5_vl")
    with pytest.raises(ValueError, match=r"'Yes it' is 2 tokens"):
        VlmJudge(str(folder), answers=("Yes it", "No"))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content[1].text }}")
    with pytest.raises(ValueError, match="chat template must write"):
        VlmJudge(str(folder))


def test_a_template_for_videos_takes_precedence_over_that_of_the_tokenizer(tmp_path: Path) -> None:
    folder, clips = random_qwen(tmp_path, "qwen2_5_vl"), some_clips(4)
    before = VlmJudge(str(folder), **PIXELS)(clips).values
    (folder / "chat_template.jinja").rename(folder / "video.jinja")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    text_only = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": text_only}))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT}))
    torch.testing.assert_close(VlmJudge(str(folder), **PIXELS)(clips).values, before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_judge_raises_its_probability(tmp_path: Path, kind: str) -> None:
    judge, clips = VlmJudge(str(random_qwen(tmp_path, kind)), frames=2, **PIXELS), some_clips(3)
    pixels = clips.videos.clone().requires_grad_()
    before = judge(replace(clips, videos=pixels)).values.sum()
    (gradient,) = torch.autograd.grad(before, pixels)
    better = (clips.videos + 0.01 * gradient / gradient.abs().max()).clamp(0, 1)
    assert judge(replace(clips, videos=better)).values.sum() > before


@pytest.mark.parametrize(
    ("total", "fps", "count"), [(81, 16, 10), (9, 8, 4), (17, 8, 4), (121, 24, 10), (5, 8, 4), (3, 8, 2), (1, 8, 1)]
)
def test_videoalign_reads_two_frames_per_second_and_at_least_four(total: int, fps: float, count: int) -> None:
    assert frame_count(total, fps, 2.0) == count


def videoalign(tmp_path: Path, outputs: int) -> tuple[dict[str, str], object, torch.Tensor]:
    base = random_qwen(tmp_path / "base", "qwen2_vl")
    peft, head = random_videoalign(tmp_path / "reward", base, outputs)
    (tmp_path / "template.txt").write_text(TEMPLATE)
    paths = {"template": str(tmp_path / "template.txt"), "model": str(tmp_path / "reward"), "base": str(base)}
    return paths, peft, head


@pytest.mark.parametrize("outputs", [1, 3])
def test_videoalign_is_the_head_at_its_tokens_normalised(tmp_path: Path, outputs: int) -> None:
    """The unmerged peft model, positions 0, 1, 2, ... in all three axes; the published means and deviations."""
    paths, peft, head = videoalign(tmp_path, outputs)
    clips, rewards = some_clips(9), {part: VideoAlign(score=part, **paths) for part in ("VQ", "MQ", "TA", "overall")}
    words = tokenizer()
    marks = [len(words) + i for i in range(3)]
    words.add_tokens(["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"], special_tokens=True)
    expected, rotated = [], []
    for row, text in enumerate(TEXTS):
        patches, grid = rewards["VQ"].qwen.layout.patches(clips.videos[row, [0, 3, 5, 8]])
        pads = "<|video_pad|>" * (grid[0] * grid[1] * grid[2] // 4)
        question = TEMPLATE.replace("{text_prompt}", text)
        chat = f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
        ids = words(chat, return_tensors="pt").input_ids
        shown = {"input_ids": ids, "pixel_values_videos": patches, "video_grid_thw": torch.tensor([grid])}
        for positions, results in (
            ({}, rotated),
            ({"position_ids": torch.arange(ids.shape[1]).expand(3, 1, -1)}, expected),
        ):
            types = (
                {}
                if positions
                else {"mm_token_type_ids": 2 * (ids == words.convert_tokens_to_ids("<|video_pad|>")).int()}
            )
            with torch.no_grad():
                hidden = peft.base_model.model.model(**shown, **types, **positions).last_hidden_state[0]
            raw = [(hidden[ids[0] == mark] @ head.T)[0][i if outputs == 3 else 0] for i, mark in enumerate(marks)]
            results.append(
                [
                    (float(r) - NORMALISATION[f"{p}_mean"]) / NORMALISATION[f"{p}_std"]
                    for r, p in zip(raw, ("VQ", "MQ", "TA"), strict=True)
                ]
            )
    actual = torch.cat([rewards[part](clips).values for part in ("VQ", "MQ", "TA")], dim=1)
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-4)
    np.testing.assert_allclose(rewards["overall"](clips).values[:, 0].numpy(), np.sum(expected, axis=1), atol=3e-4)
    assert np.abs(np.array(expected) - rotated).max() > 1e-2, "spatial positions would give different scores"


def test_rewards_with_several_scores_run_the_network_once(tmp_path: Path, monkeypatch) -> None:
    paths, _, _ = videoalign(tmp_path, 1)
    calls, forward, backbones = [], Qwen2VLModel.forward, Backbones()
    monkeypatch.setattr(Qwen2VLModel, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    clips = some_clips(4)
    for part in ("VQ", "MQ"):
        VideoAlign(score=part, backbones=backbones, **paths)(clips)
    assert len(calls) == len(clips)


def test_a_further_scoring_sees_other_frames_with_the_same_network(tmp_path: Path) -> None:
    paths, _, _ = videoalign(tmp_path, 1)
    clips, backbones = replace(some_clips(41), fps=8.0), Backbones()
    first, again = (VideoAlign(**paths, backbones=backbones, frames_per_second=rate) for rate in (None, 1.2))
    assert first.qwen.backbone is again.qwen.backbone
    assert first.version != again.version
    seen = [FrameSampling(count=frame_count(41, 8.0, rate)).of(clips) for rate in (2.0, 1.2)]
    assert [len(frames) for frames in seen] == [10, 6]
    one, other = first(clips).values, again(clips).values
    assert not torch.allclose(one, other), "the cached scores of the first one are not reused"


EMBEDDINGS = "base_model.model.model.embed_tokens.weight"
BAD = (("model.embed_tokens.lora_embedding_A.default", "LoRA updates have no linear layer"),)


def test_videoalign_refuses_other_formats(tmp_path: Path) -> None:
    paths, _, _ = videoalign(tmp_path, 1)
    with pytest.raises(ValueError, match="score is 'vq'; known are"):
        VideoAlign(score="vq", **paths)
    prompt = replace(some_clips(4), texts=("a <|VQ_reward|>", "a"))
    with pytest.raises(RewardError, match="2 times; a prompt must not contain it"):
        VideoAlign(**paths)(prompt)
    checkpoint = tmp_path / "reward" / "checkpoint-7" / "model.pth"
    weights = torch.load(checkpoint, weights_only=True)
    for wrong, message in (
        ("visual.merger.ln_q.weight", "does not hold a whole"),
        ("extra", "holds weights that"),
        *BAD,
    ):
        broken = dict(weights) | {f"base_model.model.{wrong}": torch.zeros(1)}
        if "merger" in wrong:
            del broken[f"base_model.model.{wrong}"]
        torch.save(broken, checkpoint)
        with pytest.raises(ValueError, match=message):
            VideoAlign(**paths)
    torch.save(weights | {EMBEDDINGS: weights[EMBEDDINGS][:-1].clone()}, checkpoint)
    with pytest.raises(ValueError, match="they must be its last"):
        VideoAlign(**paths)
    checkpoint.unlink()
    with pytest.raises(FileNotFoundError, match="has no checkpoint"):
        VideoAlign(**paths)


def test_the_authors_template_is_parsed_without_running_it(tmp_path: Path) -> None:
    source = tmp_path / "prompt_template.py"
    source.write_text(f'OTHER = "x"\nDETAILED_PROMPT_WITH_SPECIAL_TOKEN = """\n{TEMPLATE}\n"""\nraise SystemExit\n')
    assert read_template(source) == f"\n{TEMPLATE}\n"
    source.write_text('DETAILED_PROMPT_WITH_SPECIAL_TOKEN = "{text_prompt}"\n')
    with pytest.raises(ValueError, match="must hold"):
        read_template(source)
