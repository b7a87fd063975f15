"""The command that builds prompt shards (tools/make_prompt_shards.py); input errors name the file and line."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bpgo_video.commands import prompts as tool
from bpgo_video.data.prompt_formats import PromptFileError
from bpgo_video.data.prompt_plan import make_plan, read_prompts
from bpgo_video.data.reader import PromptShards
from bpgo_video.data.records import EncoderStamp, prompt_id
from bpgo_video.data.stream import PromptStream
from bpgo_video.data.writer import Build
from bpgo_video.tiny import world as world
from tools.tiny import prompts


def encode(texts) -> dict[str, torch.Tensor]:
    """A stub that encodes the first eight letters, one per token."""
    codes = [[ord(c) for c in text[:8]] + [0] * (8 - len(text)) for text in texts]
    return {"prompt_embeds": torch.tensor(codes, dtype=torch.float32)[:, :, None].expand(-1, -1, 3)}


@pytest.fixture
def stub_policy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "policy"
    for part in ("text_encoder", "tokenizer"):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text("{}")

    def load_policy(folder, *, components, max_sequence_length, dtype, device, name):
        assert components == ("text_encoder",)
        return SimpleNamespace(folder=Path(folder), max_sequence_length=max_sequence_length, encode=encode)

    def family(folder, name):
        return SimpleNamespace(texts_see_images=False)

    monkeypatch.setitem(sys.modules, "bpgo_video.policies", SimpleNamespace(load_policy=load_policy, family=family))
    return folder


def test_the_tiny_prompts_are_the_captions_of_the_world() -> None:
    assert prompts.PATH.read_text().splitlines() == prompts.lines()
    lines = list(read_prompts([prompts.PATH]))
    for split in ("train", "heldout"):
        of_split = [line.record for line in lines if line.record.split == split]
        assert [record.prompt for record in of_split] == [c.text for c in world.captions(split)]
        assert [record.tags for record in of_split] == [
            ("clear",) if c.is_clear else ("open",) for c in world.captions(split)
        ]


def test_ids_do_not_depend_on_the_machine() -> None:
    assert prompt_id("a red circle moving left") == 0xD58E202A005FA326 >> 1  # b2sum -l 64
    assert 0 <= prompt_id("") < 2**63


def test_build_then_inspect_verify_and_stats(stub_policy: Path, tmp_path: Path, capsys) -> None:
    output = str(tmp_path / "shards")
    arguments = ["--output", output, "--policy", str(stub_policy), "--max-sequence-length", "8", "--shard-size", "40"]
    assert tool.main(["build", "--input", str(prompts.PATH), *arguments, "--negative-prompt", "blurry"]) == 0
    shards = PromptShards(output)
    assert len(shards) == 96
    assert shards.splits == {"train": 72, "heldout": 24}
    assert shards.negative_prompt == "blurry"
    assert torch.equal(shards.negative["prompt_embeds"], encode(["blurry"])["prompt_embeds"][0])
    batch = next(PromptStream(shards, "train", 0, 6))
    assert torch.equal(batch.conditioning["prompt_embeds"], encode(batch.texts)["prompt_embeds"])
    assert batch.ids.tolist() == [prompt_id(text) for text in batch.texts]

    capsys.readouterr()
    assert tool.main(["inspect", output, "--split", "heldout", "--limit", "2"]) == 0
    assert world.captions("heldout")[1].text in capsys.readouterr().out
    assert tool.main(["stats", output]) == 0
    printed = capsys.readouterr().out
    assert "negative    'blurry'; 0 prompts have one of their own, 0 different ones" in printed
    assert "train 72, heldout 24" in printed
    assert "clear 48, open 48" in printed
    assert tool.main(["verify", output]) == 0

    shard = Path(output, "prompts-000001.tar")
    shard.write_bytes(shard.read_bytes().replace(b"moving", b"MOVING", 1))
    assert tool.main(["verify", output]) == 2
    assert "its JSON is damaged" in capsys.readouterr().err


def test_negative_prompts_are_shown_and_counted(stub_policy: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "p.csv").write_text("prompt,negative_prompt\na,dark\nb,\nc,dark\nd,blurry\n")
    output = str(tmp_path / "shards")
    arguments = ["--output", output, "--policy", str(stub_policy), "--max-sequence-length", "8"]
    assert tool.main(["build", "--input", str(tmp_path / "p.csv"), *arguments, "--negative-prompt", "blurry"]) == 0
    capsys.readouterr()
    assert tool.main(["stats", output]) == 0
    assert "negative    'blurry'; 3 prompts have one of their own, 2 different ones" in capsys.readouterr().out
    assert tool.main(["inspect", output]) == 0
    assert [line.split()[2:] for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["a", "|", "dark"], ["b"], ["c", "|", "dark"], ["d", "|", "blurry"]
    ]  # fmt: skip


PLAIN = [f"prompt {i} of {'abcdefgh'[i % 8]}" for i in range(40)]


@pytest.mark.parametrize(
    ("flags", "splits"),
    [
        ([], {"train": 33, "heldout": 7}),  # by the hashes of these texts
        (["--holdout", "0.3"], {"train": 26, "heldout": 14}),
        (["--holdout", "0.000001"], {"train": 39, "heldout": 1}),
        (["--holdout", "0"], {"train": 40}),
        (["--split", "test"], {"test": 40}),
        (["--split", "test", "--holdout", "0.1"], {"test": 33, "heldout": 7}),
    ],
)
def test_plain_prompts_are_held_out_by_their_texts(
    stub_policy: Path, tmp_path: Path, capsys, flags: list[str], splits: dict[str, int]
) -> None:
    found = []
    for name, lines in (("a", PLAIN), ("b", PLAIN[::-1])):
        (tmp_path / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
        words = [
            "--input",
            str(tmp_path / f"{name}.txt"),
            "--output",
            str(tmp_path / name),
            "--policy",
            str(stub_policy),
        ]
        assert tool.main(["build", *words, "--max-sequence-length", "8", *flags]) == 0
        shards = PromptShards(tmp_path / name)
        assert shards.splits == splits
        printed = capsys.readouterr().out
        assert all(f"{split} {count}" in printed for split, count in splits.items())
        found.append({record.prompt: record.split for record in shards.records()})
    assert found[0] == found[1]


def test_a_changed_build_prints_the_command_that_replaces_the_shards(stub_policy: Path, tmp_path: Path, capsys) -> None:
    path, output = tmp_path / "my prompts.txt", tmp_path / "out"
    path.write_text("".join(f"{line}\n" for line in PLAIN))
    words = ["build", "--input", str(path), "--output", str(output), "--policy", str(stub_policy)]
    assert tool.main([*words, "--max-sequence-length", "8"]) == 0
    before = (output / "index.json").read_bytes()
    path.write_text("".join(f"{line}\n" for line in PLAIN[1:]))
    capsys.readouterr()
    assert tool.main([*words, "--max-sequence-length", "8", "--holdout", "0"]) == 2
    message = capsys.readouterr().err
    assert "(other prompts; count 40, here 39; holdout 0.1, here 0.0)" in message
    assert (output / "index.json").read_bytes() == before
    program, command, *printed = shlex.split(message.split("run: ")[1])
    assert (program, command, printed[-1]) == ("bpgo-video", "prompts", "--overwrite")
    assert tool.main(printed) == 0
    assert PromptShards(output).splits == {"train": 39}


def test_a_share_to_hold_out_contradicts_splits_of_the_input(stub_policy: Path, tmp_path: Path, capsys) -> None:
    words = ["build", "--input", str(prompts.PATH), "--output", str(tmp_path / "out"), "--policy", str(stub_policy)]
    assert tool.main([*words, "--max-sequence-length", "8", "--holdout", "0.2"]) == 2
    assert "the input names splits; leave out --holdout, or ignore them: --split-column ''" in capsys.readouterr().err
    assert tool.main([*words, "--max-sequence-length", "8", "--holdout", "0.2", "--split-column", ""]) == 0
    assert PromptShards(tmp_path / "out").splits.keys() == {"train", "heldout"}
    assert "not read: the columns split;" in capsys.readouterr().out


def help_of(capsys) -> str:
    with pytest.raises(SystemExit):
        tool.main(["build", "--help"])
    return " ".join(capsys.readouterr().out.split()).replace("LTX- Video", "LTX-Video")


def test_help_describes_prompts(capsys) -> None:
    shown = help_of(capsys)
    for words in (
        "for prompts without one of their own (empty)",
        "longer prompts are mistakes",
        "a prompt that cannot be used: end the build, or leave it out and list it in skipped.jsonl (stop)",
        "(512, Wan's own; 128 LTX-Video, 226 CogVideoX, 256 HunyuanVideo and Mochi)",
    ):
        assert words in shown


def test_a_misspelt_flag_is_named_before_a_missing_one(capsys) -> None:
    with pytest.raises(SystemExit):
        tool.main(["build", "--input", "a.txt", "--outptu", "x", "--policy", "p"])
    assert "--outptu: unknown flag; perhaps you meant --output" in capsys.readouterr().err


def test_an_existing_output_is_never_overwritten(stub_policy: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    arguments = ["--input", str(prompts.PATH), "--output", str(tmp_path / "out"), "--policy", str(stub_policy)]
    assert tool.main(["build", *arguments, "--overwrite"]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_records_set_their_split_id_and_tags_or_get_defaults(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"prompt": "one", "id": 7, "split": "heldout", "tags": ["x", "y"]}) + '\n{"prompt": "two"}\n'
    )
    (tmp_path / "b.txt").write_bytes("three \r\nvïer\n".encode())
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.txt"]
    Build(make_plan(inputs, "test"), tmp_path / "out", encode, EncoderStamp("stub", "0", 8), batch_size=3).run()
    found = [(r.id, r.prompt, r.split, r.tags) for r in PromptShards(tmp_path / "out").records()]
    assert found == [
        (7, "one", "heldout", ("x", "y")),
        (prompt_id("two"), "two", "test", ()),
        (prompt_id("three"), "three", "test", ()),
        (prompt_id("vïer"), "vïer", "test", ()),
    ]


def test_a_repeated_prompt_names_both_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "four"}\n{"prompt": "two"}\n')
    with pytest.raises(PromptFileError, match=r"a.txt:2 and .*b.jsonl:2 have the same id"):
        make_plan([tmp_path / "a.txt", tmp_path / "b.jsonl"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"one\n\ntwo\n", r"p.txt:2: the prompt is empty"),
        ("p.txt", b"one\n\xff\xfe\n", r"p.txt:2: the line is not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', r"p.jsonl:2: the line is not JSON: Expecting value"),
        (
            "p.jsonl",
            b'{"label": "a"}\n',
            r"p.jsonl:1: no column is named prompt or text or caption; .* label: ",
        ),
        ("p.jsonl", b'{"prompt": "a", "id": 3.5}\n', r"p.jsonl:1: 'id' is 3.5, which is not of type int"),
        ("p.jsonl", b'{"prompt": "a", "id": 9223372036854775808}\n', r"p.jsonl:1: .*2\^63"),
        ("p.jsonl", b'{"prompt": "a", "id": -1}\n', r"p.jsonl:1: .*from 0"),
        ("p.txt", b"", "no prompts"),
        ("p.yaml", b"a", "'.yaml'"),
    ],
)
def test_an_input_error_is_named_before_the_model_is_loaded(
    tmp_path: Path, capsys, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptFileError, match=message):
        make_plan([tmp_path / name])
    arguments = ["--input", str(tmp_path / name), "--output", str(tmp_path / "out"), "--policy", "nowhere"]
    assert tool.main(["build", *arguments]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()
