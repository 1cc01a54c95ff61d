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
    perhaps nowhere else yet.  Rows of one token come first; `rows_T` and `positions_T` say of each
    token, end to end, which row it is of and where in its sequence.  The `selected` fields have one
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
    rows_T: np.ndarray
    positions_T: np.ndarray
    num_tokens: int
    selected_B: np.ndarray
    selected_slots_B: np.ndarray
    selected_positions_B: np.ndarray
    targets_B: np.ndarray
    admitted: list[Request]


@dataclass(frozen=True)
class Commit:
    """What a finished step brought: requests that began or ended, watched ones with a new token.

    first: requests whose first token this is.  `news` holds (request, index of its entry in the
    plan's `selected` fields).
    """

    first: list[Request]
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
        self.num_reused_pages = 0
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
        self._room_B = zeros()  # tokens that these pages hold
        self._registered_B = zeros()
        self._computed_B, self._seen_B, self._length_B = zeros(), zeros(), zeros()
        self._prompt_len_B, self._select_from_B = zeros(), zeros()
        self._stop_ids_CB = np.full((2 * MAX_STOP_TOKEN_IDS, rows), -1, np.int32)
        self._most_stop_ids = 0  # that any request had so far
        self._last_B = zeros()  # tokens that are ever computed
        self._active_B = np.zeros(rows, bool)  # may be planned
        self._num_active = self._num_watched = 0
        self._alive_B = np.zeros(rows, bool)  # its tokens still count
        self._watched_B = np.zeros(rows, bool)
        self._last_plan_B = zeros()
        self._short_of_pages = False
        self._reserved = 0  # pages promised to running requests and not yet taken

    # -- what callers ask ---------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._num_active or self._leaving)

    @property
    def num_running(self) -> int:
        return self._num_active

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
        if not (self._waiting or self._num_active):
            return None
        remaining_B = np.minimum(self._length_B, self._last_B) - self._computed_B
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
            count, selected = self._chunk(slot, budget, selections)
            if count == 0:
                continue
            rows.append(slot)
            counts.append(count)
            budget -= count
            selections -= selected
            # All rows of a step write before any attends, so the next one may match at once.
            self._register_pages(slot, int(self._computed_B[slot]) + count)
        if len(single) + len(rows) == 0:
            return None
        return self._decide(single, rows, counts, admitted)

    def _chunk(self, slot: int, budget: int, selections: int) -> tuple[int, int]:
        """Tokens of this row to run now, within both budgets, and how many of them are selected."""
        start = int(self._computed_B[slot])
        unselected = max(int(self._select_from_B[slot]) - start, 0)
        count = min(int(self._length_B[slot]) - start, budget, unselected + selections)
        return count, max(count - unselected, 0)

    def _decide(
        self, single: np.ndarray, rows: list[int], counts: list[int], admitted: list[Request]
    ) -> Plan:
        """Turn chosen rows into a plan, and take note of what will have run."""
        # A decoding row computes its newest token and wants what follows.
        count, starts_B = len(single), self._computed_B[single]
        ones_B, row_T, unknown_B = np.ones(count, np.int32), np.arange(count), np.full(count, -1)
        parts = single, ones_B, starts_B, row_T, starts_B, row_T, unknown_B
        if rows:
            chunks = self._chunks(rows, counts, count)
            parts = map(np.concatenate, zip(parts, chunks, strict=True))
        slots, lens_B, starts_B, row_T, position_T, selected, targets_B = parts
        selected_slots, positions = slots, position_T
        if rows:
            selected_slots, positions = slots[row_T[selected]], position_T[selected]

        self._plans += 1
        ends_B = starts_B + lens_B
        self._computed_B[slots] = ends_B
        self._length_B[slots] += ends_B == self._length_B[slots]
        self._last_plan_B[slots] = self._plans
        return Plan(
            number=self._plans,
            slots_B=slots,
            starts_B=starts_B,
            lens_B=lens_B,
            num_single=int((lens_B == 1).sum()),
            tables_BM=self._tables_BM.take(slots, axis=0),
            rows_T=row_T,
            positions_T=position_T,
            num_tokens=len(row_T),
            selected_B=selected,
            selected_slots_B=selected_slots,
            selected_positions_B=positions,
            targets_B=targets_B,
            admitted=admitted,
        )

    def _chunks(self, rows: list[int], counts: list[int], before: int) -> tuple[np.ndarray, ...]:
        """Slots, lengths and starts of these rows; row and position of their tokens; which tokens
        are selected, and their targets.  `before` rows, of one token each, stand before them."""
        # A chunk of one token counts as a single row too, wherever it came from.
        chunks = sorted(zip(counts, rows, strict=True), key=lambda chunk: chunk[0] > 1)
        lens_B, slots = np.array(chunks).T
        starts_B = self._computed_B[slots]
        row_T = np.arange(len(slots)).repeat(lens_B)
        position_T = np.arange(len(row_T)) + (starts_B - lens_B.cumsum() + lens_B)[row_T]
        selected = np.flatnonzero(position_T >= self._select_from_B[slots][row_T])
        slot_B, next_B = slots[row_T[selected]], position_T[selected] + 1
        targets_B = np.full(len(selected), -1)
        known = np.flatnonzero(next_B < self._length_B[slot_B])
        targets_B[known] = self._token_ids_BT[slot_B[known], next_B[known]]
        return slots, lens_B, starts_B, row_T + before, position_T, selected + before, targets_B

    def _rank(self, slot: int) -> tuple[int, int]:
        """Who goes first: lower priority numbers, then earlier arrivals."""
        request = self._request(slot)
        return request.priority, request.arrival

    # -- pages --------------------------------------------------------------------------------

    def _with_pages(self, slots: np.ndarray) -> np.ndarray:
        """Those of the decoding slots that have, or now get, the page for their next token."""
        self._short_of_pages = False
        short = slots[self._computed_B[slots] >= self._room_B[slots]]
        if len(short) <= self.pages.available:
            self._give_page(short)
            return slots
        runs_B = self._active_B.copy()
        for slot in sorted(short.tolist(), key=self._rank):
            if self._active_B[slot] and not self._free_a_page(slot):
                runs_B[slot] = False
            elif self._active_B[slot]:
                self._give_page(np.array([slot]))
        return slots[runs_B[slots] & self._active_B[slots]]

    def _give_page(self, slots: np.ndarray) -> None:
        """One more page for each of these running rows."""
        self._tables_BM[slots, self._num_pages_B[slots]] = self.pages.take(len(slots))
        self._num_pages_B[slots] += 1
        self._room_B[slots] += self.limits.page_size
        self._reserved -= len(slots) * self.guaranteed

    def _free_a_page(self, slot: int) -> bool:
        """Preempt the rows that rank last until there is a page for a running row.

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
        self.num_reused_pages += len(matched)
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
        self._room_B[slot] = len(pages) * self.limits.page_size
        self._registered_B[slot] = len(matched)
        self._computed_B[slot] = len(matched) * self.limits.page_size
        self._token_ids_BT[slot, : len(token_ids)] = token_ids
        self._seen_B[slot] = self._length_B[slot] = len(token_ids)
        self._prompt_len_B[slot] = request.prompt_len
        self._last_B[slot] = request.limit - 1  # nobody asks what follows the last token
        self._select_from_B[slot] = request.select_from
        self._most_stop_ids = max(self._most_stop_ids, len(request.stop_ids))
        self._stop_ids_CB[: self._most_stop_ids, slot] = -1
        self._stop_ids_CB[: len(request.stop_ids), slot] = request.stop_ids
        self._active_B[slot] = self._alive_B[slot] = True
        self._watched_B[slot] = request.watched
        self._num_active += 1
        self._num_watched += request.watched

    def _register_pages(self, slot: int, computed: int) -> None:
        """Name the pages that the first `computed` tokens fill, so that others can match them."""
        request = self._request(slot)
        done = int(self._registered_B[slot])
        full = min(computed // self.limits.page_size, len(request.digests))
        if full > done:
            pages = self._tables_BM[slot, done:full].tolist()
            for page, digest in zip(pages, request.digests[done:full], strict=True):
                self.pages.register(page, digest)
            self._registered_B[slot] = full

    # -- results ------------------------------------------------------------------------------

    def commit(self, plan: Plan, tokens_B: np.ndarray) -> Commit:
        """Take note of a finished step's tokens, one per selected position of its plan."""
        self._committed = plan.number
        slots, ends = plan.selected_slots_B, plan.selected_positions_B + 1
        alive_B = self._alive_B[slots]
        news = []
        if self._num_watched:
            watched = np.flatnonzero(alive_B & self._watched_B[slots]).tolist()
            news = [(self._request(slots[index]), index) for index in watched]
        if (plan.targets_B >= 0).any():
            scored = np.flatnonzero(alive_B & (plan.targets_B >= 0))
            self._select_from_B[slots[scored]] = ends[scored]
            alive_B[scored] = False
        if not alive_B.all():
            slots, ends, tokens_B = slots[alive_B], ends[alive_B], tokens_B[alive_B]
        self._token_ids_BT.reshape(-1)[slots * self._token_ids_BT.shape[1] + ends] = tokens_B
        self._seen_B[slots] = ends + 1

        begun = slots[ends == self._prompt_len_B[slots]].tolist()
        first = [self._request(slot) for slot in begun]
        stopped_B = self._is_stop(slots, tokens_B)
        finished = []
        for index in np.flatnonzero(stopped_B | (ends >= self._last_B[slots])).tolist():
            finished.append(request := self._request(slots[index]))
            if stopped_B[index]:
                token = int(tokens_B[index])
                by_caller = token in request.params.stop_token_ids
                self._end(request.slot, "stop", token if by_caller else None)
            else:
                self._end(request.slot, "length", None)
        self._release_settled()
        return Commit(first, finished, news)

    def _is_stop(self, slots: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Whether each token is one that ends the request in its slot."""
        stopped = np.zeros(len(slots), bool)
        for stop_ids_B in self._stop_ids_CB[: self._most_stop_ids]:
            stopped |= stop_ids_B[slots] == tokens
        return stopped

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
            self._length_B[slot] = 0  # nothing remains to be planned
            self._num_active -= 1
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
        self._num_pages_B[slot] = self._room_B[slot] = 0
        self._num_watched -= request.watched
        self._slots[slot] = None
        self._free_slots.append(slot)
        request.slot = -1
        if request.finish_reason is None:
            request.token_ids = self._token_ids_BT[slot, request.prompt_len : seen].tolist()
            more = seen > request.prompt_len
            request.select_from = seen - 1 if more else int(self._select_from_B[slot])
            self.add(request)
        self._alive_B[slot] = False

    def _drop_finished_waiting(self) -> None:
        while self._waiting and self._waiting[0][-1].finish_reason is not None:
            heapq.heappop(self._waiting)

    def check(self) -> None:
        """Raise `PageError` if pages and slots do not add up (tests call it after every step)."""
        self.pages.check()
