"""Products of a model on the GPU at hand: bfloat16 beside a quantised format, and in company.

    python -m tests.kernels.products_on_gpu                             # fp8, 4,096 tokens
    python -m tests.kernels.products_on_gpu --format int8 --tokens 64
    python -m tests.kernels.products_on_gpu --tokens 8 --shrink 64      # anywhere: does it run?

A line for each program: its time, its rate, the share of what a large square product of the same
numbers reaches just before, and what it was compiled to.  The shapes are those of Llama-3.1-8B.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxinfer.aot.hlo import parse
from jaxinfer.aot.report import read
from jaxinfer.configs import find_chip
from jaxinfer.kernels import cases, timing, workloads
from jaxinfer.kernels.choice import gpu_refusal
from jaxinfer.kernels.quantized import Quantized, quantize, quantize_activations
from jaxinfer.kernels.quantized_matmul import quantized_matmul
from jaxinfer.kernels.xla_options import compiler_options
from jaxinfer.layers import linear, rms_norm

LAYERS = 4  # of the chain
SQUARE = {"gpu": 8192, "cpu": 256}


def arrays(name: str, num_tokens: int, sizes: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """Of each product the tokens, the weight [F, D] and the quantised one [D, F], made by one
    program."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def make() -> dict[str, Any]:
        def uniform(*shape: int) -> Array:
            nonlocal key  # numbers of a counter: threefry would take seconds to compile
            key, one = jax.random.split(key)
            return jax.random.uniform(one, shape, jnp.bfloat16, -1.0, 1.0)

        key = jax.random.key(0, impl="rbg")
        found = {}
        for product, (D, F) in sizes.items():
            weight_FD = uniform(F, D) * D**-0.5
            found[product] = uniform(num_tokens, D), weight_FD, quantize(weight_FD.T, name)
        return found

    def place(leaf: Any) -> Any:
        return workloads.weight_formats(leaf) if isinstance(leaf, Quantized) else here

    places = jax.tree.map(
        place, jax.eval_shape(make), is_leaf=lambda leaf: isinstance(leaf, Quantized)
    )
    return jax.block_until_ready(jax.jit(make, out_shardings=places)())


def product(x: Array, values_DF: Array) -> Array:
    """The product that `quantized_matmul` has inside on a GPU, before it is scaled."""
    sums = jnp.int32 if x.dtype == jnp.int8 else jnp.bfloat16
    return jnp.dot(x, values_DF, preferred_element_type=sums)


def square(left: Array, right_FD: Array) -> Array:
    sums = jnp.int32 if left.dtype == jnp.int8 else jnp.bfloat16
    contract = (((1,), (1,)), ((), ()))
    return lax.dot_general(left, right_FD, contract, preferred_element_type=sums)


def feed_forward(multiply: Callable[..., Array], x_TD: Array, gate_up: Any, down: Any) -> Array:
    """Layers as the model has them, all of the same weights."""
    scale_D = jnp.ones(x_TD.shape[1], x_TD.dtype)
    for _ in range(LAYERS):
        normed_TD = rms_norm(x_TD, scale_D[None], 1e-5)
        gate_TF, up_TF = jnp.split(multiply(normed_TD, gate_up), 2, axis=1)
        x_TD = x_TD + multiply(jax.nn.silu(gate_TF) * up_TF, down)
    return x_TD


def feed_forward_in_one_pass(
    quantize_first: Callable[..., Any], x_TD: Array, gate_up: Quantized, down: Quantized
) -> Array:
    """The same layers with a kernel between the two products; `quantize_first`: of activations,
    before the first."""
    from jaxinfer.kernels.quantize_gpu import gated_quantize

    scale_D = jnp.ones(x_TD.shape[1], x_TD.dtype)
    for _ in range(LAYERS):
        x, scale_T1 = quantize_first(rms_norm(x_TD, scale_D[None], 1e-5), gate_up.format)
        sums_TWF = product(x, gate_up.values).reshape(len(x), 2, -1)
        scale_WF = gate_up.scales.reshape(2, -1)
        hidden, scale_T1 = gated_quantize(
            sums_TWF, scale_T1, scale_WF, activation="silu", name=down.format
        )
        out_TD = product(hidden, down.values).astype(jnp.float32) * scale_T1 * down.scales
        x_TD = x_TD + out_TD.astype(x_TD.dtype)
    return x_TD


def with_kernels() -> Callable[..., Array] | None:
    """`quantized_matmul` with this GPU's kernel; None where there is no such GPU."""
    chip = find_chip(jax.devices()[0].device_kind)
    if gpu_refusal(chip):
        return None
    assert chip is not None
    from jaxinfer.kernels import quantized_matmul_gpu
    from jaxinfer.kernels.gpu import Gpu

    return partial(quantized_matmul_gpu.quantized_matmul, gpu=Gpu.of(chip))


