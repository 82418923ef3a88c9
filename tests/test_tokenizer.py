"""Do text and tokens agree however they are split, and with transformers?"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_folders import KINDS, WORDS, corpus

from fasteagle.tokenizer import Tokenizer, load_tokenizer

EMOJI = "👩\u200d👩\u200d👧"  # three characters that print as one
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.lists(
    st.sampled_from([*WORDS, " ", "  ", "\n", "é", "🦅", EMOJI, "日本", "</s>", "<s>"]),
    max_size=8,
).map("".join)
LAW = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


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
