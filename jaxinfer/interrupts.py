"""Ctrl-C at a moment that tears nothing apart."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Let Ctrl-C take effect between turns, not inside one, where it would tear plan from step."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    # None: not Python's own handler, and one that it could not put back.
    if not in_main_thread or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    caught: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if caught:
            signal.raise_signal(signal.SIGINT)  # whatever handles it: it need not be a function