def made_of(text: str) -> str:
    """How many of what a compiled program runs: products of libraries and fusions, other fusions,
    copies."""
    module, found = parse(text), Counter[str]()
    for times, _, one in module.executed():
        if one.target:
            found[one.target] += times
        elif one.opcode == "fusion":
            inner = module.computations[one.called("calls") or ""].instructions.values()
            dots = any(part.opcode == "dot" for part in inner)
            found["Triton product" if dots or "gemm" in one.name else "fusion"] += times
    found["copy"] += sum(copy.count for copy in read(text)["copies"])
    return ", ".join(f"{count} {kind}" for kind, count in found.items() if count)


def compiled(function: Callable[..., Any], *args: Any) -> Any:
    """As the engine compiles a step of so many tokens."""
    options: Any = compiler_options(jax.default_backend(), len(args[0]))
    return jax.jit(function).lower(*args).compile(compiler_options=options)


def measure(
    words: str, function: Callable[..., Any], *args: Any, flops: float, ceiling: float
) -> Any:
    """Print a line; returns the result."""
    call = compiled(function, *args)
    result = call(*args)
    seconds = timing.seconds_per_call(lambda _: call(*args))
    rate = flops / seconds
    print(
        f"{words:28} {1e6 * seconds:9.1f} us {rate / 1e12:8.1f} TFLOP/s {rate / ceiling:6.1%}  "
        f"{made_of(call.as_text())}",
        flush=True,
    )
    return result


def squares(n: int, weight: Array, values: Array) -> Callable[[], tuple[float, float]]:
    """A function that says at which rate products of two `[n, n]` matrices run now, of a weight's
    numbers and of its quantised values': how fast a chip may run depends on how warm it is."""
    bigs = [jax.jit(lambda w: jnp.resize(w.ravel(), (n, n)))(w) for w in (weight, values)]
    calls = [compiled(square, big, big) for big in bigs]

    def rates() -> tuple[float, float]:
        wide, narrow = (
            2 * n**3 / timing.seconds_per_call(lambda _, call=call, big=big: call(big, big))
            for call, big in zip(calls, bigs, strict=True)
        )
        print(
            f"square products of {n}: {weight.dtype.name} {wide / 1e12:.1f}, {values.dtype.name} "
            f"{narrow / 1e12:.1f} TFLOP/s",
            flush=True,
        )
        return wide, narrow

    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", choices=("fp8", "int8"), default="fp8")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--shrink", type=int, default=1, help="divide D and F by this")
    parser.add_argument("--only", nargs="+", choices=(*cases.LAYER, "chain"))
    args = parser.parse_args()
    platform, name, T = jax.default_backend(), args.format, args.tokens
    kernels = with_kernels()
    sizes = {key: (D // args.shrink, F // args.shrink) for key, (D, F) in cases.LAYER.items()}
    print(jax.devices()[0].device_kind, f"jax {jax.__version__}", flush=True)
    made = arrays(name, T, sizes)
    _, weight_FD, weight = made["gate_up"]
    ceilings = squares(SQUARE.get(platform, 8192), weight_FD, weight.values)
    ceilings()  # a chip that has rested
    for key, (D, F) in sizes.items():
        if key not in (args.only or sizes):
            continue
        x_TD, weight_FD, weight = made[key]
        wide, narrow = ceilings()
        show = partial(measure, flops=2 * T * D * F)
        want = show(f"{key} {D}x{F}, bfloat16", linear, x_TD, weight_FD, ceiling=wide)
        for words, multiply in (("by XLA", quantized_matmul), ("whole", kernels)):
            if multiply is not None:
                label = f"{key} {D}x{F}, {name} {words}"
                found = show(label, multiply, x_TD, weight, ceiling=narrow)
                far = workloads.difference(found, want)
                print(f"    differs from bfloat16 by {far:.2%} of the largest", flush=True)
        x, _ = jax.jit(partial(quantize_activations, name=name))(x_TD)
        show(f"{key} {D}x{F}, {name} product", product, x, weight.values, ceiling=narrow)
    if "chain" in (args.only or ["chain"]):
        show = partial(
            measure,
            flops=LAYERS * 2 * T * sum(D * F for D, F in (sizes["gate_up"], sizes["down"])),
        )
        x_TD = made["out"][0]
        wide, narrow = ceilings()
        for words, multiply, which, ceiling in (
            ("bfloat16", linear, 1, wide), (name, quantized_matmul, 2, narrow)
        ):  # fmt: skip
            weights = made["gate_up"][which], made["down"][which]
            chain = partial(feed_forward, multiply)
            label = f"feed-forward x{LAYERS}, {words}"
            want = show(label, chain, x_TD, *weights, ceiling=ceiling)
        if kernels is not None:
            from jaxinfer.kernels import quantize_gpu

            for words, first in (
                ("a kernel between", quantize_activations),
                ("kernels for both", quantize_gpu.quantize_activations),
            ):
                chain = partial(feed_forward_in_one_pass, first)
                found = show(f"… {name}, {words}", chain, x_TD, *weights, ceiling=narrow)
                far = workloads.difference(found, want)
                print(f"    differs from {name} above by {far:.2%} of the largest", flush=True)


if __name__ == "__main__":
    main()
