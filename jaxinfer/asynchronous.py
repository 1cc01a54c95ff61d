"""Requests that an event loop waits for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any

from jaxinfer.output import Collector
from jaxinfer.request import RequestOutput


class AsyncRequest:
    """Awaitable for the final output, and an async iterator over the growing one.

    advance: runs one turn of the engine; safe to call from several threads.
    cancel: ends the request; called when whoever waits is cancelled.
    """

    def __init__(
        self, collector: Collector, advance: Callable[[], None], cancel: Callable[[str], Any]
    ):
        self._collector, self._advance, self._cancel = collector, advance, cancel

    @property
    def request_id(self) -> str:
        return self._collector.output.request_id

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        collector = self._collector
        try:
            while True:
                if not (collector.has_news or collector.output.finished):
                    # The step blocks, so it runs beside the event loop; a lock in the engine keeps
                    # turns apart if several requests drive it.
                    await asyncio.to_thread(self._turn)
                    continue
                output = collector.take_news()
                yield output
                if output.finished:
                    return
        finally:
            self._cancel(self.request_id)

    def _turn(self) -> None:
        if not (self._collector.output.finished or self._collector.has_news):
            self._advance()

    def __await__(self) -> Generator[Any, None, RequestOutput]:
        return self._final().__await__()

    async def _final(self) -> RequestOutput:
        async for output in self:
            if output.finished:
                return output
        raise AssertionError("a request ends with a finished output")
