"""Stop strings against a plain search in the whole text."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.stop import StopStrings


def reference(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """What is shown of a text in the end, and the stop string: complete first, then longest."""
    found = [(text.find(s) + len(s), -len(s), s) for s in stops if s in text]
    if not found:
        return text, None
    end, length, stop = min(found)
    return text[: end if include else end + length], stop


@given(
    parts=st.lists(st.text("ab\n", max_size=5), max_size=8),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4),
    include=st.booleans(),
)
def test_pieces_stop_where_the_whole_does(
    parts: list[str], stops: list[str], include: bool
) -> None:
    search, shown, stopped = StopStrings(stops, include), "", None
    for part in parts:
        new, stopped = search.push(part)
        shown += new
        if stopped is not None:
            break
        # Never part of a stop string, if one comes later; and no more is held than may be one.
        held = search._held
        assert held == "" or any(stop.startswith(held) for stop in stops)
        if not include:
            assert all(reference(shown + held + stop, stops, False)[0].startswith(shown)
                       for stop in stops)  # fmt: skip
    else:
        shown += search.flush()
    assert (shown, stopped) == reference("".join(parts), stops, include)
    assert search.flush() == ""


@given(
    text=st.text("ab\n", max_size=8),
    pending=st.text("ab\n", max_size=4),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
)
def test_pending_text_can_complete_a_stop(
    text: str, pending: str, stops: list[str], include: bool
) -> None:
    search = StopStrings(stops, include)
    shown, stopped = search.push(text, pending)
    expected = reference(text + pending, stops, include)
    assert stopped == expected[1]
    if stopped is not None:
        assert shown == expected[0]
    else:  # pending text is not taken: it comes again
        assert shown + search.flush() == text


@pytest.mark.parametrize(
    ("stops", "include", "pushed"),
    [
        (["\n\n"], False, [("a\n", "a", None), ("b\n", "\nb", None), ("\nc", "", "\n\n")]),
        (["\n\n"], True, [("a\n", "a", None), ("\nc", "\n\n", "\n\n")]),
        (["abc", "b"], False, [("xa", "x", None), ("bc", "a", "b")]),
        (["stop", "top"], False, [("a sto", "a ", None), ("p!", "", "stop")]),
        ([], False, [("text", "text", None)]),
    ],
)
def test_examples(
    stops: list[str], include: bool, pushed: list[tuple[str, str, str | None]]
) -> None:
    search = StopStrings(stops, include)
    for text, shown, stopped in pushed:
        assert search.push(text) == (shown, stopped)


def test_nothing_comes_after_the_stop() -> None:
    search = StopStrings(["x"])
    assert search.push("axb") == ("a", "x")
    assert search.push("cx") == ("", None)
    assert search.flush() == ""


def test_long_stop_strings_are_cheap() -> None:
    search = StopStrings(["a" * 2000 + "b", "c" * 20_000])
    start = time.monotonic()
    shown = "".join(search.push("a")[0] for _ in range(5_000))
    assert shown + search.flush() == "a" * 5_000
    assert time.monotonic() - start < 20
