"""Do text and tokens agree however they are split, and does a wrong file say what is wrong?"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from fasteagle.tokenizer import StopStrings, Tokenizer, load_tokenizer

DEMO = Path(__file__).parents[1] / "fasteagle" / "demo" / "base"
KINDS = ["demo", "byte_level", "prefixed", "llama_json"]
EMOJI = "👩\u200d👩\u200d👧"  # three characters that print as one
WORDS = ["the cat", "sat on", "a mat", "hello", "world, good", "naïve café", "x = f(y)\n"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.lists(
    st.sampled_from([*WORDS, " ", "  ", "\n", "é", "🦅", "👩‍👩‍👧", "日本", "</s>", "<s>"]),
    max_size=8,
).map("".join)
LAW = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def corpus() -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choice(WORDS) for _ in range(8)) for _ in range(300)]


def write_sentencepiece(folder: Path) -> sentencepiece.SentencePieceProcessor:
    """A tokenizer.model like LLaMA's: BPE, byte fallback, a space put before the text."""
    folder.mkdir()
    (folder / "corpus.txt").write_text("\n".join(corpus()), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=310,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def write_json(folder: Path, tokenizer: tokenizers.Tokenizer, **config: Any) -> None:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def llama_json(model: sentencepiece.SentencePieceProcessor) -> tokenizers.Tokenizer:
    """The tokenizer.json that the Llama converter makes of a tokenizer.model."""
    pieces = [model.id_to_piece(n) for n in range(model.vocab_size())]
    ids = {piece: n for n, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(pieces[259:], key=lambda piece: -model.get_score(ids[piece]))
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    fast = tokenizers.Tokenizer(
        models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast.add_special_tokens(["<unk>", "<s>", "</s>"])
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return fast


def byte_level_json() -> tokenizers.Tokenizer:
    """A tokenizer.json like Llama 3's: byte-level BPE, BOS from the post-processor."""
    fast = tokenizers.Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|bos|>", "<|eot|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(corpus(), trainer)
    fast.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    fast.add_tokens(["<tool>"])
    return fast


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    model = write_sentencepiece(root / "prefixed")
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    write_json(root / "llama_json", llama_json(model), **names)
    eos = {"__type": "AddedToken", "content": "<|eot|>", "special": True}
    write_json(root / "byte_level", byte_level_json(), bos_token="<|bos|>", eos_token=eos)
    return {"demo": DEMO, **{kind: root / kind for kind in KINDS[1:]}}


@pytest.fixture(scope="session")
def all_tokenizers(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {kind: load_tokenizer(folder) for kind, folder in folders.items()}


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, all_tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return all_tokenizers[request.param]


def stream(tokenizer: Tokenizer, ids: list[int], cuts: list[int]) -> list[str]:
    """Push the ids cut into chunks of the sizes given, over and over."""
    decoder, pieces = tokenizer.decoder(), []
    for size in cuts * len(ids):
        pieces.append(decoder.push(ids[:size]))
        ids = ids[size:]
    return [*pieces, decoder.push(ids), decoder.flush()]


CUTS = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@LAW
@given(text=TEXT)
def test_text_survives_encoding(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_id
    assert ids[1:] == tokenizer.encode(text, bos=False)
    wanted = text if tokenizer.token_id("<|bos|>") is not None else text.replace("▁", " ")
    assert tokenizer.decode(ids) == wanted
    assert max(ids) < tokenizer.vocab_size


@LAW
@given(numbers=st.lists(st.integers(0, 330), max_size=30), cuts=CUTS)
def test_any_split_streams_the_same_text(
    tokenizer: Tokenizer, numbers: list[int], cuts: list[int]
) -> None:
    assert "".join(stream(tokenizer, numbers, cuts)) == tokenizer.decode(numbers)


@LAW
@given(text=TEXT, cuts=CUTS)
def test_valid_text_never_streams_a_replacement(
    tokenizer: Tokenizer, text: str, cuts: list[int]
) -> None:
    text = text.replace("\ufffd", "")
    assert not any("\ufffd" in piece for piece in stream(tokenizer, tokenizer.encode(text), cuts))


@LAW
@given(text=TEXT, at=st.integers(0, 40))
def test_continuation_joins_its_prompt(tokenizer: Tokenizer, text: str, at: int) -> None:
    ids = tokenizer.encode(text)
    whole = tokenizer.decoder()
    head = whole.push(ids[:at])
    rest = tokenizer.decoder(ids[:at])
    assert head + rest.push(ids[at:]) + rest.flush() == tokenizer.decode(ids)


def test_continuation_keeps_its_leading_space(all_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = all_tokenizers["prefixed"]
    the = tokenizer.encode("the", bos=False)
    assert tokenizer.decode(the) == "the"
    assert tokenizer.decoder(tokenizer.encode("hello")).push(the) == " the"
    assert tokenizer.decoder([tokenizer.bos_id or 0]).push(the) == "the"


def test_half_a_character_waits(all_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = all_tokenizers["demo"]
    ids = [tokenizer.token_id(f"<0x{byte:02X}>") or 0 for byte in "🦅".encode()]
    decoder = tokenizer.decoder()
    assert [decoder.push([token]) for token in ids] == ["", "", "", "🦅"]
    # A lead byte is invalid once a letter follows; the last one only when the text ends.
    assert decoder.push([ids[0]]) == ""
    assert decoder.push(tokenizer.encode("a", bos=False)) == "\ufffda"
    assert decoder.push(ids[:2]) == ""
    assert decoder.flush() == "\ufffd"


def test_special_tokens_are_text_unless_asked_for(tokenizer: Tokenizer) -> None:
    eos = tokenizer.special_tokens["eos_token"]
    assert tokenizer.eos_id is not None
    assert tokenizer.decode(tokenizer.encode(f"a{eos}b")) == f"a{eos}b"
    assert tokenizer.eos_id not in tokenizer.encode(f"a{eos}b")
    ids = tokenizer.encode(f"a{eos}", special=True)
    assert ids[-1] == tokenizer.eos_id
    assert tokenizer.eos_id in tokenizer.special_ids
    assert tokenizer.decode(ids) == "a"


def test_ids_past_the_vocabulary_are_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.vocab_size, tokenizer.vocab_size + 99]) == ""


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="not valid Unicode"):
        tokenizer.encode("a\ud800")


# Settings files


@pytest.fixture
def configured(tmp_path: Path, folders: dict[str, Path]) -> Callable[..., Tokenizer]:
    """The tokenizer of `kind` with the tokenizer_config.json given."""

    def build(kind: str, **config: Any) -> Tokenizer:
        folder = folders[kind]
        for name in ("tokenizer.model", "tokenizer.json"):
            if (folder / name).is_file():
                (tmp_path / name).write_bytes((folder / name).read_bytes())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return load_tokenizer(tmp_path)

    return build


@pytest.mark.parametrize("kind", ["demo", "byte_level"])
def test_add_bos_token_decides(configured: Callable[..., Tokenizer], kind: str) -> None:
    silent = configured(kind, add_bos_token=False)
    assert silent.encode("a") == silent.encode("a", bos=False)
    assert configured(kind, add_bos_token=True).encode("a")[0] == silent.bos_id


@pytest.mark.parametrize(("kind", "opens"), [("LlamaTokenizer", True), ("GPT2Tokenizer", False)])
def test_llama_classes_add_bos_unasked(
    tmp_path: Path, folders: dict[str, Path], kind: str, opens: bool
) -> None:
    content = json.loads((folders["llama_json"] / "tokenizer.json").read_text())
    content["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    config = {"tokenizer_class": kind, "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert (load_tokenizer(tmp_path).encode("the")[0] == 1) == opens


@pytest.mark.parametrize("kind", ["prefixed", "llama_json"])
def test_added_tokens_have_their_ids(configured: Callable[..., Tokenizer], kind: str) -> None:
    added = {
        "310": {"content": "<pad>", "special": True},
        "311": {"content": "<tool>", "special": False, "rstrip": True, "normalized": False},
    }
    tokenizer = configured(kind, added_tokens_decoder=added)
    assert tokenizer.vocab_size == 312
    the = tokenizer.encode("the", bos=False)
    assert tokenizer.encode("<pad><tool>  the", bos=False, special=True) == [310, 311, *the]
    assert tokenizer.encode("<tool>the", bos=False) == [311, *the]
    assert tokenizer.decode([310, 311]) == "<tool>"


def test_leading_space_after_special_tokens_is_legacy(
    configured: Callable[..., Tokenizer],
) -> None:
    old = configured("prefixed").encode("</s>the", special=True)
    new = configured("prefixed", legacy=False).encode("</s>the", special=True)
    pieces = configured("prefixed")
    assert pieces.decoder([5]).push(old) == " the"
    assert pieces.decoder([5]).push(new) == "the"


@LAW
@given(text=TEXT)
def test_both_file_formats_encode_alike(all_tokenizers: dict[str, Tokenizer], text: str) -> None:
    model, fast = all_tokenizers["prefixed"], all_tokenizers["llama_json"]
    for special in (False, True):
        assert model.encode(text, special=special) == fast.encode(text, special=special)


@pytest.mark.parametrize("kind", ["byte_level", "llama_json"])
def test_agrees_with_transformers(
    kind: str, folders: dict[str, Path], all_tokenizers: dict[str, Tokenizer]
) -> None:
    transformers = pytest.importorskip("transformers")
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(folders[kind])
    ours = all_tokenizers[kind]
    assert (ours.bos_id, ours.eos_id) == (oracle.bos_token_id, oracle.eos_token_id)
    specials = ["a</s><s>b", "a<|eot|> b"]
    for text in ["", " ", "hello", "  two", "naïve 🦅\n\n", "日本", *specials, *corpus()[:20]]:
        ids = oracle.encode(text, add_special_tokens=False)
        assert ours.encode(text, bos=False, special=True) == ids
        wanted = oracle.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert ours.decode(ids) == wanted
    assert ours.encode("the") == oracle.encode("the")


# Wrong files


def test_missing_tokenizer_names_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json nor tokenizer\.model.*config"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        load_tokenizer(tmp_path / "absent")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content",
    [
        "",
        "\n<!DOCTYPE html><html></html>",
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
        "plain words",
        "[1]",
        "\x00\x01\x02\x03" * 20,
    ],
)
def test_wrong_file_is_refused_in_one_line(tmp_path: Path, name: str, content: str) -> None:
    if name == "tokenizer_config.json":
        (tmp_path / "tokenizer.model").write_bytes((DEMO / "tokenizer.model").read_bytes())
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=name) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"model": None},
        {"model": {"type": "Novel"}},
        {"decoder": None},
        {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}},
    ],
)
def test_unknown_tokenizer_json_is_refused(
    tmp_path: Path, folders: dict[str, Path], change: dict[str, Any]
) -> None:
    content = json.loads((folders["byte_level"] / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(ValueError, match=r"tokenizer\.json") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_files_of_two_checkpoints_are_refused(configured: Callable[..., Tokenizer]) -> None:
    with pytest.raises(ValueError, match="one checkpoint"):
        configured("byte_level", added_tokens_decoder={"7": {"content": "<|bos|>"}})


@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": [1]},
        {"added_tokens_decoder": {"1": {}}},
        {"added_tokens_decoder": {"one": {"content": "<s>"}}},
        {"bos_token": 1},
        {"chat_template": [{"name": "a"}]},
    ],
)
def test_unreadable_settings_are_refused(
    configured: Callable[..., Tokenizer], config: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="the settings beside"):
        configured("demo", **config)


