"""Filters and draws against float64 arithmetic that sorts, and against transformers' processors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxinfer import distribution

B = 48
# One, fewer than a block, a whole one, more than two; more blocks than `top` looks into.
SIZES = (1, 100, 128, 300, 5003)
KINDS = ("normal", "ties", "few", "equal", "banned", "near zero", "huge")


def draw_scores(kind: str, size: int) -> np.ndarray:
    """Scores of one kind, [B, size] float32."""
    rng = np.random.default_rng(size)
    scores = rng.normal(0, 3, (B, size))
    if kind == "ties":
        scores = np.round(scores * 2) / 2
    elif kind == "few":  # hundreds of equals
        scores = np.sign(scores)
    elif kind == "equal":
        scores = np.repeat(scores[:, :1], size, axis=1)
    elif kind == "banned":
        scores[rng.random(scores.shape) < 0.7] = -np.inf
        scores[:, size // 2] = 1.0
    elif kind == "near zero":  # zeros of both signs, and scores that differ in their last bits
        scores = rng.choice([0.0, -0.0, 1e-7, -1e-7, 1.0, 1 + 2**-23, -5.0], scores.shape)
    elif kind == "huge":
        scores = np.clip(scores * 1e38, -3.4e38, 3.4e38)
    return scores.astype(np.float32)


def draw_filters(seed: int) -> dict[str, np.ndarray]:
    """Parameters of B rows, the extremes among them."""
    rng = np.random.default_rng(seed)
    return {
        "temperature_B": rng.choice([1e-30, 1e-3, 0.3, 1.0, 2.5, 100.0], B).astype(np.float32),
        "min_p_B": rng.choice([0, 0, 1e-30, 0.013, 0.27, 1.0], B).astype(np.float32),
        "top_k_B": rng.choice([0, 0, 1, 2, 7, 50, 127, 1000, 2**31 - 1], B).astype(np.int32),
        "top_p_B": rng.choice([1.0, 1.0, 1 - 2**-24, 0.9, 0.31, 1e-6, 1e-44], B).astype(np.float32),
    }


def survivors(scores, temperature, min_p, top_k, top_p, slack=0.0):
    """Token ids that the filters leave of one row, likeliest first; float64, by sorting.

    slack: how much more probability than asked for top-p may keep.
    """
    scores = scores.astype(np.float64)
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    probs = np.exp((ranked - ranked[0]) / temperature)
    keep = np.ones(len(order), bool)
    if min_p:
        keep &= probs >= (min_p if min_p == 1 else min_p * (1 - 1e-5))
    if 0 < top_k < len(order):
        keep &= ranked >= ranked[top_k - 1]
    order, probs = order[keep], probs[keep]
    if top_p < 1:
        share = np.cumsum(probs) / np.sum(probs)
        enough = np.searchsorted(share, top_p + slack)  # the first with at least this share
        order = order[: enough + 1]
    return order


masses = jax.jit(distribution.masses)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_filters_keep_the_exact_set(size, kind):
    scores, filters = draw_scores(kind, size), draw_filters(size)
    got = np.asarray(masses(scores, filtered=True, **filters))
    for row, values in enumerate(zip(*filters.values(), strict=True)):
        values = [value.item() for value in values]
        least = survivors(scores[row], *values, slack=-1e-5)
        most = survivors(scores[row], *values, slack=1e-5)
        peak = scores[row].max().astype(np.float64)
        wide = np.exp((scores[row].astype(np.float64) - peak) / values[0])
        seen = wide > 1e-30  # what float32 can tell from nothing
        kept = got[row] > 0
        # A prefix of the order, not shorter than `least` and not longer than `most`.
        assert kept[least][seen[least]].all(), (row, values)
        assert not np.delete(kept, most).any(), (row, values)
        between = kept[most][seen[most]]
        assert (np.diff(between.astype(int)) <= 0).all(), (row, values)
        np.testing.assert_allclose(got[row][kept & seen], wide[kept & seen], rtol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_a_row_without_filters_is_untouched_by_others(size):
    scores, filters = draw_scores("normal", size), draw_filters(7)
    for name, value in (("min_p_B", 0), ("top_k_B", 0), ("top_p_B", 1)):
        filters[name][::2] = value
    together = np.asarray(masses(scores, filtered=True, **filters))[::2]
    np.testing.assert_array_equal(together, masses(scores, filtered=False, **filters)[::2])
    assert (together[filters["temperature_B"][::2] >= 1] > 0).all()


NEUTRAL = {"temperature": 1.0, "min_p": 0.0, "top_k": 0, "top_p": 1.0}


@pytest.mark.parametrize("name", NEUTRAL)
@pytest.mark.parametrize("way", ["alone", "pipeline"])
def test_transformers_keeps_the_same_tokens(fixtures, way, name):
    data = np.load(fixtures / "sampling.npz")
    logits = data["logits"]
    names = [name]
    if way == "pipeline":  # the penalty came first, and then each filter before this one
        penalised = data["pipeline_repetition_penalty_probs"]
        with np.errstate(divide="ignore"):
            logits = np.log(penalised)
        names = list(NEUTRAL)[: list(NEUTRAL).index(name) + 1]
    filters = {f"{each}_B": data[each] if each in names else np.full_like(data[each], NEUTRAL[each])
               for each in NEUTRAL}  # fmt: skip
    got = np.array(masses(logits, filtered=True, **filters))
    got /= got.sum(axis=1, keepdims=True)
    want, mask = data[f"{way}_{name}_probs"], data[f"{way}_{name}_mask"]
    tied = data[f"tied_{way}"] if name == "top_p" else np.zeros(len(want), bool)
    assert not (got[~tied] > 0)[~mask[~tied]].any()
    assert (got[~tied] > 0)[want[~tied] > 1e-30].all()
    # Which of equal tokens survive is the sort's choice there, but not how many.
    got[tied], want[tied] = np.sort(got[tied]), np.sort(want[tied])
    assert ((got > 0).sum(1) == mask.sum(1))[tied].all()
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_largest_entries_are_numpys(size, kind):
    scores = draw_scores(kind, size)
    np.testing.assert_array_equal(jax.jit(distribution.argmax)(scores), scores.argmax(1))
    columns = jax.jit(distribution.argmax_of_columns)(scores.T)
    assert columns.dtype == np.int32
    np.testing.assert_array_equal(columns, scores.argmax(1))
    count = min(20, size)
    scores += 0.0  # lax.top_k sorts -0 below 0
    values, ids = jax.jit(distribution.top, static_argnums=1)(scores, count)
    want = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    np.testing.assert_array_equal(ids, want)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(values, np.take_along_axis(scores, want, 1))


def test_rows_of_nothing_end_in_a_token_that_exists():
    scores = np.random.default_rng(0).normal(0, 3, (B, 300)).astype(np.float32)
    scores[0::4] = -np.inf
    scores[1::4] = np.nan
    scores[2::4, 7:90] = np.nan
    scores[3::4, 7:90] = np.inf
    assert set(np.asarray(distribution.argmax(scores[0::4])).tolist()) == {0}
    found = np.asarray(distribution.argmax_of_columns(scores.T))
    assert set(found[0::4].tolist()) == {0}
    assert ((found >= 0) & (found < 300)).all()
    mass = masses(scores, filtered=True, **draw_filters(3))
    for share in (0, 0.5, 1 - 2**-24):
        picked = np.asarray(distribution.pick(mass, np.full(B, share, np.float32)))
        assert ((picked >= 0) & (picked < 300)).all()


@pytest.mark.parametrize("size", SIZES)
def test_pick_inverts_the_running_sum(size):
    rng = np.random.default_rng(size)
    weights = np.exp(rng.normal(0, 4, (B, size))) * (rng.random((B, size)) < 0.3)
    weights[np.arange(B), rng.integers(0, size, B)] += 1e-3
    weights = weights.astype(np.float32)
    shares = np.float32(rng.choice([0, 1e-7, 0.5, 0.9, 1 - 2**-24, *rng.random(9)], B))
    picked = np.asarray(jax.jit(distribution.pick)(weights, shares))
    sums = np.cumsum(weights.astype(np.float64), axis=1)
    at = np.arange(B), picked
    assert (weights[at] > 0).all()
    # Sums of 5,000 float32 in blocks are good to about 1e-6 of their value.
    assert (sums[at] >= (shares - 1e-6) * sums[:, -1]).all()
    assert (sums[at] - weights[at] <= (shares + 1e-6) * sums[:, -1]).all()


def test_pick_finds_a_lone_token_anywhere():
    size = 300
    weights = np.eye(size, dtype=np.float32)
    for share in (0.0, 0.7, 1 - 2**-24):
        picked = distribution.pick(weights, np.full(size, share, np.float32))
        np.testing.assert_array_equal(picked, np.arange(size))


@pytest.mark.parametrize("size", [5, 300, 5003])
def test_picks_follow_the_weights(size):
    rng = np.random.default_rng(1)
    weights = np.exp(rng.normal(0, 2, size)).astype(np.float32)
    weights[3::7] = 0
    count = 20_000
    pick = jax.jit(lambda shares: distribution.pick(
        jnp.broadcast_to(weights, (500, size)), shares))  # fmt: skip
    shares = rng.random((count // 500, 500), np.float32)
    found = np.bincount(np.concatenate([pick(row) for row in shares]), minlength=size)
    assert (found[weights == 0] == 0).all()
    assert chi_square(found, weights.astype(np.float64) / weights.sum()) > 1e-3


def chi_square(found: np.ndarray, probs: np.ndarray) -> float:
    """The p-value of counts under probabilities; what is expected less than 8 times is one bin."""
    expected = probs * found.sum()
    rare = expected < 8
    found = np.append(found[~rare], found[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] < 8:
        assert found[-1] < 40
        found, expected = found[:-1], expected[:-1]
    return stats.chisquare(found, expected * found.sum() / expected.sum()).pvalue
