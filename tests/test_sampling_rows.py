"""The sampling table's mirror on the host: what it uploads, and what it keeps of the past."""

import jax
import numpy as np
import pytest

from jaxinfer import sampling
from jaxinfer.request import Request, SamplingParams
from jaxinfer.sampling import SamplingRows


def request(seed=3, index=0, prompt_len=4, eos=(2,), **params) -> Request:
    params = SamplingParams(**params)
    return Request(
        request_id="x", index=index, prompt_token_ids=np.arange(prompt_len), params=params,
        seed=seed, limit=50, stop_ids=(*eos, *params.stop_token_ids), select_from=0,
        bad_words=tuple(map(tuple, params.bad_words_token_ids)),
    )  # fmt: skip


EVERYTHING = request(
    seed=2**64 - 5, index=9, prompt_len=33, temperature=0.5, top_k=7, top_p=0.8, min_p=0.1,
    repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=-0.5, min_tokens=3,
    stop_token_ids=[8, 9], logit_bias={4: 1.0, 5: -2.0}, bad_words_token_ids=[[1], [2, 3]],
    logprobs=2,
)  # fmt: skip


class Uploads:
    """Stands for the device: hands arrays on as they are, and remembers them."""

    def __init__(self):
        self.arrays = []

    def __call__(self, array: np.ndarray) -> np.ndarray:
        self.arrays.append(array)
        return array


def test_rows_hold_what_was_asked_for():
    rows = SamplingRows(3, Uploads())
    rows.set(1, EVERYTHING)
    table = jax.tree.map(lambda leaf: leaf[1], rows.table())
    assert table.temperature_B == 0.5
    assert (table.top_k_B, table.top_p_B, table.min_p_B) == (7, np.float32(0.8), np.float32(0.1))
    assert int(table.seed_high_B) << 32 | int(table.seed_low_B) == 2**64 - 5
    assert (table.sample_index_B, table.prompt_len_B, table.min_len_B) == (9, 33, 36)
    assert table.stop_ids_BC[:4].tolist() == [2, 8, 9, -1]
    assert table.bias_ids_BC[:3].tolist() == [4, 5, -1]
    assert table.bias_BC[:3].tolist() == [1, -2, 0]
    assert table.bad_words_BXC[:3, -2:].tolist() == [[-1, 1], [2, 3], [-1, -1]]
    assert rows.features_B.tolist() == [0, 255, 0]


def test_a_new_request_finds_nothing_of_the_last_one():
    plain = request(temperature=0)
    used, fresh = SamplingRows(2, Uploads()), SamplingRows(2, Uploads())
    used.set(0, EVERYTHING)
    used.table()
    used.set(0, plain)
    fresh.set(0, plain)
    jax.tree.map(np.testing.assert_array_equal, used.table(), fresh.table())
    np.testing.assert_array_equal(used.features_B, fresh.features_B)


def test_only_what_changed_is_uploaded():
    uploads = Uploads()
    rows = SamplingRows(4, uploads)
    first = rows.table()
    assert len(uploads.arrays) == len(jax.tree.leaves(first))
    rows.set(2, request(temperature=0.7, top_p=0.9, seed=5))
    second, changed = rows.table(), {"temperature_B", "top_p_B", "seed_low_B", "prompt_len_B",
                                     "min_len_B"}  # fmt: skip
    same = {name for name in vars(first) if getattr(first, name) is getattr(second, name)}
    assert same == set(vars(first)) - changed
    uploads.arrays.clear()
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (second, rows.table())), strict=True))
    assert uploads.arrays == []
    # A request like the last one in that slot brings nothing new, whatever its prompt says.
    rows.set(2, request(temperature=0.7, top_p=0.9, seed=5))
    assert rows.table().bias_BC is second.bias_BC
    assert uploads.arrays == []


def test_a_table_in_flight_does_not_change():
    rows = SamplingRows(2, Uploads())
    rows.set(0, request(temperature=0.7))
    table = rows.table()
    before = jax.tree.map(np.copy, table)
    rows.set(0, EVERYTHING)
    rows.set(1, EVERYTHING)
    jax.tree.map(np.testing.assert_array_equal, table, before)
    for mine, theirs in zip(jax.tree.leaves(table), rows._rows.values(), strict=False):
        assert not np.shares_memory(mine, theirs)


@pytest.mark.parametrize(
    ("params", "bits"),
    [
        ({"temperature": 0}, 0),
        ({"temperature": 0, "top_k": 5, "top_p": 0.5, "min_p": 0.5}, 0),
        ({}, sampling.SAMPLED),
        ({"top_k": -1}, sampling.SAMPLED),
        ({"top_k": 1}, sampling.SAMPLED | sampling.FILTERED),
        ({"top_p": 0.99}, sampling.SAMPLED | sampling.FILTERED),
        ({"min_p": 0.01}, sampling.SAMPLED | sampling.FILTERED),
        ({"temperature": 0, "presence_penalty": -1}, sampling.PENALISED),
        ({"temperature": 0, "frequency_penalty": 1}, sampling.PENALISED),
        ({"temperature": 0, "repetition_penalty": 0.9}, sampling.PENALISED),
        ({"temperature": 0, "logit_bias": {}}, 0),
        ({"temperature": 0, "logit_bias": {1: 1}}, sampling.BIASED),
        ({"temperature": 0, "bad_words_token_ids": [[1]]}, sampling.BAD_WORDS),
        ({"temperature": 0, "min_tokens": 1}, sampling.MIN_TOKENS),
        ({"temperature": 0, "logprobs": 0}, sampling.LOGPROBS),
        ({"temperature": 0, "prompt_logprobs": 1}, sampling.LOGPROBS | sampling.TOP_LOGPROBS),
    ],
    ids=str,
)
def test_a_step_does_what_a_row_asks_for_and_no_more(params, bits):
    rows = SamplingRows(1, Uploads())
    rows.set(0, request(**params))
    assert rows.features_B[0] == bits
