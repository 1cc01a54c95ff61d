"""One alphabet of axis letters, used in names, in einsum and in shardings.

| letter | axis                              | letter | axis                                   |
|--------|-----------------------------------|--------|----------------------------------------|
| B      | rows (requests in the step)       | P      | pages in the pool                      |
| T      | tokens of the step, end to end    | S      | slots in a page                        |
| L      | layers                            | M      | pages in a row's table                 |
| D      | model width                       | C      | candidates (top logprobs, drafts)      |
| N      | query heads                       | R      | adapter or latent rank                 |
| K      | key/value heads                   | Q      | query positions in a tile              |
| G      | query heads per KV head           | U      | fused QKV group: G queries, key, value |
| H      | head width                        | W      | fused pair: gate and up                |
| F      | feed-forward width                | E      | experts                                |
| V      | vocabulary                        | X      | experts chosen per token               |

A name's last underscore is followed by one capital per axis: `q_TKGH` has four axes.  Scalars and
opaque values have no suffix.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from jaxinfer.errors import ShapeError

# A leaf of a pytree that crosses the border of compiled code: a jax array inside, on the host a
# NumPy array on its way there, and a `jax.ShapeDtypeStruct` while programs are compiled.
Leaf: TypeAlias = Any

LETTERS = frozenset("BTLDNKGHFVEXPSMCRQUW")


def letters(name: str) -> str:
    """The axis letters of an array's name: `letters("q_TKGH") == "TKGH"`; "" for a scalar's."""
    stem, _, suffix = name.rpartition("_")
    return suffix if stem and suffix and set(suffix) <= LETTERS else ""


def dims(**arrays: Any) -> dict[str, int]:
    """Bind axis letters to sizes: `dims(q_TKGH=q, k_pages_PKSH=k)["K"]`.

    Raises `ShapeError` at trace time if an array's rank does not match its name or if two arrays
    disagree about a letter.
    """
    sizes: dict[str, int] = {}
    owner: dict[str, str] = {}
    for name, array in arrays.items():
        axes = letters(name)
        if len(axes) != len(array.shape):
            raise ShapeError(f"{name} must have {len(axes)} axes {axes!r}, got {array.shape}")
        for letter, size in zip(axes, array.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ShapeError(
                    f"{name} has {letter}={size}, but {owner[letter]} has {letter}={sizes[letter]}"
                )
            owner.setdefault(letter, name)
    return sizes
