"""Is a text cut at its first stop string, however it arrives?"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasteagle.tokenizer import StopStrings


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    text=st.text("ab#", max_size=20),
    stops=st.lists(st.text("ab#", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=4),
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
