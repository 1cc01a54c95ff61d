"""One step on the device: `(weights, state, batch) → (state, results)`.

`Step` is the table of compiled programs.  A step calls at most two of them, the backbone (one per
number of tokens) and head with sampler (one per number of rows), so bucket counts add and do not
multiply.  All are compiled before the first request; a shape that was not is an error.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax
from jax.sharding import Mesh
from jax.stages import Lowered
from tqdm import tqdm

from jaxinfer import cache, shardings
from jaxinfer.batch import Batch, Buckets, Inputs, Selection, inputs_layout, selection_shapes
from jaxinfer.cache import Cache
from jaxinfer.config import ModelConfig
from jaxinfer.kernels.choice import PageOps
from jaxinfer.kernels.xla_options import compiler_options
from jaxinfer.models import decoder
from jaxinfer.sampling import Sampled, SamplingTable, sample, sampled_layout
from jaxinfer.scheduler import Limits
from jaxinfer.shapes import Leaf

logger = logging.getLogger(__name__)


@struct.dataclass
class State:
    """What one program leaves to the next; donated, so an old state cannot be used again.

    history_BT: the token ids of each slot's sequence by position: the prompt from its admission on,
    then each sampled token, which the next step finds here before the host has seen it.  The last
    row takes what belongs to padding.
    hidden_BD: hidden states that the head reads, as many as a step may have; those beyond the
    backbone's are of an earlier step.  selection: whose they are.
    """

    cache: Cache
    history_BT: Leaf
    hidden_BD: Leaf
    selection: Selection


@struct.dataclass
class Results:
    """What a step sampled: `Sampled` for so many rows, as one array still on the device."""

    joined: Array
    num_rows: int = struct.field(pytree_node=False)

    def read(self) -> Sampled:
        """On the host; waits for the step."""
        return sampled_layout(self.num_rows).split(np.asarray(self.joined))


def backbone(
    weights: dict[str, Any],
    state: State,
    inputs: Inputs,
    *,
    config: ModelConfig,
    ops: PageOps,
) -> State:
    """Run the tokens through the layers, and leave the hidden states of the selected ones and who
    they are to the head: so one program of it fits every backbone."""
    rows = inputs.rows
    tokens_T = state.history_BT[inputs.slots_B[rows.rows_T], rows.positions_T]
    written, hidden_TD = decoder.forward(weights, state.cache, tokens_T, rows, config, ops)
    hidden_BD = hidden_TD[inputs.selected_B]
    return dataclasses.replace(
        state,
        cache=written,
        hidden_BD=_in_place(state.hidden_BD, hidden_BD),
        selection=jax.tree.map(_in_place, state.selection, inputs.selection),
    )


def _in_place(old: Array, new: Array) -> Array:
    """`new` in the memory of `old`, at its beginning."""
    return lax.dynamic_update_slice(old, new, [0] * new.ndim)


def head(
    weights: dict[str, Any],
    history_BT: Array,
    hidden_BD: Array,
    selection: Selection,
    table: SamplingTable,
    *,
    config: ModelConfig,
    num_rows: int,
) -> tuple[Array, Sampled]:
    """Logits of the first selected positions, their next tokens, and these written to the
    history."""
    sampled = sample(
        decoder.logits(weights, hidden_BD[:num_rows], config),
        history_BT,
        table,
        selection.slots_B,
        selection.positions_B,
        selection.targets_B,
        selection.features,
    )
    slots_B, positions_B = selection.slots_B[:num_rows], selection.positions_B[:num_rows]
    # A sequence at its very limit has no place for its last token, and nobody will read it.
    history_BT = history_BT.at[slots_B, positions_B + 1].set(sampled.tokens_B, mode="drop")
    return history_BT, sampled


def remember(history_BT: Array, slot: Array, tokens_BT: Array) -> Array:
    """The history with one slot's row replaced; `tokens_BT` is `[1, …]`."""
    return lax.dynamic_update_slice_in_dim(history_BT, tokens_BT, slot, axis=0)


