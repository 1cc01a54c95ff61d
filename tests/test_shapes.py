"""Axis letters."""

import numpy as np
import pytest

from jaxinfer.errors import ShapeError
from jaxinfer.shapes import dims, letters


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("q_TKGH", "TKGH"),
        ("k_pages_PKSH", "PKSH"),
        ("scale", ""),
        ("num_tokens", ""),
        ("x_TD", "TD"),
    ],
)
def test_letters_are_the_capital_suffix(name, axes):
    assert letters(name) == axes


def test_dims_binds_and_compares():
    assert dims(x_TD=np.zeros((2, 3)), w_DF=np.zeros((3, 5))) == {"T": 2, "D": 3, "F": 5}
    with pytest.raises(ShapeError, match="w_DF has D=4, but x_TD has D=3"):
        dims(x_TD=np.zeros((2, 3)), w_DF=np.zeros((4, 5)))
    with pytest.raises(ShapeError, match="x_TD must have 2 axes"):
        dims(x_TD=np.zeros(3))
