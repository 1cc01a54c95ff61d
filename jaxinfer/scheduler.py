"""Which tokens of which requests run in the next step.  Policy only; imports no jax.

The scheduler knows tokens, pages and a budget.  Running requests live in slots; what it knows of
them lies in NumPy arrays with one entry a slot, so a decode step costs a few array operations
however many requests run.  Three lengths tell where a request stands:

    computed ≤ seen ≤ length        computed: tokens whose keys and values exist, or will after the
                                    steps in flight; seen: tokens whose ids the host knows; length:
                                    tokens that exist, those still on the device included.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from jaxinfer.pages import Pages, page_digests
from jaxinfer.request import MAX_STOP_TOKEN_IDS, Request


@dataclass(frozen=True)
class Limits:
    """Sizes that bound every step; in requests, tokens a step, tokens a sequence, slots a page."""

    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    page_size: int

    @property
    def pages_per_row(self) -> int:
        return -(-self.max_seq_len // self.page_size)


@dataclass
class Plan:
    """One step, decided.  Arrays are fresh copies, safe while the step is in flight.

    It names slots and positions, never token values: those are in the device's history, the newest
    perhaps nowhere else yet.  Rows of one token come first.  The second group of fields has one
    entry per position whose hidden state is wanted: `selected_B` is its index among the step's
    tokens, `targets_B` the known next token or -1 to sample one.

    admitted: requests that got a slot, whose tokens must enter the history before the step.
    """

    number: int
    slots_B: np.ndarray
    starts_B: np.ndarray
    lens_B: np.ndarray
    num_single: int
    tables_BM: np.ndarray
    num_tokens: int
    selected_B: np.ndarray
    selected_slots_B: np.ndarray
    selected_positions_B: np.ndarray
    targets_B: np.ndarray
    admitted: list[Request]


@dataclass(frozen=True)
class Commit:
    """What a finished step brought: requests that ended, and watched ones with a new token.

    `news` holds (request, index of its entry in the plan's second group).
    """

    finished: list[Request]
    news: list[tuple[Request, int]]


class Scheduler:
    """`add` requests, `plan` a step, `commit` its tokens, `finish` (or cancel) a request."""

    def __init__(
        self,
        limits: Limits,
        pages: Pages,
        policy: str = "guaranteed_no_evict",
        enable_prefix_caching: bool = True,
    ):
        self.limits = limits
        self.pages = pages
        self.enable_prefix_caching = enable_prefix_caching
        self.guaranteed = policy == "guaranteed_no_evict"
        self.num_preemptions = 0
        self._waiting: list[tuple[int, int, Request]] = []
        self._slots: list[Request | None] = [None] * limits.max_batch_size
        self._free_slots = list(range(limits.max_batch_size - 1, -1, -1))
        self._leaving: list[int] = []  # slots whose request ended or was preempted in flight
        self._plans = self._committed = 0
        self._allocate(limits.max_batch_size)

    def _allocate(self, rows: int) -> None:
        def zeros(*shape: int) -> np.ndarray:
            return np.zeros((rows, *shape), np.int32)

        self._token_ids_BT = zeros(self.limits.max_seq_len + 1)
        self._tables_BM = zeros(self.limits.pages_per_row)
        self._num_pages_B = zeros()
        self._registered_B = zeros()
        self._computed_B, self._seen_B, self._length_B = zeros(), zeros(), zeros()
        self._limit_B, self._select_from_B = zeros(), zeros()
        self._stop_ids_BC = np.full((rows, 2 * MAX_STOP_TOKEN_IDS), -1, np.int32)
        self._active_B = np.zeros(rows, bool)  # may be planned
        self._alive_B = np.zeros(rows, bool)  # its tokens still count
        self._watched_B = np.zeros(rows, bool)
        self._last_plan_B = zeros()
        self._short_of_pages = False
        self._reserved = 0  # pages promised to running requests and not yet taken

    # -- what callers ask ---------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self._waiting) or bool(self._active_B.any()) or bool(self._leaving)

    @property
    def num_running(self) -> int:
        return int(self._active_B.sum())

    @property
    def num_waiting(self) -> int:
        return sum(request.finish_reason is None for *_, request in self._waiting)

    def pages_needed(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.page_size)

    def add(self, request: Request) -> None:
        """Queue a request.  The caller has checked that it fits `limits` and the pool."""
        heapq.heappush(self._waiting, (request.priority, request.arrival, request))

    def finish(self, request: Request, reason: str, stop_reason: int | str | None = None) -> None:
        """End a request now, for a reason of the caller's (cancelled, a stop string)."""
        if request.finish_reason is not None:
            return
        if request.slot >= 0:
            self._end(request.slot, reason, stop_reason)
            self._release_settled()
        else:
            request.finish_reason = reason

    # -- planning -----------------------------------------------------------------------------

    def plan(self) -> Plan | None:
        """Choose the next step's tokens; None if nothing can run before a step in flight ends.

        Rows that decode go first, one token each; what is left of the token budget goes to the
        prompts of running requests, then to waiting ones, each in order of priority and arrival.
        """
        self._drop_finished_waiting()
        if not (self._waiting or self._active_B.any()):
            return None
        remaining_B = np.where(self._active_B, self._length_B - self._computed_B, 0)
        # The last token that a request may have is never computed: nobody asks what follows it.
        remaining_B[self._computed_B >= self._limit_B - 1] = 0
        single = self._with_pages(np.flatnonzero(remaining_B == 1))
        budget = self.limits.max_num_tokens - len(single)
        selections = self.limits.max_batch_size - len(single)

        rows, counts = [], []
        # A preemption above may have ended rows, so ask again who still runs.
        chunked = [
            slot for slot in np.flatnonzero(remaining_B > 1).tolist() if self._active_B[slot]
        ]
        chunked.sort(key=self._rank)
        admitted: list[Request] = []
        while budget > 0:
            if chunked:
                slot = chunked.pop(0)
            elif (slot := self._admit_next()) is not None:
                admitted.append(self._request(slot))
            else:
                break
            count = self._chunk(slot, budget, selections)
            if count == 0:
                continue
            rows.append(slot)
            counts.append(count)
            budget -= count
            selections -= self._selections(slot, count)
            # All rows of a step write before any attends, so the next one may match at once.
            self._register_pages(slot, int(self._computed_B[slot]) + count)
        if len(single) + len(rows) == 0:
            return None
        return self._decide(single, rows, counts, admitted)

    def _chunk(self, slot: int, budget: int, selections: int) -> int:
        """Tokens of this row to run now, within both budgets."""
        start = int(self._computed_B[slot])
        count = min(int(self._length_B[slot]) - start, budget)
        unselected = max(int(self._select_from_B[slot]) - start, 0)
        return min(count, unselected + selections)

    def _selections(self, slot: int, count: int) -> int:
        start = int(self._computed_B[slot])
        return max(start + count - max(start, int(self._select_from_B[slot])), 0)

    def _decide(
        self, single: np.ndarray, rows: list[int], counts: list[int], admitted: list[Request]
    ) -> Plan:
        """Turn chosen rows into a plan, and take note of what will have run."""
        # A chunk of one token counts as a single row too, wherever it came from.
        ones = [slot for slot, count in zip(rows, counts, strict=True) if count == 1]
        many = [(slot, count) for slot, count in zip(rows, counts, strict=True) if count > 1]
        slots_B = np.concatenate([single, ones, [slot for slot, _ in many]]).astype(np.int32)
        lens_B = np.ones(len(slots_B), np.int32)
        num_single = len(single) + len(ones)
        lens_B[num_single:] = [count for _, count in many]
        starts_B = self._computed_B[slots_B]
        ends_B = starts_B + lens_B

        # Slot and position of every token, end to end.
        offsets_B = np.cumsum(lens_B) - lens_B
        slot_T = np.repeat(slots_B, lens_B)
        position_T = np.arange(len(slot_T)) + np.repeat(starts_B - offsets_B, lens_B)
        wanted_T = position_T >= self._select_from_B[slot_T]
        selected_B = np.flatnonzero(wanted_T).astype(np.int32)
        selected_slots_B, selected_positions_B = slot_T[wanted_T], position_T[wanted_T]
        targets_B = self._token_ids_BT[selected_slots_B, selected_positions_B + 1]
        is_last_B = selected_positions_B + 1 >= self._length_B[selected_slots_B]
        targets_B[is_last_B] = -1

        self._plans += 1
        self._computed_B[slots_B] = ends_B
        self._length_B[slots_B] += ends_B == self._length_B[slots_B]
        self._last_plan_B[slots_B] = self._plans
        return Plan(
            number=self._plans,
            slots_B=slots_B,
            starts_B=starts_B,
            lens_B=lens_B,
            num_single=num_single,
            tables_BM=self._tables_BM[slots_B],
            num_tokens=len(slot_T),
            selected_B=selected_B,
            selected_slots_B=selected_slots_B,
            selected_positions_B=selected_positions_B.astype(np.int32),
            targets_B=targets_B,
            admitted=admitted,
        )

    def _rank(self, slot: int) -> tuple[int, int]:
        """Who goes first: lower priority numbers, then earlier arrivals."""
        request = self._request(slot)
        return request.priority, request.arrival

    # -- pages --------------------------------------------------------------------------------

    def _with_pages(self, slots: np.ndarray) -> np.ndarray:
        """Those of the decoding slots that have, or now get, the page for their next token."""
        self._short_of_pages = False
        page_of_next = self._computed_B[slots] // self.limits.page_size
        short = slots[page_of_next >= self._num_pages_B[slots]]
        if not len(short):
            return slots
        runs_B = self._active_B.copy()
        for slot in sorted(short.tolist(), key=self._rank):
            if self._active_B[slot] and not self._take_pages(slot):
                runs_B[slot] = False
        return slots[runs_B[slots] & self._active_B[slots]]

    def _take_pages(self, slot: int) -> bool:
        """Give a running row one more page, preempting the rows that rank last if need be.

        False if it must be waited for: a preempted row's pages return after the step in flight.
        """
        while self.pages.available == 0:
            self._short_of_pages = True
            if self._leaving:
                return False
            victim = max(np.flatnonzero(self._active_B).tolist(), key=self._rank)
            self._preempt(victim)
            if victim == slot:
                return False
        held = int(self._num_pages_B[slot])
        (self._tables_BM[slot, held],) = self.pages.take(1)
        self._num_pages_B[slot] += 1
        self._reserved -= self.guaranteed
        return True

    def _admit_next(self) -> int | None:
        """Move the first waiting request into a slot; None if there is none, or no room for it.

        Later requests do not overtake one that has no room, or large ones would starve.  Nobody
        enters while running rows lack pages.
        """
        self._drop_finished_waiting()
        if not self._waiting or not self._free_slots or self._short_of_pages:
            return None
        request = self._waiting[0][-1]
        token_ids = request.known_token_ids
        matched = self._match(request, token_ids)
        now = self.pages_needed(len(token_ids)) - len(matched)
        later = 0
        if self.guaranteed:
            # The last token of a full sequence is never computed, so it needs no slot.
            most = max(request.limit - 1, len(token_ids))
            later = self.pages_needed(most) - self.pages_needed(len(token_ids))
        if now + later > self.pages.available - self._reserved:
            self.pages.give_back(matched)
            return None
        heapq.heappop(self._waiting)
        self._reserved += later
        slot = self._free_slots.pop()
        self._occupy(slot, request, token_ids, matched, self.pages.take(now))
        return slot

    def _match(self, request: Request, token_ids: np.ndarray) -> list[int]:
        """Pages of the longest cached prefix; at least one token is left to compute."""
        if not self.enable_prefix_caching:
            return []
        request.digests = page_digests(token_ids, self.limits.page_size, request.digests)
        # A request that wants earlier hidden states must compute them.
        usable = min(request.select_from, len(token_ids) - 1) // self.limits.page_size
        return self.pages.match(request.digests[:usable])

    def _occupy(
        self,
        slot: int,
        request: Request,
        token_ids: np.ndarray,
        matched: list[int],
        taken: list[int],
    ) -> None:
        pages = matched + taken
        self._slots[slot] = request
        request.slot = slot
        if request.num_cached_tokens is None:
            request.num_cached_tokens = len(matched) * self.limits.page_size
        self._tables_BM[slot] = 0
        self._tables_BM[slot, : len(pages)] = pages
        self._num_pages_B[slot] = len(pages)
        self._registered_B[slot] = len(matched)
        self._computed_B[slot] = len(matched) * self.limits.page_size
        self._token_ids_BT[slot, : len(token_ids)] = token_ids
        self._seen_B[slot] = self._length_B[slot] = len(token_ids)
        self._limit_B[slot] = request.limit
        self._select_from_B[slot] = request.select_from
        self._stop_ids_BC[slot] = -1
        self._stop_ids_BC[slot, : len(request.stop_ids)] = request.stop_ids
        self._active_B[slot] = self._alive_B[slot] = True
        self._watched_B[slot] = request.watched

    def _register_pages(self, slot: int, computed: int) -> None:
        """Name the pages that the first `computed` tokens fill, so that others can match them."""
        request = self._request(slot)
        full = min(computed // self.limits.page_size, len(request.digests))
        for index in range(int(self._registered_B[slot]), full):
            self.pages.register(int(self._tables_BM[slot, index]), request.digests[index])
        self._registered_B[slot] = max(full, self._registered_B[slot])

    # -- results ------------------------------------------------------------------------------

    def commit(self, plan: Plan, tokens_B: np.ndarray) -> Commit:
        """Take note of a finished step's tokens, one per selected position of its plan."""
        self._committed = plan.number
        slots_B, positions_B = plan.selected_slots_B, plan.selected_positions_B
        alive_B = self._alive_B[slots_B]
        fresh_B = alive_B & (plan.targets_B < 0)
        slots, positions, tokens = slots_B[fresh_B], positions_B[fresh_B] + 1, tokens_B[fresh_B]
        self._token_ids_BT[slots, positions] = tokens
        self._seen_B[slots] = positions + 1
        self._select_from_B[slots_B[alive_B]] = positions_B[alive_B] + 1

        news = [
            (self._request(slot), index)
            for index in np.flatnonzero(alive_B & self._watched_B[slots_B]).tolist()
            if (slot := int(slots_B[index])) >= 0
        ]
        stopped = (tokens[:, None] == self._stop_ids_BC[slots]).any(axis=1)
        full = self._seen_B[slots] >= self._limit_B[slots]
        finished = []
        for entry in np.flatnonzero(stopped | full).tolist():
            slot = int(slots[entry])
            finished.append(self._request(slot))
            if stopped[entry]:
                token = int(tokens[entry])
                by_caller = token in finished[-1].params.stop_token_ids
                self._end(slot, "stop", token if by_caller else None)
            else:
                self._end(slot, "length", None)
        self._release_settled()
        return Commit(finished, news)

    def _request(self, slot: int) -> Request:
        request = self._slots[slot]
        assert request is not None
        return request

    def _end(self, slot: int, reason: str, stop_reason: int | str | None) -> None:
        """The request is over; its slot and pages follow when no step in flight uses them."""
        request = self._request(slot)
        request.finish_reason, request.stop_reason = reason, stop_reason
        request.token_ids = self._token_ids_BT[
            slot, request.prompt_len : int(self._seen_B[slot])
        ].tolist()
        self._alive_B[slot] = False
        self._leave(slot)

    def _preempt(self, slot: int) -> None:
        """Take a row's pages; it queues again, with the tokens it has, to be computed anew."""
        self.num_preemptions += 1
        self._leave(slot)
        self._release_settled()

    def _leave(self, slot: int) -> None:
        if self._active_B[slot]:
            self._active_B[slot] = False
            self._leaving.append(slot)

    def _release_settled(self) -> None:
        """Empty the slots of leaving requests that no step in flight touches any more."""
        still = []
        for slot in self._leaving:
            if self._last_plan_B[slot] > self._committed:
                still.append(slot)
            else:
                self._release(slot)
        self._leaving = still

    def _release(self, slot: int) -> None:
        request = self._request(slot)
        seen = int(self._seen_B[slot])
        held = int(self._num_pages_B[slot])
        pages = self._tables_BM[slot, :held].tolist()
        if self.enable_prefix_caching:  # the output too, so that a follow-up prompt can match it
            computed = min(seen, int(self._computed_B[slot]))
            request.digests = page_digests(
                self._token_ids_BT[slot, :computed], self.limits.page_size, request.digests
            )
            self._register_pages(slot, computed)
        if self.guaranteed:
            most = max(request.limit - 1, request.prompt_len)
            self._reserved -= max(self.pages_needed(most) - held, 0)
        self.pages.give_back(pages)
        self._num_pages_B[slot] = 0
        self._slots[slot] = None
        self._free_slots.append(slot)
        request.slot = -1
        if request.finish_reason is None:
            request.token_ids = self._token_ids_BT[slot, request.prompt_len : seen].tolist()
            request.select_from = int(self._select_from_B[slot])
            self.add(request)
        self._alive_B[slot] = False

    def _drop_finished_waiting(self) -> None:
        while self._waiting and self._waiting[0][-1].finish_reason is not None:
            heapq.heappop(self._waiting)

    def check(self) -> None:
        """Raise `PageError` if pages and slots do not add up (tests call it after every step)."""
        self.pages.check()