class Step:
    """Compiles all programs for a model and its limits, and runs steps with them."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        limits: Limits,
        buckets: Buckets,
        num_pages: int,
        dtype: jnp.dtype,
        cache_dtype: jnp.dtype,
        ops: PageOps,
    ):
        self.config, self.mesh, self.limits, self.buckets = config, mesh, limits, buckets
        self.dtype, self.ops = dtype, ops
        rows = limits.max_batch_size
        pool = cache.abstract(
            config, num_pages, limits.page_size, cache_dtype, mesh, row_major=ops.row_major
        )
        hidden = jax.ShapeDtypeStruct(
            (rows, config.hidden_size), dtype, sharding=shardings.replicated(mesh)
        )
        self.abstract_state = State(
            cache=pool,
            history_BT=self._ints(rows + 1, limits.pages_per_row * limits.page_size),
            hidden_BD=hidden,
            selection=jax.tree.map(lambda leaf: self._ints(*leaf.shape), selection_shapes(rows)),
        )
        self.compile_seconds = 0.0
        self._backbones: dict[int, Any] = {}
        self._heads: dict[int, Any] = {}

    def initial_state(self) -> State:
        """Zeros on the devices."""

        def zeros() -> State:
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.abstract_state)

        return jax.jit(zeros, out_shardings=self._formats())()

    def _formats(self) -> State:
        """Where the state's arrays lie, and in which order of their axes if that is prescribed."""
        return jax.tree.map(lambda leaf: leaf.format, self.abstract_state)

    def __call__(
        self, weights: dict[str, Any], state: State, batch: Batch
    ) -> tuple[State, Results | None]:
        state = self._backbones[batch.num_tokens](weights, state, batch.joined)
        if batch.num_selected is None:
            return state, None
        run_head = self._heads[batch.num_selected]
        top = {name: leaf for name, leaf in weights.items() if name != "layers"}
        history_BT, joined = run_head(
            top, state.history_BT, state.hidden_BD, state.selection, batch.table
        )
        return dataclasses.replace(state, history_BT=history_BT), Results(
            joined, batch.num_selected
        )

    def admit(self, state: State, slot: int, token_ids: np.ndarray) -> State:
        """Enter a request's known tokens into the history, before the first step that runs it."""
        row_BT = np.zeros((1, self.abstract_state.history_BT.shape[1]), np.int32)
        row_BT[0, : len(token_ids)] = token_ids
        return dataclasses.replace(
            state, history_BT=self._remember(state.history_BT, np.int32(slot), row_BT)
        )

    def compile(self, weights: dict[str, Any], table: SamplingTable) -> None:
        """Compile every bucket, two at a time; `weights` and `table` may be abstract."""
        started = time.perf_counter()
        platform = self.mesh.devices.flat[0].platform
        weights, table = jax.tree.map(_abstract, (weights, table))
        history_width = self.abstract_state.history_BT.shape[1]
        jobs = [
            (self._backbones, size, partial(self.lower_backbone, weights, size))
            for size in self.buckets.tokens
        ]
        jobs += [
            (self._heads, size, partial(self.lower_head, weights, table, size))
            for size in self.buckets.rows
        ]

        self._remember = (
            jax.jit(remember, donate_argnums=0)
            .lower(self.abstract_state.history_BT, self._ints(), self._ints(1, history_width))
            .compile()
        )
        with (
            jax.set_mesh(self.mesh),
            ThreadPoolExecutor(max_workers=2) as threads,
            tqdm(total=len(jobs), desc="compiling", unit="program", disable=None) as bar,
        ):
            running = []
            for programs, size, lower in jobs:
                lowered = lower()

                def finish(programs=programs, size=size, lowered=lowered) -> None:
                    backbone = programs is self._backbones
                    options = compiler_options(platform, size, side_by_side=backbone)
                    programs[size] = lowered.compile(compiler_options=options)
                    bar.update()

                running.append(threads.submit(finish))
            for job in running:
                job.result()
        self.compile_seconds = time.perf_counter() - started
        logger.info("compiled %d programs in %.1f s", len(jobs), self.compile_seconds)

    def _ints(self, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=shardings.replicated(self.mesh))

    def lower_backbone(self, weights: dict[str, Any], size: int) -> Lowered:
        """The backbone for `size` tokens; under `jax.set_mesh`, as the head."""
        layout = inputs_layout(size, self.buckets, self.limits)

        def run(weights, state, joined):
            # Copied: what comes from the host lies elsewhere in each step, and of a CUDA graph XLA
            # updates every kernel that reads it.  So one kernel does.
            joined = lax.optimization_barrier(jnp.pad(joined, (0, 1)))
            return backbone(weights, state, layout.split(joined), config=self.config, ops=self.ops)

        run.__name__ = f"backbone_{size}"
        jitted = jax.jit(run, donate_argnums=1, out_shardings=self._formats())
        return jitted.lower(weights, self.abstract_state, self._ints(layout.size))

    def lower_head(self, weights: dict[str, Any], table: SamplingTable, size: int) -> Lowered:
        """Head and sampler for `size` rows."""
        layout = sampled_layout(size)

        def run(weights, history_BT, hidden_BD, selection, table):
            history_BT, sampled = head(
                weights, history_BT, hidden_BD, selection, table,
                config=self.config, num_rows=size,
            )  # fmt: skip
            return history_BT, layout.join(sampled)

        run.__name__ = f"head_{size}"
        top = {name: leaf for name, leaf in weights.items() if name != "layers"}
        state = self.abstract_state
        return jax.jit(run, donate_argnums=1).lower(
            top, state.history_BT, state.hidden_BD, state.selection, table
        )


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
