"""Products of rows with the low-rank adapter of each: `s (x a) b`, where every row has its own a, b and s.

Three ways compute it, behind `each_low_rank`, which chooses by the shapes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# With so few adapters, and so many rows of each, a token a row is multiplied by all of them in less time than a's and
# b's are fetched for each row. On a CPU (width 576, rank 16), beside the base's product: of 32 rows and 2, 4 and 8
# adapters 0.00, 0.14 and 0.18 ms against 0.17, 0.16 and 0.16 ms; of 64 rows and 16 adapters 0.5 against 0.2 ms.
FEW, ROWS_OF_EACH = 4, 4


def each_low_rank(
    x: Float[Array, "rows length in"],
    a: Float[Array, "adapters rank in"],
    b: Float[Array, "adapters rank out"],
    scale: Float[Array, " adapters"],
    groups: Int[Array, " rows"] | None,
) -> Float[Array, "rows length out"]:
    """`s (x a^T) b` of each row's adapter, in x's dtype.

    Args:
        x: the input.
        a: what the input is multiplied by first, with the input's axis last: so each number that a row's product
            adds up lies beside the next, which took two thirds of the time on a CPU.
        b: what that is multiplied by.
        scale: s of each.
        groups: the adapter of each row; a row of an adapter that there is not (as -1) gives 0. None: the rows are laid
            by adapter, in runs of one length.

    Raises:
        ValueError: rows that are laid by adapter, and no whole runs.
    """
    if groups is None:
        return laid_by_adapter(x, a, b, scale)
    few = len(a) <= FEW and ROWS_OF_EACH * len(a) <= len(groups)
    return (side_by_side if few and x.shape[1] == 1 else by_row)(x, a, b, scale, groups)


def laid_by_adapter(
    x: Float[Array, "rows length in"],
    a: Float[Array, "adapters rank in"],
    b: Float[Array, "adapters rank out"],
    scale: Float[Array, " adapters"],
) -> Float[Array, "rows length out"]:
    """Rows in runs, one an adapter: a product of stacks, which reads each a and b once. Batches of training lie so."""
    rows, length, _ = x.shape
    if rows % len(a):
        raise ValueError(f"{rows} rows are no runs of one length for {len(a)} adapters")
    runs = x.reshape(len(a), -1, x.shape[-1])
    narrow = _narrow(runs, a) * scale[:, None, None].astype(x.dtype)
    return jnp.matmul(narrow, b.astype(x.dtype)).reshape(rows, length, -1)


def by_row(
    x: Float[Array, "rows length in"],
    a: Float[Array, "adapters rank in"],
    b: Float[Array, "adapters rank out"],
    scale: Float[Array, " adapters"],
    groups: Int[Array, " rows"],
) -> Float[Array, "rows length out"]:
    """a and b fetched for each row: the work of one adapter, whatever their number."""
    own = of_rows(scale, groups, 0.0).astype(x.dtype)
    narrow = _narrow(x, _fetched(a, groups)) * own[:, None, None]
    return jnp.matmul(narrow, _fetched(b, groups).astype(x.dtype))


def _narrow(
    x: Float[Array, "rows length in"], a: Float[Array, "rows rank in"]
) -> Float[Array, "rows length rank"]:
    return jnp.einsum("nli,nri->nlr", x, a.astype(x.dtype))


def side_by_side(
    x: Float[Array, "rows length in"],
    a: Float[Array, "adapters rank in"],
    b: Float[Array, "adapters rank out"],
    scale: Float[Array, " adapters"],
    groups: Int[Array, " rows"],
) -> Float[Array, "rows length out"]:
    """All rows times all a, what is not of a row's adapter set to 0, and that times all b: two products in all."""
    count, rank, size = a.shape
    wide = a.reshape(count * rank, size).astype(x.dtype)
    here = groups[:, None] == jnp.arange(count, dtype=groups.dtype)[None, :]
    own = jnp.where(here, jnp.broadcast_to(scale[None, :], here.shape), 0.0).astype(x.dtype)
    own = jnp.repeat(own, rank, axis=1)[:, None, :]
    narrow = jnp.einsum("nli,ci->nlc", x, wide)
    narrow = narrow * jnp.broadcast_to(own, narrow.shape)
    return narrow @ b.reshape(count * rank, -1).astype(x.dtype)


def of_rows(
    values: Float[Array, "adapters ..."], groups: Int[Array, " rows"], otherwise: float
) -> Float[Array, "rows ..."]:
    """The values of each row's adapter; `otherwise` in a row whose adapter there is not."""
    known = (groups >= 0) & (groups < len(values))
    shape = (*groups.shape, *values.shape[1:])
    known = jnp.broadcast_to(known.reshape(-1, *(1,) * (values.ndim - 1)), shape)
    return jnp.where(known, _fetched(values, groups), jnp.asarray(otherwise, values.dtype))


def _fetched(values: Float[Array, "adapters ..."], groups: Int[Array, " rows"]) -> jax.Array:
    """Each row's values; of a row without an adapter those of any."""
    inside = jnp.clip(groups, 0, len(values) - 1)
    return values.at[inside].get(mode="promise_in_bounds")
