"""Marks of tests that not every version can run."""

import jax
import pytest

from jaxinfer.kernels.choice import GPU_NEEDS_JAX

NEEDS_MOSAIC_GPU = pytest.mark.skipif(
    jax.__version_info__ < GPU_NEEDS_JAX, reason="this jax has no Mosaic GPU to speak of"
)
