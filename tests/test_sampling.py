"""The sampler against float64 arithmetic, feature by feature, together, and by distribution."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxinfer import sampling
from jaxinfer.request import Request, SamplingParams
from jaxinfer.sampling import SamplingRows

V, WIDTH = 300, 1100  # more than two chunks of history
SLOTS = 24
sample, adjust = jax.jit(sampling.sample), jax.jit(sampling.adjust)


@dataclasses.dataclass
class Case:
    """A row of a step: the request, its tokens so far, the logits after the last of them."""

    request: Request
    tokens: list[int]
    logits: np.ndarray
    target: int = -1


def case(number=0, tokens=(), prompt_len=None, logits=None, target=-1, index=0, eos=(), **params):
    """A row with logits of its own; tokens from `prompt_len` on are output.  `params`: sampling."""
    rng = np.random.default_rng(number)
    tokens = list(tokens) or rng.integers(0, V, rng.integers(1, 90)).tolist()
    prompt_len = len(tokens) if prompt_len is None else prompt_len
    if logits is None:
        logits = rng.normal(0, 3, V)
    params = SamplingParams(**{"max_tokens": None, "seed": number, **params})
    request = Request(
        request_id="x", index=index, params=params, seed=params.seed or 0, limit=WIDTH,
        prompt_token_ids=np.array((tokens + [0] * prompt_len)[:prompt_len], np.int32),
        stop_ids=(*eos, *params.stop_token_ids), select_from=0,
        bad_words=tuple(tuple(word) for word in params.bad_words_token_ids),
    )  # fmt: skip
    return Case(request, tokens, np.asarray(logits, np.float32), target)


def arguments(cases, slots=None, features=None):
    """What `sample` takes for these rows; what no row may look at is filled with other tokens."""
    rng = np.random.default_rng(len(cases))
    rows = SamplingRows(SLOTS + 1, jnp.asarray)
    slots = range(len(cases)) if slots is None else slots
    history = rng.integers(0, V, (SLOTS + 1, WIDTH)).astype(np.int32)
    history[:, -8:] = 3  # what indices below 0 would find
    for slot, each in zip(slots, cases, strict=True):
        rows.set(slot, each.request)
        history[slot, : len(each.tokens)] = each.tokens
    slots = np.array(slots, np.int32)
    bits = np.bitwise_or.reduce(rows.features_B[slots])
    return (
        np.stack([each.logits for each in cases]),
        history,
        rows.table(),
        slots,
        np.array([len(each.tokens) - 1 for each in cases], np.int32),
        np.array([each.target for each in cases], np.int32),
        np.int32(bits if features is None else features),
    )


def run(cases, slots=None, features=None, rows=SLOTS):
    """`sample` of the cases, with rows of padding up to a size that is compiled once."""
    logits, history, table, *others, features = arguments(cases, slots, features)
    pad = rows - len(cases)
    others = [np.pad(each, (0, pad), constant_values=fill) for each, fill in
              zip(others, (SLOTS, 0, 0), strict=True)]  # fmt: skip
    nans = np.full((pad, logits.shape[1]), np.nan, np.float32)  # padding may hold anything
    result = sample(np.concatenate([logits, nans]).T, history, table, *others, features)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[: len(cases)], result)


def adjusted(each: Case) -> np.ndarray:
    """The scores by the definitions in `SamplingParams`, float64."""
    params, tokens = each.request.params, each.tokens
    scores = each.logits.astype(np.float64)
    for token, bias in (params.logit_bias or {}).items():
        scores[token] += bias
    if len(tokens) < each.request.prompt_len + params.min_tokens:
        scores[list(each.request.stop_ids)] = -np.inf
    for *begin, last in each.request.bad_words:
        if len(begin) <= len(tokens) and tokens[len(tokens) - len(begin) :] == begin:
            scores[last] = -np.inf
    factor = params.repetition_penalty
    for token in set(tokens):
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    for token, count in Counter(tokens[each.request.prompt_len :]).items():
        scores[token] -= params.presence_penalty + count * params.frequency_penalty
    return scores


def mixed_cases() -> list[Case]:
    """Each feature alone and with others, prompts and outputs of all lengths."""
    rng = np.random.default_rng(8)
    long = rng.integers(0, 40, 1060).tolist()  # much repetition, over several chunks
    bias = {int(token): float(rng.normal(0, 9)) for token in rng.choice(V, 300, replace=False)}
    words = [[5], [7, 8, 9], [9], [3] * 8, [1, 2], [*long[-3:], 44], [*long[-7:], 45]]
    return [
        case(1, temperature=0),
        case(2, temperature=0, logit_bias={0: 5.5, V - 1: -1e9, 17: 1e9}),
        case(3, temperature=0, logit_bias=bias),
        case(4, long, 1000, temperature=0, repetition_penalty=1.7),
        case(5, long, 1060, temperature=0, repetition_penalty=0.6),
        case(6, long, 13, temperature=0, presence_penalty=1.5),
        case(7, long, 520, temperature=0, presence_penalty=-2, frequency_penalty=0.25),
        case(8, long, 1, temperature=0, frequency_penalty=-0.1, repetition_penalty=1.2),
        case(9, [4, 3, 9], 3, temperature=0, repetition_penalty=100, presence_penalty=100),
        case(10, long, 1000, temperature=0, bad_words_token_ids=words),
        case(11, [7, 8], 2, temperature=0, bad_words_token_ids=words),  # words longer than it
        case(12, [3] * 7, 4, temperature=0, bad_words_token_ids=words),
        case(13, [3] * 6, 4, temperature=0, bad_words_token_ids=words),
        case(14, [1], 1, temperature=0, bad_words_token_ids=[[w] for w in range(64)]),
        case(15, [1] * 9, 5, temperature=0, min_tokens=5, stop_token_ids=[3, 4], eos=(2,)),
        case(16, [1] * 9, 5, temperature=0, min_tokens=4, stop_token_ids=[3, 4], eos=(2,)),
        case(
            17, [1] * 5, 5, temperature=0, min_tokens=1, stop_token_ids=range(16),
            eos=range(16, 32),
        ),
        case(18, [1] * 5, 5, temperature=0, stop_token_ids=[7], eos=(8,)),
        case(
            19, long, 700, temperature=0, repetition_penalty=1.3, presence_penalty=0.5,
            frequency_penalty=0.5, logit_bias=bias, bad_words_token_ids=words, min_tokens=361,
            stop_token_ids=[6], eos=(2, 11),
        ),
    ]  # fmt: skip


def test_scores_are_adjusted_as_documented():
    cases = mixed_cases()
    logits, history, table, slots, positions, _, features = arguments(cases)
    row = jax.tree.map(lambda leaf: leaf[slots], table)
    got = adjust(logits, history, row, slots, positions, features)
    want = np.stack([adjusted(each) for each in cases])
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-4)
    banned = np.isneginf(want).sum(axis=1)
    assert (banned > 0).sum() > 5, "the cases must ban something"
    np.testing.assert_array_equal(run(cases).tokens_B, want.argmax(axis=1))


def test_a_history_that_fills_its_row_to_the_end():
    tokens = np.random.default_rng(0).integers(0, V, WIDTH).tolist()
    full = case(1, tokens, 1000, temperature=0, frequency_penalty=2, repetition_penalty=1.5)
    assert run([full]).tokens_B[0] == adjusted(full).argmax()


def test_penalties_are_those_of_transformers(fixtures):
    data = np.load(fixtures / "sampling.npz")
    cases = []
    for logits, prompt, output, penalty in zip(
        data["logits"], data["prompt"], data["output"], data["repetition_penalty"], strict=True
    ):
        prompt, output = prompt[prompt >= 0].tolist(), output[output >= 0].tolist()
        cases.append(case(0, prompt + output, len(prompt), logits, temperature=0,
                          repetition_penalty=float(penalty)))  # fmt: skip
    logits, history, table, slots, positions, _, features = arguments(cases)
    row = jax.tree.map(lambda leaf: leaf[slots], table)
    got = np.asarray(adjust(logits, history, row, slots, positions, features))
    want = data["alone_repetition_penalty_probs"]
    np.testing.assert_allclose(jax.nn.softmax(got), want, rtol=1e-4, atol=1e-9)
    np.testing.assert_array_equal(np.isfinite(got), data["alone_repetition_penalty_mask"])


def test_logprobs_and_ranks_are_of_the_models_own_distribution():
    cases = [
        case(1, temperature=0, logprobs=20),
        case(2, temperature=0, logprobs=0, logit_bias={9: 100}),
        case(3, seed=5, logprobs=3, top_k=1, repetition_penalty=1.9),
        case(4, logprobs=5, target=123, temperature=0),
        case(5, prompt_logprobs=2, target=0),
        case(6, logits=np.zeros(V), prompt_logprobs=2, target=7),  # all are tied for rank 1
        case(7, logits=np.arange(V) * 40.0, temperature=0, logprobs=1, target=0),
        case(8, temperature=0),  # asks for none
    ]
    got = run(cases)
    for each, token, logprob, rank, ids, values in zip(
        cases, got.tokens_B, got.logprobs_B, got.ranks_B, got.top_ids_BC, got.top_logprobs_BC,
        strict=True,
    ):  # fmt: skip
        raw = each.logits.astype(np.float64)
        want = raw - raw.max() - np.log(np.exp(raw - raw.max()).sum())
        assert logprob == pytest.approx(want[token], rel=1e-5, abs=1e-5)
        assert rank == 1 + (raw > raw[token]).sum()
        best = np.argsort(-raw, kind="stable")[:20]
        np.testing.assert_array_equal(ids, best)
        np.testing.assert_allclose(values, want[best], rtol=1e-5, atol=1e-5)
    assert got.tokens_B[[1, 3, 4, 5, 6]].tolist() == [9, 123, 0, 7, 0]


def test_ranks_tell_scores_apart_that_round_to_one_logprob():
    logits = np.full((1, 4), 0, np.float32) + np.float32([[3e-8, 1e-8, 2e-8, 30]])
    for target, rank in enumerate([2, 4, 3, 1]):
        got = run([case(1, [0], logits=logits[0], target=target, logprobs=4)])
        assert got.ranks_B[0] == rank
        assert got.top_ids_BC[0, :4].tolist() == [3, 0, 2, 1]


def test_a_small_vocabulary_has_fewer_candidates_than_places():
    got = run([case(1, [0], logits=[0.5, 1.5], logprobs=20, temperature=0)])
    assert got.top_ids_BC[0, :2].tolist() == [1, 0]
    assert np.isneginf(got.top_logprobs_BC[0, 2:]).all()
    single = run([case(1, [0], logits=[2.5], logprobs=1, temperature=0.7, top_p=0.5)])
    assert (single.tokens_B[0], single.logprobs_B[0], single.ranks_B[0]) == (0, 0, 1)


def test_what_nobody_asked_for_is_zeros():
    got = run([case(1, temperature=0), case(2, top_k=5), case(3, target=4)])
    for name in ("logprobs_B", "ranks_B", "top_ids_BC", "top_logprobs_BC"):
        assert not getattr(got, name).any(), name
    chosen_only = run([case(1, temperature=0, logprobs=0)])
    assert chosen_only.logprobs_B[0] < 0
    assert not chosen_only.top_ids_BC.any()
    assert not chosen_only.top_logprobs_BC.any()


def test_targets_are_scored_not_chosen():
    got = run([case(1, target=0), case(1, target=V - 1, temperature=0), case(1, temperature=0)])
    assert got.tokens_B[:2].tolist() == [0, V - 1]
    assert got.tokens_B[2] == case(1).logits.argmax()


def test_extremes_choose_what_they_must():
    best = case(1).logits.argmax()
    for params in (
        {"top_k": 1}, {"top_p": 1e-6}, {"top_p": 1e-50}, {"min_p": 1.0}, {"temperature": 1e-9},
        {"temperature": 1e-50}, {"top_k": 1, "top_p": 0.9999, "min_p": 0.3, "temperature": 100},
    ):  # fmt: skip
        cases = [case(1, seed=seed, **params) for seed in range(20)]
        assert set(run(cases).tokens_B.tolist()) == {best}, params
    huge = np.full(V, -3e38)
    huge[[4, 250]] = 3e38
    cases = [case(1, seed=seed, logits=huge, temperature=0.5, top_p=0.9) for seed in range(20)]
    assert set(run(cases).tokens_B.tolist()) == {4, 250}


def test_a_row_where_all_is_forbidden_gives_a_token_that_exists():
    for params in ({"temperature": 0}, {"top_p": 0.5}, {}):
        everything = [case(1, [0], logits=[1.0, 2.0], bad_words_token_ids=[[0], [1]], **params)]
        assert run(everything).tokens_B[0] in (0, 1)


def various_cases() -> list[Case]:
    """One row for each feature and combination, all of which draw."""
    return [
        case(1), case(2, temperature=0.3), case(3, top_k=7), case(4, top_p=0.6),
        case(5, min_p=0.1, temperature=2), case(6, temperature=0),
        case(7, prompt_len=1, repetition_penalty=1.4, top_k=40, top_p=0.9),
        case(8, prompt_len=1, frequency_penalty=0.7), case(9, logit_bias={3: 4.0}, logprobs=5),
        case(10, bad_words_token_ids=[[1], [2, 3]], top_p=0.8), case(11, target=5, logprobs=1),
        case(12, prompt_len=1, min_tokens=100, eos=(2,)), case(13, seed=2**64 - 1, index=3),
    ]  # fmt: skip


def test_company_rows_and_slots_do_not_matter():
    cases = various_cases()
    alone = [run([each], slots=[3], rows=1) for each in cases]
    want = np.array([one.tokens_B[0] for one in alone])
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(run(cases, features=255).tokens_B, want)
    for rows in (7, 24):
        which = rng.choice(len(cases), rows)
        slots = rng.permutation(SLOTS)[:rows]
        got = run([cases[each] for each in which], slots, rows=rows)
        np.testing.assert_array_equal(got.tokens_B, want[which])
        for each, logprob in zip(which, got.logprobs_B, strict=True):
            if cases[each].request.params.logprobs is not None:
                assert logprob == pytest.approx(alone[each].logprobs_B[0], abs=1e-5)


def draws(count, logits, vary="position", **params) -> np.ndarray:
    """Tokens of one request at `count` positions, or of `count` seeds or samples at one."""
    fields = {"seed": 11, "index": 0, **params}
    rows = SamplingRows(count if vary != "position" else 1, jnp.asarray)
    for slot in range(len(rows.features_B)):
        fields |= {} if vary == "position" else {vary: fields[vary] + 1}
        rows.set(slot, case(1, [0], **fields).request)
    slots = np.arange(count, dtype=np.int32) if vary != "position" else np.zeros(count, np.int32)
    positions = np.arange(count, dtype=np.int32) if vary == "position" else np.full(count, 9)
    result = sample(
        jnp.broadcast_to(jnp.asarray(logits, jnp.float32)[:, None], (len(logits), count)),
        np.zeros((len(rows.features_B), count + 1), np.int32), rows.table(), slots,
        positions.astype(np.int32), np.full(count, -1, np.int32),
        np.bitwise_or.reduce(rows.features_B),
    )  # fmt: skip
    return np.asarray(result.tokens_B)


@pytest.mark.parametrize("vary", ["position", "seed", "index"])
@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 1.7}, {"top_k": 9}, {"top_p": 0.8}, {"min_p": 0.08},
     {"top_k": 40, "top_p": 0.9, "temperature": 0.8}, {"logit_bias": {7: 2.5, 150: -9}}],
    ids=str,
)  # fmt: skip
def test_draws_follow_the_distribution(params, vary):
    logits = np.random.default_rng(3).normal(0, 1.5, 200).astype(np.float32)
    biased = case(1, [0], logits=logits, **params)
    scores = adjusted(biased) / biased.request.params.temperature
    probs = np.exp(scores - scores.max())
    order = np.argsort(-probs)
    keep = np.ones(200, bool)
    keep[order[params.get("top_k", 200) :]] = False
    keep &= probs >= params.get("min_p", 0)
    share = np.cumsum(probs[order] * keep[order]) / probs[keep].sum()
    keep[order[1:][share[:-1] >= params.get("top_p", 1)]] = False
    probs = np.where(keep, probs, 0) / probs[keep].sum()
    count = 3000
    found = np.bincount(draws(count, logits, vary, **params), minlength=200)
    assert not found[~keep].any()
    common = probs * count >= 8
    found = np.append(found[common], found[~common].sum())
    expected = np.append(probs[common], probs[~common].sum()) * count
    assert expected[-1] > 8 or not found[-1] > 20
    few = slice(None if expected[-1] > 8 else -1)
    scale = found[few].sum() / expected[few].sum()
    assert stats.chisquare(found[few], expected[few] * scale).pvalue > 1e-3


def test_seeds_samples_and_positions_have_streams_of_their_own():
    flat = np.zeros(200)
    streams = [
        draws(3000, flat, seed=seed, index=index)
        for seed in (0, 1, 2**32, 2**32 + 1, 2**63)
        for index in (0, 1, 2)
    ]
    np.testing.assert_array_equal(streams[4], draws(3000, flat, seed=1, index=1))
    for number, one in enumerate(streams):
        for other in streams[:number]:
            assert (one == other).mean() < 0.02  # by chance one in 200
            # Nor is it the other one shifted, as it would be if seed and position were added.
            assert (one[1:] == other[:-1]).mean() < 0.02
            assert (one[:-1] == other[1:]).mean() < 0.02
        assert abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < 0.1
