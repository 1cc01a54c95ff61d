"""The pool of KV-cache pages and the reuse of common prefixes.  Imports no jax.

A page holds the keys and values of `page_size` consecutive tokens of one sequence, for all layers.
Page 0 is the dump page: what is padding in a table names it, and no request ever owns it.

A full page is named by a digest of all tokens from the start of its sequence to its own end, so two
sequences share exactly the pages of their common prefix.  Pages in use are counted by reference;
named pages that nobody uses are kept, least recently used first to go, until their room is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np

from jaxinfer.errors import PageError


def page_digests(token_ids: np.ndarray, page_size: int, known: Sequence[bytes] = ()) -> list[bytes]:
    """Digests of all full pages of a sequence; `known` are those of its first pages, if at hand."""
    digests = list(known)
    digest = digests[-1] if digests else b""
    done, full = len(digests), len(token_ids) // page_size
    tokens = token_ids[done * page_size : full * page_size].astype(np.int32, copy=False).tobytes()
    width = 4 * page_size
    for start in range(0, len(tokens), width):
        # A cryptographic digest: with a weaker one, a crafted prompt could read another's pages.
        digest = blake2b(digest + tokens[start : start + width], digest_size=16).digest()
        digests.append(digest)
    return digests


class Pages:
    """Allocates pages 1 … num_pages-1; `match`, `take`, `register`, `give_back`."""

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, 0, -1))
        self._references = [0] * num_pages  # lists: touched one by one, they are faster
        self._digest_of: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        # Named pages that nobody uses, with their digests; the oldest first.
        self._unused: OrderedDict[int, bytes] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that `take` can hand out now, the unused named ones included."""
        return len(self._free) + len(self._unused)

    @property
    def capacity(self) -> int:
        """Pages that exist for requests: all but the dump page."""
        return self.num_pages - 1

    def take(self, count: int) -> list[int]:
        """Hand out `count` writable pages; forgets the least recently used names if it must.

        Raises `PageError` if there are not enough: callers ask `available` first.
        """
        if count > self.available:
            raise PageError(f"{count} pages asked for, {self.available} available")
        kept = max(len(self._free) - count, 0)
        pages = self._free[kept:][::-1]
        del self._free[kept:]
        oldest, page_of, digest_of = self._unused.popitem, self._page_of, self._digest_of
        for _ in range(count - len(pages)):
            page, digest = oldest(False)
            del page_of[digest]
            digest_of[page] = None
            pages.append(page)
        references = self._references
        for page in pages:
            references[page] = 1
        return pages

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """Pages of the longest known prefix, each now referenced once more.  Read-only for you."""
        pages = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            self._unused.pop(page, None)
            self._references[page] += 1
            pages.append(page)
        return pages

    def register(self, page: int, digest: bytes) -> None:
        """Name a full page so that others can match it.  Its content may no longer change."""
        if self._references[page] <= 0:
            raise PageError(f"page {page} is registered, but nobody holds it")
        # If the same prefix was computed twice at once, the first page keeps the name.
        if self._digest_of[page] is None and self._page_of.setdefault(digest, page) == page:
            self._digest_of[page] = digest

    def give_back(self, pages: Sequence[int]) -> None:
        """Drop one reference to each page, last page first, so that prefixes outlive their ends."""
        references, digest_of = self._references, self._digest_of
        for page in reversed(pages):
            left = references[page] = references[page] - 1
            if left < 0:
                references[page] = 0
                raise PageError(f"page {page} was given back more often than taken")
            if left == 0:
                digest = digest_of[page]
                if digest is None:
                    self._free.append(page)
                else:
                    self._unused[page] = digest

    def stats(self) -> dict[str, int]:
        used = self.num_pages - self._references.count(0)
        return {
            "num_pages": self.capacity,
            "used_pages": used,
            "cached_pages": len(self._unused),
            "free_pages": len(self._free),
        }

    def check(self) -> None:
        """Raise `PageError` unless every page is in exactly one state and the indices agree."""
        used = {page for page, count in enumerate(self._references) if count}
        groups = [used, set(self._free), set(self._unused)]
        if sum(map(len, groups)) != self.capacity or set().union(*groups) != set(
            range(1, self.num_pages)
        ):
            raise PageError("a page was lost, or is in two states at once")
        if len(self._free) != len(set(self._free)):
            raise PageError("a page is twice on the free list")
        if min(self._references) < 0:
            raise PageError("a page has a negative reference count")
        named = {page: digest for page, digest in enumerate(self._digest_of) if digest is not None}
        if {digest: page for page, digest in named.items()} != self._page_of:
            raise PageError("digests and pages disagree")
        if not self._unused.items() <= named.items():
            raise PageError("an unused cached page has no digest")
