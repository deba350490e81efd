"""What a program says where devices along the axis `tensor` divide a layer's kernels (arXiv 1909.08053, section 3).

Kernels that are divided by columns (q, k, v, gate, up) read the whole input; one that is divided by rows (o, down)
then gives a sum over these devices. Without a mesh, or with `tensor` of 1, nothing is said.
"""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from jaxft.mesh import constrain, sizes_in_force


def column_parallel_input(
    x: Float[Array, "batch length size"],
) -> tuple[Float[Array, "batch length size"], Float[Array, "batch length size"]]:
    """x twice: what kernels that are divided by columns read, and what their adapters read.

    Each device has a part of the gradient to x, and the devices add these up (the paper's operator f). The compiler
    does so once for all kernels if nothing else is added to these parts before. What comes of adapters is whole on
    each device: it has a sum of its own, and is added after.
    """
    return _column_parallel_input(x) if sizes_in_force()["tensor"] > 1 else (x, x)


@jax.custom_vjp
def _column_parallel_input(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, x


_column_parallel_input.defvjp(
    lambda x: ((x, x), None), lambda _, cotangents: (cotangents[1] + cotangents[0],)
)


def row_parallel_output(
    y: Float[Array, "batch length hidden"],
) -> Float[Array, "batch length hidden"]:
    """y, which a kernel that is divided by rows gave. The gradient to y is gathered along the length.

    Otherwise it would stay divided along the length, as the residual's gradient is, and the kernel be gathered.
    """
    return y if jax.sharding.get_abstract_mesh().empty else _row_parallel_output(y)


@jax.custom_vjp
def _row_parallel_output(y: jax.Array) -> jax.Array:
    return y


_row_parallel_output.defvjp(
    lambda y: (y, None), lambda _, cotangent: (constrain(cotangent, "normalized"),)
)
