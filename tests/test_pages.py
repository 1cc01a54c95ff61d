"""The page pool: no page is lost, shared by accident, or forgotten too early."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.errors import PageError
from jaxinfer.pages import Pages, page_digests


def tokens(*values):
    return np.array(values, np.int32)


def test_digests_cover_all_tokens_before_them():
    one = page_digests(tokens(1, 2, 3, 4, 5), page_size=2)
    assert len(one) == 2
    assert one == page_digests(tokens(1, 2, 3, 4, 6, 7), page_size=2)[:2]
    other = page_digests(tokens(9, 2, 3, 4), page_size=2)
    assert one[1] != other[1], "the second page's digest must depend on the first page"
    assert page_digests(tokens(1, 2, 3, 4, 5, 6), 2, known=one)[:2] == one


def test_page_zero_is_never_handed_out():
    pages = Pages(8, 4)
    assert sorted(pages.take(7)) == list(range(1, 8))
    with pytest.raises(PageError, match="1 pages asked for, 0 available"):
        pages.take(1)


def test_named_pages_outlive_their_request_and_are_evicted_oldest_first():
    pages = Pages(4, 2)
    first, second, third = pages.take(3)
    for page, digest in zip((first, second, third), (b"a", b"b", b"c"), strict=True):
        pages.register(page, digest)
    pages.give_back([first])
    pages.give_back([second])
    pages.give_back([third])
    assert pages.match([b"a"]) == [first]
    pages.give_back([first])  # now the most recently used
    assert pages.take(1) == [second]
    assert pages.match([b"b"]) == []
    assert pages.match([b"c"]) == [third]
    pages.check()


def test_the_end_of_a_prefix_is_evicted_before_its_beginning():
    pages = Pages(4, 2)
    held = pages.take(3)
    for page, digest in zip(held, (b"a", b"b", b"c"), strict=True):
        pages.register(page, digest)
    pages.give_back(held)
    assert pages.take(1) == [held[2]]
    assert pages.match([b"a", b"b", b"c"]) == held[:2]


def test_shared_pages_return_with_their_last_reader():
    pages = Pages(3, 2)
    (page,) = pages.take(1)
    pages.register(page, b"x")
    assert pages.match([b"x"]) == [page]
    pages.give_back([page])
    assert pages.available == 1
    pages.give_back([page])
    assert pages.available == 2


def test_misuse_is_an_error():
    pages = Pages(3, 2)
    (page,) = pages.take(1)
    pages.give_back([page])
    with pytest.raises(PageError, match="more often than taken"):
        pages.give_back([page])
    with pytest.raises(PageError, match="nobody holds it"):
        pages.register(page, b"x")


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=60))
def test_any_sequence_of_calls_keeps_the_books(calls):
    pages = Pages(9, 2)
    held: list[int] = []
    for action, number in calls:
        if action == 0 and number <= pages.available:
            held += pages.take(number)
        elif action == 1 and held:
            pages.register(held[number % len(held)], bytes([number]))
        elif action == 2:
            held += pages.match([bytes([number])])
        elif action == 3 and held:
            pages.give_back([held.pop(number % len(held))])
        pages.check()
        assert pages.available == pages.capacity - len(set(held))