# Stop strings


@LAW
@given(
    text=st.text("ab#", max_size=20),
    stops=st.lists(st.text("ab#", min_size=1, max_size=4), max_size=3),
    cuts=CUTS,
)
def test_stop_strings_cut_the_whole_text_at_the_first(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    cutter, out, rest = StopStrings(stops), "", text
    for size in cuts * 20:
        piece, stopped = cutter.push(rest[:size])
        rest = rest[size:]
        out += piece
        assert text.startswith(out)
        assert stopped == cutter.stopped
    assert out + cutter.flush() == text[: min(found, default=len(text))]
    assert cutter.stopped == bool(found)


def test_stop_string_is_held_back_only_while_it_can_grow() -> None:
    cutter = StopStrings(["###", "\nUSER:"])
    assert cutter.push("a##") == ("a", False)
    assert cutter.push("b\nUS") == ("##b", False)
    assert cutter.push("ER: hi") == ("", True)
    assert cutter.push("more") == ("", True)
    assert cutter.flush() == ""


def test_earlier_beginning_wins_over_earlier_end() -> None:
    cutter = StopStrings(["abcd", "bc"])
    assert cutter.push("xabc") == ("x", False)
    assert cutter.push("e") == ("a", True)
    assert StopStrings(["abcd", "bc"]).push("xabcd") == ("x", True)


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])
