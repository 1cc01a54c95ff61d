"""Operations with a contract, a reference in plain JAX, and kernels for TPU and GPU beside it."""
