"""The pool of KV-cache pages and the reuse of common prefixes.  Imports no jax.

A page holds the keys and values of `page_size` consecutive tokens of one sequence, for all layers.
Page 0 is the dump page: padded writes land there, and no request ever owns it.

A full page is named by a digest of all tokens from the start of its sequence to its own end, so two
sequences share exactly the pages of their common prefix.  Pages in use are counted by reference;
named pages that nobody uses are kept, least recently used first to go, until their room is needed.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from jaxinfer.errors import PageError


def page_digests(token_ids: np.ndarray, page_size: int, known: Sequence[bytes] = ()) -> list[bytes]:
    """Digests of all full pages of a sequence; `known` are those of its first pages, if at hand."""
    digests = list(known)
    digest = digests[-1] if digests else b""
    for page in range(len(digests), len(token_ids) // page_size):
        tokens = np.ascontiguousarray(
            token_ids[page * page_size : (page + 1) * page_size], dtype=np.int32
        )
        # A cryptographic digest: with a weaker one, a crafted prompt could read another's pages.
        digest = hashlib.blake2b(digest + tokens.tobytes(), digest_size=16).digest()
        digests.append(digest)
    return digests


class Pages:
    """Allocates pages 1 … num_pages-1; `match`, `take`, `register`, `give_back`."""

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, 0, -1))
        self._references_P = np.zeros(num_pages, np.int32)
        self._digest_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # named, unreferenced, oldest first
        self._registered = self._reused = 0

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
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._unused.popitem(last=False)
                del self._page_of[self._digest_of.pop(page)]
            self._references_P[page] = 1
            pages.append(page)
        return pages

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """Pages of the longest known prefix, each now referenced once more.  Read-only for you."""
        pages = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            self._unused.pop(page, None)
            self._references_P[page] += 1
            pages.append(page)
        self._reused += len(pages)
        return pages

    def register(self, page: int, digest: bytes) -> None:
        """Name a full page so that others can match it.  Its content may no longer change."""
        if self._references_P[page] <= 0:
            raise PageError(f"page {page} is registered, but nobody holds it")
        if digest in self._page_of or page in self._digest_of:
            return  # the same prefix was computed twice at once; the first page keeps the name
        self._digest_of[page] = digest
        self._page_of[digest] = page
        self._registered += 1

    def give_back(self, pages: Sequence[int]) -> None:
        """Drop one reference to each page, last page first, so that prefixes outlive their ends."""
        for page in reversed(pages):
            if self._references_P[page] <= 0:
                raise PageError(f"page {page} was given back more often than taken")
            self._references_P[page] -= 1
            if self._references_P[page] == 0:
                if page in self._digest_of:
                    self._unused[page] = None
                else:
                    self._free.append(page)

    def stats(self) -> dict[str, int]:
        used = int((self._references_P > 0).sum())
        return {
            "num_pages": self.capacity,
            "used_pages": used,
            "cached_pages": len(self._unused),
            "free_pages": len(self._free),
            "reused_pages": self._reused,
        }

    def check(self) -> None:
        """Raise `PageError` unless every page is in exactly one state and the indices agree."""
        used = set(np.flatnonzero(self._references_P).tolist())
        groups = [used, set(self._free), set(self._unused)]
        if sum(map(len, groups)) != self.capacity or set().union(*groups) != set(
            range(1, self.num_pages)
        ):
            raise PageError("a page was lost, or is in two states at once")
        if len(self._free) != len(set(self._free)):
            raise PageError("a page is twice on the free list")
        if (self._references_P < 0).any():
            raise PageError("a page has a negative reference count")
        if {d: p for p, d in self._digest_of.items()} != self._page_of:
            raise PageError("digests and pages disagree")
        if not set(self._unused) <= set(self._digest_of):
            raise PageError("an unused cached page has no digest")
