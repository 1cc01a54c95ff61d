"""The scheduler against a device of NumPy that stores token ids where keys would be.

The device reads back through the page tables what every row should see, so a page that was freed,
shared or overwritten too early shows as a wrong token, not as a slightly different number.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.pages import Pages
from jaxinfer.request import Request, SamplingParams
from jaxinfer.scheduler import Limits, Scheduler

VOCAB, EOS = 50, 7


def next_token(sequence) -> int:
    """The fake model: any function of the whole sequence will do."""
    return int(np.dot(sequence, np.arange(1, len(sequence) + 1)) * 31 % VOCAB)


def expected_output(prompt, max_tokens, stop_ids) -> list[int]:
    sequence = list(prompt)
    while len(sequence) < len(prompt) + max_tokens:
        sequence.append(next_token(sequence))
        if sequence[-1] in stop_ids:
            break
    return sequence[len(prompt) :]


class Device:
    """Runs a plan: writes, reads back, checks, samples."""

    def __init__(self, limits: Limits, num_pages: int):
        self.limits = limits
        self.pages_PS = np.full((num_pages, limits.page_size), -1)
        self.history_BT = np.full((limits.max_batch_size, limits.max_seq_len + 1), -1)

    def run(self, plan) -> np.ndarray:
        for req in plan.admitted:
            self.history_BT[req.slot, : len(req.known_token_ids)] = req.known_token_ids
        slots_T = np.repeat(plan.slots_B, plan.lens_B)
        rows_T = np.repeat(np.arange(len(plan.slots_B)), plan.lens_B)
        offsets = np.cumsum(plan.lens_B) - plan.lens_B
        positions_T = np.arange(plan.num_tokens) + np.repeat(plan.starts_B - offsets, plan.lens_B)
        tokens_T = self.history_BT[slots_T, positions_T]
        pages_T = plan.tables_BM[rows_T, positions_T // self.limits.page_size]
        targets = list(zip(pages_T, positions_T % self.limits.page_size, strict=True))
        assert len(set(targets)) == len(targets), "two tokens of a step share a slot"
        assert (pages_T > 0).all(), "a real token was written to the dump page"
        for (page, slot), token in zip(targets, tokens_T, strict=True):
            self.pages_PS[page, slot] = token
        sampled = []
        for index, slot, position, target in zip(
            plan.selected_B, plan.selected_slots_B, plan.selected_positions_B, plan.targets_B,
            strict=True,
        ):  # fmt: skip
            row = rows_T[index]
            assert plan.slots_B[row] == slot
            at = np.arange(position + 1)
            read = self.pages_PS[
                plan.tables_BM[row, at // self.limits.page_size], at % self.limits.page_size
            ]
            np.testing.assert_array_equal(read, self.history_BT[slot, : position + 1])
            token = next_token(read) if target < 0 else int(target)
            self.history_BT[slot, position + 1] = token
            sampled.append(token)
        return np.array(sampled, np.int32)


def drive(scheduler: Scheduler, device: Device, *, overlap: bool, actions=None) -> list[Request]:
    """The loop of `LLM`, with invariants checked at every turn.  Returns requests as they ended."""
    pending, ended, turns = None, [], 0
    while scheduler.has_work or pending:
        turns += 1
        assert turns < 20_000, "the scheduler does not come to an end"
        plan, done, pending = scheduler.plan(), pending, None
        if plan:
            assert plan.num_tokens <= scheduler.limits.max_num_tokens
            assert len(plan.selected_B) <= scheduler.limits.max_batch_size
            assert (plan.lens_B[: plan.num_single] == 1).all()
            assert (plan.lens_B[plan.num_single :] > 1).all()
            pending = plan, device.run(plan)
        if not overlap and pending:
            done, pending = pending, None
        if done:
            commit = scheduler.commit(*done)
            ended += commit.finished
            if actions:
                actions(turns, commit)
        scheduler.check()
    assert scheduler.pages.available == scheduler.pages.capacity, "pages leaked"
    assert scheduler.num_running == 0
    return ended


def make(num_pages=40, policy="guaranteed_no_evict", caching=True, **sizes):
    limits = Limits(**{
        "max_batch_size": 4, "max_num_tokens": 12, "max_seq_len": 48, "page_size": 4, **sizes,
    })  # fmt: skip
    scheduler = Scheduler(limits, Pages(num_pages, limits.page_size), policy, caching)
    return scheduler, Device(limits, num_pages)


def request(number, prompt, max_tokens, *, stop_ids=(EOS,), scored=False, priority=0, limit=48):
    prompt = np.asarray(prompt, np.int32)
    return Request(
        request_id=str(number),
        prompt_token_ids=prompt,
        params=SamplingParams(max_tokens=max_tokens),
        seed=0,
        limit=min(len(prompt) + max_tokens, limit),
        stop_ids=stop_ids,
        select_from=0 if scored else len(prompt) - 1,
        watched=scored,
        priority=priority,
        arrival=number,
    )


def check_output(req: Request) -> None:
    most = req.limit - req.prompt_len
    assert req.token_ids == expected_output(req.prompt_token_ids.tolist(), most, req.stop_ids)
    assert req.finish_reason == ("stop" if req.token_ids[-1] in req.stop_ids else "length")


@st.composite
def workloads(draw):
    prefix = draw(st.lists(st.integers(0, VOCAB - 1), min_size=0, max_size=14))
    prompts = draw(
        st.lists(
            st.tuples(
                st.booleans(),
                st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
                st.integers(1, 16),
                st.booleans(),
                st.integers(0, 2),
            ),
            min_size=1,
            max_size=14,
        )
    )
    return [
        request(i, (prefix if shared else []) + own, most, scored=scored, priority=priority)
        for i, (shared, own, most, scored, priority) in enumerate(prompts)
    ]


@settings(max_examples=150)
@given(
    requests=workloads(),
    policy=st.sampled_from(["guaranteed_no_evict", "max_utilization"]),
    caching=st.booleans(),
    overlap=st.booleans(),
    num_pages=st.integers(14, 40),
    max_num_tokens=st.integers(4, 32),
)
def test_every_request_ends_with_its_own_tokens(
    requests, policy, caching, overlap, num_pages, max_num_tokens
):
    scheduler, device = make(num_pages, policy, caching, max_num_tokens=max_num_tokens)
    for req in requests:
        scheduler.add(req)
    ended = drive(scheduler, device, overlap=overlap)
    assert len(ended) == len(requests)
    for req in requests:
        check_output(req)
    if policy == "guaranteed_no_evict":
        assert scheduler.num_preemptions == 0


@settings(max_examples=60)
@given(
    requests=workloads(),
    aborts=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 13)), max_size=8),
    policy=st.sampled_from(["guaranteed_no_evict", "max_utilization"]),
    overlap=st.booleans(),
)
def test_cancelling_anything_at_any_time_harms_nobody_else(requests, aborts, policy, overlap):
    scheduler, device = make(16, policy)
    for req in requests:
        scheduler.add(req)

    def actions(turn, commit):
        for when, which in aborts:
            if when == turn and which < len(requests):
                scheduler.finish(requests[which], "cancelled")

    drive(scheduler, device, overlap=overlap, actions=actions)
    for req in requests:
        whole = expected_output(req.prompt_token_ids.tolist(), 48, req.stop_ids)
        if req.finish_reason == "cancelled":
            assert req.token_ids == whole[: len(req.token_ids)]
        else:
            check_output(req)


def test_max_utilization_preempts_and_recomputes():
    scheduler, device = make(13, "max_utilization", max_num_tokens=16)
    requests = [request(i, [i + 1] * 6, 30, stop_ids=()) for i in range(4)]
    for req in requests:
        scheduler.add(req)
    ended = drive(scheduler, device, overlap=True)
    assert scheduler.num_preemptions > 0
    assert ended[0].request_id == "0", "the first to arrive must never starve"
    for req in requests:
        check_output(req)


def test_a_common_prefix_is_computed_once():
    prompt = list(range(1, 21))
    for caching, expected in ((True, 20 + 3 * 4), (False, 80)):
        scheduler, device = make(caching=caching, max_num_tokens=64)
        computed = 0
        for i in range(4):
            scheduler.add(request(i, prompt, 1, stop_ids=()))
        pending = None
        while scheduler.has_work or pending:
            plan, done, pending = scheduler.plan(), pending, None
            if plan:
                computed += plan.num_tokens
                pending = plan, device.run(plan)
            if done:
                scheduler.commit(*done)
        assert computed == expected


def test_pages_that_a_waiting_request_could_use_are_not_reused_yet():
    scheduler, device = make(num_pages=7, max_num_tokens=64)
    scheduler.add(request(0, list(range(1, 9)), 8, stop_ids=()))
    scheduler.add(request(1, list(range(1, 13)), 8, stop_ids=()))  # no room beside the first
    drive(scheduler, device, overlap=True)
    assert scheduler.num_reused_pages == 2


def test_a_follow_up_prompt_matches_the_output_too():
    scheduler, device = make(max_num_tokens=64)
    first = request(0, list(range(1, 9)), 9, stop_ids=())
    scheduler.add(first)
    drive(scheduler, device, overlap=True)
    follow_up = request(1, [*range(1, 9), *first.token_ids, 3], 1, stop_ids=())
    scheduler.add(follow_up)
    drive(scheduler, device, overlap=True)
    assert follow_up.num_cached_tokens == 16


def test_priority_then_arrival_decides_who_enters():
    scheduler, device = make(max_batch_size=1)
    for number, priority in ((0, 5), (1, 1), (2, 1), (3, 0)):
        scheduler.add(request(number, [1, 2], 2, stop_ids=(), priority=priority))
    ended = drive(scheduler, device, overlap=False)
    assert [req.request_id for req in ended] == ["3", "1", "2", "0"]


def test_scoring_selects_every_position_within_the_rows_of_a_step():
    scheduler, device = make()
    scored = request(0, list(range(1, 20)), 1, scored=True, stop_ids=())
    scheduler.add(scored)
    seen = []
    while scheduler.has_work:
        plan = scheduler.plan()
        assert len(plan.selected_B) <= 4
        seen += list(zip(plan.selected_positions_B, plan.targets_B, strict=True))
        scheduler.commit(plan, device.run(plan))
    assert seen == [*((i, i + 2) for i in range(18)), (18, -1)]


def test_a_plan_is_not_changed_by_what_follows():
    scheduler, device = make()
    scheduler.add(request(0, [1, 2, 3], 6, stop_ids=()))
    plan = scheduler.plan()
    frozen = {k: np.copy(v) for k, v in vars(plan).items() if isinstance(v, np.ndarray)}
    scheduler.commit(plan, device.run(plan))
    for _ in range(3):
        later = scheduler.plan()
        scheduler.commit(later, device.run(later))
    for name, value in frozen.items():
        np.testing.assert_array_equal(value, getattr(plan, name))


@pytest.mark.parametrize("length", [1, 4, 47])
def test_sequences_fill_max_seq_len_exactly(length):
    scheduler, device = make(max_num_tokens=48)
    req = request(0, [3] * length, 100, stop_ids=())
    scheduler.add(req)
    drive(scheduler, device, overlap=True)
    assert req.finish_reason == "length"
    assert req.prompt_len + len(req.token_ids) == 48
    check_output(req)
