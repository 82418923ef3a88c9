"""Does `fasteagle draft-vocab` count right, and is every wrong call one line?"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import (
    GOLDEN,
    Refused,
    Run,
)

from fasteagle import demo, load
from fasteagle.commands.draft_vocab import FIFTH, PASSAGE, Tally, passages
from fasteagle.draft.vocabulary import coverage, most_frequent, read_vocabulary
from fasteagle.sample import SamplingParams
from fasteagle.tokenizer import load_tokenizer

PAIR = GOLDEN / "byte_pair"


def test_the_most_frequent_are_kept_and_ties_go_to_the_lower_id() -> None:
    counts = torch.tensor([0, 5, 2, 2, 0, 9, 2, 0])
    assert most_frequent(counts, 2).tolist() == [1, 5]
    assert most_frequent(counts, 3).tolist() == [1, 2, 5]
    assert most_frequent(counts, 7).tolist() == [0, 1, 2, 3, 4, 5, 6]  # 0 and 4 were never seen
    assert most_frequent(counts, 3, always=[7, 7]).tolist() == [1, 5, 7]
    assert most_frequent(counts, 1, always=[7]).tolist() == [7]
    assert coverage(counts, torch.tensor([1, 5])) == 14 / 20
    assert coverage(torch.zeros(4), torch.tensor([1])) == 0.0


def test_every_fifth_is_held_out() -> None:
    tally = Tally(8)
    for index in range(2 * FIFTH):
        tally.add([1, 1, 2] if (index + 1) % FIFTH else [1, 3])
    assert tally.counts.tolist() == [0, 18, 8, 2, 0, 0, 0, 0]
    assert tally.shares[1].tolist() == [0, 2, 0, 2, 0, 0, 0, 0]
    assert tally.held_out(2, always=[]) == 0.5  # 1 and 2 are kept; half of the held out are 1
    assert tally.held_out(1, always=[3]) == 0.5
    few = Tally(8)
    few.add([1])
    assert few.held_out(2, always=[]) is None
    with pytest.raises(ValueError, match="token 8; the model's vocabulary is 8"):
        few.add([1, 8])


def test_passages_are_whole_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    rng = random.Random(0)
    text = "".join("x" * rng.randint(0, 300) + "\n" for _ in range(200)) + "the end"
    (tmp_path / "long.txt").write_text(text)
    pieces = list(passages(str(tmp_path / "long.txt")))
    assert "".join(pieces) == text
    assert len(pieces) > 5
    assert all(
        piece.endswith("\n") and PASSAGE <= len(piece) < PASSAGE + 301 for piece in pieces[:-1]
    )


def test_the_command_counts_a_text(tmp_path: Path, run: Run) -> None:
    tokenizer = load_tokenizer(demo.BASE)
    text = "return self\nreturn self\nreturn None\n"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("return self\n")
    tokens = tokenizer.encode(text, bos=False) + tokenizer.encode("return self\n", bos=False)
    files = (tmp_path / "a.txt", tmp_path / "b.txt")
    out, note = run("draft-vocab", "--size", 3, "--text", *files, "--out", tmp_path / "v.json")
    held = json.loads((tmp_path / "v.json").read_text())
    by_count = sorted(set(tokens), key=lambda token: (-tokens.count(token), token))
    assert held["ids"] == sorted([2, *by_count[:2]])  # 2 is EOS
    kept = sum(tokens.count(token) for token in by_count[:2])
    assert held["coverage"] == pytest.approx(kept / len(tokens), abs=1e-6)
    assert held["counted"] == len(tokens)
    assert held["distinct"] == len(set(tokens))
    assert (held["vocab_size"], held["size"], held["held_out_coverage"]) == (2048, 3, None)
    assert f"counted {len(tokens)} tokens, {len(set(tokens))} distinct of 2048" in out
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["1", "3", "6"]
    assert f"{held['coverage']:.2%}" in out.splitlines()[3]
    assert "wrote" in note
    assert read_vocabulary(tmp_path / "v.json", 2048).tolist() == held["ids"]


def test_the_command_counts_what_the_model_writes(tmp_path: Path, run: Run) -> None:
    lines = ["import os", "class A:", "def f(x):", "for x in", "return", "    if "]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": x}) + "\n" for x in lines))
    flags = ("--max_new_tokens", 12, "--temperature", 0.8, "--seed", 3, "--batch_size", 4)
    files = ("--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "v.json")
    out, _ = run("draft-vocab", "--size", 20, *files, *flags)
    engine, sampling = load(dtype="float32", device="cpu"), SamplingParams(0.8, seed=3)
    answers = [
        result.tokens for result in engine.generate(lines, max_new_tokens=12, sampling=sampling)
    ]
    counts = torch.bincount(
        torch.tensor([token for answer in answers for token in answer]), minlength=2048
    )
    held = json.loads((tmp_path / "v.json").read_text())
    assert held["ids"] == most_frequent(counts, 20, [2]).tolist()
    fifth = torch.bincount(torch.tensor(answers[4]), minlength=2048)
    share = coverage(fifth, most_frequent(counts - fifth, 20, [2]))
    assert held["held_out_coverage"] == pytest.approx(share)
    assert f"{share:.2%}" in out
    assert "6 outputs" in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("generate --draft_vocab missing.json", "missing.json does not exist"),
        ("generate --draft_vocab broken.json", "broken.json is not valid JSON"),
        ("generate --draft_vocab ok.json --tree mc_sim_7b_63 --draft none", "has no tree"),
        ("generate --draft_vocab ok.json --draft none", "--draft none guesses nothing"),
        ("generate --draft_vocab ok.json --checkpoint_path BASE", "--draft_vocab needs a drafter"),
        ("generate --draft_vocab ok.json --tree [[5]]", "guess number 5 of a draft vocab"),
        ("doctor --draft_vocab broken.json", "not valid JSON"),
        ("draft-vocab --size 8", "nothing to count"),
        ("draft-vocab --text a.txt --out o.json", "--size"),
        ("draft-vocab --size 0 --text a.txt --out o.json", "not a whole number above 0"),
        ("draft-vocab --size 2048 --text a.txt --out o.json", "give 1 to 2047"),
        ("draft-vocab --size 8 --text a.txt", "give --out FILE"),
        ("draft-vocab --size 8 --text a.txt --out a.txt", "is a file that is read"),
        ("draft-vocab --size 8 --prompts a.txt --out a.txt", "is a file that is read"),
        ("draft-vocab --size 8 --text a.txt --out no/o.json", "is no folder"),
        ("draft-vocab --size 8 --text no.txt --out o.json", "--text no.txt does not exist"),
        ("draft-vocab --size 8 --text . --out o.json", "--text . is not a regular file"),
        ("draft-vocab --size 8 --text latin.txt --out o.json", "latin.txt is not UTF-8"),
        ("draft-vocab --size 8 --text a.txt latin.txt --out ok.json", "latin.txt is not UTF-8"),
        ("draft-vocab --size 8 --text empty.txt --out o.json", "nothing was counted"),
        ("draft-vocab --size 8 --prompts empty.txt --out o.json", "--prompts empty.txt is empty"),
        ("draft-vocab --size 8 --prompts a.txt --chat_template x --out o", "--chat_template 'x'"),
        ("draft-vocab --size 8 --text a.txt --checkpoint_path HEAD --out o", "is an EAGLE head"),
        ("draft-vocab --size 8 --text a.txt --draft_checkpoint_path BASE", "is no EAGLE head"),
        ("draft-vocab --size 8 --text a.txt --checkpoint_path GOLD --out o", "has no tokenizer"),
    ],
)  # fmt: skip
def test_a_wrong_call_is_one_line_and_writes_nothing(
    refused: Refused, tmp_path: Path, flags: str, words: str
) -> None:
    files = {"a.txt": b"x = 1\n", "latin.txt": b"caf\xe9\n", "empty.txt": b"", "broken.json": b"{"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    old = {"format": "fasteagle draft vocabulary", "vocab_size": 2048, "ids": [2, 3, 5, 7, 300]}
    before = json.dumps(old).encode()
    (tmp_path / "ok.json").write_bytes(before)
    folders = {"BASE": demo.BASE, "HEAD": demo.HEAD, "GOLD": PAIR / "base"}
    refused(*(folders.get(word, word) for word in flags.split()), words=words)
    assert (tmp_path / "ok.json").read_bytes() == before
